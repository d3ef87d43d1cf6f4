"""Sums and moments over the rows of all ranks, differentiable: what every rank reads has the gradients of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Let sums be those of this rank meanwhile, as without a process group: what is tried out waits for nobody."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _several_ranks() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. The gradient of a sum that every rank reads is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, differentiable; `x` itself without a process group or with one rank."""
    return _AllReduceSum.apply(x) if _several_ranks() else x


class _MomentsOverRanks(torch.autograd.Function):
    """See `moments_over_ranks`. Every rank reads the moments, so their gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, count: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = total.shape[-1]
        own = torch.cat([count, total, squares], dim=-1)
        gathered = own.new_empty(dist.get_world_size() * own.numel())
        dist.all_gather_into_tensor(gathered, own.flatten())
        counts, totals, all_squares = gathered.view(-1, *own.shape).split([1, width, width], dim=-1)
        everywhere = counts.sum(dim=0)
        some = everywhere.clamp(min=1.0)
        mean = totals.sum(dim=0) / some
        apart = totals / counts.clamp(min=1.0) - mean
        ctx.save_for_backward(some, total / count.clamp(min=1.0) - mean)
        ctx.mark_non_differentiable(everywhere)
        return everywhere, mean, (all_squares + counts * apart.square()).sum(dim=0) / some

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        some, apart = ctx.saved_tensors
        both = torch.cat([grads[1], grads[2]], dim=-1)
        dist.all_reduce(both)
        of_mean, of_var = both.chunk(2, dim=-1)
        return None, (of_mean + 2 * apart * of_var) / some, of_var / some


def moments_over_ranks(count: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance of the rows of all ranks, in one exchange: Chan, Golub and LeVeque (1979), equation 2.1.

    Sums are centred on the mean of their rank, since E[x^2] - E[x]^2 would cancel where the mean is large.

    Args:
        count: [..., 1], how many rows this rank has; takes no gradient.
        total: [..., d], their sum.
        squares: [..., d], the sum of the squares of their distances from their own mean, `total / max(count, 1)`.

    Returns:
        count [..., 1], mean [..., d] and biased variance [..., d]; mean and variance are 0 where there is no row at all.
    """
    if _several_ranks():
        everywhere, mean, var = _MomentsOverRanks.apply(count, total, squares)
        return everywhere, mean, var
    some = count.clamp(min=1.0)
    return count, total / some, squares / some
