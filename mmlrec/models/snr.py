"""SNR: levels of sub-networks; which of them are connected is learned by sparse random gates.

Ma, Zhao, Chen, Li, Hong, Chi, "SNR: Sub-Network Routing for Flexible Parameter Sharing in Multi-Task Learning", AAAI 2019.

Levels l = 1..n, as many as `expert_hidden_units`, of E sub-networks each, with v_{0,j} = x:

    u_{l,j} = act(Lin_{l,j}(v_{l-1,j}))                          [B, h_l], j = 1..E
    v_{l,i} = sum_j z_{l,ij} (u_{l,j} M_{l,ij})    `trans`       M [h_l, h_l], without bias
    v_{l,i} = sum_j z_{l,ij} u_{l,j}               `aver`        [B, h_l], i = 1..E, at the last level i = 1..H
    z_h = Tower_h(v_{n,h})                                       [B]

z_{l,ij} in [0, 1] is a hard-concrete gate, one number for a connection and a step, shared by the whole batch; evaluation
takes its mean. The loss has the term l0_lambda * sum P(z != 0) * cost, with cost 1 or h_l^2 (`l0_cost`). With scenarios only
the last level's connections and the towers of a row's own scenario are computed; the levels below are shared.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmlrec.layers.experts import StackedMLP
from mmlrec.layers.gates import mix
from mmlrec.layers.hard_concrete import GatedConnections, HardConcrete, HardConcreteOptions, split_noise
from mmlrec.layers.scenario import Dispatch
from mmlrec.layers.towers import Towers
from mmlrec.models.base.gated_connections import GatedConnectionsConfig, GatedConnectionsModel
from mmlrec.models.base.model import ModelSpec
from mmlrec.output import Output


class _GatedSums(nn.Module):
    """Connections without maps: v_i = sum_j z_ij u_j, i = 1..n, j = 1..E."""

    def __init__(self, outputs: int, inputs: int, options: HardConcreteOptions, generator: torch.Generator) -> None:
        super().__init__()
        self.gates = HardConcrete((outputs, inputs), options, generator)

    def forward(self, u: Tensor, noise: Tensor | None = None) -> Tensor:
        """All outputs: [E, B, h] -> [n, B, h]."""
        return (self.gates(noise) @ u.flatten(1)).unflatten(1, u.shape[1:])

    def own(self, u: Tensor, dispatch: Dispatch, noise: Tensor | None = None) -> Tensor:
        """Outputs of each row's own scenario: rows arranged, [E, B, h] -> [n / S, B, h]."""
        z = self.gates(noise).unflatten(0, (-1, dispatch.num_scenarios)).transpose(0, 1)
        own = F.embedding(dispatch.scenario, z.flatten(1)).unflatten(1, z.shape[1:])
        return mix(own.to(u.dtype), u)


class SNR(GatedConnectionsModel):
    """Sub-network routing."""

    class Config(GatedConnectionsConfig):
        """Options of SNR."""

        variant: Literal["trans", "aver"] = Field(default="trans", description="Connections with linear maps, or plain sums.")
        l0_lambda: float = Field(default=1e-3, ge=0, description="Weight of the expected cost of open connections.")
        l0_cost: Literal["connections", "params"] = Field(default="connections", description="Cost 1, or its parameters h^2.")

        @model_validator(mode="after")
        def _cost_exists(self) -> SNR.Config:
            if self.variant == "aver" and self.l0_cost == "params":
                raise ValueError("l0_cost 'params' needs variant 'trans': sums have no parameters; use 'connections'")
            return self

    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        generator, experts, units = self.generator, config.num_experts, config.expert_hidden_units
        self.subnetworks, self.connections = nn.ModuleList(), nn.ModuleList()
        width = spec.input_width
        for level, units_here in enumerate(units, start=1):
            self.subnetworks.append(StackedMLP(experts, width, [units_here], config.hidden, generator))
            outputs, width = spec.num_heads if level == len(units) else experts, units_here
            if config.variant == "trans":
                self.connections.append(GatedConnections(outputs, experts, width, config.gates, generator))
            else:
                self.connections.append(_GatedSums(outputs, experts, config.gates, generator))
        self.towers = Towers(spec.num_heads, width, config.tower_hidden_units, config.hidden, generator)
        self.num_noise = sum(gates.num_noise for gates in self.gates)

    @property
    def gates(self) -> list[HardConcrete]:
        """The gates of each level's connections."""
        return [cast(HardConcrete, connections.gates) for connections in self.connections]

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
        dispatch = self.own_dispatch(scenario, [config.expert_hidden_units[-1], *config.tower_hidden_units], return_all_heads)
        if dispatch is not None:
            x = dispatch.arrange(x)
        levels = list(zip(self.subnetworks, self.connections, split_noise(noise, self.gates), strict=True))
        for subnetworks, connections, draw in levels[:-1]:
            x = connections(subnetworks(x, valid), draw)
        subnetworks, connections, draw = levels[-1]
        x = subnetworks(x, valid)
        if dispatch is not None:
            own = cast(GatedConnections | _GatedSums, connections).own(x, dispatch, draw)
            output = Output(dispatch.restore(self.towers.own(own, dispatch)))
        else:
            all_logits = self.towers(connections(x, draw), self.head_rows(scenario, valid))
            output = self.select(all_logits, scenario, return_all_heads)
        output.extra_losses["l0"] = config.l0_lambda * self._expected_cost()
        return output

    def _expected_cost(self) -> Tensor:
        units = self.config.expert_hidden_units
        costs = [width**2 if self.config.l0_cost == "params" else 1 for width in units]
        sums = [cost * gates.open_probability().sum() for cost, gates in zip(costs, self.gates, strict=True)]
        return torch.stack(sums).sum()

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Expected number of open connections."""
        return {"open_connections": sum(float(gates.open_probability().sum()) for gates in self.gates)}
