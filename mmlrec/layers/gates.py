"""Softmax gates that mix experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlrec.layers.experts import StackedMLP, repeat, stacked_linear
from mmlrec.layers.options import HiddenOptions
from mmlrec.layers.scenario import Dispatch


class Gates(nn.Module):
    """H gates: an MLP (may be empty: the papers' linear gate), a bias-free linear layer to E logits, softmax over E."""

    decays: ClassVar[dict[str, float]] = {"weight": 0.0}

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


class NewestGates:
    """The gates of a network's newest training batch, for its reports."""

    def __init__(self) -> None:
        self._newest: tuple[Tensor, Tensor] | None = None

    def keep(self, gates: Tensor, scenario: Tensor, valid: Tensor | None, dispatch: Dispatch | None = None) -> None:
        """Remember gates [B, U, E], rows in the dispatch's order; scenario and valid, both [B], are in that of the batch."""
        rows = (scenario if valid is None else torch.where(valid, scenario, -1)).unsqueeze(1)
        self._newest = gates.detach(), (rows if dispatch is None else dispatch.arrange(rows))[:, 0]

    def entropies(self, names: Sequence[str], num_scenarios: int) -> dict[str, float]:
        """Mean entropy of each gate over the real rows, over log E: 1 = all experts equal, 0 = one expert.

        Args:
            names: of the N gates that a row has.
            num_scenarios: S; gates are [B, N * S, E], index n * S + s, or [B, N, E], each row's own.

        Returns:
            By name, or with scenarios `name/s`, over the rows of s; nothing without a choice (E = 1) or a batch.
        """
        if self._newest is None or self._newest[0].shape[2] == 1:
            return {}
        gates, rows = self._newest
        entropy = -torch.xlogy(gates, gates).sum(dim=2) / math.log(gates.shape[2])
        if entropy.shape[1] > len(names):
            index = rows.clamp(min=0).view(-1, 1, 1).expand(-1, len(names), 1)
            entropy = entropy.unflatten(1, (len(names), num_scenarios)).gather(2, index)[:, :, 0]
        found: dict[str, float] = {}
        for s in range(num_scenarios):
            own = entropy[rows == s if num_scenarios > 1 else rows >= 0]
            means = own.mean(dim=0).tolist() if len(own) else []
            found |= {name + (f"/{s}" if num_scenarios > 1 else ""): mean for name, mean in zip(names, means, strict=False)}
        return found


def drop_gates(gates: Tensor, probability: float) -> Tensor:
    """Gates [..., E] of which each is left out with a probability, the others scaled to sum to 1; all, where none would stay.

    Against gates that always choose the same expert: Zhao et al., "Recommending What Video to Watch Next: A Multitask Ranking
    System", RecSys 2019, section 4.2.
    """
    kept = gates * (torch.rand_like(gates) >= probability)
    total = kept.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, kept / torch.where(total > 0, total, 1.0), gates)


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
