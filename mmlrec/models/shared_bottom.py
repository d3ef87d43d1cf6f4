"""SharedBottom: one bottom, one tower for each head.

Caruana, "Multitask Learning", Machine Learning 28, 1997.

    u = MLP(x; bottom_hidden_units)   [B, d_in] -> [B, k]
    z_h = Tower_h(u)                  [B, k] -> [B], h = t * S + s

With scenarios only the towers of a row's own scenario are computed, unless all heads are asked for.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from mmlrec.layers.mlp import MLP
from mmlrec.layers.towers import Towers
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner, Width
from mmlrec.output import Output


class SharedBottom(MultiTaskModel):
    """Hard parameter sharing."""

    class Config(NetworkConfig):
        """Options of SharedBottom."""

        bottom_hidden_units: list[Width] = Field(
            default=[256, 128], description="Widths of the bottom; [] = separate networks on shared tables."
        )
        tower_hidden_units: list[Width] = Field(default=[64], description="Widths of each tower; may be empty.")

    one_task = True
    owners: ClassVar[dict[str, Owner]] = {"towers": "head"}
    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        generator = self.generator
        self.bottom = MLP(spec.input_width, config.bottom_hidden_units, config.hidden, generator)
        self.towers = Towers(spec.num_heads, self.bottom.out_features, config.tower_hidden_units, config.hidden, generator)

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
        shared = self.bottom(x, valid)
        dispatch = self.own_dispatch(scenario, self.config.tower_hidden_units, return_all_heads)
        if dispatch is not None:
            own = self.towers.own(dispatch.arrange(shared), dispatch)
            return Output(dispatch.restore(own))
        all_logits = self.towers(shared, self.head_rows(scenario, valid))
        return self.select(all_logits, scenario, return_all_heads)
