"""Buckets of keys: each has a range of slots of its own, and ranks share the buckets out. They depend on the table alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmlrec.hashing import UInt64Array

#: Fewest slots of a bucket where there are several, and most buckets. Part of what a table is: changing it changes every run.
_LEAST_SLOTS, _MOST_BITS = 1 << 14, 10


@dataclass(frozen=True)
class Buckets:
    """2^bits buckets by the leading bits of a key, which is a hash, so that each has about as many keys as another.

    Bucket b has the slots from b * S // 2^bits + 1 on.
    """

    num_slots: int
    bits: int

    @classmethod
    def of(cls, num_slots: int) -> Buckets:
        """Of a table; one bucket where it has few slots."""
        return cls(num_slots, min(max(num_slots // _LEAST_SLOTS, 1).bit_length() - 1, _MOST_BITS))

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 << self.bits

    def first_slot(self, bucket: int) -> int:
        """The first slot of a bucket; of the one behind the last, what is behind the last slot."""
        return (bucket * self.num_slots >> self.bits) + 1

    def of_rank(self, rank: int, world_size: int) -> range:
        """The buckets of a rank; none on some ranks where there are more of them."""
        return range(-(-rank * self.count // world_size), -(-(rank + 1) * self.count // world_size))

    def places(self, keys: UInt64Array, buckets: range) -> NDArray[np.intp]:
        """Where each bucket begins in sorted keys, and where the last one ends."""
        edges = [bucket << (64 - self.bits) for bucket in range(buckets.start, buckets.stop + 1)]
        inside = np.array([edge for edge in edges if edge < 1 << 64], np.uint64)
        return np.append(np.searchsorted(keys, inside), [len(keys)] * (len(edges) - len(inside))).astype(np.intp)
