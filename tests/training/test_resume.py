"""Interrupted and resumed = uninterrupted, to the bit; killed, truncated and stopped runs stay usable."""

import json
import os
import re
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

from mmlrec.layers.products import LEAST_ROWS
from mmlrec.run_folder import checkpoint, whole
from mmlrec.training import run as training_run
from tests.datasets import write_dataset
from tests.processes import Command, run
from tests.training.launch import launch, losses, rows_of_steps, start_ranks, tensors, validations

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, dropout: 0.2, use_bn: true, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
dense: {{clip_norm: 1.0}}
schedule: {{name: linear, warmup_steps: 5, total_steps: 100}}
training: {{batch_size: 50, epochs: 3, eval_batch_size: 10, log_every_steps: 1, checkpoint_every_steps: 7,
  keep_checkpoints: 20}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a dataset, a config, and an uninterrupted run of 42 steps at 1 and at 2 ranks."""
    folder = tmp_path_factory.mktemp("resume")
    write_dataset(folder / "data", rows=690, table_rows=30)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))
    for world_size in (1, 2):
        launch(world_size, [train(folder, folder / f"whole-{world_size}")], folder / f"logs-{world_size}")
    return folder


def train(root: Path, run_dir: Path, *overrides: str, name: str = "all") -> dict:
    return {
        "kind": "train",
        "name": name,
        "config": str(root / "config.yaml"),
        "overrides": list(overrides),
        "run_dir": str(run_dir),
    }


def command(root: Path, run_dir: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "apps.train", "--config", str(root / "config.yaml"), "--run-dir", str(run_dir), *extra]


def assert_same_end(root: Path, run_dir: Path, world_size: int = 1) -> None:
    """The run ended like the uninterrupted one: every tensor, every loss, every validation, the test result."""
    whole = root / f"whole-{world_size}"
    expected, found = tensors(whole / "checkpoints/step_000000042"), tensors(run_dir / "checkpoints/step_000000042")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not expected[key].equal(found[key])] == []
    assert tensors(whole / "checkpoints/best").keys() == tensors(run_dir / "checkpoints/best").keys()
    assert losses(run_dir) == losses(whole)
    assert validations(run_dir) == validations(whole)
    states = [checkpoint.read_state(path / "checkpoints/step_000000042") for path in (whole, run_dir)]
    assert states[0]["selection"] == states[1]["selection"]
    assert (run_dir / "result.json").read_text() == (whole / "result.json").read_text()


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_equals_uninterrupted_to_the_bit(root, world_size):
    # Step 9 is inside the first epoch, between two checkpoints; 30 is inside the third.
    run_dir = root / f"parts-{world_size}"
    actions = [train(root, run_dir, f"training.max_steps={steps}", name=str(steps)) for steps in (9, 30)]
    launch(world_size, [*actions, train(root, run_dir, name="rest")], root / f"logs-parts-{world_size}")
    state = json.loads((run_dir / "checkpoints/step_000000009/state.json").read_text())
    assert state["progress"] == {"step": 9, "epoch": 0, "rows": 450}
    rows = [step for name in ("9", "30", "rest") for step in rows_of_steps(run_dir, name, world_size)]
    assert rows == rows_of_steps(root / f"whole-{world_size}", "all", world_size)
    expected = tensors(root / f"whole-{world_size}/checkpoints/step_000000042")
    found = tensors(run_dir / "checkpoints/step_000000042")
    assert [key for key in expected if not expected[key].equal(found[key])] == []
    assert losses(run_dir) == losses(root / f"whole-{world_size}")


def test_products_of_enough_rows_for_onednn_resume_to_the_bit_and_are_those_of_one_process(root, tmp_path):
    # On machines without AVX-512 these are the products of all other tests.
    plain = ["training.batch_size=256", "model.use_bn=false", "model.dropout=0", "training.checkpoint_every_steps=2"]
    # Adagrad and Adam divide a gradient by its own size: where terms cancel, steps show the order of sums at any size.
    plain += [
        "dense.optimizer.name=sgd",
        "embeddings.optimizer.name=sgd",
        "dense.optimizer.lr=0.1",
        "embeddings.optimizer.lr=0.1",
    ]
    assert LEAST_ROWS <= 256 // 2
    ends = {}
    for world_size in (1, 2):
        whole, parts = tmp_path / f"whole-{world_size}", tmp_path / f"parts-{world_size}"
        actions = [
            train(root, run_dir, *plain, f"training.max_steps={steps}", name=f"{run_dir.name}-{steps}")
            for run_dir, steps in ((whole, 5), (parts, 2), (parts, 5))
        ]
        launch(world_size, actions, tmp_path / f"logs-{world_size}")
        ends[world_size], found = (tensors(run_dir / "checkpoints/step_000000005") for run_dir in (whole, parts))
        assert [key for key, value in ends[world_size].items() if not value.equal(found[key])] == []
        assert losses(parts) == losses(whole)
    for key, value in ends[1].items():
        torch.testing.assert_close(ends[2][key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def wait_for_step(run_dir: Path, step: int, process: Command) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
        if any(json.loads(line)["step"] >= step for line in lines):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"step {step} not reached")


def test_saved_in_the_background_by_steps_and_by_the_clock_is_the_same_to_the_bit(root):
    """At two ranks, with a resume. The clock says so at each point where ranks agree: every ten steps, and where they meet."""
    run_dir = root / "background"
    options = ["checkpoint_async=true", "checkpoint_every_steps=null", "checkpoint_every_minutes=1e-6", "keep_every_steps=13"]
    overrides = [f"training.{option}" for option in (*options, "keep_checkpoints=1")]
    first = train(root, run_dir, *overrides, "training.max_steps=28", name="first")
    launch(2, [first, train(root, run_dir, *overrides, name="rest")], root / "logs-background")
    assert_same_end(root, run_dir, 2)
    # 13, 26 and 39 by steps, 14, 28 and 42 at the ends of epochs, the others ten steps into a segment.
    log = (run_dir / "train.log").read_text()
    saved = [int(step) for step in re.findall(r"saved \S+/step_(\d+)", log)]
    assert saved == [10, 13, 14, 24, 26, 28, 38, 39, 42]
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["best", *(f"step_{step:09d}" for step in (13, 26, 39, 42))]


def test_killed_in_the_last_validation_the_best_is_whole_before_it_is_read(root, run_app, monkeypatch):
    """Nothing is left to train then, so nothing else waits for what is written in the background."""
    run_dir, plain = root / "last-validation", whole.put
    options = ["training.epochs=1", "training.checkpoint_async=true", "training.checkpoint_every_steps=null"]
    arguments = ["--config", str(root / "config.yaml"), "--run-dir", str(run_dir), *options]
    code, error = run_app("train", *arguments)
    assert code == 0, error
    result = (run_dir / "result.json").read_text()
    # As before the validation of step 14, which is in no file yet.
    (run_dir / "result.json").unlink()
    (run_dir / "checkpoints/step_000000014/amended.json").unlink()
    shutil.rmtree(run_dir / "checkpoints/best")

    def slowly(*arguments):
        time.sleep(0.5)
        plain(*arguments)

    monkeypatch.setattr(whole, "put", slowly)
    code, error = run_app("train", *arguments)
    assert code == 0, error
    assert (run_dir / "result.json").read_text() == result
    state = checkpoint.read_state(run_dir / "checkpoints/step_000000014")
    assert (state["finished"], state["validation_due"]) == (True, False)


@pytest.mark.parametrize(
    ("number", "code", "asynchronous"),
    [(signal.SIGINT, 130, "false"), (signal.SIGTERM, 85, "false"), (signal.SIGTERM, 85, "true")],
)
def test_signal_leaves_a_usable_run_folder(root, number, code, asynchronous):
    run_dir = root / f"signal-{number}-{asynchronous}"
    process = Command(command(root, run_dir, f"training.checkpoint_async={asynchronous}"))
    wait_for_step(run_dir, 3, process)
    process.send_signal(number)
    _, output = process.communicate(timeout=120)
    assert process.returncode == code
    (told,) = (line for line in output.splitlines() if "Run the same command again to continue" in line)
    assert told.startswith("stopped at step ")  # what was asked for is no error
    assert "error" not in output.lower().replace(str(root).lower(), "")
    assert "Traceback" not in output
    done = run(command(root, run_dir, "--resume"))
    assert done.returncode == 0, done.stderr
    assert_same_end(root, run_dir)


HANG_IN_SAVE = """
import sys, time
from pathlib import Path
from mmlrec.run_folder import whole
plain, saves, flag = whole.seal, [], Path(sys.argv[-1])
def seal(folder, files):
    if folder.name.startswith("step_"):
        saves.append(folder)
    if len(saves) == 3:
        {how}
        flag.touch()
        time.sleep(600)
    plain(folder, files)
whole.seal = seal
sys.argv = ["train", *sys.argv[1:-1]]
from apps.cli import run
from apps.train import main
run(main)
"""


@pytest.mark.parametrize("asynchronous", ["false", "true"], ids=["blocking", "background"])
@pytest.mark.parametrize(
    "how",
    ["pass", "plain(folder, files)"],
    ids=["before-the-marker", "after-the-marker"],
)
def test_kill_during_a_save_leaves_the_checkpoint_before(root, tmp_path, how, asynchronous):
    run_dir, flag = tmp_path / "run", tmp_path / "in-save"
    script = tmp_path / "hang.py"
    script.write_text(HANG_IN_SAVE.format(how=how))
    arguments = [sys.executable, str(script), *command(root, run_dir)[3:]]
    process = Command([*arguments, f"training.checkpoint_async={asynchronous}", str(flag)])
    deadline = time.monotonic() + 120
    while not flag.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    names = sorted(p.name for p in (run_dir / "checkpoints").glob("step_*"))
    assert names[:2] == ["step_000000007", "step_000000014"]
    assert [name.split(".")[::2] for name in names[2:]] == [["step_000000021", "tmp"]]
    done = run(command(root, run_dir))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert "step_000000014 at step 14" in done.stderr
    assert_same_end(root, run_dir)
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


def test_damaged_checkpoints_are_named_and_passed_over(root, tmp_path):
    run_dir = tmp_path / "run"
    launch(1, [train(root, run_dir, "training.max_steps=28")], tmp_path)
    newest, second = (run_dir / "checkpoints" / f"step_{step:09d}" for step in (28, 21))
    truncated = next(newest.glob("*.distcp"))
    os.truncate(truncated, truncated.stat().st_size - 1)
    flipped = next(second.glob("*.distcp"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    done = run(command(root, run_dir))
    assert done.returncode == 0, done.stderr
    assert f"{truncated} has" in done.stderr
    assert f"{flipped} does not match its checksum" in done.stderr
    assert "step_000000014 at step 14" in done.stderr
    assert_same_end(root, run_dir)


def test_nothing_is_trained_twice(root):
    # The run is complete: the same command ends at once, and prints the table again.
    before = (root / "whole-1/metrics.jsonl").stat().st_mtime_ns
    done = run(command(root, root / "whole-1"))
    assert done.returncode == 0, done.stderr
    assert "is complete" in done.stderr
    assert "click" in done.stdout
    assert (root / "whole-1/metrics.jsonl").stat().st_mtime_ns == before


def test_only_the_newest_checkpoints_are_kept(root, tmp_path):
    run_dir = tmp_path / "run"
    launch(1, [train(root, run_dir, "training.keep_checkpoints=2")], tmp_path)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["best", "step_000000035", "step_000000042"]
    assert all(checkpoint.damage(p) is None for p in (run_dir / "checkpoints").iterdir())


def test_kill_between_the_two_renames_of_best(root, tmp_path):
    run_dir = tmp_path / "run"
    launch(1, [train(root, run_dir, "training.max_steps=28")], tmp_path)
    best = run_dir / "checkpoints" / "best"
    best.rename(best.with_name("best.old"))
    launch(1, [train(root, run_dir)], tmp_path)
    assert_same_end(root, run_dir)


SLOW = str(Path(__file__).with_name("slow_evaluation.py"))
SLOW_RESULT = """
import runpy, sys, time
from pathlib import Path
from mmlrec.training import run

plain, flag = run.write_result, sys.argv.pop(1)

def write_result(*arguments, **options):
    Path(flag).touch()
    time.sleep(2)
    plain(*arguments, **options)

run.write_result = write_result
sys.argv[0] = "apps.train"
runpy.run_module("apps.train", run_name="__main__")
"""


def wait_for(flag: Path, process: Command) -> None:
    deadline = time.monotonic() + 120
    while not flag.exists():
        assert process.poll() is None, process.arguments
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("evaluation", "number", "step"),
    [
        pytest.param(("evaluating valid", 1), signal.SIGTERM, 14, marks=pytest.mark.long),
        (("evaluating valid", 1), signal.SIGKILL, 14),
        (("evaluating valid", 3), signal.SIGTERM, 42),
        pytest.param(("evaluating valid", 3), signal.SIGKILL, 42, marks=pytest.mark.long),
        pytest.param(("evaluating test", 1), signal.SIGINT, 42, marks=pytest.mark.long),
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_a_signal_in_an_evaluation_loses_no_step(root, tmp_path, evaluation, number, step):
    """18 batches of validation take nine seconds here. Ended in between, the run has saved its epoch, and validates again."""
    run_dir, flag = tmp_path / "run", tmp_path / "evaluating"
    title, count = evaluation
    process = Command([sys.executable, SLOW, "apps.train", title, str(count), str(flag), *command(root, run_dir)[3:]])
    wait_for(flag, process)
    process.send_signal(number)
    _, output = process.communicate(timeout=5)
    assert process.returncode == {signal.SIGTERM: 85, signal.SIGINT: 130, signal.SIGKILL: -9}[number], output
    assert "Traceback" not in output
    assert max(p.name for p in (run_dir / "checkpoints").glob("step_*")) == f"step_{step:09d}"
    assert not (run_dir / "result.json").exists()
    done = run(command(root, run_dir, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"at step {step} of" in done.stderr
    assert_same_end(root, run_dir)


def test_a_signal_behind_the_last_step_of_a_seed_ends_the_command_before_the_next(root, tmp_path, run_app, monkeypatch):
    """Its report was all but made: that run is done, and no other one begins."""
    plain = training_run.evaluate_split

    def asked_to_stop(*given):
        found = plain(*given)
        signal.raise_signal(signal.SIGTERM)
        return found

    seeds = (
        "seeds",
        "--config",
        root / "config.yaml",
        "--run-dir",
        tmp_path / "seeds",
        "--seeds",
        "0,1",
        "training.max_steps=2",
    )
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "evaluate_split", asked_to_stop)
        code, said = run_app(*seeds)
    assert code == 85
    assert "stopped when 1 of 2 seeds are trained" in said
    assert (tmp_path / "seeds/seed0/result.json").exists()
    assert not (tmp_path / "seeds/seed1").exists()
    assert run_app(*seeds)[0] == 0


def test_a_signal_while_the_result_is_written_ends_no_rank_before_that(root, tmp_path):
    """The run is all but done: its ranks wait for each other, and the scheduler is told that it is."""
    (tmp_path / "slow.py").write_text(SLOW_RESULT)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    arguments = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "flag"), *command(root, tmp_path / "run")[3:]]
    ranks = start_ranks([*arguments, "training.max_steps=2"], logs)
    try:
        wait_for(tmp_path / "flag", ranks[0])
        time.sleep(0.5)  # the other rank has nothing left to do
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        assert [rank.wait(20) for rank in ranks] == [0, 0], [log.read_text() for log in logs]
    finally:
        for rank in ranks:
            rank.kill()
    assert json.loads((tmp_path / "run/result.json").read_text())["test"]


@pytest.mark.long
def test_a_signal_of_one_rank_in_a_validation_stops_all(root, tmp_path):
    run_dir, flag = tmp_path / "run", tmp_path / "evaluating"
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    arguments = [sys.executable, SLOW, "apps.train", "evaluating valid", "1", str(flag), *command(root, run_dir)[3:]]
    ranks = start_ranks(arguments, logs)
    try:
        wait_for(flag, ranks[0])
        ranks[1].send_signal(signal.SIGTERM)
        assert [rank.wait(20) for rank in ranks] == [85, 85], [log.read_text() for log in logs]
    finally:
        for rank in ranks:
            rank.kill()
    launch(2, [train(root, run_dir)], tmp_path / "rest")
    assert_same_end(root, run_dir, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_evaluate_and_predict_stop_at_a_signal_and_leave_nothing(root, tmp_path, number):
    run_dir, output = root / "whole-1", tmp_path / "scores.parquet"
    before = (run_dir / "result.json").read_text()
    scored = ["--input", str(root / "data"), "--output", str(output)]
    for module, title, more in (("apps.evaluate", "evaluating test", []), ("apps.predict", "scoring test", scored)):
        flag = tmp_path / module
        process = Command([sys.executable, SLOW, module, title, "1", str(flag), "--run-dir", str(run_dir), *more])
        wait_for(flag, process)
        process.send_signal(number)
        _, error = process.communicate(timeout=5)
        assert process.returncode == {signal.SIGTERM: 85, signal.SIGINT: 130}[number], error
        assert [line for line in error.splitlines() if title in line and "stopped" in line] == [
            f"{title}: stopped by a signal before the end; nothing of it is written. Run the same command again."
        ]
    assert (run_dir / "result.json").read_text() == before
    assert not list(tmp_path.glob("scores*"))


def as_written_before(path: Path) -> None:
    """Make of a checkpoint what earlier versions wrote: after the validation, with its outcome in the state."""
    state = checkpoint.read_state(path)
    for key in ("validation_due", "first_losses", "went_back_to"):
        del state[key]
    (path / checkpoint.AMENDED).unlink()
    text = json.dumps(state, indent=1).encode()
    (path / checkpoint.STATE).write_bytes(text)
    marker = json.loads((path / checkpoint.MARKER).read_text())
    marker["files"][checkpoint.STATE] = {"bytes": len(text), "crc32": zlib.crc32(text)}
    (path / checkpoint.MARKER).write_text(json.dumps(marker))


def test_checkpoints_of_earlier_versions_are_resumed(root, tmp_path):
    run_dir = tmp_path / "run"
    launch(1, [train(root, run_dir, "training.max_steps=28")], tmp_path)
    as_written_before(run_dir / "checkpoints/step_000000028")
    done = run(command(root, run_dir))
    assert done.returncode == 0, done.stderr
    assert "step_000000028 at step 28" in done.stderr
    assert_same_end(root, run_dir)


def test_a_run_from_before_biases_started_at_label_rates_goes_on_as_it_was(root, tmp_path):
    """Its weights are the checkpoint's, whatever networks start at now; its configuration has no such key."""
    jobs = [
        train(root, tmp_path / name, f"training.max_steps={steps}", "dense.start_at_label_rates=false", name=name)
        for name, steps in (("whole", 14), ("old", 7))
    ]
    launch(1, jobs, tmp_path / "logs")
    config = tmp_path / "old/config.yaml"
    before = config.read_text()
    config.write_text(before.replace("  start_at_label_rates: false\n", ""))
    assert config.read_text() != before
    done = run(command(root, tmp_path / "old", "training.max_steps=14"))
    assert done.returncode == 0, done.stderr
    expected, found = (tensors(tmp_path / name / "checkpoints/step_000000014") for name in ("whole", "old"))
    assert [key for key in expected if not expected[key].equal(found[key])] == []
    with_rates = tensors(root / "whole-1/checkpoints/step_000000014")
    assert any(not expected[key].equal(with_rates[key]) for key in expected if key in with_rates)


def test_a_checkpoint_is_saved_before_its_validation(root):
    """Its state holds the choice as it was before; what the validation found stands beside it."""
    folder = root / "whole-1/checkpoints"
    plain = {step: json.loads((folder / f"step_{step:09d}" / checkpoint.STATE).read_text()) for step in (7, 14, 28)}
    found = {step: checkpoint.read_state(folder / f"step_{step:09d}") for step in (7, 14, 28)}
    assert [plain[step]["validation_due"] for step in plain] == [False, True, True]
    assert plain[14]["selection"]["best"] == {}
    assert plain[28]["selection"] == found[14]["selection"]
    assert [found[step]["validation_due"] for step in found] == [False, False, False]
    assert found[14]["selection"]["best_step"] == {"all": 14}
