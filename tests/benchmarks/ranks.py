"""What the ranks of the tests of bytes on the wire do, in a module that imports nothing beside what it needs."""

import json
import os
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from benchmarks.resident import ResidentSteps
from benchmarks.scaling.data import batches_of, config_of, manifest_of
from benchmarks.scaling.points import Point
from benchmarks.scaling.wire import bytes_sent
from benchmarks.scaling.work import formula_of
from mmlrec.distributed.world import process_group
from mmlrec.session.session import build_session

_STEPS = 4


def _sent_by(work, times):
    dist.barrier()
    before = bytes_sent()
    for _ in range(times):
        work()
    dist.barrier()
    return (bytes_sent() - before) / times


def count(rank, world_size, per_host, port, cases, folder):
    """Write what a rank sends by the kernel's count and by the formula: in a step of each case, in known collectives."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(per_host)}
    os.environ |= {"LOCAL_RANK": str(rank % per_host), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    point, found = Point(world_size, ids=8000, batch=4096, scenarios=2, tasks=2), {}
    with process_group() as world:
        numbers = torch.ones(1 << 18)
        found["all_reduce"] = _sent_by(lambda: dist.all_reduce(numbers), 5), 4 * numbers.numel()
        parts = torch.empty_like(numbers)
        found["all_to_all"] = _sent_by(lambda: dist.all_to_all_single(parts, numbers), 5), 2 * numbers.numel()
        for name, overrides in cases.items():
            with TemporaryDirectory() as place:
                manifest_of(point).save(Path(place))
                session = build_session(config_of(point, "scaling/synthetic", overrides, Path(place)), world, for_training=True)
            steps = ResidentSteps(session, batches_of(point, rank, 3, 1.05 if name == "skewed" else 0.0))
            steps.train(2)
            counted = _sent_by(lambda steps=steps: steps.train(_STEPS), 2) / _STEPS
            phases = defaultdict(float, formula_of(session, steps))
            found[name] = counted, sum(phases.values()), dict(phases), [table["sharding"] for table in session.plan]
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))
