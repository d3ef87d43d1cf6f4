"""Run folders that are not what the run left: another configuration, damage, full disks. Nothing is lost in silence."""

import functools
import json
import os
import resource
import shutil
import signal
import sys
import threading
import zlib
from pathlib import Path

import pytest

from mmlrec.data import verification
from mmlrec.data.verification import Verification
from mmlrec.evaluation.evaluation import write_result
from mmlrec.run_folder import checkpoint
from mmlrec.run_folder.folder import RunFolder
from tests import processes
from tests.datasets import write_dataset
from tests.training.launch import losses, tensors

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, num_experts: 2, expert_hidden_units: [8], gate_hidden_units: [], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 32, epochs: 3, log_every_steps: 1, checkpoint_every_steps: 2, seed: 1}}
"""
# 100 rows: 4 steps an epoch. A run that is stopped at step 6 validates there, too; of this seed a later step is the best.
END = "step_000000012"


@pytest.fixture
def app(run_app):
    def call(*arguments: object) -> tuple[int, str]:
        code, error = run_app("train", *arguments)
        assert "Traceback" not in error
        assert error.count("error: ") == (code not in (0, 85))  # 85: it was asked to stop
        return code, error

    return call


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A dataset, a configuration, a run that was stopped after 6 of its 12 steps, and one that was not."""
    folder = tmp_path_factory.mktemp("damaged")
    write_dataset(folder / "data", rows=100)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))
    for name, more in (("half", ["training.max_steps=6"]), ("whole", [])):
        arguments = ["--config", str(folder / "config.yaml"), "--run-dir", str(folder / name), *more]
        done = processes.run([sys.executable, "-m", "apps.train", *arguments])
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of the stopped run."""
    shutil.copytree(stopped / "half", tmp_path / "run")
    return tmp_path / "run"


def command(root: Path, run_dir: Path, *more: str) -> list[str]:
    return ["--config", str(root / "config.yaml"), "--run-dir", str(run_dir), *more]


def spoil(checkpoint: Path) -> Path:
    """Flip a bit."""
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_same_end(root: Path, run_dir: Path) -> None:
    expected, found = tensors(root / "whole/checkpoints" / END), tensors(run_dir / "checkpoints" / END)
    assert [key for key in expected if not expected[key].equal(found[key])] == []
    assert losses(run_dir) == losses(root / "whole")
    assert (run_dir / "result.json").read_text() == (root / "whole/result.json").read_text()


@pytest.mark.parametrize("left", ["no checkpoint", "damaged checkpoints"])
def test_another_configuration_is_refused_before_there_is_a_checkpoint(stopped, half, app, left):
    for path in (half / "checkpoints").iterdir():
        if left == "no checkpoint":
            shutil.rmtree(path)
        else:
            spoil(path)
    before = names(half)
    code, error = app(*command(stopped, half, "dense.optimizer.lr=0.1"))
    assert code == 2
    assert "dense.optimizer.lr: 0.001 in the run folder, 0.1 now" in error
    assert names(half) == before
    if left == "no checkpoint":  # killed before the first one: the same command begins
        for name in ("config.yaml", "dataset.json", "plan.json"):
            (half / f"{name}.0123456789ab.tmp").write_text("{")  # of a start that was killed
        assert app(*command(stopped, half))[0] == 0
        assert_same_end(stopped, half)
        assert not list(half.glob("*.tmp"))


def test_all_checkpoints_damaged_are_named_and_kept_until_told(stopped, half, app):
    damaged = [spoil(path) for path in (half / "checkpoints").glob("step_*")]
    assert len(damaged) == 2
    before = names(half)
    for more in ((), ("--resume",)):
        code, error = app(*command(stopped, half, *more))
        assert code == 2
        assert f"{half} holds a run that cannot be resumed" in error
        assert all(f"{file} does not match its checksum" in error for file in damaged)
        assert "--restart" in error
        assert names(half) == before
    code, error = app(*command(stopped, half, "--restart"))
    assert code == 0, error
    assert "new run at step 0" in error
    assert_same_end(stopped, half)


def age(best: Path) -> None:
    """Make it one of an earlier step, as it is in a copy that was made while the run was alive."""
    text = json.dumps(json.loads((best / checkpoint.STATE).read_text()) | {"step": 1}).encode()
    (best / checkpoint.STATE).write_bytes(text)
    marker = json.loads((best / checkpoint.MARKER).read_text())
    marker["files"][checkpoint.STATE] = {"bytes": len(text), "crc32": zlib.crc32(text)}
    (best / checkpoint.MARKER).write_text(json.dumps(marker))
    assert checkpoint.damage(best) is None


@pytest.mark.parametrize("how", ["flipped", "missing", "older"])
def test_a_damaged_best_is_told_before_training(stopped, half, app, how):
    best = half / "checkpoints/best"
    file = next(best.glob("*.distcp"))
    if how == "missing":
        shutil.rmtree(best)
    else:
        {"flipped": spoil, "older": age}[how](best)
    before = names(half)
    code, error = app(*command(stopped, half))
    assert code == 2
    assert f"{half} holds a run that cannot be finished" in error
    words = {
        "flipped": f"{file} does not match its checksum",
        "missing": f"{best} has no COMPLETE.json",
        "older": f"{best} is of step 1, and not the one that the run has chosen, of step ",
    }
    assert words[how] in error
    assert names(half) == before
    assert "With apps.train --from-step 6 it goes on from there" in error
    kept = half.with_name("kept")
    shutil.copytree(half, kept)
    code, error = app(*command(stopped, half, "--restart"))
    assert code == 0, error
    assert_same_end(stopped, half)
    code, error = app(*command(stopped, kept, "--from-step", "6"))
    assert code == 0, error
    assert "resumed from" in error
    expected, found = tensors(stopped / "whole/checkpoints" / END), tensors(kept / "checkpoints" / END)
    assert [key for key in expected if not expected[key].equal(found[key])] == []


def test_what_was_evaluated_while_a_run_was_alive_is_not_its_result(stopped, tmp_path, app):
    """Then it took its last steps, and died before the evaluation of test."""
    run_dir = tmp_path / "run"
    shutil.copytree(stopped / "whole", run_dir)
    (run_dir / "result.json").write_text(json.dumps({"test": {"tasks": {}}, "step": 1}))
    code, error = app(*command(stopped, run_dir))
    assert code == 0, error
    assert "is complete" not in error
    assert_same_end(stopped, run_dir)


def test_reports_of_two_steps_do_not_stand_beside_each_other(tmp_path):
    folder, report = RunFolder(tmp_path), {"tasks": {}}
    write_result(folder, "test", report, step=4)
    write_result(folder, "valid", report, step=4)
    assert folder.read_result() == {"test": report, "valid": report, "step": 4}
    write_result(folder, "valid", report, step=8)
    assert folder.read_result() == {"valid": report, "step": 8}


def test_a_result_that_is_no_result_is_told(stopped, half, app):
    (half / "result.json").write_text("[1]")
    code, error = app(*command(stopped, half))
    assert code == 2
    assert f"{half / 'result.json'} is damaged" in error


def test_an_evaluation_that_cannot_be_kept_is_shown(half):
    (half / "result.json").unlink()
    (half / "result.json").mkdir()
    done = processes.run([sys.executable, "-m", "apps.evaluate", "--run-dir", str(half)])
    assert done.returncode == 2
    assert "logloss" in done.stdout
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize("waits", ["train", "valid"])
def test_a_signal_ends_the_waiting_for_checksums(stopped, tmp_path, app, monkeypatch, waits):
    """Of parts that are hashed more slowly than they are read; the state is saved first."""
    run_dir, go, hashed = tmp_path / "run", threading.Event(), []

    def check_part(folder, part):
        if part.path.startswith(waits):
            go.wait(5)
            hashed.append(part.path)

    def finished(self, seconds):
        if not plain(self, 0.2):
            signal.raise_signal(signal.SIGTERM)
        return plain(self, 0.1)

    plain = Verification.finished
    with monkeypatch.context() as patch:
        patch.setattr(verification, "check_part", check_part)
        patch.setattr(Verification, "finished", finished)
        code, error = app(*command(stopped, run_dir))
        assert code == 85, error
        assert hashed == []
        go.set()
    assert "holds the checkpoint" in error
    assert list((run_dir / "checkpoints").glob("step_*"))
    assert app(*command(stopped, run_dir))[0] == 0
    assert_same_end(stopped, run_dir)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_best_that_is_replaced_while_it_is_read_is_told(half, run_app, monkeypatch, when):
    """By its run, which is alive: what was read may be of both."""
    best, plain = half / "checkpoints/best", checkpoint.load
    state = checkpoint.read_state(best)

    def load(folder, tensors, world):
        if when == "after":
            plain(folder, tensors, world)
        checkpoint.save(best, tensors, state | {"step": 7}, world)
        if when == "before":
            shutil.rmtree(best)  # as a reader finds it between two renames
            (best / "lost").mkdir(parents=True)
            plain(folder, tensors, world)

    monkeypatch.setattr(checkpoint, "load", load)
    code, error = run_app("evaluate", "--run-dir", half)
    assert code == 2
    assert f"error: {best} was replaced by its run while it was read. Give the command again." in error


def test_a_run_that_can_go_on_is_not_restarted(stopped, half, app):
    before = names(half)
    code, error = app(*command(stopped, half, "--restart"))
    assert code == 2
    assert f"{half}/checkpoints/step_000000006 is whole" in error
    assert names(half) == before


BROKEN = {
    "half a line": b'{"step": 3, "epo',
    "zeros, as after a power cut": b"\0" * 40,
    "no report": b"17",
    "no step": b"{}",
    "step of another kind": b'{"step": "3"}',
    "other bytes": b"\xff\xfe{",
    "deep": b"[" * 5000,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_lines_of_metrics_are_named_and_dropped(stopped, half, app, kind):
    path = half / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[2:2] = [BROKEN[kind]]
    path.write_bytes(b"\n".join(lines) + b"\n" + BROKEN[kind])
    code, error = app(*command(stopped, half))
    assert code == 0, error
    assert f"{path}: lines 3, {len(lines) + 1} are no report" in error
    assert_same_end(stopped, half)


def test_metrics_and_tensorboard_on_a_full_disk_do_not_end_a_run(stopped, tmp_path, app):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("config.yaml", "environment.json"):  # a run that has no checkpoint yet
        shutil.copy(stopped / "whole" / name, run_dir)
    # All writes to this device fail as on a full disk.
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    (run_dir / "train.log").symlink_to("/dev/full")
    code, error = app(*command(stopped, run_dir))
    assert code == 0, error
    for name in ("metrics.jsonl", "train.log"):
        assert error.count(f"{run_dir / name}: No space left on device; the run goes on without it") == 1
    assert error.count(f"{run_dir / 'metrics.jsonl'} lacks reports of this run: No space left on device") == 1
    expected, found = tensors(stopped / "whole/checkpoints" / END), tensors(run_dir / "checkpoints" / END)
    assert [key for key in expected if not expected[key].equal(found[key])] == []


@pytest.mark.long
def test_a_limit_that_only_reports_reach_does_not_end_a_run(stopped, tmp_path):
    """No file may grow beyond what the checkpoints take: reports of many steps do, TensorBoard's in a thread of its own."""
    sizes = [path.stat().st_size for path in (stopped / "whole/checkpoints").rglob("*") if path.is_file()]
    limit = max(sizes) + 4096
    run_dir = tmp_path / "run"
    # Enough for the files, but not for the log on standard error, which goes to a file as well.
    arguments = command(
        stopped, run_dir, "training.epochs=130", "training.patience=null", "training.checkpoint_every_steps=200"
    )
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    done = processes.run([sys.executable, "-m", "apps.train", *arguments], prepare=limited)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for name in ("metrics.jsonl", "tensorboard", "train.log"):
        assert done.stderr.count(f"{run_dir / name}: File too large; the run goes on without it") == 1
    for name in ("metrics.jsonl", "tensorboard"):
        assert done.stderr.count(f"{run_dir / name} lacks reports of this run: File too large") == 1
    assert os.path.getsize(run_dir / "metrics.jsonl") <= limit
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]  # whole lines only
    assert steps == sorted(steps)
    assert (run_dir / "result.json").exists()
