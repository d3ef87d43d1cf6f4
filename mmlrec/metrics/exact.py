"""Exact metrics of one slice of rows, on numpy arrays. Definitions: docs/metrics.md.

Scores and logits are float arrays, labels hold 0 and 1, weights are not negative; all are [N] and without missing
values. A metric that is not defined for the slice (one class only, no rows, no weight) is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


def auc(score: Floats, label: Floats, weight: Floats | None = None) -> float:
    """Area under the ROC curve: share of (positive, negative) pairs in the right order, ties counted half.

    Equals the Mann-Whitney statistic (Hanley and McNeil 1982); with weights a pair counts w_i * w_j.
    """
    positive = label > 0
    if weight is None:
        high, low = np.sort(score[positive]), np.sort(score[~positive])
        if not len(high) or not len(low):
            return float("nan")
        below = np.searchsorted(low, high, "left").sum() + np.searchsorted(low, high, "right").sum()
        return float(below) / 2 / (len(high) * len(low))
    high, low = score[positive], score[~positive]
    high_weight, low_weight = weight[positive].astype(np.float64), weight[~positive].astype(np.float64)
    order = np.argsort(low)
    low = low[order]
    cumulative = np.concatenate([np.zeros(1), np.cumsum(low_weight[order])])
    pairs = high_weight.sum() * cumulative[-1]
    if not pairs > 0:
        return float("nan")
    below = cumulative[np.searchsorted(low, high, "left")] + cumulative[np.searchsorted(low, high, "right")]
    return float((high_weight * below).sum() / 2 / pairs)


def logloss(logit: Floats, label: Floats, weight: Floats | None = None) -> float:
    """Weighted mean of softplus((1 - 2y) z) in float64: cross-entropy from logits, without clipping."""
    wrong = np.where(label > 0, -1.0, 1.0) * logit
    return _mean(np.maximum(wrong, 0) + np.log1p(np.exp(-np.abs(wrong))), weight)


def normalized_entropy(logit: Floats, label: Floats, weight: Floats | None = None) -> float:
    """Logloss over the entropy of the slice's own (weighted) positive rate (He et al. 2014, section 3)."""
    rate = _mean((label > 0).astype(np.float64), weight)
    if not 0 < rate < 1:
        return float("nan")
    return logloss(logit, label, weight) / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def calibration(logit: Floats, label: Floats, weight: Floats | None = None) -> float:
    """(Weighted) sum of predicted probabilities over (weighted) sum of positives; 1 is calibrated."""
    rate = _mean((label > 0).astype(np.float64), weight)
    if not rate > 0:
        return float("nan")
    return _mean(0.5 * (1 + np.tanh(logit.astype(np.float64) / 2)), weight) / rate


def gauc(score: Floats, label: Floats, group: npt.NDArray[np.int64], weight: Floats | None = None) -> float:
    """Mean of the groups' AUCs, each weighted by its number of rows; groups with one class are left out.

    (Zhu et al. 2017, "Optimized cost per click in Taobao display advertising", with impressions as weights.) With weights a
    group weighs the sum of its rows' weights, and its AUC is the weighted one; a class whose weights are all 0 is none.
    """
    if not len(score):
        return float("nan")
    order = np.lexsort((score, group))
    score, group, positive = score[order], group[order], label[order] > 0
    new_group = np.concatenate([[True], group[1:] != group[:-1]])
    new_tie = new_group | np.concatenate([[True], score[1:] != score[:-1]])
    starts = np.flatnonzero(new_group)
    tie_starts = np.flatnonzero(new_tie)
    if weight is not None:
        return _weighted_gauc(positive, weight[order].astype(np.float64), starts, tie_starts)
    tie_sizes = np.diff(np.append(tie_starts, len(score)))
    # Rank within the group, from 1, ties averaged.
    rank = np.repeat(tie_starts + (tie_sizes + 1) / 2, tie_sizes)
    sizes = np.diff(np.append(starts, len(score)))
    rank -= np.repeat(starts, sizes)
    positives = np.add.reduceat(positive.astype(np.int64), starts)
    rank_sums = np.add.reduceat(np.where(positive, rank, 0.0), starts)
    both = (positives > 0) & (positives < sizes)
    if not both.any():
        return float("nan")
    positives, rank_sums, sizes = positives[both], rank_sums[both], sizes[both]
    aucs = (rank_sums - positives * (positives + 1) / 2) / (positives * (sizes - positives))
    return float((aucs * sizes).sum() / sizes.sum())


def log_ratio(first: Floats, last: Floats) -> npt.NDArray[np.float64]:
    """log(sigmoid(last) / sigmoid(first)), [N]."""
    return np.logaddexp(0.0, -first.astype(np.float64)) - np.logaddexp(0.0, -last.astype(np.float64))


def _weighted_gauc(
    positive: npt.NDArray[np.bool_],
    weight: npt.NDArray[np.float64],
    starts: npt.NDArray[np.int64],
    tie_starts: npt.NDArray[np.int64],
) -> float:
    """`gauc` of rows in order of group and score; where groups begin, and where rows of one group and score do."""
    high, low = np.where(positive, weight, 0.0), np.where(positive, 0.0, weight)
    # Of each tie: weight of the negatives below it in its group, and half of its own.
    tie_low = np.add.reduceat(low, tie_starts)
    below = np.cumsum(tie_low) - tie_low
    first_tie = np.searchsorted(tie_starts, starts)
    below -= np.repeat(below[first_tie], np.diff(np.append(first_tie, len(tie_starts))))
    right = np.add.reduceat(np.add.reduceat(high, tie_starts) * (below + tie_low / 2), first_tie)
    pairs = np.add.reduceat(high, starts) * np.add.reduceat(low, starts)
    both = pairs > 0
    if not both.any():
        return float("nan")
    total = np.add.reduceat(weight, starts)[both]
    return float((right[both] / pairs[both] * total).sum() / total.sum())


def conditional_logit(first: Floats, last: Floats) -> npt.NDArray[np.float64]:
    """Logit of sigmoid(last) / sigmoid(first): of a chain's last step given its first, [N], where last is at most first.

    The ratio is at most 1 - 1e-7, the most that float32 logits can tell from 1: above that it is their rounding, which would
    be worth any loss.
    """
    ratio = np.minimum(log_ratio(first, last), -1e-7)
    return ratio - np.log(-np.expm1(ratio))


def mse(prediction: Floats, label: Floats, weight: Floats | None = None) -> float:
    """Weighted mean squared error, in float64."""
    return _mean((prediction.astype(np.float64) - label) ** 2, weight)


def mae(prediction: Floats, label: Floats, weight: Floats | None = None) -> float:
    """Weighted mean absolute error, in float64."""
    return _mean(np.abs(prediction.astype(np.float64) - label), weight)


def r2(prediction: Floats, label: Floats, deviation: float, weight: Floats | None = None) -> float:
    """1 - MSE / variance, with the standard deviation of the labels in train; NaN where that is 0 or NaN."""
    return 1 - mse(prediction, label, weight) / deviation**2 if deviation > 0 else float("nan")


def _mean(values: npt.NDArray[np.float64], weight: Floats | None) -> float:
    if weight is None:
        return float(values.mean()) if len(values) else float("nan")
    total = float(weight.sum(dtype=np.float64))
    return float(np.dot(values, weight.astype(np.float64))) / total if total > 0 else float("nan")
