"""A model meets data encoded as those it was trained on, a run goes on with its rows, and parts are what was written."""

import json
import random
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmlrec.data import verification
from mmlrec.errors import DataError, UserAdvice
from mmlrec.identity import data_facts, file_sha256, parts_digest
from mmlrec.schema import DatasetManifest, Encoding
from mmlrec.training import trainer
from preprocessing.command_line import main
from tests import processes
from tests.datasets import write_dataset
from tests.preprocessing.table_fake import write_config
from tests.training.launch import free_port

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, num_experts: 2, expert_hidden_units: [8], gate_hidden_units: [], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 16, max_steps: 4, checkpoint_every_steps: 2}}
"""
TABLE = {
    "features": {
        "user": {"kind": "id", "hash": {"num_buckets": 50}},
        "item": {"kind": "id"},
        "price": {"kind": "number", "fill": 0},
    },
    "tasks": [{"name": "click", "label": "click"}, {"name": "buy", "label": "buy"}],
    "keys": {"user": {"type": "string"}},
    "split": {"rule": "file", "train": ["train.csv"], "valid": ["valid.csv"], "test": ["test.csv"]},
}


def write_log(path: Path, seed: int, num_rows: int, top: float, new_items: int) -> None:
    draw = random.Random(seed)
    lines = ["user,item,price,click,buy"]
    for row in range(num_rows + new_items):
        item = f"new{row - num_rows}" if row >= num_rows else f"i{row % 6}"
        price = {3: 0.0, 7: top}.get(row, round(draw.uniform(1, 99), 2))
        lines.append(f"u{draw.randrange(30)},{item},{price},{row % 2},{row // 2 % 2}")
    path.write_text("\n".join(lines) + "\n")


def make_table(folder: Path, *, seed: int = 0, top: float = 100.0, new_items: int = 0, **features: dict) -> Path:
    """A dataset of some 126 train rows whose prices range from 0 to `top`."""
    folder.mkdir()
    write_log(folder / "train.csv", seed, 126, top, new_items)
    for side in ("valid", "test"):
        write_log(folder / f"{side}.csv", seed + 1, 40, 50.0, 0)
    config = write_config(folder, TABLE | {"features": TABLE["features"] | features})
    assert main(["table", "--config", str(config), "--out", str(folder / "data")]) == 0
    return folder / "data"


def train_in_a_process(folder: Path, dataset: Path) -> Path:
    (folder / "config.yaml").write_text(CONFIG.format(dataset=dataset))
    arguments = ["-m", "apps.train", "--config", str(folder / "config.yaml"), "--run-dir", str(folder / "run")]
    done = processes.run([sys.executable, *arguments])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder with `data`, made by `table`, and a run of 4 steps on it."""
    folder = tmp_path_factory.mktemp("table")
    return train_in_a_process(folder, make_table(folder / "made"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same on a dataset whose manifest holds no identity, and whose train split has three parts."""
    folder = tmp_path_factory.mktemp("written")
    write_dataset(folder / "made/data", rows=180)
    return train_in_a_process(folder, folder / "made/data")


def copy(source: Path, target: Path) -> tuple[Path, Path]:
    """Copies of dataset and run, to be spoilt; the run's configuration names the copy."""
    shutil.copytree(source / "made/data", target / "data")
    shutil.copytree(source / "run", target / "run")
    for config in (source / "config.yaml", source / "run/config.yaml"):
        text = config.read_text().replace(str(source / "made/data"), str(target / "data"))
        (target / config.relative_to(source)).write_text(text)
    return target / "data", target / "run"


@pytest.fixture
def app(run_app):
    """Runs an entry point in this process; returns exit code and standard error."""

    def call(name: str, *arguments: object) -> tuple[int, str]:
        code, error = run_app(name, *arguments)
        assert "Traceback" not in error
        return code, error

    return call


def edit(folder: Path, change) -> None:
    """Change a manifest as by hand."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def flip_a_bit(folder: Path, split: str) -> Path:
    """Change the last bit of a price in a part so that it still decodes."""
    path = folder / DatasetManifest.load(folder).splits[split].parts[0].path
    before = pq.read_table(path)["price"].to_numpy()
    content = bytearray(path.read_bytes())
    content[content.index(before[8:16].tobytes())] ^= 1
    path.write_bytes(content)
    after = pq.read_table(path)["price"].to_numpy()
    assert np.flatnonzero(before != after).tolist() == [8]
    return path


# Where data meet a model


def test_predict_refuses_another_range_and_names_both(table, app, tmp_path):
    output = tmp_path / "scores.parquet"
    alike, outlier = make_table(tmp_path / "alike", seed=5), make_table(tmp_path / "outlier", top=100000.0)
    predict = ["predict", "--run-dir", table / "run", "--output", output, "--input"]
    code, error = app(*predict, outlier)
    assert code == 2
    assert f"{outlier} is encoded otherwise than what the run was trained on" in error
    assert "  feature 'price', range: [0.0, 100000.0] here, [0.0, 100.0] in the run\n" in error
    assert error.count("in the run") == 1
    assert not output.exists()
    code, error = app(*predict, alike)
    assert (code, output.exists()) == (0, True), error


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"price": {"kind": "number", "scale": "log", "fill": 0}}, "feature 'price', scale: \"log\" here, null in the run"),
        ({"user": {"kind": "id", "hash": {"num_buckets": 50, "seed": 3}}}, "table 'user', seed: 3 here, 0 in the run"),
    ],
    ids=["conversion", "hash"],
)
def test_predict_names_the_part_that_differs(features, words, table, app, tmp_path):
    other = make_table(tmp_path / "other", **features)
    output = tmp_path / "scores.parquet"
    code, error = app("predict", "--run-dir", table / "run", "--input", other, "--output", output)
    assert code == 2
    assert words in error
    assert not output.exists()


def test_ids_of_a_vocabulary_that_has_grown_are_unseen(table, app, tmp_path):
    """Predictions and metrics are those of the same rows with id 0 there; the number of such ids is told."""
    more = make_table(tmp_path / "more", new_items=2)
    assert pq.read_table(more / "vocab/item.parquet")["value"].to_pylist()[-2:] == ["new0", "new1"]
    predict = ["predict", "--run-dir", table / "run", "--input", more, "--output", tmp_path / "scores.parquet"]
    code, error = app(*predict, "--split", "train")
    assert code == 0, error
    assert f"{more}: ids that the run has no rows for, read as 0 (unseen): item 2" in error
    scores = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    plain = shutil.copytree(more, tmp_path / "plain")
    shutil.copytree(table / "made/data/vocab", plain / "vocab", dirs_exist_ok=True)
    part = DatasetManifest.load(plain).splits["train"].parts[0]
    rows = pq.read_table(plain / part.path)
    ids = np.where(rows["item"].to_numpy() > 6, 0, rows["item"].to_numpy())
    assert np.count_nonzero(ids == 0) == 2
    pq.write_table(rows.set_column(rows.schema.get_field_index("item"), "item", [ids]), plain / part.path)
    content, known = (json.loads((folder / "manifest.json").read_text()) for folder in (plain, table / "made/data"))
    content |= {key: known[key] for key in ("tables", "encoding")}
    file = plain / part.path
    content["splits"]["train"]["parts"][0] |= {"num_bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (plain / "manifest.json").write_text(json.dumps(content))
    assert app(*predict[:3], "--input", plain, "--split", "train", "--output", tmp_path / "plain.parquet")[0] == 0
    assert pq.read_table(tmp_path / "plain.parquet").to_pydict() == scores
    told = []
    for folder in (more, plain):
        code, error = app("evaluate", "--run-dir", table / "run", "--input", folder, "--split", "train")
        assert code == 0, error
        told.append(error)
    assert ["item 2" in error for error in told] == [True, False]
    vocabulary = pq.read_table(more / "vocab/item.parquet")
    pq.write_table(vocabulary.take(list(range(len(vocabulary)))[::-1]), more / "vocab/item.parquet")
    code, error = app(*predict)
    assert code == 2
    assert f"{more}/vocab/item.parquet is damaged: the digest of its values is" in error


def test_the_identity_is_in_run_folder_and_checkpoints(table):
    manifest = DatasetManifest.load(table / "made/data")
    expected = {"data": data_facts(manifest), "encoding": manifest.encoding.model_dump(mode="json")}
    for file in ("dataset.json", "checkpoints/step_000000004/state.json", "checkpoints/best/state.json"):
        found = json.loads((table / "run" / file).read_text())
        assert {key: found[key] for key in expected} == expected
        assert found["dataset"] == parts_digest(manifest)


def test_evaluate_and_resume_compare_the_encoding_too(table, app, tmp_path):
    data, run_dir = copy(table, tmp_path)

    def other_range(content):
        facts = content["encoding"]
        facts["features"]["price"]["range"] = [0.0, 200.0]
        parts = {name: facts[name] for name in ("features", "tables", "scenario", "labels")}
        content["encoding"] = Encoding.of(**parts).model_dump(mode="json")

    edit(data, other_range)
    for name, *arguments in (("evaluate",), ("train", "--config", tmp_path / "config.yaml", "training.max_steps=8")):
        code, error = app(name, *arguments, "--run-dir", run_dir)
        assert code == 2
        assert "feature 'price', range: [0.0, 200.0] here, [0.0, 100.0] in the run" in error


def test_a_record_that_was_changed_by_hand_is_no_record(table, app, tmp_path):
    data, run_dir = copy(table, tmp_path)
    edit(data, lambda content: content["encoding"]["features"]["price"].update(range=[0.0, 200.0]))
    code, error = app("evaluate", "--run-dir", run_dir)
    assert code == 2
    assert f"{data}/manifest.json is damaged" in error
    assert "digest is not that of its facts" in error


# Which rows, and in which order


EDITS = {
    "lanes": (lambda content: content.update(num_lanes=7), "num_lanes: 4 in the run, 7 now"),
    "row groups": (lambda content: content.update(row_group_size=32), "row_group_size: 16 in the run, 32 now"),
    "order of parts": (lambda content: content["splits"]["train"]["parts"].reverse(), "parts of train, in their order: "),
    "members of a split": (
        lambda content: content["splits"].update(valid=content["splits"]["test"], test=content["splits"]["valid"]),
        "parts of valid, in their order: ",
    ),
    "scenarios": (
        lambda content: content["scenario"].update(values=["s1", "s0", "s2"]),
        'scenarios: ["s0", "s1", "s2"] in the run, ["s1", "s0", "s2"] now',
    ),
    "group": (lambda content: content.update(group_key=None), 'group_key: "user" in the run, null now'),
    "tasks": (lambda content: content["tasks"].reverse(), "tasks: "),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_run_goes_on_only_with_its_rows_in_their_order(name, written, app, tmp_path):
    data, run_dir = copy(written, tmp_path)
    change, words = EDITS[name]
    edit(data, change)
    before = checkpoints(run_dir)
    for command in (("train", "--config", tmp_path / "config.yaml", "training.max_steps=8"), ("evaluate",)):
        code, error = app(*command, "--run-dir", run_dir)
        assert code == 2
        assert f"{run_dir} holds a run on other data than {data} has now:\n" in error
        assert words in error
    assert checkpoints(run_dir) == before


def test_what_order_and_inputs_do_not_depend_on_may_change(written, app, tmp_path):
    data, run_dir = copy(written, tmp_path)
    (data / "train").rename(data / "moved")

    def change(content):
        content.update(terms="other", statistics={"rows": 1}, raw_files={"a": "b"}, name="renamed")
        for part in content["splits"]["train"]["parts"]:
            part["path"] = part["path"].replace("train/", "moved/")

    edit(data, change)
    code, error = app("train", "--config", tmp_path / "config.yaml", "--run-dir", run_dir, "training.max_steps=8")
    assert code == 0, error
    assert "step_000000008" in checkpoints(run_dir)


# Parts are what was written


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_training_refuses_a_part_with_one_bit_flipped(split, table, app, tmp_path):
    data, _ = copy(table, tmp_path)
    path = flip_a_bit(data, split)
    code, error = app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "new")
    assert code == 2
    assert f"error: {path} is damaged: its checksum is " in error
    assert "Restore it from a copy, or run the preprocessing again" in error
    assert checkpoints(tmp_path / "new") == []
    assert not (tmp_path / "new/result.json").exists()


def test_resume_evaluate_and_predict_refuse_it(table, app, tmp_path):
    data, run_dir = copy(table, tmp_path)
    output, before, result = tmp_path / "scores.parquet", checkpoints(run_dir), (run_dir / "result.json").read_text()
    path = flip_a_bit(data, "test")
    for command in (
        ("predict", "--input", data, "--output", output),
        ("evaluate",),
        ("train", "--config", tmp_path / "config.yaml", "training.max_steps=8"),
    ):
        code, error = app(*command, "--run-dir", run_dir)
        assert code == 2
        assert f"error: {path} is damaged: its checksum is " in error
        assert not output.exists()
        assert checkpoints(run_dir) == before
        if command[0] == "evaluate":
            assert (run_dir / "result.json").read_text() == result
    # Its other splits can be used.
    code, error = app("predict", "--input", data, "--output", output, "--split", "valid", "--run-dir", run_dir)
    assert (code, output.exists()) == (0, True), error


def test_nothing_is_kept_before_all_parts_are_hashed(table, app, tmp_path):
    data, _ = copy(table, tmp_path)
    seen = []

    def slow(folder, part):
        seen.append(part.path)
        if len(seen) == 3:
            time.sleep(1.5)
            raise DataError("found late")

    with mock.patch.object(verification, "check_part", slow):
        code, error = app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "new")
    assert code == 2
    assert "error: found late" in error
    assert seen == ["train/part-00000.parquet", "valid/part-00000.parquet", "test/part-00000.parquet"]
    assert checkpoints(tmp_path / "new") == []
    assert data.is_dir()


def test_all_ranks_end_when_one_finds_a_damaged_part(table, tmp_path):
    data, _ = copy(table, tmp_path)
    path = flip_a_bit(data, "train")
    port = str(free_port())
    arguments = ["-m", "apps.train", "--config", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "new")]
    ranks = []
    for rank in range(2):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables = processes.environment(**places, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        ranks.append(processes.Command([sys.executable, *arguments], env=variables))
    outputs = [command.communicate(timeout=120)[1] for command in ranks]
    assert [command.returncode for command in ranks] == [2, 2], outputs
    lines = {line for output in outputs for line in output.splitlines() if line.startswith("error:")}
    assert len(lines) == 1
    assert f"error: {path} is damaged" in lines.pop()
    assert checkpoints(tmp_path / "new") == []


# Datasets and runs of other releases


def test_datasets_and_runs_of_the_release_before_still_work(table, app, tmp_path):
    data, _ = copy(table, tmp_path)
    edit(data, lambda content: content.pop("encoding"))
    run_dir = tmp_path / "old"
    train = ["train", "--config", tmp_path / "config.yaml", "--run-dir", run_dir]
    with mock.patch.object(trainer, "data_state", lambda manifest: {"dataset": parts_digest(manifest)}):
        assert app(*train)[0] == 0
    (run_dir / "dataset.json").unlink()
    state = json.loads((run_dir / "checkpoints/step_000000004/state.json").read_text())
    assert state.keys() & {"dataset", "data", "encoding"} == {"dataset"}

    code, error = app("evaluate", "--run-dir", run_dir)
    assert code == 0, error
    assert "was written by another release: only checksums of the data can be compared" in error
    output = tmp_path / "scores.parquet"
    predict = ["predict", "--run-dir", run_dir, "--output", output, "--input"]
    assert app(*predict, data)[0] == 0
    alike, outlier = make_table(tmp_path / "alike", seed=5), make_table(tmp_path / "outlier", top=100000.0)
    code, error = app(*predict, alike)
    assert code == 0, error
    assert f"no record of the encoding of {data}" in error
    output.unlink()
    code, error = app(*predict, outlier)
    assert code == 2
    assert "feature 'price', range: [0.0, 100000.0] here, [0.0, 100.0] in the run" in error
    assert not output.exists()

    code, error = app(*train, "training.max_steps=8")
    assert code == 0, error
    assert "resumed from" in error
    state = json.loads((run_dir / "checkpoints/step_000000008/state.json").read_text())
    assert state["data"] == data_facts(DatasetManifest.load(data))
    edit(data, lambda content: content["splits"]["train"]["parts"][0].update(sha256="0" * 64))
    code, error = app("evaluate", "--run-dir", run_dir)
    assert code == 2
    assert "on other data" in error


def test_keys_of_a_later_release_are_named_and_passed_over(table, app, tmp_path):
    data, run_dir = copy(table, tmp_path)

    def later(content):
        content["later"] = {"a": 1}
        content["tables"][0]["new"] = 1
        content["splits"]["test"]["parts"][0]["crc"] = "x"
        content["encoding"]["more"] = []

    before = DatasetManifest.load(data)
    edit(data, later)
    with pytest.warns(UserAdvice, match=r"later.*misspelt") as told:
        assert DatasetManifest.load(data) == before
    assert all(key in str(told[0].message) for key in ("tables.0.new", "splits.test.parts.0.crc", "encoding.more"))
    code, error = app("evaluate", "--run-dir", run_dir)
    assert code == 0, error
    assert f"note: {data}/manifest.json has keys that this release does not know" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(schema_version=3, tables={}), "schema version 3, this release reads 1, 2"),
        (lambda content: content.pop("schema_version"), "schema version None"),
        (lambda content: content.update(num_lanes=0, later=1), "manifest.json is damaged"),
        (lambda content: content.update(num_lane=content.pop("num_lanes")), "manifest.json is damaged"),
    ],
    ids=["later version", "no version", "unknown and wrong", "misspelt and needed"],
)
def test_what_cannot_be_read_is_refused(change, words, table, tmp_path):
    shutil.copytree(table / "made/data", tmp_path / "data")
    edit(tmp_path / "data", change)
    with pytest.raises(DataError, match=words):
        DatasetManifest.load(tmp_path / "data")


def test_an_encoding_of_a_later_form_is_not_guessed_at(table, app, tmp_path):
    data, run_dir = copy(table, tmp_path)
    other = shutil.copytree(data, tmp_path / "other")
    edit(other, lambda content: content["encoding"].update(form=2, digest="x", features={"price": {"unheard": "of"}}))
    code, error = app("predict", "--run-dir", run_dir, "--input", other, "--output", tmp_path / "scores.parquet")
    assert code == 0, error
    assert "cannot be told in full: its record is of another release" in error
