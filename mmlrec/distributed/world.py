"""Process group, device, seeds, and the log: rank 0 speaks, each rank writes a file."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import logging.handlers
import os
import socket
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from mmlrec.distributed.heartbeat import Heartbeat
from mmlrec.distributed.last_words import last_words, said_before, timed_out, wait_until_asked
from mmlrec.distributed.sign_of_life import QUIET, signs_of_life
from mmlrec.distributed.step_parts import StepParts
from mmlrec.errors import RankError, UserAdvice, UserError
from mmlrec.terminal import plain

logger = logging.getLogger("mmlrec")

#: Loggers of libraries whose messages no user can act on.
TALKATIVE = (
    *("torchrec", "torch.distributed", "torch.distributed.checkpoint", "torch.fx._symbolic_trace"),
    *("torch.onnx._internal.exporter._registration", "onnxscript"),
)

#: Longest wait in a collective, in seconds, unless told. A rank that is stuck longer is taken for lost.
TIMEOUT = 600.0
_NO_LIMIT = timedelta(days=365)

#: Most bytes of a log file; what is older is kept in one more, `NAME.1`, and then dropped.
_LOG_BYTES = 32 << 20


@dataclass(frozen=True)
class World:
    """Who and where this process is.

    Attributes:
        control: a gloo group for small CPU collectives (flags, gathered predictions), on every device.
        start: a word that no other start of a run has, the same on all ranks.
        heartbeat: tells the other ranks how far this one is.
        storage: a gloo group in which no wait is cut short; None: that of `control` serves.
        parts: where the time of this rank goes.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup
    start: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    heartbeat: Heartbeat | None = None
    storage: dist.ProcessGroup | None = None
    parts: StepParts = field(default_factory=StepParts)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone speaks, and writes the files of the run but checkpoints and logs of the ranks."""
        return self.rank == 0

    def without_limit(self) -> World:
        """The same ranks, meeting in a group of its own, where they wait for each other as long as it takes: for work on files.

        They have met before they begin such work, and one that ends or stops meanwhile is noticed all the same. One thread of a
        process may use it at a time.
        """
        return replace(self, control=self.storage or self.control)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control)

    def at(self, doing: str, step: int | None = None) -> None:
        """Tell the other ranks what this one does now (see `Heartbeat.at`)."""
        if self.heartbeat is not None:
            self.heartbeat.at(doing, step)

    def any(self, flag: bool) -> bool:
        """True on every rank when `flag` is true on at least one."""
        return bool(self.highest(int(flag)))

    def highest(self, number: int) -> int:
        """The largest of the numbers of all ranks, on every rank."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor([number])
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor.item())

    def from_main(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do something on rank 0, while the others wait; what it raises of the user is raised on every rank."""
        error: UserError | None = None
        if self.is_main:
            try:
                work(*arguments)
            except UserError as cause:
                error = cause
        self.raise_together(error)

    def raise_together(self, error: UserError | None) -> None:
        """Raise on every rank when one rank has an error, so that none is left waiting in a collective."""
        for found in self.gather(error):
            if found is not None:
                raise found


@contextlib.contextmanager
def process_group(timeout: float = TIMEOUT, quiet: float = QUIET) -> Iterator[World]:
    """Join the process group that torchrun describes, or a group of one, and leave it at the end.

    NCCL when there is a GPU, gloo otherwise.

    Args:
        timeout: longest wait in a collective of this group and of every other, in seconds (`training.timeout`).
        quiet: longest time in which rank 0 logs nothing, in seconds.

    Raises:
        RankError: a rank failed or was lost, or did not come to a collective in time.
    """
    quiet_libraries()
    keep_freed_memory()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    configure_logging(rank)
    joined: list[Heartbeat] = []

    def where() -> str:
        return joined[0].where() if joined else f"waiting for all of {world_size} ranks to join"

    with signs_of_life(logger, where, quiet) if rank == 0 else contextlib.nullcontext(), _joined(timeout, joined) as world:
        yield world


@contextlib.contextmanager
def _joined(timeout: float, joined: list[Heartbeat]) -> Iterator[World]:
    """See `process_group`; the heartbeat goes into `joined` once all ranks are there."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # By its number among the GPUs that this process sees, which may be its own alone.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store: dist.Store = dist.HashStore()
    if "RANK" in os.environ:
        with _joining(rank, world_size, timeout):
            store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    backend = "nccl" if device.type == "cuda" else "gloo"
    parts = StepParts()
    heartbeat = Heartbeat(store, rank, world_size, timeout, said_before, parts)
    before = _set_default_timeouts(timedelta(seconds=timeout), timedelta(seconds=timeout))
    with _joining(rank, world_size, timeout):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    # Whether this rank takes its leave. NCCL would wait until the others do, too: on an error nobody would hear the cause.
    together = backend == "gloo" or world_size == 1
    try:
        control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")
        assert control is not None
        storage = dist.new_group(backend="gloo")
        distributed_c10d._set_pg_timeout(_NO_LIMIT, storage)
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        start = [uuid.uuid4().hex[:12]]
        if world_size > 1:
            dist.broadcast_object_list(start, src=0, group=control)
        if world_size > 1 and device.type == "cuda":
            _check_own_gpu(device, world_size, control)
        heartbeat.start()
        joined.append(heartbeat)
        with parts.seeing_waits():
            yield World(rank, world_size, local_world_size, device, control, start[0], heartbeat, storage, parts)
        together = True
    except Exception as error:
        if world_size == 1:
            raise
        if timed_out(error):
            together = False
            lost = heartbeat.lost()
            if rank == 0:
                wait_until_asked(store, world_size)
            raise lost from None
        failure = last_words(error, store, rank, world_size, heartbeat, wakes=together)
        raise failure from failure.__cause__
    finally:
        heartbeat.stop()
        _set_default_timeouts(*before)
        # Without this a finished gloo process may abort in its destructors. With a rank that hangs it would wait once more.
        if together:
            dist.destroy_process_group()


def _check_own_gpu(device: torch.device, world_size: int, control: dist.ProcessGroup) -> None:
    """Refuse, on every rank, two ranks on one GPU: NCCL would, in words that name neither."""
    own = str(torch.cuda.get_device_properties(device).uuid)
    found = [own] * world_size
    dist.all_gather_object(found, own, group=control)
    first = {gpu: rank for rank, gpu in reversed(list(enumerate(found)))}
    for rank, gpu in enumerate(found):
        if first[gpu] != rank:
            raise UserError(
                f"ranks {first[gpu]} and {rank} have the same GPU: start as many processes on a node as it has GPUs, with"
                " torchrun --nproc-per-node, and where no torchrun starts them, give each its LOCAL_RANK on its node."
            )


@contextlib.contextmanager
def _joining(rank: int, world_size: int, timeout: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not timed_out(error) and "failed to connect" not in str(error):
            raise
        lost = RankError(
            f"not all of {world_size} ranks have joined within {timeout:g} s (training.timeout); rank {rank} waited for them."
            " Look for the process that did not start, and run the same command again."
        )
        lost.told = rank != 0
        raise lost from None


def _set_default_timeouts(cpu: timedelta, gpu: timedelta | None) -> tuple[timedelta, timedelta | None]:
    """Set the timeouts of groups that are made without one, as TorchRec makes those of a node; returns the former ones."""
    before = distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout
    distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout = cpu, gpu
    return before


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of handing them back to the kernel.

    Every step allocates the same activations of some 10 MiB again. Returned and fetched anew each time, their page faults
    take a tenth (26 fields of width 16) to a sixth (7 fields of width 8) of a CPU step. No effect with other allocators.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30) or libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def configure_logging(rank: int) -> None:
    """Log to standard error on rank 0, debug messages to the log files only; elsewhere only warnings."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    # A filter, not a level: the progress bar's own handler takes over filters only.
    least = logging.INFO if rank == 0 else logging.WARNING
    handler.addFilter(lambda record: record.levelno >= least)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    warnings.showwarning = partial(_show_warning, rank)


def _show_warning(rank: int, message: Warning | str, category: type[Warning], filename: str, lineno: int, *others: Any) -> None:
    if not issubclass(category, UserAdvice):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
    else:
        logger.log(logging.WARNING if rank == 0 else logging.DEBUG, "note: %s", message)


@contextlib.contextmanager
def log_file(path: Path, world: World) -> Iterator[None]:
    """Append this rank's log, debug messages included, to a file of its own; one that cannot be opened is told of."""
    try:
        path.parent.mkdir(exist_ok=True)
        handler = _LogFile(path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8")
    except OSError as error:
        logger.warning("note: %s: %s; the run goes on without it.", path, error.strerror)
        yield
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    place = f"process {os.getpid()} on {socket.gethostname()}"
    logger.debug("rank %d of %d: %s, %s", world.rank, world.world_size, place, world.device)
    try:
        yield
    except BaseException as error:
        logger.debug("ended by %s: %s", type(error).__name__, error, exc_info=not isinstance(error, UserError))
        raise
    finally:
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file of bounded size, plain as it is read at terminals.

    Its disk may be full: that is told once, where the log is shown as well.
    """

    _told = False

    def format(self, record: logging.LogRecord) -> str:
        """As the base class, `plain`: files are shown on terminals, too."""
        return plain(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """See the base class: called while the exception is handled."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            logger.warning("note: %s: %s; the run goes on without it.", self.baseFilename, error.strerror)


def quiet_libraries() -> None:
    """Silence, one by one, the messages of torchrec and fbgemm that no user can act on."""
    for message in (
        ".*ShardedTensor.*",
        ".*broadcast_buffers.*",
        ".*torch.distributed.*is deprecated.*",
        ".*[Ss]et timer.*",
        ".*TypedStorage is deprecated.*",
        ".*HeuristicalStorageReservation.*",
        ".*Grad strides do not match bucket view strides.*",
        ".*_get_pg_default_device.*",  # torchrec 1.6
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
