"""Process group, device, seeds, and a logger that speaks on rank 0 only."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from mmlrec.errors import UserAdvice, UserError
from mmlrec.heartbeat import Heartbeat, LostRank

logger = logging.getLogger("mmlrec")

#: Longest wait in a collective, in seconds, unless told. A rank that is stuck longer is taken for lost.
TIMEOUT = 600.0


@dataclass(frozen=True)
class World:
    """Who and where this process is.

    Attributes:
        control: a gloo group for small CPU collectives (flags, gathered predictions), on every device.
        heartbeat: tells the other ranks how far this one is.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup
    heartbeat: Heartbeat | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone logs and writes files."""
        return self.rank == 0

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

    def raise_together(self, error: UserError | None) -> None:
        """Raise on every rank when one rank has an error, so that none is left waiting in a collective."""
        for found in self.gather(error):
            if found is not None:
                raise found


@contextlib.contextmanager
def process_group(timeout: float = TIMEOUT) -> Iterator[World]:
    """Join the process group that torchrun describes, or a group of one, and leave it at the end.

    NCCL when there is a GPU, gloo otherwise.

    Args:
        timeout: longest wait in a collective of this group and of every other, in seconds (`training.timeout`).

    Raises:
        LostRank: a rank did not come to a collective in time.
    """
    quiet_libraries()
    keep_freed_memory()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
            raise UserError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes on this node but {torch.cuda.device_count()} GPUs:"
                " start torchrun with --nproc-per-node set to the number of GPUs."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store: dist.Store = dist.HashStore()
    if "RANK" in os.environ:
        with _joining(rank, world_size, timeout):
            store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    backend = "nccl" if device.type == "cuda" else "gloo"
    heartbeat = Heartbeat(store, rank, world_size, timeout, partial(_told_already, world_size=world_size))
    before = _set_default_timeouts(timedelta(seconds=timeout), timedelta(seconds=timeout))
    with _joining(rank, world_size, timeout):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    hangs = False
    try:
        control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")
        assert control is not None
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        configure_logging(rank)
        heartbeat.start()
        yield World(rank, world_size, local_world_size, device, control, heartbeat)
    except UserError as error:
        error.told = _told_already(store, world_size)
        raise
    except RuntimeError as error:
        if world_size > 1 and _TIMED_OUT.search(str(error)):
            hangs = True
            raise heartbeat.lost() from None
        if world_size == 1 or not _PEER_GONE.search(str(error)):
            raise
        time.sleep(2)  # a peer that failed with a message of its own tells it first
        lost = UserError(
            "another rank of this run ended without a message: killed, or out of memory."
            " Run the same command again to continue from the newest checkpoint."
        )
        lost.told = _told_already(store, world_size)
        raise lost from None
    finally:
        heartbeat.stop()
        _set_default_timeouts(*before)
        # Without this a finished gloo process may abort in its destructors. With a rank that hangs it would wait once more.
        if not hangs:
            dist.destroy_process_group()


@contextlib.contextmanager
def _joining(rank: int, world_size: int, timeout: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _TIMED_OUT.search(str(error)):
            raise
        lost = LostRank(
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


#: What gloo and the store say when a rank did not come in time.
_TIMED_OUT = re.compile("tim(ed|e) ?out", re.IGNORECASE)

#: What gloo and NCCL say when the process on the other side of a collective is gone.
_PEER_GONE = re.compile("closed by peer|reset by peer|Broken pipe|Connection refused|remote process|NCCL", re.IGNORECASE)


def _told_already(store: dist.Store, world_size: int) -> bool:
    """False on the first rank that fails, which tells the user; True on the others, which leave it time to."""
    if world_size == 1:
        return False
    try:
        told = store.add("mmlrec/failed", 1) > 1
    except RuntimeError:
        return False
    if told:
        time.sleep(2)
    return told


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
    """Log to standard error on rank 0, debug messages to the run's log file only; elsewhere only warnings."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.DEBUG if rank == 0 else logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    # A filter, not a level: the progress bar's own handler takes over filters only.
    handler.addFilter(lambda record: record.levelno >= logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    warnings.showwarning = partial(_show_warning, rank)


def _show_warning(rank: int, message: Warning | str, category: type[Warning], filename: str, lineno: int, *others: Any) -> None:
    if not issubclass(category, UserAdvice):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
    elif rank == 0:
        logger.warning("note: %s", message)


@contextlib.contextmanager
def log_file(path: Path, world: World) -> Iterator[None]:
    """Append the log, debug messages included, to a file; on rank 0."""
    if not world.is_main:
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


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
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("torchrec", "torch.distributed", "torch.distributed.checkpoint", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
