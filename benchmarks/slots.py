"""Managed tables: what it costs to find the slots of a batch, and to let slots change their keys; by number of slots.

python -m benchmarks.slots [--slots 1e5,1e6,1e7] [--batch 4096] [--features 8] [--steps 100]

One process, one thread, processor time. The keys of each feature have a table of their own, whose slots are all held. Ids are
Zipf and drift, so that at each boundary some thousand keys take the slots of others. Shown are the second and later boundaries:
the first one takes memory from the system that is then used again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from mmlrec.config import ManagedConfig
from mmlrec.distributed.world import keep_freed_memory
from mmlrec.embeddings.tables import begin_anew
from mmlrec.hashing import mix64
from mmlrec.slots.buckets import Buckets
from mmlrec.slots.occurrences import Gathered, Occurrences
from mmlrec.slots.rule import OwnBuckets
from mmlrec.slots.slot_map import SlotMap, map_bytes

_DIM, _BOUNDARIES = 16, 4


class _Tables(nn.Module):
    """One table, as a collection names it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embedding_bags = nn.ModuleDict({"t": nn.Embedding(rows, _DIM)})


class _NoState:
    def state_dict(self) -> dict[str, dict[str, object]]:
        """None."""
        return {"state": {}}


def milliseconds(work: Callable[[], object]) -> float:
    """Of the processor."""
    begun = time.process_time()
    work()
    return 1000 * (time.process_time() - begun)


def drawn(random: np.random.Generator, num_slots: int, count: int, moved: float) -> NDArray[np.uint64]:
    """Keys of ids of which about as many are in use at a time as there are slots, the first ones more often."""
    ids = (num_slots * random.random(count) ** 3 + moved).astype(np.uint64)
    return mix64(ids)


def _look_up(found: SlotMap, keys: list[NDArray[np.uint64]]) -> None:
    for of_feature in keys:
        found.look_up(of_feature)


def _count(own: OwnBuckets, fed: list[NDArray[np.uint64]]) -> None:
    gathered = Gathered()
    for step, keys in enumerate(fed, start=2):
        gathered.add(keys, step)
    own.arrived = gathered.take()


def measured(num_slots: int, batch: int, features: int, steps: int) -> list[str]:
    """A row of the table: of one table with so many slots."""
    random = np.random.default_rng(0)
    buckets, found = Buckets.of(num_slots), SlotMap(num_slots)
    own = OwnBuckets(buckets, range(buckets.count), ManagedConfig(evict="lru"))
    keys = np.sort(mix64(np.arange(num_slots + num_slots // 20, dtype=np.uint64)))
    own.arrived = Occurrences(keys, np.ones(len(keys), np.int64), np.ones(len(keys), np.int64))
    first = own.update()
    found.change(np.zeros(0, np.uint64), first.keys, first.slots)
    asked = [[drawn(random, num_slots, batch, 0) for _ in range(features)] for _ in range(20)]
    look_up = median(milliseconds(partial(_look_up, found, of)) for of in asked)
    tables, times, evicted = _Tables(num_slots + 1), [], []
    for boundary in range(_BOUNDARIES):
        moved = 0.02 * num_slots * (boundary + 1)
        fed = [drawn(random, num_slots, batch, moved * step / steps) for step in range(steps)]
        of_count = milliseconds(partial(_count, own, fed))
        begun = time.process_time()
        changes = own.update()
        of_rule = 1000 * (time.process_time() - begun)
        lost = changes.gone != 0
        of_map = milliseconds(partial(found.change, np.sort(changes.gone[lost]), changes.keys, changes.slots))
        rows = {"t": np.sort(changes.slots[lost]).astype(np.int64)}
        of_rows = milliseconds(partial(begin_anew, tables, cast(KeyedOptimizer, _NoState()), rows, std=0.01, seed=0))
        times.append((of_count, of_rule, of_map, of_rows))
        evicted.append(len(rows["t"]))
    steady = [median(column) for column in zip(*times[1:], strict=True)]
    return [
        f"{num_slots:.0e}",
        f"{look_up:.2f}",
        *(f"{value:.0f}" for value in steady),
        f"{median(evicted[1:]):,.0f}",
        f"{map_bytes(num_slots) / num_slots:.1f}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.slots", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--slots", default="1e5,1e6,1e7", help="of the table, several by commas")
    parser.add_argument("--batch", type=int, default=4096, help="rows of a batch")
    parser.add_argument("--features", type=int, default=8, help="managed features of a batch, for the look-up")
    parser.add_argument("--steps", type=int, default=100, help="steps between boundaries")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [measured(int(float(slots)), options.batch, options.features, options.steps) for slots in options.slots.split(",")]
    of_boundary = ("count ms", "rule ms", "map ms", "rows ms", "evicted")
    headers = ["slots", "look-up ms/batch", *of_boundary, "map bytes/slot"]
    print(tabulate(rows, headers=headers, disable_numparse=True, stralign="right"))


if __name__ == "__main__":
    main()
