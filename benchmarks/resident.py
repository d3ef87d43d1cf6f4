"""Training steps on batches that are on the device already, and lookup with update alone: without reader and copies."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from mmlrec.data.batch import Batch
from mmlrec.distributed.step_parts import OTHER
from mmlrec.session.session import Session


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call; `calls` are timed together, so that on a GPU their starts overlap as they do in training."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / calls


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
