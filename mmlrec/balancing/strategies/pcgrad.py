"""PCGrad: each gradient loses what points against another one, in random order.

Yu, Kumar, Gupta, Levine, Hausman, Finn, "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.

    g'_t = g_t; for j in a random order of the others: g'_t -= (g'_t . g_j / |g_j|^2) g_j where g'_t . g_j < 0
    sum_t c_t g_t = sum_t g'_t

The orders are drawn from seed and step, so they are equal on all ranks and after a resume. The projected gradients are added;
the mean instead would be a factor on the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmlrec.balancing.base import step_generator
from mmlrec.balancing.gradients import Array, GradientBalancing


class PCGrad(GradientBalancing):
    """Projection of conflicting gradients."""

    def rule(self, gram: Array, losses: Array, step: int) -> Array:
        """See the base class."""
        generator = step_generator(self.spec.seed, step)
        return pcgrad(gram, [torch.randperm(len(gram), generator=generator).tolist() for _ in gram])


def pcgrad(gram: Array, orders: Sequence[Sequence[int]]) -> Array:
    """Each gradient loses what points against another one; the projected gradients are added.

    Args:
        orders: for each objective, the order in which it meets the others (itself, if listed, is passed over).
    """
    rows = np.eye(len(gram))
    for i, order in enumerate(orders):
        for j in order:
            inner = rows[i] @ gram[:, j]
            if j != i and inner < 0:
                rows[i, j] -= inner / gram[j, j]
    return rows.sum(axis=0)
