"""ESCM2: ESMM with a counterfactual risk for the conversion tower, by inverse propensities (IPS) or doubly robust (DR).

Wang, Chang, Liu, Huang, Chen, Yu, Li, Chu, "ESCM2: Entire Space Counterfactual Multi-Task Model for Post-Click
Conversion Rate Estimation", SIGIR 2022.

Towers a (ctr), c (cvr) and the product's logit z as in ESMM, o the click and r the conversion label:

    ctr^  = stop_gradient(sigmoid(a))                       the propensity
    omega = min(1 / ctr^, propensity_weight_max)
    delta = BCE(c, r)
    IPS:  L_cvr = 1/N sum_b o omega delta
    DR:   d^    = softplus(Lin(MLP_imp(x; expert_hidden_units)))    the imputed error, in training only
          L_cvr = 1/N sum_b d^ + 1/D sum_b o omega (delta - d^)  +  1/D sum_b o omega (delta - d^)^2

N is the number of rows and D = N (`ips_norm: exposure`; 1/N of IPS is 1/D, too), the number of clicks (`click`), or the sum
of o omega (`snips`), over all ranks. With `dr_detach` d^ gets no gradient from the first two terms and delta none from the
third. The whole loss is BCE(a, o) + lambda_c L_cvr + lambda_g BCE(z, o r). Rows without a click label enter none of the
three, clicked rows without a conversion label only the first; without a click r counts as 0, whether or not it is known.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmlrec.layers.over_ranks import sum_over_ranks
from mmlrec.layers.towers import Towers
from mmlrec.losses import ChainLoss, Loss, LossOptions, chain_products
from mmlrec.models.base.chain import ChainConfig, ChainModel
from mmlrec.models.base.model import ModelSpec, Owner, Width
from mmlrec.output import Output


class ESCM2Config(ChainConfig):
    """Options of ESCM2."""

    variant: Literal["ips", "dr"] = Field(default="ips", description="Inverse propensities, or doubly robust.")
    expert_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Widths of each tower.")
    lambda_c: float = Field(default=0.1, ge=0, description="Weight of the counterfactual risk.")
    lambda_g: float = Field(default=1.0, ge=0, description="Weight of the product's loss.")
    propensity_weight_max: float = Field(default=1000.0, ge=1, description="Largest inverse propensity.")
    ips_norm: Literal["exposure", "click", "snips"] = Field(
        default="exposure", description="Divide clicked rows' sums by the rows, the clicks, or the inverse propensities' sum."
    )
    dr_detach: bool = Field(default=True, description="dr: the imputation learns from the squared error only, cvr not from it.")


class CounterfactualLoss(ChainLoss):
    """Losses of ctr and of the product, and the counterfactual risk."""

    def __init__(self, network: ESCM2, options: LossOptions) -> None:
        # o r is 0 without a click, whether or not the labels are a chain.
        super().__init__(network.spec.tasks, network.spec.num_scenarios, options, network.chain, implied=True)
        (self.ctr, self.ctcvr), self.config = network.chain, network.config
        self.network = network

    def known(self, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Labels with o r in place of r, and the mask in which a conversion needs the click label, too."""
        labels, mask = super().known(labels, mask)
        labels[:, self.ctcvr] *= labels[:, self.ctr]
        mask[:, self.ctcvr] *= mask[:, self.ctr]
        return labels, mask

    def row_losses(self, output: Output, labels: Tensor) -> Tensor:
        """Cross-entropies, [B, 2], that of the product times lambda_g."""
        columns = list(super().row_losses(output, labels).unbind(1))
        columns[self.ctcvr] = self.config.lambda_g * columns[self.ctcvr]
        return torch.stack(columns, dim=1)

    def terms(self, output: Output, labels: Tensor, share: Tensor) -> dict[str, Tensor]:
        """lambda_c L_cvr; nothing where DR's imputation did not run (evaluation)."""
        share = share[:, self.ctcvr]
        labels = torch.where(share.unsqueeze(1) > 0, labels, 0.0).to(output.logits.dtype)
        error = F.binary_cross_entropy_with_logits(output.named["cvr"], labels[:, self.ctcvr], reduction="none")
        inverse = 1.0 + torch.exp(-output.named["ctr"].detach())
        clicked = share * labels[:, self.ctr]
        if self.network.training:
            above = (inverse > self.config.propensity_weight_max) & (clicked > 0)
            self.network.clipped = torch.stack([above.sum(), (clicked > 0).sum()])
        inverse = inverse.clamp(max=self.config.propensity_weight_max)
        weight = clicked * inverse / self._norm(clicked, inverse)
        if self.config.variant == "ips":
            return {"counterfactual": self.config.lambda_c * (weight * error).sum()}
        imputed = output.named.get("imputed_error")
        if imputed is None:
            return {}
        given, target = (imputed.detach(), error.detach()) if self.config.dr_detach else (imputed, error)
        risk = share * given + weight * (error - given) + weight * (target - imputed).square()
        return {"counterfactual": self.config.lambda_c * risk.sum()}

    def _norm(self, clicked: Tensor, inverse: Tensor) -> Tensor | float:
        """D / N: what divides the weights, a mean over ranks as `clicked` is scaled by their number; 1 without clicks."""
        if self.config.ips_norm == "exposure":
            return 1.0
        own = (clicked * inverse if self.config.ips_norm == "snips" else clicked).sum()
        total, ranks = sum_over_ranks(torch.stack([own, torch.ones_like(own)])).unbind()
        return torch.where(total > 0, total / ranks, 1.0)


class ESCM2(ChainModel):
    """Entire space counterfactual multi-task model."""

    Config = ESCM2Config
    owners: ClassVar[dict[str, Owner]] = {"towers": "scenario", "imputation": "scenario"}
    two_steps = True
    config: ESCM2Config
    #: Clicked rows of the newest training batch whose inverse propensity was clipped, and all clicked ones; set by the loss.
    clipped: Tensor | None = None

    def __init__(self, spec: ModelSpec, config: ESCM2Config) -> None:
        super().__init__(spec, config)
        generator, width = self.generator, spec.input_width
        self.towers = Towers(2 * self.replicas, width, config.expert_hidden_units, config.hidden, generator)
        self.imputation = None
        if config.variant == "dr":
            self.imputation = Towers(self.replicas, width, config.expert_hidden_units, config.hidden, generator)

    def sole(self, parameter: str) -> tuple[bool, ...]:
        """The tower of cvr: that of ctr is part of the product, too."""
        return self.last_step if parameter.startswith("towers.") else ()

    def diagnostics(self) -> dict[str, float]:
        """Share of the clicked rows of the newest training batch whose inverse propensity was clipped."""
        clipped, clicked = (0, 0) if self.clipped is None else self.clipped.tolist()
        return {"clipped_share": clipped / clicked} if clicked else {}

    def make_loss(self, options: LossOptions) -> Loss:
        """Losses of ctr and of the product, and the counterfactual risk."""
        return CounterfactualLoss(self, options)

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
        """Logits; see the base class. `Output.named` holds ctr, cvr and ctcvr, and in training of DR imputed_error."""
        dispatch = self.chain_dispatch(scenario, self.config.expert_hidden_units, return_all_heads)
        steps = self.chain_towers(self.towers, x, scenario, valid, dispatch)
        output = self.chain_output(chain_products(steps, self.chain), scenario, return_all_heads)
        output.named["cvr"] = self.own_replica(steps, scenario)[:, self.chain[1]]
        if self.imputation is not None and self.training:
            logits = self.chain_towers(self.imputation, x, scenario, valid, dispatch)
            output.named["imputed_error"] = F.softplus(self.own_replica(logits, scenario)[:, 0])
        return output
