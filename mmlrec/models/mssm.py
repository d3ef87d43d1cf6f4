"""MSSM: sub-networks as in SNR-Trans, with sparse random gates on every feature field and on every cell of a connection.

Ding, Dong, He, Cheng, Fu, Huan, Li, Yan, Zhang, Zhang, Mo, "MSSM: A Multiple-level Sparse Sharing Model for Efficient
Multi-Task Learning", SIGIR 2021.

Field level (`fscm`), for the first level's sub-networks e = 1..E and the fields f:

    x_e = concat_f(m_{e,f} x_f)                                  [B, d_in]

Cell level, levels l = 1..n, as many as `expert_hidden_units`, with v_{0,e} = x_e:

    u_{l,j} = act(Lin_{l,j}(v_{l-1,j}))                          [B, h_l], j = 1..E
    v_{l,i} = sum_j z_{l,ij} * (u_{l,j} M_{l,ij})                [B, h_l], i = 1..E, at the last level i = 1..H
    z_h = Tower_h(v_{n,h})                                       [B]

M [h_l, h_l] without bias; m_{e,f} and the h_l elements of z_{l,ij} in [0, 1] are hard-concrete gates, drawn once for a step;
evaluation takes their means. The loss has the term l0_field * sum P(m != 0) + l0_cell * sum P(z != 0) / h_l. With scenarios
only the last level's connections and the towers of a row's own scenario are computed.

How the field gates are made is our reading: the paper was not at hand beyond its abstract.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from mmlrec.layers.experts import StackedMLP
from mmlrec.layers.hard_concrete import GatedConnections, HardConcrete, split_noise
from mmlrec.layers.towers import Towers
from mmlrec.models.base.gated_connections import GatedConnectionsConfig, GatedConnectionsModel
from mmlrec.models.base.model import ModelSpec
from mmlrec.output import Output


class MSSM(GatedConnectionsModel):
    """Multiple-level sparse sharing."""

    class Config(GatedConnectionsConfig):
        """Options of MSSM."""

        fscm: bool = Field(default=True, description="Gates on fields; the MMLRec code has none.")
        dense_as_one_field: bool = Field(default=False, description="One field gate for all dense features, not one each.")
        l0_field: float = Field(default=1e-3, ge=0, description="Weight of the expected number of open field gates.")
        l0_cell: float = Field(default=1e-3, ge=0, description="Weight of the expected number of open connections.")

    config: Config
    field_of_column: Tensor

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        generator, experts, units = self.generator, config.num_experts, config.expert_hidden_units
        self.subnetworks, self.connections = nn.ModuleList(), nn.ModuleList()
        width = spec.input_width
        for level, units_here in enumerate(units, start=1):
            self.subnetworks.append(StackedMLP(experts, width, [units_here], config.hidden, generator))
            outputs, width = spec.num_heads if level == len(units) else experts, units_here
            self.connections.append(GatedConnections(outputs, experts, width, config.gates, generator, cells=True))
        self.towers = Towers(spec.num_heads, width, config.tower_hidden_units, config.hidden, generator)
        self.field_gates: HardConcrete | None = None
        if config.fscm:
            dense = [spec.num_dense] if config.dense_as_one_field and spec.num_dense else [1] * spec.num_dense
            widths = torch.tensor([*spec.fields.values(), *dense])
            self.field_gates = HardConcrete((experts, len(widths)), config.gates, generator)
            columns = torch.repeat_interleave(torch.arange(len(widths)), widths)
            self.register_buffer("field_of_column", columns, persistent=False)
        self.num_noise = sum(gates.num_noise for gates in self.gates)

    @property
    def gates(self) -> list[HardConcrete]:
        """The gates of each level's connections, then those of the fields."""
        cells = [cast(HardConcrete, connections.gates) for connections in self.connections]
        return cells if self.field_gates is None else [*cells, self.field_gates]

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
        widths = [self.config.expert_hidden_units[-1], *self.config.tower_hidden_units]
        dispatch = self.own_dispatch(scenario, widths, return_all_heads)
        if dispatch is not None:
            x = dispatch.arrange(x)
        draws = split_noise(noise, self.gates)
        x = self._first(x, valid, draws[-1])
        for connections, draw, above in zip(self.connections, draws, self.subnetworks[1:], strict=False):
            x = above(connections(x, draw), valid)
        last, draw = cast(GatedConnections, self.connections[-1]), draws[len(self.connections) - 1]
        if dispatch is not None:
            own = last.own(x, dispatch, draw)
            output = Output(dispatch.restore(self.towers.own(own, dispatch)))
        else:
            all_logits = self.towers(last(x, draw), self.head_rows(scenario, valid))
            output = self.select(all_logits, scenario, return_all_heads)
        output.extra_losses["l0"] = self._penalty()
        return output

    def _first(self, x: Tensor, valid: Tensor | None, draw: Tensor | None) -> Tensor:
        """The first level's sub-networks, [B, d_in] -> [E, B, h]."""
        first = cast(StackedMLP, self.subnetworks[0])
        if self.field_gates is None:
            return first(x, valid)
        # (m x) W = x (m W): scaling the rows of the weights saves E copies of x.
        # By `embedding`, whose backward adds the columns of a field in a fixed order, on CUDA, too.
        m = F.embedding(self.field_of_column, self.field_gates(draw).t()).t().contiguous()
        return functional_call(first, {"weights.0": m.unsqueeze(2) * first.weights[0]}, (x, valid))

    def _open_connections(self) -> Tensor:
        """Expected number of open connections; a connection's h cells count 1 together."""
        cells = self.gates[: len(self.connections)]
        return torch.stack([gates.open_probability().mean(dim=2).sum() for gates in cells]).sum()

    def _penalty(self) -> Tensor:
        penalty = self.config.l0_cell * self._open_connections()
        if self.field_gates is not None:
            penalty = penalty + self.config.l0_field * self.field_gates.open_probability().sum()
        return penalty

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Expected numbers of open connections and open field gates."""
        found = {"open_connections": float(self._open_connections())}
        if self.field_gates is not None:
            found["open_fields"] = float(self.field_gates.open_probability().sum())
        return found
