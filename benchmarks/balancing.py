"""Do balancing strategies help the worst task when tasks compete? Generated data whose best possible AUC is known.

OMP_NUM_THREADS=1 python -m benchmarks.balancing [--strategies static,pcgrad] [--seeds 5] [--out runs/balancing]

Three tasks share a bottom that ends in two units. Half of what ids do to a task is common to tasks 0 and 2 and opposite in
task 1, half is its own: what one task gains in the bottom another loses. Each run trains as `apps.train` does, with early
stopping on validation. The figure is the shortfall of a task's test AUC from the best possible one, over seeds (mean ±
standard deviation); that of each run's worst task is what balancing is for.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from tabulate import tabulate

from apps.cli import all_imported, run
from mmlrec.config import load_config
from mmlrec.distributed.world import World, process_group
from mmlrec.errors import UserError
from mmlrec.paths import local_path
from mmlrec.registry import strategy_names
from mmlrec.schema import DatasetManifest
from mmlrec.training.run import train

DATA = "--rows 60000 --sparse-features 6 --num-ids 200 --zipf 0 --dense-features 0 --tasks 3 --conflict -0.5"
CONFIG = """
dataset: {{path: {data}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [32, 2], tower_hidden_units: [8]}}
embeddings: {{dim: 8, init_std: 0.1, optimizer: {{name: adagrad, lr: 0.1}}}}
dense: {{optimizer: {{name: adam, lr: 5e-3}}}}
training: {{batch_size: 1024, epochs: 12, patience: 3}}
"""


def shortfalls(config: Path, folder: Path, overrides: list[str], world: World) -> dict[str, float]:
    """Task -> best possible minus reached test AUC of one run; a complete run is not trained again."""
    run = load_config(config, overrides)
    best = DatasetManifest.load(Path(run.dataset.path)).statistics["bayes_auc"]
    report = train(run, folder, world)
    return {name: best[name]["all"] - task["auc"] for name, task in report["tasks"].items()}


def main() -> None:
    """Train all strategies with all seeds and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balancing", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--strategies", default=",".join(strategy_names()), help="comma list (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--out", type=local_path, default=Path("runs/balancing"), help="(default: runs/balancing)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override configuration keys")
    arguments = parser.parse_intermixed_args()
    all_imported()
    data, config = arguments.out / "data", arguments.out / "config.yaml"
    if not data.is_dir():
        command = [sys.executable, "-m", "preprocessing", "synthetic", "--out", str(data), *DATA.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    text = CONFIG.format(data=data)
    if config.exists() and config.read_text(encoding="utf-8") != text:
        raise UserError(f"{config} is there, and of something else: give another --out.")
    config.write_text(text, encoding="utf-8")
    rows = []
    with process_group() as world:
        for strategy in arguments.strategies.split(","):
            short = []
            for seed in range(arguments.seeds):
                overrides = [f"balancing.name={strategy}", f"training.seed={seed}", *arguments.overrides]
                short.append(shortfalls(config, arguments.out / f"{strategy}-seed{seed}", overrides, world))
            figures = [[max(run.values()) for run in short], [mean(run.values()) for run in short]]
            figures += [[run[task] for run in short] for task in short[0]]
            rows.append([strategy, *(f"{mean(v):.4f} ± {stdev(v):.4f}" if len(v) > 1 else f"{v[0]:.4f}" for v in figures)])
    print(tabulate(rows, ["strategy", "worst task", "mean of tasks", *short[0]], tablefmt="github"))


if __name__ == "__main__":
    run(main)
