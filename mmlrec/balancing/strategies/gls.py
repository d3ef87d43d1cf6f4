"""GLS: the geometric mean of the losses, which does not depend on their scales.

Chennupati, Sistu, Yogamani, Rawashdeh, "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for
Multi-Task Learning", CVPR workshops 2019.

    loss = exp(mean_t log L_t)    over objectives with rows in the batch
    c_t  = loss / (K L_t)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlrec.balancing.base import LossBalancing


class GLS(LossBalancing):
    """Geometric loss strategy."""

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        present = losses > 0
        count = present.sum().clamp(min=1)
        logs = torch.where(present, losses, 1.0).log()
        return torch.where(present, torch.exp(logs.sum() / count - logs) / count, 0.0)
