"""GradNorm: weights under which all objectives train at a similar rate.

Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
Networks", ICML 2018.

    c_t      = w_t, of sum K and at least 1e-4
    r_t      = L_t over its first value, over the mean of these ratios
    target_t = mean(w |g|) r_t^alpha, a constant
    w        <- w - lr d/dw sum_t |w_t |g_t| - target_t|, scaled to sum K

The weights act on what is shared; what an objective owns trains on the plain loss, as under all strategies here.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmlrec.balancing.base import BalancingSpec
from mmlrec.balancing.gradients import Array, GradientBalancing, GradientBalancingConfig


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

    def coefficients(self, gram: Array, losses: Array, step: int) -> Array:
        """The weights before this step's update."""
        weights, first = self.weights.cpu().numpy().copy(), self.first.cpu().numpy().copy()
        first = np.where(first > 0, first, losses)
        current = weights.copy()
        present = (np.diag(gram) > 0) & (losses > 0)
        if present.any():
            own = (gram[np.ix_(present, present)], losses[present], first[present], weights[present], self.config.alpha)
            weights[present] -= self.config.lr * gradnorm_slope(*own)
        weights = np.maximum(weights, 1e-4)
        self.weights.copy_(torch.from_numpy(weights * len(weights) / weights.sum()))
        self.first.copy_(torch.from_numpy(first))
        return current


def gradnorm_slope(gram: Array, losses: Array, first_losses: Array, weights: Array, alpha: float) -> Array:
    """Derivative of sum_t |w_t |g_t| - target_t| by w, the targets being constants."""
    norms = np.sqrt(np.diag(gram))
    ratios = losses / first_losses
    target = np.mean(weights * norms) * (ratios / ratios.mean()) ** alpha
    return np.asarray(np.sign(weights * norms - target) * norms)
