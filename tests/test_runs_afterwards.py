"""What a finished run, or one that ended early, says when it is evaluated, scored with, or resumed otherwise."""

import contextlib
import errno
import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from apps import evaluate
from mmlrec.schema import DatasetManifest, Encoding
from mmlrec.training.reporting import Reporter
from tests.datasets import write_dataset

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, num_experts: 2, expert_hidden_units: [8], gate_hidden_units: [], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 32, max_steps: 4}}
"""


@pytest.fixture
def data(tmp_path):
    written = write_dataset(tmp_path / "data", rows=100)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=written.folder))
    return written


@pytest.fixture
def train(run_app, tmp_path):
    return lambda: run_app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run")


def with_encoding(folder: Path, **changes: dict) -> None:
    """Write down how the ids and numbers of a dataset came about, as preprocessing does."""
    manifest = DatasetManifest.load(folder)
    features = {feature.name: {"kind": feature.kind} for feature in manifest.features} | changes
    tables = {table.name: {"ids": "hash", "buckets": table.num_rows - 1} for table in manifest.tables}
    labels = {task.name: {"kind": "binary"} for task in manifest.tasks}
    encoding = Encoding.of(features, tables, {"values": manifest.scenario.values}, labels)
    manifest.model_copy(update={"encoding": encoding}).save(folder)


def test_a_run_that_can_only_be_read_is_told_that_its_metrics_are_not_kept(data, train, run_app, tmp_path, monkeypatch):
    assert train()[0] == 0

    def read_only(folder, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder.result))

    monkeypatch.setattr("mmlrec.evaluation.evaluation.write_result", read_only)
    code, error = run_app("evaluate", "--run-dir", tmp_path / "run")
    assert code == 2
    assert "result.json: the metrics above are whole, but not kept: Read-only file system." in error


def test_evaluate_other_rows_that_are_encoded_alike(data, train, run_app, tmp_path, monkeypatch, capfd):
    with_encoding(data.folder)
    assert train()[0] == 0
    other = write_dataset(tmp_path / "other", rows=90, seed=5, num_lanes=2)
    with_encoding(other.folder)
    result = (tmp_path / "run/result.json").read_text()
    assert run_app("evaluate", "--run-dir", tmp_path / "run", "training.precision=bf16")[0] == 0
    arguments = ["evaluate", "--run-dir", str(tmp_path / "run"), "--split", "train", f"dataset.path={other.folder}"]
    monkeypatch.setattr(sys, "argv", arguments)
    evaluate.main()
    shown = capfd.readouterr().out
    assert (tmp_path / "run/result.json").read_text() == result  # it is about the run's own rows
    scores = tmp_path / "scores.parquet"
    assert (
        run_app("predict", "--run", tmp_path / "run", "--input", other.folder, "--split", "train", "--output", scores)[0] == 0
    )
    label = other.tables["train"]["label.click"].to_numpy()
    known = ~np.isnan(label)
    wanted = roc_auc_score(label[known], pq.read_table(scores)["score.click"].to_numpy()[known])
    assert f"Measured with dataset.path={other.folder}" in shown
    (line,) = [line.split() for line in shown.splitlines() if line.split()[:2] == ["click", "all"]]
    columns = next(line.split() for line in shown.splitlines() if line.split()[:2] == ["task", "scenario"])
    assert float(line[columns.index("auc")]) == pytest.approx(wanted, abs=1e-4)


def test_rows_that_are_encoded_otherwise_are_not_evaluated(data, train, run_app, tmp_path):
    with_encoding(data.folder)
    assert train()[0] == 0
    for name, change, words in (
        ("other range", {"d0": {"kind": "dense", "range": [0, 2]}}, "feature 'd0', range: [0, 2] here, null in the run"),
        ("no record", None, f"apps.predict --run-dir {tmp_path / 'run'} --input '{tmp_path / 'no record'}' --output"),
    ):
        other = write_dataset(tmp_path / name, rows=90, seed=5).folder
        if change is not None:
            with_encoding(other, **change)
        code, error = run_app("evaluate", "--run-dir", tmp_path / "run", f"dataset.path={other}")
        assert code == 2
        assert words in error
        assert "elete" not in error


def test_what_an_evaluation_and_a_resume_cannot_change_is_told_with_what_can(data, train, run_app, tmp_path):
    assert train()[0] == 0
    code, error = run_app("evaluate", "--run-dir", tmp_path / "run", "training.batch_size=7")
    assert code == 2
    assert "training.batch_size: 32 in the run folder, 7 now" in error
    assert "training.eval_batch_size" in error
    assert "elete" not in error
    start = ("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run")
    for override, goes_back in (("dense.optimizer.lr=0.5", True), ("model.num_experts=3", False)):
        code, error = run_app(*start, override)
        assert code == 2
        assert "another folder with --run-dir" in error
        assert ("--from-step" in error) is goes_back
        assert "elete" not in error


def test_a_run_that_ended_before_its_first_validation(data, run_app, tmp_path, monkeypatch):
    start = ("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run")
    advance = Reporter.advance

    def stop_after_one_step(reporter: Reporter) -> None:
        advance(reporter)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "advance", stop_after_one_step)
        assert run_app(*start)[0] == 85
    output = tmp_path / "scores.parquet"
    for words in (("evaluate",), ("predict", "--input", data.folder, "--output", output)):
        code, error = run_app(*words, "--run-dir", tmp_path / "run")
        assert code == 2
        assert "before its first validation" in error
        assert "step_00000000" in error
        (command,) = [line for line in error.splitlines() if "python -m apps.train " in line]
    assert run_app("train", *command.partition("python -m apps.train ")[2].split())[0] == 0
    assert run_app("evaluate", "--run-dir", tmp_path / "run")[0] == 0


def test_seeds_are_the_runs_of_each_alone_and_told_as_mean_and_sample_deviation(data, run_app, tmp_path):
    config = ["--config", tmp_path / "config.yaml", "model.dropout=0.2"]
    assert run_app("train", *config, "--run-dir", tmp_path / "alone", "training.seed=3")[0] == 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_app("seeds", *config, "--run-dir", tmp_path / "seeds", "--seeds", "1,3,7")[0] == 0
    told = out.getvalue()
    results = {seed: json.loads((tmp_path / f"seeds/seed{seed}/result.json").read_text()) for seed in (1, 3, 7)}
    assert results[3] == json.loads((tmp_path / "alone/result.json").read_text())
    assert "Test over seeds 1, 3, 7 (mean ± standard deviation):" in told
    columns = next(line for line in told.splitlines() if line.startswith("task ")).split()[2:]
    for task in ("click", "buy"):
        values = np.array([[result["test"]["tasks"][task][name] for name in columns] for result in results.values()])
        mean, deviation = values.mean(0), np.sqrt(((values - values.mean(0)) ** 2).sum(0) / 2)
        (line,) = [line for line in told.splitlines() if line.split()[:2] == [task, "all"]]
        expected = " ".join(f"{m:.4f} ± {d:.4f}" for m, d in zip(mean, deviation, strict=True))
        assert line.split()[2:] == expected.split()


def test_predictions_hold_keys_and_scores(data, train, run_app, tmp_path):
    assert train()[0] == 0
    output = tmp_path / "out" / "scores.parquet"
    code, _ = run_app("predict", "--run", tmp_path / "run", "--input", data.folder, "--output", output)
    assert code == 0
    scores, test = pq.read_table(output), data.tables["test"]
    labels = ["label.click", "label.buy"]
    names = ["key.user", "key.session", "sample.scenario", *labels, "score.click", "score.buy", "scenario.page"]
    assert scores.column_names == names
    numbers = test["sample.scenario"].to_pylist()
    values = DatasetManifest.load(data.folder).scenario.values
    assert scores["scenario.page"].to_pylist() == [values[number] for number in numbers]
    assert [scores[name].combine_chunks() for name in labels] == [test[name].combine_chunks() for name in labels]
    assert scores["key.session"].to_pylist() == test["key.session"].to_pylist()
    report = json.loads((tmp_path / "run/result.json").read_text())["test"]
    for task in ("click", "buy"):
        label = test[f"label.{task}"].to_numpy()
        present = ~np.isnan(label)
        score = scores[f"score.{task}"].to_numpy().astype(np.float64)[present]
        assert roc_auc_score(label[present], score) == pytest.approx(report["tasks"][task]["auc"], abs=1e-6)
        assert log_loss(label[present], score) == pytest.approx(report["tasks"][task]["logloss"], abs=1e-6)
