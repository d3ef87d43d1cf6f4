"""Training throughput on one process: end to end from Parquet, against `benchmarks.baseline`, and on resident batches.

python -m benchmarks.throughput [--shapes a,b,c] [--rounds 2] [--threads 2] [--device cpu] [--batch 4096]
                                [--apart bf16,compiled]

Each round runs baseline and fp32 one after the other as processes of their own; figures are medians. Forms that are kept
apart run once, in the first round: bf16, and the baseline as torch.compile makes it. End to end is `apps.train` with its
reader; resident are the same steps on a few batches that are on the device already, and the lookup with the update of the
tables alone. The floor is the time of the network's matrix products at the rate measured in this run, plus the bytes of the
lookups at the copy rate. Start-up is what passes before the first step, and what the first window of steps takes longer
than the others. The baseline is code for CPUs, and is left out with --device cuda.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from apps.cli import share_cores
from mmlrec.layers.products import at_input
from mmlrec.paths import local_path

BATCH = 4096


@dataclass(frozen=True)
class Shape:
    """One benchmark case. `ids` is what `preprocessing synthetic --num-ids` takes; `steps` are those of a window.

    Five windows are within an epoch of the generated rows where validations and checkpoints take their time.
    """

    sparse: int
    dense: int
    dim: int
    ids: str
    steps: int
    baseline_steps: int

    @property
    def input_width(self) -> int:
        """Width of the model input."""
        return self.sparse * self.dim + self.dense

    def forward_flops(self) -> int:
        """Multiply-adds x 2 of one sample: 4 experts [256, 128], 2 gates [64], 2 towers [64]."""
        d = self.input_width
        experts = 4 * (d * 256 + 256 * 128)
        gates = 2 * (d * 64 + 64 * 4 + 4 * 128)
        towers = 2 * (128 * 64 + 64)
        return 2 * (experts + gates + towers)

    def lookup_bytes(self) -> int:
        """Bytes moved for one sample: a read forward; backward the gradient, and reads and writes of weight and state."""
        return self.sparse * self.dim * 4 * (1 + 1 + 2 + 2)


_B_SIZES = [round(10 * 10 ** (5 * i / 25)) for i in range(26)]
SHAPES = {
    "a": Shape(7, 0, 8, "2,7,21,18,3439,6040,3706", 30, 10),
    "b": Shape(26, 13, 16, ",".join(map(str, _B_SIZES)), 15, 3),
    "c": Shape(26, 13, 16, ",".join(map(str, [*_B_SIZES[:-3], 5_000_000, 5_000_000, 10_000_000])), 15, 1),
}


def rates(threads: int, device: str = "cpu") -> dict[str, float]:
    """Rates of this machine now: FLOP/s of a large matrix product in each precision, bytes/s of a copy (read + write).

    A product is that of the fastest way that there is here, so that the floor is one of this machine and not of a library.
    """
    torch.set_num_threads(threads)
    place, on_gpu = torch.device(device), device == "cuda"
    rows, numbers, calls = (65536, 1 << 28, 5) if on_gpu else (BATCH, 1 << 25, 1)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(rows, 512, device=place).to(dtype), torch.randn(512, 1024, device=place).to(dtype)
        ways: list[Callable[[], object]] = [partial(torch.matmul, a, b)]
        if not on_gpu:  # the one of hidden layers, which may be another library's
            ways.append(partial(at_input, a, b.t().contiguous()))
        times = [median([seconds_of(way, place, calls) for _ in range(30)][5:]) for way in ways]
        found[name] = 2 * rows * 512 * 1024 / min(times)
    source, target = torch.randn(numbers, device=place), torch.empty(numbers, device=place)
    times = [seconds_of(partial(target.copy_, source), place, calls) for _ in range(8)]
    return found | {"copy": 2 * 4 * numbers / median(times[2:])}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call; `calls` are timed together, so that on a GPU their starts overlap as they do in training."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def _run(command: list[str], threads: int, checkout: Path | None = None, device: str | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    share_cores(environment)  # as a training does for itself, so that all that is compared waits alike
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=checkout, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def generate(dataset: Path, shape: Shape, rows: int, tasks: int, threads: int) -> None:
    """Write a generated dataset of a shape, all splits together `rows` rows."""
    _run(generation(dataset, shape, rows, tasks), threads)


def generation(dataset: Path, shape: Shape, rows: int, tasks: int) -> list[str]:
    """What Python is to run (`-m`) to write a generated dataset of a shape."""
    options = {
        "rows": rows,
        "num-ids": shape.ids,
        "sparse-features": shape.sparse,
        "dense-features": shape.dense,
        "tasks": tasks,
    }
    return ["preprocessing", "synthetic", "--out", str(dataset), *(f"--{key}={value}" for key, value in options.items())]


def write_config(config: Path, dataset: Path, shape: Shape, training: str = "") -> Path:
    """Write a configuration of a shape; `training` is its section, as YAML in one line."""
    config.write_text(
        f"dataset: {{path: {dataset}, setting: mtl}}\n"
        "model: {name: mmoe, num_experts: 4, expert_hidden_units: [256, 128],"
        " gate_hidden_units: [64], tower_hidden_units: [64]}\n"
        f"embeddings: {{dim: {shape.dim}}}\n" + (f"training: {training}\n" if training else ""),
        encoding="utf-8",
    )
    return config


class Speed(NamedTuple):
    """Of one process."""

    samples_per_second: float
    #: Before the first step, and what the first window of steps took longer than the others.
    start_up_seconds: float


def _speed(started: float, first_step: float, windows: list[float], rows: int) -> Speed:
    """From the times of day when a process began and its first step did, and samples/s of each window of `rows`."""
    steady = median(windows[1:])
    return Speed(steady, first_step - started + max(0.0, rows / windows[0] - rows / steady))


def baseline(dataset: Path, shape: Shape, threads: int, *, batch: int = BATCH, compiled: bool = False) -> Speed:
    """The speed of `benchmarks.baseline`."""
    steps = max(1, round(shape.baseline_steps * BATCH / batch))
    options = ["--dataset", str(dataset), "--dim", str(shape.dim), "--batch-size", str(batch), "--steps", str(steps)]
    started = time.time()
    found = json.loads(_run(["benchmarks.baseline", *options, *(["--compile"] if compiled else [])], threads))
    return _speed(started, found["first_step"], found["samples_per_second"], steps * batch)


def ours(
    folder: Path,
    dataset: Path,
    shape: Shape,
    precision: str,
    threads: int,
    *overrides: str,
    checkout: Path | None = None,
    batch: int = BATCH,
    device: str | None = None,
) -> Speed:
    """The speed that a run of apps.train reports for itself.

    Args:
        checkout: where the code that runs lies, when it is not this one's; then the other paths must be absolute.
        batch: rows of a step.
        device: "cpu" hides what else there is.
    """
    config, steps = write_config(folder / "config.yaml", dataset, shape), _window(shape, batch, device, on_gpu=12)
    run, started = folder / f"run-{precision}-{time.time_ns()}", time.time()
    _run(
        [
            "apps.train",
            "--config",
            str(config),
            "--run-dir",
            str(run),
            f"training.precision={precision}",
            "training.patience=null",
            f"training.batch_size={batch}",
            f"training.max_steps={5 * steps}",
            f"training.log_every_steps={steps}",
            *overrides,
        ],
        threads,
        checkout,
        device,
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [line["samples_per_second"] for line in lines if line["split"] == "train"]
    first_step = (run / "tensorboard").stat().st_mtime  # its one file is made when the loop begins
    subprocess.run(["rm", "-rf", str(run)], check=True)
    return _speed(started, first_step, speeds, steps * batch)


def _window(shape: Shape, batch: int, device: str | None, *, on_gpu: int) -> int:
    """Steps of a window: the rows that it has at `BATCH`; on a GPU, where those are over in milliseconds, at least `on_gpu`."""
    return max(on_gpu if device == "cuda" else 2, round(shape.steps * BATCH / batch))


def resident(
    folder: Path, dataset: Path, shape: Shape, precision: str, threads: int, batch: int, device: str
) -> dict[str, Any]:
    """What `benchmarks.resident` measures of a shape, in a process of its own."""
    command = ["benchmarks.resident", "--config", str(write_config(folder / "config.yaml", dataset, shape)), "--device", device]
    steps = _window(shape, batch, device, on_gpu=40)  # each window fills the pipeline, and drains it
    command += ["--steps", str(steps), f"training.precision={precision}", f"training.batch_size={batch}"]
    found: dict[str, Any] = json.loads(_run(command, threads, device=device))
    return found


#: Columns of `resident_row`.
RESIDENT = [
    *("shape", "code", "samples/s", "step ms", "products' floor ms", "lookup + update ms", "its floor ms"),
    *("of copy rate", "floors / step", "distinct ids", "waits a step"),
]


def resident_row(
    name: str, precision: str, found: dict[str, Any], shape: Shape, batch: int, rate: dict[str, float]
) -> list[str]:
    """A row of the table of resident batches: times of a step beside their floors.

    Args:
        found: of `resident`.
        rate: of `rates`.
    """
    products = 1000 * batch * 3 * shape.forward_flops() / rate[precision]
    moved = 1000 * batch * shape.lookup_bytes() / rate["copy"]
    step, tables = found["step_ms"], found["lookup_update_ms"]
    return [
        *(name, precision, f"{1000 * batch / step:,.0f}", f"{step:.2f}", f"{products:.2f}", f"{tables:.2f}", f"{moved:.2f}"),
        *(f"{moved / tables:.0%}", f"{(products + moved) / step:.0%}", f"{found['distinct_ids']:.0%}"),
        "" if found["waits"] is None else f"{sum(found['waits'].values()):g}",
    ]


def main() -> None:
    """Measure each shape and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="a,b,c")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"rows of a step ({BATCH})")
    parser.add_argument("--rows", type=int, default=400_000, help="rows of the generated dataset, all splits")
    parser.add_argument("--work-dir", type=local_path, help="keep the generated data here")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--apart", default="bf16", help="forms that run once, of bf16,compiled; empty: none (default: bf16)")
    arguments = parser.parse_args()
    device, batch = arguments.device, arguments.batch
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: no GPU is visible.")
    usual = ("fp32",) if arguments.no_baseline or device == "cuda" else ("baseline", "fp32")
    apart = tuple(filter(None, arguments.apart.split(",")))
    if not {*apart} <= {"bf16", "compiled"}:
        parser.error(f"--apart {arguments.apart}: choose of bf16,compiled")
    if "compiled" in apart and device == "cuda":
        parser.error("--apart compiled: the baseline is code for CPUs, not for --device cuda")
    machine = rates(arguments.threads, device)
    print(
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, {arguments.threads} threads, batch {batch:,}"
        f" | matrix products {machine['fp32'] / 1e9:.0f} GFLOP/s fp32,"
        f" {machine['bf16'] / 1e9:.0f} bf16 | copy {machine['copy'] / 1e9:.1f} GB/s"
    )
    rows, of_resident = [], []
    with TemporaryDirectory() as scratch:
        folder = Path(arguments.work_dir or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.shapes.split(","):
            shape = SHAPES[name]
            dataset = folder / f"shape-{name}"
            generate(dataset, shape, arguments.rows, 2, arguments.threads)
            speeds: dict[str, list[Speed]] = {form: [] for form in (*usual, *apart)}
            for number in range(arguments.rounds):
                for form in (*usual, *(apart if number == 0 else ())):
                    if form in ("baseline", "compiled"):
                        speed = baseline(dataset, shape, arguments.threads, batch=batch, compiled=form == "compiled")
                    else:
                        speed = ours(folder, dataset, shape, form, arguments.threads, batch=batch, device=device)
                    speeds[form].append(speed)
            for form, measured in speeds.items():
                speed = Speed(*(median(values) for values in zip(*measured, strict=True)))
                rate = speed.samples_per_second
                floor = (
                    3 * shape.forward_flops() / machine["bf16" if form == "bf16" else "fp32"]
                    + shape.lookup_bytes() / machine["copy"]
                )
                plain = speeds.get("baseline")
                ratio = rate / median(each.samples_per_second for each in plain) if plain else float("nan")
                rows.append(
                    [
                        *(name, form, str(len(measured)), f"{rate:,.0f}", f"{ratio:.2f}", f"{1e6 * floor:.1f}"),
                        *(f"{1e6 / rate:.1f}", f"{rate * floor:.0%}", f"{speed.start_up_seconds:.1f}"),
                    ]
                )
                print("measured:", *rows[-1], flush=True)
            for precision in ("fp32", *(form for form in apart if form == "bf16")):
                found = resident(folder, dataset, shape, precision, arguments.threads, batch, device)
                of_resident.append(resident_row(name, precision, found, shape, batch, machine))
                print("measured:", *of_resident[-1], flush=True)
    headers = [
        "shape",
        "code",
        "rounds",
        "samples/s",
        "x baseline",
        "floor us/sample",
        "us/sample",
        "of floor rate",
        "start-up s",
    ]
    print("End to end", tabulate(rows, headers=headers, disable_numparse=True, stralign="right"), sep="\n")
    print("\nResident batches", tabulate(of_resident, headers=RESIDENT, disable_numparse=True, stralign="right"), sep="\n")


if __name__ == "__main__":
    main()
