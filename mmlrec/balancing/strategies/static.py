"""Static: the weighted sum of the losses.

No paper.

    c_t = 1

It is what a run does without a strategy: `loss_weights` alone says how much each objective counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmlrec.balancing.base import Balancing


class Static(Balancing):
    """The plain sum of what `loss_weights` made of the losses."""

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See the base class."""
        return torch.sum(objectives)
