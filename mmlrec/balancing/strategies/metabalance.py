"""MetaBalance: the gradients of auxiliary objectives brought near the norm of the main one's.

He, Feng, Cheng, Ji, Guo, Caverlee, "MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of
Auxiliary Tasks", WWW 2022.

    n_t <- beta n_t + (1 - beta) |g_t|, in the batches in which the objective has rows
    c_t = r n_main / n_t + 1 - r, and 1 for the main objective

There is one norm for all shared parameters, where the paper has one for each block of them.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmlrec.balancing.base import BalancingSpec
from mmlrec.balancing.gradients import Array, GradientBalancing, GradientBalancingConfig


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

    def coefficients(self, gram: Array, losses: Array, step: int) -> Array:
        """See the base class."""
        before, now = self.norms.cpu().numpy(), np.sqrt(np.diag(gram))
        norms = np.where(before > 0, self.config.beta * before + (1 - self.config.beta) * now, now)
        norms = np.where(now > 0, norms, before)
        self.norms.copy_(torch.from_numpy(norms))
        known = norms > 0
        if not known[self.main]:
            return np.ones(len(norms))
        return np.where(known, metabalance(np.where(known, norms, 1.0), self.main, self.config.r), 1.0)


def metabalance(norms: Array, main: int, r: float) -> Array:
    """Factors that bring the norms of auxiliary gradients near the main one's: r n_main / n_t + 1 - r, and 1 for it."""
    return np.asarray(r * norms[main] / norms + 1.0 - r)
