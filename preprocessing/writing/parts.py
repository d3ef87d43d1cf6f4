"""Parquet parts of a split: whole row groups, counted while they are written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmlrec.identity import file_sha256
from mmlrec.schema import SCENARIO_COLUMN, WEIGHT_COLUMN, Part, Scenario, Split, Task, label_column
from preprocessing.writing.summaries import Moments, Squeeze

T = TypeVar("T")

NUM_LANES = 8
PART_ROWS = 1 << 20  # parts are written side by side, one by each worker


def row_group_size(num_train_rows: int, num_lanes: int) -> int:
    """Rows of a row group: each lane gets at least four groups of train, within 1,024 to 65,536 rows."""
    return min(65536, max(1024, num_train_rows // (4 * num_lanes)))


def part_size(group_rows: int) -> int:
    """Rows of every part but a split's last: whole row groups."""
    return max(PART_ROWS // group_rows, 1) * group_rows


def _encoding(schema: pa.Schema) -> dict[str, object]:
    """Parquet encodings that decode fastest at a reasonable size.

    Measured with 26 int64 Zipf columns (10 to 1e7 distinct) + 13 float32, 1M rows, groups of 65,536, one thread of a slow core:

    delta, none 100 MB, 9.1M rows/s (the choice) | delta, zstd-1 94 MB, 4.4M | plain, none 260 MB, 6.3M
    plain, lz4  141 MB, 5.2M | dictionary, none 128 MB, 6.2M | dictionary, zstd-1 95 MB, 3.1M

    Labels have a few values and keys may repeat: those take dictionaries.
    """
    encodings, dictionaries = {}, []
    for column in schema:
        path = f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name
        kind = column.type.value_type if pa.types.is_list(column.type) else column.type
        if pa.types.is_integer(kind):
            encodings[path] = "DELTA_BINARY_PACKED"
        elif pa.types.is_string(kind) or column.name.startswith("label."):
            dictionaries.append(path)
        else:
            encodings[path] = "PLAIN"
    return {"column_encoding": encodings, "use_dictionary": dictionaries, "compression": "none", "write_statistics": False}


@dataclass(frozen=True)
class Written:
    """A split, or parts of it, and what was counted of its numbers.

    Attributes:
        labels: regression task -> "all" or scenario -> its labels.
        ranges: scaled feature -> its values; of train only.
        weights: of the rows, where they have some.
        num_ids: multi-valued feature -> its ids.
    """

    split: Split
    labels: dict[str, dict[str, Moments]]
    ranges: dict[str, Squeeze]
    weights: Moments
    num_ids: Counter[str]


class SplitWriter:
    """Writes one split, or the parts of it from `first_part` on.

    Every row group has exactly `group_rows` rows, across part borders, but the split's very last. What is written does not
    depend on how the rows are handed over.

    Args:
        scaled: features whose values lie in [0, 1], the range of train.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        group_rows: int,
        tasks: tuple[Task, ...],
        scenario: Scenario | None,
        first_part: int = 0,
        scaled: tuple[str, ...] = (),
    ) -> None:
        self._folder, self._split, self._first_part = folder, split, first_part
        self._group_rows = group_rows
        self._part_rows = part_size(group_rows)
        self._tasks, self._scenario = tasks, scenario
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0
        self._writer: pq.ParquetWriter | None = None
        self._written: list[int] = []
        num_scenarios = len(scenario.values) if scenario else 0
        self._scenario_rows = np.zeros(num_scenarios, np.int64)
        self._counts = np.zeros((len(tasks), num_scenarios + 1, 2), np.int64)  # last scenario = all
        self._labels = {task.name: dict.fromkeys(self._names, Moments()) for task in tasks if task.kind == "regression"}
        self._ranges = dict.fromkeys(scaled if split == "train" else (), Squeeze())
        self._weights = Moments()
        self._num_ids: Counter[str] = Counter()
        (folder / split).mkdir(exist_ok=True)

    @property
    def _names(self) -> list[str]:
        """Scenarios in the order of their ids, then all of them together."""
        return [*(self._scenario.values if self._scenario else []), "all"]

    def write(self, rows: pa.RecordBatch) -> None:
        """Append encoded rows."""
        self._count(rows)
        self._waiting.append(rows)
        self._num_waiting += rows.num_rows
        if self._num_waiting >= self._group_rows:
            self._write_groups(self._num_waiting // self._group_rows * self._group_rows)

    def close(self) -> Written:
        """Write what is left and describe the split."""
        if self._num_waiting:
            self._write_groups(self._num_waiting)
        if self._writer is not None:
            self._writer.close()
        names = self._names
        split = Split(
            parts=[self._part(index, rows) for index, rows in enumerate(self._written)],
            num_rows=sum(self._written),
            scenario_rows=dict(zip(names, self._scenario_rows.tolist(), strict=False)),
            label_counts={
                task.name: {name: (int(counts[s, 0]), int(counts[s, 1])) for s, name in enumerate(names)}
                for task, counts in zip(self._tasks, self._counts, strict=True)
            },
        )
        return Written(split, self._labels, self._ranges, self._weights, self._num_ids)

    def _path(self, index: int) -> str:
        return f"{self._split}/part-{self._first_part + index:05d}.parquet"

    def _part(self, index: int, num_rows: int) -> Part:
        path = self._folder / self._path(index)
        return Part(path=self._path(index), num_rows=num_rows, num_bytes=path.stat().st_size, sha256=file_sha256(path))

    def _write_groups(self, num_rows: int) -> None:
        table = pa.Table.from_batches(self._waiting)
        for start in range(0, num_rows, self._group_rows):
            if self._writer is None or self._written[-1] == self._part_rows:
                self._next_part(table.schema)
            assert self._writer is not None
            group = table.slice(start, min(self._group_rows, num_rows - start)).combine_chunks()
            self._sum_up(group)
            self._writer.write_table(group, row_group_size=self._group_rows)  # pages end where chunks do
            self._written[-1] += group.num_rows
        self._waiting = table.slice(num_rows).to_batches()
        self._num_waiting -= num_rows

    def _sum_up(self, group: pa.Table) -> None:
        """Take note of the numbers of a row group."""
        for name, seen in self._ranges.items():
            self._ranges[name] = seen + Squeeze.of(group[name].to_numpy())
        if WEIGHT_COLUMN in group.schema.names:
            self._weights += Moments.of(group[WEIGHT_COLUMN].to_numpy())
        for task, of_task in self._labels.items():
            label = group[label_column(task)].to_numpy()  # nan where it is missing
            known = ~np.isnan(label)
            own = {"all": known}
            if self._scenario:
                scenario = group[SCENARIO_COLUMN].to_numpy()
                own |= {name: known & (scenario == index) for index, name in enumerate(self._scenario.values)}
            for name, rows in own.items():
                of_task[name] += Moments.of(label[rows])

    def _next_part(self, schema: pa.Schema) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = pq.ParquetWriter(self._folder / self._path(len(self._written)), schema, **_encoding(schema))
        self._written.append(0)

    def _count(self, rows: pa.RecordBatch) -> None:
        for field in rows.schema:
            if pa.types.is_list(field.type) and pa.types.is_integer(field.type.value_type):
                self._num_ids[field.name] += len(rows.column(field.name).flatten())
        num_scenarios = len(self._scenario_rows)
        scenario = rows.column(SCENARIO_COLUMN).to_numpy() if self._scenario else np.zeros(rows.num_rows, np.int64)
        if self._scenario:
            self._scenario_rows += np.bincount(scenario, minlength=num_scenarios)
        for t, task in enumerate(self._tasks):
            label = rows.column(label_column(task.name))
            labelled = label.is_valid().to_numpy(zero_copy_only=False)
            positive = pc.greater(label, 0).fill_null(False).to_numpy(zero_copy_only=False)
            for k, chosen in enumerate((labelled, positive)):
                self._counts[t, -1, k] += np.count_nonzero(chosen)
                if self._scenario:
                    self._counts[t, :-1, k] += np.bincount(scenario[chosen], minlength=num_scenarios)


def join_splits(written: list[Written]) -> Written:
    """One split from the parts that several writers have made of it, in their order."""
    pieces = [each.split for each in written]
    scenarios, tasks = pieces[0].scenario_rows, pieces[0].label_counts
    split = Split(
        parts=[part for piece in pieces for part in piece.parts],
        num_rows=sum(piece.num_rows for piece in pieces),
        scenario_rows={name: sum(piece.scenario_rows[name] for piece in pieces) for name in scenarios},
        label_counts={
            task: {
                name: (sum(p.label_counts[task][name][0] for p in pieces), sum(p.label_counts[task][name][1] for p in pieces))
                for name in counts
            }
            for task, counts in tasks.items()
        },
    )
    labels = {
        task: {name: _joined([each.labels[task][name] for each in written]) for name in of_task}
        for task, of_task in written[0].labels.items()
    }
    ranges = {name: _joined([each.ranges[name] for each in written]) for name in written[0].ranges}
    weights, num_ids = _joined([each.weights for each in written]), _joined([each.num_ids for each in written])
    return Written(split, labels, ranges, weights, num_ids)


def _joined(pieces: list[T]) -> T:
    return reduce(add, pieces)
