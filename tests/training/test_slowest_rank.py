"""The rank that the others wait for is named, with the part of the step, though they wait for it in all parts."""

import json
import re
import sys
from pathlib import Path

import pytest

from mmlrec.distributed.step_parts import PARTS
from mmlrec.training.slowest import REPORTED, RankTimes
from tests.datasets import write_dataset
from tests.training.launch import start_ranks

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4, sharding: row_wise}}
training: {{batch_size: 12, max_steps: 80, patience: null, log_every_steps: 20, checkpoint_every_steps: 70}}
"""


def train(folder: Path, *arguments: str, world_size: int, script: str | None = None) -> list[str]:
    """Train in `folder`/run, in which config.yaml stands; standard error of each rank."""
    logs = [folder / f"{rank}.log" for rank in range(world_size)]
    begin = [str(Path(__file__).with_name(script))] if script else ["-m", "apps.train"]
    given = ["--config", str(folder / "config.yaml"), "--run-dir", str(folder / "run"), *arguments]
    ranks = start_ranks([sys.executable, *begin, *given], logs)
    try:
        codes = [rank.wait(240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    output = [log.read_text() for log in logs]
    assert codes == [0] * world_size, "\n".join(output)
    return output


@pytest.fixture(scope="module")
def slowed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    dataset = write_dataset(folder / "data", rows=1000, table_rows=30).folder
    (folder / "config.yaml").write_text(CONFIG.format(dataset=dataset))
    output = train(folder, world_size=3, script="slow_ranks.py")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return folder / "run", output, {line["step"]: line["seconds"] for line in lines if line["split"] == "train"}


@pytest.mark.parametrize(
    ("step", "part", "rank", "least"),
    # Two thirds of 20 steps of .05 s, the pipeline's two batches ahead left out; of a file that takes a second.
    [(20, "data wait", 1, 0.5), (40, "forward", 2, 0.6), (60, "backward with update", 0, 0.6), (80, "checkpoint", 2, 0.5)],
)
def test_a_slow_rank_is_named_with_its_part(slowed, step, part, rank, least):
    _, output, seconds = slowed
    found = seconds[step][part]
    assert found["rank"] == rank
    # What the others wait for it is in none of their parts: it is what this rank has beyond the mean of all three.
    assert found["max"] - found["mean"] >= least
    for other in set(REPORTED) - {part, "waiting"}:
        assert seconds[step][other]["max"] - seconds[step][other]["mean"] < least / 2, other
    assert seconds[step]["waiting"]["max"] >= least
    assert seconds[step]["waiting"]["rank"] != rank
    line = next(line for line in output[0].splitlines() if f"step {step}/80 | loss" in line)
    assert re.search(rf" \| slowest rank {rank}: {part} \d+%, others \d+%$", line), line


def test_other_ranks_say_nothing_and_log_their_own_times(slowed):
    run_dir, output, _ = slowed
    assert not any(" | loss " in text for text in output[1:])
    log = (run_dir / "logs/rank-00001.log").read_text()
    assert re.search(r" rank 1 of 3: process \d+ on \S+, cpu\n", log)
    lines = re.findall(r"step (\d+)/80 \| 20 steps, seconds: data wait ([\d.]+), forward .* waiting ([\d.]+)\n", log)
    waits = {int(step): float(wait) for step, wait, _ in lines}
    assert list(waits) == [20, 40, 60, 80]
    assert waits[20] >= 0.9 > 0.5 > waits[40]
    assert re.search(r" saved \S+/step_000000070\n", log)


def times(**seconds):
    """Equal times of all parts on four ranks, but for those that are given: part -> rank -> seconds."""
    rows = [[1.0] * len(PARTS) for _ in range(4)]
    for part, of_ranks in seconds.items():
        for rank, value in of_ranks.items():
            rows[rank][PARTS.index(part)] = value
    return RankTimes(rows)


def test_only_what_costs_the_others_a_tenth_is_told():
    assert times().slowest() is None
    # Of 10.25 s the others wait 1 s for rank 3.
    assert times(lookup={3: 2.0}).slowest() is None
    assert times(lookup={3: 2.2}).slowest() == "slowest rank 3: forward 50%, others 39%"
    # Waiting is no work, and of two slow parts the slower one is told.
    assert times(**{"waiting for other ranks": {0: 9.0}}).slowest() is None
    assert times(checkpoint={1: 4.0}, network={2: 6.0}).slowest().startswith("slowest rank 2: forward")
    assert RankTimes([[1.0] * len(PARTS)]).slowest() is None


def test_record_has_mean_maximum_and_its_rank():
    record = times(checkpoint={2: 3.0}).record()
    assert record["checkpoint"] == {"mean": 1.5, "max": 3.0, "rank": 2}
    assert record["forward"] == {"mean": 4.0, "max": 4.0, "rank": 0}
