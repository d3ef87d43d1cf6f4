"""Which keys hold the slots of a table: what happens at a boundary in the buckets of one rank.

Keys that were seen since the boundary before, often enough over the whole run, and hold no slot are candidates. A bucket gives
its free slots to them first, the lowest slot to the best; then the best candidate takes the slot of the worst holder as long as
its score is higher. Scores are occurrences over the run (lfu) or the step of the last occurrence (lru). Of equal scores the
smaller key, as an unsigned number, is the better one, and a holder never gives way to an equal.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmlrec.config import ManagedConfig
from mmlrec.hashing import UInt64Array
from mmlrec.slots.buckets import Buckets
from mmlrec.slots.occurrences import MOST, CountArray, KeyCounts, Occurrences, places_among
from mmlrec.slots.slot_map import SlotArray


class Changes(NamedTuple):
    """Keys that get a slot, sorted, with that slot and the key that loses it, 0 for none; [n] each."""

    keys: UInt64Array
    slots: SlotArray
    gone: UInt64Array


class Holders(NamedTuple):
    """Keys that hold slots, sorted; with occurrences over the run (lru that admits at once: since then), and the last step."""

    keys: UInt64Array
    slots: SlotArray
    counts: CountArray
    last: NDArray[np.uint32]

    def between(self, first: int, end: int) -> Holders:
        """Some of them, by their places."""
        return Holders(self.keys[first:end], self.slots[first:end], self.counts[first:end], self.last[first:end])


class OwnBuckets:
    """The buckets of one rank: who holds their slots, and what is known of the keys that hold none.

    Args:
        own: which of the table's buckets.

    Attributes:
        holders: the entries of the map in these buckets.
        others: keys without a slot and their counts; None where the rule needs none: lru that admits at once.
        arrived: what was seen since the last boundary, as far as ranks have told each other.
    """

    def __init__(self, buckets: Buckets, own: range, config: ManagedConfig) -> None:
        self._buckets, self._own, self._config = buckets, own, config
        none = np.zeros(0, np.uint32)
        self.holders = Holders(np.zeros(0, np.uint64), np.zeros(0, np.int32), none, none)
        counts_matter = config.evict == "lfu" or config.admit_after > 1
        self.others = KeyCounts(np.zeros(0, np.uint64), none) if counts_matter else None
        self.arrived = Occurrences.none()

    def update(self) -> Changes:
        """Count what has arrived, and let candidates have slots."""
        seen, self.arrived = self.arrived, Occurrences.none()
        candidates = self._counted(seen)
        lru = self._config.evict == "lru"
        scores, own_scores = (candidates.last, self.holders.last) if lru else (candidates.counts, self.holders.counts)
        begins = self._buckets.places(candidates.keys, self._own)
        own_begins = self._buckets.places(self.holders.keys, self._own)
        winners, slots, losers = [], [], []
        for number, bucket in enumerate(self._own):
            first, end = begins[number], begins[number + 1]
            if first == end:
                continue
            best = first + np.lexsort((candidates.keys[first:end], -scores[first:end]))
            first, end = own_begins[number], own_begins[number + 1]
            next_free, behind = self._buckets.first_slot(bucket) + int(end - first), self._buckets.first_slot(bucket + 1)
            free = np.arange(next_free, min(behind, next_free + len(best)))
            worst = first + _worst(self.holders.keys[first:end], own_scores[first:end], len(best) - len(free))
            taking = best[len(free) :][: len(worst)]
            taken = worst[: np.count_nonzero(scores[taking] > own_scores[worst])]
            winners.append(best[: len(free) + len(taken)])
            slots.append(np.append(free, self.holders.slots[taken]))
            losers.append(np.append(np.full(len(free), -1), taken))
        return self._changed(candidates, *(np.concatenate([[], *of]).astype(np.int64) for of in (winners, slots, losers)))

    def _counted(self, seen: Occurrences) -> Occurrences:
        """The candidates, with their occurrences over the run."""
        known, at = places_among(self.holders.keys, seen.keys)
        self.holders.counts[at] = np.minimum(self.holders.counts[at] + seen.counts[known], MOST)
        self.holders.last[at] = seen.last[known]
        unknown = np.ones(len(seen.keys), np.bool_)
        unknown[known] = False
        candidates = seen.where(unknown)
        if self.others is None:
            return candidates
        counts = self.others.add(candidates.keys, candidates.counts)
        return candidates._replace(counts=counts).where(counts >= self._config.admit_after)

    def _changed(
        self, candidates: Occurrences, winners: NDArray[np.int64], slots: NDArray[np.int64], losers: NDArray[np.int64]
    ) -> Changes:
        """Put candidates in the place of holders, -1 for none."""
        order = np.argsort(winners)  # which is the order of the keys
        winners, slots, losers = winners[order], slots[order], losers[order]
        before = self.holders
        gone = np.zeros(len(losers), np.uint64)
        gone[losers >= 0] = before.keys[losers[losers >= 0]]
        out = np.sort(losers[losers >= 0])
        if self.others is not None:
            self.others.remove(candidates.keys[winners])
            self.others.add(before.keys[out], before.counts[out].astype(np.int64))
        stay = np.ones(len(before.keys), np.bool_)
        stay[out] = False
        keys, given = candidates.keys[winners], slots.astype(np.int32)
        left = before.keys[stay]
        at = np.searchsorted(left, keys)
        self.holders = Holders(
            np.insert(left, at, keys),
            np.insert(before.slots[stay], at, given),
            np.insert(before.counts[stay], at, candidates.counts[winners].astype(np.uint32)),
            np.insert(before.last[stay], at, candidates.last[winners].astype(np.uint32)),
        )
        return Changes(keys, given, gone)


def _worst(keys: UInt64Array, scores: NDArray[np.uint32], most: int) -> NDArray[np.intp]:
    """Places of the worst ones, `most` or all, the worst first: the lowest score, and of equal ones the largest key."""
    if most <= 0 or not len(keys):
        return np.zeros(0, np.intp)
    pool = np.arange(len(keys))
    if most < len(keys):
        pool = np.flatnonzero(scores <= np.partition(scores, most - 1)[most - 1])
    return pool[np.lexsort((~keys[pool], scores[pool]))][:most]
