"""Normalisation over real rows, of a batch or of each scenario, with moments shared by all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlrec.layers.over_ranks import moments_over_ranks


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) of a stack of N layer outputs [N, B, o], or of one [B, o].

    Equals `nn.BatchNorm1d(N * o)` on the flattened features, with the same state dict, except that padding rows take
    no part, that moments are summed over all ranks (so buffers are equal everywhere), and that statistics which have
    fewer than two rows in the whole batch are left alone: such a layer is normalised by its running statistics.
    Moments are computed in float32 or wider.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            x: [N, B, o] or [B, o].
            rows: bool [B], or [N, B]: the rows that count; all when absent.
        """
        kind = x.dtype
        x = x.to(torch.promote_types(kind, torch.float32))
        shape = (-1, 1, x.shape[-1]) if x.dim() == 3 else (1, x.shape[-1])
        mean, var = self.running_mean.view(shape).to(x.dtype), self.running_var.view(shape).to(x.dtype)
        if self.training:
            mean, var = self._batch_moments(x, rows, mean, var)
        scale = self.weight.view(shape) * torch.rsqrt(var + self.eps)
        return ((x - mean) * scale + self.bias.view(shape)).to(kind)

    def _batch_moments(self, x: Tensor, rows: Tensor | None, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.ones(x.shape[-2], dtype=torch.bool, device=x.device) if rows is None else rows
        keep = keep.unsqueeze(-1)
        weight = keep.to(x.dtype)
        total = (x * weight).sum(dim=-2, keepdim=True)
        own = weight.sum(dim=-2, keepdim=True).expand(*total.shape[:-1], 1)
        squares = ((x - total / own.clamp(min=1.0)).square() * weight).sum(dim=-2, keepdim=True)
        count, batch_mean, batch_var = moments_over_ranks(own, total, squares)
        enough = count >= 2
        with torch.no_grad():
            some = count.clamp(min=1.0)
            unbiased = batch_var * (some / (some - 1).clamp(min=1.0))
            step = enough.to(x.dtype) * self.momentum
            self.running_mean.copy_((mean + step * (batch_mean - mean)).flatten())
            self.running_var.copy_((var + step * (unbiased - var)).flatten())
            self.num_batches_tracked.add_(1)
        return torch.where(enough, batch_mean, mean), torch.where(enough, batch_var, var)


class PartitionedNorm(nn.Module):
    """Normalisation with statistics of each scenario: the partitioned normalisation of STAR (Sheng et al., CIKM 2021).

        y = (g * g_s) * (x - mu_s) / sqrt(var_s + eps) + (b + b_s)

    with s the row's scenario and mu_s, var_s moments of the rows of s: of the batch in training, running ones else. Padding
    rows take no part, and moments are summed over all ranks, so buffers are equal everywhere. A scenario with fewer than
    `min_count` rows in the whole batch is normalised by its running statistics. Those are updated by any scenario with two
    rows or more, as one row has no variance: a scenario that never has `min_count` rows still learns its statistics. One
    without rows gets zero gradients. Moments are computed in float32 or wider, also under autocast. The running variance is
    the unbiased one, as in `nn.BatchNorm1d`.

    The n-th batch that updates a scenario counts max(momentum, 1 / n): running statistics are the mean of all batches first,
    and do not remember where they started. `num_batches_tracked` [S] int64 is n.

    Args:
        num_scenarios: S.
        num_features: d.
        eps: added to the variance. Columns of a smaller variance are centred, but not made larger than 1 / sqrt(eps) times.
        momentum: least weight of the batch in the running statistics.
        min_count: rows below which a scenario is not normalised by its batch statistics; at least 2.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_scenarios: int, num_features: int, eps: float = 1e-3, momentum: float = 0.01, min_count: int = 2
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.min_count = eps, momentum, min_count
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.scenario_weight = nn.Parameter(torch.ones(num_scenarios, num_features))
        self.scenario_bias = nn.Parameter(torch.zeros(num_scenarios, num_features))
        self.register_buffer("running_mean", torch.zeros(num_scenarios, num_features))
        self.register_buffer("running_var", torch.ones(num_scenarios, num_features))
        self.register_buffer("num_batches_tracked", torch.zeros(num_scenarios, dtype=torch.long))

    def forward(self, x: Tensor, scenario: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            x: [B, d].
            scenario: [B] int64 in 0..S-1.
            valid: bool [B], the rows that count; all when absent.
        """
        kind = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(kind, torch.float32))
            mean, var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
            if self.training:
                mean, var = self._batch_moments(x, scenario, valid, mean, var)
            scale = self.weight * self.scenario_weight * torch.rsqrt(var + self.eps)
            shift, centred = self.bias + self.scenario_bias, x - _of_rows(mean, scenario)
            return torch.addcmul(_of_rows(shift, scenario), centred, _of_rows(scale, scenario)).to(kind)

    def _batch_moments(
        self, x: Tensor, scenario: Tensor, valid: Tensor | None, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        counted = x.new_ones(len(x), 1) if valid is None else valid.unsqueeze(1).to(x.dtype)

        def sums(rows: Tensor) -> Tensor:
            """[B, k] -> [S, k]."""
            return _sums(rows, scenario, self.running_mean.shape[0])

        own = sums(torch.cat([counted, x if valid is None else x * counted], dim=1))
        own_count, total = own[:, :1].detach(), own[:, 1:]
        squares = (x - _of_rows(total / own_count.clamp(min=1.0), scenario)).square()
        squares = sums(squares if valid is None else squares * counted)
        count, batch_mean, batch_var = moments_over_ranks(own_count, total, squares)
        enough = count >= self.min_count
        used = torch.where(enough, batch_mean, mean), torch.where(enough, batch_var, var)
        with torch.no_grad():  # Last: mean and var may be the running statistics themselves.
            some = count.clamp(min=1.0)
            unbiased = batch_var * (some / (some - 1).clamp(min=1.0))
            updated = count >= 2
            self.num_batches_tracked.add_(updated[:, 0])
            newest = self.num_batches_tracked.clamp(min=1).to(x.dtype).reciprocal().clamp(min=self.momentum)
            step = torch.where(updated, newest.unsqueeze(1), 0.0)
            self.running_mean.copy_(mean + step * (batch_mean - mean))
            self.running_var.copy_(var + step * (unbiased - var))
        return used


def _sums(rows: Tensor, scenario: Tensor, num_scenarios: int) -> Tensor:
    """Sums of the rows [B, k] of each scenario, [S, k]. On a CPU the cost does not grow with S."""
    if rows.device.type == "cpu":
        return rows.new_zeros(num_scenarios, rows.shape[1]).index_add(0, scenario, rows)
    summed: Tensor = _Sums.apply(rows, scenario, num_scenarios)
    return summed


def _of_rows(values: Tensor, scenario: Tensor) -> Tensor:
    """Of values [S, k] those of each row's scenario, [B, k]."""
    if values.device.type == "cpu":
        return values.index_select(0, scenario)
    chosen: Tensor = _OfRows.apply(values, scenario)
    return chosen


def _product(rows: Tensor, scenario: Tensor, num_scenarios: int) -> Tensor:
    """`_sums` as a product of matrices, whose order of additions is fixed. CUDA's `index_add` adds rows as they come."""
    members = torch.arange(num_scenarios, device=rows.device).unsqueeze(1) == scenario
    return members.to(rows.dtype) @ rows


class _Sums(torch.autograd.Function):
    """`_sums`, the same to the bit in each run."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scenario: Tensor, num_scenarios: int) -> Tensor:
        ctx.save_for_backward(scenario)
        return _product(rows, scenario, num_scenarios)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (scenario,) = ctx.saved_tensors
        return grads[0].index_select(0, scenario), None, None


class _OfRows(torch.autograd.Function):
    """`_of_rows`, whose gradient is the same to the bit in each run."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scenario: Tensor) -> Tensor:
        ctx.save_for_backward(scenario)
        ctx.num_scenarios = len(values)
        return values.index_select(0, scenario)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (scenario,) = ctx.saved_tensors
        return _product(grads[0], scenario, ctx.num_scenarios), None
