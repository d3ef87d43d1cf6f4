"""Run folders that are not what the run left: another configuration, damage, full disks. Nothing is lost in silence."""

import functools
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest

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
        assert error.count("error: ") == (code != 0)
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
        (half / "plan.json.0123456789ab.tmp").write_text("{")  # of a start that was killed
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


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_damaged_best_is_told_before_training(stopped, half, app, how):
    best = half / "checkpoints/best"
    file = spoil(best)
    if how == "missing":
        shutil.rmtree(best)
    before = names(half)
    code, error = app(*command(stopped, half))
    assert code == 2
    assert f"{half} holds a run that cannot be finished" in error
    assert (f"{file} does not match its checksum" if how == "flipped" else f"{best} has no COMPLETE.json") in error
    assert names(half) == before
    code, error = app(*command(stopped, half, "--restart"))
    assert code == 0, error
    assert_same_end(stopped, half)


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
