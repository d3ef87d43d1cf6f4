"""Stacks of chains of relu(x @ weight + bias) on a CPU, faster than layer after layer; used by StackedMLP and MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        outputs: list[Tensor] = []
        results: list[Tensor] = []
        start = 0
        for depth in depths:
            layers = range(start, start + depth)
            rows = x.shape[1]
            first = _joint(x, weights[start])
            made = [x.new_empty(weights[i].shape[0], rows, weights[i].shape[2]) for i in layers]
            if first:
                y = torch.addmm(biases[start].flatten(), x[0], _by_output(weights[start]).flatten(0, 1).t()).relu_()
                made[0] = y.unflatten(1, biases[start].shape).transpose(0, 1)
            for u in range(weights[start].shape[0]):
                below = made[0][u] if first else x[u % len(x)]
                for i, out in list(zip(layers, made, strict=True))[first:]:
                    below = torch.addmm(biases[i][u], below, _by_output(weights[i][u]).t(), out=out[u]).relu_()
            outputs += made
            results.append(made[-1])
            start += depth
        ctx.depths = depths
        ctx.save_for_backward(x, *weights, *outputs)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rest = ctx.saved_tensors[0], ctx.saved_tensors[1:]
        weights, outputs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        grad_x = _Sums(x) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        start = 0
        for grad, depth in zip(grads, ctx.depths, strict=True):
            layers = range(start, start + depth)
            found += _chain_backward(x, [weights[i] for i in layers], [outputs[i] for i in layers], grad, grad_x)
            start += depth
        return None if grad_x is None else grad_x.total(), None, *found


def _chain_backward(
    x: Tensor, weights: Sequence[Tensor], outputs: Sequence[Tensor], grad: Tensor, grad_x: _Sums | None
) -> list[Tensor]:
    """Gradients of weight and bias of each layer of one stack; adds that of x to `grad_x`."""
    # Balancing differentiates one objective at a time; the members of all other heads then have no gradient, at no cost.
    live = [u for u, own in enumerate(grad) if bool(own.any())]
    make = torch.empty_like if len(live) == len(grad) else torch.zeros_like
    by_weight = [make(weight, memory_format=torch.contiguous_format) for weight in weights]
    by_bias = [make(weight[:, 0], memory_format=torch.contiguous_format) for weight in weights]
    first = _joint(x, weights[0])
    # Room for the gradients of the layers' outputs: one member's, written anew for the next; all members' where needed at once.
    room = [output.new_empty(1, *output.shape[1:]) for output in outputs]
    if first:
        rows, width = outputs[0].shape[1:]
        room[0] = outputs[0].new_empty(rows, len(live), width).transpose(0, 1)
    for place, u in enumerate(live):
        incoming = grad[u]
        for layer in reversed(range(len(weights))):
            at_output = room[layer][place % len(room[layer])]
            torch.ops.aten.threshold_backward.grad_input(incoming, outputs[layer][u], 0, grad_input=at_output)
            if layer == 0 and first:
                break
            below = outputs[layer - 1][u] if layer else x[u % len(x)]
            torch.sum(at_output, 0, out=by_bias[layer][u])
            torch.mm(below.t(), at_output, out=by_weight[layer][u])
            if layer:
                target = room[layer - 1][place % len(room[layer - 1])]
                incoming = torch.mm(at_output, weights[layer][u].t(), out=target)
            elif grad_x is not None:
                grad_x.add(u % len(x), at_output, weights[0][u])
    if first and live:
        members = slice(None) if len(live) == len(grad) else live
        joint = room[0].transpose(0, 1).flatten(1)
        by_bias[0][members] = joint.sum(0).view(len(live), -1)
        by_weight[0][members] = (x[0].t() @ joint).unflatten(1, (len(live), -1)).transpose(0, 1)
        if grad_x is not None:
            grad_x.add(0, joint, weights[0][members].transpose(0, 1).flatten(1))
    return [gradient for pair in zip(by_weight, by_bias, strict=True) for gradient in pair]


class _Sums:
    """The gradient of x [G, B, i], summed over the members that read it."""

    def __init__(self, x: Tensor) -> None:
        # GEMMs write rows of an odd width at 0.7 of the speed: rows begin at multiples of 128 bytes.
        columns = 128 // x.element_size()
        self.value = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // columns) * columns)[..., : x.shape[-1]]
        self.written = [False] * len(x)

    def add(self, group: int, grad: Tensor, weight: Tensor) -> None:
        """Add grad @ weight.T, [B, o] and [i, o], to group's part."""
        part = self.value[group]
        if self.written[group]:
            part.addmm_(grad, weight.t())
        else:
            torch.mm(grad, weight.t(), out=part)
        self.written[group] = True

    def total(self) -> Tensor:
        """The sums; 0 where nothing was added."""
        for group, written in enumerate(self.written):
            if not written:
                self.value[group].zero_()
        return self.value


def _joint(x: Tensor, weight: Tensor) -> bool:
    """True when the first layer of a stack is one product: one input for all members, each too narrow by itself."""
    return len(x) == 1 and weight.shape[2] < 128


def _by_output(weight: Tensor) -> Tensor:
    """Weight [.., i, o] as [.., o, i], copied: the layout that products read fastest."""
    return weight.transpose(-1, -2).contiguous()


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
