"""Training, evaluation, prediction on a dataset on an object store: to the bit as from a local folder; links that are cut."""

import json
import re
import sys
import threading
import time

import pytest
import torch

from mmlrec.storage.places import place
from tests.datasets import write_dataset
from tests.storage import upload
from tests.training.launch import losses, start_ranks, tensors

CONFIG = """
dataset: {path: nowhere, setting: mtl}
model: {name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}
embeddings: {dim: 4}
training: {batch_size: 800, eval_batch_size: 800, epochs: 2, log_every_steps: 1}
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "config.yaml").write_text(CONFIG)
    return write_dataset(folder / "data", rows=16_000, row_group_size=500, rows_per_part=4_000)


@pytest.fixture
def on_s3(written, store):
    folder = place(f"{store.address}/data")
    upload(written.folder, folder)
    store.link.num_bytes = 0
    return folder


def command(written, dataset, run_dir, *overrides):
    config = written.folder.parent / "config.yaml"
    return ["--config", str(config), "--run-dir", str(run_dir), f"dataset.path={dataset}", *overrides]


def train(written, dataset, run_dir, num_ranks, timeout=120):
    """Exit codes, and what the ranks have said."""
    logs = [run_dir.with_name(f"{run_dir.name}-{rank}.log") for rank in range(num_ranks)]
    ranks = start_ranks([sys.executable, "-m", "apps.train", *command(written, dataset, run_dir)], logs)
    try:
        codes = [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return codes, [log.read_text() for log in logs]


def equal(run, expected):
    (step,) = [path.name for path in (expected / "checkpoints").glob("step_*") if path.is_dir()][-1:]
    ours, theirs = (tensors(folder / "checkpoints" / step) for folder in (run, expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[name], value), name
    assert losses(run) == losses(expected)
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, expected)]
    assert results[0]["test"] == results[1]["test"]


def test_a_run_is_that_from_a_local_folder_though_the_link_is_cut_for_a_while(
    written, on_s3, store, tmp_path, run_app, monkeypatch
):
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "30")

    def cut_for_a_while():
        while store.link.num_bytes < 100_000:
            time.sleep(0.005)
        store.link.cut()
        time.sleep(1)
        store.link.mend()

    threading.Thread(target=cut_for_a_while, daemon=True).start()
    assert run_app("train", *command(written, on_s3, tmp_path / "there"))[0] == 0
    assert run_app("train", *command(written, written.folder, tmp_path / "here"))[0] == 0
    equal(tmp_path / "there", tmp_path / "here")
    run = ["--run-dir", tmp_path / "there"]
    assert run_app("evaluate", *run)[0] == 0
    for name, dataset in (("here", written.folder), ("there", on_s3)):
        assert run_app("predict", *run, "--input", dataset, "--output", tmp_path / f"{name}.csv")[0] == 0
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()


def test_a_link_that_is_cut_for_good_is_one_line(written, on_s3, store, tmp_path, run_app, monkeypatch):
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "0.3")
    store.link.cut_after(14)
    code, error = run_app("train", *command(written, on_s3, tmp_path / "run"))
    assert code == 1
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert re.match(
        rf"error: {on_s3}/\S+: (reading|looking for it) failed at http://127\.0\.0\.1:\d+: .*Tried \d+ times in \d+ s", line
    )
    assert "Traceback" not in error


@pytest.mark.cluster
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_train_as_from_a_local_folder_and_fetch_each_byte_once(written, on_s3, store, tmp_path, num_ranks):
    assert train(written, on_s3, tmp_path / "there", num_ranks)[0] == [0] * num_ranks
    num_bytes = sum(part.num_bytes for split in written.manifest.splits.values() for part in split.parts)
    assert store.link.num_bytes <= 1.1 * num_bytes + 2 * num_ranks * (written.folder / "manifest.json").stat().st_size
    assert train(written, written.folder, tmp_path / "here", num_ranks)[0] == [0] * num_ranks
    equal(tmp_path / "there", tmp_path / "here")


@pytest.mark.cluster
def test_two_ranks_end_when_the_link_is_cut_for_good(written, on_s3, store, tmp_path):
    store.link.cut_after(30)
    began = time.monotonic()
    codes, logs = train(written, on_s3, tmp_path / "run", 2)
    assert 0 not in codes
    assert time.monotonic() - began < 60
    lines = [line for log in logs for line in log.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {on_s3}/")


@pytest.mark.cluster
def test_a_server_that_is_killed_and_comes_back(written, disk_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "30")
    folder = place(f"{disk_store.address}/data")
    upload(written.folder, folder)
    disk_store.link.num_bytes = 0

    def kill_for_a_while():
        while disk_store.link.num_bytes < 100_000:
            time.sleep(0.005)
        disk_store.server.kill()
        time.sleep(0.5)
        disk_store.server.start()

    threading.Thread(target=kill_for_a_while, daemon=True).start()
    codes, logs = train(written, folder, tmp_path / "there", 1)
    assert codes == [0], logs
    assert train(written, written.folder, tmp_path / "here", 1)[0] == [0]
    equal(tmp_path / "there", tmp_path / "here")
