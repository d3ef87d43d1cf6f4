"""A multi-layer perceptron over rows [B, d]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlrec.layers.normalisation import BatchNorm
from mmlrec.layers.options import ACTIVATIONS, HiddenOptions
from mmlrec.layers.stacked_relu import alone, runs_fast


class MLP(nn.Module):
    """`len(hidden)` times Lin -> BatchNorm (optional) -> activation -> dropout; the identity when `hidden` is empty.

    Weights are [i, o] and biases [o], drawn from `generator`.
    """

    decays: ClassVar[dict[str, float]] = {"weights": 0.0}

    def __init__(self, in_features: int, hidden: Sequence[int], options: HiddenOptions, generator: torch.Generator) -> None:
        super().__init__()
        self.activation, self.dropout = ACTIVATIONS[options.activation], options.dropout
        self.weights, self.biases, self.norms = nn.ParameterList(), nn.ParameterList(), nn.ModuleList()
        for width in hidden:
            self.weights.append(options.hidden_weight(in_features, width, generator=generator))
            self.biases.append(options.hidden_bias(width, fan_in=in_features, generator=generator))
            if options.use_bn:
                self.norms.append(BatchNorm(width))
            in_features = width
        self.out_features = in_features

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, i] -> [B, o]; `valid` [B] marks the rows that count in normalisation statistics."""
        if runs_fast(self, x):
            return alone(x, self)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.addmm(bias, x, weight)
            if self.norms:
                x = self.norms[layer](x, valid)
            x = F.dropout(self.activation(x), self.dropout, self.training)
        return x
