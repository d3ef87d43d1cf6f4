"""Exact metrics of rows that lie on several ranks, over all of them and in each scenario. Definitions: docs/metrics.md.

No rank ever holds the rows of another but for a bounded number at a time. Means are sums without rounding. For AUC the rows go
to ranks by ranges of their scores, for GAUC by their groups, some million rows at a time; what a range or a group contributes
is small, and adds up. So every number is the same at every number of ranks: to the bit without weights, and to the rounding of
sums of weights with them. No sum runs over the rows of several scenarios or groups to be told apart afterwards: weights of one
may be so small beside those of another that it would hold nothing of them.

Scores and logits are float arrays, labels hold 0 and 1, weights are not negative; all are [N] and without missing values. A
metric that is not defined for a slice (one class only, no rows, no weight) is NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmlrec.exact_sums import exact_sum
from mmlrec.hashing import mix64
from mmlrec.metrics.ranks import Ranks

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

#: Rows that a rank ranks at a time; some 40 bytes each.
ROUND_ROWS = 1 << 22
#: Scores of each rank by which ranges of about equally many rows are found.
_SAMPLED = 1 << 12
#: The place of a row that is none of the task.
_NOWHERE = np.iinfo(np.int32).min
#: Rows of which something in float64 is worked out at a time.
CHUNK_ROWS = 1 << 20


@dataclass(frozen=True)
class Slices:
    """The rows of one task on this rank, among others, and which of them are of which scenario. Views: nothing is copied.

    Attributes:
        present: [N] bool, the rows of the task.
        score: [N] float32 or float64.
        label: [N] float32.
        scenario: [N] integers 0..num_scenarios - 1; any where there are no scenarios.
        num_scenarios: 0 where there are none.
        weight: [N] float32; None where all weigh alike, on all ranks.
        group: [N] int64, by which GAUC groups; None where all rows are one group, on all ranks.
    """

    present: Bools
    score: Floats
    label: Floats
    scenario: NDArray[np.integer]
    num_scenarios: int
    weight: Floats | None
    group: NDArray[np.int64] | None

    @property
    def num_rows(self) -> int:
        """N, with the rows that are none of the task."""
        return len(self.present)

    def take(self, rows: NDArray[np.integer], *, group: bool) -> dict[str, NDArray[Any]]:
        """What there is of some rows, by name."""
        found = {"score": self.score[rows], "positive": self.label[rows] > 0}
        more = {"scenario": self.scenario if self.num_scenarios else None, "weight": self.weight}
        more |= {"group": self.group if group else None}
        return found | {name: values[rows] for name, values in more.items() if values is not None}


def by_scenario(
    scenario: NDArray[np.integer], num_scenarios: int, order: NDArray[np.integer] | None = None
) -> NDArray[np.integer]:
    """An order of rows by scenario, and in each as before.

    Args:
        order: of the rows before; as they come when absent.
    """
    small = scenario.astype(np.min_scalar_type(num_scenarios))  # numpy sorts by small integers in one pass
    return np.argsort(small, kind="stable") if order is None else _by(small, order)


class Mean(NamedTuple):
    """A mean over rows that may be on several ranks: two sums without rounding.

    A number that is not finite, such as the loss of an infinite logit, makes the mean infinite.
    """

    total: Fraction = Fraction(0)
    weight: Fraction = Fraction(0)
    infinite: bool = False

    @classmethod
    def of(cls, values: Floats, weight: Floats | None) -> Mean:
        """That of some rows, [N]."""
        numbers = values.astype(np.float64)
        if weight is None:
            total = Fraction(len(numbers))
        else:
            numbers, own = numbers[weight > 0], weight[weight > 0].astype(np.float64)  # 0 times infinity is no number
            numbers, total = numbers * own, exact_sum(own)
        finite = bool(np.isfinite(numbers).all())
        return cls(exact_sum(numbers) if finite else Fraction(0), total, not finite)

    def plus(self, other: Mean) -> Mean:
        """Over the rows of both."""
        return Mean(self.total + other.total, self.weight + other.weight, self.infinite or other.infinite)

    def value(self) -> float:
        """The mean; NaN where there is no weight."""
        if not self.weight:
            return float("nan")
        return float("inf") if self.infinite else float(self.total / self.weight)


def losses(logit: Floats, positive: Bools) -> Floats:
    """softplus((1 - 2y) z) in float64, [N]: cross-entropy from logits, without clipping."""
    wrong = np.where(positive, -1.0, 1.0) * logit
    return np.maximum(wrong, 0) + np.log1p(np.exp(-np.abs(wrong)))


def probabilities(logit: Floats) -> Floats:
    """sigmoid(z) in float64, [N]."""
    return 0.5 * (1 + np.tanh(logit.astype(np.float64) / 2))


def entropy(rate: Mean) -> float:
    """Of the two classes, by the mean of labels; NaN for one class only."""
    if not 0 < rate.total < rate.weight:
        return float("nan")
    share = rate.total / rate.weight
    rarer = float(min(share, 1 - share))  # of a share near 1 a float does not hold what it lacks
    return float(-(rarer * np.log(rarer) + (1 - rarer) * np.log1p(-rarer)))


def log_ratio(first: Floats, last: Floats) -> NDArray[np.float64]:
    """log(sigmoid(last) / sigmoid(first)), [N]."""
    return np.logaddexp(0.0, -first.astype(np.float64)) - np.logaddexp(0.0, -last.astype(np.float64))


def conditional_logit(first: Floats, last: Floats) -> NDArray[np.float64]:
    """Logit of sigmoid(last) / sigmoid(first): of a chain's last step given its first, [N], where last is at most first.

    The ratio is at most 1 - 1e-7, the most that float32 logits can tell from 1: above that it is their rounding, which would
    be worth any loss.
    """
    ratio = np.minimum(log_ratio(first, last), -1e-7)
    return ratio - np.log(-np.expm1(ratio))


class _Ranked(NamedTuple):
    """Of each key, in ascending order, [K]: twice the pairs in the right order, and what the two classes count."""

    keys: list[NDArray[Any]]
    right: NDArray[Any]
    positives: NDArray[Any]
    negatives: NDArray[Any]


def _by(key: NDArray[Any], order: NDArray[np.integer]) -> NDArray[np.integer]:
    """An order of rows by a key, and where that is equal as before."""
    return order[np.argsort(key[order], kind="stable")]


def _ranked(
    order: NDArray[np.integer], keys: list[NDArray[Any]], score: Floats, positive: Bools, weight: Floats | None
) -> _Ranked:
    """Pairs (positive, negative) of rows with equal keys; with weights a pair counts the product of its rows' weights.

    Args:
        order: of the rows by keys, the first before the others, and then by score.
    """
    keys, score, positive = [key[order] for key in keys], score[order], positive[order]
    own = None if weight is None else weight[order].astype(np.float64)
    if not len(score):
        return _Ranked(keys, *(np.zeros(0, np.int64 if own is None else np.float64) for _ in range(3)))
    new_key = np.append(True, np.zeros(len(score) - 1, bool))
    for key in keys:
        new_key[1:] |= key[1:] != key[:-1]
    tie_starts = np.flatnonzero(new_key | np.append(True, score[1:] != score[:-1]))
    starts = np.flatnonzero(new_key)
    high, low = (positive, ~positive) if own is None else (np.where(positive, own, 0.0), np.where(positive, 0.0, own))
    kind = np.int64 if own is None else np.float64
    # Of each tie: what its classes count, and twice the negatives below it in its key with once its own.
    tie_high, tie_low = (np.add.reduceat(values.astype(kind), tie_starts) for values in (high, low))
    del own, high, low  # which the next sums need the memory of
    first_tie = np.searchsorted(tie_starts, starts)
    positives, negatives = (np.add.reduceat(values, first_tie) for values in (tie_high, tie_low))
    right = np.add.reduceat(tie_high * (2 * _before(tie_low, first_tie, negatives) + tie_low), first_tie)
    return _Ranked([key[starts] for key in keys], right, positives, negatives)


def _before(counts: NDArray[Any], first: NDArray[np.integer], totals: NDArray[Any]) -> NDArray[Any]:
    """What stands before each of some counts in its key, [n]: the sum of the others.

    One sum over all keys, less what it is where a key begins, is that of the key alone in integers, where it may even wrap
    around; in floats it lacks what is small beside former keys. So weights become integers, multiples of a 2^-62nd of their
    key's sum.

    Args:
        counts: int64, or float64 of which none is negative, [n].
        first: where each key begins, [K].
        totals: sum of each key, [K].
    """
    sizes = np.diff(np.append(first, len(counts)))
    weighted = counts.dtype == np.float64
    if weighted:
        unit = np.repeat(np.ldexp(1.0, np.frexp(totals)[1] - 62), sizes)
        counts = np.rint(counts / unit).astype(np.int64)
    before = np.cumsum(counts) - counts
    before -= np.repeat(before[first], sizes)
    return before * unit if weighted else before


def aucs(rows: Slices, ranks: Ranks) -> list[float]:
    """Area under the ROC curve over all rows, then in each scenario: share of (positive, negative) pairs in the right order.

    Ties count half; with weights a pair counts w_i * w_j. Equals the Mann-Whitney statistic (Hanley and McNeil 1982).
    """
    borders = _borders(rows, ranks)
    at = _ranges(rows, borders)
    parts = [(2 * int(border) + 1, counts) for border, counts in _on_borders(rows, borders, at)]
    for index, received in _rounds(rows, False, at, len(borders) + 1, ranks):
        parts.append((2 * index, _range_counts(received, rows.num_scenarios)))
    counted: dict[int, NDArray[Any]] = {}
    for of_rank in ranks.gather(parts):
        for place, counts in of_rank:
            # A border is counted where its rows are; a range on one rank. Of a border `right` follows from the classes.
            counted[place] = counts + counted[place] if place in counted else counts
    right, positives, negatives = ([0] * (rows.num_scenarios + 1) for _ in range(3))
    for place in sorted(counted):
        found = counted[place].tolist()
        for index, (own, high, low) in enumerate(found):
            own = high * low if place % 2 else own
            right[index] += own + 2 * high * negatives[index]
            positives[index] += high
            negatives[index] += low
    return [
        _ratio(own, 2 * high * low) if high and low else float("nan")
        for own, high, low in zip(right, positives, negatives, strict=True)
    ]


def gaucs(rows: Slices, ranks: Ranks) -> list[float]:
    """Mean of the groups' AUCs over all rows, then in each scenario, each weighted by its number of rows.

    Groups with one class are left out. (Zhu et al. 2017, "Optimized cost per click in Taobao display advertising", with
    impressions as weights.) With weights a group weighs the sum of its rows' weights, and its AUC is the weighted one; a class
    whose weights are all 0 is none.
    """
    assert rows.group is not None
    num_rounds = max(1, *ranks.gather(-(-rows.num_rows // ROUND_ROWS)))
    at = np.empty(rows.num_rows, np.int32)
    for start in range(0, len(at), CHUNK_ROWS):
        some = slice(start, start + CHUNK_ROWS)
        hashed = mix64(rows.group[some].view(np.uint64)) % np.uint64(num_rounds * ranks.world_size)
        at[some] = np.where(rows.present[some], hashed.astype(np.int32), _NOWHERE)
    means = [Mean()] * (rows.num_scenarios + 1)
    for _, received in _rounds(rows, True, at, num_rounds * ranks.world_size, ranks):
        score, positive, weight = received["score"], received["positive"], received.get("weight")
        order = _by(received["group"], np.argsort(score))
        every = _ranked(order, [received["group"]], score, positive, weight)
        means[0] = means[0].plus(_mean_auc(every))
        if rows.num_scenarios:
            order = by_scenario(received["scenario"], rows.num_scenarios, order)
            own = _ranked(order, [received["scenario"], received["group"]], score, positive, weight)
            borders = np.searchsorted(own.keys[0], np.arange(rows.num_scenarios + 1))
            for index, (start, stop) in enumerate(itertools.pairwise(borders)):
                of_scenario = _Ranked([], own.right[start:stop], own.positives[start:stop], own.negatives[start:stop])
                means[index + 1] = means[index + 1].plus(_mean_auc(of_scenario))
    together = [Mean()] * len(means)
    for of_rank in ranks.gather(means):
        together = [mean.plus(other) for mean, other in zip(together, of_rank, strict=True)]
    return [mean.value() for mean in together]


def _mean_auc(groups: _Ranked) -> Mean:
    pairs = groups.positives.astype(np.float64) * groups.negatives
    both = pairs > 0
    sizes = (groups.positives + groups.negatives)[both].astype(np.float64)
    auc = np.minimum(groups.right[both] / (2 * pairs[both]), 1)  # sums of weights are rounded
    return Mean(exact_sum(auc * sizes), exact_sum(sizes))


def _ratio(above: float, below: float) -> float:
    """Of integers the exact one, rounded once; of rounded sums of weights 1 at most."""
    return float(Fraction(above) / Fraction(below)) if isinstance(above, int) else min(above / below, 1.0)


def _borders(rows: Slices, ranks: Ranks) -> Floats:
    """Scores, ascending, between which there are about equally many rows, and not too many for a rank.

    Many rows with one score do no harm: it is a border then, and rows on borders are counted where they are.
    """
    num_rounds = max(ranks.gather(-(-rows.num_rows // ROUND_ROWS)))
    num_ranges = num_rounds * ranks.world_size
    if num_ranges <= 1:  # nothing to cut, so no scores are drawn
        return rows.score[:0]
    step = max(rows.num_rows // _SAMPLED, 1)
    sampled = np.sort(np.concatenate(ranks.gather(rows.score[::step][rows.present[::step]])))
    if not len(sampled):
        return sampled
    return np.unique(sampled[np.arange(1, num_ranges) * len(sampled) // num_ranges])


def _ranges(rows: Slices, borders: Floats) -> NDArray[np.int32]:
    """[N]: the range between borders that a score lies in, -1 - the border that it is, or `_NOWHERE`."""
    at = np.empty(rows.num_rows, np.int32)
    for start in range(0, len(at), CHUNK_ROWS):
        some = slice(start, start + CHUNK_ROWS)
        score = rows.score[some]
        found = np.searchsorted(borders, score).astype(np.int32)
        on = borders[np.minimum(found, len(borders) - 1)] == score if len(borders) else False
        at[some] = np.where(rows.present[some], np.where(on, -1 - found, found), _NOWHERE)
    return at


def _on_borders(rows: Slices, borders: Floats, at: NDArray[np.int32]) -> Iterator[tuple[int, NDArray[Any]]]:
    """For each border: what the classes of its rows count over all and in each scenario, [1 + S, 3], the first column 0."""
    kind = np.int64 if rows.weight is None else np.float64
    counts = np.zeros((len(borders), rows.num_scenarios + 1, 3), kind)
    for start in range(0, len(at) if len(borders) else 0, CHUNK_ROWS):
        on = start + np.flatnonzero((at[start : start + CHUNK_ROWS] < 0) & (at[start : start + CHUNK_ROWS] > _NOWHERE))
        found, border = rows.take(on, group=False), -1 - at[on]
        own = found["weight"].astype(np.float64) if rows.weight is not None else np.ones(len(on), np.int64)
        column = np.where(found["positive"], 1, 2)
        first = 3 * (rows.num_scenarios + 1) * border + column
        np.add.at(counts.reshape(-1), first, own)
        if rows.num_scenarios:
            np.add.at(counts.reshape(-1), first + 3 * (1 + found["scenario"]), own)
    yield from enumerate(counts)


def _range_counts(received: dict[str, NDArray[Any]], num_scenarios: int) -> NDArray[Any]:
    """Right pairs and what the classes count, over all rows of a range and in each scenario, [1 + S, 3]."""
    score, positive, weight = received["score"], received["positive"], received.get("weight")
    counts = np.zeros((num_scenarios + 1, 3), np.int64 if weight is None else np.float64)
    order: NDArray[np.integer] = np.argsort(score)
    every = _ranked(order, [], score, positive, weight)
    if len(score):
        counts[0] = every.right[0], every.positives[0], every.negatives[0]
    if num_scenarios:
        order = by_scenario(received["scenario"], num_scenarios, order)
        own = _ranked(order, [received["scenario"]], score, positive, weight)
        counts[1:][own.keys[0]] = np.stack([own.right, own.positives, own.negatives], axis=1)
    return counts


def _rounds(
    rows: Slices, group: bool, at: NDArray[np.int32], num_places: int, ranks: Ranks
) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """The rows of one place after the other, as many places at a time as there are ranks: each place's rows on one rank.

    Args:
        at: the place of each row, [N]; of none where it is negative.
    """
    for first in range(0, num_places, ranks.world_size):
        here = np.flatnonzero((at >= first) & (at < first + ranks.world_size))
        received = ranks.exchange(rows.take(here, group=group), at[here] - first)
        if first + ranks.rank < num_places:
            yield first + ranks.rank, received
