"""Parts are hashed once each, in their order, shared out among the ranks of a machine, and not beyond the first damaged one."""

import threading

import pytest

from mmlrec.data import verification
from mmlrec.data.verification import Verification
from mmlrec.errors import DataError
from mmlrec.identity import check_part
from tests.datasets import write_dataset


@pytest.fixture
def checked(monkeypatch):
    """Paths of the parts that were hashed."""
    paths = []

    def noted(folder, part):
        paths.append(part.path)
        check_part(folder, part)

    monkeypatch.setattr(verification, "check_part", noted)
    return paths


@pytest.fixture
def written(tmp_path):
    return write_dataset(tmp_path / "data", rows=280)


def test_every_part_is_hashed_once_by_one_rank_of_the_machine(checked, written):
    splits = written.manifest.splits
    for rank in range(3):
        mine = Verification(rank, 3)
        for split in ("train", "valid", "train"):
            mine.add(written.folder, splits[split].parts)
        assert mine.finished(60)
        assert mine.failure is None
        mine.add(written.folder, splits["train"].parts)
        assert mine.finished(60)
    assert sorted(checked) == sorted(part.path for split in ("train", "valid") for part in splits[split].parts)


def test_a_damaged_part_ends_it(checked, written):
    parts = written.manifest.splits["train"].parts
    assert len(parts) == 4
    path = written.folder / parts[1].path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = Verification()
    found.add(written.folder, parts)
    assert found.finished(60)
    assert f"{path} is damaged: its checksum is " in str(found.failure)
    assert checked == [part.path for part in parts[:2]]


def test_whatever_goes_wrong_nobody_waits_for_ever(monkeypatch, written):
    def check_part(folder, part):
        raise MemoryError

    monkeypatch.setattr(verification, "check_part", check_part)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    found = Verification()
    found.add(written.folder, written.manifest.splits["train"].parts)
    assert found.finished(5)
    assert "part-00000.parquet: cannot be compared with its checksum: MemoryError()" in str(found.failure)


def test_a_part_that_is_gone_is_told(written):
    part = written.manifest.splits["train"].parts[0]
    (written.folder / part.path).unlink()
    with pytest.raises(DataError, match=r"part-00000\.parquet: the file cannot be read: .*No such file"):
        check_part(written.folder, part)


def test_waiting_ends_in_time_and_goes_on(monkeypatch, written):
    go = threading.Event()
    monkeypatch.setattr(verification, "check_part", lambda folder, part: go.wait(60))
    slow = Verification()
    assert slow.finished(0)
    slow.add(written.folder, written.manifest.splits["train"].parts)
    assert not slow.finished(0.01)
    go.set()
    assert slow.finished(60)
