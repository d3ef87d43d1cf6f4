"""Time and memory of a report: rows that stay on the ranks that predicted them.

python -m benchmarks.evaluation --rows 1e8 --processes 2

Scores are drawn, not predicted: what is measured is collecting them, batch by batch, and the report of two tasks in four
scenarios with GAUC by user. Resident memory is that of each rank at its most, as the operating system counts it.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.multiprocessing

from mmlrec.distributed.world import process_group
from mmlrec.evaluation.evaluation import ranks_of
from mmlrec.metrics.gather import Collected, PredictionRows, check_each_once
from mmlrec.metrics.report import build_report, report_table
from mmlrec.schema import Scenario, Task
from preprocessing.dataset import natural

_TASKS = [Task(name="click"), Task(name="buy")]
_SCENARIO = Scenario(name="page", values=["home", "cart", "deal", "search"])
_BATCH = 1 << 16


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--rows", type=natural, default=10_000_000, help="of the split, over all processes (default: 1e7)")
    parser.add_argument("--processes", type=natural, default=2, help="default: 2")
    parser.add_argument("--groups", type=natural, default=1_000_000, help="users of all rows (default: 1e6)")
    parser.add_argument("--weights", action="store_true", help="rows have weights")
    arguments = parser.parse_args()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(_measure, (arguments, port), nprocs=arguments.processes)


def _measure(rank: int, arguments: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    size = arguments.processes
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group() as world:
        before = _resident()
        started = time.perf_counter()
        collected = Collected(-(-arguments.rows // (size * _BATCH)) * _BATCH)
        for batch in _batches(rank, arguments):
            collected.add(batch)
        rows = collected.rows()
        del collected
        drawn, kept = time.perf_counter(), _resident()
        ranks = ranks_of(world)
        check_each_once(rows.row, ranks)
        rows = replace(rows, row=np.empty(0, np.int64))
        report = build_report(rows, tasks=_TASKS, scenario=_SCENARIO, ranks=ranks)
        seconds = time.perf_counter() - drawn
        found = world.gather((len(rows.group), drawn - started, seconds, before, kept, _resident()))
        if world.is_main:
            print(report_table(report))
            for number, (num_rows, drawing, reporting, *gib) in enumerate(found):
                print(
                    f"rank {number}: {num_rows:,} rows; drawn in {drawing:.0f} s, report in {reporting:.0f} s;"
                    f" resident GiB: at first {gib[0]:.2f}, with rows {gib[1]:.2f}, at most {gib[2]:.2f}"
                )


def _batches(rank: int, arguments: argparse.Namespace) -> Iterator[PredictionRows]:
    generator = torch.Generator().manual_seed(rank)
    rows = arguments.rows
    for start in range(_BATCH * rank, rows, _BATCH * arguments.processes):
        row = torch.arange(start, min(start + _BATCH, rows))
        labels = (torch.rand(len(row), 2, generator=generator) < torch.tensor([0.3, 0.05])).float()
        yield PredictionRows.from_batch(
            torch.randn(len(row), 2, generator=generator) + labels,
            labels=labels,
            mask=torch.ones(len(row), 2),
            scenario=torch.randint(0, 4, (len(row),), generator=generator),
            weight=torch.rand(len(row), generator=generator) if arguments.weights else torch.ones(len(row)),
            group=torch.randint(0, arguments.groups, (len(row),), generator=generator),
            row=row,
            valid=torch.ones(len(row), dtype=torch.bool),
        )


def _resident() -> float:
    """GiB at most, up to now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
