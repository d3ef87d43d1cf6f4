"""What a change costs or gains, whatever the machine does: code of two checkouts, measured in alternating pairs.

git worktree add ../before COMMIT
python -m benchmarks.paired --before ../before [--cases a,b,movielens,criteo] [--pairs 10] [--work-dir DIR]

a, b: samples/s of training at those shapes of `benchmarks.throughput`. movielens, criteo: seconds of preprocessing 5,000,000
and 2,000,000 generated lines, as `benchmarks.preprocessing` has them. Both sides run in the same environment on the same data,
in the order A B, B A, A B, ...; a ratio is time now over time before of one pair, so above 1 is slower. The interval is that of
the median, by order statistics: it holds whatever the distribution of the noise.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tabulate import tabulate

from benchmarks import preprocessing, throughput
from mmlrec.paths import local_path

_HERE = Path(__file__).parents[1]
_ROWS = {"movielens": 5_000_000, "criteo": 2_000_000}


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Least and greatest of the values that hold the median with a probability of at least `level`; all of few values."""
    count, ordered = len(values), sorted(values)
    left_out, tail = 0, 0.5**count
    while left_out < (count - 1) // 2 and 2 * (tail := tail + math.comb(count, left_out + 1) * 0.5**count) <= 1 - level:
        left_out += 1
    return ordered[left_out], ordered[-1 - left_out]


def training(shape: str, work: Path, threads: int) -> Callable[[Path], float]:
    """What measures seconds a sample of training at a shape with the code of a checkout."""
    dataset = work / f"shape-{shape}"
    if not dataset.exists():
        throughput.generate(dataset, throughput.SHAPES[shape], 400_000, 2, threads)
    shape_of = throughput.SHAPES[shape]
    return lambda checkout: 1 / throughput.ours(work, dataset, shape_of, "fp32", threads, checkout=checkout).samples_per_second


def encoding(shape: str, work: Path) -> Callable[[Path], float]:
    """What measures seconds of preprocessing generated raw files with the code of a checkout."""
    raw, out = work / f"{shape}-{_ROWS[shape]}", work / "out"
    preprocessing.generate(shape, raw, _ROWS[shape])
    command = ["preprocessing", *preprocessing.SHAPES[shape].command, "--raw", str(raw), "--out", str(out)]

    def seconds(checkout: Path) -> float:
        shutil.rmtree(out, ignore_errors=True)
        return float(preprocessing.measure(command, work / "log", checkout)["seconds"])

    return seconds


def main() -> None:
    """Measure each case and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paired", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=local_path, required=True, help="checkout to compare with")
    parser.add_argument("--cases", default="a,b,movielens,criteo", help="comma list (default: all)")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2, help="of training (default: 2)")
    parser.add_argument("--work-dir", type=local_path, default=Path("benchmark-paired"), help="keeps the generated data")
    options = parser.parse_args()
    work = options.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in options.cases.split(","):
        measure = encoding(case, work) if case in _ROWS else training(case, work, options.threads)
        sides = {"before": options.before.resolve(), "now": _HERE}
        for checkout in sides.values():
            measure(checkout)  # Files come into the cache, modules are compiled.
        pairs: list[dict[str, float]] = []
        for number in range(options.pairs):
            order = list(sides)[:: -1 if number % 2 else 1]
            pairs.append({side: measure(sides[side]) for side in order})
            print(case, json.dumps(pairs[-1]), file=sys.stderr, flush=True)
        ratios = [pair["now"] / pair["before"] for pair in pairs]
        low, high = median_interval(ratios)
        times = [f"{median(pair[side] for pair in pairs):.4g}" for side in sides]
        rows.append([case, len(pairs), *times, f"{median(ratios):.3f}", f"{low:.3f} to {high:.3f}"])
    headers = ["case", "pairs", "s before", "s now", "now / before", "95 % interval"]
    print(tabulate(rows, headers=headers, disable_numparse=True, stralign="right"))


if __name__ == "__main__":
    main()
