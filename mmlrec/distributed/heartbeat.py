"""Which rank does not answer: every rank tells the store of its process group how far it is, as long as it runs.

A collective waits for all ranks, and when one hangs, the error of those that wait names a socket. So each rank has a thread
that writes a line to the store each second, its beat, and reads that of the next rank. A process that is stopped, or whose
node is dead, beats no more: after the timeout its neighbour says so, and ends. A process whose main thread alone hangs beats
on; there the collective of the others runs out of time, and the beats tell which rank is behind.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mmlrec.distributed.step_parts import StepParts
from mmlrec.errors import RankError

T = TypeVar("T")

#: Longest wait for an answer of the store itself, in seconds: rank 0 hosts it where torchrun does not, and may be the one.
_STORE_TIMEOUT = 5.0


class Heartbeat:
    """What a rank tells of itself, and what it knows of the others.

    Args:
        store: of the process group.
        timeout: seconds after which a rank that does not answer is taken for lost.
        told: whether another rank tells the user already, asked by way of the store that it is given.
        parts: tells whether this rank is in a collective.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout: float,
        told: Callable[[dist.Store], bool],
        parts: StepParts,
    ) -> None:
        self._rank, self._world_size, self._timeout, self._told, self._parts = rank, world_size, timeout, told, parts
        self._interval = min(1.0, timeout / 4)
        self._step, self._doing, self._points, self._beats = 0, "starting", 0, 0
        self._since, self._told_step = time.time(), 0
        self._ended, self._cut_off = threading.Event(), False
        self._thread: threading.Thread | None = None
        if world_size > 1:
            # A connection of its own: one that waits for an answer keeps others from asking.
            self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
            self._beat()

    def at(self, doing: str, step: int | None = None) -> None:
        """Note what the main thread does now: one more point that all ranks pass in the same order.

        Args:
            step: training steps taken; as before when None.
        """
        if doing != self._doing:
            self._since = time.time()
        self._doing, self._points = doing, self._points + 1
        if step is not None:
            self._step = step

    def start(self) -> None:
        """Beat, and watch the next rank, in a thread."""
        if self._world_size > 1:
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End in order: whoever watches this rank is told. Once; then the store, and its host, may end, too."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._thread is not None and not self._cut_off:
            self._thread.join(timeout=2 * self._interval)
            _within(_STORE_TIMEOUT, lambda: self._beat(ended=True), None)

    def where(self) -> str:
        """What this rank does, since when, and which rank the others wait for; steps are counted since the last call.

        Takes some beats, to see who has moved meanwhile.
        """
        done, self._told_step = self._step - self._told_step, self._step
        since = time.strftime("%H:%M:%S", time.localtime(self._since))
        place = f"{self._doing} since {since} ({time.time() - self._since:.0f} s), at step {self._step}"
        if done:
            place = f"{done} steps since the last such line; {place}"
        return place + self._waits_for()

    def _waits_for(self) -> str:
        if self._world_size == 1:
            return ""
        first = _within(_STORE_TIMEOUT, self._read, None)
        self._ended.wait(3 * self._interval)
        second = _within(_STORE_TIMEOUT, self._read, None)
        if first is None or second is None:
            return ""
        still = {rank: beat for rank, beat in second.items() if beat["points"] == first[rank]["points"]}
        waiting = [rank for rank, beat in still.items() if beat["waiting"] and first[rank]["waiting"]]
        behind = {rank: beat for rank, beat in still.items() if not beat["waiting"] and not first[rank]["waiting"]}
        if not waiting or not behind:
            return ""
        if list(behind) == [self._rank]:
            return "; the other ranks wait for this one"
        longest = max(time.time() - beat["since"] for beat in behind.values())
        return f"; {len(waiting)} of {self._world_size} ranks wait for {_names(behind)}: {_places(behind)} for {longest:.0f} s"

    def lost(self) -> RankError:
        """The error to raise when a collective ran out of time: names the ranks that did not come to it.

        Takes some beats, to see who has none.
        """
        message = self._who_is_missing()
        error = RankError(message)
        error.told = self.told(message)
        return error

    def told(self, message: str) -> bool:
        """Whether another rank tells the user that `message`, or one like it.

        Where nobody can be asked, rank 1 tells: rank 0 hosts the store, and hangs. But where not even its host answers, this
        one is the one that is lost, perhaps. Then it says the same, and does not call it an error.
        """
        answer = _within(_STORE_TIMEOUT, lambda: self._told(self._store), None)
        if answer is not None:
            return answer
        known, self._cut_off = self._cut_off, not reachable(f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
        if self._cut_off and not known and os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"cut off: {message}\n")
            sys.stderr.flush()
        return self._cut_off or self._rank != 1

    def _beat(self, ended: bool = False) -> None:
        self._beats += 1
        content = {
            "beat": self._beats,
            "points": self._points,
            "step": self._step,
            "doing": self._doing,
            "since": self._since,
            "waiting": self._parts.waiting,
            "process": f"process {os.getpid()} on {socket.gethostname()}",
            "ended": ended,
        }
        self._store.set(_key(self._rank), json.dumps(content))

    def _run(self) -> None:
        watched = (self._rank + 1) % self._world_size
        newest, silent, before = "", 0.0, time.monotonic()
        while not self._ended.wait(self._interval):
            try:
                self._beat()
                found = self._store.get(_key(watched)).decode()
            except RuntimeError:
                return  # Without the store there is nobody to ask. A collective that fails tells the main thread.
            now = time.monotonic()
            # This process may have stood still itself: what it did not see does not count.
            silent = 0.0 if found != newest else silent + min(now - before, 2 * self._interval)
            newest, before = found, now
            beat = json.loads(found)
            if silent > self._timeout and not beat["ended"]:
                self._end(self._not_answering({watched: beat}))

    def _end(self, message: str) -> None:
        """End this process from its thread: the main one waits for the rank that is lost, and cannot be woken."""
        if not self.told(message):
            sys.stderr.write(f"error: {message}\n")
            sys.stderr.flush()
        elif self._ended.wait(10):
            return  # The main thread has got an error, and tells it, or another rank does.
        os._exit(RankError.exit_code)

    def _who_is_missing(self) -> str:
        first = _within(_STORE_TIMEOUT, self._read, None)
        second = None
        if first is not None:
            time.sleep(3 * self._interval)
            second = _within(_STORE_TIMEOUT, self._read, None)
        if first is None or second is None:
            return (
                f"rank 0, which keeps the ranks together, has not answered for {self._timeout:g} s (training.timeout);"
                f" rank {self._rank} waited for it at step {self._step}, {self._doing}. {_REMEDY}"
            )
        alive = {rank: beat for rank, beat in second.items() if not beat["ended"]}
        silent = {rank: beat for rank, beat in alive.items() if beat["beat"] == first[rank]["beat"] and rank != self._rank}
        if silent:
            return self._not_answering(silent)
        fewest = min(beat["points"] for beat in alive.values())
        behind = {rank: beat for rank, beat in alive.items() if beat["points"] == fewest}
        return (
            f"{_names(behind)} did not come to the others within {self._timeout:g} s (training.timeout): {_places(behind)};"
            f" rank {self._rank} waited at step {self._step}, {self._doing}. {_REMEDY}"
        )

    def _not_answering(self, silent: dict[int, dict[str, Any]]) -> str:
        return (
            f"{_names(silent)} has not answered for {self._timeout:g} s (training.timeout), last heard of {_places(silent)};"
            f" rank {self._rank} waited for it at step {self._step}, {self._doing}. {_REMEDY}"
        )

    def _read(self) -> dict[int, dict[str, Any]]:
        found = self._store.multi_get([_key(rank) for rank in range(self._world_size)])
        return {rank: json.loads(content.decode()) for rank, content in enumerate(found)}


_REMEDY = (
    "It is stopped, hangs, or its node is gone."
    " End what is left of it and run the same command again to continue from the newest checkpoint."
)


def _key(rank: int) -> str:
    return f"mmlrec/beat/{rank}"


def _names(beats: dict[int, dict[str, Any]]) -> str:
    shown = [f"rank {rank} ({beat['process']})" for rank, beat in list(beats.items())[:4]]
    return ", ".join(shown) + (f" and {len(beats) - 4} more" if len(beats) > 4 else "")


def _places(beats: dict[int, dict[str, Any]]) -> str:
    return ", ".join(sorted({f"at step {beat['step']}, {beat['doing']}" for beat in beats.values()}))


def _within(seconds: float, call: Callable[[], T], otherwise: T) -> T:
    """What `call` returns, or `otherwise` when it fails or does not return in time."""
    found = [otherwise]

    def run() -> None:
        try:
            found[0] = call()
        except RuntimeError:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something of which other processes decide is so, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def reachable(address: str) -> bool:
    """Whether the host of `host:port` answers, if only to say that nobody listens there. True where no port is known."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or port == "0":
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), _STORE_TIMEOUT).close()
    except ConnectionError:
        return True
    except OSError:
        return False
    return True
