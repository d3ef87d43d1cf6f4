"""The commands of docs/scaling.md work as they stand; a plan is what training does."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.training.launch import start_ranks

ROOT = Path(__file__).parents[2]


def arguments(line):
    """What a line of the page starts, as this Python's."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        return [sys.executable, *words[words.index("-m") :]]
    return [sys.executable, *words[1:]]


def run(line, folder):
    return processes.run(arguments(line), cwd=folder, env=processes.environment(PYTHONPATH=str(ROOT)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "plans").mkdir()
    return folder


@pytest.fixture(scope="module")
def scripts():
    return re.findall(r"```bash\n(.*?)```", (ROOT / "docs/scaling.md").read_text(encoding="utf-8"), re.DOTALL)


def test_plans_without_gpus(folder, scripts):
    told = []
    for line in scripts[0].splitlines():
        done = run(line, folder)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    plan = json.loads((folder / "plans/adagrad.json").read_text())
    assert (len(plan["tables"]), len(plan["ranks"]), plan["fits"]) == (26, 64, True)
    assert sum(rank["weight_bytes"] + rank["state_bytes"] for rank in plan["ranks"]) == sum(
        table["weight_bytes"] + table["state_bytes"] for table in plan["tables"]
    )
    assert plan["step_ms"] == pytest.approx(sum(plan["step"].values()))
    assert {table["sharding"] for table in plan["tables"]} == {"table_wise", "table_row_wise"}
    assert "is overloaded" in told[0]
    assert "too small to split over 64 ranks" in told[0]
    assert "embeddings.optimizer.name=rowwise_adagrad: 0.76 GiB of state in place of 97.36" in told[0]
    assert plan["recommendations"][0].startswith("embeddings.optimizer.name=rowwise_adagrad: ")
    assert "Recommended" not in told[1]
    (state,) = [line.split() for line in told[2].splitlines() if line.startswith("state")]
    assert state[-2:] == ["97.36", "0.76"]  # 204,184,588 rows: 128 numbers of 4 bytes each, or one


def test_training_takes_the_plan_by_name(folder, scripts):
    make, plan, train, compare = scripts[1].splitlines()
    for line in (make, plan):
        done = run(line, folder)
        assert done.returncode == 0, done.stderr
    said = json.loads((folder / "plans/two.json").read_text())
    # Another than training would choose: the first is split, the rest lies on rank 1.
    for number, table in enumerate(said["tables"]):
        table |= {"sharding": "table_wise", "ranks": [1]} if number else {"sharding": "row_wise", "ranks": [0, 1]}
    (folder / "plans/two.json").write_text(json.dumps(said))
    logs = [folder / f"rank-{rank}.log" for rank in (0, 1)]
    ranks = start_ranks([*arguments(train), "training.max_steps=2"], logs, cwd=folder)
    assert [rank.wait(300) for rank in ranks] == [0, 0], logs[0].read_text()
    done = json.loads((folder / "runs/planned/plan.json").read_text())
    placed = [(t["table"], t["sharding"], t["ranks"]) for t in done]
    assert placed == [(t["table"], t["sharding"], t["ranks"]) for t in said["tables"]]
    assert {t["sharding"] for t in done} == {"row_wise", "table_wise"}
    told = run(compare, folder)
    assert told.returncode == 0, told.stderr
    assert "Every table has the same size and lies on the same ranks in both." in told.stdout
    # One process measures it: the plan is of the training's ranks.
    done = run("python -m apps.evaluate --run-dir runs/planned", folder)
    assert done.returncode == 0, done.stderr
    # And trains on, by its own plan only.
    again = "python -m apps.train --config runs/planned/config.yaml --run-dir runs/planned training.max_steps=4"
    wrong = run(again, folder)
    assert wrong.returncode == 2
    assert "the training has 1 rank(s)" in wrong.stderr
    right = run(f"{again} embeddings.plan=null", folder)
    assert right.returncode == 0, right.stderr
