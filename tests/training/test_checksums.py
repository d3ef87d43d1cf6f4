"""Checksums of a checkpoint of several ranks: each takes its own while it writes, and each file is checked once."""

import json
import os
import zlib

import pytest
import torch

from mmlrec.distributed.world import process_group
from mmlrec.run_folder import checkpoint
from tests.processes import spawn
from tests.training.launch import free_port


def save_and_find(rank, port, folder):
    """What a rank does: save, then find the newest and read its state; which files it has read for a checksum."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    read = []
    plain = checkpoint._crc32
    checkpoint._crc32 = lambda path: read.append(path.name) or plain(path)
    with process_group() as world:
        tensors = {"model.w": torch.ones(1000), f"random.{rank}.cpu": torch.get_rng_state()}
        for step in (1, 2):
            checkpoint.save(checkpoint.step_folder(folder, step), tensors, {"step": step}, world)
        saved = list(read)
        found = checkpoint.latest(folder, world)
        (folder / f"{rank}.json").write_text(json.dumps({"saving": saved, "finding": read[len(saved) :], "found": found.name}))
        world.barrier()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    spawn(save_and_find, (str(free_port()), folder), 2)
    return folder


def test_marked_are_size_and_checksum_of_every_file(saved):
    path = checkpoint.step_folder(saved, 2)
    marked = json.loads((path / checkpoint.MARKER).read_text())["files"]
    contents = {file.name: file.read_bytes() for file in path.iterdir() if file.name != checkpoint.MARKER}
    assert contents.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp", checkpoint.STATE}
    assert marked == {name: {"bytes": len(content), "crc32": zlib.crc32(content)} for name, content in contents.items()}


def test_nothing_is_read_at_a_save_and_each_file_once_to_find_it(saved):
    ranks = [json.loads((saved / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["found"] for rank in ranks] == ["step_000000002"] * 2
    assert [rank["saving"] for rank in ranks] == [[], []]
    assert all(len(rank["finding"]) == 2 for rank in ranks)
    marked = json.loads((checkpoint.step_folder(saved, 2) / checkpoint.MARKER).read_text())["files"]
    assert sorted(name for rank in ranks for name in rank["finding"]) == sorted(marked)


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
        checkpoint._seal(tmp_path, {"__1_0.distcp": {"bytes": 3, "crc32": 0}})
