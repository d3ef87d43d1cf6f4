"""Saves the checkpoints of a run: in a thread where that is wanted, again where it fails, without waiting for deletions.

Ranks meet for this in a group of their own, in which no wait is cut short: a disk may be slow. All of them find out alike
whether a checkpoint became whole; what to do about one that did not is decided where all of them pass, in `wait`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from mmlrec.distributed.step_parts import CHECKPOINT, WAITING
from mmlrec.distributed.world import World, logger
from mmlrec.errors import CheckpointError, UserError
from mmlrec.run_folder import checkpoint, whole
from mmlrec.run_folder.parts import Parts
from mmlrec.storage.places import Place

#: Pauses after attempts that failed, in seconds; the last attempt is followed by none.
RETRY_AFTER_S = (1.0, 4.0, 16.0)
#: While a checkpoint takes its time, this often a line says so, in seconds.
_SAY_EVERY_S = 120.0


@dataclass
class _Job:
    folder: Place
    parts: Parts
    state: dict[str, Any]
    #: What is to happen on rank 0 once the checkpoint is whole.
    then: Callable[[], None]
    #: It is written later, then, where it could not be written: nothing takes its place.
    indispensable: bool


class Saver:
    """Saves checkpoints of one run. All ranks call the same methods in the same order.

    Leaving its context waits for what is being saved and deleted: as long as it takes, or after an error of this rank alone
    only so long that the others are not kept from hearing of it.

    Args:
        lost: why this run may not write in its folder any more, if so.
        before: what is to happen on rank 0 before a checkpoint takes its place.
        background: write in a thread while training goes on. The tensors are copied first, into buffers that stay.
        most_failures: checkpoints in a row that may fail, each after several attempts, before `wait` raises.
        longest_wait: in seconds for a checkpoint after an error of this rank.
    """

    def __init__(
        self,
        world: World,
        lost: Callable[[], UserError | None],
        *,
        before: Callable[[], None] = lambda: None,
        background: bool,
        most_failures: int,
        longest_wait: float,
    ) -> None:
        self._world, self._lost, self._before, self._background = world, lost, before, background
        self._most_failures, self._longest_wait = most_failures, longest_wait
        self._parts: dict[frozenset[str], Parts] = {}
        self._buffers: dict[MetadataIndex, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._job: _Job | None = None
        self._error: BaseException | None = None
        self._own_seconds = 0.0  # of the thread's work
        self._pending: list[_Job] = []
        self._failures = 0
        self._told = False
        self._deletions: queue.SimpleQueue[Place | None] = queue.SimpleQueue()
        self._deleting: threading.Thread | None = None
        #: The newest checkpoint of a step that is known to be whole.
        self.newest: Place | None = None
        #: Bytes of the tensors of the newest checkpoint.
        self.num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
            if self._deleting is not None:
                self._deletions.put(None)
                self._deleting.join()
        elif self._thread is not None:
            # A rank that is lost takes the thread with it; where all ranks have this error, the checkpoint is worth a wait.
            self._thread.join(self._longest_wait if isinstance(error, UserError | OSError) else 1.0)
            if isinstance(self._error, CheckpointError) and self._world.is_main:
                logger.warning("note: %s", self._error)

    def has(self, folder: Place) -> bool:
        """Whether the checkpoint of a step is the newest whole one, or is being written."""
        return folder in (self.newest, None if self._job is None else self._job.folder)

    def save(
        self,
        folder: Place,
        tensors: Mapping[str, Any],
        state: dict[str, Any],
        then: Callable[[], None],
        *,
        must: bool = False,
        indispensable: bool = False,
    ) -> None:
        """Save a checkpoint: begin to where that is done in the background, after the one before has come to its end.

        Args:
            then: what is to happen on rank 0 once it is whole.
            must: wait for it, and raise where it cannot be written.
            indispensable: where it cannot be written it is kept in memory, and written before the next one.

        Raises:
            CheckpointError: it must be written but cannot be, or too many in a row could not.
            UserError: what `lost` returns.
        """
        if self._thread is not None and self._thread.is_alive() and self._world.is_main and not self._told and not must:
            self._told = True
            logger.warning("note: %s is due while the checkpoint before is still being written; training waits.", folder)
        self.wait()
        self._pending = [job for job in self._pending if job.folder != folder]
        # The best has weights alone: another plan.
        kind = frozenset(key.partition(".")[0] for key in tensors)
        parts = self._parts[kind] = Parts(tensors, self._world.without_limit(), self._parts.get(kind))
        self.num_bytes = parts.num_bytes
        if self._background and not must:
            parts.copy(self._buffers)
        self._start(_Job(folder, parts, state, then, indispensable))
        if must or not self._background:
            self.wait(must=must)

    def finish(self) -> None:
        """Wait until all that was to be saved is whole.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.wait()
        if self._pending:
            self._start(None)
            self.wait(must=True)

    def wait(self, *, must: bool = False) -> None:
        """Wait for the checkpoint that is being written.

        Args:
            must: raise where it cannot be written.

        Raises:
            CheckpointError: it must be written but cannot be, or too many in a row could not.
            UserError: what `lost` returns.
        """
        if self._thread is None:
            return
        self._world.at("saving a checkpoint")
        begun = time.perf_counter()
        with self._world.parts.of(CHECKPOINT):
            while self._thread.is_alive():
                self._thread.join(_SAY_EVERY_S)
                if self._thread.is_alive() and self._world.is_main:
                    logger.info("a checkpoint is still being written; training waits for it")
        self._thread = None
        # What this rank had no work of its own for, it waited for others.
        waited = max(0.0, time.perf_counter() - begun - self._own_seconds)
        self._world.parts.move(waited, CHECKPOINT, WAITING)
        job, self._job = self._job, None
        error, self._error = self._error, None
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        # Rank 0 has done a little more.
        self._world.without_limit().barrier()
        if error is None:
            self._failures = 0
            return
        self._failures += 1
        if must:
            raise error
        if self._failures >= self._most_failures:
            last = CheckpointError(
                f"{error} It is number {self._failures} in a row that could not be written (training.max_failed_checkpoints)."
            )
            last.exit_code = error.exit_code
            raise last
        if job is not None and job.indispensable:
            if not job.parts.copied:
                job.parts.copy({})
            elif self._background:
                self._buffers = {}  # the copies are this job's now
            self._pending.append(job)
        if self._world.is_main:
            logger.warning(
                "note: %s The run goes on, its newest checkpoint is %s; it ends when %d in a row fail, and this is number %d.",
                error,
                "none" if self.newest is None else self.newest.name,
                self._most_failures,
                self._failures,
            )

    def then(self, action: Callable[[], None]) -> None:
        """On rank 0, once what is being saved is whole: note something beside it, or take something away."""
        self.wait()
        self._do(action)
        self._world.without_limit().barrier()

    def delete(self, folder: Place) -> None:
        """Delete a folder in a thread of its own: nobody waits for it."""
        if self._deleting is None:
            self._deleting = threading.Thread(target=self._run_deletions, name="deletions", daemon=True)
            self._deleting.start()
        self._deletions.put(folder)

    def _start(self, job: _Job | None) -> None:
        self._job = job
        jobs = [*self._pending, *([] if job is None else [job])]
        self._thread = threading.Thread(target=self._run, args=(jobs,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, jobs: list[_Job]) -> None:
        begun = time.perf_counter()
        try:
            if self._world.device.type == "cuda":
                torch.cuda.set_device(self._world.device)
            for job in jobs:
                self._write(job)
                if job in self._pending:
                    self._pending.remove(job)
                if not job.indispensable:
                    self.newest = job.folder
                logger.debug("saved %s", job.folder)
                self._do(job.then)
        except BaseException as error:  # for `wait` to raise
            self._error = error
        self._own_seconds = time.perf_counter() - begun - self._world.parts.waited_in_thread()

    def _write(self, job: _Job) -> None:
        for attempt, pause in enumerate([*RETRY_AFTER_S, None], start=1):
            try:
                checkpoint.write(
                    job.folder, job.parts, job.state, self._world, lost=self._lost, before=self._before, delete=self.delete
                )
                return
            except CheckpointError as error:
                if pause is None:
                    raise
                if self._world.is_main:
                    logger.warning(
                        "note: attempt %d of %d: %s The next one in %g s.", attempt, len(RETRY_AFTER_S) + 1, error, pause
                    )
            time.sleep(pause)

    def _do(self, action: Callable[[], None]) -> None:
        if not self._world.is_main or self._lost() is not None:
            return
        try:
            action()
        except whole.FAILURES as error:
            logger.warning("note: %s; it is found out again, or deleted later.", str(error).rstrip("."))

    def _run_deletions(self) -> None:
        while (folder := self._deletions.get()) is not None:
            whole.delete(folder)
