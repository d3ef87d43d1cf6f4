"""Stacks of independent networks of the same shape (experts; the hidden parts of gates and towers), without loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlrec.layers.normalisation import BatchNorm
from mmlrec.layers.options import ACTIVATIONS, HiddenOptions
from mmlrec.layers.scenario import Dispatch
from mmlrec.layers.stacked_relu import runs_fast, together


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
    """[G, B, i] -> [U, B, i] with member u a copy of x[u mod G]; x itself when U = G, a view of it when G = 1."""
    groups = x.shape[0]
    if groups == stack:
        return x
    # Not by `expand` and `reshape` of several: torch.export of 2.11 finds a condition on the batch size where that joins axes.
    return x.expand(stack, -1, -1) if groups == 1 else x.repeat(stack // groups, 1, 1)


class StackedMLP(nn.Module):
    """U independent MLPs (Lin -> BatchNorm (optional) -> activation -> dropout) of the same widths.

    Weights are [U, i, o] and biases [U, o], so that member u is `weight[u]` everywhere; fan-in is per member.
    """

    decays: ClassVar[dict[str, float]] = {"weights": 0.0}

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
        if runs_fast(self, x):
            return together(x, [self], [rows])[0]
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
