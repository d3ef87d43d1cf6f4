"""What a dataset folder holds, in figures: one pass over its parts, in memory that does not grow with rows or ids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmlrec.errors import DataError
from mmlrec.hashing import mix64
from mmlrec.identity import check_part, check_vocabulary
from mmlrec.schema import SCENARIO_COLUMN, SPLITS, DatasetManifest, Feature, Part, Table, key_column, label_column
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place
from preprocessing.progress import progress
from preprocessing.workers import in_order, num_cores
from preprocessing.writing.output import REMEDY, check_files

_COUNT_BYTES = 512 << 20  # for the counts of single ids, over all features
_MAX_DISTINCT = 1 << 20
_MAX_LENGTH = 1 << 10  # lists as long as this or longer are counted together
_SAMPLE_ROWS = 100_000

IntArray = NDArray[np.int64]


class IdCounts:
    """Ids of one sparse or multi feature.

    Where the table is too large to count each id, its ids are cut into runs of `every`, and one random id of each run is
    counted: a sample of all ids in which frequent and rare ones have their share.

    Attributes:
        every: one id in this many is counted; 1 = all of them.
        fitted: the ids stand for values of train, so each but 0 is known; otherwise those are that occur in train.
        counts: occurrences of each counted id in train, [slots]; id 0 is left out.
        seen: whether it occurs in a scenario of train, [S, slots].
        lengths: train rows whose list is so long, [_MAX_LENGTH + 1]; all 1 for a sparse feature.
        base: the split that stands for train above; another one of data that are encoded like others and have no train.
    """

    def __init__(
        self, num_rows: int, num_scenarios: int, max_bytes: int, fitted: bool, splits: tuple[str, ...] = SPLITS
    ) -> None:
        self.fitted, self.base = fitted, splits[0]
        slots = max(max_bytes // (8 + num_scenarios), 1)
        self.every = max(-(-(num_rows - 1) // slots), 1)
        slots = -(-(num_rows - 1) // self.every)
        self.counts = np.zeros(slots, np.int64)
        self.seen = np.zeros((num_scenarios, slots), bool)
        self.lengths = np.zeros(_MAX_LENGTH + 1, np.int64)
        self._occurrences = dict.fromkeys(splits, 0)
        self._known = dict.fromkeys(splits, 0)
        self._zeros = dict.fromkeys(splits, 0)
        self._rows_without = self._num_rows = 0

    def add(self, split: str, ids: IntArray, lengths: IntArray | None, scenario: IntArray | None) -> None:
        """Count the ids of some rows; all of train come first.

        Args:
            ids: [occurrences], those of a row one behind the other.
            lengths: ids of each row, [rows]; None = one.
            scenario: of each row, [rows]; None = there are none.
        """
        known = ids != 0
        self._occurrences[split] += len(ids)
        self._zeros[split] += len(ids) - int(np.count_nonzero(known))
        self._known[split] += self._num_known(split, ids[known])
        if split != self.base:
            return
        if lengths is None:
            self.lengths[1] += len(ids)
            self._rows_without += int(np.count_nonzero(~known))
            self._num_rows += len(ids)
        else:
            self.lengths += np.bincount(np.minimum(lengths, _MAX_LENGTH), minlength=_MAX_LENGTH + 1)
            rows = np.repeat(np.arange(len(lengths)), lengths)
            self._rows_without += len(lengths) - int(np.count_nonzero(np.bincount(rows[known], minlength=len(lengths))))
            self._num_rows += len(lengths)
            scenario = None if scenario is None else scenario[rows]
        self._count(ids[known], None if scenario is None else scenario[known])

    def _num_known(self, split: str, ids: IntArray) -> int:
        """Occurrences of ids other than 0 that train knows; where that cannot be told all of them."""
        if split != self.base and not self.fitted and self.every == 1:
            return int(np.count_nonzero(self.counts[ids - 1]))
        return len(ids)

    def _count(self, ids: IntArray, scenario: IntArray | None) -> None:
        """Count ids of train other than 0."""
        slot = ids - 1
        if self.every > 1:
            run = slot // self.every
            chosen = slot % self.every == (mix64(run.view(np.uint64)) % np.uint64(self.every)).view(np.int64)
            slot = run[chosen]
            scenario = None if scenario is None else scenario[chosen]
        np.add.at(self.counts, slot, 1)
        if scenario is not None:
            self.seen[scenario, slot] = True

    @property
    def num_seen(self) -> int:
        """Distinct ids of train, id 0 left out; an estimate where `every` > 1."""
        return int(np.count_nonzero(self.counts)) * self.every

    @property
    def missing(self) -> float:
        """Share of train rows without an id: id 0 (missing or rare), or an empty list."""
        return self._rows_without / max(self._num_rows, 1)

    @property
    def mean_length(self) -> float:
        """Mean number of ids of a train row."""
        return self._occurrences[self.base] / max(self._num_rows, 1)

    def coverage(self, split: str) -> float | None:
        """Share of the id occurrences in valid or test that train knows. None when there are none, or it was not counted."""
        if not self._occurrences[split] or (not self.fitted and (self.every > 1 or self.base != "train")):
            return None
        return self._known[split] / self._occurrences[split]

    def unseen(self, split: str, missing: int | None) -> float | None:
        """Share of the values in valid or test that train does not know, missing ones left out. None where it cannot be told.

        Args:
            missing: ids 0 of the split that stand for no value: one for each such row, none in lists. None: unknown.
        """
        coverage = self.coverage(split)
        absent = missing if self.fitted else self._zeros[split]
        if coverage is None or absent is None or absent >= self._occurrences[split]:
            return None
        return 1 - self._known[split] / (self._occurrences[split] - absent)

    def overlap(self, a: int, b: int) -> float | None:
        """Share of the ids of scenario `a` that occur in scenario `b` as well, in train. None when `a` has none."""
        num_ids = np.count_nonzero(self.seen[a])
        return float(np.count_nonzero(self.seen[a] & self.seen[b]) / num_ids) if num_ids else None

    def by_rank(self, num_points: int = 200) -> tuple[NDArray[np.float64], IntArray]:
        """Ranks, evenly spaced on a log axis, and the counts there; the most frequent id has about rank 1."""
        ordered = np.sort(self.counts[self.counts > 0])[::-1]
        if not len(ordered):
            return np.zeros(0), ordered
        at = np.unique(np.geomspace(1, len(ordered), num_points).astype(np.int64)) - 1
        return (at * self.every + (self.every + 1) / 2).astype(np.float64), ordered[at]


class KeyCounts(IdCounts):
    """The same of a feature of a managed table, whose ids are keys: any int64.

    All are counted, or one in 2, 4, ... where there are many: those whose hash begins with so many zero bits.
    """

    def __init__(self, num_scenarios: int, max_bytes: int, splits: tuple[str, ...] = SPLITS) -> None:
        super().__init__(1, num_scenarios, max_bytes, False, splits)
        self._limit = min(max(max_bytes // (16 + num_scenarios), 1 << 10), _MAX_DISTINCT)
        self._hashes = np.zeros(0, np.uint64)  # of the keys that are counted, ascending
        self._compared = dict.fromkeys(splits, 0)

    def coverage(self, split: str) -> float | None:
        """See the base class; of the keys that are counted."""
        filled = self._occurrences[split] - self._zeros[split]
        if self.base != "train" or not self._compared[split]:
            return None
        return self._known[split] / self._compared[split] * filled / self._occurrences[split]

    def unseen(self, split: str, missing: int | None) -> float | None:
        """See the base class; of the keys that are counted."""
        coverage = self.coverage(split)
        return None if coverage is None else 1 - self._known[split] / self._compared[split]

    def _num_known(self, split: str, ids: IntArray) -> int:
        hashes = self._chosen(mix64(ids.view(np.uint64)))
        self._compared[split] += len(hashes)
        return len(hashes) if split == self.base else int(np.count_nonzero(np.isin(hashes, self._hashes)))

    def _count(self, ids: IntArray, scenario: IntArray | None) -> None:
        hashes = mix64(ids.view(np.uint64))
        every, at = np.unique(np.concatenate([self._hashes, hashes]), return_inverse=True)
        before, now = at[: len(self._hashes)], at[len(self._hashes) :]
        counts, seen = np.bincount(now, minlength=len(every)), np.zeros((len(self.seen), len(every)), bool)
        counts[before] += self.counts
        seen[:, before] = self.seen
        if scenario is not None:
            seen[scenario, now] = True
        kept = len(self._chosen(every))
        while kept > self._limit:
            self.every *= 2
            kept = len(self._chosen(every))
        self._hashes, self.counts, self.seen = every[:kept], counts[:kept], seen[:, :kept]

    def _chosen(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Those of the keys that are counted; of ascending ones the first."""
        return hashes[hashes <= np.uint64((2**64 - 1) // self.every)]


@dataclass
class NumberCounts:
    """Values of one dense feature as they are written, float32.

    Attributes:
        rows, total, zeros: split -> rows, sum of the values, rows with exactly 0, the missing ones among them.
        low, high: least and greatest value of train.
        base: the split that stands for train here.
        sample: train values; rows are shuffled on disk, so the first ones are a random sample.
    """

    base: str = "train"
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    total: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    zeros: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    low: float = float("inf")
    high: float = float("-inf")
    sample: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, split: str, values: NDArray[np.float32]) -> None:
        """Count the values of some rows."""
        if split == self.base and len(values):
            if self.rows[split] < _SAMPLE_ROWS:
                self.sample.append(values[: _SAMPLE_ROWS - self.rows[split]].copy())
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.rows[split] += len(values)
        self.total[split] += float(values.sum(dtype=np.float64))
        self.zeros[split] += int(np.count_nonzero(values == 0))


class Distinct:
    """Distinct int64 values: exact up to 2^20 of them, beyond that from the share whose hash begins with `level` zero bits.

    Adaptive sampling: Flajolet, "On adaptive sampling", Computing 43, 1990; the hash has no collisions. About .1 % exact.
    """

    def __init__(self) -> None:
        self._level = 0
        self._hashes = np.zeros(0, np.uint64)  # sorted
        self._waiting: list[NDArray[np.uint64]] = []
        self._num_waiting = 0

    def add(self, values: IntArray) -> None:
        """Take note of some values."""
        hashes = np.unique(mix64(values.view(np.uint64)))
        self._waiting.append(self._below(hashes, self._level))
        self._num_waiting += len(self._waiting[-1])
        if self._num_waiting > max(len(self._hashes), 1 << 16):
            self._merge()

    def count(self) -> int:
        """How many there are."""
        self._merge()
        return len(self._hashes) << self._level

    def share_in(self, other: Distinct) -> float:
        """Share of the values that are also among those of `other`."""
        self._merge()
        other._merge()
        level = max(self._level, other._level)
        mine = self._below(self._hashes, level)
        return float(np.isin(mine, self._below(other._hashes, level), assume_unique=True).mean()) if len(mine) else 0.0

    def _merge(self) -> None:
        self._hashes = np.unique(np.concatenate([self._hashes, *self._waiting]))
        self._waiting, self._num_waiting = [], 0
        while len(self._hashes) > _MAX_DISTINCT:
            self._level += 1
            self._hashes = self._below(self._hashes, self._level)

    @staticmethod
    def _below(hashes: NDArray[np.uint64], level: int) -> NDArray[np.uint64]:
        return hashes[: np.searchsorted(hashes, np.uint64(1 << (64 - level)))] if level else hashes


@dataclass(frozen=True)
class Description:
    """What `describe` has found.

    Attributes:
        ids: sparse or multi feature -> its ids. numbers: dense feature -> its values.
        groups: split -> values of the group key; None without one.
        splits: train first. base: the first of them.
        examples: the first train rows, decoded: column -> value.
    """

    folder: Place
    manifest: DatasetManifest
    ids: dict[str, IdCounts]
    numbers: dict[str, NumberCounts]
    groups: dict[str, Distinct] | None
    examples: list[dict[str, Any]]

    @property
    def splits(self) -> tuple[str, ...]:
        """See above."""
        return split_names(self.manifest)

    @property
    def base(self) -> str:
        """See above."""
        return self.splits[0]


def split_names(manifest: DatasetManifest) -> tuple[str, ...]:
    """The splits, train first."""
    return tuple(sorted(manifest.splits, key=lambda name: name != "train"))


def describe(folder: Place, num_examples: int) -> Description:
    """Read a dataset folder through.

    Raises:
        DataError: it is no dataset, or a part is missing, cut or damaged.
    """
    manifest = DatasetManifest.load(folder)
    _check_files(folder, manifest)
    num_scenarios, splits = len(manifest.scenario.values) if manifest.scenario else 0, split_names(manifest)
    max_bytes = _COUNT_BYTES // max(len(manifest.sparse_features), 1)
    ids: dict[str, IdCounts] = {}
    tables = manifest.by_name
    for feature in manifest.sparse_features:
        table = tables[str(feature.table)]
        fitted = table.vocabulary is not None and not manifest.parity
        if table.managed:
            ids[feature.name] = KeyCounts(num_scenarios, max_bytes, splits)
        else:
            ids[feature.name] = IdCounts(table.num_rows, num_scenarios, max_bytes, fitted, splits)
    numbers = {f.name: NumberCounts(splits[0]) for f in manifest.dense_features}
    groups = {split: Distinct() for split in splits} if manifest.group_key else None
    with progress(f"{manifest.name}: read", sum(split.num_rows for split in manifest.splits.values())) as done:
        for split, part, rows in _row_groups(folder, manifest):
            scenario = rows[SCENARIO_COLUMN].to_numpy() if manifest.scenario else None
            if scenario is not None and len(scenario) and not 0 <= scenario.min() <= scenario.max() < num_scenarios:
                raise DataError(f"{folder / part.path}: scenarios must lie in 0..{num_scenarios - 1}. {REMEDY}")
            for feature in manifest.sparse_features:
                found, lengths = _ids(folder / part.path, rows, feature, tables[str(feature.table)])
                ids[feature.name].add(split, found, lengths, scenario)
            for name, counts in numbers.items():
                counts.add(split, rows[name].to_numpy())
            if groups is not None:
                groups[split].add(rows[key_column(str(manifest.group_key))].drop_null().to_numpy())
            done.update(rows.num_rows)
    return Description(folder, manifest, ids, numbers, groups, _examples(folder, manifest, num_examples))


def _check_files(folder: Place, manifest: DatasetManifest) -> None:
    check_files(folder, manifest)
    for table in manifest.tables:
        if table.vocabulary is not None:
            path = folder / table.vocabulary
            num_rows = _metadata(path).num_rows
            if num_rows != table.num_rows - 1:
                raise _damaged(path, f"{num_rows} rows, {table.num_rows - 1} are listed")
            if manifest.encoding is not None:
                check_vocabulary(path, manifest.encoding.tables.get(table.name, {}))
    parts = [part for split in manifest.splits.values() for part in split.parts]

    def check(part: Part) -> int:
        check_part(folder, part)
        return part.num_bytes

    with progress(f"{manifest.name}: check", sum(part.num_bytes for part in parts), "bytes") as done:
        for num_bytes in in_order(check, iter(parts), num_cores()):
            done.update(num_bytes)


def _metadata(path: Place, num_bytes: int = 0, sha256: str = "") -> pq.FileMetaData:
    try:
        with open_parquet(path, num_bytes, sha256) as file:
            return file.metadata
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _row_groups(folder: Place, manifest: DatasetManifest) -> Iterator[tuple[str, Part, pa.RecordBatch]]:
    """Split, part and rows of all row groups, with the columns that are counted; some are read ahead."""
    names = [f.name for f in manifest.features]
    names += [SCENARIO_COLUMN] if manifest.scenario else []
    names += [key_column(manifest.group_key)] if manifest.group_key else []

    def jobs() -> Iterator[tuple[str, Part, int]]:
        for name in split_names(manifest):
            for part in manifest.splits[name].parts:
                metadata = _metadata(folder / part.path, part.num_bytes, part.sha256)
                if metadata.num_rows != part.num_rows:
                    raise _damaged(folder / part.path, f"{metadata.num_rows} rows, {part.num_rows} are listed")
                for group in range(metadata.num_row_groups):
                    yield name, part, group

    def read(job: tuple[str, Part, int]) -> tuple[str, Part, pa.RecordBatch]:
        name, part, group = job
        try:
            with open_parquet(folder / part.path, part.num_bytes, part.sha256) as file:
                table = file.read_row_group(group, columns=names, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(folder / part.path, error) from error
        if missing := set(names) - set(table.column_names):
            raise _damaged(folder / part.path, f"column {min(missing)} is missing")
        (rows,) = table.combine_chunks().to_batches()
        return name, part, rows

    return in_order(read, jobs(), num_cores())


def _damaged(path: Place, why: object) -> DataError:
    return DataError(f"{path} is damaged: {why}. {REMEDY}")


def _ids(path: Place, rows: pa.RecordBatch, feature: Feature, table: Table) -> tuple[IntArray, IntArray | None]:
    """Ids of a feature, [occurrences], and those of a row counted, [rows]; None for one id a row."""
    column = rows[feature.name]
    multi = feature.kind == "multi"
    values = (column.flatten() if multi else column).to_numpy()
    if len(values) and not table.managed and not 0 <= values.min() <= values.max() < table.num_rows:
        raise _damaged(path, f"ids of {feature.name} must lie in 0..{table.num_rows - 1}")
    return values, column.value_lengths().to_numpy() if multi else None


def _examples(folder: Place, manifest: DatasetManifest, num_rows: int) -> list[dict[str, Any]]:
    """The first train rows with raw values for ids and numbers."""
    part = manifest.splits[split_names(manifest)[0]].parts[0]
    with open_parquet(folder / part.path, part.num_bytes, part.sha256) as file:
        table = next(file.iter_batches(max(num_rows, 1))).slice(0, num_rows)
    rows = table.to_pylist()
    names = {table.name: [f for f in manifest.sparse_features if f.table == table.name] for table in manifest.tables}
    for name, features in names.items():
        wanted = {i for f in features for row in rows for i in _listed(row[f.name])} - {0}
        raw = _raw_values(folder, manifest, name, wanted)
        for row in rows:
            for f in features:
                found = [raw.get(i) for i in _listed(row[f.name])]
                row[f.name] = found if f.kind == "multi" else found[0]
    for name, bounds in (manifest.preprocessing.get("dense_ranges") or {}).items():
        for row in rows:
            row[name] = row[name] * (bounds[1] - bounds[0]) + bounds[0] if bounds else None
    order = [f.name for f in manifest.features] + [label_column(task.name) for task in manifest.tasks]
    if manifest.scenario:
        order.append(SCENARIO_COLUMN)
        for row in rows:
            row[SCENARIO_COLUMN] = manifest.scenario.values[row[SCENARIO_COLUMN]]
    order += [key_column(key) for key in manifest.keys]
    return [{name: row[name] for name in order} for row in rows]


def _listed(ids: int | list[int]) -> list[int]:
    return ids if isinstance(ids, list) else [ids]


def _raw_values(folder: Place, manifest: DatasetManifest, name: str, wanted: set[int]) -> dict[int, Any]:
    """Raw values of some ids of a table, which are in the order of ids; without a vocabulary, the ids themselves."""
    table = manifest.table(name)
    vocabulary = table.vocabulary
    if table.managed:
        return {i: f"key {i % 2**64:016x}" for i in wanted}
    if vocabulary is None:
        hashed = table.hash_seed is not None
        return {i: f"hash {i}" if hashed else i for i in wanted}
    found: dict[int, Any] = {}
    first = 1
    try:
        with open_parquet(folder / vocabulary) as file:
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                if here := [i for i in wanted if first <= i < end]:
                    values = file.read_row_group(group, columns=["value"])["value"]
                    borders = pa.types.is_floating(values.type)  # the least numbers of buckets
                    raw = {i: values[i - first].as_py() for i in here}
                    found |= {i: f"{value:.6g} or more" if borders else value for i, value in raw.items()}
                first = end
    except (OSError, pa.ArrowException) as error:
        raise _damaged(folder / vocabulary, error) from error
    return found
