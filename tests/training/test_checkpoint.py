"""Checkpoint folders: what is kept, restored and refused."""

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter, filesystem

from mmlrec.distributed.world import process_group
from mmlrec.errors import CheckpointError
from mmlrec.layers.normalisation import PartitionedNorm
from mmlrec.run_folder import checkpoint


@pytest.fixture
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as world:
        yield world


def save(folder, step, world, value=None):
    checkpoint.save(folder, {"model.w": torch.full((3,), float(step if value is None else value))}, {"step": step}, world)


def load(folder, world):
    tensors = {"model.w": torch.zeros(3)}
    checkpoint.load(folder, tensors, world)
    return tensors["model.w"].tolist()


def test_prune_keeps_the_newest_whole_ones(tmp_path, world):
    for step in (2, 4, 6, 8):
        save(checkpoint.step_folder(tmp_path, step), step, world)
    # 8 is damaged: a resume passes it over, goes on from 6 and saves 7. Nothing that is whole may go for its sake.
    damaged = next(checkpoint.step_folder(tmp_path, 8).glob("*.distcp"))
    os.truncate(damaged, 1)
    assert checkpoint.latest(tmp_path, world) == checkpoint.step_folder(tmp_path, 6)
    save(checkpoint.step_folder(tmp_path, 7), 7, world)
    checkpoint.prune(tmp_path, 2, step=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000006", "step_000000007"]


def test_on_a_gpu_nothing_is_copied_ahead_into_page_locked_memory(tmp_path, world, monkeypatch):
    """torch keeps of it the next power of two bytes of each tensor; DCP does so where there is a GPU, unless told not to."""

    def ahead(*_, **__):
        raise AssertionError("copied ahead")

    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", ahead)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    save(tmp_path / "step", 3, world)
    assert load(tmp_path / "step", world) == [3.0] * 3


def test_prune_keeps_multiples_for_good(tmp_path, world):
    for step in range(1, 10):
        save(checkpoint.step_folder(tmp_path, step), step, world)
    deleted = []
    checkpoint.prune(tmp_path, 2, step=8, every=3, delete=deleted.append)
    # 9 is beyond the one just saved.
    assert [checkpoint.step_of(path) for path in sorted(tmp_path.glob("step_*")) if not path.suffix] == [3, 6, 7, 8]
    assert sorted(path.name[:14] for path in deleted) == [f"step_{step:09d}" for step in (1, 2, 4, 5, 9)]
    assert all(path.suffix == ".tmp" and path.is_dir() for path in deleted)


@pytest.mark.parametrize(("resumed_from", "expected"), [(7, 5.0), (10, 10.0), (12, 10.0)])
def test_best_goes_back_to_what_the_resumed_step_knew(tmp_path, world, resumed_from, expected):
    # Best of step 5, replaced at step 10; the process dies before the step checkpoint of 10 is whole, or after.
    save(tmp_path / "best", 5, world)
    save(tmp_path / "best", 10, world)
    checkpoint.settle_best(tmp_path / "best", resumed_from, world)
    assert load(tmp_path / "best", world) == [expected] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_best_survives_a_kill_while_it_is_replaced(tmp_path, world):
    save(tmp_path / "best", 5, world)
    (tmp_path / "best").rename(tmp_path / "best.old")
    save(tmp_path / "best.tmp", 10, world)
    checkpoint.settle_best(tmp_path / "best", 7, world)
    assert load(tmp_path / "best", world) == [5.0] * 3


def test_best_can_be_read_while_former_ones_are_deleted(tmp_path, world, monkeypatch):
    best, plain, deleted = tmp_path / "best", shutil.rmtree, []

    def rmtree(path, **options):
        if Path(path).exists():
            deleted.append(Path(path).name)
            assert checkpoint.read_state(best)["step"] == 7
        plain(path, **options)

    save(best, 5, world)
    save(best, 6, world)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(best, 7, world)
    assert len(deleted) == 1
    assert checkpoint.read_state(tmp_path / "best.old")["step"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best.old"]


def test_a_new_run_has_no_best(tmp_path, world):
    save(tmp_path / "best", 5, world)
    checkpoint.settle_best(tmp_path / "best", None, world)
    assert not (tmp_path / "best").exists()


def test_what_an_earlier_release_wrote_is_found_and_loaded(tmp_path, world):
    """It left the plan and the files to DCP, and had one checksum for each file."""
    folder = checkpoint.step_folder(tmp_path, 1)
    dcp.save({"model.w": torch.full((3,), 1.0)}, storage_writer=FileSystemWriter(folder), process_group=world.control)
    (folder / checkpoint.STATE).write_text('{"step": 1}')
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    files = {name: {"bytes": len(content), "crc32": zlib.crc32(content)} for name, content in contents.items()}
    (folder / checkpoint.MARKER).write_text(json.dumps({"files": files}))
    assert checkpoint.latest(tmp_path, world) == folder
    assert checkpoint.read_state(folder) == {"step": 1}
    assert load(folder, world) == [1.0] * 3


def test_another_shape_or_key_is_refused(tmp_path, world):
    save(tmp_path / "step_000000001", 1, world)
    with pytest.raises(CheckpointError, match=r"'model.w' has shape \(3,\), this model wants \(4,\)"):
        checkpoint.load(tmp_path / "step_000000001", {"model.w": torch.zeros(4)}, world)
    with pytest.raises(CheckpointError, match=r"it lacks \['model.v'\] and has \['model.w'\]"):
        checkpoint.load(tmp_path / "step_000000001", {"model.v": torch.zeros(3)}, world)


def test_statistics_of_an_earlier_version_go_on_slowly(tmp_path, world):
    """It counted no batches of a partitioned normalisation; as the first of a new count, one batch would replace them."""
    norm = PartitionedNorm(2, 3)
    norm.running_mean.fill_(5.0)
    before = {f"model.norm.{key}": value for key, value in norm.state_dict().items() if key != "num_batches_tracked"}
    checkpoint.save(tmp_path / "step_000000001", before, {"step": 1}, world)
    norm = PartitionedNorm(2, 3)
    tensors = {f"model.norm.{key}": value for key, value in norm.state_dict().items()}
    checkpoint.load(tmp_path / "step_000000001", tensors, world)
    norm(torch.zeros(8, 3), torch.arange(8) % 2)
    torch.testing.assert_close(norm.running_mean, torch.full((2, 3), 5.0 * 0.99))
