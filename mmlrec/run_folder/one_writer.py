"""One writer at a time: a run folder is held while a run lives, by a lock on a file system, by a lease on object storage."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from mmlrec.distributed.world import World
from mmlrec.errors import UserError
from mmlrec.run_folder.lease import Lease
from mmlrec.run_folder.lock import Lock
from mmlrec.storage.places import Place

#: Environment variable of a job's id -> its words.
_JOBS = {"SLURM_JOB_ID": "Slurm job", "TORCHX_JOB_ID": "job"}


class Holder(Protocol):
    """What keeps other runs out of one folder; the part of this process in it."""

    def take(self, content: dict[str, Any]) -> bool:
        """On rank 0: keep all other runs out, and write who holds the folder; False where nobody can write.

        Raises:
            UserError: another run holds it, or the folder cannot be made or written.
        """

    def join(self, start: str, rank: int) -> bool:
        """On the other ranks: False when this host does not see what rank 0 of this start has written."""

    def lost(self) -> UserError | None:
        """What to say where the folder is not held any more."""

    def leave(self) -> None:
        """Free it. What `take` has made is removed unless there is more in it by now."""


@contextlib.contextmanager
def hold(folder: Place, world: World) -> Iterator[Holder]:
    """Keep every other run out of a run folder; it is made where it is absent, and removed if nothing was put in.

    On a file system every rank holds its part of the lock: the folder is free only when the last one has ended. On object
    storage rank 0 holds a lease. Where the file system has no locks, or keeps them to this host, or the store does not honour
    conditional puts, a warning says so. A folder that cannot be written needs no lock.

    Raises:
        UserError: another run writes there, the folder cannot be written, or not every rank sees it.
    """
    holder: Holder = Lock(folder) if isinstance(folder, Path) else Lease(folder)
    ranks = world.gather((socket.gethostname(), os.getpid()))
    error, writable = None, True
    try:
        if world.is_main:
            try:
                writable = holder.take({"start": world.start, "since": _now(), "job": _job(), "ranks": ranks})
            except UserError as cause:
                error = cause
        # Rank 0 may watch another run's lease for longer than the ranks of a short `training.timeout` wait.
        world.without_limit().raise_together(error)
        if world.from_main(writable):
            seen = world.is_main or holder.join(world.start, world.rank)
            _check_shared(folder, world.gather((seen, str(folder.absolute()))), ranks)
        yield holder
    finally:
        holder.leave()


def _check_shared(folder: Place, seen: list[tuple[bool, str]], ranks: list[tuple[str, int]]) -> None:
    blind = [f"rank {rank} on {ranks[rank][0]} ({path})" for rank, (sees, path) in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"{folder}: not all ranks share this run folder: what rank 0 on {ranks[0][0]} ({seen[0][1]}) has written there is"
            f" not seen by {', '.join(blind)}. Each rank writes its part of a checkpoint there: give --run-dir a folder that"
            " all hosts mount, under the same path."
        )


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _job() -> str | None:
    return next((f"{words} {os.environ[name]}" for name, words in _JOBS.items() if os.environ.get(name)), None)
