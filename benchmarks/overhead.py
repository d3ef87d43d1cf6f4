"""What reports cost: time of a step with all of them on over that without any, in alternating pairs of one run.

python -m benchmarks.overhead [--cases tiny,a] [--pairs 20] [--processes 2] [--work-dir DIR]

Windows of steps of one training alternate in the order A B, B A, A B, ...: with reports as `apps.train` makes them by default
(the times of each part, the sum over ranks, a line in the log of each rank, metrics.jsonl and TensorBoard every 50 steps), and
with nothing of it. `tiny` has steps of a few milliseconds, where reports cost most; a, b: shapes of `benchmarks.throughput`.
Time by the clock, and CPU time of rank 0, which tells more where other programs run. The heartbeat, by which ranks notice that
one is lost, beats in both. The interval is that of the median (`benchmarks.paired`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from tabulate import tabulate
from torch._C._distributed_c10d import Work

from benchmarks.paired import median_interval
from benchmarks.throughput import SHAPES, Shape, generate
from mmlrec.config import load_config
from mmlrec.distributed.step_parts import StepParts
from mmlrec.distributed.stopping import Asked, StopSignal
from mmlrec.distributed.world import log_file, process_group
from mmlrec.paths import local_path
from mmlrec.run_folder.folder import RunFolder
from mmlrec.run_folder.one_writer import hold
from mmlrec.session.session import build_session
from mmlrec.training.reporting import Reporter
from mmlrec.training.trainer import Trainer

_TINY = Shape(4, 0, 4, "2,20,200,2000", 0, 0)
#: Shape, global batch, steps of a window.
_CASES = {"tiny": (_TINY, 64, 200), "a": (SHAPES["a"], 4096, 100), "b": (SHAPES["b"], 4096, 50)}
_PLAIN_WAIT = Work.wait


class _Alternating(Trainer):
    """Trains windows, every second one without reports; `seconds` has those of a step in each, by the clock and of CPU."""

    window: int
    pairs: int

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._reports = True
        self.seconds: list[tuple[bool, float, float]] = []

    @property
    def finished(self) -> bool:
        """See the base class."""
        return len(self.seconds) >= 2 * self.pairs + 2

    def _segment_end(self) -> int:
        return min(super()._segment_end(), self.progress.step + self.window)

    def _train_segment(self, stop: StopSignal, reporter: Reporter) -> Asked:
        number = len(self.seconds)
        self._reports = number % 4 in (0, 3)
        first = self.progress.step
        self.world.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        with contextlib.nullcontext() if self._reports else _without_reports(reporter):
            super()._train_segment(stop, reporter)
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        if self.progress.step - first == self.window:  # not one that the end of an epoch has cut
            self.seconds.append((self._reports, seconds / self.window, cpu / self.window))
        self._losses.zero_()
        self._loss_steps = 0
        return Asked.NOTHING

    def _report(self, reporter: Reporter) -> None:
        if self._reports:
            super()._report(reporter)

    def _validate(self, reporter: Reporter, stop: StopSignal) -> None:
        self.validation_due = False


@contextlib.contextmanager
def _without_reports(reporter: Reporter) -> Iterator[None]:
    nothing = contextlib.nullcontext()

    def do_nothing(*_: object) -> contextlib.nullcontext[None]:  # a mock's own would take longer than what it stands for
        return nothing

    with (
        mock.patch.object(StepParts, "of", do_nothing),
        mock.patch.object(StepParts, "backward_of", do_nothing),
        mock.patch.object(Work, "wait", _PLAIN_WAIT),
        mock.patch.object(reporter, "advance", do_nothing),
    ):
        yield


def work(config: Path, folder: Path, window: int, pairs: int) -> None:
    """One rank."""
    _Alternating.window, _Alternating.pairs = window, pairs
    with process_group() as world, hold(folder, world) as lock:
        run_folder = RunFolder(folder, lock)
        if world.is_main:
            run_folder.create()
        world.barrier()
        trainer = _Alternating(build_session(load_config(config), world, for_training=True), run_folder)
        with log_file(run_folder.log_of(world.rank), world), StopSignal(world) as stop:
            trainer.fit(stop)
        if world.is_main:
            (folder / "seconds.json").write_text(json.dumps(trainer.seconds), encoding="utf-8")


def measure(case: str, work_dir: Path, pairs: int, processes: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step (with, without) of each pair, by the clock and of CPU."""
    shape, batch, window = _CASES[case]
    dataset, folder, config = work_dir / f"shape-{case}", work_dir / f"overhead-{case}", work_dir / f"overhead-{case}.yaml"
    if not dataset.exists():
        generate(dataset, shape, 400_000, 2, processes)
    units = "[16], gate_hidden_units: [], tower_hidden_units: []" if case == "tiny" else "[256, 128]"
    config.write_text(
        f"dataset: {{path: {dataset}, setting: mtl}}\n"
        f"model: {{name: mmoe, num_experts: 4, expert_hidden_units: {units}}}\n"
        f"embeddings: {{dim: {shape.dim}}}\n"
        f"training: {{batch_size: {batch}, epochs: 100000, patience: null}}\n",
        encoding="utf-8",
    )
    shutil.rmtree(folder, ignore_errors=True)
    own = ["-m", "benchmarks.overhead", "--work", str(config), str(folder), str(window), str(pairs)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run([sys.executable, *launcher, *own], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    windows = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))[2:]  # the first two warm up
    found: dict[str, list[tuple[float, float]]] = {"clock": [], "CPU": []}
    for one, other in zip(windows[::2], windows[1::2], strict=True):
        with_reports, without = sorted([one, other], reverse=True)  # True sorts above False
        for number, name in enumerate(found, start=1):
            found[name].append((with_reports[number], without[number]))
    shutil.rmtree(folder)
    return found


def main() -> None:
    """Measure each case and print the table."""
    if sys.argv[1:2] == ["--work"]:
        config, folder, window, count = sys.argv[2:]
        return work(Path(config), Path(folder), int(window), int(count))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="tiny,a", help="comma list (default: tiny,a)")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work-dir", type=local_path, default=Path("benchmark-overhead"), help="keeps the generated data")
    options = parser.parse_args()
    work_dir = options.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in options.cases.split(","):
        for name, pairs in measure(case, work_dir, options.pairs, options.processes).items():
            ratios = [with_reports / without for with_reports, without in pairs]
            low, high = median_interval(ratios)
            times = [f"{1000 * median(times):.3f}" for times in zip(*pairs, strict=True)]
            rows.append([case, name, len(pairs), *times, f"{median(ratios):.4f}", f"{low:.4f} to {high:.4f}"])
            print("measured:", *rows[-1], file=sys.stderr, flush=True)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}, {options.processes} process(es)")
    headers = ["case", "time", "pairs", "ms a step with reports", "without", "with / without", "95 % interval"]
    print(tabulate(rows, headers=headers, disable_numparse=True, stralign="right"))
    return None


if __name__ == "__main__":
    main()
