"""A run of several ranks that fails says why in one line: the first cause, with rank, step and exception."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from apps.cli import run
from tests.datasets import write_dataset
from tests.processes import ROOT, Command, environment
from tests.training.launch import free_port

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [8], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 32, epochs: 100, patience: null, log_every_steps: 1}}
"""
# A rank that fails at its fourth step.
SCRIPT = """
import os, signal
from mmlrec.training.reporting import Reporter
plain = Reporter.advance
def advance(self):
    plain(self)
    advance.steps += 1
    if os.environ["RANK"] == "{rank}" and advance.steps == 4:
        {how}
advance.steps = 0
Reporter.advance = advance
from apps.cli import run
from apps.train import main
run(main)
"""
RAISES = 'raise ValueError("no such thing\\nand a second line")'
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
# Rank 1 takes its time to end.
LATE = """
import os, time
from mmlrec.distributed.heartbeat import Heartbeat
plain_stop = Heartbeat.stop
def stop(self):
    if os.environ["RANK"] == "1":
        time.sleep(0.9)
    plain_stop(self)
Heartbeat.stop = stop
"""
FULL = 'raise OSError(28, "No space left on device", "some/file")'


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cause")
    write_dataset(folder / "data", rows=200)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))
    return folder


def fail(
    root: Path, tmp_path: Path, count: int, rank: int, how: str, also: str = "", *overrides: str
) -> tuple[list[int], list[str]]:
    """Exit codes and standard errors of ranks without an agent, one of which fails."""
    (tmp_path / "train.py").write_text(also + SCRIPT.format(rank=rank, how=how))
    command = [
        sys.executable,
        str(tmp_path / "train.py"),
        "--config",
        str(root / "config.yaml"),
        "--run-dir",
        str(tmp_path / "run"),
        *overrides,
    ]
    variables = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        Command(command, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count), **variables))
        for rank in range(count)
    ]
    errors = [rank.communicate(120)[1] for rank in ranks]
    return [rank.wait() for rank in ranks], errors


def the_line(errors: list[str]) -> str:
    lines = [line for text in errors for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    return lines[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_is_the_first_cause(root, tmp_path, rank):
    codes, errors = fail(root, tmp_path, 2, rank, RAISES)
    assert codes == [1, 1]
    assert the_line(errors) == f"error: rank {rank} on {socket.gethostname()} failed at step 4: ValueError: no such thing"
    assert [text.count("Traceback (most recent call last)") for text in errors] == [int(rank == 0), int(rank == 1)]
    assert "and a second line" in errors[rank]


def test_rank_0_keeps_the_store_until_the_others_need_it_no_more(root, tmp_path):
    """The library would print some fifty lines of its own code for a rank that writes into a store that is gone."""
    codes, errors = fail(root, tmp_path, 2, 0, RAISES, LATE)
    assert codes == [1, 1]
    assert "failed at step 4: ValueError: no such thing" in the_line(errors)
    assert "TCPStore" not in "".join(errors)


@pytest.mark.long
def test_rank_0_keeps_the_store_until_the_others_know_who_tells_that_a_rank_hangs(root, tmp_path):
    hangs = "import time; time.sleep(12)"
    late = LATE.replace("stop", "lost").replace("    plain_lost(self)", "    return plain_lost(self)")
    codes, errors = fail(root, tmp_path, 3, 2, hangs, late, "training.timeout=2")
    assert codes[:2] == [1, 1]
    assert "did not come to the others within 2 s (training.timeout)" in the_line(errors[:2])


@pytest.mark.parametrize(
    ("rank", "words"),
    [(0, "rank 0 of this run ended without a message"), (2, "rank 2 of this run ended without a message")],
)
def test_a_rank_that_was_killed_is_named(root, tmp_path, rank, words):
    codes, errors = fail(root, tmp_path, 3, rank, KILLED)
    assert codes == [-signal.SIGKILL if other == rank else 1 for other in range(3)]
    assert words in the_line(errors)
    assert "killed, or out of memory" in the_line(errors)
    assert "Traceback" not in "".join(errors)


def test_a_full_disk_of_one_rank_is_told_once(root, tmp_path):
    codes, errors = fail(root, tmp_path, 2, 1, FULL)
    assert codes == [1, 2]
    assert the_line(errors) == "error: some/file: No space left on device. Free space, or choose another folder."


@pytest.mark.parametrize(
    ("how", "words"),
    [(RAISES, "failed at step 4: ValueError: no such thing"), (KILLED, "rank 1 of this run ended")],
)
@pytest.mark.long
def test_torchrun_shows_the_same_cause(root, tmp_path, how, words):
    (tmp_path / "train.py").write_text(SCRIPT.format(rank=1, how=how))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "train.py"), "--config", str(root / "config.yaml"), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    line = the_line([done.stderr])
    assert words in line
    summary = done.stderr.partition("Root Cause (first observed failure)")[2]
    if how == RAISES:
        # The rank's traceback is in torchrun's summary, and nowhere else.
        assert "ValueError: no such thing" in summary
        assert done.stderr.count("in advance") == 1
        assert "in advance" in summary
    else:
        assert f"Signal {signal.SIGKILL.value}" in summary
    assert os.listdir(tmp_path / "run")


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.ENOENT, 2), (errno.EIO, 1), (errno.ESTALE, 1)])
def test_a_disk_or_server_that_fails_is_no_mistake_of_the_user(number, code, capsys):
    def main() -> None:
        raise OSError(number, os.strerror(number), "some/file")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: some/file: {os.strerror(number)}. ")
    assert ("run the same command again" in line) == (code == 1)
