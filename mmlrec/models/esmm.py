"""ESMM: click and conversion towers, trained through the product of their probabilities over all impressions.

Ma, Zhao, Huang, Wang, Hu, Zhu, Gai, "Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click
Conversion Rate", SIGIR 2018.

    a = Lin(MLP_ctr(x; expert_hidden_units))   [B],  ctr = sigmoid(a)
    c = Lin(MLP_cvr(x; expert_hidden_units))   [B],  cvr = sigmoid(c), on its own without a loss
    z = -logsumexp(-a, -c, -(a + c))           [B],  sigmoid(z) = ctr * cvr

The losses are the cross-entropies of a with the click and of z with the conversion, both over all rows, so that cvr is
learned without the bias of training on clicked rows only. A longer chain has a tower for each step, given the one before.
Logits are a and z; `Output.named` holds ctr = a, ctcvr = z and cvr = c (of a longer chain: the last step, given the first).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from mmlrec.layers.towers import Towers
from mmlrec.losses import chain_products
from mmlrec.models.base.chain import ChainConfig, ChainModel
from mmlrec.models.base.model import ModelSpec, Owner, Width
from mmlrec.output import Output


class ESMM(ChainModel):
    """Entire space multi-task model."""

    class Config(ChainConfig):
        """Options of ESMM."""

        expert_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Widths of each step's tower.")

    owners: ClassVar[dict[str, Owner]] = {"towers": "scenario"}
    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        members = spec.num_tasks * self.replicas
        self.towers = Towers(members, spec.input_width, config.expert_hidden_units, config.hidden, self.generator)

    def sole(self, parameter: str) -> tuple[bool, ...]:
        """The last step's tower: earlier ones are part of every later product."""
        return self.last_step

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
        dispatch = self.chain_dispatch(scenario, self.config.expert_hidden_units, return_all_heads)
        steps = self.chain_towers(self.towers, x, scenario, valid, dispatch)
        output = self.chain_output(chain_products(steps, self.chain), scenario, return_all_heads)
        output.named["cvr"] = self.own_replica(chain_products(steps, self.chain[1:]), scenario)[:, self.chain[-1]]
        return output
