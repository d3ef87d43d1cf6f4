"""Rows per second of the reader: Parquet decoding alone, and Parquet to finished batches.

python -m benchmarks.reader                        # 26 sparse, 13 dense, 2 labels; generated in a temporary folder
python -m benchmarks.reader --dataset FOLDER       # the train split of a dataset folder
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmlrec.paths import local_path
from mmlrec.schema import DatasetManifest, Feature, Table, Task
from preprocessing.writing.parts import SplitWriter

TABLE_ROWS = 100_000


def generate(folder: Path, *, rows: int, num_sparse: int, num_multi: int, num_dense: int, row_group_size: int) -> None:
    """Write a dataset of random values with skewed ids, as the preprocessing lays it out; bags hold 0 to 6 ids."""
    features = [Feature(name=f"sparse{i}", kind="sparse", table=f"table{i}") for i in range(num_sparse)]
    features += [Feature(name=f"multi{i}", kind="multi", table=f"multi_table{i}") for i in range(num_multi)]
    tables = [Table(name=str(f.table), num_rows=TABLE_ROWS) for f in features]
    features += [Feature(name=f"dense{i}", kind="dense") for i in range(num_dense)]
    tasks = [Task(name="click"), Task(name="buy")]
    writer = SplitWriter(folder, "train", row_group_size, (tasks[0], tasks[1]), None)
    for number, start in enumerate(range(0, rows, row_group_size)):
        columns = _columns(np.random.default_rng(number), min(row_group_size, rows - start), features, tasks)
        writer.write(pa.RecordBatch.from_pydict(columns))
    DatasetManifest(
        name="reader-benchmark",
        tables=tables,
        features=features,
        tasks=tasks,
        num_lanes=8,
        row_group_size=row_group_size,
        splits={"train": writer.close().split},
    ).save(folder)


def _columns(rng: np.random.Generator, count: int, features: list[Feature], tasks: list[Task]) -> dict[str, pa.Array]:
    def ids(number: int) -> np.ndarray:
        return (TABLE_ROWS * rng.random(number) ** 4).astype(np.int64)

    columns = {}
    for feature in features:
        if feature.kind == "sparse":
            columns[feature.name] = pa.array(ids(count))
        elif feature.kind == "multi":
            offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 7, count))]).astype(np.int32)
            columns[feature.name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids(int(offsets[-1]))))
        else:
            columns[feature.name] = pa.array(rng.random(count, np.float32))
    for task in tasks:
        columns[f"label.{task.name}"] = pa.array((rng.random(count) < 0.1).astype(np.float32))
    return columns


def measure(folder: Path, *, batch_size: int, epochs: int) -> dict[str, float]:
    """Rows per second of each stage, best of `epochs`; the cache is off, so every epoch decodes everything."""
    from mmlrec.data.reader import Reader
    from mmlrec.data.row_groups import RowGroups

    manifest = DatasetManifest.load(folder)
    tasks = [task.name for task in manifest.tasks]
    rows = manifest.splits["train"].num_rows
    groups = RowGroups(folder, manifest, "train", tasks)
    rates: dict[str, list[float]] = {"decode": [], "batches": [], "batches_cached": [], "sequential": []}
    cached = Reader(folder, manifest, "train", tasks=tasks, batch_size=batch_size, cache_bytes=1 << 40)
    cold = Reader(folder, manifest, "train", tasks=tasks, batch_size=batch_size, cache_bytes=0)
    for _ in cached.sequential():
        pass
    for epoch in range(epochs):
        for name, source in (
            ("decode", (groups.decode(i) for i in range(len(groups.num_rows)))),
            ("batches", cold.epoch(epoch)),
            ("sequential", cold.sequential()),
            ("batches_cached", cached.epoch(epoch)),
        ):
            start = time.perf_counter()
            for _ in source:
                pass
            rates[name].append(rows / (time.perf_counter() - start))
    return {name: max(values) for name, values in rates.items()}


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=local_path, help="dataset folder; default: generate one")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--num-sparse", type=int, default=26)
    parser.add_argument("--num-multi", type=int, default=0)
    parser.add_argument("--num-dense", type=int, default=13)
    parser.add_argument("--row-group-size", type=int, default=65_536)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=3, help="passes; the best counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.dataset or Path(temporary)
        if arguments.dataset is None:
            generate(
                folder,
                rows=arguments.rows,
                num_sparse=arguments.num_sparse,
                num_multi=arguments.num_multi,
                num_dense=arguments.num_dense,
                row_group_size=arguments.row_group_size,
            )
        rates = measure(folder, batch_size=arguments.batch_size, epochs=arguments.epochs)
    result: dict[str, float] = {f"{name}_rows_per_s": round(rate) for name, rate in rates.items()}
    result["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
