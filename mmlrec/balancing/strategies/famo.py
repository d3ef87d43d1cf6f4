"""FAMO: fast adaptive multitask optimisation, more weight for objectives whose losses fell least since the step before.

Liu, Feng, Stone, Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023.

    z    = softmax(w), C = sum_t z_t / L_t
    loss = sum_t z_t / C log L_t
    c_t  = K z_t / (C L_t)
    w    <- Adam along J^T (log L(last) - log L(now)) + decay w, J the Jacobian of the softmax

The paper reads the losses of the same batch after the update. That is a second lookup and forward pass, so here the next
batch's losses are read instead: on average they show the same progress, with the noise of batches. K times, for the scale of a
sum.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mmlrec.balancing.base import BalancingConfig, BalancingSpec, LossBalancing


class FAMO(LossBalancing):
    """Fast adaptive multitask optimisation, on the next batch's losses."""

    class Config(BalancingConfig):
        """Options of FAMO."""

        lr: float = Field(default=0.025, gt=0, description="Learning rate of the logits.")
        decay: float = Field(default=1e-3, ge=0, description="Weight decay of the logits.")

    config: Config
    logits: Tensor
    moment: Tensor
    square: Tensor
    previous: Tensor

    def __init__(self, spec: BalancingSpec, config: Config) -> None:
        super().__init__(spec, config)
        for name in ("logits", "moment", "square", "previous"):
            self.register_buffer(name, torch.zeros(len(spec.objectives), dtype=torch.float64))

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        present = losses > 0
        if step > 1:
            self._follow(torch.where(present & (self.previous > 0), (self.previous / losses).log(), 0.0), step - 1)
        self.previous.copy_(losses)
        shares = torch.where(present, torch.softmax(self.logits, 0) / torch.where(present, losses, 1.0), 0.0)
        return len(losses) * shares / shares.sum().clamp(min=1e-300)

    def _follow(self, progress: Tensor, count: int) -> None:
        """One Adam step on the logits along J^T progress, J the Jacobian of the softmax, plus weight decay."""
        z = torch.softmax(self.logits, 0)
        slope = z * (progress - (z * progress).sum()) + self.config.decay * self.logits
        self.moment.lerp_(slope, 0.1)
        self.square.lerp_(slope.square(), 0.001)
        mean, square = self.moment / (1 - 0.9**count), self.square / (1 - 0.999**count)
        self.logits -= self.config.lr * mean / (square.sqrt() + 1e-8)
