"""How often keys occurred, and when last: of the batches of a rank, and over a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from mmlrec.hashing import UInt64Array

CountArray = NDArray[np.uint32]
#: The largest count that is kept; one that has reached it stays there.
MOST = np.iinfo(np.uint32).max
#: So many ids are gathered before they are counted.
_GATHERED = 1 << 20
#: The part of all keys, and the number, from which on new ones are put among the others.
_SHARE, _LEAST = 16, 1 << 16


class Occurrences(NamedTuple):
    """Distinct keys, sorted, with the number of their occurrences and the step of the last one; [n] each."""

    keys: UInt64Array
    counts: NDArray[np.int64]
    last: NDArray[np.int64]

    @classmethod
    def none(cls) -> Self:
        """Of nothing."""
        return cls(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))

    def where(self, chosen: NDArray[np.bool_]) -> Occurrences:
        """Some of them."""
        return Occurrences(self.keys[chosen], self.counts[chosen], self.last[chosen])

    @classmethod
    def joined(cls, parts: Sequence[Occurrences]) -> Self:
        """Of all parts, whose keys are in any order, together."""
        keys = np.concatenate([np.zeros(0, np.uint64), *(part.keys for part in parts)])
        counts = np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)])
        last = np.concatenate([np.zeros(0, np.int64), *(part.last for part in parts)])
        if not len(keys):
            return cls(keys, counts, last)
        order = np.argsort(keys)
        keys = keys[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        return cls(keys[starts], np.add.reduceat(counts[order], starts), np.maximum.reduceat(last[order], starts))


class Gathered:
    """The keys that a rank was fed since they were taken last."""

    def __init__(self) -> None:
        self._counted = Occurrences.none()
        self._fed: list[tuple[UInt64Array, int]] = []
        self._num_fed = 0

    def add(self, keys: UInt64Array, step: int) -> None:
        """Keys of a batch, [n], 0 for a missing one. The others are copied: the array may be a part of the whole batch."""
        there = keys[keys != 0]
        self._fed.append((there, step))
        self._num_fed += len(there)
        if self._num_fed >= max(_GATHERED, len(self._counted.keys)):
            self._count()

    def take(self) -> Occurrences:
        """What they are, and how often each was there."""
        self._count()
        counted, self._counted = self._counted, Occurrences.none()
        return counted

    def _count(self) -> None:
        parts = [self._counted]
        for keys, step in self._fed:
            parts.append(Occurrences(keys, np.ones(len(keys), np.int64), np.full(len(keys), step)))
        self._counted = Occurrences.joined(parts)
        self._fed, self._num_fed = [], 0


class KeyCounts:
    """Keys and how often each was seen; 12 bytes a key.

    New keys are sorted among each other first, and put among all from time to time: that copies all of them.
    """

    def __init__(self, keys: UInt64Array, counts: CountArray) -> None:
        self._parts = [(keys, counts), _nothing()]

    def add(self, keys: UInt64Array, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count some more; how often each was then seen, [n].

        Args:
            keys: [n], sorted and distinct.
        """
        totals = counts.copy()
        unknown = np.ones(len(keys), np.bool_)
        for known, numbers in self._parts:
            rows, at = places_among(known, keys)
            unknown[rows] = False
            totals[rows] = np.minimum(numbers[at].astype(np.int64) + counts[rows], MOST)
            numbers[at] = totals[rows]
        totals = np.minimum(totals, MOST)
        recent, numbers = self._parts[1]
        at = np.searchsorted(recent, keys[unknown])
        self._parts[1] = np.insert(recent, at, keys[unknown]), np.insert(numbers, at, totals[unknown].astype(np.uint32))
        if len(self._parts[1][0]) > max(_LEAST, len(self._parts[0][0]) // _SHARE):
            self._join()
        return totals

    def remove(self, keys: UInt64Array) -> None:
        """Forget some keys, [n], sorted and distinct."""
        for known, numbers in self._parts:
            numbers[places_among(known, keys)[1]] = 0

    def entries(self) -> tuple[UInt64Array, CountArray]:
        """All keys, sorted, and their counts."""
        self._join()
        return self._parts[0]

    def _join(self) -> None:
        """A key that was forgotten has count 0."""
        (keys, counts), (recent, numbers) = ((keys[counts > 0], counts[counts > 0]) for keys, counts in self._parts)
        at = np.searchsorted(keys, recent)
        self._parts = [(np.insert(keys, at, recent), np.insert(counts, at, numbers)), _nothing()]


def _nothing() -> tuple[UInt64Array, CountArray]:
    return np.zeros(0, np.uint64), np.zeros(0, np.uint32)


def places_among(known: UInt64Array, keys: UInt64Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which of some keys are among known ones, which are sorted, and where there."""
    at = np.searchsorted(known, keys)
    rows = np.flatnonzero(at < len(known))
    rows = rows[known[at[rows]] == keys[rows]]
    return rows, at[rows]
