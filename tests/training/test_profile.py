"""`--profile START:END`: traces that a viewer reads, with the step's parts, and a table of them."""

import gzip
import json
import re

import pytest

from mmlrec.distributed.step_parts import PARTS
from mmlrec.training.profiling import parts_table
from tests.datasets import write_dataset
from tests.training.test_slowest_rank import train

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4, sharding: row_wise}}
training: {{batch_size: 12, max_steps: 30, patience: null, log_every_steps: 3}}
"""
#: Of a step on two ranks.
OF_STEPS = {*PARTS} - {"checkpoint", "other"}


def table(text: str) -> dict[str, tuple[float, float, int]]:
    """Part -> mean, maximum and its rank."""
    rows = re.findall(r"^ *([a-z ]+?)  +([\d.]+)  +([\d.]+)  +(\d+)$", text, re.MULTILINE)
    return {part: (float(mean), float(most), int(rank)) for part, mean, most, rank in rows}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Two ranks, steps 11 to 16: the run folder, standard error, and the events of each rank's trace."""
    folder = tmp_path_factory.mktemp("profile")
    dataset = write_dataset(folder / "data", rows=400, table_rows=30).folder
    (folder / "config.yaml").write_text(CONFIG.format(dataset=dataset))
    output = train(folder, "--profile", "11:16", world_size=2)
    traces = []
    for rank in range(2):
        with gzip.open(folder / f"run/profile/rank-{rank:05d}.json.gz", "rt") as file:
            traces.append(json.load(file))
    return folder / "run", output, traces


def marks(trace) -> list[dict]:
    return [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation" and event["ph"] == "X"]


def test_traces_hold_the_steps_with_their_parts_and_operations(profiled):
    run_dir, _, traces = profiled
    assert sorted(path.name for path in (run_dir / "profile").iterdir()) == [
        "parts.txt",
        "rank-00000.json.gz",
        "rank-00001.json.gz",
    ]
    for rank, trace in enumerate(traces):
        assert trace["distributedInfo"]["rank"] == rank
        steps = [event for event in marks(trace) if event["name"].startswith("step ")]
        assert [event["name"] for event in steps] == [f"step {number}" for number in range(11, 17)]
        for step in steps:
            within = {
                e["name"] for e in marks(trace) if step["ts"] <= e["ts"] and e["ts"] + e["dur"] <= step["ts"] + step["dur"]
            }
            assert within >= OF_STEPS
        assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])


def test_the_table_is_what_the_trace_says(profiled):
    """Own times, from the nesting of the marks in the trace, which the profiler measures with a clock of its own."""
    run_dir, output, traces = profiled
    text = (run_dir / "profile/parts.txt").read_text()
    assert text.startswith("steps 11 to 16\n")
    assert text.split("\n", 1)[1].strip() in output[0]
    rows = table(text)
    assert rows.keys() == OF_STEPS | {"other", "step"}
    own: list[dict[str, float]] = []
    for trace in traces:
        ours = sorted(
            (e for e in marks(trace) if e["name"] in OF_STEPS or e["name"].startswith("step ")), key=lambda e: e["ts"]
        )
        spent = dict.fromkeys(OF_STEPS | {"other"}, 0.0)
        for event in ours:
            end = event["ts"] + event["dur"]
            inside = [e for e in ours if e is not event and event["ts"] <= e["ts"] and e["ts"] + e["dur"] <= end]
            outermost = [e for e in inside if not any(o is not e and o["ts"] <= e["ts"] < o["ts"] + o["dur"] for o in inside)]
            name = "other" if event["name"].startswith("step ") else event["name"]
            spent[name] += (event["dur"] - sum(e["dur"] for e in outermost)) / 6000
        own.append(spent)
    step = sum(sum(spent.values()) for spent in own) / 2
    assert rows["step"][0] == pytest.approx(step, rel=0.05)
    assert sum(mean for part, (mean, _, _) in rows.items() if part != "step") == pytest.approx(rows["step"][0], rel=0.01)
    for part in OF_STEPS | {"other"}:
        assert rows[part][0] == pytest.approx((own[0][part] + own[1][part]) / 2, abs=0.03 * step), part
    # Most of a step has a name.
    assert rows["other"][0] < 0.3 * rows["step"][0]


def test_table_of_known_times():
    rows = table(parts_table([[1.0] * len(PARTS), [3.0, *[0.0] * (len(PARTS) - 1)]]))
    assert rows["data wait"] == (2.0, 3.0, 1)
    assert rows["waiting for other ranks"] == (0.5, 1.0, 0)
    assert rows["step"] == (6.5, 10.0, 0)
    assert "waiting for other ranks" not in table(parts_table([[1.0] * len(PARTS)]))
    assert "checkpoint" not in table(parts_table([[1.0, *[0.0] * (len(PARTS) - 1)]]))


@pytest.fixture
def start(tmp_path, run_app):
    dataset = write_dataset(tmp_path / "data", rows=400, table_rows=30).folder
    config = CONFIG.format(dataset=dataset)
    (tmp_path / "config.yaml").write_text(config)
    return lambda *given: run_app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run", *given)


@pytest.mark.parametrize("steps", ["", "5", "5:", "9:5", "0:3", "a:b", "5:9:2", "-1:3", "1:5000", "1.5:3"])
def test_what_is_no_range_of_steps_is_refused(start, tmp_path, steps):
    code, error = start(f"--profile={steps}")
    assert code == 2
    assert f"error: argument --profile: '{steps}' is not START:END" in error
    assert not (tmp_path / "run").exists()


def test_steps_behind_the_end_are_refused_and_those_behind_the_run_are_told(start, tmp_path):
    code, error = start("--profile", "31:40")
    assert (code, error.splitlines()[-1]) == (2, "error: --profile 31:40: the run ends at step 30 at the latest.")
    # Up to the end of the segment: a validation comes.
    code, error = start("--profile", "19:25", "training.validate_every_steps=20")
    assert code == 0, error
    assert "profile of steps 19 to 20 (not 25: a validation or checkpoint came)" in error
    code, error = start("--profile", "19:25", "training.validate_every_steps=20", "training.max_steps=32")
    assert code == 0, error
    assert "--profile 19:25: these steps are behind this run" in error


def test_a_profile_that_cannot_be_written_ends_no_run(start, tmp_path):
    assert start("training.max_steps=1")[0] == 0
    (tmp_path / "run/profile").write_text("in the way")
    code, error = start("--profile", "4:5")
    assert code == 0, error
    assert re.search(r"note: \S+/run/profile: .*; the run goes on without it\.", error)
