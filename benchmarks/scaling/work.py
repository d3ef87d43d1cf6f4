"""One rank of one point, in a process of its own: python -m benchmarks.scaling.work JSON, with torchrun's variables."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from apps.cli import all_imported, run
from benchmarks.resident import ResidentSteps, TablesAlone
from benchmarks.scaling.bare import BareTables, KernelsAlone
from benchmarks.scaling.data import batches_of, config_of, manifest_of
from benchmarks.scaling.points import FEATURES, Point
from benchmarks.scaling.results import placed_as
from benchmarks.scaling.wire import bytes_sent, formula, placements_of
from benchmarks.throughput import seconds_of
from mmlrec.distributed.step_parts import CHECKPOINT, DATA, PARTS
from mmlrec.distributed.world import World, process_group
from mmlrec.errors import UserError
from mmlrec.session.session import Session, build_session

_FEWEST, _MOST = 8, 512  # batches, and in between as many as make:
_IDS = 1 << 22  # ids in all of them, whose rows no cache holds; or each row of the tables some times
_TIMES = 4
_WARM_UP = 4
_WINDOWS = 3
_ALONE = 24  # calls of the tables alone, of the kernels alone, and of the bare gather and scatter, in turn


def resident(world: World) -> int:
    """Bytes of this process that are in memory; on a GPU the most that tensors had."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_batches(point: Point) -> int:
    """Batches of a rank: so many that rows of large tables have left the caches when their batch comes again."""
    rows = -(-point.batch // point.ranks)
    return min(_MOST, max(_FEWEST, -(-min(_IDS, _TIMES * point.ids) // (FEATURES * rows))))


def measure(task: dict[str, Any], world: World) -> dict[str, Any] | None:
    """Measure a point on all ranks.

    Args:
        task: point, config, overrides, zipf, seconds to train.

    Returns:
        What `results.Row` holds of it, on rank 0.
    """
    point = Point(**task["point"])
    with TemporaryDirectory() as folder:
        manifest_of(point).save(Path(folder))
        batches = batches_of(point, world.rank, num_batches(point), task["zipf"])
        config = config_of(point, task["config"], task["overrides"], Path(folder))
        before = resident(world)
        session = build_session(config, world, for_training=True, source=task["config"])
    steps = ResidentSteps(session, batches)
    steps.train(_WARM_UP)
    per_window = world.highest(min(500, max(2, math.ceil(task["seconds"] / _WINDOWS / steps.seconds(2)))))
    own_parts, sent = dict(world.parts.seconds), bytes_sent()
    windows = [steps.seconds(per_window) for _ in range(_WINDOWS)]
    world.barrier()
    counted, trained = bytes_sent(), per_window * _WINDOWS
    parts = [1000 * (world.parts.seconds[part] - own_parts[part]) / trained for part in PARTS]
    on_sockets = world.device.type == "cpu" and sent is not None and counted is not None
    own = {
        "parts": parts,
        "resident": resident(world),
        "grown": resident(world) - before,
        "sent": (counted - sent) / trained if on_sockets and counted is not None and sent is not None else None,
        # With copies of the tables on parts of the ranks there is no formula.
        "formula": sum(formula_of(session, steps).values()) if config.embeddings.replicas == 1 else None,
    }
    alone = _alone(session, steps)
    ranks = world.gather(own)
    step_ms = 1000 * median(windows)
    names = [part for part in PARTS if part not in (CHECKPOINT, DATA)]
    return {
        "step_ms": step_ms,
        "samples_per_second": 1000 * point.batch / step_ms,
        "parts_ms": {name: sum(rank["parts"][PARTS.index(name)] for rank in ranks) / len(ranks) for name in names},
        **alone,
        **{
            key: None if ranks[0][key] is None else [rank[key] for rank in ranks]
            for key in ("resident", "grown", "sent", "formula")
        },
        "placed": placed_as(table["sharding"] for table in session.plan),
        "torch": str(torch.__version__),
    }


#: Of a number of a vector between ranks. fp8 has factors beside its numbers, which are left out.
_VECTOR_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


def formula_of(session: Session, steps: ResidentSteps) -> dict[str, float]:
    """`formula` of a step of this rank, by phase; mean over the batches."""
    tables = {feature.name: feature.table or "" for feature in session.manifest.sparse_features}
    network = sum(parameter.numel() * parameter.element_size() for parameter in session.network.parameters())
    found: defaultdict[str, float] = defaultdict(float)
    for batch in steps.batches:
        phases = formula(
            session.world.rank,
            session.world.world_size,
            placements_of(session.plan, tables),
            {name: batch.sparse[name].values().cpu() for name in tables},
            batch_size=batch.num_rows,
            parameter_bytes=network,
            backend="nccl" if session.world.device.type == "cuda" else "gloo",
            vector_bytes=_VECTOR_BYTES[session.config.embeddings.communication],
        )
        for phase, sent in phases.items():
            found[phase] += sent / len(steps.batches)
    return dict(found)


def _alone(session: Session, steps: ResidentSteps) -> dict[str, Any]:
    """Lookup with update, and on one rank that of the kernels alone and the bare gather and scatter.

    In turn, so that all see the same machine, each with batches of its own at a time: none finds rows in the cache because
    another has just read them.
    """
    device, batches, third = session.world.device, steps.batches, len(steps.batches) // 3
    works: dict[str, Callable[[], None]] = {"lookup_update_ms": TablesAlone(session, batches)}
    found: dict[str, Any] = {}
    if session.world.world_size == 1:
        bare = BareTables(session, batches[-third:] + batches[:-third])
        works |= {"kernel_ms": KernelsAlone(session, batches[third:] + batches[:third]), "bare_ms": bare}
        found["bare_bytes"] = bare.num_bytes
    calls = 3 if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in works}
    session.world.barrier()
    for _ in range(_ALONE):
        for name, work in works.items():
            seconds[name].append(seconds_of(work, device, calls))
    return found | {name: 1000 * median(values[2:]) for name, values in seconds.items()}


def main() -> None:
    """Measure, and on rank 0 write what came out to the file that the task names."""
    task = json.loads(sys.argv[1])
    all_imported()
    with process_group() as world:
        if world.device.type != task["device"]:
            raise UserError(f"--device {task['device']}: this process sees {world.device.type} only.")
        found = measure(task, world)
        if world.is_main:
            Path(task["result"]).write_text(json.dumps(found), encoding="utf-8")


def task_of(point: Point, *, config: str, overrides: list[str], zipf: float, seconds: float, device: str, result: Path) -> str:
    """The argument of such a process."""
    return json.dumps(
        {
            "point": asdict(point),
            "config": config,
            "overrides": overrides,
            "zipf": zipf,
            "seconds": seconds,
            "device": device,
            "result": str(result),
        }
    )


if __name__ == "__main__":
    run(main)
