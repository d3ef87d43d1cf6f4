"""Ranks that fail together: the first one that has something to say says why, and the others end because of it.

What they agree by lies in the store of the process group, as they may not meet any more.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from typing import Any

import torch.distributed as dist

from mmlrec.distributed.heartbeat import Heartbeat, wait_for
from mmlrec.errors import RankError, UserError

#: What gloo and the store say when a rank did not come in time.
_TIMED_OUT = re.compile("tim(ed|e) ?out", re.IGNORECASE)

#: What gloo and NCCL say when the process on the other side of a collective is gone. Of NCCL it is not all that it says: GPUs
#: that cannot reach each other, or have no memory left, are no lost ranks.
_PEER_GONE = re.compile(
    "(closed|reset) by (remote )?peer|Broken pipe|Connection refused|remote process|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)

#: How long a rank that fails waits for the others: one that knows why, until all know that it does; one that does not, for
#: one that does.
_NOTICED_WITHIN_S, _SAID_WITHIN_S = 10.0, 2.0
#: How long rank 0 waits, where a rank hangs, until all others have found that out, too.
_ASKED_WITHIN_S = 5.0
#: In the store: how many ranks have said why they end, how many need the store no more; and, with a rank behind it, which
#: have noticed that one ends.
_SAID, _DONE, _NOTICED = "mmlrec/said", "mmlrec/done", "mmlrec/noticed/"


def timed_out(error: BaseException) -> bool:
    """Whether an error says that a rank did not come in time."""
    return isinstance(error, RuntimeError) and _TIMED_OUT.search(str(error)) is not None


def said_before(store: dist.Store) -> bool:
    """Whether another rank has said already why it ends; counts this one."""
    return store.add(_SAID, 1) > 1


def wait_until_asked(store: dist.Store, world_size: int) -> None:
    """On rank 0, which may hold the store, where a rank hangs: the others ask there whether they are to tell it."""
    with contextlib.suppress(RuntimeError):
        wait_for(lambda: store.add(_SAID, 0) >= world_size - 1, _ASKED_WITHIN_S)


def last_words(error: Exception, store: dist.Store, rank: int, world_size: int, heartbeat: Heartbeat, *, wakes: bool) -> Any:
    """What to end this rank of several with: the exception itself where the user can mend it, else a RankError.

    Its `told` is False on the first rank that has anything to say, which tells it, and True on the others.

    Args:
        wakes: whether the other ranks are to notice at once. Those that wait on a GPU cannot, and NCCL would end this process
            where its connections are closed.
    """
    with contextlib.suppress(ValueError):  # not in the main thread
        # The agent ends the other ranks as soon as one has gone; they have to find out why first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lost_another = isinstance(error, RuntimeError) and _PEER_GONE.search(str(error)) is not None

    def noticed() -> set[int]:
        return {other for other in range(world_size) if store.check([f"{_NOTICED}{other}"])}

    told = False
    try:
        if not lost_another:
            told = said_before(store)
        store.set(f"{_NOTICED}{rank}", "")
        if wakes:
            _hang_up()
        within = _SAID_WITHIN_S if lost_another or not wakes else _NOTICED_WITHIN_S
        wait_for(lambda: len(noticed()) == world_size, within)
        gone = sorted(set(range(world_size)) - noticed())
        if lost_another:
            told = said_before(store)
        heartbeat.stop()  # which needs the store, too: without it the library prints where in its code that was missed
        store.add(_DONE, 1)
        if rank == 0:  # which may hold the store
            wait_for(lambda: store.add(_DONE, 0) >= world_size - len(gone), _SAID_WITHIN_S)
    except RuntimeError:
        gone = [0]
        if lost_another:
            # The store went with rank 0 or its host: the next rank speaks, and the first one of each other host.
            told = not (rank == 1 or os.environ.get("LOCAL_RANK", "0") == "0")
    if told:
        time.sleep(1)  # for the one that tells it, whose end torchrun is to see first
    failure: Any = _lost(gone) if lost_another else _named(error, rank)
    failure.told = told
    return failure


def _lost(gone: list[int]) -> RankError:
    names = f"one of the ranks {', '.join(map(str, gone[:10]))}" if gone else "another rank"
    return RankError(
        f"{f'rank {gone[0]}' if len(gone) == 1 else names} of this run ended without a message: killed, or out of memory."
        " Run the same command again to continue from the newest checkpoint."
    )


def _named(error: Exception, rank: int) -> Exception:
    """The exception itself where the user can mend it, else one with the name of the rank."""
    if isinstance(error, UserError | OSError | ImportError):
        return error
    step = "".join(f" {note}" for note in getattr(error, "__notes__", []) if note.startswith("at step "))
    text = (str(error).splitlines() or [""])[0]
    failure = RankError(f"rank {rank} on {socket.gethostname()} failed{step}: {type(error).__name__}: {text}")
    failure.__cause__ = error
    return failure


def _hang_up() -> None:
    """Close the connections to the other ranks, which then notice at once, but not the one to the store.

    They would close when this process ends, and where it is rank 0 the store ends with it: nobody could read in it any more
    that the cause is told. The process group closes none: tables and network keep it.
    """
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                ports = (connection.getsockname()[1], connection.getpeername()[1])
                if int(os.environ["MASTER_PORT"]) not in ports:
                    connection.shutdown(socket.SHUT_RDWR)
