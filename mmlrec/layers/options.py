"""What all hidden layers share: activation, dropout, normalisation, and how weights start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["relu", "gelu", "silu", "tanh"]
Init = Literal["standard", "mmlrec"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # In place: no GEMM needs its own output in the backward pass, so a second buffer would only cost time.
    "relu": torch.relu_,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh_,
}


@dataclass(frozen=True)
class HiddenOptions:
    """How a hidden layer is built: Lin -> BatchNorm (`use_bn`) -> activation -> dropout.

    Attributes:
        init: `standard` draws hidden weights Kaiming-normal (ReLU gain) with biases 0; `mmlrec` draws them from
            N(0, 1e-4^2) with torch's default biases, as the MMLRec benchmark does.
    """

    activation: Activation = "relu"
    dropout: float = 0.0
    use_bn: bool = False
    init: Init = "standard"

    def hidden_weight(self, *shape: int, generator: torch.Generator) -> nn.Parameter:
        """Weight [..., i, o] of a hidden layer; the fan-in is i, also when stacked."""
        std = math.sqrt(2.0 / shape[-2]) if self.init == "standard" else 1e-4
        return nn.Parameter(torch.empty(*shape).normal_(0.0, std, generator=generator))

    def hidden_bias(self, *shape: int, fan_in: int, generator: torch.Generator) -> nn.Parameter:
        """Bias [..., o] of a hidden layer."""
        if self.init == "standard":
            return nn.Parameter(torch.zeros(*shape))
        bound = 1.0 / math.sqrt(fan_in)
        return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))

    def output_weight(self, *shape: int, generator: torch.Generator) -> nn.Parameter:
        """Weight [..., i, o] of a layer that gives logits: Xavier-uniform (`standard`) or torch's default for Linear."""
        fan_in, fan_out = shape[-2:]
        bound = math.sqrt(6.0 / (fan_in + fan_out)) if self.init == "standard" else 1.0 / math.sqrt(fan_in)
        return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))
