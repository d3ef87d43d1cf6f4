"""MGDA: the shortest vector in the convex hull of the gradients, a direction that helps every objective.

Désidéri 2012; Sener, Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018.

    w   = argmin over the simplex of |sum_t w_t g_t / s_t|
    c_t = K w_t / s_t, s = 1, the norm of g_t (`l2`), L_t (`loss`), or both (`loss+`)

K times, because the weights of a sum of K losses add up to K. The problem is solved exactly, by Wolfe's algorithm, where the
paper takes a fixed number of Frank-Wolfe steps. Which gradients take part is found one after the other, each by a question
about numbers: on a GPU the host waits for the Gram matrix, once a step, and solves there.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from mmlrec.balancing.gradients import Array, GradientBalancing, GradientBalancingConfig
from mmlrec.balancing.hull import shortest_in_hull


class MGDA(GradientBalancing):
    """Multiple-gradient descent on normalised gradients."""

    class Config(GradientBalancingConfig):
        """Options of MGDA."""

        normalisation: Literal["none", "l2", "loss", "loss+"] = Field(
            default="none", description="Divide each gradient by 1, its norm, its loss, or both, before."
        )

    config: Config

    def rule(self, gram: Array, losses: Array, step: int) -> Array:
        """See the base class."""
        scales = np.ones(len(gram))
        if self.config.normalisation in ("l2", "loss+"):
            scales = scales * np.sqrt(np.diag(gram))
        if self.config.normalisation in ("loss", "loss+"):
            scales = scales * losses
        return np.asarray(len(gram) * shortest_in_hull(gram / np.outer(scales, scales)) / scales)
