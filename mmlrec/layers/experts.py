"""Stacks of independent networks of the same shape (experts; the hidden parts of gates and towers), without loops."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmlrec.layers.normalisation import BatchNorm
from mmlrec.layers.options import ACTIVATIONS, HiddenOptions
from mmlrec.layers.scenario import Dispatch


def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """U linear layers at once.

    Args:
        x: [B, i], read by all U layers; or [G, B, i] with U a multiple of G: layer u reads x[u mod G].
        weight: [U, i, o].
        bias: [U, o] or None.

    Returns:
        [U, B, o]; for a shared input, a view of [B, U, o]: one GEMM of width U*o beats U small ones.
    """
    stack, fan_in, width = weight.shape
    if x.dim() == 2:
        joint = weight.transpose(0, 1).reshape(fan_in, stack * width)
        y = x @ joint if bias is None else torch.addmm(bias.flatten(), x, joint)
        return y.view(-1, stack, width).transpose(0, 1)
    return torch.bmm(repeat(x, stack), weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), repeat(x, stack), weight)


def repeat(x: Tensor, stack: int) -> Tensor:
    """[G, B, i] -> [U, B, i] with member u a copy of x[u mod G]; x itself when U = G."""
    groups = x.shape[0]
    return x if groups == stack else x.expand(stack // groups, *x.shape).reshape(stack, *x.shape[1:])


class _StackedReLU(torch.autograd.Function):
    """Stacks of chains of relu(x @ weight + bias) on a CPU: saves outputs only, owns what its backward may overwrite.

    On a shared input the first layers of all stacks are one wide GEMM forward and two backward; their results are slices
    of one buffer, which the GEMMs of the next layer read in place. Members with inputs of their own take a loop. Against
    a loop over single layers, forward and backward of a benchmark-sized MMoE take 0.8 of the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, depths: tuple[int, ...], *parameters: Tensor) -> tuple[Tensor, ...]:
        """`depths`: layers of each stack; `parameters`: weight and bias of each layer, stack after stack."""
        weights, biases = parameters[::2], parameters[1::2]
        starts = list(accumulate(depths, initial=0))[:-1]
        outputs: list[Tensor] = [x] * len(weights)
        if x.dim() == 2:
            joint = torch.cat([weights[i].transpose(1, 2).flatten(0, 1) for i in starts])  # [o, i]: read fastest
            y = torch.addmm(torch.cat([biases[i].flatten() for i in starts]), x, joint.t()).relu_()
            for i, view in zip(starts, _members(y, [weights[i] for i in starts]), strict=True):
                outputs[i] = view
        for start, depth in zip(starts, depths, strict=True):
            for i in range(start + (x.dim() == 2), start + depth):
                outputs[i] = _loop(x if i == start else outputs[i - 1], weights[i], biases[i])
        ctx.depths = depths
        ctx.save_for_backward(x, *weights, *outputs)
        return tuple(outputs[start + depth - 1] for start, depth in zip(starts, depths, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rest = ctx.saved_tensors[0], ctx.saved_tensors[1:]
        weights, outputs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        starts = list(accumulate(ctx.depths, initial=0))[:-1]
        firsts = [weights[i] for i in starts]
        found: list[Tensor | None] = [None] * (2 * len(weights))
        grad_x = _rows_aligned(x) if ctx.needs_input_grad[0] else None
        wide = x.new_empty(len(x), sum(w.shape[0] * w.shape[2] for w in firsts)) if x.dim() == 2 else None
        slices = _members(wide, firsts) if wide is not None else []
        for k, (start, depth) in enumerate(zip(starts, ctx.depths, strict=True)):
            incoming, target = grads[k], torch.empty_like(grads[k])
            for i in reversed(range(start, start + depth)):
                in_slice = i == start and wide is not None
                if in_slice:
                    target = slices[k]
                torch.ops.aten.threshold_backward.grad_input(incoming, outputs[i], 0, grad_input=target)
                if in_slice:
                    break
                below = grad_x if i == start else torch.empty_like(outputs[i - 1])
                found[2 * i : 2 * i + 2] = _loop_backward(x if i == start else outputs[i - 1], weights[i], target, below)
                if below is not None:
                    incoming = target = below  # overwritten in place: this gradient is nobody else's
        if wide is not None:
            if grad_x is not None:
                torch.mm(wide, torch.cat([w.transpose(1, 2).flatten(0, 1) for w in firsts]), out=grad_x)
            joint = zip(starts, _members(x.t() @ wide, firsts), _members(wide.sum(0, keepdim=True), firsts), strict=True)
            for i, weight, bias in joint:
                found[2 * i : 2 * i + 2] = weight, bias[:, 0]
        return grad_x, None, *found


def _members(wide: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Columns [n, sum of U*o] as one view [U, n, o] for each of the stacks that have these weights [U, i, o]."""
    parts = wide.split([w.shape[0] * w.shape[2] for w in weights], dim=1)
    return [p.unflatten(1, (w.shape[0], w.shape[2])).transpose(0, 1) for p, w in zip(parts, weights, strict=True)]


def _loop(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(x[u] @ weight[u] + bias[u]) for each member."""
    y = x.new_empty(weight.shape[0], x.shape[1], weight.shape[2])
    for u in range(weight.shape[0]):
        torch.addmm(bias[u], x[u], weight[u].t().contiguous().t(), out=y[u])  # [o, i]: read fastest
    return y.relu_()


def _loop_backward(x: Tensor, weight: Tensor, grad: Tensor, grad_x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of `_loop`, before relu; that of x into `grad_x`, unless None."""
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for u in range(weight.shape[0]):
        torch.mm(x[u].t(), grad[u], out=grad_weight[u])
        if grad_x is not None:
            torch.mm(grad[u], weight[u].t(), out=grad_x[u])
    return grad_weight, grad.sum(dim=1)


def _rows_aligned(x: Tensor) -> Tensor:
    """Room for a gradient of x: laid out as x, or with rows that begin at multiples of 128 bytes.

    GEMMs write rows of an odd width at 0.7 of the speed.
    """
    if x.dim() > 2 or not x.is_contiguous():
        return torch.empty_like(x)
    columns = 128 // x.element_size()
    return x.new_empty(x.shape[0], -(-x.shape[1] // columns) * columns)[:, : x.shape[1]]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to the operands of a matrix product; custom functions have to do it themselves."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


class StackedMLP(nn.Module):
    """U independent MLPs (Lin -> BatchNorm (optional) -> activation -> dropout) of the same widths.

    Weights are [U, i, o] and biases [U, o], so that member u is `weight[u]` everywhere; fan-in is per member.
    """

    def __init__(
        self, stack: int, in_features: int, hidden: Sequence[int], options: HiddenOptions, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.stack, self.activation, self.dropout = stack, ACTIVATIONS[options.activation], options.dropout
        self.weights, self.biases, self.norms = nn.ParameterList(), nn.ParameterList(), nn.ModuleList()
        for width in hidden:
            self.weights.append(options.hidden_weight(stack, in_features, width, generator=generator))
            self.biases.append(options.hidden_bias(stack, width, fan_in=in_features, generator=generator))
            if options.use_bn:
                self.norms.append(BatchNorm(stack * width))
            in_features = width
        self.out_features = in_features

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """All members.

        Args:
            x: [B, i] or [G, B, i], as for `stacked_linear`.
            rows: bool [B] or [U, B], the rows that count in normalisation statistics.

        Returns:
            [U, B, o]; without hidden layers the input, expanded to [U, B, i].
        """
        if not self.weights:
            return x.expand(self.stack, *x.shape[-2:])
        if self.fast_on(x):
            return together(x, [self], [rows])[0]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = stacked_linear(x, weight, bias)
            x = self.activation(self.norms[layer](x, rows) if self.norms else x)
            x = F.dropout(x, self.dropout, self.training)
        return x

    def fast_on(self, x: Tensor) -> bool:
        """True when `together` has a faster way for this stack."""
        plain = self.activation is torch.relu_ and not self.norms and not (self.dropout and self.training)
        return plain and x.device.type == "cpu" and len(self.weights) > 0

    def own(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        """Members of each row's own scenario; member n * S + s belongs to scenario s.

        Args:
            x: [B, i], or [G, B, i] with N = U / S a multiple of G; rows arranged by `dispatch`.

        Returns:
            [N, B, o], rows arranged. Not for normalised stacks, whose statistics need whole columns.
        """
        x = repeat(x if x.dim() == 3 else x.unsqueeze(0), self.stack // dispatch.num_scenarios)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = F.dropout(self.activation(dispatch.linear(x, weight, bias)), self.dropout, self.training)
        return x


def together(x: Tensor, stacks: Sequence[StackedMLP], rows: Sequence[Tensor | None]) -> list[Tensor]:
    """`stack(x, rows)` of several stacks on one input, with one GEMM for all first layers where that is faster.

    Args:
        x: [B, i]; or [G, B, i] for a single stack.
        rows: for each stack, the rows that count in normalisation statistics.
    """
    if not all(stack.fast_on(x) for stack in stacks):
        return [stack(x, counted) for stack, counted in zip(stacks, rows, strict=True)]
    chain = [p for stack in stacks for pair in zip(stack.weights, stack.biases, strict=True) for p in pair]
    x, *chain = _autocast(x if x.dim() == 2 else repeat(x, stacks[0].stack), *chain)
    return list(_StackedReLU.apply(x, tuple(len(stack.weights) for stack in stacks), *chain))
