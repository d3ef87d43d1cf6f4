"""STCH: smooth Tchebycheff scalarisation, a smooth maximum of the losses relative to references of a warm-up.

Lin, Zhang, Yang, Liu, Wang, Zhang, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024.

    warm-up:  loss = sum_t log L_t,                              c_t = 1 / L_t
    then:     loss = K mu logsumexp_t(log(L_t / ref_t) / mu),    c_t = K softmax_t(log(L_t / ref_t) / mu) / L_t

The mean losses of the warm-up become the references. Objectives without rows in a batch are left out, of the means, too.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mmlrec.balancing.base import BalancingConfig, BalancingSpec, LossBalancing


class STCH(LossBalancing):
    """Smooth Tchebycheff scalarisation."""

    class Config(BalancingConfig):
        """Options of STCH."""

        mu: float = Field(default=1.0, gt=0, description="Smoothing: the smaller, the more the worst objective counts.")
        warmup_windows: int = Field(
            default=4, gt=0, description="Windows of log losses, whose mean losses become the references."
        )
        window_steps: int | None = Field(default=None, gt=0, description="Steps of a window; absent: an epoch.")

    config: Config
    total: Tensor
    count: Tensor

    def __init__(self, spec: BalancingSpec, config: Config) -> None:
        super().__init__(spec, config)
        self.warmup_steps = config.warmup_windows * (config.window_steps or spec.steps_per_epoch)
        for name in ("total", "count"):
            self.register_buffer(name, torch.zeros(len(spec.objectives), dtype=torch.float64))

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        present = losses > 0
        some = torch.where(present, losses, 1.0)
        if step <= self.warmup_steps:
            self.total += losses
            self.count += present
            return torch.where(present, 1.0 / some, 0.0)
        reference = torch.where(self.count > 0, self.total / self.count, 1.0)
        scores = torch.where(present, (some / reference).log() / self.config.mu, -torch.inf)
        return torch.where(present, len(losses) * torch.softmax(scores, 0) / some, 0.0)
