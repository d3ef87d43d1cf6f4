"""Temporary folders that go with their process, also where it was killed."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmlrec.storage.scratch import ScratchFolder

ROOT = Path(__file__).parents[1]
HOLD = """
import time
from mmlrec.storage.scratch import ScratchFolder
scratch = ScratchFolder("reports")
(scratch.path / "log").write_text("of a run")
print(scratch.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The machine's folder for temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_what_killed_processes_leave_goes_with_the_next_start_and_nothing_else(there):
    others = [
        there / "mmlrec-reports-other",
        there / f"mmlrec-dataset-{os.geteuid()}-x",
        there / f"mmlrec-reports-{os.geteuid()}1-x",
    ]
    for other in others:
        other.mkdir()
    link = there / f"mmlrec-reports-{os.geteuid()}-link"
    link.symlink_to(others[0])
    processes = [subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        living, killed = (Path(process.stdout.readline().strip()) for process in processes)
        assert {path.parent for path in (living, killed)} == {there}
        with ScratchFolder("reports") as scratch:
            assert living.is_dir()
            assert killed.is_dir()
            assert scratch.path.stat().st_mode & 0o777 == 0o700
        assert not scratch.path.exists()
        processes[1].kill()
        processes[1].wait(60)
        assert (killed / "log").is_file()
        with ScratchFolder("reports") as scratch:
            assert sorted(there.iterdir()) == sorted([*others, link, living, scratch.path])
        assert (living / "log").read_text() == "of a run"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_what_is_kept_for_the_user_stays(there):
    with ScratchFolder("reports") as other:
        scratch = ScratchFolder("reports")
        (scratch.path / "log").write_text("the last lines")
        scratch.keep()
        ScratchFolder("reports").delete()
        assert sorted(there.iterdir()) == sorted([other.path, scratch.path])
        assert (scratch.path / "log").read_text() == "the last lines"


def test_a_folder_that_somebody_has_deleted_ends_nothing(there):
    for end in (ScratchFolder.keep, ScratchFolder.delete):
        scratch = ScratchFolder("reports")
        scratch.path.rmdir()
        end(scratch)
    assert not list(there.iterdir())


def test_without_locks_nothing_is_taken_for_left_behind(there, monkeypatch):
    def refused(descriptor: int, operation: int) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    with ScratchFolder("reports") as one, ScratchFolder("reports") as other:
        assert sorted(there.iterdir()) == sorted([one.path, other.path])
    assert not list(there.iterdir())
