"""Test quality of all methods in all settings they support, trained to early stopping, beside a logistic regression.

python -m benchmarks.quality [--settings mtl,msl,mtmsl] [--methods mmoe,ple] [--dataset movielens] [--seed 0]

Each run is `python -m apps.train` as a user starts it, in a folder below --out; what is complete is not trained again, what
was interrupted resumes. The logistic regression (scikit-learn) reads the same features, one column an id, and the same split.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from tabulate import tabulate

from mmlrec.config import load_config
from mmlrec.paths import local_path
from mmlrec.registry import aliases, method, method_names
from mmlrec.run_folder.folder import RunFolder
from mmlrec.schema import DatasetManifest, Feature, Setting, label_column


def _one_hot(column: pa.ChunkedArray, feature: Feature, width: int) -> csr_matrix:
    """[rows, width]: 1 at a row's id; the ids of a multi-valued feature share 1 (mean) or count (sum)."""
    values = column.combine_chunks()
    if pa.types.is_list(values.type):
        starts, ids = values.offsets.to_numpy(), values.values.to_numpy()
    else:
        starts, ids = np.arange(len(values) + 1), values.to_numpy()
    weights = np.ones(len(ids))
    if feature.pooling == "mean":
        weights /= np.repeat(np.maximum(np.diff(starts), 1), np.diff(starts))
    return csr_matrix((weights, ids, starts), shape=(len(values), width))


def _matrix(folder: Path, manifest: DatasetManifest, split: str) -> tuple[csr_matrix, pa.Table]:
    table = pa.concat_tables([pq.read_table(folder / part.path) for part in manifest.splits[split].parts])
    sparse = [_one_hot(table[f.name], f, manifest.table(str(f.table)).num_rows) for f in manifest.sparse_features]
    dense = [csr_matrix(table[f.name].to_numpy().astype(float).reshape(-1, 1)) for f in manifest.dense_features]
    return hstack([*sparse, *dense]).tocsr(), table


def _baseline(folder: Path, task: str, out: Path) -> dict[str, float]:
    """`logistic_regression`, once for each output folder."""
    kept = out / f"logistic-regression-{folder.name}-{task}.json"
    if not kept.is_file():
        kept.write_text(json.dumps(logistic_regression(folder, task)), encoding="utf-8")
    return dict(json.loads(kept.read_text(encoding="utf-8")))


def logistic_regression(folder: Path, task: str) -> dict[str, float]:
    """Test AUC and logloss of a logistic regression for a task, L2 penalty chosen by validation AUC."""
    manifest = DatasetManifest.load(folder)
    splits = {split: _matrix(folder, manifest, split) for split in ("train", "valid", "test")}
    labels = {split: table[label_column(task)].to_numpy() for split, (_, table) in splits.items()}
    best: tuple[float, LogisticRegression] | None = None
    for strength in (0.03, 0.1, 0.3, 1.0):
        model = LogisticRegression(C=strength, max_iter=300).fit(splits["train"][0], labels["train"])
        auc = roc_auc_score(labels["valid"], model.decision_function(splits["valid"][0]))
        if best is None or auc > best[0]:
            best = auc, model
    assert best is not None
    scores = best[1].predict_proba(splits["test"][0])[:, 1]
    return {"auc": float(roc_auc_score(labels["test"], scores)), "logloss": float(log_loss(labels["test"], scores))}


def train(setting: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one method to its test result; figures of the run."""
    folder = arguments.out / f"{setting}-{name}-seed{arguments.seed}"
    figures = folder / "figures.json"
    if figures.is_file():
        return dict(json.loads(figures.read_text(encoding="utf-8")))
    command = [sys.executable, "-m", "apps.train", "--config", f"configs/{setting}/{arguments.dataset}.yaml"]
    command += ["--run-dir", str(folder), f"model.name={name}", f"training.seed={arguments.seed}", *arguments.overrides]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [line["samples_per_second"] for line in lines if line["split"] == "train"]
    report = json.loads((folder / "result.json").read_text(encoding="utf-8"))["test"]["tasks"]
    found = {
        "test": {task: {key: values[key] for key in ("auc", "logloss")} for task, values in report.items()},
        "precision": RunFolder(folder).read_config().training.precision,
        "parameters": _dense_parameters(folder),
        "samples_per_second": median(speeds),
        "steps": lines[-1]["step"],
        "peak_mib": usage.ru_maxrss / 1024,
    }
    figures.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def _dense_parameters(folder: Path) -> int:
    """As the run announced it: '..., 214,402 dense and ...'."""
    log = (folder / "train.log").read_text(encoding="utf-8")
    return int(log.split(" dense and ")[0].rsplit("| ", 1)[1].replace(",", ""))


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="mtl,msl,mtmsl")
    parser.add_argument("--methods", default=",".join([*method_names(), *aliases()]))
    parser.add_argument("--dataset", default="movielens", help="configs/<setting>/<dataset>.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=local_path, default=Path("runs/quality"))
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for every run")
    arguments = parser.parse_intermixed_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[list[Any]] = []
    for setting in arguments.settings.split(","):
        dataset = load_config(f"configs/{setting}/{arguments.dataset}.yaml", arguments.overrides).dataset
        tasks = dataset.tasks or [task.name for task in DatasetManifest.load(Path(dataset.path)).tasks]
        baseline = {task: _baseline(Path(dataset.path), task, arguments.out) for task in tasks}
        rows += [[setting, "logistic regression", task, v["auc"], v["logloss"], *[""] * 6] for task, v in baseline.items()]
        for name in arguments.methods.split(","):
            if Setting(setting) not in method(name).settings:
                continue
            found = train(setting, name, arguments)
            for task, values in found["test"].items():
                above = values["auc"] - baseline[task]["auc"]
                cost = [f"{found[key]:,.0f}" for key in ("parameters", "steps", "samples_per_second", "peak_mib")]
                rows.append([setting, name, task, values["auc"], values["logloss"], f"{above:+.4f}", found["precision"], *cost])
            print(f"{setting} {name}: {found['test']}", flush=True)
    headers = [
        "setting",
        "method",
        "task",
        "test AUC",
        "logloss",
        "over LR",
        "dense parameters",
        "steps",
        "samples/s",
        "peak MiB",
    ]
    print(tabulate(rows, headers=headers, floatfmt=".4f"))


if __name__ == "__main__":
    main()
