"""What training day by day is worth: next-day AUC and cost beside training from scratch, on all days so far or the last one.

python -m benchmarks.days [--data movielens,synthetic] [--raw data/raw/ml-1m] [--work-dir DIR]

MovieLens-1M is cut by time into days of equally many ratings; the synthetic log drifts (`python -m preprocessing synthetic
--day`). Each day is encoded with --extend of the one before. Three ways to have a model for day k from what came before it:

* days: apps.days, from the model of the day before;
* all so far: a new model on the rows of the days 1 to k - 1;
* last day: a new model on the rows of day k - 1.

All three have one configuration and one epoch, read rows that are encoded alike, and are measured on all rows of day k. Cost
is CPU time of training and measuring; preprocessing is left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from mmlrec.config import RunConfig
from mmlrec.days.folders import Day, find_days
from mmlrec.days.run import measure, run_days
from mmlrec.distributed.world import World, process_group
from mmlrec.paths import local_path
from mmlrec.registry import load
from mmlrec.schema import DatasetManifest, Split
from mmlrec.training.run import train
from preprocessing.command_line import main as preprocess

_DAYS = 10
_CONFIG = [
    *("training.epochs=1", "training.patience=null", "training.batch_size=512", "training.log_every_steps=1000"),
    "model_defaults={expert_hidden_units: [64, 32], gate_hidden_units: [16], tower_hidden_units: [16]}",
]
_SYNTHETIC = "--rows 40000 --num-ids 2000 --sparse-features 6 --dense-features 2 --drift 0.1"


def movielens_days(raw: Path, work: Path) -> None:
    """MovieLens-1M as day-01 to day-10, raw files and datasets."""
    ratings, packed = raw / "ratings.dat", raw / "ratings.dat.gz"
    content = ratings.read_bytes() if ratings.is_file() else gzip.decompress(packed.read_bytes())
    lines = content.decode("ascii").splitlines(keepends=True)
    times = np.array([int(line.rsplit("::", 1)[1]) for line in lines])
    for number, rows in enumerate(np.array_split(np.argsort(times, kind="stable"), _DAYS), start=1):
        folder = work / "raw" / f"day-{number:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ratings.dat").write_text("".join(lines[row] for row in rows), encoding="ascii")
        for name in ("users.dat", "movies.dat"):
            shutil.copyfile(raw / name, folder / name)
        _encode(work, number, ["movielens-1m", "--raw", str(folder)])


def synthetic_days(work: Path) -> None:
    """Days of a log that drifts."""
    for number in range(1, _DAYS + 1):
        _encode(work, number, ["synthetic", *_SYNTHETIC.split(), "--day", str(number)])


def _encode(work: Path, number: int, arguments: list[str]) -> None:
    extended = ["--extend", str(work / f"day-{number - 1:02d}")] if number > 1 else []
    if code := preprocess([*arguments, *extended, "--out", str(work / f"day-{number:02d}")]):
        raise SystemExit(code)


def all_so_far(days: list[Day], folder: Path) -> Path:
    """One dataset of the rows of all these days, encoded as the last of them, which knows the ids of all; parts are links."""
    last = days[-1]
    splits = {}
    for name in last.manifest.splits:
        parts = []
        for day in days:
            for part in day.manifest.splits[name].parts:
                path = f"{name}/{day.name}-{Path(part.path).name}"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                os.link(Path(str(day.folder)) / part.path, folder / path)
                parts.append(part.model_copy(update={"path": path}))
        counts = [day.manifest.splits[name].label_counts for day in days]
        labels = {
            task: {scenario: _sums([of_day[task][scenario] for of_day in counts]) for scenario in of_task}
            for task, of_task in counts[-1].items()
        }
        rows = {
            scenario: sum(day.manifest.splits[name].scenario_rows[scenario] for day in days)
            for scenario in last.manifest.splits[name].scenario_rows
        }
        total = sum(part.num_rows for part in parts)
        splits[name] = Split(parts=parts, num_rows=total, scenario_rows=rows, label_counts=labels)
    shutil.copytree(Path(str(last.folder)) / "vocab", folder / "vocab")
    last.manifest.model_copy(update={"splits": splits}).save(folder)
    return folder


def _sums(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def compare(config: RunConfig, days: list[Day], work: Path, world: World) -> list[dict[str, Any]]:
    """By way: mean next-day AUC over tasks of each day but the first, and CPU seconds."""
    runs = work / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    start = time.process_time()
    lines = run_days(config, days, runs / "days", world)
    found = [{"way": "days", "seconds": time.process_time() - start, "auc": [_auc(line["next_day"]) for line in lines[1:]]}]

    def from_scratch(way: str, data: Callable[[int], Path]) -> None:
        folders = [data(number) for number in range(1, len(days))]
        start, auc = time.process_time(), []
        for number, folder in enumerate(folders, start=1):
            run_dir = runs / way.replace(" ", "-") / days[number].name
            dataset = config.dataset.model_copy(update={"path": str(folder)})
            train(config.model_copy(update={"dataset": dataset}), run_dir, world)
            auc.append(_auc(measure(run_dir, days[number], world)[0]))
        found.append({"way": way, "seconds": time.process_time() - start, "auc": auc})

    from_scratch("all so far", lambda number: all_so_far(days[:number], runs / "data" / days[number].name))
    from_scratch("last day", lambda number: Path(str(days[number - 1].folder)))
    return found


def _auc(report: dict[str, Any]) -> float:
    return float(report["mean"]["auc"])


def tables(days: list[Day], found: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = [way["way"] for way in found]
    rows = [[day.name, *(f"{way['auc'][number]:.4f}" for way in found)] for number, day in enumerate(days[1:])]
    rows.append(["mean", *(f"{np.mean(way['auc']):.4f}" for way in found)])
    seconds = [way["seconds"] for way in found]
    cost = [["CPU seconds", *(f"{of_way:.0f}" for of_way in seconds)]]
    cost.append(["relative to days", *(f"{of_way / seconds[0]:.1f}" for of_way in seconds)])
    return tabulate([*rows, *cost], headers=["next-day AUC", *names], tablefmt="github", disable_numparse=True)


def main() -> None:
    """Make the days, train in the three ways, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.days", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="movielens,synthetic")
    parser.add_argument("--raw", type=local_path, default=Path("data/raw/ml-1m"), help="raw files of MovieLens-1M")
    parser.add_argument("--work-dir", type=local_path, default=Path("benchmark-days"))
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for every run")
    options = parser.parse_intermixed_args()
    with process_group() as world:
        for name in options.data.split(","):
            work = options.work_dir / name
            if not (work / f"day-{_DAYS:02d}").is_dir():
                movielens_days(options.raw, work) if name == "movielens" else synthetic_days(work)
            days = find_days(str(work / "day-*"))
            shipped = "mtl/movielens" if name == "movielens" else "scaling/synthetic"
            config = load(shipped, [f"dataset.path={days[0].folder}", *_CONFIG, *options.overrides])
            found = compare(config, days, work, world)
            (work / "days.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            new = {day.name: sum(line.values()) for day, line in zip(days, _new_ids(days), strict=True)}
            print(f"\n{name}: new ids {new}\n\n{tables(days, found)}", flush=True)


def _new_ids(days: list[Day]) -> list[dict[str, int]]:
    from mmlrec.days.folders import new_ids

    before: list[DatasetManifest | None] = [None, *(day.manifest for day in days)]
    return [new_ids(old, day.manifest) for old, day in zip(before, days, strict=False)]


if __name__ == "__main__":
    main()
