"""Row groups of a split: found, checked against the manifest, and decoded to matrices. Knows numpy and Arrow only."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mmlrec.errors import ConfigError, DataError, did_you_mean
from mmlrec.schema import SCENARIO_COLUMN, WEIGHT_COLUMN, DatasetManifest, Feature, Part, Table, Task, key_column, label_column
from mmlrec.storage.parquet import open_parquet, stored_size
from mmlrec.storage.places import Place, is_local

_FOOTERS = 8  # fetched at a time
_NARROW_ROWS = 1 << 31  # of a table
# numpy's mode of `take` for indices that are within the array: nothing is wrapped, but it neither copies the result twice, as
# "raise" does, nor compares each index as slowly as "clip".
_IN_RANGE: Final = "wrap"
_REMEDY = "Run the preprocessing again, or restore the file."


@dataclass(frozen=True)
class Ragged:
    """A multi-valued feature: row i holds `values[offsets[i]:offsets[i + 1]]`.

    Attributes:
        values: [number of ids] int64.
        offsets: [n + 1] int64, first 0 unless this is a view.
    """

    values: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[np.int64]) -> Ragged:
        """The bags of `rows`, in their order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        shift = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return Ragged(self.values[shift + np.arange(offsets[-1])], offsets)

    def slice(self, start: int, stop: int) -> Ragged:
        """Rows [start, stop) as a view; its offsets do not begin at 0."""
        return Ragged(self.values, self.offsets[start : stop + 1])


@dataclass(frozen=True)
class Rows:
    """Decoded rows, packed so that a range of them is three copies.

    Ids are held in 32 bits where they fit: a column of a row group of usual size then stays in the second-level cache of a
    core while its rows are permuted, which takes a third of the time, and everything else moves half the bytes.

    Attributes:
        narrow: [F4 + S, n] int32: ids of the F4 narrow features, then the scenario where there are some.
        wide: [F8 + 1 + G, n] int64: ids of the F8 wide features, then the row, then the group where the dataset names one.
        floats: [D + 2T + W, n] float32: dense features, labels (0 where missing), label masks, the weight where there is one.
        ragged: the multi-valued features, in order.
    """

    narrow: npt.NDArray[np.int32]
    wide: npt.NDArray[np.int64]
    floats: npt.NDArray[np.float32]
    ragged: tuple[Ragged, ...]

    @property
    def num_bytes(self) -> int:
        """Memory it occupies."""
        matrices = self.narrow.nbytes + self.wide.nbytes + self.floats.nbytes
        return matrices + sum(r.values.nbytes + r.offsets.nbytes for r in self.ragged)

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """A copy of `rows`, in their order."""
        narrow, wide = np.take(self.narrow, rows, 1, mode=_IN_RANGE), np.take(self.wide, rows, 1, mode=_IN_RANGE)
        floats = np.take(self.floats, rows, 1, mode=_IN_RANGE)
        return Rows(narrow, wide, floats, tuple(r.take(rows) for r in self.ragged))

    def slice(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) as a view."""
        ragged = tuple(r.slice(start, stop) for r in self.ragged)
        return Rows(self.narrow[:, start:stop], self.wide[:, start:stop], self.floats[:, start:stop], ragged)


@dataclass(frozen=True)
class _RowGroup:
    path: Place
    part: Part
    index: int
    row_in_file: int
    row_in_split: int
    num_rows: int


class RowGroups:
    """All row groups of a split, in file order, decoded on demand.

    Args:
        tasks: names of the T tasks to read, in order.

    Attributes:
        single: the F1 single-valued features, in the order of the manifest.
        narrow, wide: [F4], [F8] int64: which of them have at most 2^31 rows in their table, and which have more, or keys.
        fetched: they come from an object store, so that several are waited for together.

    Raises:
        ConfigError: an unknown task, or weighted features, which this release does not read.
        DataError: the split is empty, or a part is missing, damaged or not as the manifest says.
    """

    def __init__(self, folder: Place, manifest: DatasetManifest, split: str, tasks: Sequence[str]) -> None:
        weighted = [f.name for f in manifest.features if f.weighted]
        if weighted:
            raise ConfigError(
                f"{folder}: weighted multi-valued features are not supported yet: {', '.join(weighted)}."
                " Run the preprocessing without weights for them."
            )
        self.fetched = not is_local(folder)
        self.tasks = _select_tasks(folder, manifest, tasks)
        self.single = [f for f in manifest.sparse_features if f.kind == "sparse"]
        self.multi = [f for f in manifest.sparse_features if f.kind == "multi"]
        self.dense = [f.name for f in manifest.dense_features]
        self.has_scenario = manifest.scenario is not None
        self._num_scenarios = len(manifest.scenario.values) if manifest.scenario else 1
        self._tables = manifest.by_name
        #: Features by the width of their ids.
        fits = np.array([_is_narrow(self._tables[str(f.table)]) for f in self.single], np.bool_)
        self.narrow, self.wide = np.flatnonzero(fits), np.flatnonzero(~fits)
        self._manifest = manifest
        self._group = key_column(manifest.group_key) if manifest.group_key else None
        self.has_group = self._group is not None
        self._new = manifest.preprocessing.get("new_rows", {}).get("option") == "like"
        self.has_weight: bool | None = None
        self._groups = self._open(folder, split)
        self.num_rows = np.array([g.num_rows for g in self._groups], np.int64)

    def _open(self, folder: Place, split: str) -> list[_RowGroup]:
        if split not in self._manifest.splits:
            held = ", ".join(self._manifest.splits) or "none"
            raise DataError(f"{folder}: the dataset has no split '{split}'. Splits: {held}.")
        groups: list[_RowGroup] = []
        total = 0
        parts = self._manifest.splits[split].parts
        with ThreadPoolExecutor(_FOOTERS if self.fetched else 1) as pool:
            opened = list(pool.map(lambda part: self._open_part(folder / part.path, part), parts))
        for part, (schema, group_rows) in zip(parts, opened, strict=True):
            path = folder / part.path
            self._check_columns(path, schema)
            row = 0
            for index, rows in enumerate(group_rows):
                groups.append(_RowGroup(path, part, index, row, total + row, rows))
                row += rows
            total += row
        expected = self._manifest.splits[split].num_rows
        if total != expected:
            raise DataError(
                f"{folder}: the parts of split '{split}' hold {total} rows, the manifest says {expected}. {_REMEDY}"
            )
        if total == 0:
            raise DataError(f"{folder}: split '{split}' has no rows. Run the preprocessing with another split rule.")
        return [g for g in groups if g.num_rows]

    @staticmethod
    def _open_part(path: Place, part: Part) -> tuple[pa.Schema, list[int]]:
        """Check a part's size and footer; returns its columns and the rows of each of its row groups."""
        size = stored_size(path)
        if size is None:
            raise DataError(f"{path}: the file is missing, but the manifest lists it. {_REMEDY}")
        if size != part.num_bytes:
            raise DataError(
                f"{path}: the file has {size} bytes, the manifest says {part.num_bytes}: cut off or changed. {_REMEDY}"
            )
        try:
            with open_parquet(path, part.num_bytes, part.sha256) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}. {_REMEDY}") from error
        if metadata.num_rows != part.num_rows:
            raise DataError(f"{path}: the file has {metadata.num_rows} rows, the manifest says {part.num_rows}. {_REMEDY}")
        return schema, [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def _check_columns(self, path: Place, schema: pa.Schema) -> None:
        expected = _expected_types(self._manifest)
        for name, types in expected.items():
            if name not in schema.names:
                raise DataError(f"{path}: column '{name}' is missing.{did_you_mean(name, schema.names)} {_REMEDY}")
            found = str(schema.field(name).type).replace("element: ", "item: ")
            if found not in types:
                raise DataError(f"{path}: column '{name}' is {found}, must be {' or '.join(types)}. {_REMEDY}")
        for name in schema.names:
            if name not in expected and name != WEIGHT_COLUMN:
                raise DataError(f"{path}: column '{name}' is not in the manifest. {_REMEDY}")
        weight = WEIGHT_COLUMN in schema.names
        if weight and schema.field(WEIGHT_COLUMN).type != pa.float32():
            raise DataError(f"{path}: column '{WEIGHT_COLUMN}' is {schema.field(WEIGHT_COLUMN).type}, must be float. {_REMEDY}")
        if self.has_weight not in (None, weight):
            raise DataError(f"{path}: '{WEIGHT_COLUMN}' is in some parts of the split and not in others. {_REMEDY}")
        self.has_weight = weight
        if self._group and schema.field(self._group).type != pa.int64():
            raise DataError(f"{path}: column '{self._group}' groups the rows for GAUC and must be int64. {_REMEDY}")

    def no_rows(self) -> Rows:
        """Zero rows, for a rank that has none in a batch."""
        bags = Ragged(np.zeros(0, np.int64), np.zeros(1, np.int64))
        return Rows(*self._matrices(0), (bags,) * len(self.multi))

    def decode(self, group: int, rows: npt.NDArray[np.int64] | None = None) -> Rows:
        """Read a row group and check its content.

        Its columns are read one at a time, and each is checked and put in its place while it lies in the cache of the core.

        Args:
            rows: of the group, which are taken in this order; all, as on disk, when absent.

        Raises:
            DataError: naming file, row (counted from 0 in the file) and column.
        """
        place = self._groups[group]
        try:
            with open_parquet(place.path, place.part.num_bytes, place.part.sha256) as file:
                return self._decode(_Columns(place, file), rows)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise DataError(f"{place.path}: row group {place.index} cannot be read: {error}. {_REMEDY}") from error

    def _decode(self, columns: _Columns, rows: npt.NDArray[np.int64] | None) -> Rows:
        place = columns.place
        narrow, wide, floats = self._matrices(place.num_rows if rows is None else len(rows))
        for matrix, features in ((narrow, self.narrow), (wide, self.wide)):
            for i, feature in enumerate(features):
                _fill(matrix[i], self._ids(columns, self.single[feature]), rows)
        wide[len(self.wide)] = place.row_in_split + (np.arange(place.num_rows) if rows is None else rows)
        if self.has_scenario:
            _fill(narrow[-1], self._scenarios(columns), rows)
        if self.has_group:
            _fill(wide[-1], self._groups_of_rows(columns), rows)
        for i, name in enumerate(self.dense):
            _fill(floats[i], self._dense(columns, name), rows)
        for i, task in enumerate(self.tasks, start=len(self.dense)):
            labels, present = self._labels(columns, task)
            _fill(floats[i], labels, rows)
            _fill(floats[i + len(self.tasks)], present, rows)
        if self.has_weight:
            _fill(floats[-1], self._weights(columns), rows)
        ragged = (self._ragged(columns, feature) for feature in self.multi)
        return Rows(narrow, wide, floats, tuple(r if rows is None else r.take(rows) for r in ragged))

    def _matrices(self, num_rows: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The matrices of rows, not yet filled in."""
        num_floats = len(self.dense) + 2 * len(self.tasks) + bool(self.has_weight)
        return (
            np.empty((len(self.narrow) + self.has_scenario, num_rows), np.int32),
            np.empty((len(self.wide) + 1 + self.has_group, num_rows), np.int64),
            np.empty((num_floats, num_rows), np.float32),
        )

    def _ids(self, columns: _Columns, feature: Feature) -> npt.NDArray[np.int64]:
        ids, table = columns.int64(feature.name), self._tables[str(feature.table)]
        # As a number without a sign, an id below 0 is large: one look finds both.
        if not table.managed and ids.view(np.uint64).max() >= table.num_rows:
            row = int(np.argmax((ids < 0) | (ids >= table.num_rows)))
            _bad_id(columns.place, row, feature.name, int(ids[row]), table.name, table.num_rows)
        return ids

    def _scenarios(self, columns: _Columns) -> npt.NDArray[np.int64]:
        scenario = columns.int64(SCENARIO_COLUMN)
        wrong = (scenario < 0) | (scenario >= self._num_scenarios)
        if wrong.any():
            row = int(np.argmax(wrong))
            _bad(columns.place, row, f"'{SCENARIO_COLUMN}' is {scenario[row]}, must be in 0..{self._num_scenarios - 1}")
        return scenario

    def _groups_of_rows(self, columns: _Columns) -> npt.NDArray[np.int64]:
        """The group of each row. New rows may have none: each is then a group of its own, of which GAUC says nothing."""
        column, place = columns[str(self._group)], columns.place
        if not (column.null_count and self._new):
            return _int64(place, column, str(self._group))
        own = np.iinfo(np.int64).min + place.row_in_split + np.arange(place.num_rows)
        return np.where(column.is_null().to_numpy(), own, column.fill_null(0).to_numpy())

    def _dense(self, columns: _Columns, name: str) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = numbers(columns[name])
        finite = np.isfinite(values)
        if not finite.all():
            row, missing = int(np.argmin(finite)), "(missing counts as nan)"
            _bad(columns.place, row, f"column '{name}' is {values[row]} {missing}, must be a finite number")
        return values

    def _labels(self, columns: _Columns, task: Task) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Labels, 0 where they are missing, and where they are present."""
        values = numbers(columns[label_column(task.name)])
        present = ~np.isnan(values)
        allowed = (values == 0) | (values == 1) if task.kind == "binary" else np.isfinite(values)
        wrong = present & ~allowed
        if wrong.any():
            row = int(np.argmax(wrong))
            must = "0 or 1" if task.kind == "binary" else "finite"
            _bad(columns.place, row, f"label of task '{task.name}' is {values[row]}, must be {must}, or null when missing")
        return np.where(present, values, np.float32(0)), present

    def _weights(self, columns: _Columns) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = numbers(columns[WEIGHT_COLUMN])
        allowed = np.isfinite(values) & (values >= 0)
        if not allowed.all():
            row = int(np.argmin(allowed))
            _bad(columns.place, row, f"'{WEIGHT_COLUMN}' is {values[row]}, must be finite and not negative")
        return values

    def _ragged(self, columns: _Columns, feature: Feature) -> Ragged:
        place = columns.place
        array = pa.concat_arrays(columns[feature.name].chunks)
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            _bad(place, row, f"feature '{feature.name}' is null; an empty bag is an empty list")
        offsets = np.from_dlpack(array.offsets).astype(np.int64)
        flat = array.values.slice(offsets[0], offsets[-1] - offsets[0])
        offsets -= offsets[0]
        if flat.null_count:
            first = int(np.argmax(flat.is_null().to_numpy(zero_copy_only=False)))
            row = int(np.searchsorted(offsets, first, "right")) - 1
            _bad(place, row, f"feature '{feature.name}' holds a null; a missing id is 0")
        values: npt.NDArray[Any] = np.from_dlpack(flat)
        owner = self._tables[str(feature.table)]
        size = owner.num_rows
        if not owner.managed and len(values) and (values.min() < 0 or values.max() >= size):
            first = int(np.argmax((values < 0) | (values >= size)))
            row = int(np.searchsorted(offsets, first, "right")) - 1
            _bad_id(place, row, feature.name, int(values[first]), str(feature.table), size)
        return Ragged(values, offsets)


class _Columns:
    """The columns of a row group in an open file, each read when it is asked for."""

    def __init__(self, place: _RowGroup, file: pq.ParquetFile) -> None:
        self.place, self._file = place, file

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        # Threads decode row groups side by side; Arrow's own would only come on top.
        table = self._file.read_row_group(self.place.index, columns=[name], use_threads=False)
        if table.num_rows != self.place.num_rows:
            raise DataError(f"{self.place.path}: row group {self.place.index} changed while it was in use. {_REMEDY}")
        return table.column(name)

    def int64(self, name: str) -> npt.NDArray[np.int64]:
        """A column of integers without nulls."""
        return _int64(self.place, self[name], name)


def _fill(out: npt.NDArray, values: npt.NDArray, rows: npt.NDArray[np.int64] | None) -> None:
    """Write `rows` of some values, or all of them, as numbers of the type of `out`."""
    if rows is None:
        out[:] = values
    else:
        np.take(values.astype(out.dtype, copy=False), rows, mode=_IN_RANGE, out=out)


class RowGroupCache:
    """The row groups that were decoded first, as many as fit. May be used by several threads.

    Nothing is dropped for others: an epoch meets each row group once, in a random order, so that the least recently used is no
    less likely to be the next than any other, and of half a split that fits, half is found here, not a seventh.

    Args:
        max_bytes: bound on what it keeps.
    """

    def __init__(self, groups: RowGroups, max_bytes: int) -> None:
        self._groups, self._bytes_left = groups, max_bytes
        self._kept: dict[int, Rows] = {}
        self._lock = threading.Lock()

    def get(self, group: int, rows: npt.NDArray[np.int64] | None = None) -> Rows:
        """`rows` of a row group in this order, or all as on disk; decoded now when it is not held."""
        with self._lock:
            held, full = self._kept.get(group), self._bytes_left <= 0
        if held is None and full:
            return self._groups.decode(group, rows)
        if held is None:
            held = self._groups.decode(group)
            self._keep(group, held)
        return held if rows is None else held.take(rows)

    def _keep(self, group: int, rows: Rows) -> None:
        with self._lock:
            if rows.num_bytes > self._bytes_left:
                self._bytes_left = 0  # full: the next ones are decoded in the order in which they are needed, which takes less
            elif group not in self._kept:
                self._kept[group] = rows
                self._bytes_left -= rows.num_bytes


def _select_tasks(folder: Place, manifest: DatasetManifest, names: Sequence[str]) -> list[Task]:
    by_name = {task.name: task for task in manifest.tasks}
    for name in names:
        if name not in by_name:
            raise ConfigError(
                f"dataset.tasks: '{name}' is not a task of {folder}.{did_you_mean(name, by_name)} Tasks: {', '.join(by_name)}."
            )
    return [by_name[name] for name in names]


def _expected_types(manifest: DatasetManifest) -> dict[str, tuple[str, ...]]:
    feature_type = {"sparse": ("int64",), "multi": ("list<item: int64>",), "dense": ("float",)}
    types: dict[str, tuple[str, ...]] = {f.name: feature_type[f.kind] for f in manifest.features}
    types |= {label_column(task.name): ("float",) for task in manifest.tasks}
    types |= {key_column(key): ("int64", "string") for key in manifest.keys}
    if manifest.scenario is not None:
        types[SCENARIO_COLUMN] = ("int64",)
    return types


def _int64(place: _RowGroup, column: pa.ChunkedArray, name: str) -> npt.NDArray[np.int64]:
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        _bad(place, row, f"column '{name}' is null; a missing id is 0")
    return numbers(column)


def numbers(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """The values of a column of numbers as `to_numpy` gives them; a float that is null is NaN, no integer may be null.

    `to_numpy` imports pandas wherever that is installed, which takes a twentieth of the start of a run.
    """
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not array.null_count:
        return np.from_dlpack(array)
    content = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], offset=array.offset)
    values: npt.NDArray[Any] = np.from_dlpack(content).copy()
    values[np.from_dlpack(array.is_null().cast(pa.uint8())) == 1] = np.nan
    return values


def _bad_id(place: _RowGroup, row: int, feature: str, value: int, table: str, size: int) -> NoReturn:
    _bad(place, row, f"feature '{feature}' has id {value}, outside of table '{table}' with {size} rows (0..{size - 1})")


def _bad(place: _RowGroup, row: int, what: str) -> NoReturn:
    raise DataError(f"{place.path}: row {place.row_in_file + row}: {what}. {_REMEDY}")


def _is_narrow(table: Table) -> bool:
    """Whether ids of a table are held in 32 bits: not those of a managed one, which are keys of 64."""
    return not table.managed and table.num_rows <= _NARROW_ROWS
