"""CAGrad: the direction near the mean gradient that helps the objective it helps least.

Liu, Liu, Jin, Stone, Liu, "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021.

    g_0 = mean gradient, G the rows g_t
    w   = argmin over the simplex of  w . Q 1/K + c_a |g_0| |G^T w|
    c   = K (1/K + c_a |g_0| / |G^T w| w) / (1 + c_a^2)

The direction stays within `c_a` times the norm of the mean gradient around it; `c_a: 0` is the plain sum. K times, because the
weights of a sum of K losses add up to K. The problem is solved exactly instead of by a fixed number of descent steps: by a
search, each trial of which is a problem like MGDA's. On a GPU the host waits for the Gram matrix, once a step, and solves
there.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from mmlrec.balancing.gradients import Array, GradientBalancing, GradientBalancingConfig
from mmlrec.balancing.hull import shortest_in_hull


class CAGrad(GradientBalancing):
    """Conflict-averse direction around the mean gradient."""

    class Config(GradientBalancingConfig):
        """Options of CAGrad."""

        c_a: float = Field(default=0.5, ge=0, lt=1, description="Radius around the mean gradient, as a share of its norm.")

    config: Config

    def rule(self, gram: Array, losses: Array, step: int) -> Array:
        """See the base class."""
        return len(gram) * cagrad(gram, self.config.c_a)


def cagrad(gram: Array, c_a: float) -> Array:
    """The c / K of CAGrad, of one Gram matrix.

    Where c_a |g_0| / |G^T w| = l, w also minimises w . Q 1/K + l/2 |G^T w|^2: up to a constant that is MGDA's problem for the
    gradients g_t + g_0 / l. So one number l is searched (by regula falsi), and w is exact for it.
    """
    mean = np.full(len(gram), 1.0 / len(gram))
    gram = gram / np.diag(gram).max()  # coefficients do not depend on the scale
    linear = gram @ mean
    radius = c_a * np.sqrt(max(mean @ linear, 0.0))
    if radius < 1e-6:  # They cancel; what is left of the mean is rounding.
        return mean / (1.0 + c_a**2)

    def solve(log_l: float) -> tuple[Array, float]:
        w = shortest_in_hull(gram + (linear + linear[:, None]) * np.exp(-log_l))
        return w, log_l + 0.5 * np.log(max(float(w @ gram @ w), 1e-30)) - np.log(radius)

    low = np.log(radius)  # |G^T w| is at most 1
    high = low + 1.0
    (w, below), (w_high, above) = solve(low), solve(high)
    # Where gradients cancel, |G^T w| falls to 0 as l grows while l G^T w stays in the ball: beyond 1e-5 it is but rounding.
    while above < 0.0 and high - low < 10.0:
        high += 4.0
        w_high, above = solve(high)
    w, log_l, error = (w, low, below) if -below < above else (w_high, high, above)
    for _ in range(100):
        if abs(error) < 1e-9 or above <= 0.0 or high - low < 1e-9:
            break
        log_l = (low * above - high * below) / (above - below)
        w, error = solve(log_l)
        # The end that stays counts half (the Illinois rule), or it might stay for ever.
        if error < 0.0:
            low, below, above = log_l, error, above / 2
        else:
            high, above, below = log_l, error, below / 2
    return (mean + np.exp(log_l) * w) / (1.0 + c_a**2)
