"""Layers with one weight per scenario, applied to each row with the weight of its own scenario only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Dispatch:
    """The rows of one batch by scenario; made once per step and used by every scenario-specific layer.

    Two strategies give the same numbers. `dense` computes all S outputs and picks one: B*S*i*o multiply-adds, no
    sorting. `grouped` sorts the rows by scenario and multiplies each group by its own weight: B*i*o. Layers between
    `arrange` and `restore` see rows in the strategy's order. Padding rows travel with scenario 0: their logits have no
    loss, hence no gradient.

    Args:
        scenario: [B] int64 in 0..S-1.
        num_scenarios: S.
        grouped: choose the strategy; `prefers_grouped` knows which is faster.
    """

    def __init__(self, scenario: Tensor, num_scenarios: int, *, grouped: bool) -> None:
        self.num_scenarios, self.grouped = num_scenarios, grouped
        self.scenario = scenario
        if grouped:
            self.scenario, self.order = torch.sort(scenario, stable=True)
            self.inverse = torch.empty_like(self.order).scatter_(
                0, self.order, torch.arange(len(scenario), device=scenario.device)
            )
            ids = torch.arange(num_scenarios, device=scenario.device)
            self.ends = torch.searchsorted(self.scenario, ids, right=True)

    def arrange(self, x: Tensor) -> Tensor:
        """Rows [..., B, i] from batch order into the strategy's order."""
        return x.index_select(-2, self.order) if self.grouped else x

    def restore(self, x: Tensor) -> Tensor:
        """Rows [..., B, o] from the strategy's order back into batch order."""
        return x.index_select(-2, self.inverse) if self.grouped else x

    def own(self, x: Tensor) -> Tensor:
        """Of every scenario's results each row's own: [N * S, B, k], index n * S + s, rows arranged -> [N, B, k]."""
        members = x.unflatten(0, (-1, self.num_scenarios))
        index = self.scenario.view(1, 1, -1, 1).expand(members.shape[0], 1, -1, x.shape[2])
        return torch.gather(members, 1, index)[:, 0]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, shared: Tensor | None = None) -> Tensor:
        """y[n, b] = x[n, b] @ (weight[n, s_b] * shared) + bias[n, s_b].

        Args:
            x: [N, B, i], rows in the strategy's order.
            weight: [N * S, i, o], index n * S + s.
            bias: [N * S, o] or None.
            shared: [i, o], multiplied element by element; None = 1.

        Returns:
            [N, B, o]. Scenarios without rows get zero gradients.
        """
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x = x.to(kind)
        if self.grouped and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _Grouped.apply(x, self.ends, weight, bias, shared)
        weight = (weight if shared is None else weight * shared).to(kind)
        bias = None if bias is None else bias.to(kind)
        # torch.compile knows grouped_mm's result in bfloat16 only.
        kinds = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.float32, torch.bfloat16)
        if self.grouped and x.dtype in kinds:
            return self._grouped(x, weight, bias)
        return self._dense(x, weight, bias)

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (stack, rows, _), scenarios = x.shape, self.num_scenarios
        fan_in, width = weight.shape[1:]
        joint = weight.view(stack, scenarios, fan_in, width).transpose(1, 2).reshape(stack, fan_in, scenarios * width)
        y = torch.bmm(x, joint) if bias is None else torch.baddbmm(bias.view(stack, 1, scenarios * width), x, joint)
        own = self.scenario.view(1, rows, 1, 1).expand(stack, rows, 1, width)
        return torch.gather(y.view(stack, rows, scenarios, width), 2, own)[:, :, 0]

    def _grouped(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stack, rows, fan_in = x.shape
        width = weight.shape[2]
        # grouped_mm wants every row of its operands to start on a multiple of 16 bytes.
        unit = 16 // x.element_size()
        pad_in, pad_out = -fan_in % unit, -width % unit
        flat = x.reshape(stack * rows, fan_in)
        if pad_in or pad_out:  # F.pad copies also where there is nothing to pad.
            flat, weight = F.pad(flat, (0, pad_in)), F.pad(weight, (0, pad_out, 0, pad_in))
        ends = (torch.arange(stack, device=x.device).view(-1, 1) * rows + self.ends).flatten().to(torch.int32)
        y = F.grouped_mm(flat, weight, offs=ends)[:, :width].view(stack, rows, width)
        if bias is None:
            return y
        members = torch.arange(stack, device=x.device).view(-1, 1) * self.num_scenarios + self.scenario
        return y + F.embedding(members, bias)


class _Grouped(torch.autograd.Function):
    """`Dispatch.linear` on a CPU: one scenario after the other, without padding.

    A scenario's product of weights is made, used and forgotten while it is in the cache: the memory traffic that grows with
    the number of scenarios is one read of the weights forward, and one read and the write of their gradient backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None, shared: Tensor | None) -> Tensor:
        """Arguments as for `linear`; `ends` [S]: where the rows of each scenario end."""
        y = x.new_empty(*x.shape[:2], weight.shape[2])
        ctx.sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        biases = () if bias is None else bias.to(x.dtype).unbind()
        for member, (own, rows, out) in enumerate(
            zip(weight.unbind(), _parts(x, ctx.sizes), _parts(y, ctx.sizes), strict=True)
        ):
            product = (own if shared is None else own * shared).to(x.dtype)
            if biases:
                torch.addmm(biases[member], rows, product, out=out)
            else:
                torch.mm(rows, product, out=out)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, shared)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shared = ctx.saved_tensors
        at_outputs = _parts(grad, ctx.sizes)
        # Balancing differentiates one objective at a time; rows of all other scenarios then have no gradient, at no cost.
        live = [member for member, part in enumerate(at_outputs) if part.any()]
        make = torch.empty_like if len(live) == len(weight) else torch.zeros_like
        grad_x = make(x, memory_format=torch.contiguous_format)
        grad_weight = make(weight, memory_format=torch.contiguous_format)
        grad_bias = make(weight[:, 0], memory_format=torch.contiguous_format)
        grad_shared = None if shared is None else torch.zeros_like(shared)
        rows, at_rows = _parts(x, ctx.sizes), _parts(grad_x, ctx.sizes)
        weights, at_weights, at_biases = weight.unbind(), grad_weight.unbind(), grad_bias.unbind()
        for member in live:
            own, at_output = weights[member], at_outputs[member]
            product = (own if shared is None else own * shared).to(x.dtype)
            torch.mm(at_output, product.t(), out=at_rows[member])
            torch.sum(at_output, 0, out=at_biases[member])
            at_product = torch.mm(rows[member].t(), at_output)
            if shared is None or grad_shared is None:
                at_weights[member].copy_(at_product)
            else:
                torch.mul(at_product, shared, out=at_weights[member])
                grad_shared.addcmul_(at_product, own)
        return grad_x, None, grad_weight, grad_bias if ctx.has_bias else None, grad_shared


def _parts(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """Rows of member n * S + s in [N, B, k]: those of scenario s in x[n]."""
    return [part for own in x.unbind() for part in own.split(sizes)]


class ScenarioEmbedding(nn.Module):
    """A vector for each scenario, [S, width], N(0, 0.01^2) at the start as tables are; part of the network."""

    def __init__(self, num_scenarios: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_scenarios, width).normal_(0.0, 0.01, generator=generator))

    def forward(self, scenario: Tensor) -> Tensor:
        """[B] int64 -> [B, width]."""
        return F.embedding(scenario, self.weight)


def prefers_grouped(num_scenarios: int, width: int) -> bool:
    """Whether sorting beats computing all scenarios, for the widest scenario-specific layer.

    Measured on two CPU cores at B = 4096, i = 128, forward and backward in float32 (dense / grouped, ms): S = 2, o = 64
    4.2 / 5.3; S = 2, o = 128 7.4 / 5.4; S = 4, o = 64 6.8 / 3.4; S = 8, o = 64 12.7 / 4.0; S = 30, o = 64 42 / 4.9.
    """
    return num_scenarios > 2 or width > 64


def scenario_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scenario: Tensor, *, grouped: bool | None = None) -> Tensor:
    """One scenario-specific layer: y[b] = x[b] @ weight[s_b] + bias[s_b].

    Args:
        x: [B, i] in batch order.
        weight: [S, i, o].
        bias: [S, o] or None.
        scenario: [B] int64 in 0..S-1.
        grouped: strategy; the faster one when None.

    Returns:
        [B, o] in batch order. For several layers make one `Dispatch` and keep the rows arranged between them.
    """
    num_scenarios, _, width = weight.shape
    if grouped is None:
        grouped = prefers_grouped(num_scenarios, width)
    dispatch = Dispatch(scenario, num_scenarios, grouped=grouped)
    return dispatch.restore(dispatch.linear(dispatch.arrange(x).unsqueeze(0), weight, bias)[0])
