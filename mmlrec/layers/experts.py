"""Stacks of independent networks of the same shape (experts; the hidden parts of gates and towers), without loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmlrec.layers.normalisation import BatchNorm
from mmlrec.layers.options import ACTIVATIONS, HiddenOptions
from mmlrec.layers.scenario import Dispatch


def stacked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """U linear layers at once, each followed by `activation`.

    Args:
        x: [B, i], read by all U layers; or [G, B, i] with U a multiple of G: layer u reads x[u mod G].
        weight: [U, i, o].
        bias: [U, o] or None.

    Returns:
        [U, B, o]; on a GPU, for a shared input, a view of [B, U, o]: one GEMM of width U*o beats U small ones there.
    """
    stack, fan_in, width = weight.shape
    if activation is torch.relu_ and bias is not None and x.device.type == "cpu":
        return _LinearReLU.apply(*_autocast(x if x.dim() == 2 else repeat(x, stack), weight, bias))
    if x.dim() == 2:
        joint = weight.transpose(0, 1).reshape(fan_in, stack * width)
        y = x @ joint if bias is None else torch.addmm(bias.flatten(), x, joint)
        y = y if activation is None else activation(y)
        return y.view(-1, stack, width).transpose(0, 1)
    y = torch.bmm(repeat(x, stack), weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), repeat(x, stack), weight)
    return y if activation is None else activation(y)


def repeat(x: Tensor, stack: int) -> Tensor:
    """[G, B, i] -> [U, B, i] with member u a copy of x[u mod G]; x itself when U = G."""
    groups = x.shape[0]
    return x if groups == stack else x.expand(stack // groups, *x.shape).reshape(stack, *x.shape[1:])


class _LinearReLU(torch.autograd.Function):
    """relu(x @ weight + bias) of U members on a CPU, saving the output only.

    A shared input takes one wide GEMM forward and two backward: their results are views of [B, U*o], which the GEMMs of
    the next layer read in place. Members with inputs of their own take a loop. Against a loop throughout, forward and
    backward of a benchmark-sized MMoE take 0.8 (d_in 429, float32) and 0.86 (bf16) of the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stack, fan_in, width = weight.shape
        if x.dim() == 2:
            joint = weight.transpose(0, 1).reshape(fan_in, stack * width)
            y = torch.addmm(bias.flatten(), x, joint).view(-1, stack, width).transpose(0, 1)
        else:
            y = x.new_empty(stack, x.shape[1], width)
            for u in range(stack):
                torch.addmm(bias[u], x[u], weight[u], out=y[u])
        y.relu_()
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, y = ctx.saved_tensors
        stack, fan_in, width = weight.shape
        shared = x.dim() == 2
        grad = torch.empty_like(y)  # laid out as y
        torch.ops.aten.threshold_backward.grad_input(grads[0], y, 0, grad_input=grad)
        grad_x = _rows_aligned(x) if ctx.needs_input_grad[0] else None
        if shared:
            wide = grad.transpose(0, 1).reshape(-1, stack * width)
            grad_weight = (x.t() @ wide).view(fan_in, stack, width).transpose(0, 1)
            if grad_x is not None:
                torch.mm(wide, weight.transpose(1, 2).reshape(stack * width, fan_in), out=grad_x)
            return grad_x, grad_weight, wide.sum(dim=0).view(stack, width)
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for u in range(stack):
            torch.mm(x[u].t(), grad[u], out=grad_weight[u])
            if grad_x is not None:
                torch.mm(grad[u], weight[u].t(), out=grad_x[u])
        return grad_x, grad_weight, grad.sum(dim=1)


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
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if self.norms:
                x = self.activation(self.norms[layer](stacked_linear(x, weight, bias), rows))
            else:
                x = stacked_linear(x, weight, bias, self.activation)
            x = F.dropout(x, self.dropout, self.training)
        return x

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
