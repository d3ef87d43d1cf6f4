"""Training throughput on one process: end to end from Parquet, against `benchmarks.baseline`, and on resident batches.

python -m benchmarks.throughput [--shapes a,b,c] [--rounds 2] [--threads 2] [--device cpu] [--batch 4096]

Each round runs baseline, fp32 and bf16 one after the other as processes of their own; figures are medians. End to end is
`apps.train` with its reader; resident are the same steps on a few batches that are on the device already, and the lookup with
the update of the tables alone. The floor is the time of the network's matrix products at the rate measured in this run, plus
the bytes of the lookups at the copy rate. The baseline is code for CPUs, and is left out with --device cuda.
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
from typing import Any

import torch
from tabulate import tabulate

from mmlrec.paths import local_path

BATCH = 4096


@dataclass(frozen=True)
class Shape:
    """One benchmark case. `ids` is what `preprocessing synthetic --num-ids` takes."""

    sparse: int
    dense: int
    dim: int
    ids: str
    steps: int
    baseline_steps: int
    target_fp32: float

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
    "a": Shape(7, 0, 8, "2,7,21,18,3439,6040,3706", 60, 30, 2.0),
    "b": Shape(26, 13, 16, ",".join(map(str, _B_SIZES)), 40, 8, 3.0),
    "c": Shape(26, 13, 16, ",".join(map(str, [*_B_SIZES[:-3], 5_000_000, 5_000_000, 10_000_000])), 40, 2, 20.0),
}


def rates(threads: int, device: str = "cpu") -> dict[str, float]:
    """Rates of this machine now: FLOP/s of a large matrix product in each precision, bytes/s of a copy (read + write)."""
    torch.set_num_threads(threads)
    place, on_gpu = torch.device(device), device == "cuda"
    rows, numbers, calls = (65536, 1 << 28, 5) if on_gpu else (BATCH, 1 << 25, 1)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(rows, 512, device=place).to(dtype), torch.randn(512, 1024, device=place).to(dtype)
        times = [seconds_of(partial(torch.matmul, a, b), place, calls) for _ in range(30)]
        found[name] = 2 * rows * 512 * 1024 / median(times[5:])
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
    options = {
        "rows": rows,
        "num-ids": shape.ids,
        "sparse-features": shape.sparse,
        "dense-features": shape.dense,
        "tasks": tasks,
    }
    named = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    _run(["preprocessing", "synthetic", "--out", str(dataset), *named], threads)


def _config(folder: Path, dataset: Path, shape: Shape) -> Path:
    config = folder / "config.yaml"
    config.write_text(
        f"dataset: {{path: {dataset}, setting: mtl}}\n"
        "model: {name: mmoe, num_experts: 4, expert_hidden_units: [256, 128],"
        " gate_hidden_units: [64], tower_hidden_units: [64]}\n"
        f"embeddings: {{dim: {shape.dim}}}\n",
        encoding="utf-8",
    )
    return config


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
) -> float:
    """Median samples/s that a run of apps.train reports for itself after its first window.

    Args:
        checkout: where the code that runs lies, when it is not this one's; then the other paths must be absolute.
        batch: rows of a step; windows have the rows that they have at `BATCH`.
        device: "cpu" hides what else there is.
    """
    config, steps = _config(folder, dataset, shape), _window(shape, batch)
    run = folder / f"run-{precision}-{time.time_ns()}"
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
    subprocess.run(["rm", "-rf", str(run)], check=True)
    return median(speeds[1:])


def _window(shape: Shape, batch: int) -> int:
    return max(2, round(shape.steps * BATCH / batch))


def resident(
    folder: Path, dataset: Path, shape: Shape, precision: str, threads: int, batch: int, device: str
) -> dict[str, Any]:
    """What `benchmarks.resident` measures of a shape, in a process of its own."""
    command = ["benchmarks.resident", "--config", str(_config(folder, dataset, shape)), "--device", device]
    command += ["--steps", str(_window(shape, batch)), f"training.precision={precision}", f"training.batch_size={batch}"]
    found: dict[str, Any] = json.loads(_run(command, threads, device=device))
    return found


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
        *(f"{moved / tables:.0%}", f"{(products + moved) / step:.0%}", "" if found["waits"] is None else f"{found['waits']:g}"),
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
    arguments = parser.parse_args()
    device, batch = arguments.device, arguments.batch
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: no GPU is visible.")
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
            speeds: dict[str, list[float]] = {"baseline": [], "fp32": [], "bf16": []}
            for _ in range(arguments.rounds):
                if not arguments.no_baseline and device == "cpu":
                    options = ["--dataset", str(dataset), "--dim", str(shape.dim), "--batch-size", str(batch)]
                    options += ["--steps", str(max(1, round(shape.baseline_steps * BATCH / batch)))]
                    output = _run(["benchmarks.baseline", *options], arguments.threads)
                    speeds["baseline"].append(json.loads(output)["samples_per_second"])
                for precision in ("fp32", "bf16"):
                    speed = ours(folder, dataset, shape, precision, arguments.threads, batch=batch, device=device)
                    speeds[precision].append(speed)
            for kind, measured in speeds.items():
                if not measured:
                    continue
                speed = median(measured)
                floor = (
                    3 * shape.forward_flops() / machine["bf16" if kind == "bf16" else "fp32"]
                    + shape.lookup_bytes() / machine["copy"]
                )
                ratio = speed / median(speeds["baseline"]) if speeds["baseline"] else float("nan")
                rows.append(
                    [
                        name,
                        kind,
                        f"{speed:,.0f}",
                        f"{ratio:.2f}",
                        f"{1e6 * floor:.1f}",
                        f"{1e6 / speed:.1f}",
                        f"{speed * floor:.0%}",
                    ]
                )
                print("measured:", *rows[-1], flush=True)
            for precision in ("fp32", "bf16"):
                found = resident(folder, dataset, shape, precision, arguments.threads, batch, device)
                of_resident.append(resident_row(name, precision, found, shape, batch, machine))
                print("measured:", *of_resident[-1], flush=True)
    headers = ["shape", "code", "samples/s", "x baseline", "floor us/sample", "us/sample", "of floor rate"]
    print("End to end", tabulate(rows, headers=headers, disable_numparse=True, stralign="right"), sep="\n")
    headers = ["shape", "code", "samples/s", "step ms", "products' floor ms", "lookup + update ms", "its floor ms"]
    headers += ["of copy rate", "floors / step", "waits a step"]
    print("\nResident batches", tabulate(of_resident, headers=headers, disable_numparse=True, stralign="right"), sep="\n")


if __name__ == "__main__":
    main()
