"""Layers with one weight per scenario, applied to each row with the weight of its own scenario only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_DENSE: ContextVar[bool] = ContextVar("dense", default=False)


@contextmanager
def dense_dispatch() -> Iterator[None]:
    """Within it every `Dispatch` of an exported graph is dense: for operators that others know, too, such as those of ONNX."""
    before = _DENSE.set(True)
    try:
        yield
    finally:
        _DENSE.reset(before)


def _exporting() -> bool:
    """Whether torch.export reads this. Asked by `torch.compiler.is_exporting()`, torch.compile of torch 2.11 says yes, too."""
    return torch.compiler._is_exporting_flag


class Dispatch:
    """The rows of one batch by scenario; made once per step and used by every scenario-specific layer.

    Two strategies give the same numbers. `dense` computes all S outputs and picks one: B*S*i*o multiply-adds, no
    sorting. `grouped` sorts the rows by scenario and multiplies each group by its own weight: B*i*o, and where the device has
    no kernel for that (CUDA in float32) at most twice as many. Layers between
    `arrange` and `restore` see rows in the strategy's order. Padding rows travel with scenario 0: their logits have no
    loss, hence no gradient.

    Args:
        scenario: [B] int64 in 0..S-1.
        num_scenarios: S.
        grouped: choose the strategy; `prefers_grouped` knows which is faster. Graphs exported in `dense_dispatch` are dense.
    """

    def __init__(self, scenario: Tensor, num_scenarios: int, *, grouped: bool) -> None:
        dense = _exporting() and _DENSE.get()
        self.num_scenarios, self.grouped = num_scenarios, grouped and not dense
        self.scenario = scenario
        if self.grouped:
            self.scenario, self.order = torch.sort(scenario, stable=True)
            self.inverse = torch.empty_like(self.order).scatter_(
                0, self.order, torch.arange(scenario.shape[0], device=scenario.device)
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
        if self.grouped and _exporting():
            own: Tensor = torch.ops.mmlrec.scenario_linear(x, self.ends, weight, bias, shared)
            return own
        if self.grouped and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _Grouped.apply(x, self.ends, weight, bias, shared)
        weight = (weight if shared is None else weight * shared).to(kind)
        bias = None if bias is None else bias.to(kind)
        if self.grouped and x.dtype == torch.bfloat16 and _has_grouped_kernel(x.device):
            return self._grouped(x, weight, bias)
        if self.grouped and x.device.type != "cpu" and self.num_scenarios > 2:  # of two, blocks are as many rows as `dense`
            return self._in_blocks(x, weight, bias)
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

    def _in_blocks(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Each scenario's rows in blocks of B / S, padded with zeros, and each block with a copy of its weight.

        S scenarios fill at most 2 S such blocks, however the rows are spread, so that no size depends on what is in the batch
        and the device is never waited for; it multiplies at most 2 B rows.
        """
        (stack, rows, _), scenarios = x.shape, self.num_scenarios
        size, count = -(-rows // scenarios), 2 * scenarios
        starts = F.pad(self.ends, (1, 0))[:-1]
        blocks = (self.ends - starts + size - 1) // size  # of each scenario
        ends = blocks.cumsum(0)
        places = torch.arange(rows, device=x.device) + ((ends - blocks) * size - starts)[self.scenario]
        owners = torch.searchsorted(ends, torch.arange(count, device=x.device), right=True).clamp(max=scenarios - 1)
        members = (torch.arange(stack, device=x.device).view(-1, 1) * scenarios + owners).flatten()
        filled = x.new_zeros(stack, count * size, x.shape[2]).index_copy(1, places, x).view(stack * count, size, x.shape[2])
        # By `embedding`, whose backward adds the copies' gradients in a fixed order.
        own = F.embedding(members, weight.flatten(1)).view(-1, *weight.shape[1:])
        y = torch.bmm(filled, own) if bias is None else torch.baddbmm(F.embedding(members, bias).unsqueeze(1), filled, own)
        return y.view(stack, count * size, weight.shape[2]).index_select(1, places)


def _has_grouped_kernel(device: torch.device) -> bool:
    """Whether grouped_mm has a kernel there for bfloat16; else, as for other types, it waits for the device and loops."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


#: Numbers of weights that are made and used together by `_Grouped`, so that they are still in the cache: 1 MiB in float32.
CACHED_NUMBERS = 1 << 18


class _Grouped(torch.autograd.Function):
    """`Dispatch.linear` on a CPU: one scenario's product of matrices after the other, without padding.

    What is no product of matrices is done for as many scenarios at once as fit into the cache: many small operations cost
    more than their numbers, and large ones pay for each trip to memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None, shared: Tensor | None) -> Tensor:
        """Arguments as for `linear`; `ends` [S]: where the rows of each scenario end."""
        ctx.sizes = _sizes(ends)
        y = _grouped_linear(x, ctx.sizes, weight, bias, shared)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, ends, weight, shared)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, ends, weight, shared = ctx.saved_tensors
        # Balancing differentiates one objective at a time; rows of all other scenarios then have no gradient, at no cost.
        live = _live(grad, ends)
        make = torch.empty_like if all(live) else torch.zeros_like
        grad_x = make(x, memory_format=torch.contiguous_format)
        grad_weight = make(weight, memory_format=torch.contiguous_format)
        grad_bias = make(weight[:, 0], memory_format=torch.contiguous_format)
        grad_shared = None if shared is None else torch.zeros_like(shared)
        columns, at_rows, at_outputs = _parts(x.mT, ctx.sizes, 1), _parts(grad_x, ctx.sizes), _parts(grad, ctx.sizes)
        at_biases = grad_bias.unbind()
        for members, own in _cached(weight):
            if not any(live[member] for member in members):
                continue
            at_weights = grad_weight[members.start : members.stop]
            at_products = at_weights if at_weights.dtype == x.dtype else torch.zeros_like(at_weights, dtype=x.dtype)
            products = _product(own.mT, None if shared is None else shared.mT, x.dtype)
            for member, product, at_product in zip(members, products, at_products.unbind(), strict=True):
                if live[member]:
                    torch.mm(at_outputs[member], product, out=at_rows[member])
                    torch.mm(columns[member], at_outputs[member], out=at_product)
                    torch.sum(at_outputs[member], 0, out=at_biases[member])
            if shared is not None and grad_shared is not None:
                grad_shared += (at_products * own).sum(0)
                torch.mul(at_products, shared, out=at_weights)
            elif at_products is not at_weights:
                at_weights.copy_(at_products)
        return grad_x, None, grad_weight, grad_bias if ctx.has_bias else None, grad_shared


def _sizes(ends: Tensor) -> list[int]:
    """Rows of each scenario, from where they end."""
    return list(torch.diff(ends, prepend=ends.new_zeros(1)).tolist())


def _grouped_linear(x: Tensor, sizes: list[int], weight: Tensor, bias: Tensor | None, shared: Tensor | None) -> Tensor:
    y = x.new_empty(*x.shape[:2], weight.shape[2])
    rows, outputs = _parts(x, sizes), _parts(y, sizes)
    biases = () if bias is None else bias.to(x.dtype).unbind()
    for members, own in _cached(weight):
        if not any(sizes[member % len(sizes)] for member in members):  # of few rows most scenarios have none
            continue
        for member, product in zip(members, _product(own, shared, x.dtype), strict=True):
            if not sizes[member % len(sizes)]:
                continue
            if biases:
                torch.addmm(biases[member], rows[member], product, out=outputs[member])
            else:
                torch.mm(rows[member], product, out=outputs[member])
    return y


# The same as one operator of exported graphs: sizes of groups are no shapes there. Who loads such a graph imports this file.
torch.library.define(
    "mmlrec::scenario_linear", "(Tensor x, Tensor ends, Tensor weight, Tensor? bias, Tensor? shared) -> Tensor"
)


@torch.library.impl("mmlrec::scenario_linear", "CompositeExplicitAutograd")
def _scenario_linear(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None, shared: Tensor | None) -> Tensor:
    return _grouped_linear(x, _sizes(ends), weight, bias, shared)


@torch.library.register_fake("mmlrec::scenario_linear")
def _like_scenario_linear(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None, shared: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[2])


def _cached(weight: Tensor) -> Iterator[tuple[range, Tensor]]:
    """As many members of [N * S, i, o] at a time as fit into the cache."""
    step = max(1, CACHED_NUMBERS // max(1, weight[0].numel()))
    for first in range(0, len(weight), step):
        own = weight[first : first + step]
        yield range(first, first + len(own)), own


def _product(own: Tensor, shared: Tensor | None, kind: torch.dtype) -> tuple[Tensor, ...]:
    return (own if shared is None else own * shared).to(kind).unbind()


def _live(grad: Tensor, ends: Tensor) -> list[bool]:
    """Whether member n * S + s has a gradient [N, B, o] that is not zero (or not a number) in one of its rows."""
    counts = F.pad((grad.abs().amax(2) != 0).cumsum(1), (1, 0))[:, F.pad(ends, (1, 0))]  # [N, S + 1]
    return list((torch.diff(counts) > 0).flatten().tolist())


def _parts(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    """Rows of member n * S + s in [N, B, k]: those of scenario s in x[n]; columns of [N, k, B] with `dim` = 1."""
    return [part for own in x.unbind() for part in own.split(sizes, dim)]


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

    Measured on two CPU cores at B = 4096, i = 128, forward and backward in float32 (dense / grouped, ms): S = 2, o = 16
    1.0 / 1.3; S = 2, o = 32 1.6 / 1.6; S = 2, o = 64 2.8 / 2.3; S = 3, o = 16 1.2 / 1.2; S = 4, o = 64 5.1 / 2.5; S = 8,
    o = 64 9.9 / 3.0; S = 30, o = 64 34 / 4.3.
    """
    return num_scenarios > 2 or width > 32


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
