"""MetaBalance: the gradients of auxiliary objectives brought near the norm of the main one's.

He, Feng, Cheng, Ji, Guo, Caverlee, "MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of
Auxiliary Tasks", WWW 2022.

    n_t <- beta n_t + (1 - beta) |g_t|, in the batches in which the objective has rows
    c_t = r n_main / n_t + 1 - r, and 1 for the main objective

There is one norm for all shared parameters, where the paper has one for each block of them. On a GPU the host waits for
nothing.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mmlrec.balancing.base import BalancingSpec
from mmlrec.balancing.gradients import GradientBalancing, GradientBalancingConfig


class MetaBalance(GradientBalancing):
    """`metabalance` on moving averages of the norms."""

    class Config(GradientBalancingConfig):
        """Options of MetaBalance."""

        main: str | None = Field(default=None, description="The main objective; absent: the first.")
        r: float = Field(default=0.7, ge=0, le=1, description="1: norms become equal to the main one's; 0: unchanged.")
        beta: float = Field(default=0.9, ge=0, lt=1, description="Decay of the moving averages of norms.")

    config: Config
    norms: Tensor

    def __init__(self, spec: BalancingSpec, config: Config) -> None:
        super().__init__(spec, config)
        main = spec.objectives[0] if config.main is None else spec.check_objective("balancing.main", config.main)
        self.main = spec.objectives.index(main)
        self.register_buffer("norms", torch.zeros(len(spec.objectives), dtype=torch.float64))

    def coefficients(self, gram: Tensor, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        before, now = self.norms, gram.diagonal().sqrt()
        norms = torch.where(before > 0, self.config.beta * before + (1 - self.config.beta) * now, now)
        self.norms.copy_(torch.where(now > 0, norms, before))
        return metabalance(self.norms, self.main, self.config.r)


def metabalance(norms: Tensor, main: int, r: float) -> Tensor:
    """Factors that bring the norms of auxiliary gradients near the main one's: r n_main / n_t + 1 - r, and 1 for it.

    Of norms that are 0, not yet known, 1; without that of the main one all.
    """
    known = norms > 0
    return torch.where(known & known[main], r * norms[main] / norms + 1.0 - r, 1.0)
