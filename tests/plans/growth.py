"""What a rank of the test of memory does, in a module that imports nothing beside what it needs."""

import json
import os
from pathlib import Path

from mmlrec.distributed.world import process_group
from mmlrec.registry import load
from mmlrec.session.session import build_session


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grow(rank, world_size, port, config, small, folder):
    """Write how much the tables of a training make this rank grow; a tiny training before fills what all of them need."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with process_group() as world:
        first = build_session(load(str(config), [f"dataset.path={small}"]), world, for_training=True)
        before = resident()
        second = build_session(load(str(config), []), world, for_training=True)
        growth = resident() - before
        Path(folder, f"rank-{rank}.json").write_text(json.dumps({"growth": growth, "plan": second.plan}))
        del first, second
