"""Monitor: the weighted sum, with the gradients of the objectives compared and logged.

No paper.

    c_t = 1

Norms and cosines of the gradients go into the log; training is that of `static`, to the bit. Look there first whether
objectives conflict at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmlrec.balancing.gradients import GradientBalancing, gradients, side_by_side


class Monitor(GradientBalancing):
    """The plain sum, whose gradients are compared for the log."""

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See the base class."""
        if (step - 1) % self.config.refresh_every == 0:
            shared, _ = self._split(x, parameters)
            of_each = [gradients(objective, shared) for objective in objectives.unbind()]
            self.gram.copy_(self._global_gram(*side_by_side(of_each), objectives.detach())[0])
        return torch.sum(objectives)
