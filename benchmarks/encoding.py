"""Raw rows to inputs by a saved encoder: rows/s for batches of several sizes, and how long it takes to load.

python -m benchmarks.encoding [--largest 1e6] [--threads 2] [--seconds 2]

Features as of shape b of benchmarks.throughput: 26 of one id a row, whose vocabularies have 10 to `--largest` entries, as
integers or as text, and 13 numbers. Cells are typed (int64 or string, float64), or all of them text, as in a CSV file. One id
in twenty is not in the vocabulary. Figures are medians; CPU time says what a core without other work would do.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from tabulate import tabulate

from benchmarks.throughput import SHAPES
from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.vocabularies import Vocabularies
from preprocessing.dataset import natural

BATCHES = (1, 100, 1_000, 100_000)


def sizes(largest: int) -> list[int]:
    """Entries of the vocabularies, growing evenly from 10."""
    number = SHAPES["b"].sparse
    return [round(10 * (largest / 10) ** (index / (number - 1))) for index in range(number)]


def values(numbers: np.ndarray, kind: str) -> pa.Array:
    """Ids as integers, or as text of some 20 bytes."""
    if kind == "int64":
        return pa.array(numbers * 7919)
    return pa.array(np.char.add("value-of-an-id-", numbers.astype(str)).astype(object), pa.string())


def save(folder: Path, kind: str, entries: list[int]) -> None:
    """An encoder of random vocabularies."""
    random = np.random.default_rng(0)
    chunks = {
        f"c{index}": [values(part, kind) for part in np.array_split(random.permutation(size), size // 1_000_000 + 1)]
        for index, size in enumerate(entries)
    }
    features: dict[str, dict[str, object]] = {name: {"kind": "sparse", "type": kind, "table": name} for name in chunks}
    for index in range(SHAPES["b"].dense):
        features[f"x{index}"] = {"kind": "dense", "type": "float64", "range": [-3.0, 3.0], "fill": 0.1}
    tables = {f"c{index}": {"ids": "vocabulary", "rows": size + 1} for index, size in enumerate(entries)}
    facts: dict[str, Any] = {"form": 1, "features": features, "tables": tables, "scenario": None, "empty_is_missing": True}
    Encoder(facts, Vocabularies.of(chunks)).save(folder)


def rows(number: int, kind: str, entries: list[int], seed: int, as_text: bool) -> pa.Table:
    """Rows with random ids."""
    random = np.random.default_rng(seed)
    columns = {f"c{index}": values(random.integers(0, size * 20 // 19 + 1, number), kind) for index, size in enumerate(entries)}
    for index in range(SHAPES["b"].dense):
        columns[f"x{index}"] = pa.array(random.standard_normal(number))
    table = pa.table(columns)
    return table.cast(pa.schema([(name, pa.string()) for name in table.column_names])) if as_text else table


def measure(encoder: Encoder, tables: list[pa.Table], threads: int, seconds: float) -> tuple[float, float]:
    """Seconds a batch, and seconds of CPU, where so many threads take one after the other."""
    encoder.inputs(tables[0])
    some = tables * max(1, threads // len(tables), 1000 // len(tables[0]) // len(tables))
    taken: list[float] = []
    used: list[float] = []
    until = time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < until or len(taken) < 3:
            start, start_of_use = time.perf_counter(), time.process_time()
            if threads == 1:
                for table in some:
                    encoder.inputs(table)
            else:
                list(pool.map(encoder.inputs, some))
            taken.append((time.perf_counter() - start) / len(some))
            used.append((time.process_time() - start_of_use) / len(some))
    return median(taken), median(used)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=natural, default=1_000_000, help="entries of the largest vocabulary (default: 1e6)")
    parser.add_argument("--threads", type=int, default=2, help="that encode batches of their own (default: 2)")
    parser.add_argument("--seconds", type=float, default=2, help="for each figure (default: 2)")
    options = parser.parse_args()
    entries, lines = sizes(options.largest), []
    with TemporaryDirectory() as folder:
        for kind in ("int64", "string"):
            save(Path(folder) / kind, kind, entries)
            start = time.perf_counter()
            encoder = Encoder.load(Path(folder) / kind)
            print(f"{kind}: {sum(entries):,} entries loaded in {(time.perf_counter() - start) * 1e3:.1f} ms")
            for as_text in (False, True):
                for batch in BATCHES:
                    tables = [rows(batch, kind, entries, seed, as_text) for seed in range(4)]
                    alone, used = measure(encoder, tables, 1, options.seconds)
                    together, _ = measure(encoder, tables, options.threads, options.seconds)
                    figures = [f"{alone * 1e3:.2f}", f"{used * 1e3:.2f}", round(batch / alone), round(batch / together)]
                    lines.append([kind, "text" if as_text else "typed", batch, *figures])
    heads = ["ids", "cells", "rows", "ms", "ms of CPU", "rows/s, one thread", f"rows/s, {options.threads} threads"]
    print(tabulate(lines, heads, intfmt=","))


if __name__ == "__main__":
    main()
