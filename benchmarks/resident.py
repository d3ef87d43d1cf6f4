"""Training steps on batches that are on the device already, and lookup with update alone: without reader and copies.

python -m benchmarks.resident --config FILE [--config FILE ...] --device cpu [--steps 40] [--rates] [--profiles FOLDER]
                              [key.path=value ...]

Prints what `benchmarks.throughput` and `benchmarks.gpu` ask for: a line of JSON for each configuration, as soon as it is
measured, one after the other in this process.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from apps.cli import Parser, add_overrides, all_imported, run
from benchmarks.throughput import rates, seconds_of, synchronize
from mmlrec.data.batch import Batch
from mmlrec.distributed.step_parts import OTHER
from mmlrec.distributed.world import process_group
from mmlrec.errors import UserError
from mmlrec.paths import local_path
from mmlrec.registry import load
from mmlrec.session.session import Session, build_session

_BATCHES = 8
_WARM_UP = 3
_WINDOWS = 4
_ALONE = 10  # times that the tables alone are timed
_WATCHED = 5  # steps in which waits of the host are counted, and that are profiled


class ResidentSteps:
    """Whole training steps of a session on the same few batches in turn: lookup, network, backward, both optimizers.

    Args:
        batches: of this rank, anywhere; copies on its device are kept.
    """

    def __init__(self, session: Session, batches: Sequence[Batch]) -> None:
        self.session = session
        self.device = session.world.device
        self.batches = [batch.to(self.device) for batch in session.prepare(iter(batches), training=True)]
        self._next = 0
        session.model.train()

    def train(self, steps: int) -> None:
        """Train some steps to their end, on all ranks."""
        first, self._next = self._next, self._next + steps
        feed = (self.batches[number % len(self.batches)] for number in range(first, first + steps))
        while True:
            try:
                with self.session.world.parts.of(OTHER):
                    self.session.pipeline.progress(feed)
            except StopIteration:
                break
        synchronize(self.device)

    def seconds(self, steps: int) -> float:
        """Seconds of one of so many steps. All ranks begin together."""
        self.session.world.barrier()
        start = time.perf_counter()
        self.train(steps)
        return (time.perf_counter() - start) / steps


class TablesAlone:
    """Lookup and update of the tables outside of the pipeline, with what they exchange; nothing can be trained after it."""

    def __init__(self, session: Session, batches: Sequence[Batch]) -> None:
        pipeline = session.pipeline
        if hasattr(pipeline, "detach"):
            pipeline.detach()
        self._tables = get_unwrapped_module(session.model).tables
        self._batches = itertools.cycle([batch.sparse for batch in batches])
        width = sum(self._tables(batches[0].sparse).length_per_key())
        self._gradient: Tensor = 1e-3 * torch.randn(batches[0].num_rows, width, device=session.world.device)

    def __call__(self) -> None:
        """One lookup and one update."""
        self._tables(next(self._batches)).values().backward(self._gradient)


def waits(steps: ResidentSteps) -> dict[str, float] | None:
    """Where the host waits for a GPU, as FILE:LINE, and how often in a step; None on a CPU."""
    if steps.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.train(_WATCHED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return {place: times / _WATCHED for place, times in found.most_common()}


def profiled(steps: ResidentSteps) -> str:
    """Which operators, and which kernels of a GPU, take the time of some steps: the profiler's table."""
    activities, order = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if steps.device.type == "cuda":
        activities, order = [*activities, torch.profiler.ProfilerActivity.CUDA], "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profile:
        steps.train(_WATCHED)
    table = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
    return f"{_WATCHED} steps, waits included\n{table}\n"


def distinct(batch: Batch) -> float:
    """Share of the ids of a batch that are the first of their kind in their feature: of the others rows are in a cache."""
    ids = [batch.sparse[key].values() for key in batch.sparse.keys()]  # noqa: SIM118 (no dict)
    return sum(len(torch.unique(of_feature)) for of_feature in ids) / max(1, sum(len(of_feature) for of_feature in ids))


def measure(session: Session, steps_of_window: int, profile: Path | None = None) -> dict[str, Any]:
    """Train on the first batches of the training order.

    Args:
        profile: file for what `profiled` says.

    Returns:
        batches; step_ms, the median of windows; lookup_update_ms of the tables alone; waits, as of `waits`; distinct_ids, the
        share of the first batch.
    """
    reader = session.reader("train")
    source = reader.epoch(0)
    # The last batch of an epoch may be padded.
    batches = list(itertools.islice(source, max(1, min(_BATCHES, reader.num_rows // session.config.training.batch_size))))
    source.close()
    steps = ResidentSteps(session, batches)
    steps.train(_WARM_UP)
    found = {
        "batches": len(batches),
        "step_ms": 1000 * median(steps.seconds(steps_of_window) for _ in range(_WINDOWS)),
        "waits": waits(steps),
        "distinct_ids": distinct(steps.batches[0]),
    }
    if profile is not None:
        profile.write_text(profiled(steps), encoding="utf-8")
    alone, calls = TablesAlone(session, steps.batches), 3 if steps.device.type == "cuda" else 1
    for _ in range(2):
        alone()
    return found | {"lookup_update_ms": 1000 * median(seconds_of(alone, steps.device, calls) for _ in range(_ALONE))}


def main() -> None:
    """Measure and print."""
    parser = Parser(
        prog="python -m benchmarks.resident", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, action="append", metavar="FILE", help="may be repeated")
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--steps", type=int, default=40, help="of a window (40)")
    parser.add_argument("--rates", action="store_true", help="in a line before all others: the rates of this machine")
    parser.add_argument("--profiles", type=local_path, metavar="FOLDER", help="write a profile of each FILE")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    if len({Path(file).stem for file in arguments.config}) < len(arguments.config):
        parser.error("--config: two files of one name")
    configs = {file: load(file, arguments.overrides) for file in arguments.config}
    if arguments.profiles:
        arguments.profiles.mkdir(parents=True, exist_ok=True)
    all_imported()
    with process_group() as world:
        if world.device.type != arguments.device:
            raise UserError(f"--device {arguments.device}: this process sees {world.device.type} only.")
        if arguments.rates:
            device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
            print(json.dumps({"device": device, "rates": rates(torch.get_num_threads(), arguments.device)}), flush=True)
        failed = []
        for file, config in configs.items():
            name = Path(file).stem
            profile = arguments.profiles / f"{name}.txt" if arguments.profiles else None
            try:
                found = measure(build_session(config, world, for_training=True, source=file), arguments.steps, profile)
                print(json.dumps({"config": name} | found), flush=True)
            except Exception:
                if len(configs) == 1 or world.world_size > 1:  # other ranks would wait for one that goes on
                    raise
                traceback.print_exc()
                failed.append(name)
            gc.collect()  # tables and pipeline hold each other
        if failed:
            raise UserError(f"not measured: {', '.join(failed)}; why stands above.")


if __name__ == "__main__":
    run(main)
