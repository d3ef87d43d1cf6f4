"""Softmax gates that mix experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmlrec.layers.experts import StackedMLP, repeat, stacked_linear
from mmlrec.layers.options import HiddenOptions
from mmlrec.layers.scenario import Dispatch


class Gates(nn.Module):
    """H gates: an MLP (may be empty: the papers' linear gate), a bias-free linear layer to E logits, softmax over E."""

    def __init__(
        self,
        num_gates: int,
        in_features: int,
        hidden: Sequence[int],
        num_experts: int,
        options: HiddenOptions,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.hidden = StackedMLP(num_gates, in_features, hidden, options, generator)
        self.weight = options.output_weight(num_gates, self.hidden.out_features, num_experts, generator=generator)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """All gates.

        Args:
            x: [B, i], or [G, B, i] with H a multiple of G.
            rows: bool [B] or [H, B], the rows that count in normalisation statistics.

        Returns:
            [B, H, E], positive, summing to 1 over the last axis; float32 or wider.
        """
        return self.from_hidden(self.hidden(x, rows) if self.hidden.weights else x)

    def from_hidden(self, hidden: Tensor) -> Tensor:
        """The same from the output of `self.hidden`, [H, B, o]."""
        return _softmax(stacked_linear(hidden, self.weight, None))

    def own(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        """Gates of each row's own scenario: rows of [B, i] or [G, B, i] arranged by `dispatch` -> [B, H / S, E]."""
        count = self.weight.shape[0] // dispatch.num_scenarios
        return _softmax(dispatch.linear(repeat(self.hidden.own(x, dispatch), count), self.weight, None))


def _softmax(logits: Tensor) -> Tensor:
    kind = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits.transpose(0, 1), dim=-1, dtype=kind)


def mix(gates: Tensor, experts: Tensor) -> Tensor:
    """Weighted sums of experts: gates [B, U, E], experts [E, B, k] -> [U, B, k]."""
    return torch.bmm(gates, experts.transpose(0, 1)).transpose(0, 1)


def mix_own(gates: Tensor, experts: Tensor) -> Tensor:
    """Weighted sums in which every output has its own experts.

    Args:
        gates: [B, U, n].
        experts: [n * U, B, k], index j * U + u.

    Returns:
        [U, B, k].
    """
    rows, outputs, count = gates.shape
    weights = gates.transpose(0, 1).reshape(outputs * rows, 1, count)
    members = experts.reshape(count, outputs * rows, -1).transpose(0, 1)
    return torch.bmm(weights, members).view(outputs, rows, -1)
