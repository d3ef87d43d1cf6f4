"""Writes small dataset folders by hand, independent of the preprocessing."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmlrec.identity import type_name, vocabulary_digest
from mmlrec.schema import DatasetManifest, Encoding, Feature, Part, Scenario, Split, Table, Task


@dataclass
class WrittenDataset:
    """A dataset folder, and the Arrow table of each split as it lies on disk."""

    folder: Path
    manifest: DatasetManifest
    tables: dict[str, pa.Table]


def write_dataset(
    folder: Path,
    *,
    rows: int | dict[str, int] = 200,
    num_sparse: int = 3,
    num_multi: int = 1,
    num_dense: int = 2,
    tasks: tuple[str, ...] = ("click", "buy"),
    num_scenarios: int = 3,
    missing_labels: float = 0.1,
    weights: bool = False,
    table_rows: int = 50,
    row_group_size: int = 16,
    rows_per_part: int = 70,
    num_lanes: int = 4,
    seed: int = 0,
    funnel: bool = False,
    scenario_run: int = 1,
    regression: dict[str, tuple[float, float]] | None = None,
) -> WrittenDataset:
    """A dataset folder with labels that depend on the features.

    Args:
        rows: of each split, or one number for train (valid and test then have a quarter each).
        num_scenarios: 0 = no scenario column.
        missing_labels: share of labels that are null.
        funnel: each task is positive only where the one before it is; the first two have the roles ctr and ctcvr.
        scenario_run: so many rows after each other have the same scenario.
        regression: further tasks, name -> (scale, shift) of labels that are small multiples of 1/16.
    """
    sizes = rows if isinstance(rows, dict) else {"train": rows, "valid": rows // 4, "test": rows // 4}
    folder.mkdir(parents=True, exist_ok=True)
    features = [Feature(name=f"f{i}", kind="sparse", table=f"t{i}") for i in range(num_sparse)]
    features[1:1] = [Feature(name=f"m{i}", kind="multi", table=f"tm{i}") for i in range(num_multi)]
    tables = [Table(name=str(f.table), num_rows=table_rows + i) for i, f in enumerate(features)]
    features += [Feature(name=f"d{i}", kind="dense") for i in range(num_dense)]
    names = [f"s{i}" for i in range(num_scenarios)]
    regression = regression or {}
    written, splits = {}, {}
    for number, (split, count) in enumerate(sizes.items()):
        rng = np.random.default_rng([seed, number])
        table_sizes = {table.name: table.num_rows for table in tables}
        columns = _columns(rng, count, features, table_sizes, tasks, num_scenarios, missing_labels, funnel, scenario_run)
        for task, (scale, shift) in regression.items():
            signal = sum(columns[feature.name].to_numpy() for feature in features if feature.kind == "dense")
            value = np.round(16 * (signal + rng.normal(size=count))) / 16 * scale + shift
            columns[f"label.{task}"] = pa.array(value.astype(np.float32), mask=rng.random(count) < missing_labels)
        if weights:
            columns["sample.weight"] = pa.array(rng.uniform(0.5, 2, count).astype(np.float32))
        written[split] = pa.table(columns)
        splits[split] = _write_split(folder, split, written[split], rows_per_part, row_group_size, (*tasks, *regression), names)
    statistics = {}
    if regression:
        statistics["label_values"] = {
            task: {split: _moments(table, task, names) for split, table in written.items()} for task in regression
        }
    of_regression = [Task(name=task, kind="regression") for task in regression]
    manifest = DatasetManifest(
        name="written",
        tables=tables,
        features=features,
        tasks=(_funnel(tasks) if funnel else [Task(name=task) for task in tasks]) + of_regression,
        scenario=Scenario(name="page", values=names) if num_scenarios else None,
        keys=["user", "session"],
        group_key="user",
        num_lanes=num_lanes,
        row_group_size=row_group_size,
        splits=splits,
        statistics=statistics,
    )
    manifest.save(folder)
    return WrittenDataset(folder, manifest, written)


def with_vocabularies(
    dataset: WrittenDataset, values: dict[str, list] | None = None, hashed: dict[str, int] | None = None
) -> WrittenDataset:
    """The dataset with a vocabulary for each table, or for those that are named, and a record of its encoding.

    Args:
        values: table -> raw values of the ids 1, 2, ...; `TABLE-ID` when absent.
        hashed: table of hashed ids -> seed.
    """
    manifest = dataset.manifest
    if values is None:
        values = {table.name: [f"{table.name}-{id}" for id in range(1, table.num_rows)] for table in manifest.tables}
    (dataset.folder / "vocab").mkdir(exist_ok=True)
    tables, facts = [], {}
    for table in manifest.tables:
        facts[table.name] = {"ids": "given", "most": table.num_rows - 1}
        if (own := values.get(table.name)) is not None:
            assert len(own) == table.num_rows - 1
            path = f"vocab/{table.name}.parquet"
            ids = range(1, table.num_rows)
            entries = pa.table({"value": own, "id": pa.array(ids, pa.int64()), "count": pa.array(ids, pa.int64())})
            pq.write_table(entries, dataset.folder / path, row_group_size=7)
            kind = type_name(entries.schema.field("value").type)
            digest = vocabulary_digest(dataset.folder / path)
            facts[table.name] = {"ids": "vocabulary", "type": kind, "entries": len(own), "digest": digest}
            table = table.model_copy(update={"vocabulary": path})
        if table.name in (hashed or {}):
            facts[table.name] = {"ids": "hash", "buckets": table.num_rows - 1, "hashes": 1, "seed": hashed[table.name]}
            table = table.model_copy(update={"hash_seed": hashed[table.name]})
        tables.append(table)
    features = {}
    for f in manifest.features:
        features[f.name] = {"kind": f.kind, "type": "float32"}
        if f.table:
            features[f.name] |= {"type": facts[f.table].get("type", "int64"), "table": f.table}
    scenario = {"values": manifest.scenario.values} if manifest.scenario else None
    labels = {task.name: {"kind": task.kind} for task in manifest.tasks}
    encoding = Encoding.of(features, facts, scenario, labels)
    manifest = manifest.model_copy(update={"tables": tables, "encoding": encoding})
    manifest.save(dataset.folder)
    return WrittenDataset(dataset.folder, manifest, dataset.tables)


def _moments(table, task, names):
    label = table.column(f"label.{task}").to_numpy().astype(np.float64)
    where = {"all": np.full(len(label), True)}
    where |= {name: table.column("sample.scenario").to_numpy() == index for index, name in enumerate(names)}
    known = {name: label[chosen & ~np.isnan(label)] for name, chosen in where.items()}
    return {
        name: {"mean": of.mean(), "deviation": of.std(), "least": of.min(), "greatest": of.max()} for name, of in known.items()
    }


def _funnel(names: tuple[str, ...]) -> list[Task]:
    roles = ("ctr", "ctcvr", *[None] * len(names))
    return [Task(name=n, role=role, implied_by_next=n != names[-1]) for n, role in zip(names, roles, strict=False)]


def rewrite_part(dataset: WrittenDataset, table: pa.Table, part: int = 0, split: str = "train") -> DatasetManifest:
    """Replace a part of a split by `table`, with a manifest that lists the new file's size and rows."""
    listed = dataset.manifest.splits[split]
    path = dataset.folder / listed.parts[part].path
    pq.write_table(table, path, row_group_size=dataset.manifest.row_group_size)
    parts = list(listed.parts)
    parts[part] = _part(dataset.folder, path, table.num_rows)
    split_now = listed.model_copy(update={"parts": parts, "num_rows": sum(p.num_rows for p in parts)})
    manifest = dataset.manifest.model_copy(update={"splits": {**dataset.manifest.splits, split: split_now}})
    manifest.save(dataset.folder)
    return manifest


def _columns(rng, count, features, sizes, tasks, num_scenarios, missing_labels, funnel, scenario_run):
    columns = {}
    signal = np.zeros(count)
    for feature in features:
        if feature.kind == "sparse":
            ids = rng.integers(0, sizes[feature.table], count)
            signal += np.sin(ids)
            columns[feature.name] = pa.array(ids)
        elif feature.kind == "multi":
            bags = [rng.integers(0, sizes[feature.table], rng.integers(0, 4)).tolist() for _ in range(count)]
            columns[feature.name] = pa.array(bags, pa.list_(pa.int64()))
        else:
            values = rng.normal(size=count).astype(np.float32)
            signal += values
            columns[feature.name] = pa.array(values)
    label = np.ones(count, np.float32)
    for number, task in enumerate(tasks):
        before, label = label, (signal + rng.normal(size=count) > 0.5 * number).astype(np.float32)
        if funnel:
            label *= before
        columns[f"label.{task}"] = pa.array(label, mask=rng.random(count) < missing_labels)
    if num_scenarios:
        runs = rng.integers(0, num_scenarios, -(-count // scenario_run))
        columns["sample.scenario"] = pa.array(np.repeat(runs, scenario_run)[:count])
    columns["key.user"] = pa.array(rng.integers(0, max(count // 10, 1), count) + 10**12)
    columns["key.session"] = pa.array([f"session-{i}" for i in range(count)])
    return columns


def _write_split(folder, split, table, rows_per_part, row_group_size, tasks, names):
    (folder / split).mkdir(exist_ok=True)
    parts = []
    for number, start in enumerate(range(0, table.num_rows, rows_per_part)):
        path = folder / split / f"part-{number:05d}.parquet"
        chunk = table.slice(start, rows_per_part)
        pq.write_table(chunk, path, row_group_size=row_group_size)
        parts.append(_part(folder, path, chunk.num_rows))
    scenario = table.column("sample.scenario").to_numpy() if names else np.zeros(table.num_rows, int)
    counts = {}
    for task in tasks:
        label = table.column(f"label.{task}").to_numpy()
        where = {"all": np.full(len(label), True)} | {name: scenario == i for i, name in enumerate(names)}
        counts[task] = {n: (int((~np.isnan(label[w])).sum()), int((label[w] > 0).sum())) for n, w in where.items()}
    scenario_rows = {name: int((scenario == i).sum()) for i, name in enumerate(names)}
    return Split(parts=parts, num_rows=table.num_rows, scenario_rows=scenario_rows, label_counts=counts)


def _part(folder, path, rows):
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Part(path=str(path.relative_to(folder)), num_rows=rows, num_bytes=len(content), sha256=digest)
