"""Single-Task under training: independent branches, each with its own best checkpoint."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.evaluation.prediction import write_predictions
from mmlrec.run_folder.folder import RunFolder
from mmlrec.session.session import load_session
from mmlrec.training.run import train
from tests.datasets import write_dataset
from tests.training.launch import tensors

CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: single_task, expert_hidden_units: [6, 4], tower_hidden_units: [3], use_bn: true}}
embeddings: {{dim: 4, init_std: 0.3, optimizer: {{name: adagrad, lr: 0.3}}}}
dense: {{optimizer: {{name: adam, lr: 0.02}}}}
training:
  {{batch_size: 40, max_steps: 24, validate_every_steps: 3, checkpoint_every_steps: 3, keep_checkpoints: 50, patience: 2}}
"""
BRANCHES = ["click:s0", "click:s1", "buy:s0", "buy:s1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    write_dataset(folder / "data", rows=400, table_rows=25, num_scenarios=2)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))

    def call(name: str, *overrides: str):
        with process_group() as world:
            train(load_config(folder / "config.yaml", list(overrides)), folder / name, world)
        return folder / name

    return call


def own(content: dict, branch: str, index: int, count: int) -> dict:
    """A branch's tables, and its block of every stacked tensor."""
    found = {
        key.replace(f"{branch}/", ""): value
        for key, value in content.items()
        if key.startswith("model.") and f".{branch}/" in key
    }
    for key, value in content.items():
        if key.startswith("model.head.network.") and value.dim() > 0:
            size = value.shape[0] // count
            found[key] = value[index * size : (index + 1) * size]
    return found


def test_best_holds_each_branch_at_its_own_best_step(run):
    folder = run("joint")
    selection = json.loads((folder / "checkpoints/best/state.json").read_text())["selection"]
    assert list(selection["best_step"]) == BRANCHES
    assert len(set(selection["best_step"].values())) > 1, "the case shows nothing when all branches peak together"
    best = tensors(folder / "checkpoints/best")
    for index, branch in enumerate(BRANCHES):
        step = tensors(folder / f"checkpoints/step_{selection['best_step'][branch]:09d}")
        expected = own(step, branch, index, len(BRANCHES))
        found = own(best, branch, index, len(BRANCHES))
        assert len(expected) > 8
        assert [key for key in expected if not found[key].equal(expected[key])] == []


def test_a_branch_alone_trains_as_in_the_joint_run(run):
    # Without normalisation: a bias in front of it has no gradient but rounding, which Adam would blow up to full steps.
    short = ["training.max_steps=6", "model.use_bn=false"]
    joint = tensors(run("joint-short", *short) / "checkpoints/step_000000006")
    alone = tensors(run("alone-short", "model.branches=[2]", *short) / "checkpoints/step_000000006")
    expected, found = own(joint, BRANCHES[2], 2, 4), own(alone, BRANCHES[2], 0, 1)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_only_trained_branches_are_scored(run):
    folder = run("alone-scored", "model.branches=[2]", "training.max_steps=6")
    with process_group() as world:
        session, *_ = load_session(RunFolder(folder), world, [])
        write_predictions(session, folder.parent / "data", "test", folder / "scores.parquet")
    scores = pq.read_table(folder / "scores.parquet")
    assert "score.click" not in scores.column_names
    scored = [value is not None for value in scores["score.buy"].to_pylist()]
    assert scored == [scenario == 0 for scenario in scores["sample.scenario"].to_pylist()]
    assert any(scored)


def test_a_branch_alone_is_reported_alone(run):
    report = json.loads((run("alone", "model.branches=[2]", "training.max_steps=6") / "result.json").read_text())["test"]
    rows = {(t, s): part["rows"] for t, task in report["tasks"].items() for s, part in task["scenarios"].items()}
    assert {key for key, count in rows.items() if count} == {("buy", "s0")}
