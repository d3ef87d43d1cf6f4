"""The identity of an encoding, from what the encoder does; docs/datasets/encoding.md lists the facts.

It is the same for any engine, format of the raw files, and text of a configuration.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mmlrec.errors import ConfigError
from mmlrec.identity import check_vocabulary, fact_differences, type_name, vocabulary_digest
from mmlrec.schema import Encoding, Table
from preprocessing.dataset import Column, Dataset
from preprocessing.encoding.encoder import DenseRange, Encoder
from preprocessing.encoding.fitted import Fitted
from preprocessing.workers import in_order

#: Fields of `Column` that a fact of the feature or of its table tells, or, as `min_count`, the vocabulary that comes out.
_TOLD = {"name", "kind", "raw_type", "table", "min_count", "num_ids", "scaled", "hashing", "num_buckets", "fill", "managed"}


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
        of_table = _table(columns[table.name])
        if table.vocabulary is None:
            return of_table
        return of_table | {"entries": table.num_rows - 1, "digest": vocabulary_digest(folder / table.vocabulary)}

    tables = encoder.tables()
    return Encoding.of(
        features={name: of | rules.features.get(name, {}) for name, of in features.items()},
        tables={table.name: of for table, of in zip(tables, in_order(facts, tables, workers), strict=True)},
        scenario=_scenario(dataset),
        labels={task.name: {"kind": task.kind} | rules.labels.get(task.name, {}) for task in dataset.tasks},
    )


def check_given(dataset: Dataset, given: Fitted, parity: bool, splits: tuple[str, ...], workers: int) -> None:
    """Whether a dataset can be encoded with these fitted parts, before any of its rows is read.

    Args:
        splits: that it will have.
        workers: threads that read vocabularies.

    Raises:
        ConfigError: it has other features, tables or scenarios, or they mean something else; or nothing could grow.
        DataError: a vocabulary is damaged.
    """
    old, where = given.encoding, f"in {given.folder}"
    lines = [] if parity == given.manifest.parity else [f"  parity: {parity} here, {given.manifest.parity} {where}"]
    rules, features, tables = dataset.encoding_rules(), {}, {}
    for column in dataset.features:
        before = old.features.get(column.name, {})
        fitted = {"range": before.get("range")} if column.scaled else {}
        if column.fill is not None:
            fitted["fill"] = before.get("fill") if column.fill == "mean" else column.fill + 0.0
        features[column.name] = _feature(column, None, None) | fitted | rules.features.get(column.name, {})
        if column.table is not None:
            found = {key: old.tables.get(column.table, {}).get(key) for key in ("entries", "digest")}
            of_table = _table(column)
            tables[column.table] = of_table | (found if "type" in of_table else {})
    parts = {"feature": (old.features, features), "table": (old.tables, tables)}
    for what, (then, now) in parts.items():
        for name in [*then, *(name for name in now if name not in then)]:
            if name in then and name in now:
                lines += fact_differences(f"{what} '{name}'", then[name], now[name], where)
            else:
                lines.append(f"  {what} '{name}': {'not here' if name in then else f'not {where}'}")
    lines += fact_differences("scenario", old.scenario or {}, _scenario(dataset) or {}, where)
    if lines:
        raise ConfigError(
            f"{dataset.name}: rows cannot be encoded as those of {given.folder}; what is made of a cell differs:\n"
            + "\n".join(lines)
            + "\nGive the options with which that dataset was made."
        )
    if not given.frozen and splits[0] != "train":
        raise ConfigError(f"nothing can be fitted where all rows are in split '{splits[0]}': only rows of train are fitted on.")
    if not given.frozen and parity:
        raise ConfigError(
            "the parity form has its ids in the order of the raw values of all rows, so its vocabularies cannot grow and its"
            " ranges are those of all rows. Take them as they are, or make the dataset anew."
        )
    vocabularies = [table for table in given.manifest.tables if table.vocabulary is not None]
    for _ in in_order(
        lambda table: check_vocabulary(given.vocabulary(table.name).path, old.tables[table.name]), vocabularies, workers
    ):
        pass


def _scenario(dataset: Dataset) -> dict[str, Any] | None:
    rule = dataset.encoding_rules().scenario
    return {"values": list(dataset.scenario.values)} | rule if dataset.scenario else None


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


def _table(column: Column) -> dict[str, Any]:
    """How the values of a feature become rows of its table, as it is declared."""
    if column.hashing:
        hashing = column.hashing
        return {"ids": "hash", "buckets": hashing.num_buckets, "hashes": hashing.num_hashes, "seed": hashing.seed}
    if column.managed:
        return {"ids": "managed", "seed": column.managed.seed}  # how many slots there are says nothing about a key
    if column.num_ids is not None:
        return {"ids": "given", "most": column.num_ids}
    return {"ids": "quantiles" if column.num_buckets else "vocabulary", "type": type_name(column.raw_type)}
