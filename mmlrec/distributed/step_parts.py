"""Where the time of a rank's steps goes, part by part, without what it waits for other ranks.

Ranks meet in collectives several times a step, inside forward and backward, too. The others of a slow rank wait there, so the
whole time of a part is the same on all of them. Its own time is not: what a rank spends in a collective is a part by itself.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import Work
from torch.autograd.profiler import record_function
from torch.autograd.variable import Variable

DATA = "data wait"
INPUT = "input distribution"
LOOKUP = "lookup"
NETWORK = "network"
LOSS = "loss and balancing"
BACKWARD = "backward with table update"
OPTIMIZER = "dense optimizer"
OTHER = "other"
CHECKPOINT = "checkpoint"
WAITING = "waiting for other ranks"
#: In the order in which they are shown. OTHER is what of a step no other part takes.
PARTS = (DATA, INPUT, LOOKUP, NETWORK, LOSS, BACKWARD, OPTIMIZER, OTHER, CHECKPOINT, WAITING)


class StepParts:
    """Seconds of this rank in each part, of the thread that makes this object.

    A part within another one counts for itself alone. Times are those of the host: on a GPU, of starting the work.

    Attributes:
        seconds: so far, by part.
        annotated: whether parts are marks in the trace of a profiler, too.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.annotated = False
        self._thread = threading.get_ident()
        self._inner = 0.0  # seconds of the parts within the innermost one that is open
        self._current = OTHER
        self._other_thread, self._thread_waits = _Waited(), False

    @property
    def waiting(self) -> bool:
        """Whether this rank is in a collective now, itself or the thread that writes the checkpoint it waits for."""
        return self._current == WAITING or (self._current == CHECKPOINT and self._thread_waits)

    def of(self, part: str, mark: str | None = None) -> _Part:
        """Context manager: what happens within it belongs to a part.

        Args:
            mark: what a trace calls it; as the part unless told.
        """
        return _Part(self, part, mark or part)

    def waited_in_thread(self) -> float:
        """Seconds that the calling thread, another than the one of these parts, has spent in collectives."""
        return self._other_thread.seconds

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count some seconds of a part as such of another one, once it is known whose they were."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens within it counts nowhere."""
        before = dict(self.seconds)
        with self.of(OTHER):
            yield
        self.seconds.update(before)

    @contextlib.contextmanager
    def backward_of(self, loss: Tensor) -> Iterator[None]:
        """The backward of a loss: DistributedDataParallel waits for the others in C++, once all gradients are there."""
        wait, begun = self.of(WAITING), []

        def begin() -> None:
            if threading.get_ident() == self._thread:
                wait.__enter__()
                begun.append(True)

        # A callback from the beginning of the backward is called at its end before those that come later, such as the wait.
        loss.register_hook(lambda _: Variable._execution_engine.queue_callback(begin))
        with self.of(BACKWARD):
            try:
                yield
            finally:
                if begun:
                    wait.__exit__(None, None, None)

    @contextlib.contextmanager
    def seeing_waits(self) -> Iterator[None]:
        """Within it, waits in collectives count as such.

        Most of them are in torchrec's own functions, forward and backward: the one place that all pass is the method of torch.
        """
        plain: Callable[..., bool] = Work.wait

        def wait(work: Work, *arguments: Any, **options: Any) -> bool:
            if threading.get_ident() != self._thread:  # a checkpoint that is being written
                begun, self._thread_waits = time.perf_counter(), True
                try:
                    return plain(work, *arguments, **options)
                finally:
                    self._thread_waits = False
                    self._other_thread.seconds += time.perf_counter() - begun
            with self.of(WAITING):
                return plain(work, *arguments, **options)

        Work.wait = wait  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Work.wait = plain  # type: ignore[method-assign]


class _Waited(threading.local):
    """Of each thread."""

    seconds = 0.0


class _Part:
    __slots__ = ("_mark", "_name", "_outer", "_outer_inner", "_parts", "_record", "_start")

    def __init__(self, parts: StepParts, name: str, mark: str) -> None:
        self._parts, self._name, self._mark = parts, name, mark

    def __enter__(self) -> None:
        parts = self._parts
        self._outer, parts._current = parts._current, self._name
        self._outer_inner, parts._inner = parts._inner, 0.0
        self._record = record_function(self._mark) if parts.annotated else None
        self._start = time.perf_counter()
        if self._record is not None:
            self._record.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._record is not None:
            self._record.__exit__(kind, error, trace)
        parts = self._parts
        seconds = time.perf_counter() - self._start
        parts.seconds[self._name] += seconds - parts._inner
        parts._inner = self._outer_inner + seconds
        parts._current = self._outer
