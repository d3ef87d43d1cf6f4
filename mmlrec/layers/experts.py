"""Stacks of independent networks of the same shape (experts; the hidden parts of gates and towers), without loops."""

from __future__ import annotations

from collections.abc import Sequence
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
    """U chains of relu(x @ weight + bias) on a CPU: saves the outputs only, and owns what its backward may overwrite.

    A shared input takes one wide GEMM forward and two backward: their results are views of [B, U*o], which the GEMMs of
    the next layer read in place. Members with inputs of their own take a loop. Against a loop over single layers, forward
    and backward of a benchmark-sized MMoE take 0.8 (d_in 429, float32) and 0.86 (bf16) of the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[::2], parameters[1::2]
        outputs = [x]
        for weight, bias in zip(weights, biases, strict=True):
            x = outputs[-1]
            if x.dim() == 2:
                y = stacked_linear(x, weight, bias)
            else:
                y = x.new_empty(weight.shape[0], x.shape[1], weight.shape[2])
                for u in range(weight.shape[0]):
                    torch.addmm(bias[u], x[u], weight[u], out=y[u])
            outputs.append(y.relu_())
        ctx.save_for_backward(*weights, *outputs)
        return outputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        depth = len(ctx.saved_tensors) // 2
        weights, outputs = ctx.saved_tensors[:depth], ctx.saved_tensors[depth:]
        found: list[Tensor] = []
        grad, incoming = torch.empty_like(outputs[-1]), grads[0]
        for layer in reversed(range(depth)):
            torch.ops.aten.threshold_backward.grad_input(incoming, outputs[layer + 1], 0, grad_input=grad)
            x, weight = outputs[layer], weights[layer]
            wanted = layer > 0 or ctx.needs_input_grad[0]
            grad_x, grad_weight, grad_bias = _linear_backward(x, weight, grad, _rows_aligned(x) if wanted else None)
            found = [grad_weight, grad_bias, *found]
            grad = incoming = grad_x  # overwritten in place: this gradient is nobody else's
        return grad_x, *found


def _linear_backward(x: Tensor, weight: Tensor, grad: Tensor, grad_x: Tensor | None) -> tuple[Any, Tensor, Tensor]:
    """Gradients of x (into `grad_x`, unless None), weight and bias of `stacked_linear`."""
    stack, fan_in, width = weight.shape
    if x.dim() == 2:
        wide = grad.transpose(0, 1).reshape(-1, stack * width)
        if grad_x is not None:
            torch.mm(wide, weight.transpose(1, 2).reshape(stack * width, fan_in), out=grad_x)
        return grad_x, (x.t() @ wide).view(fan_in, stack, width).transpose(0, 1), wide.sum(dim=0).view(stack, width)
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
        if (
            self.activation is torch.relu_
            and not self.norms
            and not (self.dropout and self.training)
            and x.device.type == "cpu"
        ):
            chain = [p for pair in zip(self.weights, self.biases, strict=True) for p in pair]
            return _StackedReLU.apply(*_autocast(x if x.dim() == 2 else repeat(x, self.stack), *chain))
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = stacked_linear(x, weight, bias)
            x = self.activation(self.norms[layer](x, rows) if self.norms else x)
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
