"""Numbers to ids by quantiles, and what hashing to buckets costs; both counted in constant memory, in any order of rows."""

from __future__ import annotations

from math import comb
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmlrec.encoding.columns import quantile_ids
from mmlrec.hashing import UInt64Array, buckets_of, mix64

LIMIT = 1 << 20  # distinct values that are kept apart


class QuantileBuckets:
    """Ids 1..n of a number by the quantiles of the train rows; 0 = missing.

    Of N train values in ascending order those at the places floor(j N / num_buckets), counted from 0, are the borders; a value
    gets 1 + the number of borders that are not above it. Equal borders are one, and so is the least value: where a value is
    frequent there are fewer buckets than asked for, and none is empty in train.

    Exact up to `LIMIT` distinct values. Beyond, neighbouring float32 values are counted together: leading bits alone, as many
    as `LIMIT` cells allow, which is some five digits. What comes out never depends on the order of the rows: the number of
    bits is the largest for which the distinct values of all rows fit, and grows smaller only when those of some do not.
    """

    def __init__(self, num_buckets: int) -> None:
        self._num_buckets = num_buckets
        self._shift = 0
        self._keys = self._counts = np.empty(0, np.int64)
        self._pending: list[NDArray[np.int64]] = []
        self._num_pending = 0
        self.borders = np.empty(0, np.float32)

    @classmethod
    def known(cls, lowest: pa.Array) -> QuantileBuckets:
        """Those that were found before, by the least number of each bucket, as `save` writes it. Not to be fitted."""
        buckets = cls(len(lowest))
        buckets.borders = lowest.to_numpy()[1:]
        return buckets

    def add(self, values: pa.Array) -> None:
        """Count float32 values; nulls are left out."""
        keys = _ordered(values.drop_null().to_numpy()) >> self._shift
        self._pending.append(keys)
        self._num_pending += len(keys)
        if self._num_pending > LIMIT:
            self._merge()

    def freeze(self) -> None:
        """Settle the borders."""
        self._merge()
        if len(self._keys):
            ends = np.cumsum(self._counts)
            ranks = np.arange(1, self._num_buckets) * int(ends[-1]) // self._num_buckets
            cells = np.unique(np.searchsorted(ends, ranks, side="right"))
            cells = cells[cells > 0]
            self.borders = _number(self._keys[cells] << self._shift)
            self._counts = np.add.reduceat(self._counts, np.concatenate([[0], cells]))
        self._keys = np.empty(0, np.int64)

    @property
    def num_rows(self) -> int:
        """Rows of the table, row 0 included."""
        return len(self.borders) + 2

    def encode(self, values: pa.Array) -> pa.Array:
        """Ids of float32 values, int64, without nulls."""
        return pa.array(quantile_ids(values, self.borders))

    def save(self, path: Path) -> None:
        """Write columns `value`, the least number of a bucket, float32; `id` (int64) and `count` (int64)."""
        lowest = np.concatenate([[-np.inf], self.borders]).astype(np.float32)
        ids = np.arange(1, self.num_rows)
        counts = self._counts if len(self._counts) else np.zeros(1, np.int64)
        pq.write_table(pa.table({"value": lowest, "id": ids, "count": counts}), path)

    def merge(self, other: QuantileBuckets) -> None:
        """Add what another one has counted."""
        self._merge()
        other._merge()
        shift = max(self._shift, other._shift)
        self._keys >>= shift - self._shift
        self._shift = shift
        self._add(other._keys >> (shift - other._shift), other._counts)

    def _merge(self) -> None:
        pending, self._pending, self._num_pending = self._pending, [], 0
        keys = np.concatenate([self._keys[:0], *pending])
        self._add(keys, np.ones(len(keys), np.int64))

    def _add(self, keys: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        keys, counts = np.concatenate([self._keys, keys]), np.concatenate([self._counts, counts])
        order = np.argsort(keys, kind="stable")
        self._keys, self._counts = _summed(keys[order], counts[order])
        while len(self._keys) > LIMIT:
            self._shift += 1
            self._keys, self._counts = _summed(self._keys >> 1, self._counts)


def _summed(keys: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct keys of an ascending array, and the sums of their counts."""
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.empty(0, np.int64)
    return keys[starts], np.add.reduceat(counts, starts) if len(keys) else counts


def _ordered(numbers: NDArray[np.float32]) -> NDArray[np.int64]:
    """float32 as integers 0..2^32 - 1 of the same order; -0 is 0."""
    bits = (numbers + np.float32(0)).view(np.uint32).astype(np.int64)
    return np.where(bits >> 31, 0xFFFFFFFF - bits, bits + 0x80000000)


def _number(ordered: NDArray[np.int64]) -> NDArray[np.float32]:
    bits = np.where(ordered >> 31, ordered - 0x80000000, 0xFFFFFFFF - ordered)
    return bits.astype(np.uint32).view(np.float32)


class CollisionCounter:
    """How many distinct values fall on the ids of another one, in a table of hashed ids.

    Exact up to `LIMIT` distinct values. Beyond, counted for one in 2, 4, ... of the possible sets of ids, the least for which
    the values that have them fit: all values that share their ids are seen, or none, in any order of rows.
    """

    def __init__(self, num_buckets: int, num_hashes: int) -> None:
        self._num_buckets, self._num_hashes = num_buckets, num_hashes
        # With fewer sets of ids each has hundreds of values, none of which is alone: only their number is left to be found.
        self._most = max(comb(num_buckets + num_hashes - 1, num_hashes) // 1024, 1)
        self._one_in = self._value_one_in = 1
        self._hashes = np.empty(0, np.uint64)
        self._pending: list[UInt64Array] = []
        self._num_pending = 0

    def add(self, hashes: UInt64Array) -> None:
        """Take note of the 64-bit hashes of some values."""
        self._pending.append(self._chosen(np.unique(hashes)))
        self._num_pending += len(self._pending[-1])
        if self._num_pending > LIMIT // 4:
            self._merge()

    def result(self) -> dict[str, float]:
        """`values`, distinct ones; `collisions`, those whose ids - all of several - another one has too; their `rate`.

        Where not all were counted: `counted_one_in`, and numbers that extrapolate.
        """
        self._merge()
        _, counts = np.unique(self._ids(self._hashes), axis=0, return_counts=True)
        found, one_in = len(self._hashes), self._one_in * self._value_one_in
        alone = int(np.count_nonzero(counts == 1)) if self._value_one_in == 1 else 0
        result = {"values": found * one_in, "collisions": (found - alone) * one_in, "rate": (found - alone) / max(found, 1)}
        return result | ({"counted_one_in": one_in} if one_in > 1 else {})

    def _ids(self, hashes: UInt64Array) -> NDArray[np.int64]:
        """Without order, as pooling sees them: [N, num_hashes], ascending."""
        return np.sort(buckets_of(hashes, self._num_buckets, self._num_hashes), axis=1)

    def _chosen(self, hashes: UInt64Array) -> UInt64Array:
        if self._one_in * self._value_one_in == 1:
            return hashes
        mixed = np.zeros(len(hashes), np.uint64)
        for column in self._ids(hashes).T:
            mixed = mix64(mixed ^ column.view(np.uint64))
        chosen = mixed % np.uint64(self._one_in) == 0
        return hashes[chosen & (mix64(hashes) % np.uint64(self._value_one_in) == 0)]

    def merge(self, other: CollisionCounter) -> None:
        """Add what another one has counted."""
        other._merge()
        self._one_in, self._value_one_in = max(self._one_in, other._one_in), max(self._value_one_in, other._value_one_in)
        self._pending = [self._chosen(hashes) for hashes in (self._hashes, *self._pending, other._hashes)]
        self._hashes = self._hashes[:0]
        self._merge()

    def _merge(self) -> None:
        self._hashes = np.unique(np.concatenate([self._hashes, *self._pending]))
        while len(self._hashes) > LIMIT:
            if 2 * self._one_in <= self._most:
                self._one_in *= 2
            else:
                self._value_one_in *= 2
            self._hashes = self._chosen(self._hashes)
        self._pending, self._num_pending = [], 0
