"""Runs that begin with another one: as commands, resumed, refused, on object storage, and what they learn of what is new."""

import json
import shutil
import sys

import pytest
import torch

from mmlrec.schema import DatasetManifest, Encoding
from mmlrec.storage.places import place
from tests.datasets import with_vocabularies, write_dataset
from tests.processes import environment, run
from tests.storage import upload
from tests.training.launch import losses, tensors

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [4], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 50, epochs: 1000, max_steps: 4, patience: null, log_every_steps: 1}}
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run, its configuration, its dataset, and one whose vocabulary of t0 has other values before and behind."""
    folder = tmp_path_factory.mktemp("first")
    data = with_vocabularies(write_dataset(folder / "data", rows=200, table_rows=30))
    names = {name: [f"{name}-{id}" for id in range(1, table.num_rows)] for name, table in data.manifest.by_name.items()}
    other = write_dataset(folder / "next", rows=200, table_rows=33, seed=1)
    with_vocabularies(other, {name: ["first", *of, "a", "b"] for name, of in names.items()})
    (folder / "config.yaml").write_text(CONFIG.format(dataset=data.folder))
    command = [sys.executable, "-m", "apps.train", "--config", str(folder / "config.yaml"), "--run-dir", str(folder / "run")]
    result = run(command, env=environment())
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def begin(first, tmp_path, run_app):
    """Trains on the other dataset, from the run unless told."""

    def call(*overrides, run_dir=tmp_path / "new", code=0, source=None, data="next"):
        arguments = [f"init_from={source or first / 'run'}", f"dataset.path={first / data}", *overrides]
        found, error = run_app("train", "--config", first / "config.yaml", "--run-dir", run_dir, *arguments)
        assert found == code, error
        return error

    return call


def told(run_dir):
    return json.loads((run_dir / "init_from.json").read_text())


def state_of(path):
    return json.loads((path / "state.json").read_text())


def test_what_was_taken_is_told_and_kept_and_nothing_else_of_the_run_is(first, tmp_path, begin):
    error = begin()
    of_best = state_of(first / "run/checkpoints/best")["step"]
    assert (
        f"init_from: weights of {first}/run, its best checkpoint, of step {of_best}, state of the optimizers of step 4" in error
    )
    rows = [line.split() for line in error.splitlines() if line.startswith("t0 ")]
    assert ["t0", "33", "30", "3", "0", "by", "value", "taken"] in rows
    assert "network: 4 tensors taken, 0 in part, 0 fresh" in error
    kept = told(tmp_path / "new")
    assert (kept["run"], kept["step"], kept["optimizer_state_of_step"]) == (str(first / "run"), of_best, 4)
    assert [table["new"] for table in kept["tables"]] == [3, 3, 3, 3]
    assert kept["tasks"] == {"known": ["click", "buy"], "new": [], "dropped": []}
    assert f"init_from: {first}/run\n" in (tmp_path / "new/config.yaml").read_text()
    state = state_of(tmp_path / "new/checkpoints/step_000000004")
    assert state["progress"] == state_of(first / "run/checkpoints/step_000000004")["progress"]
    assert list(losses(tmp_path / "new")) == [1, 2, 3, 4]


def test_a_resume_needs_the_other_run_no_more(first, tmp_path, begin, run_app):
    begin("training.max_steps=8", run_dir=tmp_path / "whole")
    shutil.copytree(first / "run", tmp_path / "source")
    begin(run_dir=tmp_path / "part", source=tmp_path / "source")
    before = (tmp_path / "part/init_from.json").read_bytes()
    shutil.rmtree(tmp_path / "source")
    error = begin("training.max_steps=8", run_dir=tmp_path / "part", source=tmp_path / "source")
    assert "resumed from" in error
    assert "init_from: weights" not in error
    assert (tmp_path / "part/init_from.json").read_bytes() == before
    one, two = (tensors(tmp_path / name / "checkpoints/step_000000008") for name in ("whole", "part"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert "init_from: '" in begin("training.max_steps=9", run_dir=tmp_path / "part", code=2)


def test_the_run_is_read_though_its_dataset_is_gone_and_one_without_encoder_while_it_is_there(first, tmp_path, begin):
    (first / "data").rename(first / "elsewhere")
    try:
        begin()
        shutil.copytree(first / "run", tmp_path / "old", ignore=shutil.ignore_patterns("encoder"))
        assert "so nothing says which row stands for which value" in begin(
            source=tmp_path / "old", run_dir=tmp_path / "b", code=2
        )
    finally:
        (first / "elsewhere").rename(first / "data")
    begin(source=tmp_path / "old", run_dir=tmp_path / "b")
    ours, theirs = ({**told(tmp_path / name), "run": ""} for name in ("new", "b"))
    assert ours == theirs


def test_another_method_takes_tables_alone(first, tmp_path):
    text = (
        CONFIG.format(dataset=first / "next")
        .replace("shared_bottom, bottom", "mlp, dnn")
        .replace(", tower_hidden_units: []", "")
    )
    (tmp_path / "other.yaml").write_text(text)
    command = [sys.executable, "-m", "apps.train", "--config", str(tmp_path / "other.yaml"), "--run-dir", str(tmp_path / "new")]
    result = run([*command, f"init_from={first / 'run'}"], env=environment())
    assert result.returncode == 0, result.stderr
    assert "network: begins anew: the method is mlp here, shared_bottom there" in result.stderr
    assert sorted(table["taken"] for table in told(tmp_path / "new")["tables"]) == [30, 31, 32, 33]


def test_another_table_optimizer_begins_anew_with_the_rows_that_are_taken(tmp_path, begin):
    begin("embeddings.optimizer.name=rowwise_adagrad", run_dir=tmp_path / "a")
    assert {table["optimizer_state"] for table in told(tmp_path / "a")["tables"]} == {"fresh"}
    begin("embeddings.optimizer.name=sgd", run_dir=tmp_path / "b")
    assert {table["optimizer_state"] for table in told(tmp_path / "b")["tables"]} == {"none"}
    assert told(tmp_path / "b")["network"] == "by name"
    error = begin("dense.optimizer.name=adagrad", run_dir=tmp_path / "c")
    assert "network: by name, and its optimizer begins anew" in error
    assert {table["optimizer_state"] for table in told(tmp_path / "c")["tables"]} == {"taken"}


def test_what_cannot_be_begun_with_is_refused(first, tmp_path, begin):
    assert f"init_from: {tmp_path}/new is the run itself" in begin(source=tmp_path / "new", code=2)
    assert f"{tmp_path}/nowhere is not a run folder: it has no config.yaml" in begin(source=tmp_path / "nowhere", code=2)
    assert "have width 4, embeddings.dim is 8: no row could be taken" in begin("embeddings.dim=8", code=2)
    spoilt = tmp_path / "spoilt"
    shutil.copytree(first / "run", spoilt)
    (file,) = (spoilt / "checkpoints/best").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "does not match its checksum: it is corrupt" in begin(source=spoilt, code=2)
    shutil.rmtree(spoilt / "checkpoints/best")
    assert "spoilt/checkpoints/best has no COMPLETE.json" in begin(source=spoilt, code=2)
    for path in (spoilt / "checkpoints").iterdir():
        shutil.rmtree(path)
    assert "spoilt has no best checkpoint: the run ended, or still is, before its first validation" in begin(
        source=spoilt, code=2
    )
    vocabulary = first / "run/encoder/vocab/t1.parquet"
    vocabulary.rename(tmp_path / "kept")
    try:
        assert "encoder/vocab/t1.parquet: the vocabulary is missing" in begin(code=2)
    finally:
        (tmp_path / "kept").rename(vocabulary)
    # Nothing of the run has begun; the same command begins it.
    begin()


def test_a_damaged_state_is_passed_over_and_said(first, tmp_path, begin):
    shutil.copytree(first / "run", tmp_path / "source")
    for file in (tmp_path / "source/checkpoints").glob("step_*/*.distcp"):
        file.write_bytes(b"")
    error = begin(source=tmp_path / "source")
    assert "init_from: passing over a damaged checkpoint" in error
    assert "so the optimizers begin anew" in error
    assert {table["optimizer_state"] for table in told(tmp_path / "new")["tables"]} == {"fresh"}


def test_on_object_storage(first, tmp_path, begin, store):
    upload(first / "run", place(f"{store.address}/run"))
    begin(source=f"{store.address}/run", run_dir=place(f"{store.address}/new"))
    begin()
    assert (json.loads((place(f"{store.address}/new") / "init_from.json").read_text()) | {"run": str(first / "run")}) == told(
        tmp_path / "new"
    )
    copy = tmp_path / "copy"
    place(store.address).fs.get(f"{store.address.removeprefix('s3://')}/new", str(copy), recursive=True)
    assert losses(copy) == losses(tmp_path / "new")


def test_a_new_task_and_a_new_scenario_train(first, tmp_path, run_app):
    """Beside known ones that begin where they were."""
    config = CONFIG.replace("setting: mtl", "setting: mtmsl").replace("max_steps: 4", "max_steps: 12")
    runs = {}
    for name, tasks, scenarios in (("a", ("click", "buy"), 2), ("b", ("share", "click", "buy"), 3)):
        data = with_vocabularies(write_dataset(tmp_path / name, rows=400, tasks=tasks, num_scenarios=scenarios))
        (tmp_path / f"{name}.yaml").write_text(config.format(dataset=data.folder))
        runs[name] = tmp_path / f"run-{name}"
        more = [] if name == "a" else [f"init_from={runs['a']}"]
        code, error = run_app("train", "--config", tmp_path / f"{name}.yaml", "--run-dir", runs[name], *more)
        assert code == 0, error
    kept = told(runs["b"])
    assert (kept["tasks"]["new"], kept["scenarios"]["new"]) == (["share"], ["s2"])
    towers = {parameter["name"]: parameter["is"] for parameter in kept["parameters"]}
    assert towers == {
        "bottom.biases.0": "taken",
        "bottom.weights.0": "taken",
        "towers.bias": "in part",
        "towers.weight": "in part",
    }
    code, error = run_app("train", "--config", tmp_path / "b.yaml", "--run-dir", tmp_path / "fresh", "training.max_steps=1")
    assert code == 0, error
    trained = tensors(runs["b"] / "checkpoints/step_000000012")
    start = tensors(tmp_path / "fresh/checkpoints/step_000000001")["model.head.network.towers.weight"]
    moved = (trained["model.head.network.towers.weight"] - start).abs().amax((1, 2))
    assert (moved[[0, 1, 2, 5, 8]] > 3e-3).all()  # heads of the new task, and of the new scenario: 12 steps of 1e-3
    result = json.loads((runs["b"] / "result.json").read_text())["test"]["tasks"]
    assert all("s2" in result[task]["scenarios"] for task in ("share", "click", "buy"))


def test_a_regression_task_keeps_the_scale_that_its_network_was_trained_on(tmp_path, run_app):
    scales = {}
    for name, unit in (("a", (2.0, 10.0)), ("b", (3.0, 11.0))):
        data = with_vocabularies(write_dataset(tmp_path / name, rows=200, regression={"price": unit}))
        (tmp_path / f"{name}.yaml").write_text(CONFIG.format(dataset=data.folder))
        more = [] if name == "a" else [f"init_from={tmp_path / 'run-a'}"]
        arguments = ["--config", tmp_path / f"{name}.yaml", "--run-dir", tmp_path / f"run-{name}", *more]
        code, error = run_app("train", *arguments)
        assert code == 0, error
        scales[name] = state_of(tmp_path / f"run-{name}/checkpoints/best")["label_scales"]["price"]
        scales[f"{name} alone"] = [data.manifest.train_moments("price")["all"][i] for i in (0, 1)]
    assert scales["b"] == scales["a"] == pytest.approx(scales["a alone"])
    assert scales["b alone"] != pytest.approx(scales["a alone"])


def test_what_is_encoded_otherwise_is_named(first, tmp_path, begin):
    manifest = DatasetManifest.load(first / "next")
    of = manifest.encoding
    features = of.features | {"d0": of.features["d0"] | {"range": [0.0, 2.0]}}
    now = Encoding.of(features, of.tables, of.scenario, of.labels)
    shutil.copytree(first / "next", tmp_path / "other")
    manifest.model_copy(update={"encoding": now}).save(tmp_path / "other")
    error = begin(f"dataset.path={tmp_path / 'other'}")
    assert "note: init_from: feature 'd0', range: [0.0, 2.0] here, null there" in error
    assert told(tmp_path / "new")["encoded_otherwise"] == ["feature 'd0', range: [0.0, 2.0] here, null there"]
