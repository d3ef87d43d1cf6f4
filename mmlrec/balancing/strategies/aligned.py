"""Aligned-MTL: all principal components of the gradients get the length of the shortest one.

Senushkin, Patakin, Kuznetsov, Konushin, "Independent Component Alignment for Multi-Task Learning", CVPR 2023.

    Q = V diag(l) V^T
    c = sqrt(l_min) V diag(l^-1/2) V^T 1, over the eigenvalues that are not zero

On a GPU the host waits for the Gram matrix, once a step, and solves there: torch's `eigh` on CUDA waits, too.
"""

from __future__ import annotations

import numpy as np

from mmlrec.balancing.gradients import Array, GradientBalancing


class Aligned(GradientBalancing):
    """Aligned principal components."""

    def rule(self, gram: Array, losses: Array, step: int) -> Array:
        """See the base class."""
        return aligned(gram)


def aligned(gram: Array) -> Array:
    """Coefficients that give all principal components of the gradients the length of the shortest one."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > 1e-10 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return np.asarray(np.sqrt(values[0]) * (vectors / np.sqrt(values)) @ vectors.sum(axis=0))
