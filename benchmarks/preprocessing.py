"""Preprocessing against the usual pandas pattern, on generated raw files, each in a process of its own.

python -m benchmarks.preprocessing [--quick] [--shapes movielens,criteo] [--rows N] [--work-dir DIR]

movielens: 25,000,000 lines of ratings.csv and movies.csv, as MovieLens-25M has them. criteo: 10,000,000 lines of train.txt with
40 columns. The pandas pattern is read_csv, merge, a LabelEncoder for each sparse column, MinMaxScaler, train_test_split, and
to_csv; to_parquet is timed too. It holds the whole table, so it gets fewer Criteo rows; figures are rows per second. `decode`
is pyarrow's CSV reader alone. Raw files and finished measurements are kept in --work-dir: run again to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
from tabulate import tabulate

from mmlrec.paths import local_path

_CHUNK = 500_000
_GENRES = (
    "Action|Adventure|Animation|Children|Comedy|Crime|Drama|Fantasy|Film-Noir|Horror|Musical|Mystery|Romance|Sci-Fi|Thriller"
)
_NUM_MOVIES = 62_000
_CATEGORIES = [round(10 * 10 ** (6 * k / 25)) for k in range(26)]  # values of each column: 10 to 10 million


@dataclass(frozen=True)
class Shape:
    """A kind of raw data: the command that preprocesses it, the file with the rows, and how many rows."""

    command: tuple[str, ...]
    file: str
    rows: int
    pandas_rows: int


SHAPES = {
    "movielens": Shape(("movielens-25m",), "ratings.csv", 25_000_000, 25_000_000),
    "criteo": Shape(("criteo", "--form", "kaggle"), "train.txt", 10_000_000, 2_500_000),
}


def generate(shape: str, folder: Path, rows: int) -> None:
    """Write raw files, seeded, once."""
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    random = np.random.default_rng(2024)
    if shape == "movielens":
        _write_movies(temporary / "movies.csv", random)
    with (temporary / SHAPES[shape].file).open("wb") as file:
        if shape == "movielens":
            file.write(b"userId,movieId,rating,timestamp\n")
        for start in range(0, rows, _CHUNK):
            count = min(_CHUNK, rows - start)
            table = _ratings(start, count, random) if shape == "movielens" else _views(count, random)
            delimiter = "," if shape == "movielens" else "\t"
            form = pa.csv.WriteOptions(include_header=False, delimiter=delimiter, quoting_style="none")
            pa.csv.write_csv(table, file, form)
    temporary.rename(folder)


def _write_movies(path: Path, random: np.random.Generator) -> None:
    genres = _GENRES.split("|")
    lines = ["movieId,title,genres"]
    for movie in range(1, _NUM_MOVIES + 1):
        chosen = np.sort(random.choice(len(genres), random.integers(0, 5), replace=False))
        lines.append(f'{3 * movie},"Movie, The {movie} (1999)",{"|".join(genres[k] for k in chosen) or "(no genres listed)"}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _ratings(start: int, count: int, random: np.random.Generator) -> pa.Table:
    """154 ratings a user, sorted by user; few movies have most of them."""
    movie = 3 * (1 + (_NUM_MOVIES * random.random(count) ** 3).astype(np.int64))
    rating, time_ = random.integers(1, 11, count) / 2, random.integers(800_000_000, 1_500_000_000, count)
    return pa.table({"user": np.arange(start, start + count) // 154 + 1, "movie": movie, "rating": rating, "time": time_})


def _views(count: int, random: np.random.Generator) -> pa.Table:
    columns: list[pa.Array] = [pa.array((random.random(count) < 0.25).astype(np.int64))]
    numbers = ((random.exponential(100, count).astype(np.int64), random.random(count) < 0.2) for _ in range(13))
    columns += [pa.array(values, mask=missing) for values, missing in numbers]
    for k, values in enumerate(_CATEGORIES):
        code = (values * random.random(count) ** 4).astype(np.uint64)
        word = ((code * np.uint64(2654435761) + np.uint64(k)) & np.uint64(0xFFFFFFFF)).astype(">u4").tobytes().hex()
        text = np.frombuffer(word.encode(), "S8").astype("U8")
        columns.append(pa.array(text, mask=random.random(count) < 0.1))
    return pa.table(columns, [str(k) for k in range(40)])


def pandas_pattern(shape: str, raw: Path, out: Path, rows: int) -> dict[str, float]:
    """The usual pattern; gives the seconds of its steps."""
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import LabelEncoder, MinMaxScaler

    out.mkdir()
    laps, start = {}, time.perf_counter()
    if shape == "movielens":
        table = pd.read_csv(raw / "ratings.csv", nrows=rows).merge(pd.read_csv(raw / "movies.csv"), on="movieId", how="left")
        table["label2"], table["label3"] = (table.rating > 2).astype(int), (table.rating > 3).astype(int)
        sparse, dense = ["userId", "movieId", "genres"], ["timestamp"]
        table = table[[*sparse, *dense, "label2", "label3"]]
    else:
        dense, sparse = [f"I{k}" for k in range(13)], [f"C{k}" for k in range(26)]
        table = pd.read_csv(raw / "train.txt", sep="\t", names=["label", *dense, *sparse], nrows=rows)
        table[sparse], table[dense] = table[sparse].fillna("-1"), table[dense].fillna(0)
    for name in sparse:
        table[name] = LabelEncoder().fit_transform(table[name])
    table[dense] = MinMaxScaler().fit_transform(table[dense])
    train, rest = train_test_split(table, test_size=0.2, random_state=2024)
    valid, test = train_test_split(rest, test_size=0.5, random_state=2024)
    laps["encode"] = time.perf_counter() - start
    for form in ("parquet", "csv"):
        start = time.perf_counter()
        for name, part in (("train", train), ("valid", valid), ("test", test)):
            path = out / f"{name}.{form}"
            part.to_parquet(path) if form == "parquet" else part.to_csv(path, index=False)
        laps[form] = time.perf_counter() - start
    return laps


def decode(shape: str, raw: Path) -> dict[str, float]:
    """Read the file with the rows as Arrow's reader does, on all cores, and keep nothing."""
    read = pa.csv.ReadOptions(autogenerate_column_names=shape == "criteo", block_size=8 << 20)
    parse = pa.csv.ParseOptions(delimiter="\t" if shape == "criteo" else ",", quote_char=False)
    types = {f"f{k}": pa.string() if k > 13 else pa.int64() for k in range(40)} if shape == "criteo" else None
    start = time.perf_counter()
    convert = pa.csv.ConvertOptions(column_types=types)
    for _ in pa.csv.open_csv(raw / SHAPES[shape].file, read, parse, convert):
        pass
    return {"seconds": time.perf_counter() - start}


def measure(command: list[str], log: Path, checkout: Path | None = None, threads: int | None = None) -> dict[str, Any]:
    """Run `python -m ...`: wall seconds, CPU seconds, peak memory of the process. Raises SystemExit when it fails.

    Args:
        checkout: where the code that runs lies, when it is not this one's.
        threads: of OpenMP, in each process.
    """
    environment = {**os.environ} | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT, cwd=checkout, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu": cpu, "peak_gib": usage.ru_maxrss / 2**20}


def run_shape(name: str, rows: int, pandas_rows: int, memory: float, work: Path) -> list[dict[str, Any]]:
    """Measure a shape: ours at a fifth of the rows and at all, the pandas pattern, and plain decoding."""
    found = []
    for what, count in (("ours", rows // 5), ("decode", rows), ("ours", rows), ("pandas", pandas_rows)):
        kept = work / f"{name}-{what}-{count}.json"
        raw = work / f"{name}-{rows if what == 'pandas' else count}"
        generate(name, raw, rows if what == "pandas" else count)
        if not kept.exists():
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            command = [
                "benchmarks.preprocessing",
                "--step",
                what,
                "--shapes",
                name,
                "--rows",
                str(count),
                "--work-dir",
                str(work),
            ]
            command += ["--raw", str(raw)]
            if what == "ours":
                command = [
                    "preprocessing",
                    *SHAPES[name].command,
                    "--raw",
                    str(raw),
                    "--out",
                    str(out),
                    "--memory",
                    str(memory),
                ]
            print(f"{name}: {what}, {count:,} rows ...", file=sys.stderr, flush=True)
            result = measure(command, kept.with_suffix(".log"))
            if what != "ours":
                result |= json.loads((work / "step.json").read_text(encoding="utf-8"))
            size = (raw / SHAPES[name].file).stat().st_size / (rows if what == "pandas" else count)
            result |= {"shape": name, "what": what, "rows": count, "bytes_per_row": size}
            kept.write_text(json.dumps(result), encoding="utf-8")
            shutil.rmtree(out, ignore_errors=True)
        found.append(json.loads(kept.read_text(encoding="utf-8")))
    return found


def report(results: list[dict[str, Any]]) -> str:
    """The table: one row a measurement, the pandas pattern with each of its two outputs."""
    rows, rates = [], {}
    for r in results:
        forms = {"": r["seconds"]}
        if r["what"] == "pandas":
            forms = {f", to_{form}": r["seconds"] - r[other] for form, other in (("csv", "parquet"), ("parquet", "csv"))}
        for form, seconds in forms.items():
            rate = r["rows"] / seconds
            rates[r["shape"], r["what"] + form] = rate  # of ours, the larger size comes last
            figures = [f"{seconds:.1f}", f"{r['cpu']:.1f}", f"{rate:,.0f}", f"{rate * r['bytes_per_row'] / 1e6:.0f}"]
            rows.append([r["shape"], r["what"] + form, f"{r['rows']:,}", *figures, f"{r['peak_gib']:.2f}"])
    lines = [tabulate(rows, ["shape", "what", "rows", "s", "CPU s", "rows/s", "MB/s", "peak GiB"], stralign="right")]
    for shape in dict.fromkeys(r["shape"] for r in results):
        ours = rates[shape, "ours"]
        ratios = [f"{ours / rates[shape, f'pandas, to_{form}']:.1f}x pandas with to_{form}" for form in ("csv", "parquet")]
        lines.append(f"{shape}: {', '.join(ratios)}, {ours / rates[shape, 'decode']:.0%} of the speed of plain decoding")
    return "\n".join(lines)


def main() -> None:
    """Measure each shape and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", type=int, help="of each shape, instead of its own number")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rows")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for ours (default: 4)")
    parser.add_argument("--work-dir", type=local_path, default=Path("benchmark-preprocessing"))
    parser.add_argument("--step", choices=["pandas", "decode"], help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=local_path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        pattern = options.step == "pandas"
        step = (
            pandas_pattern(options.shapes, options.raw, options.work_dir / "out", options.rows)
            if pattern
            else decode(options.shapes, options.raw)
        )
        (options.work_dir / "step.json").write_text(json.dumps(step), encoding="utf-8")
        return
    options.work_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for name in options.shapes.split(","):
        shape = SHAPES[name]
        rows = options.rows or shape.rows // (20 if options.quick else 1)
        results += run_shape(name, rows, min(rows, shape.pandas_rows), options.memory, options.work_dir)
    text = report(results)
    print(text)
    (options.work_dir / "report.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
