"""UW: uncertainty weighting, which learns the variance of each objective together with the network.

Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics", CVPR 2018.

    loss = sum_t kappa_t exp(-v_t) L_t + v_t / 2    over objectives with rows in the batch
    c_t  = kappa_t exp(-v_t)

kappa is 1 for classification, 1/2 for regression, and the mean over the tasks of a scenario. The logarithms of the variances v
are trained by the optimizer of the network, without a penalty, and kept in [-10, 10].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmlrec.balancing.base import BalancingConfig, BalancingSpec, LossBalancing, mean_over_ranks


class UW(LossBalancing):
    """Uncertainty weighting."""

    kappa: Tensor

    def __init__(self, spec: BalancingSpec, config: BalancingConfig) -> None:
        super().__init__(spec, config)
        self.log_variances = nn.Parameter(torch.zeros(len(spec.objectives)))
        self.register_buffer("kappa", torch.tensor(_kappas(spec)), persistent=False)

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See the base class."""
        with torch.no_grad():
            self.log_variances.clamp_(-10.0, 10.0)
        coefficients = self.kappa * torch.exp(-self.log_variances)
        self.coefficient.copy_(coefficients.detach())
        present = mean_over_ranks(objectives.detach().double()) > 0
        return torch.sum(coefficients * objectives) + torch.where(present, self.log_variances, 0.0).sum() / 2


def _kappas(spec: BalancingSpec) -> list[float]:
    """1 for objectives of classification, 1/2 of regression, the mean over the tasks of a scenario."""
    of_tasks = [1.0 if task.kind == "binary" else 0.5 for task in spec.tasks]
    if spec.unit == "task":
        return of_tasks
    if spec.unit == "head":
        return [kappa for kappa in of_tasks for _ in range(spec.num_scenarios)]
    return [sum(of_tasks) / len(of_tasks)] * spec.num_scenarios
