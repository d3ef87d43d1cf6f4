"""From a dataset's rows to a dataset folder: the passes over the rows (passes.py), vocabularies, manifest.

A dataset that comes shuffled and encoded (`split = InOrder()`) is written as it comes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmlrec.errors import DataError
from mmlrec.schema import DatasetManifest, Feature
from mmlrec.storage.places import Place
from preprocessing.dataset import Dataset
from preprocessing.encoding.encoder import Encoder
from preprocessing.encoding.fitted import Fitted
from preprocessing.encoding.identity import check_given, encoding_of
from preprocessing.encoding.missing import MissingCounter
from preprocessing.encoding.row_hashes import row_hashes
from preprocessing.engines.passes import Memory, Passes
from preprocessing.progress import progress
from preprocessing.reading.raw_files import RawFolder
from preprocessing.split_rules import InOrder, split_names
from preprocessing.writing.copies import CopyCounter, marked
from preprocessing.writing.output import new_folder
from preprocessing.writing.parts import NUM_LANES, SplitWriter, Written, row_group_size
from preprocessing.writing.permutation import split_ends
from preprocessing.writing.summaries import Moments

MEMORY_BYTES = 4 << 30


def build(
    dataset: Dataset,
    raw: RawFolder,
    out: Place,
    *,
    seed: int,
    parity: bool,
    options: dict[str, Any],
    memory_bytes: int = MEMORY_BYTES,
    fitted: Fitted | None = None,
) -> DatasetManifest:
    """Make the dataset folder `out`, whole or not at all.

    Args:
        seed: of the permutation.
        parity: fit on all rows, in the order of raw values, as the reference benchmark does.
        options: the resolved options, recorded in the manifest.
        memory_bytes: that the process may take; the dataset does not depend on it.
        fitted: parts of another dataset that are taken, not found.

    Raises:
        ConfigError: the dataset does not fit to `fitted`.
        DataError: bad raw data, or a place that cannot be written.
    """
    if fitted is not None:
        check_given(dataset, fitted, parity, split_names(dataset.split), raw.workers)
    with new_folder(out) as folder:
        encoder = Encoder(dataset.features, parity, fitted)
        memory = Memory(memory_bytes, raw.workers)
        if isinstance(dataset.split, InOrder):
            assert fitted is None, "a dataset split in order has nothing fitted"
            assert not encoder.needs_fitting, "a dataset split in order comes encoded"
            if dataset.num_rows < 10:
                raise DataError(f"{dataset.name}: {dataset.num_rows} rows are too few to be split 8:1:1; give at least 10.")
            borders = [0, *split_ends(dataset.num_rows), dataset.num_rows]
            splits, statistics = _write_in_order(dataset, raw, encoder, borders, folder, memory)
        else:
            passes = Passes(dataset, raw, folder, encoder, seed, parity, memory)
            passes.read()
            statistics = passes.count()
            splits, more = passes.write()
            statistics |= more
        return complete(dataset, raw, folder, encoder, splits, statistics, parity, options)


def complete(
    dataset: Dataset,
    raw: RawFolder,
    folder: Path,
    encoder: Encoder,
    written: dict[str, Written],
    statistics: dict[str, Any],
    parity: bool,
    options: dict[str, Any],
) -> DatasetManifest:
    """Add the vocabularies and the manifest to `folder`, which holds the parts that are `written`.

    Args:
        statistics: further ones.
    """
    encoder.save(folder / "vocab")
    splits = {name: of_split.split for name, of_split in written.items()}
    statistics = _statistics(dataset, written) | statistics | dataset.statistics()
    if "train" in splits and (collisions := encoder.collisions()):
        statistics["hash_collisions"] = collisions
    if "train" in splits and (managed := encoder.distinct_keys()):
        statistics["managed_ids"] = managed
    if raw.bad_rows.counts:
        statistics["bad_rows"] = raw.bad_rows.counts
    if raw.passed_over:
        statistics["passed_over"] = raw.passed_over
    encoding = encoding_of(dataset, encoder, folder, raw.workers)
    if encoder.given is not None and encoder.given.frozen:
        assert encoding.digest == encoder.given.encoding.digest, "what is given has not stayed as it was"
    manifest = DatasetManifest(
        name=dataset.name,
        tables=encoder.tables(),
        features=[Feature(name=f.name, kind=f.kind, table=f.table) for f in dataset.features],
        tasks=list(dataset.tasks),
        scenario=dataset.scenario,
        keys=list(dataset.all_keys),
        group_key=dataset.hashed_group or dataset.group_key,
        num_lanes=NUM_LANES,
        row_group_size=row_group_size(next(iter(splits.values())).num_rows, NUM_LANES),
        splits=splits,
        raw_files=raw.sha256(),
        terms=dataset.terms,
        parity=parity,
        statistics=statistics,
        preprocessing=options | encoder.fitted_numbers(),
        encoding=encoding,
    )
    manifest.save(folder)
    return manifest


def _write_in_order(
    dataset: Dataset, raw: RawFolder, encoder: Encoder, borders: list[int], folder: Path, memory: Memory
) -> tuple[dict[str, Written], dict[str, Any]]:
    """The three splits, one behind the other as the rows come; and further statistics."""
    group_rows, names = row_group_size(borders[1], NUM_LANES), split_names(dataset.split)
    writers = [SplitWriter(folder, name, group_rows, dataset.tasks, dataset.scenario, scaled=dataset.scaled) for name in names]
    copies, missing = CopyCounter(folder / "scratch", borders[-1], memory.copy_bytes), MissingCounter(dataset.features, names)
    start = 0
    with progress(f"{dataset.name}: encode, write", borders[-1]) as done:
        for batch in dataset.batches(raw):
            encoded = encoder.encode(batch)
            for writer, low, high in zip(writers, borders[:-1], borders[1:], strict=True):
                first, last = max(low, start), min(high, start + batch.num_rows)
                if first < last:
                    writer.write(encoded.slice(first - start, last - first))
            encoder.fit_numbers(batch.slice(0, max(borders[1] - start, 0)))
            splits = np.searchsorted(borders[1:-1], np.arange(start, start + batch.num_rows), side="right")
            copies.add(marked(row_hashes(batch, dataset.identity).to_numpy(), splits))
            missing.add(missing.counts(batch, splits))
            start += batch.num_rows
            done.update(batch.num_rows)
    assert start == dataset.num_rows, f"{start} rows were generated, {dataset.num_rows} announced"
    statistics = missing.statistics() | {"duplicates": copies.count().statistics(dataset.duplicates)}
    (folder / "scratch").rmdir()
    written = {name: writer.close() for name, writer in zip(names, writers, strict=True)}
    return written, statistics


def _statistics(dataset: Dataset, written: dict[str, Written]) -> dict[str, Any]:
    """Rows, rows of each scenario, and label rates over the three splits together; what numbers are like."""
    splits = [of_split.split for of_split in written.values()]
    names = ["all", *(dataset.scenario.values if dataset.scenario else [])]
    rates: dict[str, dict[str, float | None]] = {}
    values: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {}
    for task in dataset.tasks:
        if task.kind == "regression":
            of_splits = {split: found.labels[task.name] for split, found in written.items()}
            together = {name: sum((found[name] for found in of_splits.values()), Moments()) for name in names}
            values[task.name] = {
                split: {name: found[name].statistics() for name in names}
                for split, found in {"all": together, **of_splits}.items()
            }
            continue
        counts = {n: np.sum([split.label_counts[task.name][n] for split in splits], axis=0) for n in names}
        rates[task.name] = {n: float(positive / labelled) if labelled else None for n, (labelled, positive) in counts.items()}
    found: dict[str, Any] = {"rows": sum(split.num_rows for split in splits), "label_rates": rates}
    if values:
        found["label_values"] = values
    if dataset.weighted:
        found["weights"] = {split: of_split.weights.statistics() for split, of_split in written.items()}
    if "train" in written and (ranges := written["train"].ranges):
        found["within_ranges"] = {name: squeeze.statistics() for name, squeeze in ranges.items()}
    multi = [feature.name for feature in dataset.features if feature.kind == "multi"]
    if "train" in written and multi:
        rows = max(written["train"].split.num_rows, 1)
        found["mean_lengths"] = {name: written["train"].num_ids[name] / rows for name in multi}
    if dataset.scenario:
        found["scenario_rows"] = {n: sum(split.scenario_rows[n] for split in splits) for n in names[1:]}
    return found
