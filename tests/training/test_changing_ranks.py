"""One training that goes over 4, 2, 3, 1 and 4 ranks, under changing plans: every row once an epoch, losses as at one size.

It is stopped by SIGTERM and killed, each in the middle of an epoch and at its end.
"""

import json
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.datasets import write_dataset
from tests.training.launch import losses, start_ranks, tensors, validations

SCRIPT = str(Path(__file__).with_name("counted.py"))
BATCH, STEPS, EPOCHS = 50, 30, 3  # steps of an epoch
ROWS = (STEPS - 1) * BATCH + 29  # no batch of the last size can be shared out evenly
CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: star}}
model_defaults:
  expert_hidden_units: [12, 8]
  bottom_hidden_units: [12, 8]
  dnn_hidden_units: [12, 8]
  aux_hidden_units: [4]
  gate_hidden_units: [4]
  tower_hidden_units: [4]
embeddings: {{dim: 4, init_std: 0.1, optimizer: {{name: sgd, lr: 0.05}}}}
dense: {{optimizer: {{name: sgd, lr: 0.05}}}}
training: {{batch_size: {batch}, eval_batch_size: 64, epochs: {epochs}, patience: null, log_every_steps: 1,
  checkpoint_every_steps: 12}}
"""
#: Methods with normalisation over ranks, one without, chains of tasks; strategies with buffers, weights and windows.
CASES = {
    "star-gradnorm": ["model.name=star", "balancing.name=gradnorm"],
    "star-configured": ["model.name=star", "embeddings.optimizer.name=adagrad", "dense.optimizer.name=adam"],
    "mmoe-bn-uw": ["model.name=mmoe", "model.use_bn=true", "balancing.name=uw"],
    "esmm-dwa": ["dataset.setting=mtl", "model.name=esmm", "balancing.name=dwa", "balancing.window_steps=7"],
    "aitm-famo": ["dataset.setting=mtl", "model.name=aitm", "balancing.name=famo"],
    "snr-metabalance": ["dataset.setting=mtl", "model.name=snr", "balancing.name=metabalance"],
}
QUICK = "star-gradnorm"


class Part(NamedTuple):
    """A start of the training, and how it ends: at `step`, by a signal that its last rank gets.

    Attributes:
        plan: what the command line says of it.
        found: how the tables t0 and t1 are then sharded.
        resumed: the step at which it begins, so what the one before it has kept.
    """

    world_size: int
    plan: tuple[str, ...]
    found: tuple[str, str]
    resumed: int
    step: int = 0
    number: int = 0


ROW, TABLE = "row_wise", "table_wise"
ROW_WISE, TABLE_WISE = (f"embeddings.sharding={ROW}",), (f"embeddings.sharding={TABLE}",)
PARTS = (
    # Asked in the middle of an epoch; all ranks agree to stop before step 11.
    Part(4, ROW_WISE, (ROW, ROW), 0, 5, signal.SIGTERM),
    # Killed in the middle of an epoch, five steps after a checkpoint.
    Part(2, TABLE_WISE, (TABLE, TABLE), 10, 29, signal.SIGKILL),
    # Asked in the last step of an epoch: it stops in the validation, which the next one makes up for.
    Part(3, (*ROW_WISE, "embeddings.table_sharding={t1: table_wise}"), (ROW, TABLE), 24, 30, signal.SIGTERM),
    # Killed in the first step of an epoch: it had saved the end of the one before.
    Part(1, ROW_WISE, (ROW, ROW), 30, 61, signal.SIGKILL),
    Part(4, (*TABLE_WISE, "embeddings.table_sharding={t0: row_wise}"), (ROW, TABLE), 60),
)


def run_part(root: Path, run_dir: Path, part: Part, number: int, overrides: list[str]) -> None:
    """To its end; a rank that kills itself takes the others with it, as under torchrun."""
    logs = [root / f"{run_dir.name}-{number}-{rank}.log" for rank in range(part.world_size)]
    ends = [str(part.step), str(part.world_size - 1), str(int(part.number))]
    arguments = [sys.executable, SCRIPT, str(rows_file(run_dir, number)), *ends]
    arguments += ["--config", str(root / "config.yaml"), "--run-dir", str(run_dir), *overrides, *part.plan]
    ranks = start_ranks(arguments, logs)
    try:
        ranks[-1].wait(240)
        if part.number == signal.SIGKILL:
            for rank in ranks:
                rank.kill()
        codes = [rank.wait(240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    said = "\n".join(log.read_text()[-3000:] for log in logs)
    assert codes == [{signal.SIGTERM: 85, signal.SIGKILL: -9}.get(part.number, 0)] * part.world_size, said


def rows_file(run_dir: Path, number: int) -> Path:
    return run_dir.with_name(f"{run_dir.name}-rows-{number}")


def rows_of_part(run_dir: Path, part: Part, number: int) -> dict[int, list[int]]:
    """Step -> rows of its global batch, rank after rank."""
    steps: dict[int, list[int]] = {}
    for rank in range(part.world_size):
        file = rows_file(run_dir, number)
        for line in file.with_name(f"{file.name}-{rank}").read_text().splitlines():
            step, rows = json.loads(line)
            steps.setdefault(step, []).extend(rows)
    return steps


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    rows = {"train": ROWS, "valid": 260, "test": 260}
    write_dataset(
        folder / "data", rows=rows, table_rows=30, num_scenarios=3, missing_labels=0.2, funnel=True, rows_per_part=500
    )
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data", batch=BATCH, epochs=EPOCHS))
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [pytest.param(case, marks=[] if case == QUICK else [pytest.mark.long]) for case in CASES])
def test_a_training_over_4_2_3_1_and_4_ranks_equals_one_of_fixed_size(root, case):
    fixed, moved = root / f"{case}-fixed", root / f"{case}-moved"
    whole = Part(1, ROW_WISE, (ROW, ROW), 0)
    run_part(root, fixed, whole, 0, CASES[case])
    trained: dict[int, list[int]] = {}
    for number, part in enumerate(PARTS):
        run_part(root, moved, part, number, CASES[case])
        found = rows_of_part(moved, part, number)
        assert min(found) == part.resumed + 1
        assert json.loads((moved / "environment.json").read_text())["world_size"] == part.world_size
        plan = {row["table"]: row["sharding"] for row in json.loads((moved / "plan.json").read_text())}
        assert (plan["t0"], plan["t1"]) == part.found
        if part.number == signal.SIGTERM:
            assert max(found) == PARTS[number + 1].resumed  # Of what was trained, nothing is lost.
        # What was trained after the newest checkpoint is not in the weights: the next part trains on it again.
        trained = {step: rows for step, rows in trained.items() if step <= part.resumed} | found

    assert sorted(trained) == list(range(1, STEPS * EPOCHS + 1))
    for epoch in range(EPOCHS):
        rows = [row for step in range(STEPS) for row in trained[epoch * STEPS + step + 1]]
        assert sorted(rows) == list(range(ROWS)), f"epoch {epoch}"
    assert trained == rows_of_part(fixed, whole, 0)  # Also in the same batches.

    expected, found = losses(fixed), losses(moved)
    assert list(found) == list(expected) == list(range(1, STEPS * EPOCHS + 1))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-6), f"step {step}"
    assert [line["step"] for line in validations(moved)] == [STEPS, 2 * STEPS, 3 * STEPS]

    one, many = (tensors(run / f"checkpoints/step_{STEPS * EPOCHS:09d}") for run in (fixed, moved))
    assert one.keys() == many.keys()
    assert any(".balancing." in key for key in one) or "balancing" not in " ".join(CASES[case])
    for key, value in one.items():
        assert (many[key] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=0.01), key
    one, many = (json.loads((run / "result.json").read_text()) for run in (fixed, moved))
    assert many["step"] == one["step"]
    for task, metrics in one["test"]["tasks"].items():
        for name in ("auc", "gauc", "logloss", "calibration"):
            assert many["test"]["tasks"][task][name] == pytest.approx(metrics[name], rel=1e-6), f"{task} {name}"
