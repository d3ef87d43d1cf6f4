"""Coefficients of K objectives from the inner products of their gradients: pure functions in float64.

`gram` is Q [K, K] with Q_ij = g_i . g_j, every g_i different from zero. A rule returns c [K]; the shared parameters then
follow sum_t c_t g_t. No rule needs the gradients themselves, so the cost does not depend on their length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def pcgrad(gram: Array, orders: Sequence[Sequence[int]]) -> Array:
    """Each gradient loses what points against another one; the projected gradients are added.

    Yu, Kumar, Gupta, Levine, Hausman, Finn, "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.

    Args:
        orders: for each objective, the order in which it meets the others (itself, if listed, is passed over).
    """
    rows = np.eye(len(gram))
    for i, order in enumerate(orders):
        for j in order:
            inner = rows[i] @ gram[:, j]
            if j != i and inner < 0:
                rows[i, j] -= inner / gram[j, j]
    return rows.sum(axis=0)


def mgda(gram: Array) -> Array:
    """Weights w >= 0, sum 1, of the shortest vector in the convex hull of the gradients.

    Désidéri 2012; Sener, Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018. Found by Wolfe's
    algorithm (1976), which ends at the exact point: it keeps a set of gradients whose affine hull has its shortest vector
    inside their convex hull, adds the gradient that most contradicts it, and drops those whose weight would be negative.
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


def cagrad(gram: Array, c_a: float) -> Array:
    """The direction within c_a |g_0| of the mean gradient g_0 that helps the objective it helps least.

    Liu, Liu, Jin, Stone, Liu, "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021:

        w = argmin over the simplex of  w . Q 1/K + c_a |g_0| |G^T w|
        c = (1/K + c_a |g_0| / |G^T w| w) / (1 + c_a^2)

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
        w = mgda(gram + (linear + linear[:, None]) * np.exp(-log_l))
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


def imtl_g(gram: Array) -> Array:
    """Coefficients of sum 1 under which the update has the same projection on every gradient's direction.

    Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, "Towards Impartial Multi-task Learning", ICLR 2021. With u_t = g_t / |g_t|,
    D the rows g_1 - g_j and U the rows u_1 - u_j: c_{2..K} = g_1 U^T (D U^T)^-1 and c_1 = 1 - their sum.
    """
    norms = np.sqrt(np.diag(gram))
    along = gram / norms  # [i, j] = g_i . u_j
    numerator = along[0, 0] - along[0, 1:]
    matrix = along[0, 0] - along[0, 1:] - along[1:, :1] + along[1:, 1:]
    others = np.linalg.lstsq(matrix.T, numerator, rcond=1e-8)[0]
    return np.append(1.0 - others.sum(), others)


def nash(gram: Array, ridge: float = 0.0) -> Array:
    """The positive c with (Q + ridge I) c = 1 / c: the bargaining solution of the objectives.

    Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, "Multi-Task Learning as a Bargaining Game", ICML 2022. It
    minimises c . Q c / 2 - sum log c, by damped Newton steps. Without a ridge, gradients that cancel have no solution.
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


def aligned(gram: Array) -> Array:
    """Coefficients that give all principal components of the gradients the length of the shortest one.

    Senushkin, Patakin, Kuznetsov, Konushin, "Independent Component Alignment for Multi-Task Learning", CVPR 2023:
    c = sqrt(l_min) V diag(l^-1/2) V^T 1 with Q = V diag(l) V^T, over the eigenvalues that are not zero.
    """
    values, vectors = np.linalg.eigh(gram)
    kept = values > 1e-10 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return np.asarray(np.sqrt(values[0]) * (vectors / np.sqrt(values)) @ vectors.sum(axis=0))


def gradnorm_slope(gram: Array, losses: Array, first_losses: Array, weights: Array, alpha: float) -> Array:
    """Derivative of GradNorm's distance by its weights.

    Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm", ICML 2018: sum_t |w_t |g_t| - target_t| with
    target_t = mean(w |g|) r_t^alpha, a constant, and r_t the loss over its first value, over the mean of these ratios.
    """
    norms = np.sqrt(np.diag(gram))
    ratios = losses / first_losses
    target = np.mean(weights * norms) * (ratios / ratios.mean()) ** alpha
    return np.asarray(np.sign(weights * norms - target) * norms)


def metabalance(norms: Array, main: int, r: float) -> Array:
    """Factors that bring the norms of auxiliary gradients near the main one's: r n_main / n_t + 1 - r, and 1 for it.

    He, Feng, Cheng, Ji, Guo, Caverlee, "MetaBalance", WWW 2022, with one norm for all shared parameters.
    """
    return np.asarray(r * norms[main] / norms + 1.0 - r)
