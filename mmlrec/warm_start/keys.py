"""Rows of managed tables: taken by key, with how often keys were seen, from a managed table or from a vocabulary, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmlrec.hashing import UInt64Array, key_ids
from mmlrec.run_folder import checkpoint
from mmlrec.slots import stored
from mmlrec.slots.managed import ManagedTables
from mmlrec.slots.occurrences import Occurrences, places_among
from mmlrec.storage.places import Place
from mmlrec.warm_start.rows import Encoded, values_of

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """What another run knows of the keys of a table.

    Attributes:
        seen: keys that have a row there.
        rows, state_rows: of each of them, in the tables of the best checkpoint, and in those of the optimizers' state; -1 where
            it has none there.
        others: keys that have none.
        steps: of training that `seen.last` counts.
    """

    seen: Occurrences
    rows: IntArray
    state_rows: IntArray
    others: Occurrences
    steps: int

    @classmethod
    def of_managed(cls, table: str, best: Place, optimizer: Place | None) -> Known:
        """Of a managed table.

        Args:
            best: checkpoint that tells who has a row.
            optimizer: checkpoint to train on from, which tells how often keys were seen; None: nobody does, so once each.

        Raises:
            CheckpointError: a checkpoint lacks the table, or cannot be read.
        """
        keys, rows = stored.read(best, table)
        if optimizer is None:
            once = Occurrences(keys, np.ones(len(keys), np.int64), np.zeros(len(keys), np.int64))
            return cls(once, rows, np.full(len(keys), -1), Occurrences.none(), 0)
        of_table = stored.StoredTable(optimizer, table)
        seen, others = _divided(of_table.history(), keys)
        holders, slots = of_table.map()
        state = checkpoint.read_state(optimizer)
        steps = int(state["progress"]["step"]) + int(state["managed"][table].get("steps_before", 0))
        return cls(seen, rows, _looked_up(holders, slots.astype(np.int64), keys), others, steps)

    @classmethod
    def of_vocabulary(cls, path: Place, seed: int) -> Known:
        """Of the values of a vocabulary, and how often each was in train.

        Raises:
            DataError: it cannot be read.
        """
        keys, ids, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for values, their_ids, their_counts in values_of(path):
            keys.append(key_ids(values, seed))
            ids.append(their_ids)
            counts.append(their_counts)
        of_values, rows = np.concatenate(keys).view(np.uint64), np.concatenate(ids)
        of_values, first = np.unique(of_values, return_index=True)  # texts with one key are one
        seen = Occurrences(of_values, np.concatenate(counts)[first], np.zeros(len(first), np.int64))
        return cls(seen, rows[first], rows[first], Occurrences.none(), 0)

    def rows_of(self, keys: IntArray) -> tuple[IntArray, IntArray]:
        """Rows, and rows of the state, of keys, [n] each; -1 for one that has none."""
        wanted = keys.view(np.uint64)
        return _looked_up(self.seen.keys, self.rows, wanted), _looked_up(self.seen.keys, self.state_rows, wanted)


@dataclass(frozen=True)
class Taken:
    """Which rows of the other run's table rows of this one take.

    Attributes:
        own: rows of this run's table that are taken, ascending, without row 0; [n].
        rows, state_rows: what they take, [n] each; -1 where there is no state.
        there: rows of the other run that stand for something, with row 0.
    """

    own: IntArray
    rows: IntArray
    state_rows: IntArray
    there: int

    @classmethod
    def into_slots(cls, table: str, known: Known, managed: ManagedTables) -> Taken:
        """Into a managed table: its rule says which keys get slots, and it counts on from what is known of them."""
        slots = managed.begin(table, known.seen, known.others, known.steps)
        order = np.argsort(slots)[np.count_nonzero(slots == 0) :]
        return cls(slots[order], known.rows[order], known.state_rows[order], 1 + len(known.rows))

    @classmethod
    def into_values(cls, table: str, known: Known, seed: int, new: Encoded) -> Taken:
        """Into a table with a vocabulary."""
        found = [np.zeros((3, 0), np.int64)]
        for values, ids, _ in values_of(new.vocabulary(table)):
            rows, state_rows = known.rows_of(key_ids(values, seed))
            found.append(np.stack([ids, rows, state_rows])[:, rows >= 0])
        own, rows, state_rows = np.concatenate(found, axis=1)
        return cls(own, rows, state_rows, 1 + len(known.rows))

    def within(self, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Of rows start..stop-1 of this run what they take, and of the state; -1 for those that are new, [stop - start].

        Row 0, of missing values and of keys without a slot, takes row 0.
        """
        first, last = np.searchsorted(self.own, [start, stop])
        found = np.full((2, stop - start), -1)
        found[:, self.own[first:last] - start] = self.rows[first:last], self.state_rows[first:last]
        if start == 0 < stop:
            found[:, 0] = 0
        return found[0], found[1]


def _divided(every: Occurrences, keys: UInt64Array) -> tuple[Occurrences, Occurrences]:
    """What is known of some keys, at least one occurrence of each, and of all others."""
    counts = np.maximum(_looked_up(every.keys, every.counts, keys), 1)
    last = np.maximum(_looked_up(every.keys, every.last, keys), 0)
    return Occurrences(keys, counts, last), every.where(~np.isin(every.keys, keys, assume_unique=True))


def _looked_up(keys: UInt64Array, values: IntArray, wanted: UInt64Array) -> IntArray:
    """The values of wanted keys, -1 of those that are not among the keys, which are sorted."""
    found = np.full(len(wanted), -1)
    rows, at = places_among(keys, wanted)
    found[rows] = values[at]
    return found
