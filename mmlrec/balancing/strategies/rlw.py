"""RLW: random weights, drawn anew each step.

Lin, Ye, Zhang, Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning", TMLR 2022.

    c = K softmax(n), n_t ~ N(0, 1)

The draws depend on seed and step only, so they are equal on all ranks and after a resume. It is the yardstick for the others:
what it gains is noise that regularises, not balance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlrec.balancing.base import LossBalancing, step_generator, to_device


class RLW(LossBalancing):
    """Random loss weighting."""

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        draws = torch.randn(len(losses), dtype=torch.float64, generator=step_generator(self.spec.seed, step))
        return to_device(len(losses) * torch.softmax(draws, 0), losses.device)
