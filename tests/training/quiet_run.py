"""`apps.train` on two ranks where long times pass without a line, and "ten minutes" are half a second.

Rank 1 starts late and waits for its 21st batch, rank 0 computes metrics, rank 1 writes files of a checkpoint: two seconds each.
"""

import functools
import os
import runpy
import sys
import time

from mmlrec.data.reader import Reader
from mmlrec.distributed import world
from mmlrec.distributed.heartbeat import Heartbeat
from mmlrec.evaluation import evaluation

RANK = int(os.environ["RANK"])
plain_epoch, plain_report, plain_fsync, plain_init = Reader.epoch, evaluation.build_report, os.fsync, Heartbeat.__init__


def epoch(self, number, start_row=0):
    for index, batch in enumerate(plain_epoch(self, number, start_row)):
        if RANK == 1 and index == 20:
            time.sleep(2)
        yield batch


def build_report(*arguments, **options):
    if RANK == 0:
        time.sleep(2)
    return plain_report(*arguments, **options)


def fsync(descriptor):
    if RANK == 1:
        time.sleep(2)
    plain_fsync(descriptor)


def init(self, *arguments):
    plain_init(self, *arguments)
    self._interval = 0.1


Reader.epoch, evaluation.build_report, os.fsync, Heartbeat.__init__ = epoch, build_report, fsync, init
world.process_group = functools.partial(world.process_group, quiet=0.5)
sys.argv[0] = "apps.train"
if RANK == 1:
    time.sleep(2)
runpy.run_module("apps.train", run_name="__main__")
