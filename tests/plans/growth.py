"""What a rank of the tests of memory and of time does, in a module that imports nothing beside what it needs."""

import json
import os
from collections import Counter
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

from mmlrec.distributed.world import process_group
from mmlrec.registry import load
from mmlrec.session.session import build_session


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rank_of(rank, world_size, port):
    """Be this rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return process_group()


def grow(rank, world_size, port, config, small, folder):
    """Write how much the tables of a training make this rank grow; a tiny training before fills what all of them need."""
    with rank_of(rank, world_size, port) as world:
        first = build_session(load(str(config), [f"dataset.path={small}"]), world, for_training=True)
        before = resident()
        second = build_session(load(str(config), []), world, for_training=True)
        growth = resident() - before
        Path(folder, f"rank-{rank}.json").write_text(json.dumps({"growth": growth, "plan": second.plan}))
        del first, second


class Operators(TorchDispatchMode):
    """Counts the operators of this thread that are no views, by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += not func.is_view
        return func(*args, **(kwargs or {}))


def count(rank, world_size, port, config, cases, folder):
    """Write the operators of a training step, by name, of each case: overrides of the configuration."""
    with rank_of(rank, world_size, port) as world:
        found = []
        for overrides in cases:
            session = build_session(load(str(config), overrides), world, for_training=True)
            session.model.train()
            reader = session.reader("train")
            feed = session.prepare(reader.epoch(0), training=True)
            # The first steps open what later ones have; the pipeline is two batches ahead.
            for _ in range(3):
                session.pipeline.progress(feed)
            with Operators() as operators:
                for _ in range(4):
                    session.pipeline.progress(feed)
            found.append({name: number / 4 for name, number in operators.names.items()})
        if rank == 0:
            Path(folder, "operators.json").write_text(json.dumps(found))
