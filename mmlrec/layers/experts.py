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
    """relu(x @ weight + bias) of U members on a CPU: a loop over members with contiguous operands, saving the output only.

    Against one wide GEMM, whose strided slices the next layer has to copy, forward and backward of a benchmark-sized
    MMoE take 0.7 (bf16, d_in 56), 0.87 (bf16, d_in 429) and 0.97 (float32) of the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stack, _, width = weight.shape
        y = x.new_empty(stack, x.shape[-2], width)
        for u in range(stack):
            torch.addmm(bias[u], x if x.dim() == 2 else x[u], weight[u], out=y[u])
        y.relu_()
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, y = ctx.saved_tensors
        stack, shared = weight.shape[0], x.dim() == 2
        grad = torch.empty_like(y)
        torch.ops.aten.threshold_backward.grad_input(grads[0], y, 0, grad_input=grad)
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for u in range(stack):
            torch.mm((x if shared else x[u]).t(), grad[u], out=grad_weight[u])
        grad_x = None
        if ctx.needs_input_grad[0] and shared:
            grad_x = grad[0] @ weight[0].t()
            for u in range(1, stack):
                grad_x.addmm_(grad[u], weight[u].t())
        elif ctx.needs_input_grad[0]:
            grad_x = x.new_empty(x.shape)
            for u in range(stack):
                torch.mm(grad[u], weight[u].t(), out=grad_x[u])
        return grad_x, grad_weight, grad.sum(dim=1)


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
