"""Files of curves: as TensorBoard's own writer makes them, and whole where the disk is full."""

import errno
import math
from io import FileIO

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from mmlrec.training.curves import Curves, append_whole

POINTS = [({"train/loss/a": 0.25, "größe": -1e30}, 3), ({"valid/auc/a": math.inf, "x" * 300: 0.1}, 2**40)]


def points(folder):
    """Tag -> (step, value) of each point, in the order in which TensorBoard reads them."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def events(folder):
    """What the only file of a folder says, read with its checksums; without times, and one point an event."""
    (path,) = folder.iterdir()
    found = []
    for event in EventFileLoader(str(path)).Load():
        event.wall_time = 0
        event.ClearField("source_metadata")
        values = [(value.tag, value.tensor.float_val[0]) for value in event.summary.value] or [None]
        found += [(event.step, event.file_version, event.session_log.status, value) for value in values]
    return found


def test_a_file_says_what_one_of_tensorboards_own_writer_says(tmp_path):
    with SummaryWriter(str(tmp_path / "theirs"), purge_step=2) as theirs:
        for values, step in POINTS:
            for tag, value in values.items():
                theirs.add_scalar(tag, value, step)
    ours = Curves(tmp_path / "ours", 2)
    for values, step in POINTS:
        ours.add(values, step)
    ours.close()
    assert events(tmp_path / "ours") == events(tmp_path / "theirs")
    assert len(events(tmp_path / "ours")) == 3 + 4


def test_a_run_that_goes_on_hides_what_came_later_before(tmp_path):
    for first, steps in ((0, range(1, 5)), (2, range(3, 6))):
        curves = Curves(tmp_path, first)
        for step in steps:
            curves.add({"a": 10 * first + step}, step)
        curves.close()
    # Steps from the first one on count as not yet done: 2 to 4 of the first file go.
    assert points(tmp_path) == {"a": [(1, 1), (3, 23), (4, 24), (5, 25)]}


class Disk(FileIO):
    """A file on a disk with room for some bytes."""

    room = 8

    def write(self, content):
        if self.tell() == self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content[: self.room - self.tell()])


def test_what_does_not_fit_leaves_no_part_of_itself(tmp_path):
    with Disk(tmp_path / "file", "ab") as file:
        append_whole(file, b"abcde")
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                append_whole(file, b"fghij")
        assert (tmp_path / "file").read_bytes() == b"abcde"
        file.room = 20
        append_whole(file, b"fghij")
    assert (tmp_path / "file").read_bytes() == b"abcdefghij"
