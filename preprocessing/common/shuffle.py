"""Rows on disk in the order of their target positions, in constant memory: a bucket sort through temporary files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BUCKET_ROWS = 1 << 18


class RowSpill:
    """Record batches written to one Arrow file and read back in the same order."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, schema)
        self.num_rows = 0

    def add(self, rows: pa.RecordBatch) -> None:
        """Append rows."""
        self._writer.write_batch(rows)
        self.num_rows += rows.num_rows

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows again; the file is removed at the end."""
        self._writer.close()
        self._sink.close()
        with pa.OSFile(str(self._path), "rb") as source:
            yield from pa.ipc.open_stream(source)
        self._path.unlink()


class BucketSort:
    """Takes rows with their positions in any order and gives them back sorted by position.

    Bucket b holds positions [b, b + 1) * BUCKET_ROWS. Its file is opened for each append only, so that the number of
    buckets is not bounded by the number of files that may be open.
    """

    def __init__(self, folder: Path, schema: pa.Schema, num_rows: int) -> None:
        self._folder = folder
        self._schema = schema.append(pa.field("position", pa.int64()))
        self._num_buckets = -(-num_rows // BUCKET_ROWS)
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0

    def add(self, rows: pa.RecordBatch, positions: NDArray[np.int64]) -> None:
        """Append rows; positions are [rows] int64."""
        self._waiting.append(pa.RecordBatch.from_arrays([*rows.columns, pa.array(positions)], schema=self._schema))
        self._num_waiting += rows.num_rows
        if self._num_waiting >= BUCKET_ROWS:
            self._scatter()

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Position of the first row, and rows in the order of positions; each bucket's file is removed when read."""
        self._scatter()
        for bucket in range(self._num_buckets):
            rows = self._read(bucket)
            order = np.empty(rows.num_rows, np.int64)
            order[rows.column("position").to_numpy() - bucket * BUCKET_ROWS] = np.arange(rows.num_rows)
            sorted_rows = rows.take(pa.array(order))
            yield (
                bucket * BUCKET_ROWS,
                pa.RecordBatch.from_arrays(sorted_rows.columns[:-1], schema=self._schema.remove(len(self._schema) - 1)),
            )

    def _path(self, bucket: int) -> Path:
        return self._folder / f"bucket-{bucket}.arrow"

    def _scatter(self) -> None:
        if not self._num_waiting:
            return
        rows = pa.concat_batches(self._waiting)
        self._waiting, self._num_waiting = [], 0
        buckets = rows.column("position").to_numpy() // BUCKET_ROWS
        rows = rows.take(pa.array(np.argsort(buckets, kind="stable")))
        ends = np.cumsum(np.bincount(buckets, minlength=self._num_buckets))
        for bucket, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                with self._path(bucket).open("ab") as file, pa.ipc.new_stream(file, self._schema) as stream:
                    stream.write_batch(rows.slice(start, end - start))

    def _read(self, bucket: int) -> pa.RecordBatch:
        """All appended streams of a bucket's file, as one batch."""
        path, batches = self._path(bucket), []
        with path.open("rb") as file:
            size = path.stat().st_size
            while file.tell() < size:
                batches.extend(pa.ipc.open_stream(file))
        path.unlink()
        return pa.concat_batches(batches)
