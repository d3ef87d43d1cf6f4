"""`apps.train` that notes which rows it trains on: `counted.py ROWS_FILE STEP RANK SIGNAL ARGUMENTS...`.

ROWS_FILE-RANK gets a line for each step before it is taken, `[step, rows of this rank]`, as the head of the network meets them.
At STEP (0: never) process RANK sends itself SIGNAL.
"""

import json
import os
import sys
from pathlib import Path

from apps.cli import run
from apps.train import main
from mmlrec.session.recommender import Head

rows_file, step, rank, number = Path(sys.argv[1]), *map(int, sys.argv[2:5])
file = rows_file.with_name(f"{rows_file.name}-{os.environ.get('RANK', '0')}").open("a")
plain = Head.forward


def forward(self, pooled, batch):
    if self.training:
        json.dump([self.step + 1, batch.row[batch.valid].tolist()], file)
        file.write("\n")
        file.flush()
        if self.step + 1 == step and os.environ.get("RANK", "0") == str(rank):
            os.kill(os.getpid(), number)
    return plain(self, pooled, batch)


Head.forward = forward
sys.argv = ["train", *sys.argv[5:]]
run(main)
