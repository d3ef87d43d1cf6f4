"""`apps.train` on three ranks, each slow in something of its own for some steps, as if its disk, cores or folder were.

Steps 1 to 20: rank 1 waits for its data. 21 to 40: rank 2 is slow in the network. 41 to 60: rank 0 in the backward. From then
on: rank 2 where it writes files.
"""

import os
import runpy
import sys
import time

from mmlrec.data.reader import Reader
from mmlrec.session.recommender import Head

RANK = int(os.environ["RANK"])
SECONDS = 0.05
plain_epoch, plain_forward, plain_inputs, plain_fsync = Reader.epoch, Head.forward, Head.inputs, os.fsync
step = [0]


def epoch(self, number, start_row=0):
    for batch in plain_epoch(self, number, start_row):
        if RANK == 1 and step[0] < 20:
            time.sleep(SECONDS)
        yield batch


def inputs(self, *arguments):
    if RANK == 2 and 20 < step[0] <= 40:
        time.sleep(SECONDS)
    return plain_inputs(self, *arguments)


def forward(self, *arguments):
    step[0] += self.training
    loss, predictions = plain_forward(self, *arguments)
    if RANK == 0 and self.training and 40 < step[0] <= 60:
        loss.register_hook(lambda _: time.sleep(SECONDS))
    return loss, predictions


def fsync(descriptor):
    if RANK == 2 and step[0] > 60:
        time.sleep(1)
    plain_fsync(descriptor)


Reader.epoch, Head.inputs, Head.forward, os.fsync = epoch, inputs, forward, fsync
sys.argv[0] = "apps.train"
runpy.run_module("apps.train", run_name="__main__")
