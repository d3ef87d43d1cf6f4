"""PLE: levels of shared and specific experts; with `num_levels: 1` it is CGC (customised gate control).

Tang, Liu, Zhao, Gong, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized
Recommendations", RecSys 2020.

Level l, with i_h = i_sh = x at level 1, n_t specific experts for each of the H heads and n_s shared ones:

    p_{h,j} = MLP_{l,h,j}(i_h), j = 1..n_t;  q_j = MLP_{l,sh,j}(i_sh), j = 1..n_s              each [B, k]
    o_h  = softmax(Gate_{l,h}(i_h))   [B, n_t + n_s]      times [p_{h,1..n_t}, q_1..n_s]      -> [B, k]
    o_sh = softmax(Gate_{l,sh}(i_sh)) [B, n_t * H + n_s]  times [all p (by j, then h), all q] -> [B, k], levels < n only

The outputs are the next level's inputs; after the last level z_h = Tower_h(o_h). Either kind of expert may have
number 0, not both. With scenarios the last level computes only the specific experts, gates and towers of a row's own
scenario; earlier levels need all, because the shared gate reads every specific expert.
"""

from __future__ import annotations

import warnings
from typing import cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmlrec.errors import UserAdvice
from mmlrec.layers.experts import StackedMLP
from mmlrec.layers.gates import Gates, NewestGates, mix, mix_own
from mmlrec.layers.scenario import Dispatch
from mmlrec.layers.towers import Towers
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner, Width
from mmlrec.output import Output


class _Level(nn.Module):
    """One extraction level. Specific expert j of head h is member j * H + h of its stack."""

    def __init__(self, heads: int, in_features: int, config: PLE.Config, *, last: bool, generator: torch.Generator) -> None:
        super().__init__()
        specific, common = config.num_specific_experts, config.num_shared_experts
        units, gate_units, hidden = config.expert_hidden_units, config.gate_hidden_units, config.hidden
        self.num_specific = specific
        self.specific = StackedMLP(specific * heads, in_features, units, hidden, generator) if specific else None
        self.shared = StackedMLP(common, in_features, units, hidden, generator) if common else None
        self.gates = Gates(heads, in_features, gate_units, specific + common, hidden, generator)
        self.newest = NewestGates()
        # The last level's shared output, or one that no shared expert reads, could never receive a gradient.
        self.shared_gate: Gates | None = None
        if common and not last:
            self.shared_gate = Gates(1, in_features, gate_units, specific * heads + common, hidden, generator)

    def forward(
        self,
        own_x: Tensor,
        shared_x: Tensor | None,
        rows: Tensor | None,
        scenario: Tensor,
        valid: Tensor | None,
        dispatch: Dispatch | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Inputs [B, d] or [H, B, d], and [B, d] -> outputs [H, B, k] and [B, k] (None at the last level)."""
        member_rows = rows if rows is None or rows.dim() == 1 else rows.repeat(self.num_specific, 1)
        specific = None if self.specific is None else self.specific(own_x, member_rows)
        shared = None if self.shared is None else self.shared(shared_x, valid)
        gates = self.gates(own_x, rows)
        self._keep(gates, scenario, valid, dispatch)
        out = self._mix(gates, specific, shared)
        if self.shared_gate is None:
            return out, None
        gate = self.shared_gate(shared_x, valid)
        parts = [part for part in (specific, shared) if part is not None]
        weights = gate.split([part.shape[0] for part in parts], dim=2)
        mixed = [mix(weight, part)[0] for weight, part in zip(weights, parts, strict=True)]
        return out, mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1]

    def own(self, own_x: Tensor, shared_x: Tensor | None, scenario: Tensor, valid: Tensor | None, dispatch: Dispatch) -> Tensor:
        """Each row's own scenario only, rows arranged: [B, d] or [T, B, d], and [B, d] -> [T, B, k]."""
        specific = None if self.specific is None else self.specific.own(own_x, dispatch)
        shared = None if self.shared is None else self.shared(shared_x)
        gates = self.gates.own(own_x, dispatch)
        self._keep(gates, scenario, valid, dispatch)
        return self._mix(gates, specific, shared)

    def _keep(self, gates: Tensor, scenario: Tensor, valid: Tensor | None, dispatch: Dispatch | None) -> None:
        if self.training:
            self.newest.keep(gates, scenario, valid, dispatch)

    def _mix(self, gates: Tensor, specific: Tensor | None, shared: Tensor | None) -> Tensor:
        if specific is None:
            assert shared is not None
            return mix(gates, shared)
        mixed = mix_own(gates[:, :, : self.num_specific], specific)
        return mixed if shared is None else mixed + mix(gates[:, :, self.num_specific :], shared)


class PLE(MultiTaskModel):
    """Progressive layered extraction."""

    class Config(NetworkConfig):
        """Options of PLE."""

        num_levels: int = Field(default=2, ge=1, description="Number of extraction levels; 1 = CGC.")
        num_shared_experts: int = Field(default=2, ge=0, description="Shared experts of each level.")
        num_specific_experts: int = Field(default=3, ge=0, description="Specific experts of each head and level.")
        expert_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Widths of each expert.")
        gate_hidden_units: list[Width] = Field(default=[64], description="Widths of each gate; [] = linear gate.")
        tower_hidden_units: list[Width] = Field(default=[64], description="Widths of each tower; may be empty.")

        @model_validator(mode="after")
        def _some_expert(self) -> PLE.Config:
            if self.num_shared_experts + self.num_specific_experts == 0:
                raise ValueError("num_shared_experts and num_specific_experts must not both be 0")
            return self

    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        heads, generator = spec.num_heads, self.generator
        if heads * config.num_specific_experts > 32:
            warnings.warn(
                f"ple builds {heads} heads x {config.num_specific_experts} specific experts at each level; consider a"
                " smaller model.num_specific_experts",
                UserAdvice,
                stacklevel=2,
            )
        self.levels = nn.ModuleList()
        width = spec.input_width
        for level in range(1, config.num_levels + 1):
            self.levels.append(_Level(heads, width, config, last=level == config.num_levels, generator=generator))
            width = config.expert_hidden_units[-1]
        self.towers = Towers(heads, width, config.tower_hidden_units, config.hidden, generator)

    def owner(self, parameter: str) -> Owner | None:
        """Heads own the towers and what only they read: the last level's parts, and the gates of the level below it.

        The shared gate of every level but the last reads all specific experts of that level, so they are shared; so are the
        gates two or more levels below the last, whose outputs those experts read. Without specific experts the shared gate
        reads none of the heads' parts, and without shared experts there is no shared gate: heads own all gates, or everything.
        """
        if parameter.startswith("towers.") or not self.config.num_shared_experts:
            return "head"
        _, index, part, *_ = parameter.split(".")
        below_last = self.config.num_levels - 1 - int(index)
        of_gates = part == "gates" and (below_last <= 1 or not self.config.num_specific_experts)
        return "head" if of_gates or (part == "specific" and below_last == 0) else None

    def forward(
        self,
        x: Tensor,
        fields: dict[str, Tensor],
        scenario: Tensor,
        *,
        valid: Tensor | None = None,
        noise: Tensor | None = None,
        return_all_heads: bool = False,
    ) -> Output:
        """Logits; see the base class."""
        config = self.config
        widths = [*config.expert_hidden_units, *config.gate_hidden_units, *config.tower_hidden_units]
        dispatch = self.own_dispatch(scenario, widths, return_all_heads)
        if dispatch is not None:
            x = dispatch.arrange(x)
        rows = self.head_rows(scenario, valid)
        own: Tensor = x
        shared: Tensor | None = x
        for level in self.levels[:-1]:
            own, shared = level(own, shared, rows, scenario, valid, dispatch)
        last = cast(_Level, self.levels[-1])
        if dispatch is None:
            own, _ = last(own, shared, rows, scenario, valid, None)
            return self.select(self.towers(own, rows), scenario, return_all_heads)
        if own.dim() == 3:
            own = dispatch.own(own)
        own = last.own(own, shared, scenario, valid, dispatch)
        return Output(dispatch.restore(self.towers.own(own, dispatch)))

    def diagnostics(self) -> dict[str, float]:
        """Mean entropy of each head's gate of each level on its rows of the newest training batch, over log of its experts."""
        found: dict[str, float] = {}
        for number, level in enumerate(self.levels, 1):
            names = [f"gate_entropy/level{number}/{task.name}" for task in self.spec.tasks]
            found |= cast(_Level, level).newest.entropies(names, self.spec.num_scenarios)
        return found
