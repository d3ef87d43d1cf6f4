"""Training throughput on one process, end to end from Parquet, against `benchmarks.baseline` in the same run.

python -m benchmarks.throughput [--shapes a,b,c] [--rounds 2] [--threads 2]

Each round runs baseline, fp32 and bf16 one after the other as processes of their own; figures are medians. The floor is the
time of the network's matrix products at the rate measured in this run, plus the bytes of the lookups at the copy rate.
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


def rates(threads: int) -> dict[str, float]:
    """Rates of this machine now: FLOP/s of a large matrix product in each precision, bytes/s of a copy (read + write)."""
    torch.set_num_threads(threads)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(BATCH, 512).to(dtype), torch.randn(512, 1024).to(dtype)
        times = [_seconds(partial(torch.matmul, a, b)) for _ in range(30)]
        found[name] = 2 * BATCH * 512 * 1024 / median(times[5:])
    source, target = torch.randn(1 << 25), torch.empty(1 << 25)
    found["copy"] = 2 * 4 * (1 << 25) / median([_seconds(lambda: target.copy_(source)) for _ in range(8)][2:])
    return found


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _run(command: list[str], threads: int, checkout: Path | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
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


def ours(
    folder: Path, dataset: Path, shape: Shape, precision: str, threads: int, *overrides: str, checkout: Path | None = None
) -> float:
    """Median samples/s that a run of apps.train reports for itself after its first window.

    Args:
        checkout: where the code that runs lies, when it is not this one's; then the other paths must be absolute.
    """
    config = folder / "config.yaml"
    config.write_text(
        f"dataset: {{path: {dataset}, setting: mtl}}\n"
        "model: {name: mmoe, num_experts: 4, expert_hidden_units: [256, 128],"
        " gate_hidden_units: [64], tower_hidden_units: [64]}\n"
        f"embeddings: {{dim: {shape.dim}}}\n",
        encoding="utf-8",
    )
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
            f"training.batch_size={BATCH}",
            f"training.max_steps={5 * shape.steps}",
            f"training.log_every_steps={shape.steps}",
            *overrides,
        ],
        threads,
        checkout,
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [line["samples_per_second"] for line in lines if line["split"] == "train"]
    subprocess.run(["rm", "-rf", str(run)], check=True)
    return median(speeds[1:])


def main() -> None:
    """Measure each shape and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="a,b,c")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=400_000, help="rows of the generated dataset, all splits")
    parser.add_argument("--work-dir", type=local_path, help="keep the generated data here")
    parser.add_argument("--no-baseline", action="store_true")
    arguments = parser.parse_args()
    machine = rates(arguments.threads)
    print(
        f"{arguments.threads} threads | matrix products {machine['fp32'] / 1e9:.0f} GFLOP/s fp32,"
        f" {machine['bf16'] / 1e9:.0f} bf16 | copy {machine['copy'] / 1e9:.1f} GB/s"
    )
    rows = []
    with TemporaryDirectory() as scratch:
        folder = Path(arguments.work_dir or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.shapes.split(","):
            shape = SHAPES[name]
            dataset = folder / f"shape-{name}"
            generate(dataset, shape, arguments.rows, 2, arguments.threads)
            speeds: dict[str, list[float]] = {"baseline": [], "fp32": [], "bf16": []}
            for _ in range(arguments.rounds):
                if not arguments.no_baseline:
                    options = ["--dataset", str(dataset), "--dim", str(shape.dim), "--steps", str(shape.baseline_steps)]
                    output = _run(["benchmarks.baseline", *options], arguments.threads)
                    speeds["baseline"].append(json.loads(output)["samples_per_second"])
                for precision in ("fp32", "bf16"):
                    speeds[precision].append(ours(folder, dataset, shape, precision, arguments.threads))
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
    headers = ["shape", "code", "samples/s", "x baseline", "floor us/sample", "us/sample", "of floor rate"]
    print(tabulate(rows, headers=headers, disable_numparse=True, stralign="right"))


if __name__ == "__main__":
    main()
