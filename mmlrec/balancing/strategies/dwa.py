"""DWA: dynamic weight average, more weight for objectives whose losses have fallen least from one window to the next.

Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019.

    r_t = mean loss of the last window / mean loss of the window before
    c   = K softmax(r / tau), and 1 in the first two windows

Means are over the steps in which an objective has rows; r_t = 1 where it had none in a window.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mmlrec.balancing.base import BalancingConfig, BalancingSpec, LossBalancing


class DWA(LossBalancing):
    """Dynamic weight average."""

    class Config(BalancingConfig):
        """Options of DWA."""

        tau: float = Field(default=2.0, gt=0, description="Temperature of the softmax.")
        window_steps: int | None = Field(
            default=None, gt=0, description="Steps over which losses are averaged; absent: an epoch."
        )

    config: Config
    total: Tensor
    count: Tensor
    last: Tensor
    before: Tensor

    def __init__(self, spec: BalancingSpec, config: Config) -> None:
        super().__init__(spec, config)
        self.window_steps = config.window_steps or spec.steps_per_epoch
        self.warmup_steps = 2 * self.window_steps
        for name in ("total", "count", "last", "before"):
            self.register_buffer(name, torch.zeros(len(spec.objectives), dtype=torch.float64))

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        windows, position = divmod(step - 1, self.window_steps)
        if windows and position == 0:
            self.before.copy_(self.last)
            self.last.copy_(self.total / self.count.clamp(min=1))
            self.total.zero_()
            self.count.zero_()
        self.total += losses
        self.count += losses > 0
        if windows < 2:
            return torch.ones_like(losses)
        ratios = torch.where((self.last > 0) & (self.before > 0), self.last / self.before, 1.0)
        return len(losses) * torch.softmax(ratios / self.config.tau, 0)
