"""Stacks of chains of relu(x @ weight + bias) on a CPU, faster than layer after layer; used by StackedMLP and MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmlrec.layers.products import at_input, at_weight, columns_of, linear_relu

#: Rows that are looked at first for a gradient that is not zero.
_FIRST_ROWS = 16


class Layers(Protocol):
    """What StackedMLP and MLP have in common: layers of the same kind, one after the other."""

    weights: nn.ParameterList
    biases: nn.ParameterList
    norms: nn.ModuleList
    activation: Callable[[Tensor], Tensor]
    dropout: float
    training: bool

    def __call__(self, x: Tensor, rows: Tensor | None = None, /) -> Tensor:
        """The layers' output."""
        ...


class _StackedReLU(torch.autograd.Function):
    """Stacks of chains of relu(x @ weight + bias) on a CPU: saves outputs only, owns what its backward may overwrite.

    One member after the other, through all its layers, so that what one product writes is still in the cache when relu, the
    next product or the sum of a bias reads it. First layers of narrow members on one input are one product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, depths: tuple[int, ...], *parameters: Tensor) -> tuple[Tensor, ...]:
        """`x`: [G, B, i]; `depths`: layers of each stack; `parameters`: weight and bias of each layer, stack after stack."""
        weights, biases = parameters[::2], parameters[1::2]
        inner: list[Tensor] = []
        results: list[Tensor] = []
        start = 0
        for depth in depths:
            layers = range(start, start + depth)
            outputs, result = _chain_forward(x, [weights[i] for i in layers], [biases[i] for i in layers])
            inner += [own for layer in outputs for own in layer]
            results.append(result)
            start += depth
        ctx.depths = depths
        ctx.save_for_backward(x, *weights, *results, *inner)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        saved = iter(rest)
        weights, results = list(islice(saved, sum(ctx.depths))), list(islice(saved, len(ctx.depths)))
        grad_x = _Sums(x) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        start = 0
        for grad, result, depth in zip(grads, results, ctx.depths, strict=True):
            own = weights[start : start + depth]
            outputs = [list(islice(saved, len(own[0]))) for _ in range(depth - 1)] + [list(result)]
            found += _chain_backward(x, own, outputs, grad, grad_x)
            start += depth
        return None if grad_x is None else grad_x.total(), None, *found


def _chain_forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[list[list[Tensor]], Tensor]:
    """Outputs [B, o] of each layer before the last, member by member, and the result [U, B, o] of one stack."""
    first, rows, members = _joint(x, weights[0]), x.shape[1], range(len(weights[0]))
    outputs: list[list[Tensor]] = [[] for _ in weights[1:]]
    if first:
        y = linear_relu(x[0], weights[0].transpose(0, 1).flatten(1), biases[0].flatten())
        joint = y.unflatten(1, biases[0].shape).transpose(0, 1)
        if len(weights) == 1:
            return outputs, joint
        outputs[0] = list(joint)
    result = x.new_empty(len(members), rows, weights[-1].shape[2])
    for u in members:
        below = outputs[0][u] if first else x[u % len(x)]
        for layer in range(first, len(weights) - 1):
            below = linear_relu(below, weights[layer][u], biases[layer][u])
            outputs[layer].append(below)
        linear_relu(below, weights[-1][u], biases[-1][u], out=result[u])
    return outputs, result


def _chain_backward(
    x: Tensor, weights: Sequence[Tensor], outputs: Sequence[Sequence[Tensor]], grad: Tensor, grad_x: _Sums | None
) -> list[Tensor]:
    """Gradients of weight and bias of each layer of one stack; adds that of x to `grad_x`.

    `outputs`: [B, o] of each layer and member.
    """
    # Balancing differentiates one objective at a time; the members of all other heads then have no gradient, at no cost.
    live = [u for u, own in enumerate(grad) if _any(own)]
    make = torch.empty_like if len(live) == len(grad) else torch.zeros_like
    by_weight = [make(weight, memory_format=torch.contiguous_format) for weight in weights]
    by_bias = [make(weight[:, 0], memory_format=torch.contiguous_format) for weight in weights]
    first = _joint(x, weights[0])
    columns: dict[int, Tensor] = {}
    room = x.new_empty(x.shape[1], len(live), weights[0].shape[2] if first else 0)
    for place, u in enumerate(live):
        incoming, owned = grad[u], False
        for layer in reversed(range(len(weights))):
            target = room[:, place] if layer == 0 and first else incoming if owned else torch.empty_like(outputs[layer][u])
            torch.ops.aten.threshold_backward.grad_input(incoming, outputs[layer][u], 0, grad_input=target)
            if layer == 0 and first:
                break
            torch.sum(target, 0, out=by_bias[layer][u])
            if layer:
                by_weight[layer][u] = at_weight(outputs[layer - 1][u].t(), target)
                incoming, owned = at_input(target, weights[layer][u]), True
                continue
            group = u % len(x)
            if group not in columns:
                columns[group] = columns_of(x[group])
            by_weight[0][u] = at_weight(columns[group], target)
            if grad_x is not None:
                grad_x.add(group, target, weights[0][u])
    if first and live:
        members = slice(None) if len(live) == len(grad) else live
        joint = room.flatten(1)
        by_bias[0][members] = joint.sum(0).view(len(live), -1)
        by_weight[0][members] = at_weight(x[0].t(), joint).unflatten(1, (len(live), -1)).transpose(0, 1)
        if grad_x is not None:
            grad_x.add(0, joint, weights[0][members].transpose(0, 1).flatten(1))
    return [gradient for pair in zip(by_weight, by_bias, strict=True) for gradient in pair]


def _any(grad: Tensor) -> bool:
    """Whether anything in [B, o] is not zero (or not a number); told by the first rows of nearly all that have something."""
    return bool(grad[:_FIRST_ROWS].any()) or bool(grad[_FIRST_ROWS:].any())


class _Sums:
    """The gradient of x [G, B, i], summed over the members that read it."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._parts: list[Tensor | None] = [None] * len(x)

    def add(self, group: int, grad: Tensor, weight: Tensor) -> None:
        """Add grad @ weight.T, [B, o] and [i, o], to group's part."""
        self._parts[group] = at_input(grad, weight, self._parts[group])

    def total(self) -> Tensor:
        """The sums; 0 where nothing was added."""
        parts = [torch.zeros_like(self._x[0]) if part is None else part for part in self._parts]
        return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _joint(x: Tensor, weight: Tensor) -> bool:
    """True when the first layer of a stack is one product: one input for all members, each too narrow by itself."""
    return len(x) == 1 and weight.shape[2] < 128


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to the operands of a matrix product; custom functions have to do it themselves."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def runs_fast(layers: Layers, x: Tensor) -> bool:
    """True when there is a faster way through these layers than one after the other; torch.compile has its own ways."""
    plain = layers.activation is torch.relu_ and len(layers.norms) == 0 and not (layers.dropout and layers.training)
    return plain and x.device.type == "cpu" and len(layers.weights) > 0 and not torch.compiler.is_compiling()


def together(x: Tensor, stacks: Sequence[Layers], rows: Sequence[Tensor | None]) -> list[Tensor]:
    """`stack(x, rows)` of several stacks on one input, with one GEMM for all first layers where that is faster.

    Args:
        x: [B, i]; or [G, B, i] for a single stack.
        rows: for each stack, the rows that count in normalisation statistics.
    """
    if not all(runs_fast(stack, x) for stack in stacks):
        return [stack(x, counted) for stack, counted in zip(stacks, rows, strict=True)]
    chain = [p for stack in stacks for pair in zip(stack.weights, stack.biases, strict=True) for p in pair]
    x, *chain = _autocast(x if x.dim() == 3 else x.unsqueeze(0), *chain)
    return list(_StackedReLU.apply(x, tuple(len(stack.weights) for stack in stacks), *chain))


def alone(x: Tensor, layers: Layers) -> Tensor:
    """`layers(x)`, [B, i] -> [B, o], as a stack of one, where `runs_fast`."""
    chain = [p.unsqueeze(0) for pair in zip(layers.weights, layers.biases, strict=True) for p in pair]
    x, *chain = _autocast(x.unsqueeze(0), *chain)
    found: tuple[Tensor] = _StackedReLU.apply(x, (len(layers.weights),), *chain)
    return found[0][0]
