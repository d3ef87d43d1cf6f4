"""A run folder on object storage: trained by two ranks, killed, resumed, refused to a second start, and read."""

import json
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mmlrec.distributed.world import process_group
from mmlrec.run_folder import lease, reports, whole
from mmlrec.run_folder.lease import Lease
from mmlrec.storage.places import Place, place, read
from tests.datasets import write_dataset
from tests.processes import Command, spawn
from tests.training.launch import free_port, losses, start_ranks, tensors
from tests.training.saving_ranks import wait_for_lease

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
training: {{batch_size: 50, epochs: 1000, max_steps: 16, patience: null, log_every_steps: 1, checkpoint_every_steps: 5}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    write_dataset(folder / "data", rows=690, table_rows=30)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))
    return folder


def train(root: Path, run_dir: object, *overrides: str) -> list[str]:
    return ["--config", str(root / "config.yaml"), "--run-dir", str(run_dir), *overrides]


def started(root: Path, run_dir: Place, name: str, *overrides: str) -> list[Command]:
    """Two ranks."""
    logs = [root / f"{name}-{rank}.log" for rank in range(2)]
    return start_ranks([sys.executable, "-m", "apps.train", *train(root, run_dir, *overrides)], logs)


def ended(ranks: list[Command], root: Path, name: str) -> str:
    """What rank 0 has said, once both have ended well."""
    codes = [rank.wait(120) for rank in ranks]
    told = [(root / f"{name}-{rank}.log").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(told)
    return told[0]


def until(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


def copied(there: Place, folder: Path) -> Path:
    there.fs.get(there.path, str(folder), recursive=True)
    return folder


def test_two_ranks_killed_and_resumed_equal_an_unbroken_run_on_a_disk(root, store, tmp_path, run_app):
    local, run_dir = root / "local", place(f"{store.address}/runs/a")
    whole_run = started(root, local, "local")
    ranks = started(root, run_dir, "first")
    try:
        marker = run_dir / "checkpoints" / "step_000000005" / "COMPLETE.json"
        until(lambda: marker.is_file() or ranks[0].poll() is not None, 60, "a checkpoint")
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        code, error = run_app("train", *train(root, run_dir))
        assert code == 2
        holder = json.loads((run_dir / ".lease" / "1").read_bytes())
        where = f"{socket.gethostname()}, process {holder['ranks'][0][1]}"
        assert f"{run_dir} is taken: a run that was started at {holder['since']} on {where} is writing there" in error
    finally:
        for rank in ranks:
            rank.kill()
    told = ended(started(root, run_dir, "second", "--resume"), root, "second")
    assert f"resumed from {run_dir}/checkpoints/step_0000000" in told
    ended(whole_run, root, "local")

    copy = copied(run_dir, tmp_path / "copy")
    assert losses(copy) == losses(local)
    assert list(losses(copy)) == list(range(1, 17))
    assert json.loads((copy / "result.json").read_bytes()) == json.loads((local / "result.json").read_bytes())
    for name in ("best", "step_000000015", "step_000000016"):
        ours, theirs = tensors(whole.inside(copy / "checkpoints" / name)), tensors(local / "checkpoints" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    kept = {path.name for path in whole.folders(run_dir / "checkpoints")}
    assert kept == {"best", "step_000000015", "step_000000016"}
    assert whole.leftovers(run_dir / "checkpoints") == []
    assert "resumed from" in (copy / "train.log").read_text()
    assert (copy / "train.log").read_text().count("new run at step 0") == 1
    assert len(list((copy / "tensorboard").iterdir())) == 2

    # The address, and a copy on a disk, are a run folder for all that reads.
    code, error = run_app("evaluate", "--run-dir", run_dir, "--split", "valid")
    assert code == 0, error
    written = json.loads((run_dir / "result.json").read_bytes())
    code, error = run_app("evaluate", "--run-dir", copy, "--split", "valid")
    assert code == 0, error
    assert json.loads((copy / "result.json").read_bytes()) == written
    outputs = f"{store.address}/scores.parquet", tmp_path / "scores.parquet"
    for folder, output in zip((run_dir, copy), outputs, strict=True):
        code, error = run_app("predict", "--run-dir", folder, "--input", root / "data", "--output", output)
        assert code == 0, error
    copied(place(outputs[0]), tmp_path / "fetched.parquet")
    assert pq.read_table(tmp_path / "fetched.parquet").equals(pq.read_table(outputs[1]))
    code, error = run_app("train", "--config", f"{run_dir}/config.yaml", "--run-dir", run_dir)
    assert code == 0, error
    assert f"{run_dir} is complete; nothing left to train" in error


def test_a_run_goes_back_and_begins_anew_where_all_is_damaged(root, store, run_app):
    run_dir = place(f"{store.address}/runs/e")
    steps = ("training.max_steps=4", "training.checkpoint_every_steps=1", "training.keep_checkpoints=3")
    assert run_app("train", *train(root, run_dir, *steps))[0] == 0
    before = (run_dir / "checkpoints" / "step_000000002" / "COMPLETE.json").read_bytes()
    code, error = run_app("train", *train(root, run_dir, *steps, "dense.optimizer.lr=1e-5"), "--from-step", "2")
    assert code == 0, error
    assert f"resumed from {run_dir}/checkpoints/step_000000002 at step 2" in error
    assert (run_dir / "checkpoints" / "step_000000002" / "COMPLETE.json").read_bytes() == before
    for folder in whole.folders(run_dir / "checkpoints"):
        (whole.inside(folder) / "state.json").write_text("{}")
    now = (*steps, "dense.optimizer.lr=1e-5")
    code, error = run_app("train", *train(root, run_dir, *now))
    assert code == 2
    assert "step_000000004" in error
    assert f"{run_dir} holds a run that cannot be resumed" in error
    code, error = run_app("train", *train(root, run_dir, *now), "--restart")
    assert code == 0, error
    assert f"{run_dir}: new run at step 0 of at most 4" in error
    assert all(whole.damage(folder) is None for folder in whole.folders(run_dir / "checkpoints"))
    assert whole.leftovers(run_dir / "checkpoints") == []


def test_the_contract_holds_on_another_file_system_of_fsspec(root, run_app, tmp_path):
    run_dir = "memory://stored-run/runs/a"
    assert run_app("train", *train(root, run_dir, "training.max_steps=6"))[0] == 0
    code, error = run_app("train", *train(root, run_dir), "--resume")
    assert code == 0, error
    assert f"resumed from {run_dir}/checkpoints/step_000000006 at step 6" in error
    code, error = run_app("train", *train(root, tmp_path / "local"))
    assert code == 0, error
    ours = json.loads(place(f"{run_dir}/result.json").read_bytes())
    assert ours == json.loads((tmp_path / "local" / "result.json").read_bytes())
    code, error = run_app("predict", "--run-dir", run_dir, "--input", root / "data", "--output", tmp_path / "scores.csv")
    assert code == 0, error


def hasty() -> None:
    """A process of a host whose processes nobody else can look up, with a short lease."""
    lease._process_space = lambda: None
    lease.LENGTH_S, lease.RENEWED_EVERY_S = 1.0, 0.2


def test_a_run_that_was_stopped_while_another_took_its_folder_saves_nothing_more(root, store, monkeypatch):
    run_dir = place(f"{store.address}/runs/b")
    arguments = [sys.executable, "-m", "apps.train", *train(root, run_dir, "training.max_steps=100000")]
    first = Command(arguments, prepare=hasty)
    try:
        until(lambda: whole.folders(run_dir / "checkpoints") or first.poll() is not None, 60, "a checkpoint")
        first.send_signal(signal.SIGSTOP)
        hasty_here = {"_process_space": lambda: None, "_LOOKED_AT_EVERY_S": 0.1}
        for name, value in hasty_here.items():
            monkeypatch.setattr(lease, name, value)
        other = Lease(run_dir)
        other.take({"start": "other", "since": "now", "job": None, "ranks": [("host-b", 17)]})
        before = stored_files(run_dir)
        for name in ("metrics.jsonl", "train.log"):
            (run_dir / name).write_text("of the other")
        first.send_signal(signal.SIGCONT)
        _, error = first.communicate(60)
        assert first.poll() == 2
        assert error.count("error: ") == 1
        assert f"{run_dir}: another run has taken it over, started at now on host-b, process 17" in error
        assert stored_files(run_dir) == before
        assert [read(run_dir / name) for name in ("metrics.jsonl", "train.log")] == [b"of the other"] * 2
        left = re.search("lacks the last reports of this run; they are in (.*) on this machine", error)
        assert left is not None
        shutil.rmtree(left[1])
        other.leave()
    finally:
        first.kill()


def test_ranks_with_a_short_timeout_wait_for_a_lease_to_expire(store):
    dead = {"start": "dead", "since": "then", "job": None, "ranks": [("host-b", 17)]}
    unseen = {"length": 6.0, "process": {"space": None, "number": 17, "begun": "1"}, "left": False}
    (place(store.address) / "runs" / "f" / ".lease" / "1").write_text(json.dumps(dead | unseen))
    spawn(wait_for_lease, (str(free_port()), store.environment, f"{store.address}/runs/f"), 2)


def stored_files(run_dir: Place) -> set[str]:
    """What markers name: all else is left over."""
    folder = run_dir / "checkpoints"
    return {(path / "COMPLETE.json").read_text() for path in whole.folders(folder)}


def test_reports_are_put_again_after_an_outage_and_whole_at_the_end(store, monkeypatch):
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "0.2")
    monkeypatch.setattr(reports, "_PUT_EVERY_S", 0.1)
    told = []
    for level in ("warning", "info"):
        monkeypatch.setattr(reports.logger, level, lambda text, *rest: told.append(text % rest))
    folder = place(f"{store.address}/runs/c")
    (folder / "metrics.jsonl").write_text("of before\n")
    with process_group() as world, reports.reports(folder, world) as found:
        file = found.written / "metrics.jsonl"
        assert file.read_text() == "of before\n"
        (found.written / "tensorboard").mkdir()
        (found.written / "tensorboard" / "events").write_bytes(b"curve")
        with file.open("a") as appended:
            appended.write("first\n")
            appended.flush()
            until(lambda: read(folder / "metrics.jsonl") == b"of before\nfirst\n", 20, "the first report")
            store.link.cut()
            appended.write("second\n")
            appended.flush()
            until(lambda: told, 20, "a line about it")
            time.sleep(1)
            store.link.mend()
            until(lambda: len(told) > 1, 20, "a line about its end")
            appended.write("last\n")
        scratch = found.written
    assert [text.partition(":")[0] for text in told] == ["note", "s3"]
    assert "reports cannot be put into the run folder, and that is tried on: s3://" in told[0]
    assert told[1] == f"{folder}: reports are put there again"
    assert (folder / "metrics.jsonl").read_bytes() == b"of before\nfirst\nsecond\nlast\n"
    assert (folder / "tensorboard" / "events").read_bytes() == b"curve"
    assert not scratch.exists()


def test_reports_that_cannot_be_put_at_the_end_stay_here_and_are_told(store, monkeypatch):
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "0.2")
    told = []
    monkeypatch.setattr(reports.logger, "warning", lambda text, *rest: told.append(text % rest))
    folder = place(f"{store.address}/runs/d")
    with process_group() as world, reports.reports(folder, world) as found:
        (found.written / "train.log").write_text("a line\n")
        store.link.cut()
    assert told[1] == f"note: {folder} lacks the last reports of this run; they are in {found.written} on this machine."
    assert (found.written / "train.log").read_text() == "a line\n"
