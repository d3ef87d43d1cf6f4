"""What a rank of the tests of memory and of time does, in a module that imports nothing beside what it needs."""

import json
import logging.handlers
import os
from collections import Counter
from pathlib import Path
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from mmlrec.distributed.world import logger, process_group
from mmlrec.embeddings import hardware, sharding
from mmlrec.errors import ConfigError
from mmlrec.models.shared_bottom import SharedBottom
from mmlrec.registry import load
from mmlrec.session import session
from mmlrec.session.session import build_session, check_memory, hardware_of


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rank_of(rank, world_size, port, on_host=None):
    """Be this rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(on_host or world_size)}
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


def lie(rank, world_size, port, config, memory, folder):
    """Write where a training lays its tables on ranks of so much memory."""
    with rank_of(rank, world_size, port) as world, mock.patch.object(session, "memory_of", return_value=memory):
        plan = build_session(load(str(config), []), world, for_training=True).plan
        Path(folder, f"rank-{rank}.json").write_text(json.dumps(plan))


def refuse(rank, world_size, port, config, folder):
    """Write what a training says whose network cannot be tried out: on a few rows, without its GPU."""
    told = logging.handlers.BufferingHandler(1000)
    refusal = mock.patch.object(SharedBottom, "forward", side_effect=NotImplementedError("no kernel for CPUs"))
    with rank_of(rank, world_size, port) as world, refusal:
        logger.addHandler(told)
        plan = build_session(load(str(config), []), world, for_training=True).plan
    Path(folder, f"refused-{rank}.json").write_text(json.dumps([plan, [record.getMessage() for record in told.buffer]]))


def fit(rank, hosts, port, report, gib, folder):
    """Write what a rank of unequal hosts sees: the memory that a plan takes, and what it is told where tables do not fit.

    Args:
        hosts: ranks of each.
        gib: free memory of each host.
    """
    host = [number for number, ranks in enumerate(hosts) for _ in range(ranks)][rank]
    with rank_of(rank, sum(hosts), port, hosts[host]) as world:
        with (
            mock.patch.object(sharding, "host_memory", return_value=gib[host] * 2**30),
            mock.patch.object(hardware, "host_memory", return_value=gib[host] * 2**30),
        ):
            found = hardware_of(world)
            told = ""
            try:
                check_memory(report, "adagrad", world, replica=world.world_size)
            except ConfigError as error:
                told = str(error)
        said = {"memory": found.memory, "ranks_per_host": found.ranks_per_host, "equal": found.equal_hosts, "told": told}
        Path(folder, f"rank-{rank}.json").write_text(json.dumps(said))


class Operators(TorchDispatchMode):
    """Counts the operators of this thread that are no views, by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += not func.is_view
        return func(*args, **(kwargs or {}))


def count(rank, world_size, port, on_host, config, cases, folder):
    """Write the operators of a training step, by name, of each case: overrides of the configuration."""
    with rank_of(rank, world_size, port, on_host) as world:
        found = []
        for overrides in cases:
            built = build_session(load(str(config), overrides), world, for_training=True)
            built.model.train()
            reader = built.reader("train")
            feed = built.prepare(reader.epoch(0), training=True)
            # The first steps open what later ones have; the pipeline is two batches ahead.
            for _ in range(3):
                built.pipeline.progress(feed)
            with Operators() as operators:
                for _ in range(4):
                    built.pipeline.progress(feed)
            found.append({name: number / 4 for name, number in operators.names.items()})
        if rank == 0:
            Path(folder, "operators.json").write_text(json.dumps(found))
