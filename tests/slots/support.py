"""Datasets with managed tables whose ids come and go in the order of training."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmlrec.data.reader import Reader
from mmlrec.hashing import mix64
from mmlrec.schema import Table
from tests.datasets import WrittenDataset, rewrite_part, write_dataset
from tests.slots.brute_force import BruteForce

#: Table -> its features. `m0` is multi-valued; f2 has a table of its own that is not managed.
FEATURES = {"user": ("f0", "m0"), "item": ("f1",)}


def keys_of(ids: np.ndarray) -> np.ndarray:
    """A key of each id, int64; 0 for 0."""
    return np.where(ids == 0, 0, mix64(ids.astype(np.uint64)).view(np.int64))


def write_managed(
    folder: Path, *, steps: int, batch_size: int, slots: dict[str, int], pool: int = 40, drift: float = 1.0, seed: int = 0
) -> WrittenDataset:
    """A dataset of `steps` batches, the last of them not full; some ids often, others once, other ones as time goes by.

    Args:
        slots: of each managed table.
        pool: ids that occur at a time, the first ones more often.
        drift: by how many ids the pool moves on in a step.
    """
    rows = {"train": steps * batch_size - batch_size // 3, "valid": 60, "test": 60}
    dataset = write_dataset(folder, rows=rows, num_scenarios=0, rows_per_part=10**6, missing_labels=0.0, seed=seed)
    order = order_of(dataset, batch_size)
    rng = np.random.default_rng(seed)
    step_of = np.zeros(rows["train"], np.int64)
    for step, batch in enumerate(order):
        step_of[batch] = step

    def drawn(when: np.ndarray) -> np.ndarray:
        ids = np.minimum(rng.zipf(1.3, len(when)), pool) + (drift * when).astype(np.int64)
        return np.where(rng.random(len(when)) < 0.1, 0, ids)

    features = [
        feature.model_copy(update={"table": next((name for name, of in FEATURES.items() if feature.name in of), feature.table)})
        for feature in dataset.manifest.features
    ]
    tables = [Table(name=name, num_rows=number + 1, managed=True, hash_seed=7) for name, number in slots.items()]
    tables += [table for table in dataset.manifest.tables if table.name == "t2"]
    manifest = dataset.manifest.model_copy(update={"features": features, "tables": tables, "schema_version": 2})
    dataset = WrittenDataset(folder, manifest, dataset.tables)
    for split, table in dataset.tables.items():
        # What is not trained on has ids of all times, and some that were never seen.
        when = step_of if split == "train" else rng.integers(0, 2 * steps, rows[split])
        columns = {name: table.column(name) for name in table.column_names}
        for name in ("f0", "f1"):
            columns[name] = pa.array(keys_of(drawn(when)))
        lengths = rng.integers(0, 4, rows[split])
        values = keys_of(drawn(np.repeat(when, lengths)))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        columns["m0"] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
        dataset.tables[split] = pa.table(columns)
        dataset = WrittenDataset(folder, rewrite_part(dataset, dataset.tables[split], split=split), dataset.tables)
    return dataset


def order_of(dataset: WrittenDataset, batch_size: int, epoch: int = 0) -> list[list[int]]:
    """The rows of each batch of an epoch, in order."""
    tasks = [task.name for task in dataset.manifest.tasks]
    reader = Reader(dataset.folder, dataset.manifest, "train", tasks=tasks, batch_size=batch_size)
    return [batch.row[batch.valid].tolist() for batch in reader.epoch(epoch)]


def cells_of(dataset: WrittenDataset, table: str, batch_size: int, steps: int) -> list[list[tuple[str, int, int, int]]]:
    """What a table is asked for in the global batch of each step: feature, row, place in its list, and the key."""
    columns = {name: dataset.tables["train"].column(name).to_pylist() for name in FEATURES[table]}
    found: list[list[tuple[str, int, int, int]]] = []
    epoch = 0
    while len(found) < steps:
        for rows in order_of(dataset, batch_size, epoch):
            cells = []
            for name, column in columns.items():
                for row in rows:
                    keys = column[row] if isinstance(column[row], list) else [column[row]]
                    cells += [(name, row, place, key) for place, key in enumerate(keys)]
            found.append(cells)
        epoch += 1
    return found[:steps]


def batches_of(dataset: WrittenDataset, table: str, batch_size: int, steps: int) -> list[list[int]]:
    """The keys of a table in the global batch of each step."""
    return [[key for *_, key in cells] for cells in cells_of(dataset, table, batch_size, steps)]


def brute_force(dataset: WrittenDataset, table: str, batch_size: int, steps: int, **rule) -> BruteForce:
    """What a table is after so many steps."""
    truth = BruteForce(dataset.manifest.table(table).num_rows - 1, **rule)
    for keys in batches_of(dataset, table, batch_size, steps):
        truth.train(keys)
    return truth


def write_with_tenures(folder: Path, dataset: WrittenDataset, batch_size: int, steps: int, **rule) -> dict[str, BruteForce]:
    """The same rows without managed tables: each tenure of a key has a row of its own, to be trained in the first epoch.

    A key without a slot is id 0, and so is what valid and test ask for.
    """
    shutil.copytree(dataset.folder, folder)
    columns = {split: {name: table.column(name) for name in table.column_names} for split, table in dataset.tables.items()}
    truths, tables = {}, []
    for table, features in FEATURES.items():
        truth = truths[table] = BruteForce(dataset.manifest.table(table).num_rows - 1, **rule)
        ids = {name: dataset.tables["train"].column(name).to_pylist() for name in features}
        for name, column in ids.items():
            columns["train"][name] = [[0] * len(cell) if isinstance(cell, list) else 0 for cell in column]
        for cells in cells_of(dataset, table, batch_size, steps):
            tenures = truth.train([key for *_, key in cells])
            for (name, row, place, _), tenure in zip(cells, tenures, strict=True):
                if name == "m0":
                    columns["train"][name][row][place] = tenure
                else:
                    columns["train"][name][row] = tenure
        tables.append(Table(name=table, num_rows=truth.num_tenures + 1))
        for split in ("valid", "test"):
            for name in features:
                cells = dataset.tables[split].column(name).to_pylist()
                columns[split][name] = [[0] * len(cell) if isinstance(cell, list) else 0 for cell in cells]
    tables += [table for table in dataset.manifest.tables if not table.managed]
    manifest = dataset.manifest.model_copy(update={"tables": tables, "schema_version": 1})
    for split, table in dataset.tables.items():
        types = {name: table.schema.field(name).type for name in table.column_names}
        new = {name: pa.array(of, types[name]) if isinstance(of, list) else of for name, of in columns[split].items()}
        written = pa.table(new)
        manifest = rewrite_part(WrittenDataset(folder, manifest, dataset.tables), written, split=split)
    return truths
