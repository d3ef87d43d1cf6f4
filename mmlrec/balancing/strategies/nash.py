"""Nash-MTL: the Nash bargaining solution, in which the objectives gain in proportion.

Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, "Multi-Task Learning as a Bargaining Game", ICML 2022.

    (Q / |Q| + ridge I) c = 1 / c, c > 0, |Q| the Frobenius norm

Without the ridge, gradients that cancel have no solution. The paper's clipping of the gradient's norm to 1 is
`dense.clip_norm: 1`, off by default.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from mmlrec.balancing.gradients import Array, GradientBalancing, GradientBalancingConfig


class Nash(GradientBalancing):
    """Nash bargaining on the Gram matrix divided by its norm."""

    class Config(GradientBalancingConfig):
        """Options of Nash-MTL."""

        ridge: float = Field(
            default=0.01, gt=0, description="Added to the normalised Gram matrix: bounds c by sqrt(K / ridge)."
        )

    config: Config

    def rule(self, gram: Array, losses: Array, step: int) -> Array:
        """See the base class."""
        return nash(gram / np.linalg.norm(gram), self.config.ridge)


def nash(gram: Array, ridge: float = 0.0) -> Array:
    """The positive c with (Q + ridge I) c = 1 / c: the bargaining solution of the objectives.

    It minimises c . Q c / 2 - sum log c, by damped Newton steps. Without a ridge, gradients that cancel have no solution.
    """
    matrix = gram + ridge * np.eye(len(gram))
    c = 1.0 / np.sqrt(np.diag(matrix))
    for _ in range(200):
        slope = matrix @ c - 1.0 / c
        step = np.linalg.solve(matrix + np.diag(c**-2), -slope)
        decrement = np.sqrt(max(float(-slope @ step), 0.0))
        c = c + (step / (1.0 + decrement) if decrement > 0.25 else step)
        if decrement < 1e-12:
            break
    return c
