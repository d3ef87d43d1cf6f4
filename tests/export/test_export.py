"""`python -m apps.export` on runs of real trainings: the folder, the proof, and what is refused without a trace."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import mmlrec
import mmlrec.export.model
from mmlrec.encoding.inputs import Inputs
from mmlrec.errors import DataError
from mmlrec.export.parity import LAST_BITS, TOLERANCES
from mmlrec.serving import load
from tests import processes
from tests.datasets import with_vocabularies, write_dataset
from tests.training.launch import start_ranks

CONFIG = """
dataset: {{path: {data}, setting: {setting}}}
model: {{name: {name}, {options}}}
model_defaults: {{expert_hidden_units: [6], bottom_hidden_units: [6], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4, table_dim: {{t1: 8}}, sharding: {sharding}, init_std: 1.0}}
training: {{batch_size: 64, epochs: 1, max_steps: 4, patience: null}}
"""
#: Run -> method, setting, options, ranks, of what kind its dataset is.
RUNS = {
    "mmoe": ("mmoe", "mtmsl", "", 1, "mixed"),
    "branches": ("single_task", "mtmsl", "branches: [4, 0, 1]", 1, "mixed"),
    "chain": ("esmm", "mtl", "", 1, "funnel"),
    "ranks": ("shared_bottom", "mtl", "", 2, "mixed"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Datasets of 90 test rows: with a regression task, whose values are far from 0; and of a chain."""
    folder = tmp_path_factory.mktemp("data")
    made = {}
    for kind, more in (("mixed", {"regression": {"price": (3.0, 40.0)}}), ("funnel", {"funnel": True, "num_scenarios": 0})):
        rows = {"train": 300, "valid": 80, "test": 90}
        made[kind] = with_vocabularies(write_dataset(folder / kind, rows=rows, num_lanes=2, **more)).folder
    return made


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, data):
    """Trains a run of RUNS, once, as processes of its own; returns its folder, which no test may change."""
    made = {}

    def train(which):
        if which not in made:
            folder = tmp_path_factory.mktemp(which)
            name, setting, options, ranks, kind = RUNS[which]
            sharding = "row_wise" if ranks > 1 else "auto"
            text = CONFIG.format(data=data[kind], setting=setting, name=name, options=options, sharding=sharding)
            (folder / "config.yaml").write_text(text)
            arguments = [sys.executable, "-m", "apps.train", "--config", str(folder / "config.yaml")]
            arguments += ["--run-dir", str(folder / "run")]
            logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
            started = start_ranks(arguments, logs)
            assert [rank.wait(300) for rank in started] == [0] * ranks, logs[0].read_text()
            made[which] = folder / "run"
        return made[which]

    return train


def encoded(folder, model, split="test"):
    """The rows of a split as the model's network reads them."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted((folder / split).glob("*.parquet"))])
    return Inputs.of(
        table.select([name for name in table.column_names if not name.startswith(("label.", "key."))]), model.encoder
    )


def predicted(run_app, run, folder, tmp_path):
    output = tmp_path / "scores.parquet"
    code, error = run_app("predict", "--run-dir", run, "--input", folder, "--output", output)
    assert code == 0, error
    return pq.read_table(output)


@pytest.mark.parametrize("which", RUNS)
def test_the_folder_scores_as_predictions_do(which, data, run_of, run_app, tmp_path):
    run, folder = run_of(which), data[RUNS[which][-1]]
    out = tmp_path / "deep" / "model"
    if which == "ranks":
        export_by_two(run, out, tmp_path)
    else:
        code, error = run_app("export", "--run-dir", run, "--out", out)
        assert code == 0, error
    model = load(out)
    scores = model.score_inputs(encoded(folder, model))
    assert len(scores) == 90
    wanted = predicted(run_app, run, folder, tmp_path)
    names = [name.removeprefix("score.") for name in wanted.column_names if name.startswith("score.")]
    assert list(model.outputs[: len(names)]) == names
    assert set(model.outputs[len(names) :]) == ({"ctr", "ctcvr"} if which == "chain" else set())
    for column, name in enumerate(names):
        expected = wanted.column(f"score.{name}").to_numpy()
        tolerance = {"rtol": 1e-6, "atol": 1e-6 * max(1.0, np.nanstd(expected))}
        np.testing.assert_allclose(scores[:, column], expected, **tolerance, equal_nan=True)
    assert np.isnan(scores).any() == (which == "branches")
    card = json.loads((out / "model.json").read_text())
    assert card["parity"]["rows"] == 90
    assert set(card["parity"]["scores"]) == set(model.outputs)
    assert {path.name for path in out.iterdir()} == {"model.json", "README.md", "encoder", "network.pt2", "tables"}
    assert all((out / table["file"]).is_file() for table in card["tables"])


def test_the_card_says_what_the_model_is(data, run_of, run_app, tmp_path, capfd):
    run = run_of("mmoe")
    assert run_app("export", "--run-dir", run, "--out", tmp_path / "model", "--tables", "int8")[0] == 0
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    manifest = json.loads((data["mixed"] / "manifest.json").read_text())
    assert card["digest"] == manifest["encoding"]["digest"]
    assert [task["name"] for task in card["tasks"]] == ["click", "buy", "price"]
    assert card["scenario"] == {"name": "page", "values": ["s0", "s1", "s2"]}
    assert card["multi_scenario"] is True
    assert card["metrics"] == json.loads((run / "result.json").read_text())
    assert card["features"][0] == {"name": "f0", "kind": "sparse", "examples": ["t0-1", "t0-2", "t0-3"]}
    assert card["features"][1] == {"name": "m0", "kind": "multi", "examples": [["tm0-1"], ["tm0-2"], ["tm0-3"]]}
    pooled = [(lookup["feature"], lookup["table"], lookup["pooling"]) for lookup in card["lookups"][0]]
    assert pooled == [("f0", "t0", "sum"), ("m0", "tm0", "mean"), ("f1", "t1", "sum"), ("f2", "t2", "sum")]
    assert card["dense"] == ["d0", "d1"]
    assert {table["dtype"] for table in card["tables"]} == {"int8"}
    readme = (tmp_path / "model" / "README.md").read_text()
    for word in ("click", "price", "s0, s1, s2", "t0-1", card["digest"], "largest loss of AUC", "score.buy"):
        assert word in readme
    # Both models' AUC of each task and scenario: those of the run are those that it measured.
    tested = card["metrics"]["test"]["tasks"]
    for task, of in card["parity"]["metrics"].items():
        before = tested[task][of["metric"]]
        assert of["all"][0] == pytest.approx(before)
        assert {name: values[0] for name, values in of["scenarios"].items()} == pytest.approx(
            {name: values[of["metric"]] for name, values in tested[task]["scenarios"].items()}
        )


def test_parts_of_two_exports_are_no_model(run_of, run_app, tmp_path):
    """Such as a copy that was cut off leaves: files of the same size and shape beside those of the day before."""
    out = tmp_path / "model"
    assert run_app("export", "--run-dir", run_of("chain"), "--out", out)[0] == 0
    for name in ("encoder/encoder.json", "network.pt2", "tables/t0.safetensors"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(DataError, match=rf"{name} is damaged: its checksum"):
            load(out)
        (out / name).write_bytes(content)
    load(out)


def test_onnx_scores_alike_and_a_process_prints_the_proof(run_of, data, tmp_path):
    out = tmp_path / "model"
    command = [sys.executable, "-m", "apps.export", "--run-dir", str(run_of("mmoe")), "--out", str(out), "--format", "onnx"]
    result = processes.run(command, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "90 rows of test" in result.stdout
    assert "encoder: 70 rows decoded and encoded again, equal in f0, m0, f1, f2, scenario page" in result.stdout
    assert "largest loss of AUC: 0.000000" in result.stdout
    model = load(out)
    assert model.card["network"]["file"] == "network.onnx"
    assert np.isfinite(model.score_inputs(encoded(data["mixed"], model))).all()


def export_by_two(run, out, tmp_path):
    """By two processes, and look whether the tables are those of the checkpoint."""
    arguments = [sys.executable, "-m", "apps.export", "--run-dir", str(run), "--out", str(out)]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    started = start_ranks(arguments, logs)
    assert [rank.wait(300) for rank in started] == [0, 0], logs[0].read_text()
    weight = load(out)._tables["t0"].weight
    saved = torch.cat(list(mmlrec.export.model.TableRows(run / "checkpoints" / "best", [T0]).read(T0, 1000)))
    assert np.array_equal(weight, saved.numpy())
    assert weight.shape == (50, 4)


T0 = "model.tables.embedding_bags.t0.weight"


def nothing_left(folder):
    return sorted(path.name for path in folder.iterdir()) == []


def test_scores_that_differ_leave_nothing(run_of, run_app, tmp_path, monkeypatch):
    honest = mmlrec.export.model.exported_scores

    def shifted(*arguments, **options):
        scores = honest(*arguments, **options)
        scores[7, 1] += 2e-6
        return scores

    monkeypatch.setattr(mmlrec.export.model, "exported_scores", shifted)
    code, error = run_app("export", "--run-dir", run_of("mmoe"), "--out", tmp_path / "model")
    assert code == 2
    assert "score.buy: 2" in error
    assert "not written" in error
    assert nothing_left(tmp_path)
    # Of quantised tables the loss is told, not refused.
    assert run_app("export", "--run-dir", run_of("mmoe"), "--out", tmp_path / "model", "--tables", "int8")[0] == 0


def test_large_numbers_that_are_not_scaled_may_round_by_more_than_others(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({f"n{i}": draw.normal(size=900) * 100 for i in range(8)} | {"user": draw.integers(0, 30, 900)})
    frame["y"] = draw.integers(0, 2, 900)
    plain = {"kind": "number", "scale": "none"}
    data = mmlrec.prepare(frame, features={name: "id" if name == "user" else plain for name in frame.columns[:-1]}, tasks=["y"])
    model = {"name": "shared_bottom", "bottom_hidden_units": [256, 128]}
    config = {"model": model, "training": {"epochs": 10, "max_steps": 20, "batch_size": 100}}
    run = mmlrec.train(config, dataset=data, progress=False)
    run.export(tmp_path / "model")
    told = load(tmp_path / "model").card["parity"]["scores"]["y"]
    assert told["largest_difference"] > TOLERANCES["cpu"]
    assert 0 < told["largest_difference"] < LAST_BITS * told["last_bit"] < 0.1
    honest = mmlrec.export.model.exported_scores
    monkeypatch.setattr(mmlrec.export.model, "exported_scores", lambda *given, **options: honest(*given, **options)[::-1])
    with pytest.raises(DataError, match=r"score\.y: .* apart"):
        run.export(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_signal_while_tables_are_written_leaves_nothing(run_of, run_app, tmp_path, monkeypatch):
    honest = mmlrec.export.model.write_table

    def while_stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        honest(*arguments)

    monkeypatch.setattr(mmlrec.export.model, "write_table", while_stopped)
    code, error = run_app("export", "--run-dir", run_of("mmoe"), "--out", tmp_path / "model")
    assert code == 85
    assert "not written: stopped by a signal" in error
    assert nothing_left(tmp_path)


def test_what_has_come_to_the_place_meanwhile_is_not_replaced(run_of, run_app, tmp_path, monkeypatch):
    honest, out = mmlrec.export.model.exported_scores, tmp_path / "model"

    def while_others_write(*arguments):
        out.mkdir()
        (out / "mine").write_text("kept")
        return honest(*arguments)

    monkeypatch.setattr(mmlrec.export.model, "exported_scores", while_others_write)
    code, error = run_app("export", "--run-dir", run_of("mmoe"), "--out", out)
    assert code == 2
    assert "model exists" in error
    assert (out / "mine").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_encoder_that_gives_other_ids_leaves_nothing(run_of, data, run_app, tmp_path, monkeypatch):
    """As if the folder got the encoder of another dataset, in whose vocabulary two values have changed places."""
    manifest = json.loads((data["mixed"] / "manifest.json").read_text())
    values = {table["name"]: [f"{table['name']}-{id}" for id in range(1, table["num_rows"])] for table in manifest["tables"]}
    values["t0"][:2] = "t0-2", "t0-1"
    other = with_vocabularies(write_dataset(tmp_path / "other", rows=80), values).folder
    encoder = mmlrec.export.model.Encoder.load(other)
    monkeypatch.setattr(mmlrec.export.model, "Encoder", SimpleNamespace(load=lambda folder: encoder))
    (tmp_path / "out").mkdir()
    code, error = run_app("export", "--run-dir", run_of("mmoe"), "--out", tmp_path / "out" / "model")
    assert code == 2
    assert re.search(r"gives 'f0' of row \d+ the ids \[[12]\] instead of \[[21]\]", error)
    assert nothing_left(tmp_path / "out")


def test_a_damaged_checkpoint_leaves_nothing(run_of, run_app, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of("mmoe"), run)
    file = next((run / "checkpoints" / "best").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (tmp_path / "out").mkdir()
    code, error = run_app("export", "--run-dir", run, "--out", tmp_path / "out" / "model")
    assert code == 2
    assert f"{file.name} does not match its checksum" in error
    assert nothing_left(tmp_path / "out")


def test_a_run_without_result_and_one_whose_dataset_is_gone(run_of, data, run_app, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(run_of("mmoe"), run)
    shutil.copytree(data["mixed"], moved)
    (run / "result.json").unlink()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(data["mixed"]), str(tmp_path / "gone")))
    (tmp_path / "out").mkdir()
    code, error = run_app("export", "--run-dir", run, "--out", tmp_path / "out" / "model")
    assert code == 2
    assert "is gone" in error
    assert "--input DATASET" in error
    assert nothing_left(tmp_path / "out")
    code, error = run_app("export", "--run-dir", run, "--out", tmp_path / "out" / "model", "--input", moved)
    assert code == 0, error
    card = json.loads((tmp_path / "out" / "model" / "model.json").read_text())
    assert card["metrics"] == {}
    assert card["parity"]["dataset"] == str(moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["splits"]["test"] |= {"parts": [], "num_rows": 0}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    code, error = run_app("export", "--run-dir", run, "--out", tmp_path / "out" / "other", "--input", moved)
    assert code == 2
    assert "has no rows in split 'test'" in error


def test_values_that_joined_a_vocabulary_after_the_run_are_compared_as_unseen_ones(run_of, data, run_app, tmp_path):
    regression = {"price": (3.0, 40.0)}
    written = write_dataset(tmp_path / "grown", rows={"test": 60, "train": 40}, table_rows=70, regression=regression)
    grown = with_vocabularies(written).folder
    ids = pq.read_table(grown / "test" / "part-00000.parquet").column("f0").to_numpy()
    assert (ids >= 50).any()
    out = tmp_path / "model"
    code, error = run_app("export", "--run-dir", run_of("mmoe"), "--out", out, "--input", grown)
    assert code == 0, error
    parity = json.loads((out / "model.json").read_text())["parity"]
    assert parity["rows"] == 60
    assert parity["encoder"]["equal"] == ["f0", "m0", "f1", "f2", "scenario page"]


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_disk_that_is_full_under_the_network_is_one_line(run_of, tmp_path, format):
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3000, 3000))
    command = [sys.executable, "-m", "apps.export", "--run-dir", str(run_of("mmoe")), "--out", str(tmp_path / "model")]
    done = processes.run([*command, "--format", format], prepare=limited)
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {tmp_path / 'model'}: the model cannot be written: File too large. Free space or choose another --out; nothing"
        " was left behind."
    ]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_only_looks_like_a_model_is_not_replaced(run_of, run_app, tmp_path):
    (tmp_path / "mine/tables").mkdir(parents=True)
    (tmp_path / "mine/README.md").write_text("mine")
    code, error = run_app("export", "--run-dir", run_of("mmoe"), "--out", tmp_path / "mine", "--overwrite")
    assert code == 2
    assert "is no exported model: it holds README.md, which is not deleted" in error
    assert (tmp_path / "mine/README.md").read_text() == "mine"


def test_what_is_there_is_replaced_only_when_asked_and_only_a_model(run_of, run_app, tmp_path):
    out = tmp_path / "model"
    assert run_app("export", "--run-dir", run_of("mmoe"), "--out", out, "--tables", "fp16")[0] == 0
    before = (out / "model.json").read_bytes()
    code, error = run_app("export", "--run-dir", run_of("mmoe"), "--out", out)
    assert code == 2
    assert "--overwrite" in error
    (out / "mine").write_text("kept")
    code, error = run_app("export", "--run-dir", run_of("mmoe"), "--out", out, "--overwrite")
    assert code == 2
    assert "it holds mine, which is not deleted" in error
    assert (out / "mine").read_text() == "kept"
    assert (out / "model.json").read_bytes() == before
    (out / "mine").unlink()
    assert run_app("export", "--run-dir", run_of("mmoe"), "--out", out, "--overwrite")[0] == 0
    assert {table["dtype"] for table in load(out).card["tables"]} == {"fp32"}
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_number_too_large_for_fp16_leaves_nothing(data, run_app, tmp_path):
    text = CONFIG.format(data=data["funnel"], setting="mtl", name="mmoe", options="", sharding="auto")
    (tmp_path / "config.yaml").write_text(text.replace("init_std: 1.0", "init_std: 1.0e+5"))
    code, error = run_app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run", "training.max_steps=1")
    assert code == 0, error
    (tmp_path / "out").mkdir()
    code, error = run_app("export", "--run-dir", tmp_path / "run", "--out", tmp_path / "out" / "model", "--tables", "fp16")
    assert code == 2
    assert "is too large for fp16" in error
    assert "table 't0', row " in error
    assert nothing_left(tmp_path / "out")
