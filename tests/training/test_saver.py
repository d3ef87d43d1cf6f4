"""Checkpoints that are written while training goes on, on disks that are slow, full or gone for a time."""

import json
import signal
import threading

import pytest
import torch

from mmlrec.distributed.world import logger, process_group
from mmlrec.errors import CheckpointError, UserError
from mmlrec.run_folder import checkpoint, saver, whole
from mmlrec.run_folder.saver import Saver
from tests.processes import FORKS, environment, spawn
from tests.training.launch import free_port
from tests.training.saving_ranks import killed, slowly


@pytest.fixture
def world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as world:
        yield world


@pytest.fixture
def log(monkeypatch, caplog):
    """What is logged; attempts follow each other soon."""
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(saver, "RETRY_AFTER_S", (0.01, 0.02))
    return caplog


def saver_of(world, *, background=True, most_failures=3):
    return Saver(world, lambda: None, background=background, most_failures=most_failures, longest_wait=60)


def nothing():
    pass


def read(folder, world):
    tensors = {"model.w": torch.zeros(3)}
    assert checkpoint.damage(folder) is None
    checkpoint.load(folder, tensors, world)
    return tensors["model.w"].tolist()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, world, monkeypatch, log):
    """Written are the values at the time of the save, from buffers that are used again."""
    go, plain, weights = threading.Event(), whole.seal, torch.full((3,), 1.0)

    def seal(folder, files):
        assert go.wait(20)
        plain(folder, files)

    monkeypatch.setattr(whole, "seal", seal)
    pruned = []
    with saver_of(world) as saving:
        saving.save(tmp_path / "step_000000001", {"model.w": weights}, {"step": 1}, lambda: pruned.append(1))
        assert saving.has(tmp_path / "step_000000001")
        assert saving.newest is None
        assert not pruned
        addresses = [buffer.data_ptr() for buffer in saving._buffers.values()]
        weights.fill_(2.0)
        threading.Timer(0.2, go.set).start()
        saving.save(tmp_path / "step_000000002", {"model.w": weights}, {"step": 2}, lambda: pruned.append(2))
        assert saving.newest == tmp_path / "step_000000001"
        weights.fill_(3.0)
    assert pruned == [1, 2]
    assert [buffer.data_ptr() for buffer in saving._buffers.values()] == addresses
    assert "step_000000002 is due while the checkpoint before is still being written; training waits." in log.text
    assert [read(tmp_path / f"step_00000000{step}", world) for step in (1, 2)] == [[1.0] * 3, [2.0] * 3]


@pytest.fixture(params=[False, True], ids=["blocking", "background"])
def background(request):
    return request.param


def test_a_folder_that_is_back_soon_is_tried_again(tmp_path, world, log, background):
    folder = tmp_path / "gone"
    folder.write_text("")  # no folder can be made in it
    plain, calls = whole.make, []

    def make(path, start):
        calls.append(path)
        if len(calls) == 3:
            folder.unlink()
        return plain(path, start)

    with pytest.MonkeyPatch.context() as patch, saver_of(world, background=background) as saving:
        patch.setattr(whole, "make", make)
        saving.save(folder / "step_000000001", {"model.w": torch.ones(3)}, {"step": 1}, nothing)
        saving.wait()
    assert read(folder / "step_000000001", world) == [1.0] * 3
    for attempt in (1, 2):
        assert f"note: attempt {attempt} of 3: {folder}/step_000000001: cannot write a checkpoint: [Errno 20]" in log.text


def test_a_run_ends_at_so_many_failures_in_a_row(tmp_path, world, log, background, monkeypatch):
    """One that succeeds in between starts the count anew. Nothing half-written stays, and the newest before does."""
    plain, broken = whole.write_synced, [False]

    def write_synced(path, content):
        if broken[0]:
            raise OSError(28, "No space left on device", str(path))
        return plain(path, content)

    monkeypatch.setattr(whole, "write_synced", write_synced)
    saving, weights = saver_of(world, background=background), torch.ones(3)

    def save(step, **options):
        saving.save(checkpoint.step_folder(tmp_path, step), {"model.w": weights}, {"step": step}, nothing, **options)
        saving.wait()

    save(1)
    for first in (2, 5):
        broken[0] = True
        save(first)
        save(first + 1)
        assert "newest checkpoint is step_00000000" in log.text
        assert "it ends when 3 in a row fail, and this is number 2." in log.text
        broken[0] = first == 5
        if first == 2:
            save(4)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000000001", "step_000000004"]
    with pytest.raises(CheckpointError, match=r"step_000000007: .*No space left.*number 3 in a row .*max_failed_checkpoints"):
        save(7)
    with pytest.raises(CheckpointError, match="No space left"):
        save(8, must=True)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000000001", "step_000000004"]
    assert read(tmp_path / "step_000000004", world) == [1.0] * 3


def test_a_best_that_could_not_be_written_is_written_before_the_next_checkpoint(tmp_path, world, log, background, monkeypatch):
    """With the weights that it had. No step is saved that knows of a best that is not there."""
    plain, fails = whole.make, {"best"}

    def make(path, start):
        if path.name in fails:
            raise OSError(5, "Input/output error", str(path))
        made.append(path.name)
        return plain(path, start)

    monkeypatch.setattr(whole, "make", make)
    made, noted, weights = [], [], torch.ones(3)
    with saver_of(world, background=background, most_failures=9) as saving:
        saving.save(tmp_path / "best", {"model.w": weights}, {"step": 1}, lambda: noted.append("best"), indispensable=True)
        saving.wait()
        weights.fill_(2.0)
        saving.save(tmp_path / "step_000000002", {"model.w": weights}, {"step": 2}, nothing)
        saving.wait()
        assert made == noted == list(tmp_path.iterdir()) == []
        fails.clear()
        weights.fill_(3.0)
        saving.save(tmp_path / "step_000000003", {"model.w": weights}, {"step": 3}, lambda: noted.append(3))
        saving.wait()
    assert made == ["best", "step_000000003"]
    assert noted == ["best", 3]
    assert read(tmp_path / "best", world) == [1.0] * 3
    assert read(tmp_path / "step_000000003", world) == [3.0] * 3


def test_an_end_waits_for_what_is_indispensable(tmp_path, world, log, background, monkeypatch):
    plain = whole.make

    def make(path, start):
        raise OSError(5, "Input/output error", str(path))

    saving = saver_of(world, background=background)
    monkeypatch.setattr(whole, "make", make)
    saving.save(tmp_path / "best", {"model.w": torch.ones(3)}, {"step": 1}, nothing, indispensable=True)
    with pytest.raises(CheckpointError, match=r"best: cannot write a checkpoint: .*Input/output error"):
        saving.finish()
    monkeypatch.setattr(whole, "make", plain)
    saving.finish()
    assert read(tmp_path / "best", world) == [1.0] * 3


def test_what_is_lost_meanwhile_gets_nothing(tmp_path, world, background):
    """The folder was replaced while the checkpoint was being written."""
    answers = iter([None, UserError("replaced")])
    saving = Saver(world, lambda: next(answers), background=background, most_failures=3, longest_wait=60)
    with pytest.raises(UserError, match="replaced"), saving:
        saving.save(tmp_path / "step_000000001", {"model.w": torch.ones(3)}, {"step": 1}, nothing)
    assert list(tmp_path.iterdir()) == []


def test_slow_checksums_and_deletions_let_no_rank_run_out_of_time(tmp_path):
    """In the group of training, a wait of two seconds ends the run."""
    spawn(slowly, (str(free_port()), tmp_path), 2)


def kill_at(folder, count):
    folder.mkdir()
    process = FORKS.Process(target=killed, args=(folder, count, folder.with_suffix(".json")))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        process.start()
    return process


def operations(tmp_path):
    process = kill_at(tmp_path / "all", 0)
    process.join(60)
    assert process.exitcode == 0
    return json.loads((tmp_path / "all.json").read_text())


def check_killed(tmp_path, world, counts):
    processes = {}
    for count in counts:
        processes[count] = kill_at(tmp_path / str(count), count)
    for count, process in processes.items():
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, count
        folder = tmp_path / str(count)
        found = checkpoint.latest(folder, world)
        assert found is not None, count
        assert read(found, world) == [float(checkpoint.step_of(found))] * 3, count
        for path in folder.glob("step_*"):  # whole, or without the name of a checkpoint
            assert path.suffix == whole.TEMPORARY or checkpoint.damage(path) is None, (count, path)


def test_killed_before_a_file_operation_of_a_save_in_the_background(tmp_path, world):
    """The one before is whole, the new one whole or passed over; every third operation here, all of them in the long test."""
    kinds = operations(tmp_path)
    # Nothing is left out of the count: files of tensors and index, state and marker, their renames, the deletion.
    for kind in ("os.mkdir", "open __0_0.distcp", "open state.json", "open COMPLETE.json", "os.rename", "fsync", "os.rmdir"):
        assert kind in kinds
    check_killed(tmp_path, world, range(1, len(kinds) + 1, 3))


@pytest.mark.long
def test_killed_before_each_file_operation_of_a_save_in_the_background(tmp_path, world):
    number = len(operations(tmp_path))
    for begin in range(1, number + 1, 8):
        check_killed(tmp_path, world, range(begin, min(begin + 8, number + 1)))
