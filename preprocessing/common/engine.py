"""From a dataset's canonical rows to a dataset folder, in passes of constant memory (vocabularies excepted).

1. raw files -> canonical rows, spilled to disk and counted;
2. each row gets its position by a seeded permutation; rows of the train positions are counted for the vocabularies; all go
   into buckets by position;
3. bucket by bucket: sort, encode, write to train (first 80 % of the positions), valid (10 %) or test.

A dataset that comes shuffled and encoded (`split = "in_order"`) takes the third pass only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.errors import DataError
from mmlrec.schema import (
    SCENARIO_COLUMN,
    SPLITS,
    DatasetManifest,
    Feature,
    Split,
    key_column,
)
from preprocessing.common.dataset import Dataset
from preprocessing.common.encoder import Encoder, ValueCounter
from preprocessing.common.output import new_folder
from preprocessing.common.parts import SplitWriter, row_group_size
from preprocessing.common.permutation import RowPermutation, split_ends
from preprocessing.common.progress import progress
from preprocessing.common.raw_files import RawFolder
from preprocessing.common.shuffle import BucketSort, RowSpill

NUM_LANES = 8


def build(dataset: Dataset, raw: RawFolder, out: Path, *, seed: int, parity: bool, options: dict[str, Any]) -> DatasetManifest:
    """Make the dataset folder `out`, whole or not at all.

    Args:
        seed: of the permutation.
        parity: fit on all rows, in the order of raw values, as the reference benchmark does.
        options: the resolved options, recorded in the manifest.

    Raises:
        DataError: bad raw data, or a place that cannot be written.
    """
    with new_folder(out) as folder:
        encoder = Encoder(dataset.features, parity)
        statistics: dict[str, Any] = {}
        if dataset.split == "in_order":
            assert not encoder.needs_fitting, "a dataset split in order comes encoded"
            num_rows = dataset.num_rows
            encoded = _in_order(dataset, raw, encoder)
        else:
            rows = _spill(dataset, raw, folder)
            num_rows = rows.num_rows
            sorter = _distribute(dataset, rows, num_rows, folder, encoder, seed, parity, statistics)
            encoded = ((start, encoder.encode(batch)) for start, batch in sorter.batches())
        if num_rows < 10:
            raise DataError(f"{dataset.name}: {num_rows} rows are too few to be split 8:1:1; give at least 10.")
        group_rows = row_group_size(split_ends(num_rows)[0], NUM_LANES)
        splits = _write(dataset, encoded, num_rows, group_rows, folder)
        encoder.save(folder / "vocab")
        statistics = _statistics(dataset, splits) | statistics | dataset.statistics()
        manifest = DatasetManifest(
            name=dataset.name,
            tables=encoder.tables(),
            features=[Feature(name=f.name, kind=f.kind, table=f.table) for f in dataset.features],
            tasks=list(dataset.tasks),
            scenario=dataset.scenario,
            keys=list(dataset.keys),
            group_key=dataset.group_key,
            num_lanes=NUM_LANES,
            row_group_size=group_rows,
            splits=splits,
            raw_files=raw.sha256(),
            terms=dataset.terms,
            parity=parity,
            statistics=statistics,
            preprocessing=options | {"dense_ranges": encoder.dense_ranges()},
        )
        manifest.save(folder)
    return manifest


def _spill(dataset: Dataset, raw: RawFolder, folder: Path) -> RowSpill:
    rows = RowSpill(folder / "canonical.arrow", dataset.canonical_schema())
    with progress(f"{dataset.name}: read") as done:
        for batch in dataset.batches(raw):
            _check_canonical(dataset, batch)
            rows.add(batch)
            done.update(batch.num_rows)
    return rows


def _check_canonical(dataset: Dataset, batch: pa.RecordBatch) -> None:
    """A literal nan or inf is a bad row: only an empty cell means missing."""
    for feature in dataset.features:
        if feature.kind == "dense" and pc.all(pc.is_finite(batch.column(feature.name))).as_py() is False:
            raise DataError(
                f"{dataset.name}: feature '{feature.name}' holds nan or inf; leave the cell empty where the value is missing."
            )


def _distribute(
    dataset: Dataset,
    rows: RowSpill,
    num_rows: int,
    folder: Path,
    encoder: Encoder,
    seed: int,
    parity: bool,
    statistics: dict[str, Any],
) -> BucketSort:
    permutation = RowPermutation(num_rows, seed)
    sorter = BucketSort(folder, dataset.canonical_schema(), num_rows)
    groups = _GroupsPerScenario(dataset)
    train_end = num_rows if parity else split_ends(num_rows)[0]
    start = 0
    with progress(f"{dataset.name}: shuffle, count values", num_rows) as done:
        for batch in rows.batches():
            positions = permutation.positions(start, start + batch.num_rows)
            encoder.fit(batch.filter(pa.array(positions < train_end)))
            groups.add(batch)
            sorter.add(batch, positions)
            start += batch.num_rows
            done.update(batch.num_rows)
    encoder.freeze()
    statistics |= groups.statistics()
    return sorter


def _in_order(dataset: Dataset, raw: RawFolder, encoder: Encoder) -> Iterator[tuple[int, pa.RecordBatch]]:
    start = 0
    for batch in dataset.batches(raw):
        yield start, encoder.encode(batch)
        start += batch.num_rows
    assert start == dataset.num_rows, f"{start} rows were generated, {dataset.num_rows} announced"


def _write(
    dataset: Dataset, encoded: Iterator[tuple[int, pa.RecordBatch]], num_rows: int, group_rows: int, folder: Path
) -> dict[str, Split]:
    writers = [SplitWriter(folder, name, group_rows, dataset.tasks, dataset.scenario) for name in SPLITS]
    train_end, valid_end = split_ends(num_rows)
    borders = [(0, train_end), (train_end, valid_end), (valid_end, num_rows)]
    with progress(f"{dataset.name}: encode, write", num_rows) as done:
        for start, batch in encoded:
            for writer, (low, high) in zip(writers, borders, strict=True):
                first, last = max(low, start), min(high, start + batch.num_rows)
                if first < last:
                    writer.write(batch.slice(first - start, last - first))
            done.update(batch.num_rows)
    return {name: writer.close() for name, writer in zip(SPLITS, writers, strict=True)}


class _GroupsPerScenario:
    """Distinct groups (users) of each scenario, over all splits."""

    def __init__(self, dataset: Dataset) -> None:
        self._group, self._scenario = dataset.group_key, dataset.scenario
        values = dataset.scenario.values if dataset.scenario and dataset.group_key else []
        self._counters = {value: ValueCounter(dataset.keys[str(dataset.group_key)]) for value in values}

    def add(self, rows: pa.RecordBatch) -> None:
        if self._counters:
            scenario = rows.column(SCENARIO_COLUMN)
            for index, counter in enumerate(self._counters.values()):
                counter.add(rows.column(key_column(str(self._group))).filter(pc.equal(scenario, index)))

    def statistics(self) -> dict[str, dict[str, int]]:
        if not self._counters:
            return {}
        return {f"scenario_{self._group}s": {value: len(counter.counts()) for value, counter in self._counters.items()}}


def _statistics(dataset: Dataset, splits: dict[str, Split]) -> dict[str, Any]:
    """Rows, rows of each scenario, and label rates over the three splits together."""
    names = ["all", *(dataset.scenario.values if dataset.scenario else [])]
    rates: dict[str, dict[str, float | None]] = {}
    for task in dataset.tasks:
        counts = {n: np.sum([split.label_counts[task.name][n] for split in splits.values()], axis=0) for n in names}
        rates[task.name] = {n: float(positive / labelled) if labelled else None for n, (labelled, positive) in counts.items()}
    found: dict[str, Any] = {"rows": sum(split.num_rows for split in splits.values()), "label_rates": rates}
    if dataset.scenario:
        found["scenario_rows"] = {n: sum(split.scenario_rows[n] for split in splits.values()) for n in names[1:]}
    return found
