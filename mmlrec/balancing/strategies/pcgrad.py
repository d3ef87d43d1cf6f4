"""PCGrad: each gradient loses what points against another one, in random order.

Yu, Kumar, Gupta, Levine, Hausman, Finn, "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.

    g'_t = g_t; for j in a random order of the others: g'_t -= (g'_t . g_j / |g_j|^2) g_j where g'_t . g_j < 0
    sum_t c_t g_t = sum_t g'_t

The orders are drawn from seed and step, so they are equal on all ranks and after a resume. The projected gradients are added;
the mean instead would be a factor on the learning rate. On a GPU the host waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlrec.balancing.base import step_generator, to_device
from mmlrec.balancing.gradients import GradientBalancing


class PCGrad(GradientBalancing):
    """Projection of conflicting gradients."""

    def coefficients(self, gram: Tensor, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        generator = step_generator(self.spec.seed, step)
        orders = torch.stack([torch.randperm(len(gram), generator=generator) for _ in range(len(gram))])
        return pcgrad(gram, *to_device(torch.stack([orders, orders.argsort(1)]), gram.device).unbind())


def pcgrad(gram: Tensor, orders: Tensor, places: Tensor) -> Tensor:
    """Each gradient loses what points against another one; the projected gradients are added.

    Args:
        gram: Q [K, K], float64.
        orders: [K, K] int64, a permutation in each row: the order in which an objective meets the others, and itself.
        places: [K, K] int64, the inverses of these permutations.
    """
    squares = gram.diagonal()
    squares = torch.where(squares > 0, squares, 1.0)
    shares = gram / squares.unsqueeze(1)
    # Not the projected gradients are kept, but their inner products with all that were given; none meets itself.
    inner = gram.clone().fill_diagonal_(torch.inf)
    met = []
    for others in orders.split(1, dim=1):
        met.append(inner.gather(1, others).clamp(max=0.0))
        inner.addcmul_(met[-1], shares[others.squeeze(1)], value=-1.0)
    # Gathered, not scattered: on CUDA that adds in an order of its own, other on each rank.
    return 1.0 - (torch.cat(met, dim=1).gather(1, places) / squares).sum(0)
