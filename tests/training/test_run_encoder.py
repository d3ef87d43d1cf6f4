"""RUN/encoder: how the data of a run are encoded, kept when the dataset is gone."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from mmlrec.storage.places import place
from tests.datasets import with_vocabularies, write_dataset
from tests.storage import upload

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [4], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 50, epochs: 1000, max_steps: 2, patience: null}}
"""


@pytest.fixture
def data(tmp_path):
    data = with_vocabularies(write_dataset(tmp_path / "data", rows=200, table_rows=30))
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=data.folder))
    return data


@pytest.fixture
def train(tmp_path, run_app):
    def call(*overrides, run_dir=tmp_path / "run", code=0):
        found, error = run_app("train", "--config", tmp_path / "config.yaml", "--run-dir", run_dir, *overrides)
        assert found == code, error
        return error

    return call


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check(encoder, dataset):
    """That it is what it must be: the manifest but for its parts, and the vocabularies to the byte."""
    expected = json.loads((dataset / "manifest.json").read_text())
    for split in expected["splits"].values():
        split["parts"] = []
    found = files(encoder)
    assert json.loads(found.pop("manifest.json")) == expected
    assert found == {name: content for name, content in files(dataset).items() if name.startswith("vocab/")}
    assert len(found) == 4
    assert DatasetManifest.load(encoder).splits["train"].num_rows == 200


def test_it_is_a_dataset_folder_without_rows_and_costs_no_room(tmp_path, data, train):
    train()
    encoder = tmp_path / "run" / "encoder"
    check(encoder, data.folder)
    for name in ("t0", "tm0"):
        path = f"vocab/{name}.parquet"
        assert os.path.samefile(encoder / path, data.folder / path)
    assert not list((tmp_path / "run").glob("encoder.*"))


def test_vocabularies_are_copied_where_there_are_no_hard_links(tmp_path, data, train, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    train()
    check(tmp_path / "run" / "encoder", data.folder)
    assert not os.path.samefile(tmp_path / "run/encoder/vocab/t0.parquet", data.folder / "vocab/t0.parquet")


def test_where_the_disk_is_full_the_run_ends_and_nothing_is_half_there(tmp_path, data, train, monkeypatch):
    plain, linked = os.link, []

    def refuse(source, target):
        if linked:
            raise OSError(18, "Invalid cross-device link")
        linked.append(target)
        plain(source, target)

    def full(source, target):
        target.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", full)
    assert "run/encoder: cannot be written: [Errno 28] No space left on device" in train(code=2)
    assert linked
    assert not list((tmp_path / "run").glob("encoder*"))


def test_a_run_of_an_earlier_release_gets_it_when_it_goes_on_and_keeps_it_when_it_is_there(tmp_path, data, train):
    train()
    encoder = tmp_path / "run" / "encoder"
    shutil.rmtree(encoder)
    (tmp_path / "run" / "encoder.0123-4567.tmp").mkdir()  # what a start left that was killed
    train("training.max_steps=3")
    check(encoder, data.folder)
    assert not list((tmp_path / "run").glob("encoder.*"))
    before = encoder.stat()
    train("training.max_steps=4")
    assert encoder.stat() == before


def test_that_of_another_dataset_is_replaced_by_a_run_that_begins_again(tmp_path, data, train):
    train()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(data.folder)
    other = with_vocabularies(write_dataset(tmp_path / "data", rows=200, table_rows=40, seed=1))
    train()
    check(tmp_path / "run" / "encoder", other.folder)


def test_without_a_vocabulary_there_is_none_and_that_is_told(tmp_path, data, train):
    (data.folder / "vocab/t1.parquet").unlink()
    assert "vocab/t1.parquet is not there, so" in train()
    assert not (tmp_path / "run" / "encoder").exists()


def test_a_vocabulary_outside_of_the_dataset_is_refused(tmp_path, data, train):
    tables = [t.model_copy(update={"vocabulary": f"../{t.name}.parquet"}) for t in data.manifest.tables]
    data.manifest.model_copy(update={"tables": tables}).save(data.folder)
    assert "lies outside of the dataset" in train(code=2)


@pytest.mark.parametrize("stored", ["run", "data", "both"])
def test_on_object_storage(tmp_path, data, train, store, stored):
    there = place(f"{store.address}/data")
    upload(data.folder, there)
    overrides = [] if stored == "run" else [f"dataset.path={there}"]
    run_dir = tmp_path / "run" if stored == "data" else place(f"{store.address}/run")
    train(*overrides, run_dir=run_dir)
    puts = [line for line in store.link.requests if line.startswith("PUT") and "/run/encoder/" in line]
    assert stored == "data" or puts[-1].endswith("/run/encoder/manifest.json")
    encoder = run_dir / "encoder"
    if stored != "data":
        there.fs.get(encoder.path, str(tmp_path / "copy"), recursive=True)
        encoder = tmp_path / "copy"
    check(encoder, data.folder)


def test_a_run_predicts_when_its_dataset_is_gone_and_says_what_needs_rows(tmp_path, data, train, run_app):
    train()
    shutil.copytree(data.folder, tmp_path / "input")
    run = ("--run-dir", tmp_path / "run")
    score = ("--input", tmp_path / "input", "--output")
    assert run_app("predict", *run, *score, tmp_path / "before.parquet")[0] == 0
    assert run_app("evaluate", *run)[0] == 0
    result = (tmp_path / "run" / "result.json").read_bytes()
    data.folder.rename(tmp_path / "elsewhere")

    code, error = run_app("predict", *run, *score, tmp_path / "after.parquet")
    assert code == 0, error
    assert f"the dataset {data.folder} is gone: what the model has to know of it is taken from {tmp_path}/run/encoder" in error
    assert pq.read_table(tmp_path / "after.parquet").equals(pq.read_table(tmp_path / "before.parquet"))
    code, error = run_app("evaluate", *run)
    assert code == 2
    assert f"dataset.path: {data.folder} is gone, and with it the rows of test" in error
    assert "is not a dataset: the folder does not exist" in train("training.max_steps=3", code=2)
    # Rows that lie elsewhere are measured, as before; a typing error is no dataset that is gone.
    assert run_app("evaluate", *run, f"dataset.path={tmp_path / 'elsewhere'}")[0] == 0
    assert (tmp_path / "run" / "result.json").read_bytes() == result
    code, error = run_app("evaluate", *run, f"dataset.path={tmp_path / 'elsewheer'}")
    assert code == 2
    assert "elsewheer is not a dataset: the folder does not exist" in error


def test_rows_that_are_encoded_otherwise_are_refused_when_the_dataset_is_gone(tmp_path, data, train, run_app):
    """With the record of the encoding, and without it by the vocabularies themselves."""
    run = ("--run-dir", tmp_path / "run")
    for recorded in (True, False):
        if not recorded:
            data.manifest.model_copy(update={"encoding": None}).save(data.folder)
            shutil.rmtree(tmp_path / "run")
        train()
        shutil.rmtree(tmp_path / "input", ignore_errors=True)
        shutil.copytree(data.folder, tmp_path / "input")
        values = [f"other-{id}" for id in range(1, data.manifest.table("t1").num_rows)]
        with_vocabularies(
            type(data)(tmp_path / "input", data.manifest, data.tables),
            {t.name: pq.read_table(data.folder / f"vocab/{t.name}.parquet")["value"] for t in data.manifest.tables}
            | {"t1": pa.array(values)},
        )
        data.folder.rename(tmp_path / "gone")
        code, error = run_app("predict", *run, "--input", tmp_path / "input", "--output", tmp_path / "scores.parquet")
        assert code == 2
        assert "table 't1', digest" in error if recorded else "not the vocabulary the run was trained with" in error
        (tmp_path / "gone").rename(data.folder)


def test_the_encoder_of_another_run_is_refused(tmp_path, data, train, run_app):
    train()
    other = with_vocabularies(write_dataset(tmp_path / "other", rows=200, table_rows=40))
    train(f"dataset.path={other.folder}", run_dir=tmp_path / "second")
    shutil.rmtree(tmp_path / "run" / "encoder")
    shutil.copytree(tmp_path / "second" / "encoder", tmp_path / "run" / "encoder")
    shutil.copytree(data.folder, tmp_path / "input")
    shutil.rmtree(data.folder)
    output = ("--output", tmp_path / "scores.parquet")
    code, error = run_app("predict", "--run-dir", tmp_path / "run", "--input", tmp_path / "input", *output)
    assert code == 2
    assert "run/encoder is not of the data that this run was trained on" in error
