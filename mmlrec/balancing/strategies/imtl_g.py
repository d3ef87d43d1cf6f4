"""IMTL-G: the update has the same projection on the direction of every gradient.

Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, "Towards Impartial Multi-task Learning", ICLR 2021.

    u_t        = g_t / |g_t|, D the rows g_1 - g_j, U the rows u_1 - u_j, j = 2..K
    c_{2..K}   = K g_1 U^T (D U^T)^-1
    c_1        = K - sum of the others

K times, because the weights of a sum of K losses add up to K; coefficients may be negative. Gradients of one direction have
equal projections whatever c is: then c = 1. Of several solutions the one whose shares c_t |g_t| are least is taken.

How many solutions there are, singular values tell; where there are several, a system solved blindly has none. On a GPU the host
waits for the Gram matrix, once a step, and solves there: torch's `svd` on CUDA waits, too.
"""

from __future__ import annotations

import numpy as np

from mmlrec.balancing.gradients import Array, GradientBalancing


class ImtlG(GradientBalancing):
    """Equal projections on all gradients."""

    def rule(self, gram: Array, losses: Array, step: int) -> Array:
        """See the base class."""
        return len(gram) * imtl_g(gram)


def imtl_g(gram: Array) -> Array:
    """Coefficients of sum 1 under which the update has the same projection on every gradient's direction."""
    norms = np.sqrt(np.diag(gram))
    cosines = gram / np.outer(norms, norms)
    # In shares b_t = c_t |g_t| the condition is (u_1 - u_j) . sum_t b_t u_t = 0: lengths, which may differ by more than
    # float64 holds of their squares, are in the sum of c alone.
    matrix = cosines[0] - cosines[1:]
    if np.abs(matrix).max(initial=0.0) <= 1e-14:
        return np.full(len(gram), 1.0 / len(gram))  # One direction: any coefficients do, and the matrix is but rounding.
    _, values, rows = np.linalg.svd(matrix)
    solutions = rows[int((values > 1e-8 * values[0]).sum()) :]
    lengths = norms / norms.min()
    along = solutions @ (1.0 / lengths)
    if along @ along <= 1e-16 * (lengths**-2.0).sum():
        return np.full(len(gram), 1.0 / len(gram))  # All solutions have coefficients of sum 0.
    c = along @ solutions / lengths
    return np.asarray(c / c.sum())
