"""AITM: a tower for each step of a conversion funnel; attention passes information from each step to the next.

Xi, Chen, Yan, Zhang, Zhu, Zhuang, Chen, "Modeling the Sequential Dependence among Audience Multi-step Conversions with
Multi-task Learning in Targeted Display Advertising", KDD 2021.

For the steps t = 1..T of the funnel:

    q_t = MLP_t(x; expert_hidden_units)                                   [B, d_in] -> [B, k];  a_1 = q_1
    p_t = dropout(act(Lin_t(a_{t-1})))                                    [B, k], t >= 2
    w   = softmax over u in {p_t, q_t} of <u W_q, u W_k> / sqrt(k)        [B, 2]
    a_t = w_p * p_t W_v + w_q * q_t W_v                                   [B, k]
    z_t = Lin'_t(a_t), or Tower_t(a_t) with `use_tower`                   [B]

W_q, W_k, W_v are shared by all steps, and with Lin_t by all scenarios. Every z_t is the logit of reaching step t, over all
rows: no product is taken. A calibrator is added to the task losses, the mean over rows of

    aitm_constraint_weight * sum_{t >= 2} max(0, sigmoid(z_t) - sigmoid(z_{t-1}))

in which a pair of steps counts where both labels are present.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlrec.layers.experts import StackedMLP
from mmlrec.layers.mlp import MLP
from mmlrec.layers.towers import Towers
from mmlrec.losses import ChainLoss, Loss, LossOptions
from mmlrec.models.base.chain import ChainConfig, ChainModel
from mmlrec.models.base.model import ModelSpec, Owner, Width
from mmlrec.output import Output


class CalibratedLoss(ChainLoss):
    """Task losses and the calibrator."""

    def __init__(self, network: AITM, options: LossOptions) -> None:
        spec, config = network.spec, network.config
        super().__init__(spec.tasks, spec.num_scenarios, options, network.chain, implied=not config.allow_non_chain)
        self.weight = config.aitm_constraint_weight

    def terms(self, output: Output, labels: Tensor, share: Tensor) -> dict[str, Tensor]:
        """The calibrator."""
        reached = torch.sigmoid(output.logits)
        hinges = [
            torch.relu(reached[:, this] - reached[:, before]) * torch.where(share[:, before] > 0, share[:, this], 0.0)
            for before, this in pairwise(self.chain)
        ]
        return {"calibrator": self.weight * torch.stack(hinges).sum()}


class AITM(ChainModel):
    """Adaptive information transfer multi-task framework."""

    class Config(ChainConfig):
        """Options of AITM."""

        expert_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Widths of each step's network.")
        use_tower: bool = Field(default=False, description="Put hidden layers between attention and logit.")
        tower_hidden_units: list[Width] = Field(default=[64], description="Their widths; may be empty.")
        ait_bias: bool = Field(default=False, description="Give W_q, W_k and W_v a bias, as the MMLRec benchmark does.")
        aitm_constraint_weight: float = Field(default=0.6, ge=0, description="Weight of the calibrator.")

    owners: ClassVar[dict[str, Owner]] = {"bottoms": "scenario", "towers": "head"}
    decays: ClassVar[dict[str, float]] = {"maps": 0.0}
    conditional = False
    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        generator, members = self.generator, spec.num_tasks * self.replicas
        self.bottoms = StackedMLP(members, spec.input_width, config.expert_hidden_units, config.hidden, generator)
        width = self.bottoms.out_features
        plain = replace(config.hidden, use_bn=False)
        self.transfers = nn.ModuleList(MLP(width, [width], plain, generator) for _ in self.chain[1:])
        self.maps = config.hidden.output_weight(3, width, width, generator=generator)
        self.map_biases = nn.Parameter(torch.zeros(3, width)) if config.ait_bias else None
        self.towers = Towers(members, width, self._tower_units, config.hidden, generator)

    def sole(self, parameter: str) -> tuple[bool, ...]:
        """The last step's bottom and what is passed to it; the attention, when there are two steps only."""
        if parameter.startswith("bottoms."):
            return self.last_step
        last = f"transfers.{len(self.transfers) - 1}."
        return (True,) if parameter.startswith((last, "map") if len(self.transfers) == 1 else last) else ()

    @property
    def _tower_units(self) -> list[int]:
        return self.config.tower_hidden_units if self.config.use_tower else []

    def make_loss(self, options: LossOptions) -> Loss:
        """Task losses and the calibrator."""
        return CalibratedLoss(self, options)

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
        widths = [*self.config.expert_hidden_units, *self._tower_units]
        dispatch = self.chain_dispatch(scenario, widths, return_all_heads)
        if dispatch is not None:
            attended = self._attend(self.bottoms.own(dispatch.arrange(x), dispatch))
            logits = dispatch.restore(self.towers.own(attended, dispatch)).unsqueeze(2)
        else:
            rows = self.chain_rows(scenario, valid)
            attended = self._attend(self.bottoms(x, rows))
            logits = self.towers(attended, rows).unflatten(1, (-1, self.replicas))
        return self.chain_output(logits, scenario, return_all_heads)

    def _attend(self, own: Tensor) -> Tensor:
        """From q of all steps to a of all steps, both [T * R, B, k], or [T, B, k] of each row's own scenario."""
        shape = own.shape
        steps = list(own.reshape(self.spec.num_tasks, -1, shape[-1]).unbind())
        for transfer, (before, this) in zip(self.transfers, pairwise(self.chain), strict=True):
            steps[this] = self.mix(transfer(steps[before]), steps[this])
        # Joined along the rows, not stacked: torch.export of 2.11 finds a condition on the batch size in axes that are joined.
        return torch.cat([step.to(steps[self.chain[-1]].dtype) for step in steps]).view(*shape[:2], -1)

    def mix(self, passed: Tensor, own: Tensor) -> Tensor:
        """Attention over what the step before passes and the step's own, both [N, k] -> [N, k]."""
        candidates = torch.stack([passed, own.to(passed.dtype)])
        maps = candidates @ self.maps.transpose(0, 1).flatten(1)
        if self.map_biases is not None:
            maps = maps + self.map_biases.flatten()
        kind = torch.promote_types(maps.dtype, torch.float32)
        query, key, value = maps.to(kind).chunk(3, dim=-1)
        scores = (query * key).sum(dim=-1, keepdim=True) / math.sqrt(own.shape[-1])
        return (torch.softmax(scores, dim=0) * value).sum(dim=0)
