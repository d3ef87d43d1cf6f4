"""Row groups of a split: found, checked against the manifest, and decoded to matrices. Knows numpy and Arrow only."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmlrec.errors import ConfigError, DataError, did_you_mean
from mmlrec.schema import SCENARIO_COLUMN, WEIGHT_COLUMN, DatasetManifest, Part, Task, key_column, label_column
from mmlrec.storage.parquet import open_parquet, stored_size
from mmlrec.storage.places import Place, is_local

_FOOTERS = 8  # fetched at a time
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
    """Decoded rows, packed so that a range of them is two copies.

    Attributes:
        integers: [F1 + 3, n] int64: ids of the F1 single-valued features, then row, scenario and group.
        floats: [n, D + 2T + 1] float32: dense features, labels (0 where missing), label mask, weight.
        ragged: the multi-valued features, in order.
    """

    integers: npt.NDArray[np.int64]
    floats: npt.NDArray[np.float32]
    ragged: tuple[Ragged, ...]

    @property
    def num_bytes(self) -> int:
        """Memory it occupies."""
        return self.integers.nbytes + self.floats.nbytes + sum(r.values.nbytes + r.offsets.nbytes for r in self.ragged)

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """A copy of `rows`, in their order."""
        ragged = tuple(r.take(rows) for r in self.ragged)
        # mode="clip" skips numpy's buffering; the indices are a permutation, so nothing is clipped.
        return Rows(np.take(self.integers, rows, 1, mode="clip"), np.take(self.floats, rows, 0, mode="clip"), ragged)

    def slice(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) as a view."""
        ragged = tuple(r.slice(start, stop) for r in self.ragged)
        return Rows(self.integers[:, start:stop], self.floats[start:stop], ragged)


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
        self._table_rows = np.array([self._tables[str(f.table)].num_rows for f in self.single], np.int64)
        #: Features whose ids are keys: any int64.
        self._keyed = np.array([self._tables[str(f.table)].managed for f in self.single], np.bool_)
        self._manifest = manifest
        self._group = key_column(manifest.group_key) if manifest.group_key else None
        self._new = manifest.preprocessing.get("new_rows", {}).get("option") == "like"
        self._weight: bool | None = None
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
        if self._weight not in (None, weight):
            raise DataError(f"{path}: '{WEIGHT_COLUMN}' is in some parts of the split and not in others. {_REMEDY}")
        self._weight = weight
        if self._group and schema.field(self._group).type != pa.int64():
            raise DataError(f"{path}: column '{self._group}' groups the rows for GAUC and must be int64. {_REMEDY}")

    def no_rows(self) -> Rows:
        """Zero rows, for a rank that has none in a batch."""
        integers = np.zeros((len(self.single) + 3, 0), np.int64)
        floats = np.zeros((0, len(self.dense) + 2 * len(self.tasks) + 1), np.float32)
        bags = Ragged(np.zeros(0, np.int64), np.zeros(1, np.int64))
        return Rows(integers, floats, (bags,) * len(self.multi))

    def decode(self, group: int) -> Rows:
        """Read a row group and check its content.

        Raises:
            DataError: naming file, row (counted from 0 in the file) and column.
        """
        place = self._groups[group]
        columns = [f.name for f in self.single + self.multi] + self.dense + [label_column(t.name) for t in self.tasks]
        columns += [SCENARIO_COLUMN] * self.has_scenario + [WEIGHT_COLUMN] * bool(self._weight)
        columns += [self._group] if self._group else []
        try:
            with open_parquet(place.path, place.part.num_bytes, place.part.sha256) as file:
                table = file.read_row_group(place.index, columns=columns, use_threads=True)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise DataError(f"{place.path}: row group {place.index} cannot be read: {error}. {_REMEDY}") from error
        if table.num_rows != place.num_rows:
            raise DataError(f"{place.path}: row group {place.index} changed while it was in use. {_REMEDY}")
        return Rows(
            self._integers(place, table),
            self._floats(place, table),
            tuple(self._ragged(place, table, i) for i in range(len(self.multi))),
        )

    def _integers(self, place: _RowGroup, table: pa.Table) -> npt.NDArray[np.int64]:
        num_single = len(self.single)
        out = np.zeros((num_single + 3, place.num_rows), np.int64)
        for i, feature in enumerate(self.single):
            out[i] = _int64(place, table, feature.name)
        ids = out[:num_single]
        outside = (ids.min(1) < 0) | (ids.max(1) >= self._table_rows)
        for i in np.flatnonzero(outside & ~self._keyed).tolist():
            row = int(np.argmax((ids[i] < 0) | (ids[i] >= self._table_rows[i])))
            _bad_id(place, row, self.single[i].name, int(ids[i, row]), str(self.single[i].table), int(self._table_rows[i]))
        out[num_single] = place.row_in_split + np.arange(place.num_rows)
        if self.has_scenario:
            scenario = out[num_single + 1]
            scenario[:] = _int64(place, table, SCENARIO_COLUMN)
            wrong = (scenario < 0) | (scenario >= self._num_scenarios)
            if wrong.any():
                row = int(np.argmax(wrong))
                _bad(place, row, f"'{SCENARIO_COLUMN}' is {scenario[row]}, must be in 0..{self._num_scenarios - 1}")
        if self._group:
            out[num_single + 2] = self._groups_of_rows(place, table)
        return out

    def _groups_of_rows(self, place: _RowGroup, table: pa.Table) -> npt.NDArray[np.int64]:
        """The group of each row. New rows may have none: each is then a group of its own, of which GAUC says nothing."""
        column = table.column(str(self._group))
        if not (column.null_count and self._new):
            return _int64(place, table, str(self._group))
        own = np.iinfo(np.int64).min + place.row_in_split + np.arange(place.num_rows)
        return np.where(column.is_null().to_numpy(), own, column.fill_null(0).to_numpy())

    def _floats(self, place: _RowGroup, table: pa.Table) -> npt.NDArray[np.float32]:
        num_dense, num_tasks = len(self.dense), len(self.tasks)
        out = np.ones((place.num_rows, num_dense + 2 * num_tasks + 1), np.float32)
        for i, name in enumerate(self.dense):
            values = table.column(name).to_numpy()
            finite = np.isfinite(values)
            if not finite.all():
                row = int(np.argmin(finite))
                _bad(place, row, f"column '{name}' is {values[row]} (missing counts as nan), must be a finite number")
            out[:, i] = values
        for i, task in enumerate(self.tasks, start=num_dense):
            values = table.column(label_column(task.name)).to_numpy()
            present = ~np.isnan(values)
            allowed = (values == 0) | (values == 1) if task.kind == "binary" else np.isfinite(values)
            wrong = present & ~allowed
            if wrong.any():
                row = int(np.argmax(wrong))
                must = "0 or 1" if task.kind == "binary" else "finite"
                _bad(place, row, f"label of task '{task.name}' is {values[row]}, must be {must}, or null when missing")
            out[:, i] = np.where(present, values, np.float32(0))
            out[:, i + num_tasks] = present
        if self._weight:
            values = table.column(WEIGHT_COLUMN).to_numpy()
            allowed = np.isfinite(values) & (values >= 0)
            if not allowed.all():
                row = int(np.argmin(allowed))
                _bad(place, row, f"'{WEIGHT_COLUMN}' is {values[row]}, must be finite and not negative")
            out[:, -1] = values
        return out

    def _ragged(self, place: _RowGroup, table: pa.Table, index: int) -> Ragged:
        feature = self.multi[index]
        array = pa.concat_arrays(table.column(feature.name).chunks)
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            _bad(place, row, f"feature '{feature.name}' is null; an empty bag is an empty list")
        offsets = array.offsets.to_numpy().astype(np.int64)
        flat = array.values.slice(offsets[0], offsets[-1] - offsets[0])
        offsets -= offsets[0]
        if flat.null_count:
            first = int(np.argmax(flat.is_null().to_numpy(zero_copy_only=False)))
            row = int(np.searchsorted(offsets, first, "right")) - 1
            _bad(place, row, f"feature '{feature.name}' holds a null; a missing id is 0")
        values = flat.to_numpy()
        owner = self._tables[str(feature.table)]
        size = owner.num_rows
        if not owner.managed and len(values) and (values.min() < 0 or values.max() >= size):
            first = int(np.argmax((values < 0) | (values >= size)))
            row = int(np.searchsorted(offsets, first, "right")) - 1
            _bad_id(place, row, feature.name, int(values[first]), str(feature.table), size)
        return Ragged(values, offsets)


class RowGroupCache:
    """Decoded row groups, the least recently used dropped first. May be used by several threads.

    Args:
        max_bytes: bound on what it keeps.
    """

    def __init__(self, groups: RowGroups, max_bytes: int) -> None:
        self._groups, self._max_bytes = groups, max_bytes
        self._kept: OrderedDict[int, Rows] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, group: int) -> Rows:
        """The rows of a row group, decoded now when they are not held."""
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
        rows = self._groups.decode(group)
        with self._lock:
            if group not in self._kept and rows.num_bytes <= self._max_bytes:
                self._kept[group] = rows
                self._num_bytes += rows.num_bytes
                while self._num_bytes > self._max_bytes:
                    self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return rows


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


def _int64(place: _RowGroup, table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    column = table.column(name)
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        _bad(place, row, f"column '{name}' is null; a missing id is 0")
    values: npt.NDArray[Any] = column.to_numpy()
    return values


def _bad_id(place: _RowGroup, row: int, feature: str, value: int, table: str, size: int) -> NoReturn:
    _bad(place, row, f"feature '{feature}' has id {value}, outside of table '{table}' with {size} rows (0..{size - 1})")


def _bad(place: _RowGroup, row: int, what: str) -> NoReturn:
    raise DataError(f"{place.path}: row {place.row_in_file + row}: {what}. {_REMEDY}")
