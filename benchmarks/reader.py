"""Rows per second and processor time of the reader, from Parquet to finished batches, beside Parquet decoding alone.

python -m benchmarks.reader                        # 26 sparse, 13 dense, 2 labels; generated in a temporary folder
python -m benchmarks.reader --dataset FOLDER       # the train split of a dataset folder
python -m benchmarks.reader --before CHECKOUT      # and the code of another checkout, in alternating rounds

`decoding` is the floor: Arrow alone reads every row group once, in as many threads, and nothing is made of it. `training` is
the shuffled order with no decoded row group kept, `cached` with all of them kept, `sequential` the order on disk.
Each round is a process of its own; medians over all epochs. Processor time is that of all threads, in microseconds a row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tabulate import tabulate

from mmlrec.paths import local_path
from mmlrec.schema import DatasetManifest, Feature, Table, Task
from preprocessing.writing.parts import SplitWriter

TABLE_ROWS = 100_000
STAGES = ("decoding", "training", "sequential", "cached")


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


def measure(folder: Path, *, batch_size: int, epochs: int, threads: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and processor seconds of each epoch of each stage, with the code that is imported."""
    import torch

    from mmlrec.data.reader import Reader
    from mmlrec.distributed.world import keep_freed_memory

    keep_freed_memory()  # as training does
    torch.set_num_threads(threads)
    manifest = DatasetManifest.load(folder)
    tasks = [task.name for task in manifest.tasks]
    cached, cold = (
        Reader(folder, manifest, "train", tasks=tasks, batch_size=batch_size, cache_bytes=size) for size in (1 << 40, 0)
    )
    stages: dict[str, Callable[[int], Iterable[object]]] = {
        "decoding": lambda _: decode(folder, manifest, threads),
        "training": cold.epoch,
        "sequential": lambda _: cold.sequential(),
        "cached": cached.epoch,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in STAGES}
    for epoch in range(epochs + 1):  # the first fills caches, and is not counted
        for name, source in stages.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in source(epoch):
                pass
            times[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    return {name: measured[1:] for name, measured in times.items()}


def decode(folder: Path, manifest: DatasetManifest, threads: int) -> Iterable[object]:
    """Read every row group of train with Arrow alone; gives something for each."""
    paths = [folder / part.path for part in manifest.splits["train"].parts]
    groups = [(path, index) for path in paths for index in range(pq.read_metadata(path).num_row_groups)]

    def read(group: tuple[Path, int]) -> int:
        with pq.ParquetFile(group[0]) as file:
            return int(file.read_row_group(group[1], use_threads=False).num_rows)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(read, groups)


def _measured(checkout: Path, folder: Path, options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """What `measure` finds with the code of a checkout, in a process of its own."""
    names = ("batch_size", "epochs", "threads")
    command = [sys.executable, "-P", __file__, "--measure", "--dataset", str(folder.resolve())]
    command += [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkout, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the reader of {checkout} failed:\n{done.stderr}")
    found: dict[str, list[tuple[float, float]]] = json.loads(done.stdout)
    return found


def compare(folder: Path, sides: dict[str, Path], options: argparse.Namespace) -> list[list[str]]:
    """Rows of the table: side, stage, rows/s, processor time a row, share of the floor, and rows/s now over before."""
    num_rows = DatasetManifest.load(folder).splits["train"].num_rows
    rounds: dict[str, list[dict[str, list[tuple[float, float]]]]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side in list(sides)[:: -1 if number % 2 else 1]:
            rounds[side].append(_measured(sides[side], folder, options))

    def seconds(side: str, stage: str) -> list[float]:
        """Median of each round."""
        return [median(wall for wall, _ in found[stage]) for found in rounds[side]]

    table = []
    for side, measured in rounds.items():
        for stage in STAGES:
            cpu = median(used for found in measured for _, used in found[stage])
            wall = median(seconds(side, stage))
            share = median(floor / own for floor, own in zip(seconds(side, "decoding"), seconds(side, stage), strict=True))
            gain = median(b / a for a, b in zip(seconds(side, stage), seconds(next(iter(sides)), stage), strict=True))
            table.append([side, stage, f"{num_rows / wall:,.0f}", f"{1e6 * cpu / num_rows:.3f}", f"{share:.2f}", f"{gain:.2f}"])
    return table


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=local_path, help="dataset folder; default: generate one")
    parser.add_argument("--before", type=local_path, help="checkout to compare with")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--num-sparse", type=int, default=26)
    parser.add_argument("--num-multi", type=int, default=0)
    parser.add_argument("--num-dense", type=int, default=13)
    parser.add_argument("--row-group-size", type=int, default=65_536)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3, help="of each stage in a round, after one that is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help="one round in this process, as JSON")
    options = parser.parse_args()
    if options.measure:
        found = measure(options.dataset, batch_size=options.batch_size, epochs=options.epochs, threads=options.threads)
        print(json.dumps(found))
        return
    here = Path(__file__).resolve().parents[1]
    sides = {"before": options.before.resolve(), "now": here} if options.before else {"now": here}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dataset or Path(temporary)
        if options.dataset is None:
            generate(
                folder,
                rows=options.rows,
                num_sparse=options.num_sparse,
                num_multi=options.num_multi,
                num_dense=options.num_dense,
                row_group_size=options.row_group_size,
            )
        table = compare(folder, sides, options)
    headers = ["code", "stage", "rows/s", "processor us/row", "of decoding", f"over {next(iter(sides))}"]
    print(tabulate(table, headers=headers, disable_numparse=True, stralign="right"))


if __name__ == "__main__":
    main()
