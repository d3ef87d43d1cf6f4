"""Training steps on batches that are on the device already, and lookup with update alone: without reader and copies.

python -m benchmarks.resident --config FILE --device cpu [--steps 40] [key.path=value ...]

Prints what `benchmarks.throughput` asks for, as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from apps.cli import Parser, add_overrides, all_imported, run
from benchmarks.throughput import seconds_of, synchronize
from mmlrec.data.batch import Batch
from mmlrec.distributed.step_parts import OTHER
from mmlrec.distributed.world import process_group
from mmlrec.errors import UserError
from mmlrec.registry import load
from mmlrec.session.session import Session, build_session

_BATCHES = 8
_WARM_UP = 3
_WINDOWS = 4
_ALONE = 10  # times that the tables alone are timed
_WATCHED = 5  # steps in which waits of the host are counted


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


def waits(steps: ResidentSteps) -> float | None:
    """How often the host waits for a GPU in a step; None on a CPU."""
    if steps.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.train(_WATCHED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught) / _WATCHED


def measure(session: Session, steps_of_window: int) -> dict[str, Any]:
    """Train on the first batches of the training order.

    Returns:
        batches; step_ms, the median of windows; lookup_update_ms of the tables alone; waits of the host for a GPU in a step.
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
    }
    alone, calls = TablesAlone(session, steps.batches), 3 if steps.device.type == "cuda" else 1
    for _ in range(2):
        alone()
    return found | {"lookup_update_ms": 1000 * median(seconds_of(alone, steps.device, calls) for _ in range(_ALONE))}


def main() -> None:
    """Measure and print."""
    parser = Parser(
        prog="python -m benchmarks.resident", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--steps", type=int, default=40, help="of a window (40)")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    config = load(arguments.config, arguments.overrides)
    all_imported()
    with process_group() as world:
        if world.device.type != arguments.device:
            raise UserError(f"--device {arguments.device}: this process sees {world.device.type} only.")
        found = measure(build_session(config, world, for_training=True, source=arguments.config), arguments.steps)
        print(json.dumps(found))


if __name__ == "__main__":
    run(main)
