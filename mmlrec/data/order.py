"""The order of samples: pure arithmetic on row-group sizes, the same for every world size.

Training order of an epoch = f(seed, epoch, batch size). The row groups of a split, in file order, are permuted by
(seed, epoch); the rows inside a row group are permuted by (seed, epoch, row group). Concatenated, they are a virtual
sequence of N rows. Lane l of L is its positions [l*N//L, (l+1)*N//L). A full batch of B rows takes from each lane l,
in lane order, its next q_l = (l+1)*B//L - l*B//L rows; there are K = min over lanes with q_l > 0 of len(l)//q_l full
batches. What remains of the lanes, in lane order, is the tail, dealt in batches of B, the last one short. So every
row comes exactly once, and batch k has min(B, N - k*B) rows.

Rank r of W takes rows [r*n//W, (r+1)*n//W) of a batch of n rows. In full batches it therefore meets its own lanes
only, and decodes no row group that it does not use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """Positions [start, stop) of the virtual sequence, read by one lane."""

    lane: int
    start: int
    stop: int


class Order(Protocol):
    """What a reader follows: virtual positions over row groups.

    Attributes:
        group_order: [R] row groups (numbered in file order) in the order of the virtual sequence.
        bounds: [R + 1] virtual position at which each of them begins; the last entry is N.
        lane_stops: [L] virtual position at which each lane ends.
        num_batches: batches of an epoch, the same on every rank.
    """

    group_order: Int64Array
    bounds: Int64Array
    lane_stops: Int64Array
    num_batches: int

    def segments(self, batch: int) -> list[Segment]:
        """What this rank reads for a batch."""

    def row_permutation(self, group: int) -> Int64Array | None:
        """[rows of the group] order of its rows; None = as on disk."""


class EpochOrder:
    """The training order of one epoch, as rank `rank` of `world_size` reads it; see the module's text.

    Args:
        group_rows: rows of each row group of the split, in file order.
        batch_size: B, global.
        num_lanes: L, of the manifest.
    """

    def __init__(
        self,
        group_rows: Sequence[int] | Int64Array,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        num_lanes: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        rows = np.asarray(group_rows, dtype=np.int64)
        self._group_rows, self._seed, self._epoch = rows, seed, epoch
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.num_rows = int(rows.sum())
        self.num_batches = -(-self.num_rows // batch_size)
        self.group_order = _generator(seed, epoch, 0).permutation(len(rows))
        self.bounds = _cumulative(rows[self.group_order])

        edges = np.arange(num_lanes + 1, dtype=np.int64)
        lane_edges = edges * self.num_rows // num_lanes
        self._lane_starts, self.lane_stops = lane_edges[:-1], lane_edges[1:]
        self._batch_edges = edges * batch_size // num_lanes
        self._quota = np.diff(self._batch_edges)
        taking = self._quota > 0
        self.num_full_batches = int((np.diff(lane_edges)[taking] // self._quota[taking]).min())
        tail_starts = self._lane_starts + self.num_full_batches * self._quota
        self._tail_starts, self._tail_edges = tail_starts, _cumulative(self.lane_stops - tail_starts)

    def batch_rows(self, batch: int) -> int:
        """Global rows of a batch, over all ranks, padding not counted."""
        return min(self._batch_size, self.num_rows - batch * self._batch_size)

    def segments(self, batch: int) -> list[Segment]:
        """What this rank reads for a batch, in the order of its rows; empty when it has no row."""
        rows = self.batch_rows(batch)
        start, stop = self._rank * rows // self._world_size, (self._rank + 1) * rows // self._world_size
        if batch < self.num_full_batches:
            edges, origins = self._batch_edges, self._lane_starts + batch * self._quota
        else:
            done = (batch - self.num_full_batches) * self._batch_size
            edges, origins, start, stop = self._tail_edges, self._tail_starts, start + done, stop + done
        first = int(np.searchsorted(edges, start, "right")) - 1
        last = int(np.searchsorted(edges, stop, "left"))
        lows = np.maximum(edges[first:last], start) - edges[first:last] + origins[first:last]
        highs = np.minimum(edges[first + 1 : last + 1], stop) - edges[first:last] + origins[first:last]
        lanes = range(first, last)
        return [Segment(*s) for s in zip(lanes, lows.tolist(), highs.tolist(), strict=True) if s[2] > s[1]]

    def row_permutation(self, group: int) -> Int64Array:
        """[rows of the group] order of the rows inside a row group (numbered in file order)."""
        return _generator(self._seed, self._epoch, 1 + group).permutation(self._group_rows[group])


class SequentialOrder:
    """The evaluation order: as on disk. Rank r of W reads rows [r*N//W, (r+1)*N//W), ceil(B/W) of them in a step.

    Contiguous ranges, so that each row group is decoded by one rank (at most two) and not by all.
    """

    def __init__(self, group_rows: Sequence[int] | Int64Array, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        rows = np.asarray(group_rows, dtype=np.int64)
        self.num_rows = int(rows.sum())
        self.num_batches = -(-self.num_rows // batch_size)
        self.group_order = np.arange(len(rows))
        self.bounds = _cumulative(rows)
        self._start, self._stop = rank * self.num_rows // world_size, (rank + 1) * self.num_rows // world_size
        self.lane_stops = np.array([self._stop])
        self._step = -(-batch_size // world_size)

    def segments(self, batch: int) -> list[Segment]:
        """What this rank reads for a batch; empty when its rows are used up."""
        start = self._start + batch * self._step
        stop = min(start + self._step, self._stop)
        return [Segment(0, start, stop)] if stop > start else []

    def row_permutation(self, group: int) -> None:
        """None: rows stay as they lie on disk."""
        return


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    # A spawn key, because SeedSequence([a, b]) and SeedSequence([a, b, 0]) are the same stream.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, stream))))


def _cumulative(lengths: Int64Array) -> Int64Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
