"""What a terminal sees of advice and of other libraries' warnings, and what the log of each rank holds."""

import contextlib
import os
import socket
import sys
import warnings

import pytest
import torch
from torch.distributed import distributed_c10d

from mmlrec.distributed import world as world_module
from mmlrec.distributed.world import World, configure_logging, log_file, logger, process_group
from mmlrec.errors import UserError
from tests.processes import run


def test_what_torchrec_is_to_change_is_not_told_to_users(capfd):
    """Of torchrec 1.6, which still calls it."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with process_group():
            distributed_c10d._get_pg_default_device()
    assert "will be deprecated" not in capfd.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_advice_is_one_line_of_rank_0_and_other_warnings_stay(rank, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import warnings; from mmlrec.errors import UserAdvice; from mmlrec.distributed.world import configure_logging\n"
        f"configure_logging({rank})\n"
        "warnings.warn('fewer experts would do', UserAdvice)\n"
        "warnings.warn('a library speaks')\n"
    )
    result = run([sys.executable, str(script)])
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    advice = [line for line in lines if "fewer experts would do" in line]
    assert [line.split(" ", 1)[1] for line in advice] == ["note: fewer experts would do"][: 1 - rank]
    assert any("UserWarning: a library speaks" in line for line in lines)


class Files:
    """`log_file` of a rank, with lines logged into it."""

    def __init__(self, path, rank):
        configure_logging(rank)
        self.path = path
        self.world = World(rank, 4, 4, torch.device("cpu"), None)

    def write(self, *lines, error=None):
        with contextlib.suppress(ValueError, UserError), log_file(self.path, self.world):
            for line in lines:
                logger.debug(line)
            if error:
                raise error

    def text(self):
        return self.path.read_text()


@pytest.fixture
def files(tmp_path):
    shown = warnings.showwarning
    yield lambda rank: Files(tmp_path / "logs" / f"rank-{rank:05d}.log", rank)
    logger.handlers.clear()
    warnings.showwarning = shown


def test_a_rank_logs_host_process_and_debug_lines_and_why_it_ended(files, capfd):
    log = files(3)
    log.write("a detail \x1b[2J", error=ValueError("boom"))
    lines = log.text().splitlines()
    assert lines[0].endswith(f" rank 3 of 4: process {os.getpid()} on {socket.gethostname()}, cpu")
    assert lines[1].endswith(" a detail \\x1b[2J")
    assert lines[2].endswith(" ended by ValueError: boom")
    assert lines[3] == "Traceback (most recent call last):"
    # The next start goes on in the same file. What the user can mend needs no traceback.
    log.write(error=UserError("no such file"))
    assert log.text().startswith("\n".join(lines))
    assert log.text().splitlines()[-1].endswith(" ended by UserError: no such file")
    assert capfd.readouterr().err == ""


def test_a_log_has_a_bounded_size(files, monkeypatch):
    monkeypatch.setattr(world_module, "_LOG_BYTES", 4000)
    log = files(1)
    log.write(*(f"line {number}" for number in range(1000)))
    both = [log.path.with_name(f"{log.path.name}.1"), log.path]
    assert sorted(log.path.parent.iterdir()) == sorted(both)
    assert all(path.stat().st_size <= 4000 for path in both)
    kept = [int(line.rpartition(" ")[2]) for path in both for line in path.read_text().splitlines()]
    assert len(kept) > 100
    assert kept == list(range(1000 - len(kept), 1000))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_log_that_cannot_be_written_ends_nothing(files, tmp_path, capfd, rank):
    log = files(rank)
    (tmp_path / "logs").mkdir()
    log.path.symlink_to("/dev/full")
    log.write("one", "two")
    assert capfd.readouterr().err.count(f"note: {log.path}: No space left on device; the run goes on without it.") == 1
    log.path.unlink()
    log.path.mkdir()
    with log_file(log.path, log.world):
        logger.debug("three")
    assert f"note: {log.path}: Is a directory; the run goes on without it." in capfd.readouterr().err
