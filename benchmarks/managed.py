"""Managed tables beside hashed ids and a vocabulary, on a stream of ids that are Zipf-distributed and drift.

python -m benchmarks.managed [--size small] [--seeds 0,1,2] [--ways vocabulary,hash,lfu,lru] [--work-dir DIR] [--out FILE]

The stream is a log of days (`python -m preprocessing synthetic --day`), as days are what keeps a stream in order: within a day
rows are shuffled, as the reader of a training shuffles them anyway. Each day a tenth of the ids, frequent and rare ones alike,
gives way to new ones, and labels depend on the id. The first feature has ids without end; the second a thousand of them.

Four ways to keep the ids of the same rows: a vocabulary that grows by a row for each id of train (`--extend`), hashed ids in a
table of as many rows as there are slots, and managed tables that evict by lfu and by lru. Each is trained by `apps.days`: a
day's model is measured on all rows of the next day, none of which it has seen, and goes on with them. What is shown is the
mean over the later half of the days, and the last day; mean and deviation over the seeds of training.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tabulate import tabulate

from apps.cli import all_imported, check_replaced, run
from mmlrec.config import RunConfig
from mmlrec.days.folders import Day, find_days
from mmlrec.days.run import run_days
from mmlrec.distributed.world import World, process_group
from mmlrec.errors import UserError
from mmlrec.paths import local_path
from mmlrec.registry import load
from preprocessing.command_line import main as preprocess

DRIFT = 0.1
WAYS = ("vocabulary", "hash", "lfu", "lru")
#: Way -> options of preprocessing, and of training.
_ENCODED = {"vocabulary": "", "hash": "--hash {slots}", "lfu": "--managed {slots}", "lru": "--managed {slots}"}
_CONFIG = [
    *("model.name=shared_bottom", "training.epochs=1", "training.patience=null", "training.log_every_steps=1000"),
    *("training.keep_checkpoints=1", "training.validate_every_steps=1000000"),
    "model_defaults={bottom_hidden_units: [32, 16], tower_hidden_units: []}",
]


@dataclass(frozen=True)
class Size:
    """How much: days, rows and ids of a day, slots, global batch, steps between changes of slots, Zipf's exponent."""

    days: int
    rows: int
    ids: int
    slots: int
    batch: int
    update_every: int
    zipf: float


SIZES = {
    "tiny": Size(3, 4_000, 3_000, 100, 256, 4, 0.9),
    "small": Size(6, 80_000, 250_000, 3_000, 1024, 10, 0.9),
    "full": Size(10, 2_500_000, 8_000_000, 100_000, 8192, 20, 0.9),
}


def make_days(size: Size, way: str, folder: Path) -> list[Day]:
    """The days, encoded in one way; those that are there stay."""
    options = f"--rows {size.rows} --num-ids {size.ids},1000 --sparse-features 2 --dense-features 2 --zipf {size.zipf}"
    options += f" --drift {DRIFT} {_ENCODED[way].format(slots=size.slots)}"
    for number in range(1, size.days + 1):
        out = folder / f"day-{number:02d}"
        extend = ["--extend", str(folder / f"day-{number - 1:02d}")] if number > 1 and way == "vocabulary" else []
        if code := preprocess(["synthetic", *options.split(), "--day", str(number), *extend, "--out", str(out)]):
            raise SystemExit(code)
    return find_days(str(folder / "day-*"))


def distinct(days: list[Day]) -> int:
    """Distinct ids of the first feature in train of all days; of keys, which tell them apart."""
    found = np.zeros(0, np.int64)
    for day in days:
        paths = [Path(str(day.folder)) / part.path for part in day.manifest.splits["train"].parts]
        found = np.unique(np.concatenate([found, *(pq.read_table(path, columns=["sparse_0"])[0].to_numpy() for path in paths)]))
    return len(found)


def one_way(config: RunConfig, days: list[Day], folder: Path, world: World) -> dict[str, Any]:
    """Next-day AUC of each day but the first, mean over tasks; what became of the slots; seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    lines = run_days(config, days, folder, world)
    reports = [line["next_day"] for line in lines[1:]]
    found: dict[str, Any] = {
        "auc": [float(report["mean"]["auc"]) for report in reports],
        "seconds": time.process_time() - start,
    }
    if "managed" in reports[-1]:
        tables = [report["managed"]["sparse_0"] for report in reports]
        found["without_slot"] = [table["without_slot"] / table["looked_up"] for table in tables]
        found["occupied"], found["evictions"] = tables[-1]["occupied"], [table["evictions"] for table in tables]
    shutil.rmtree(folder)
    return found


def table(results: list[dict[str, Any]], rows: dict[str, int]) -> str:
    """Markdown: a line for each way."""
    lines = []
    for way in dict.fromkeys(result["way"] for result in results):
        own = [result for result in results if result["way"] == way]
        later = [mean(result["auc"][len(result["auc"]) // 2 :]) for result in own]
        last = [result["auc"][-1] for result in own]
        without = [mean(result["without_slot"]) for result in own if "without_slot" in result]
        evictions = [sum(result["evictions"]) for result in own if "evictions" in result]
        lines.append(
            [
                *(way, f"{rows[way]:,}", _spread(later), _spread(last)),
                f"{100 * mean(without):.1f} %" if without else "-",
                f"{mean(evictions):,.0f}" if evictions else "-",
                f"{mean(result['seconds'] for result in own):.0f}",
            ]
        )
    headers = ["ids", "rows of the table", "AUC, later half", "AUC, last day", "ids without a slot", "evictions", "CPU seconds"]
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True, colalign=align)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def save(results: list[dict[str, Any]], out: Path) -> None:
    """All results as JSON, and a line for each way, seed and day as CSV beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "way", "seed", "day", "next_day_auc", "without_slot", "evictions"])
        for result in results:
            for number, auc in enumerate(result["auc"]):
                of_slots = [result[name][number] if name in result else "" for name in ("without_slot", "evictions")]
                writer.writerow([result["size"], result["way"], result["seed"], number + 2, f"{auc:.6f}", *of_slots])


def main() -> None:
    """Make the days, train in each way with each seed, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.managed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--admit-after", type=int, default=2)
    parser.add_argument("--work-dir", type=local_path, default=Path("benchmark-managed"))
    parser.add_argument("--out", type=local_path, default=None, help="results as JSON, CSV beside it (default: below DIR)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for every run")
    options = parser.parse_intermixed_args()
    all_imported()
    size, work = SIZES[options.size], options.work_dir / options.size
    out = options.out or work / "managed.json"
    check_replaced(out, lambda found: isinstance(found, list) and all("way" in result for result in found))
    if out.with_suffix(".csv").exists() and not out.exists():
        raise UserError(f"{out.with_suffix('.csv')} is there, and would be replaced: give another --out.")
    results: list[dict[str, Any]] = []
    rows: dict[str, int] = {}
    with process_group() as world:
        for seed in options.seeds.split(","):
            for way in options.ways.split(","):
                days = make_days(size, way, work / ("managed" if way in ("lfu", "lru") else way))
                rows[way] = days[-1].manifest.table("sparse_0").num_rows - 1
                if way in ("lfu", "lru") and not {"lfu", "lru"} & {result["way"] for result in results}:
                    print(f"{distinct(days):,} distinct ids in train", flush=True)
                own = [f"dataset.path={days[0].folder}", f"training.batch_size={size.batch}", f"training.seed={seed}"]
                if way in ("lfu", "lru"):
                    rule = {"evict": way, "admit_after": options.admit_after, "update_every": size.update_every}
                    own.append(f"embeddings.managed={json.dumps(rule)}")
                config = load("scaling/synthetic", [*_CONFIG, *own, *options.overrides])
                found = one_way(config, days, work / f"run-{way}-{seed}", world)
                results.append({"size": options.size, "way": way, "seed": int(seed), **found})
                save(results, out)
                print(f"{table(results, rows)}\n", flush=True)


if __name__ == "__main__":
    run(main)
