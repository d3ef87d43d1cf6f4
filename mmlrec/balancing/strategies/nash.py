"""Nash-MTL: the Nash bargaining solution, in which the objectives gain in proportion.

Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, "Multi-Task Learning as a Bargaining Game", ICML 2022.

    (C + ridge I) a = 1 / a, a > 0       C the cosines between the gradients, C_ij = Q_ij / (|g_i| |g_j|)
    c_t = sqrt(|Q|) a_t / |g_t|          |Q| the Frobenius norm

Without the ridge this is Q / |Q| c = 1 / c, the published rule, and gradients that cancel have no solution. The ridge stands on
the cosines, so that an objective's share a_t of the update does not depend on the scale of its loss: on Q / |Q| it would
outweigh the diagonal of short gradients and silence them. The paper's clipping of the gradient's norm to 1 is
`dense.clip_norm: 1`, off by default.

It takes 6 to 15 Newton steps, each with a system of K equations. On a GPU the host waits for the Gram matrix, once a step, and
solves there: that many steps would be more than a hundred small kernels, which take longer than one wait.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from mmlrec.balancing.gradients import Array, GradientBalancing, GradientBalancingConfig


class Nash(GradientBalancing):
    """Nash bargaining on the cosines between the gradients."""

    class Config(GradientBalancingConfig):
        """Options of Nash-MTL."""

        ridge: float = Field(
            default=0.01, gt=0, description="Added to the matrix of cosines: bounds the shares a by sqrt(K / ridge)."
        )

    config: Config

    def rule(self, gram: Array, losses: Array, step: int) -> Array:
        """See the base class."""
        norms = np.sqrt(np.diag(gram))
        shares = nash(gram / np.outer(norms, norms), self.config.ridge)
        return np.asarray(np.sqrt(np.linalg.norm(gram)) * shares / norms)


def nash(gram: Array, ridge: float = 0.0) -> Array:
    """The positive c with (Q + ridge I) c = 1 / c: the bargaining solution of the objectives.

    It minimises c . Q c / 2 - sum log c, by damped Newton steps. Without a ridge, gradients that cancel have no solution.
    """
    matrix = gram + ridge * np.eye(len(gram))
    c = 1.0 / np.sqrt(np.diag(matrix))
    for _ in range(200):
        slope = matrix @ c - 1.0 / c
        step = np.linalg.solve(matrix + np.diag(c**-2), -slope)
        decrement = np.sqrt(max(float(-slope @ step), 0.0))
        c = c + (step / (1.0 + decrement) if decrement > 0.25 else step)
        if decrement < 1e-12:
            break
    return c
