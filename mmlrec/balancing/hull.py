"""The shortest vector in the convex hull of gradients, from their inner products."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmlrec.balancing.gradients import Array


def shortest_in_hull(gram: Array) -> Array:
    """Weights w >= 0, sum 1, of the shortest vector in the convex hull of the gradients.

    Wolfe, "Finding the nearest point in a polytope", Mathematical Programming 1976. His algorithm ends at the exact point: it
    keeps a set of gradients whose affine hull has its shortest vector inside their convex hull, adds the gradient that most
    contradicts it, and drops those whose weight would be negative.

    Args:
        gram: Q [K, K] with Q_ij = g_i . g_j, float64.
    """
    count = len(gram)
    scale = np.abs(gram).max()
    weights = np.eye(count)[np.argmin(np.diag(gram))]
    for _ in range(100 * count):
        slopes = gram @ weights
        worst = int(np.argmin(slopes))
        if weights[worst] > 0 or weights @ slopes - slopes[worst] <= 1e-13 * scale:
            break
        active = weights > 0
        active[worst] = True
        wanted = _shortest_affine(gram, active)
        while (wanted[active] <= 0).any():
            falling = np.flatnonzero(active & (wanted <= 0))
            reach = weights[falling] / np.maximum(weights[falling] - wanted[falling], 1e-300)
            weights = weights + reach.min() * (wanted - weights)
            active[falling[np.argmin(reach)]] = False
            weights = np.where(active, np.maximum(weights, 0.0), 0.0)
            wanted = _shortest_affine(gram, active)
        weights = wanted
    return weights


def _shortest_affine(gram: Array, active: NDArray[np.bool_]) -> Array:
    """Weights of sum 1, of any sign, of the shortest vector in the affine hull of the active gradients."""
    count = int(active.sum())
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = gram[np.ix_(active, active)] / np.abs(gram).max()
    system[count, count] = 0.0
    weights = np.zeros(len(gram))
    weights[active] = np.linalg.lstsq(system, np.eye(count + 1)[count], rcond=None)[0][:count]
    return weights
