"""GradNorm: weights under which all objectives train at a similar rate.

Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
Networks", ICML 2018.

    c_t      = w_t, of sum K and at least 1e-4
    r_t      = L_t over its first value, over the mean of these ratios
    target_t = mean(w |g|) r_t^alpha, a constant
    w        <- w - lr d/dw sum_t |w_t |g_t| - target_t|, scaled to sum K

The weights act on what is shared; what an objective owns trains on the plain loss, as under all strategies here. On a GPU the
host waits for nothing.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mmlrec.balancing.base import BalancingSpec
from mmlrec.balancing.gradients import GradientBalancing, GradientBalancingConfig


class GradNorm(GradientBalancing):
    """Weights w that follow `gradnorm_slope` by gradient descent."""

    class Config(GradientBalancingConfig):
        """Options of GradNorm."""

        alpha: float = Field(default=1.5, ge=0, description="How strongly slow objectives are favoured.")
        lr: float = Field(default=0.025, gt=0, description="Learning rate of the weights.")

    config: Config
    weights: Tensor
    first: Tensor

    def __init__(self, spec: BalancingSpec, config: Config) -> None:
        super().__init__(spec, config)
        self.register_buffer("weights", torch.ones(len(spec.objectives), dtype=torch.float64))
        self.register_buffer("first", torch.zeros(len(spec.objectives), dtype=torch.float64))

    def coefficients(self, gram: Tensor, losses: Tensor, step: int) -> Tensor:
        """The weights before this step's update."""
        current = self.weights.clone()
        self.first.copy_(torch.where(self.first > 0, self.first, losses))
        slope = gradnorm_slope(gram, losses, self.first, current, self.config.alpha)
        weights = torch.sub(current, slope, alpha=self.config.lr).clamp(min=1e-4)
        self.weights.copy_(weights * len(weights) / weights.sum())
        return current


def gradnorm_slope(gram: Tensor, losses: Tensor, first_losses: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Derivative of sum_t |w_t |g_t| - target_t| by w, the targets being constants; 0 without a loss or a gradient."""
    norms = gram.diagonal().sqrt()
    present = norms * losses > 0
    both = torch.where(present, torch.stack([losses / first_losses, weights * norms]), 0.0)
    (ratios, own), (ratio, norm) = both, both.sum(1) / present.sum()
    return torch.where(present, torch.sign(own - norm * (ratios / ratio) ** alpha) * norms, 0.0)
