"""Stacked towers: one small network and one logit for each head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlrec.layers.experts import StackedMLP
from mmlrec.layers.options import HiddenOptions
from mmlrec.layers.scenario import Dispatch


class Towers(nn.Module):
    """H towers: an MLP (may be empty), then a linear layer to one logit with the tower's own bias.

    Logits are float32 (or wider), also under autocast: the last layer is a product and a sum outside of any bf16 GEMM.
    """

    decays: ClassVar[dict[str, float]] = {"weight": 0.0}

    def __init__(
        self, num_heads: int, in_features: int, hidden: Sequence[int], options: HiddenOptions, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.hidden = StackedMLP(num_heads, in_features, hidden, options, generator)
        self.weight = options.output_weight(num_heads, self.hidden.out_features, 1, generator=generator)
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """All towers.

        Args:
            x: [B, d], or [H, B, d].
            rows: bool [B] or [H, B], the rows that count in normalisation statistics.

        Returns:
            [B, H].
        """
        hidden = self.hidden(x, rows)
        return (hidden * self.weight.transpose(1, 2)).sum(dim=-1).t() + self.bias

    def own(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        """Towers of each row's own scenario: [B, d] or [H / S, B, d] arranged by `dispatch` -> [B, H / S], arranged."""
        hidden = self.hidden.own(x, dispatch)
        scenarios = dispatch.num_scenarios
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(torch.promote_types(hidden.dtype, self.weight.dtype))
            weight = self.weight.view(-1, scenarios, self.weight.shape[1])
            every = torch.matmul(hidden, weight.transpose(1, 2)) + self.bias.view(-1, 1, scenarios)
        own = dispatch.scenario.view(1, -1, 1).expand(every.shape[0], -1, 1)
        return torch.gather(every, 2, own)[:, :, 0].t()
