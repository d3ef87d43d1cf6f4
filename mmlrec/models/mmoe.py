"""MMoE: shared experts, one softmax gate and one tower for each head.

Ma, Zhao, Yi, Chen, Hong, Chi, "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", KDD 2018.

    f_e = MLP_e(x; expert_hidden_units)            [B, d_in] -> [B, k], e = 1..E
    g_h = softmax(Gate_h(x; gate_hidden_units))    [B, E]
    v_h = sum_e g_h[:, e] f_e                      [B, k]
    z_h = Tower_h(v_h)                             [B], h = t * S + s

`gate_extra_fields` appends the embeddings of the named fields to the gates' input. `gate_hidden_units: []` is the
paper's linear gate. `gate_dropout` leaves entries of g_h out in training and scales the others to sum to 1. With
scenarios only the gates and towers of a row's own scenario are computed, unless all heads are asked for.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mmlrec.layers.experts import StackedMLP
from mmlrec.layers.gates import Gates, NewestGates, drop_gates, mix
from mmlrec.layers.stacked_relu import together
from mmlrec.layers.towers import Towers
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner, Width
from mmlrec.output import Output


class MMoE(MultiTaskModel):
    """Multi-gate mixture of experts."""

    class Config(NetworkConfig):
        """Options of MMoE."""

        num_experts: int = Field(default=4, ge=1, description="Number of experts E.")
        expert_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Widths of each expert.")
        gate_hidden_units: list[Width] = Field(default=[64], description="Widths of each gate; [] = linear gate.")
        tower_hidden_units: list[Width] = Field(default=[64], description="Widths of each tower; may be empty.")
        gate_extra_fields: list[str] = Field(default=[], description="Fields appended to the gates' input.")
        gate_dropout: float = Field(
            default=0.0, ge=0, lt=1, description="Probability that a gate leaves out an expert; all stay if none would."
        )

    one_task = True
    owners: ClassVar[dict[str, Owner]] = {"gates": "head", "towers": "head"}
    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        self.check_fields("gate_extra_fields", config.gate_extra_fields)
        generator, hidden = self.generator, config.hidden
        self.experts = StackedMLP(config.num_experts, spec.input_width, config.expert_hidden_units, hidden, generator)
        gate_in = spec.input_width + sum(spec.fields[name] for name in config.gate_extra_fields)
        heads, width = spec.num_heads, self.experts.out_features
        self.gates = Gates(heads, gate_in, config.gate_hidden_units, config.num_experts, hidden, generator)
        self.towers = Towers(heads, width, config.tower_hidden_units, hidden, generator)
        self.newest = NewestGates()

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
        extra = [fields[name] for name in self.config.gate_extra_fields]
        gate_x = torch.cat([x, *extra], dim=1) if extra else x
        widths = [*self.config.gate_hidden_units, *self.config.tower_hidden_units]
        dispatch = self.own_dispatch(scenario, widths, return_all_heads)
        if dispatch is not None:
            # Ordered at the very start: then nothing but x and the logits has to be permuted.
            x, gate_x = dispatch.arrange(x), dispatch.arrange(gate_x)
            experts = self.experts(x)
            gates = self.gates.own(gate_x, dispatch)
            if self.training:
                self.newest.keep(gates, scenario, valid, dispatch)
            mixed = mix(self._dropped(gates), experts)
            return Output(dispatch.restore(self.towers.own(mixed, dispatch)))
        rows = self.head_rows(scenario, valid)
        if extra or not self.gates.hidden.weights:
            experts, gates = self.experts(x, valid), self.gates(gate_x, rows)
        else:
            experts, hidden = together(x, [self.experts, self.gates.hidden], [valid, rows])
            gates = self.gates.from_hidden(hidden)
        if self.training:
            self.newest.keep(gates, scenario, valid)
        mixed = mix(self._dropped(gates), experts)
        return self.select(self.towers(mixed, rows), scenario, return_all_heads)

    def _dropped(self, gates: Tensor) -> Tensor:
        dropout = self.config.gate_dropout
        return drop_gates(gates, dropout) if self.training and dropout > 0 else gates

    def diagnostics(self) -> dict[str, float]:
        """Mean entropy of each head's gate on its rows of the newest training batch, over log E: 1 = equal, 0 = one expert."""
        return self.newest.entropies([f"gate_entropy/{task.name}" for task in self.spec.tasks], self.spec.num_scenarios)
