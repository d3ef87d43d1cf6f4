"""The identity of an encoding, from what the encoder does; docs/datasets/encoding.md lists the facts.

It is the same for any engine, format of the raw files, and text of a configuration.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mmlrec.identity import type_name, vocabulary_digest
from mmlrec.schema import Encoding, Table
from preprocessing.dataset import Column, Dataset
from preprocessing.encoding.encoder import DenseRange, Encoder
from preprocessing.workers import in_order

#: Fields of `Column` that a fact of the feature or of its table tells, or, as `min_count`, the vocabulary that comes out.
_TOLD = {"name", "kind", "raw_type", "table", "min_count", "num_ids", "scaled", "hashing", "num_buckets", "fill"}


def encoding_of(dataset: Dataset, encoder: Encoder, folder: Path, workers: int) -> Encoding:
    """The encoding of a dataset whose vocabularies lie in `folder`.

    Args:
        workers: threads that read vocabularies.
    """
    rules = dataset.encoding_rules()
    fills = encoder.dense_fills()
    features = {
        column.name: _feature(column, encoder.ranges.get(column.name), fills.get(column.name)) for column in dataset.features
    }
    columns = {column.table: column for column in dataset.features}

    def facts(table: Table) -> dict[str, Any]:
        return _table(columns[table.name], table, folder)

    tables = encoder.tables()
    scenario = {"values": list(dataset.scenario.values)} | rules.scenario if dataset.scenario else None
    return Encoding.of(
        features={name: of | rules.features.get(name, {}) for name, of in features.items()},
        tables={table.name: of for table, of in zip(tables, in_order(facts, tables, workers), strict=True)},
        scenario=scenario,
        labels={task.name: {"kind": task.kind} | rules.labels.get(task.name, {}) for task in dataset.tasks},
    )


def _feature(column: Column, seen: DenseRange | None, fill: float | None) -> dict[str, Any]:
    """Its kind and the type of its raw values; its table, or its range and fill value; what else is not as by default."""
    facts: dict[str, Any] = {"kind": column.kind, "type": type_name(column.raw_type)}
    if column.table is not None:
        facts["table"] = column.table
    if seen is not None:
        facts["range"] = seen.scaling
    if fill is not None:
        facts["fill"] = fill + 0.0  # -0 is 0
    others = {f.name: (getattr(column, f.name), f.default) for f in fields(column) if f.name not in _TOLD}
    return facts | {name: value for name, (value, default) in others.items() if default is MISSING or value != default}


def _table(column: Column, table: Table, folder: Path) -> dict[str, Any]:
    """How the values of a feature become rows of its table."""
    if column.hashing:
        hashing = column.hashing
        return {"ids": "hash", "buckets": hashing.num_buckets, "hashes": hashing.num_hashes, "seed": hashing.seed}
    if table.vocabulary is None:
        return {"ids": "given", "most": column.num_ids}
    return {
        "ids": "quantiles" if column.num_buckets else "vocabulary",
        "type": type_name(column.raw_type),
        "entries": table.num_rows - 1,
        "digest": vocabulary_digest(folder / table.vocabulary),
    }
