"""What the start of a run costs: processor time of a training of 16 steps, nearly all of which is spent before its first step.

git worktree add ../before COMMIT
python -m benchmarks.start [--before ../before] [--rounds 6] [--ranks 1,2] [--work-dir DIR]

Each training is measured on a machine as it is, and again beside 3 other programs that multiply matrices in 2 threads each,
which this command starts and ends. One rank has 2 threads, each of several has one. Code of two checkouts takes turns, A B,
B A, ..., in one environment on the same generated data; the first training of each is not counted. Processor time is user and
system time of all processes of a training, the agent of several ranks among them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

from tabulate import tabulate

from benchmarks import preprocessing
from mmlrec.paths import local_path

_HERE = Path(__file__).parents[1]
_ROWS = 20_000
_OTHERS = 3
#: Multiplies until whoever started it is gone, however that ended.
_OTHER = """
import os, sys, torch
parent, matrix = os.getppid(), torch.randn(300, 300)
torch.set_num_threads(2)
print("multiplying", flush=True)
while os.getppid() == parent:
    matrix @ matrix
"""


@contextmanager
def others(number: int) -> Iterator[None]:
    """Other programs that need the cores, at work for as long as the block lasts."""
    started: list[subprocess.Popen[str]] = []
    try:
        command = [sys.executable, "-c", _OTHER]
        started.extend(subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number))
        for process in started:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit("a program that multiplies matrices has failed; its message is above")
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


def training(checkout: Path, ranks: int, work: Path) -> dict[str, Any]:
    """Measure one training of 16 steps with the code of a checkout, see `preprocessing.measure`."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    settings = [f"dataset.path={work / f'synthetic-{_ROWS}'}", "training.max_steps=16", "training.batch_size=1024"]
    command = [*launcher, "apps.train", "--config", "configs/scaling/synthetic.yaml", *settings, "--run-dir", str(run)]
    return preprocessing.measure(command, work / "log", checkout, threads=2 if ranks == 1 else 1)


def compare(sides: dict[str, Path], ranks: int, rounds: int, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Measured trainings of each side, in turn."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides)[:: -1 if number % 2 else 1]:
            found[side].append(training(sides[side], ranks, work))
            print(side, json.dumps(found[side][-1]), file=sys.stderr, flush=True)
    return found


def table_rows(case: Sequence[str], found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Rows of the table: the case, the side, processor seconds, wall seconds, and both against the first side."""
    first = next(iter(found.values()))
    rows = []
    for side, measured in found.items():
        cpu, before = [one["cpu"] for one in measured], [one["cpu"] for one in first]
        figures = [median(cpu), mean(cpu), min(cpu), max(cpu), median(one["seconds"] for one in measured)]
        ratios = [median(cpu) / median(before), mean(cpu) / mean(before)]
        rows.append([*case, side, *(f"{figure:.2f}" for figure in (*figures, *ratios))])
    return rows


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=local_path, help="checkout to compare with")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--ranks", default="1,2", help="comma list (default: 1,2)")
    parser.add_argument("--work-dir", type=local_path, default=Path("benchmark-start"), help="keeps the generated data")
    options = parser.parse_args()
    work = options.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    data = work / f"synthetic-{_ROWS}"
    if not data.exists():
        shape = ["--rows", str(_ROWS), "--tasks", "2", "--scenarios", "3"]
        preprocessing.measure(["preprocessing", "synthetic", *shape, "--out", str(data)], work / "log", _HERE)
    sides = ({"before": options.before.resolve()} if options.before else {}) | {"now": _HERE}
    rows = []
    for ranks in map(int, options.ranks.split(",")):
        compare(sides, ranks, 1, work)  # Files come into the cache, modules are compiled.
        for number in (0, _OTHERS):
            with others(number):
                found = compare(sides, ranks, options.rounds, work)
            rows += table_rows([str(ranks), str(number)], found)
    headers = ["ranks", "others", "code", "cpu s, median", "mean", "min", "max", "wall s, median"]
    headers += [f"median / {next(iter(sides))}", f"mean / {next(iter(sides))}"]
    print(tabulate(rows, headers=headers, disable_numparse=True, stralign="right"))


if __name__ == "__main__":
    main()
