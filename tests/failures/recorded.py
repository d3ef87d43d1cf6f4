"""A method from outside, for `--import`: MMoE by another name, with which a run notes which rows each step trained.

Each rank of each start writes a file of its own into the folder MMLREC_TEST_ROWS, a line for each step. A step takes so many
seconds more than it would as stand in the file MMLREC_TEST_STEP_SECONDS.
"""

import collections
import json
import os
import time
from pathlib import Path

from mmlrec.data.reader import Reader
from mmlrec.models.mmoe import MMoE
from mmlrec.training.reporting import Reporter


class Recorded(MMoE):
    """MMoE, recorded."""


_batches: collections.deque[tuple[int, list[int]]] = collections.deque()
_epoch, _init, _advance = Reader.epoch, Reporter.__init__, Reporter.advance


def epoch(self, number, start_row=0):
    """The pipeline trains batches in the order in which it takes them, and all that it has taken."""
    _batches.clear()
    for batch in _epoch(self, number, start_row):
        _batches.append((number, batch.row[batch.valid].tolist()))
        yield batch


def init(self, folder, world, *, first_step, **others):
    _init(self, folder, world, first_step=first_step, **others)
    self.recorded_step, self.recorded_world = first_step, world
    path = Path(os.environ["MMLREC_TEST_ROWS"]) / f"{world.start}-{world.rank}.jsonl"
    self.recorded = path.open("ab", buffering=0)  # open until the process ends


def advance(self):
    _advance(self)
    self.recorded_step += 1
    number, rows = _batches.popleft()
    world = self.recorded_world
    line = {
        "time": time.time(),
        "start": world.start,
        "step": self.recorded_step,
        "epoch": number,
        "rank": world.rank,
        "world_size": world.world_size,
        "rows": rows,
    }
    self.recorded.write((json.dumps(line) + "\n").encode())
    time.sleep(float(Path(os.environ["MMLREC_TEST_STEP_SECONDS"]).read_text()))


Reader.epoch, Reporter.__init__, Reporter.advance = epoch, init, advance
