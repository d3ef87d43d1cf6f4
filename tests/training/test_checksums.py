"""Checksums of a checkpoint of several ranks: each takes its own while it writes, and of what is checked an equal share."""

import json
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlrec.distributed.world import process_group
from mmlrec.run_folder import checkpoint, whole
from tests.processes import spawn
from tests.training.launch import free_port
from tests.training.saving_ranks import ROWS, find, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    spawn(save, (str(free_port()), folder), 2)
    return folder


def test_marked_are_size_and_checksum_of_every_file(saved):
    path = checkpoint.step_folder(saved, 2)
    marked = json.loads((path / whole.MARKER).read_text())["files"]
    contents = {file.name: file.read_bytes() for file in path.iterdir() if file.name != whole.MARKER}
    assert contents.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp", checkpoint.STATE}
    assert marked == {name: {"bytes": len(content), "crc32": zlib.crc32(content)} for name, content in contents.items()}


def test_at_a_save_each_rank_checksums_its_equal_part_once(saved):
    numbers = [json.loads((saved / f"saved-{rank}.json").read_text()) for rank in range(2)]
    half = (2 * sum(ROWS) * 64 * 4) / 2  # of table and network
    assert all(half < number <= 1.1 * half for number in numbers), (numbers, half)


def test_to_find_it_each_of_other_ranks_checksums_an_equal_share(saved):
    spawn(find, (str(free_port()), saved), 3)
    found = [json.loads((saved / f"found-{rank}.json").read_text()) for rank in range(3)]
    path = checkpoint.step_folder(saved, 2)
    total = sum(file.stat().st_size for file in path.iterdir() if file.name != whole.MARKER)
    assert {name for name, _ in found} == {path.name}
    assert sum(number for _, number in found) == total
    assert all(number <= 1.1 * total / 3 for _, number in found), (found, total)


def test_a_checkpoint_without_a_file_of_a_rank_is_passed_over_by_name(saved, caplog, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (checkpoint.step_folder(saved, 2) / "__1_0.distcp").unlink()
    with process_group() as world:
        monkeypatch.setattr(checkpoint.logger, "propagate", True)
        assert checkpoint.latest(saved, world) == checkpoint.step_folder(saved, 1)
    assert f"{checkpoint.step_folder(saved, 2)}/__1_0.distcp is missing" in caplog.text


def test_a_file_that_another_rank_wrote_elsewhere_is_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match=r"__1_0.distcp was written by another rank and is not here"):
        whole.seal(tmp_path, {"__1_0.distcp": {"bytes": 3, "crc32": 0}})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_the_checksum_of_two_pieces_is_that_of_both(first, second):
    assert whole.combined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_the_checksum_of_a_large_piece_is_that_of_all():
    content = random.Random(1).randbytes(3_000_001)
    whole_one = zlib.crc32(content)
    assert whole.combined(zlib.crc32(content[:7]), zlib.crc32(content[7:]), len(content) - 7) == whole_one


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 50), max_size=6), count=st.integers(1, 7))
def test_shares_are_equal_and_have_every_byte_once(sizes, count):
    files = {str(number): size for number, size in enumerate(sizes)}
    found = whole.shares(files, count)
    taken = [(name, start + i) for share in found for name, start, length in share for i in range(length)]
    assert taken == [(name, i) for name, size in files.items() for i in range(size)]
    totals = [sum(length for _, _, length in share) for share in found]
    assert max(totals) - min(totals) <= 1
