"""Raw values to ids and scaled numbers: counted on some rows, frozen, then applied to all."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.encoding import columns as frozen
from mmlrec.encoding.vocabularies import Vocabularies
from mmlrec.errors import DataError
from mmlrec.exact_sums import exact_sum
from mmlrec.hashing import bucket_ids, hash_ids, key_ids
from mmlrec.schema import SCENARIO_COLUMN, WEIGHT_COLUMN, Table, label_column
from preprocessing.dataset import Column, Dataset
from preprocessing.encoding.buckets import CollisionCounter, QuantileBuckets
from preprocessing.encoding.fitted import Fitted
from preprocessing.encoding.ranking import VocabularyFile
from preprocessing.split_rules import SIDE_COLUMN

_ALL_HASHES = 1 << 63


class ValueCounter:
    """Counts of distinct raw values; memory grows with the distinct values, not with the rows."""

    def __init__(self, raw_type: pa.DataType) -> None:
        schema = pa.schema([("value", raw_type), ("count", pa.int64())])
        self._merged = schema.empty_table()
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def add(self, values: pa.Array) -> None:
        """Count an array of raw values; nulls are left out."""
        counts = pc.value_counts(values.drop_null())
        self._pending.append(pa.table({"value": counts.field(0), "count": counts.field(1)}, schema=self._merged.schema))
        self._pending_rows += len(counts)
        if self._pending_rows > max(len(self._merged), 1 << 18):
            self._merge()

    def merge(self, other: ValueCounter) -> None:
        """Add what another one has counted."""
        self._pending.append(other.counts())
        self._pending_rows += len(self._pending[-1])
        self._merge()

    def counts(self) -> pa.Table:
        """Distinct values and their counts: columns `value` and `count` (int64), in no particular order."""
        self._merge()
        return self._merged

    def _merge(self) -> None:
        every = pa.concat_tables([self._merged, *self._pending])
        summed = every.group_by("value").aggregate([("count", "sum")])
        self._merged = summed.select(["value", "count_sum"]).rename_columns(["value", "count"])
        self._pending, self._pending_rows = [], 0


class Vocabulary:
    """Ids 1..V-1 of raw values; id 0 = missing, rare or unseen.

    Ids go by descending count, ties by raw value; in the parity form by raw value alone (numeric order for integers, byte
    order for strings), as a label encoder gives.

    Args:
        counts: of values, as `ValueCounter` gives them.
        known: entries whose ids stay, `value` and `count` in the order of their ids; others stand behind. What was counted of
            them is added to their counts.
    """

    def __init__(self, counts: pa.Table, min_count: int, parity: bool, known: pa.Table | None = None) -> None:
        if known is not None:
            known = known.cast(counts.schema)
            values = known["value"].combine_chunks()
            more = pc.index_in(values, value_set=counts["value"].combine_chunks())
            of_known = pc.add(known["count"], pc.take(counts["count"], more).fill_null(0))
            known = pa.table({"value": values, "count": of_known})
            counts = counts.filter(pc.invert(pc.is_in(counts["value"], value_set=values)))
        kept = counts.filter(pc.greater_equal(counts["count"], min_count))
        order = [("value", "ascending")] if parity else [("count", "descending"), ("value", "ascending")]
        kept = kept.sort_by(order)
        self._entries = (kept if known is None else pa.concat_tables([known, kept])).combine_chunks()
        self._values = self._entries["value"].combine_chunks()

    @cached_property
    def _ids(self) -> Vocabularies:
        """What finds few values among many entries; made when it is first asked, as it takes longer than all else here."""
        return Vocabularies.of({"": [self._values]})

    @property
    def num_rows(self) -> int:
        """Rows of the table, row 0 included."""
        return len(self._entries) + 1

    def encode(self, values: pa.Array) -> pa.Array:
        """Ids of raw values, int64, without nulls."""
        # Arrow hashes the whole vocabulary anew at each call: cheaper where it has no more entries than there are values.
        if len(self._values) <= len(values):
            found = pc.index_in(values, value_set=self._values).cast(pa.int64())
            return pc.add(found, 1).fill_null(0)
        return pa.array(self._ids.look_up("", values))

    def save(self, path: Path) -> None:
        """Write columns `value`, `id` (int64) and `count` (int64), in the order of ids."""
        file = VocabularyFile(path, self._values.type)
        file.add(self._entries)
        file.close()


@dataclass
class DenseRange:
    """Least and greatest value seen of a dense feature."""

    low: float = field(default=float("inf"))
    high: float = field(default=float("-inf"))

    def add(self, values: pa.Array) -> None:
        """Widen the range by an array; nulls are left out."""
        found = pc.min_max(values)
        if found["min"].is_valid:
            self.low, self.high = min(self.low, found["min"].as_py()), max(self.high, found["max"].as_py())

    def merge(self, other: DenseRange) -> None:
        """Widen the range by what another one has seen."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    @property
    def scaling(self) -> list[float] | None:
        """Least and greatest value as float64, or None where all becomes 0: equal for ranges that scale alike."""
        return [self.low + 0.0, self.high + 0.0] if 0 < self.high - self.low < float("inf") else None  # -0 is 0

    def scale(self, values: pa.Array) -> pa.Array:
        """Min-max scaled and clipped to [0, 1], float32; null becomes 0, and so does all when the range is empty or a point."""
        return pa.array(frozen.scaled(values, (self.low, self.high) if self.scaling else None))


class Mean:
    """Mean of the values seen of a dense feature. Sums are exact, so that it hangs neither on their order nor on the engine."""

    def __init__(self) -> None:
        self._sum = Fraction(0)
        self._count = 0

    @classmethod
    def known(cls, value: float) -> Mean:
        """One that was found before."""
        mean = cls()
        mean._sum, mean._count = Fraction(value), 1
        return mean

    def add(self, values: pa.Array) -> None:
        """Take in an array; nulls are left out."""
        numbers = values.drop_null().cast(pa.float64()).to_numpy()
        self._sum += exact_sum(numbers)
        self._count += len(numbers)

    def merge(self, other: Mean) -> None:
        """Take in what another one has seen."""
        self._sum += other._sum
        self._count += other._count

    def value(self) -> float:
        """The mean; 0 where there is no value."""
        return float(self._sum / self._count) if self._count else 0.0


class Encoder:
    """Fits vocabularies and ranges with `fit`, freezes them with `freeze`, turns canonical rows into ids with `encode`.

    Args:
        given: fitted parts, of a dataset with the same features, that are not to be found. Its vocabularies are read by
            `freeze`, all of them into memory.
    """

    def __init__(self, features: tuple[Column, ...], parity: bool, given: Fitted | None = None) -> None:
        self._features = features
        self.parity = parity
        self.given = given
        #: Whether values get ids that had none; whether what is found of numbers is given.
        self.grows, self._numbers_given = given is None or given.grows, given is not None and not given.refit_ranges
        self.fitted = [f for f in features if f.has_vocabulary]
        counted = self.fitted if self.grows else []
        self._counters = {f.table: ValueCounter(f.raw_type) for f in counted}
        self.ranges = {f.name: DenseRange() for f in features if f.scaled}
        self.means = {f.name: Mean() for f in features if f.fill == "mean"}
        self.buckets = {f.name: QuantileBuckets(f.num_buckets) for f in features if f.num_buckets}
        if given is not None and not given.refit_ranges:
            self.ranges = {name: DenseRange(*given.ranges[name] or ()) for name in self.ranges}
            self.means = {name: Mean.known(given.fills[name]) for name in self.means}
            self.buckets = {
                name: QuantileBuckets.known(given.vocabulary(name).table()["value"].combine_chunks()) for name in self.buckets
            }
        self._collisions = {
            f.table: CollisionCounter(f.hashing.num_buckets, f.hashing.num_hashes) for f in features if f.hashing
        }
        # With so many buckets as there are hashes, what it counts are the distinct values.
        self._keyed = {f.table: CollisionCounter(_ALL_HASHES, 1) for f in features if f.managed}
        #: Table -> vocabulary in memory; of those that coder.py writes only `num_rows` is kept.
        self.vocabularies: dict[str, Vocabulary] = {}
        self.num_rows: dict[str, int] = {}

    @property
    def needs_fitting(self) -> bool:
        """Whether anything that encodes a feature is found by counting."""
        return bool(self._counters or self.ranges or self.means or self.buckets)

    def fit(self, rows: pa.RecordBatch) -> None:
        """Count the values of these canonical rows."""
        for feature in self.fitted if self.grows else ():
            column = rows.column(feature.name)
            self._counters[feature.table].add(column.flatten() if feature.kind == "multi" else column)
        self.fit_numbers(rows)

    def fit_numbers(self, rows: pa.RecordBatch) -> None:
        """Take note of all that needs no vocabulary."""
        for name, counter in self._number_counters():
            counter.add(rows.column(name))
        for feature in self._features:
            if feature.hashing:
                column = rows.column(feature.name)
                values = (column.flatten() if feature.kind == "multi" else column).drop_null()
                self._collisions[feature.table].add(hash_ids(values, feature.hashing.seed))
            elif feature.managed:
                column = rows.column(feature.name)
                values = (column.flatten() if feature.kind == "multi" else column).drop_null()
                self._keyed[feature.table].add(hash_ids(values, feature.managed.seed))

    def counters(self) -> list[Any]:
        """All that `fit` counts with: each has a method `merge`, which adds what the one of another encoder has counted."""
        numbers = [counter for _, counter in self._number_counters()]
        return [*self._counters.values(), *numbers, *self._collisions.values(), *self._keyed.values()]

    def _number_counters(self) -> list[tuple[str, DenseRange | Mean | QuantileBuckets]]:
        """Feature and what is found of its numbers; nothing where that is given."""
        return [] if self._numbers_given else [*self.ranges.items(), *self.means.items(), *self.buckets.items()]

    def freeze(self) -> None:
        """Turn the counts, and what is given, into vocabularies and buckets."""
        for feature in self.fitted:
            table = str(feature.table)
            if table in self.vocabularies:
                continue
            counter = self._counters.get(table, ValueCounter(feature.raw_type))
            known = self.given.vocabulary(table).table() if self.given else None
            self.vocabularies[table] = Vocabulary(counter.counts(), self.min_count(feature), self.parity, known)
            self.num_rows[table] = self.vocabularies[table].num_rows
        self._counters.clear()
        for buckets in self.buckets.values():
            buckets.freeze()

    def min_count(self, feature: Column) -> int:
        """How often a value must be seen to have an id."""
        return 1 if self.parity else feature.min_count

    def encode(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The same rows with ids int64, lists of ids list<int64>, dense float32; other columns untouched."""
        encoded = {f.name: self.encode_column(f, rows.column(f.name)) for f in self._features}
        others = {name: rows.column(name) for name in rows.schema.names if name not in encoded}
        return pa.RecordBatch.from_pydict(encoded | others)

    def tables(self) -> list[Table]:
        """The tables of the manifest, in order of first use."""
        found: dict[str, Table] = {}
        for f in self._features:
            if f.table is not None and f.table not in found:
                if f.hashing:
                    rows, seed, num_hashes = f.hashing.num_buckets + 1, f.hashing.seed, f.hashing.num_hashes
                    found[f.table] = Table(name=f.table, num_rows=rows, hash_seed=seed, num_hashes=num_hashes)
                elif f.managed:
                    rows, seed = f.managed.slots + 1, f.managed.seed
                    found[f.table] = Table(name=f.table, num_rows=rows, hash_seed=seed, managed=True)
                elif f.num_ids is None:
                    rows = self.buckets[f.name].num_rows if f.num_buckets else self.num_rows[f.table]
                    found[f.table] = Table(name=f.table, num_rows=rows, vocabulary=f"vocab/{f.table}.parquet")
                else:
                    found[f.table] = Table(name=f.table, num_rows=f.num_ids + 1)
        return list(found.values())

    def collisions(self) -> dict[str, dict[str, float]]:
        """Table with hashed ids -> how often values of the train rows share their ids; see `CollisionCounter`."""
        return {str(table): counter.result() for table, counter in self._collisions.items()}

    def distinct_keys(self) -> dict[str, dict[str, float]]:
        """Managed table -> `values`, distinct ones of the train rows; with `counted_one_in` where not all were counted."""
        found = {str(table): counter.result() for table, counter in self._keyed.items()}
        return {table: {key: of[key] for key in ("values", "counted_one_in") if key in of} for table, of in found.items()}

    def dense_ranges(self) -> dict[str, list[float] | None]:
        """Least and greatest train value of each scaled feature; None when all are missing."""
        return {name: [seen.low, seen.high] if seen.low <= seen.high else None for name, seen in self.ranges.items()}

    def dense_fills(self) -> dict[str, float]:
        """What a missing value of a dense feature becomes before it is scaled, where that is not simply written as 0."""
        fills = {f.name: f.fill for f in self._features if f.fill is not None}
        return {name: self.means[name].value() if isinstance(fill, str) else fill for name, fill in fills.items()}

    def fitted_numbers(self) -> dict[str, dict[str, Any]]:
        """For the manifest: `dense_ranges`, and `dense_fills` where there are any."""
        fills = self.dense_fills()
        return {"dense_ranges": self.dense_ranges()} | ({"dense_fills": fills} if fills else {})

    def save(self, folder: Path) -> None:
        """Write `<table>.parquet` for each vocabulary and each feature in buckets; what is given and stays is copied."""
        folder.mkdir(exist_ok=True)
        for fitted, given in ((self.vocabularies, not self.grows), (self.buckets, self._numbers_given)):
            for table, entries in fitted.items():
                if given and self.given is not None:
                    self.given.vocabulary(table).copy(folder / f"{table}.parquet")
                else:
                    entries.save(folder / f"{table}.parquet")

    def encode_column(self, feature: Column, values: pa.Array) -> pa.Array:
        """A column of `encode`."""
        if feature.kind == "dense":
            if feature.fill is not None and values.null_count:
                values = frozen.filled(values, self.dense_fills()[feature.name])
            return self.ranges[feature.name].scale(values) if feature.scaled else values.fill_null(0.0)
        if feature.kind == "multi":
            ids_a_value = feature.hashing.num_hashes if feature.hashing else 1
            ids, offsets = frozen.list_ids(values, lambda elements: self._ids(feature, elements).to_numpy(), ids_a_value)
            return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids))
        return self._ids(feature, values)

    def _ids(self, feature: Column, values: pa.Array) -> pa.Array:
        if feature.hashing:
            hashing = feature.hashing
            return pa.array(bucket_ids(values, hashing.seed, hashing.num_buckets, hashing.num_hashes).ravel())
        if feature.managed:
            return pa.array(key_ids(values, feature.managed.seed))
        if feature.num_buckets:
            return self.buckets[feature.name].encode(values)
        if feature.num_ids is None:
            return self.vocabularies[str(feature.table)].encode(values)
        return pa.array(frozen.given_ids(values, feature.num_ids, feature.name))


def check_canonical(dataset: Dataset, batch: pa.RecordBatch) -> None:
    """A literal nan or inf is a bad row: only an empty cell means missing. Labels and scenarios are those declared.

    Raises:
        DataError: naming the column, and a value of a label, a weight or a scenario.
    """
    for feature in dataset.features:
        if pa.types.is_floating(feature.raw_type) and pc.all(pc.is_finite(batch.column(feature.name))).as_py() is False:
            raise DataError(
                f"{dataset.name}: feature '{feature.name}' holds nan or inf; leave the cell empty where the value is missing."
            )
    for task in dataset.tasks:
        label = batch.column(label_column(task.name))
        binary = task.kind == "binary"
        good = pc.or_(pc.equal(label, 0), pc.equal(label, 1)) if binary else pc.is_finite(label)
        if found := _first_bad(label, good):
            must = "0 or 1" if binary else "a finite number"
            raise DataError(
                f"{dataset.name}: label of task '{task.name}' is {found}, must be {must}, or null (not nan) if it is missing."
            )
    if dataset.weighted:
        weight = batch.column(WEIGHT_COLUMN)
        good = pc.and_(pc.is_finite(weight), pc.greater_equal(weight, 0)).fill_null(False)
        if found := _first_bad(weight, good):
            raise DataError(f"{dataset.name}: {WEIGHT_COLUMN} is {found}, must be a number from 0 on.")
    if dataset.scenario is not None:
        scenario, count = batch.column(SCENARIO_COLUMN), len(dataset.scenario.values)
        good = pc.and_(pc.greater_equal(scenario, 0), pc.less(scenario, count)).fill_null(False)
        if found := _first_bad(scenario, good):
            raise DataError(
                f"{dataset.name}: {SCENARIO_COLUMN} is {found}, must be 0..{count - 1}, the place of the row's scenario in"
                f" {', '.join(dataset.scenario.values)}."
            )


def _first_bad(values: pa.Array, good: pa.BooleanArray) -> str | None:
    """The first value that is not good, in words; None where all are, or where that is not known (null)."""
    if pc.all(good).as_py() is not False:
        return None
    found = values.filter(pc.invert(good))[0]
    return str(found) if found.is_valid else "null"


def encoded_schema(dataset: Dataset) -> pa.Schema:
    """Of encoded rows: features first, then the other canonical columns, the side excepted."""
    kinds = {"sparse": pa.int64(), "multi": pa.list_(pa.int64()), "dense": pa.float32()}
    fields = {f.name: kinds[f.kind] for f in dataset.features}
    others = [field for field in dataset.canonical_schema() if field.name not in fields]
    fields |= {field.name: field.type for field in others if field.name != SIDE_COLUMN}
    return pa.schema(fields.items())
