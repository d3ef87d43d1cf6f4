"""Rows on disk in the order of their target positions, in bounded memory: a bucket sort through temporary files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from preprocessing.rows.batch_file import BatchFile

IntArray = NDArray[np.int64]

BUCKET_ROWS = 1 << 18
_PLACE = "row.place"  # with a point, as no feature's name has


@dataclass(frozen=True)
class BucketPlan:
    """Cuts the positions of train, valid and test into parts, and those into buckets, none of which crosses a border.

    Attributes:
        borders: positions where the splits begin, and the number of rows.
        part_rows: rows of every part but a split's last.
        bucket_rows: rows of every bucket but a part's last.
    """

    borders: tuple[int, int, int, int]
    part_rows: int
    bucket_rows: int

    @property
    def parts(self) -> list[tuple[int, int, range]]:
        """Of each part: split, number within the split, buckets."""
        found, first = [], 0
        for split, (start, end) in enumerate(zip(self.borders[:-1], self.borders[1:], strict=True)):
            for part, begin in enumerate(range(start, end, self.part_rows)):
                last = first + -(-min(self.part_rows, end - begin) // self.bucket_rows)
                found.append((split, part, range(first, last)))
                first = last
        return found

    def buckets(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Bucket of each position, and the place within it."""
        parts = self.parts
        first_buckets = np.array([next((buckets.start for s, _, buckets in parts if s == split), 0) for split in range(3)])
        split = (positions >= self.borders[1]).astype(np.int64) + (positions >= self.borders[2])
        part, within = np.divmod(positions - np.array(self.borders[:3])[split], self.part_rows)
        bucket, place = np.divmod(within, self.bucket_rows)
        return first_buckets[split] + part * -(-self.part_rows // self.bucket_rows) + bucket, place


def scatter(rows: pa.RecordBatch, positions: IntArray, plan: BucketPlan) -> list[tuple[int, pa.RecordBatch]]:
    """Those of the rows that belong to each bucket, with their places in it, for `ordered`; positions are [rows]."""
    buckets, places = plan.buckets(positions)
    num_buckets = plan.parts[-1][2].stop
    kind = np.uint16 if num_buckets <= 1 << 16 else np.int64  # numpy sorts 16 bits by radix
    order = np.argsort(buckets.astype(kind), kind="stable")
    rows = rows.append_column(_PLACE, pa.array(places.astype(np.int32))).take(pa.array(order))
    counts = np.bincount(buckets, minlength=num_buckets)
    starts = np.cumsum(counts) - counts
    return [(int(bucket), rows.slice(starts[bucket], counts[bucket])) for bucket in np.flatnonzero(counts)]


def ordered(scattered: Iterable[pa.RecordBatch]) -> pa.RecordBatch:
    """All rows of a bucket, in the order of their positions."""
    rows = pa.concat_batches(list(scattered))
    order = np.empty(rows.num_rows, np.int64)
    order[rows.column(_PLACE).to_numpy()] = np.arange(rows.num_rows)
    return rows.drop_columns([_PLACE]).take(pa.array(order))


class BucketSort:
    """Takes rows with their positions in any order and gives them back bucket by bucket, each in the order of positions."""

    def __init__(self, folder: Path, schema: pa.Schema, plan: BucketPlan) -> None:
        self._plan = plan
        schema = schema.append(pa.field(_PLACE, pa.int32()))
        self._files = [BatchFile(folder / f"bucket-{bucket}.arrow", schema) for bucket in range(plan.parts[-1][2].stop)]

    def scatter(self, rows: pa.RecordBatch, positions: IntArray) -> list[tuple[int, pa.Buffer]]:
        """Rows by bucket, ready to be appended; positions are [rows]. For several threads."""
        return [(bucket, own.serialize()) for bucket, own in scatter(rows, positions, self._plan)]

    def append(self, scattered: list[tuple[int, pa.Buffer]]) -> None:
        """Write what `scatter` gave."""
        for bucket, serialised in scattered:
            self._files[bucket].append(serialised)

    def read(self, bucket: int) -> pa.RecordBatch:
        """The rows of a bucket in the order of positions; its file is removed. For several threads."""
        return ordered(self._files[bucket].batches())
