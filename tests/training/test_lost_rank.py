"""A rank that hangs ends the run within `training.timeout`, named by one that does not; all groups have that timeout."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed import comm

from mmlrec.distributed.world import _joining, process_group
from mmlrec.errors import RankError
from tests.datasets import write_dataset
from tests.processes import ROOT, environment
from tests.training.launch import start_ranks

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4, sharding: row_wise}}
training: {{batch_size: 50, epochs: 100000, patience: null, log_every_steps: 1, timeout: {timeout}}}
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("lost") / "data", rows=690, table_rows=30).folder


def arguments(dataset: Path, folder: Path, timeout: int) -> list[str]:
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(dataset=dataset, timeout=timeout))
    return [sys.executable, "-m", "apps.train", "--config", str(config), "--run-dir", str(folder / "run")]


def newest_step(folder: Path) -> int:
    file = folder / "run/metrics.jsonl"
    lines = [line for line in file.read_text().split("\n")[:-1] if line] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while newest_step(folder) < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)  # A beat tells it, each second.


def assert_named(output: str, rank: int, speaker: int, timeout: int, step: int) -> None:
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    found = re.fullmatch(
        rf"error: rank {rank} \(process \d+ on \S+\) has not answered for {timeout} s \(training.timeout\), last heard of"
        rf" at step (\d+), .+; rank {speaker} waited for it at step (\d+), .+\. It is stopped, hangs, .* run the same command"
        r" again to continue from the newest checkpoint\.",
        errors[0],
    )
    assert found, errors
    # Ranks take their steps together; a beat is up to a second old.
    assert 0 < int(found[1]) <= step + 1
    assert step - 1 <= int(found[2]) <= step + 1


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_stopped_rank_is_named_and_ends_the_run(dataset, tmp_path, stopped):
    """Rank 0 hosts the store here: where it is the one that is stopped, nobody can be asked, and the other one tells."""
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = start_ranks(arguments(dataset, tmp_path, 3), logs)
    try:
        wait_for_step(tmp_path, 5)
        ranks[stopped].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert ranks[1 - stopped].wait(60) == 1, logs[1 - stopped].read_text()
        assert time.monotonic() - start < 3 + 25
        output = logs[1 - stopped].read_text()
        assert "Traceback" not in output
        if stopped == 1:
            assert_named(output, 1, 0, 3, newest_step(tmp_path))
        else:
            errors = [line for line in output.splitlines() if line.startswith("error:")]
            assert len(errors) == 1, output
            assert re.match(r"error: rank 0, .* has not answered for 3 s .*; rank 1 waited for it at step \d+, ", errors[0])
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.long
def test_a_rank_whose_main_thread_hangs_is_named(dataset, tmp_path):
    """It beats on. The others' collective runs out of time, and the beats tell who is behind: at its 21st batch."""
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    given = arguments(dataset, tmp_path, 3)[3:]
    script = str(Path(__file__).with_name("hanging_reader.py"))
    ranks = start_ranks([sys.executable, script, *given, "training.batch_size=10"], logs)
    try:
        assert ranks[0].wait(120) == 1, logs[0].read_text()
    finally:
        for rank in ranks:
            rank.kill()
    output = logs[0].read_text()
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    found = re.match(
        r"error: rank 1 \(process \d+ on \S+\) did not come to the others within 3 s \(training.timeout\): at step (\d+),"
        r" reading a batch; rank 0 waited at step (\d+), ",
        errors[0],
    )
    assert found, errors
    # The pipeline takes batches two ahead.
    assert [int(step) for step in found.groups()] == [18, 18] == [newest_step(tmp_path)] * 2


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_rank_that_is_stopped_for_good_under_torchrun(dataset, tmp_path):
    """Over within a minute and the timeout, torchrun's own half minute between SIGTERM and SIGKILL included."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    log = tmp_path / "log"
    with log.open("w") as output:
        job = subprocess.Popen(
            [*command, *arguments(dataset, tmp_path, 30)[2:]], env=environment(), cwd=ROOT, stdout=output, stderr=output
        )
    try:
        wait_for_step(tmp_path, 5)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        ranks = {int(re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{c}/environ").read_bytes())[1]): int(c) for c in children}
        os.kill(ranks[1], signal.SIGSTOP)
        start = time.monotonic()
        assert job.wait(200) == 1
        seconds = time.monotonic() - start
    finally:
        job.kill()
    assert seconds < 90, log.read_text()
    assert_named(log.read_text(), 1, 0, 30, newest_step(tmp_path))


@pytest.mark.parametrize("why", ["timed out after 3000ms while trying to connect", "failed to connect to any network address"])
def test_a_rank_0_that_is_not_reached_is_told_in_words(why):
    """By rank 0, which waits as well; a host without a route to it is told at once that there is none."""
    with (
        pytest.raises(RankError, match=r"not all of 2 ranks have joined within 3 s \(training.timeout\)") as error,
        _joining(1, 2, 3),
    ):
        raise dist.DistNetworkError(f"The client socket has {why} of (h1, 40041).")
    assert error.value.told is True


def test_every_group_has_the_timeout(monkeypatch):
    """Those that others make without one, too; afterwards, the library's own."""
    for name, value in {"RANK": None, "WORLD_SIZE": None, "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(comm, "_INTRA_PG", None)
    monkeypatch.setattr(comm, "_CROSS_PG", None)
    usual = dist.distributed_c10d.default_pg_timeout

    def timeout(group) -> timedelta:
        return group._get_backend(torch.device("cpu")).options._timeout

    with process_group(7) as world:
        groups = [dist.group.WORLD, world.control, dist.new_group(), *comm.intra_and_cross_node_pg(torch.device("cpu"))]
        assert [timeout(group) for group in groups] == [timedelta(seconds=7)] * 5
    assert dist.distributed_c10d.default_pg_timeout == usual
