"""Runs that end like chance, or too well; and validation by which nothing can be chosen: told in words, by real commands."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from tests import processes
from tests.datasets import rewrite_part, write_dataset

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, num_experts: 2, expert_hidden_units: [8], gate_hidden_units: [], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 32, max_steps: 4}}
"""


def app(name: str, *arguments: object):
    """Exit code, standard output and standard error of an entry point."""
    done = processes.run([sys.executable, "-m", f"apps.{name}", *map(str, arguments)])
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def data(tmp_path):
    written = write_dataset(tmp_path / "data", rows=100)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=written.folder))
    return written


@pytest.fixture
def train(tmp_path):
    return lambda *overrides: app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run", *overrides)


def relabel(folder: Path, split: str, labels: dict[str, np.ndarray]) -> None:
    """Replace labels of a split that lies in one part, with the counts that the manifest lists; nan is missing."""
    manifest = DatasetManifest.load(folder)
    listed = manifest.splits[split]
    (part,) = listed.parts
    rows, counts = pq.read_table(folder / part.path), dict(listed.label_counts)
    for task, label in labels.items():
        column = f"label.{task}"
        rows = rows.set_column(rows.column_names.index(column), column, pa.array(label.astype(np.float32), from_pandas=True))
        counts[task] = dict.fromkeys(counts[task], (int((~np.isnan(label)).sum()), int((label > 0).sum())))
    pq.write_table(rows, folder / part.path, row_group_size=manifest.row_group_size)
    content = (folder / part.path).read_bytes()
    part = part.model_copy(update={"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    splits = {**manifest.splits, split: listed.model_copy(update={"parts": [part], "label_counts": counts})}
    manifest.model_copy(update={"splits": splits}).save(folder)


@pytest.mark.parametrize("labels", [{"click": 0.0, "buy": 0.0}, {"click": 1.0, "buy": np.nan}])
def test_one_class_validation_is_refused_before_the_first_step(labels, data, train, tmp_path):
    relabel(data.folder, "valid", {task: np.full(25, label) for task, label in labels.items()})
    code, _, error = train()
    assert code == 2
    for task, label in labels.items():
        count = "0 labelled rows" if np.isnan(label) else f"25 labelled rows, {25 if label else 0} of them positive"
        assert f"task '{task}' has {count}" in error
    assert "split valid" in error
    assert not (tmp_path / "run").exists()
    code, _, error = app("train", "--config", tmp_path / "config.yaml", "--show")
    assert code == 2
    assert "split valid: task 'click'" in error


def test_one_task_of_one_class_in_validation_trains_with_a_note(data, train, tmp_path):
    relabel(data.folder, "valid", {"buy": np.ones(25)})
    code, _, error = train()
    assert code == 0, error
    assert "AUC is undefined and left out of means for buy" in error


def test_a_run_like_chance_says_so_at_its_end_and_when_it_is_evaluated(data, train, tmp_path):
    label = np.random.default_rng(0).permutation(np.repeat([0.0, 1.0], [15, 10]))
    relabel(data.folder, "test", {"click": label})
    assert train("training.max_steps=1")[0] == 0
    run_dir = ("--run-dir", tmp_path / "run")
    again = ("train", "--config", tmp_path / "config.yaml", *run_dir, "training.max_steps=1")
    for command in (again, ("evaluate", *run_dir)):
        code, shown, error = app(*command)
        assert code == 0, error
        told = shown.partition("Look at this:\n")[2]
        assert "Task 'click': AUC " in told
        assert "on test, of 25 rows with 10 positives, cannot be told from chance (.5 ± 0.2404, 2 standard errors)" in told


def test_a_label_among_the_features_is_told_of_by_its_auc(train, tmp_path):
    data = write_dataset(tmp_path / "data", rows=1000, rows_per_part=1000)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=data.folder))
    for split in ("train", "valid", "test"):
        manifest = DatasetManifest.load(data.folder)
        for index, part in enumerate(manifest.splits[split].parts):
            rows = pq.read_table(data.folder / part.path)
            leak = pc.multiply(rows["label.click"].fill_null(0.0), 10)
            rewrite_part(data, rows.set_column(rows.column_names.index("d0"), "d0", leak), index, split)
            data.manifest = DatasetManifest.load(data.folder)
    code, _, error = train("training.max_steps=60", "training.batch_size=100", "dense.optimizer.lr=0.05")
    assert code == 0, error
    assert error.count("Task 'click': AUC 1.0000 on valid is seldom earned. Look for a feature that is made from") == 1
    assert "Task 'buy'" not in error
