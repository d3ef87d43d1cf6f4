"""One writer at a time where there are no locks: the lease of a run folder on object storage.

The lease is a row of objects, `.lease/1`, `.lease/2`, ...: the one of the highest number counts. A start takes the folder by
creating the next one, which the store lets only one start do (a put with `If-None-Match: *`), and deletes those before it. Its
rank 0 writes its object again every few seconds. A start that finds such an object watches it, by its own clock: one that
changes is of a run that is alive; one that has not changed for its whole length is given up, and the next number is free to be
taken. A run that ends says so in its object. On the machine of the holder nobody has to wait: its process is looked up.

Nothing ends a run that comes back after its lease was taken over, as a process that was stopped does: so it looks for a higher
number before it makes or deletes a checkpoint or puts reports, and ends where there is one.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlrec.distributed.world import logger
from mmlrec.errors import StorageError, UserError
from mmlrec.run_folder.lock import taken
from mmlrec.storage.places import create, names_in, read

if TYPE_CHECKING:
    from upath import UPath

LEASE = ".lease"
#: How long a lease lasts that is not renewed, and how often it is.
LENGTH_S, RENEWED_EVERY_S = 40.0, 8.0
#: How often one that another start holds is looked at.
_LOOKED_AT_EVERY_S = 1.0
#: Where conditional puts are not honoured: how long after its own put a start looks which one was the last.
_SETTLES_WITHIN_S = 2.0


class Lease:
    """Part of this process in the lease of one folder: rank 0 has it, the others see it."""

    def __init__(self, folder: UPath) -> None:
        self._folder = folder
        self._objects = folder / LEASE
        self._content: dict[str, Any] = {}
        #: Number of the object that this process has made; None while it has not.
        self._number: int | None = None
        self._out_of_reach = False
        self._left = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self, content: dict[str, Any]) -> bool:
        """Create the next object of the lease, and renew it from now on, in a thread; always True.

        Raises:
            UserError: another run holds it.
            StorageError: the folder cannot be written.
        """
        self._content = content | {"length": LENGTH_S, "process": _this_process(), "left": False}
        while not self._created_next():
            pass
        self._renewing.start()
        return True

    def join(self, start: str, rank: int) -> bool:
        """Whether this host sees the lease that rank 0 of this start has taken; puts are seen at once."""
        self._content = {"start": start}
        with contextlib.suppress(StorageError):
            return self._is_own(self._newest()[1])
        return False

    def lost(self) -> UserError | None:
        """What to say where another start has taken the lease over, or the folder was deleted. Asks the store.

        None, too, where the store does not answer: what is written next fails as well, and is told.
        """
        with contextlib.suppress(StorageError):
            if not self._is_own(found := self._newest()[1]):
                return _lost(self._folder, found)
        return None

    def leave(self) -> None:
        """Free it; where nothing else was put into the folder, nothing is left of it."""
        if self._number is None:
            return
        self._left.set()
        self._renewing.join()
        with contextlib.suppress(StorageError):
            # Where the store has not been reached of late, it may expire: nobody has to wait here for another refusal.
            if not self._out_of_reach and self._is_own(self._newest()[1]):
                self._put({**self._content, "left": True})
                if names_in(self._folder) == {LEASE}:
                    (self._objects / str(self._number)).unlink()
        self._number = None

    def _created_next(self) -> bool:
        """False where another start was faster."""
        number, holder = self._newest()
        if holder:
            self._wait_until_free(number, holder)
        number += 1
        text = json.dumps(self._content).encode()
        path = self._objects / str(number)
        try:
            create(path, text)
        except FileExistsError:
            # Its own, where the answer to the put was lost, and it was repeated.
            if not self._is_own(_read(path)):
                return False
        else:
            with contextlib.suppress(FileExistsError):
                create(path, text)
                logger.warning(
                    "note: %s: its store does not honour conditional puts (If-None-Match): of two runs that are started there"
                    " at the same moment, both may begin, and one of them ends at its first checkpoint.",
                    self._folder,
                )
                time.sleep(_SETTLES_WITHIN_S)
        # Who was slow may have created one that was there before, and has been deleted since.
        found_number, found = self._newest()
        if found_number != number or not self._is_own(found):
            return False
        self._number = number
        for old in names_in(self._objects):
            if old.isdigit() and int(old) < number:
                (self._objects / old).unlink(missing_ok=True)
        return True

    def _wait_until_free(self, number: int, holder: dict[str, Any]) -> None:
        """Return when its holder has left it, or has let it expire.

        Raises:
            UserError: its holder is alive.
        """
        if holder["left"]:
            return
        here = _is_alive_here(holder["process"])
        if here:
            raise taken(self._folder, holder, [0])
        if here is None:
            logger.info(
                "%s: the run that was started there at %s has not left it. Within %.0f s its lease tells whether it is alive.",
                self._folder,
                holder["since"],
                holder["length"],
            )
            unchanged, before = 0.0, time.monotonic()
            while unchanged < holder["length"]:
                time.sleep(_LOOKED_AT_EVERY_S)
                now = self._newest()
                # This process may have been stopped, or the store out of reach for both: what was not seen does not count.
                moment = time.monotonic()
                unchanged, before = unchanged + min(moment - before, RENEWED_EVERY_S), moment
                if now != (number, holder):
                    if not now[1] or now[1]["left"]:
                        return
                    raise taken(self._folder, now[1], [0])
        logger.info("%s: the run that was started there at %s is dead: its lease is taken over", self._folder, holder["since"])

    def _renew(self) -> None:
        count = 0
        while not self._left.wait(RENEWED_EVERY_S):
            try:
                if not self._is_own(self._newest()[1]):
                    return
                count += 1
                self._put({**self._content, "renewed": count})
                if self._out_of_reach:
                    logger.info("%s: the lease is renewed again", self._folder)
                self._out_of_reach = False
            except StorageError as error:
                if not self._out_of_reach:
                    logger.warning("note: the lease of the run folder cannot be renewed, and is tried on: %s", error)
                self._out_of_reach = True

    def _put(self, content: dict[str, Any]) -> None:
        (self._objects / str(self._number)).write_bytes(json.dumps(content).encode())

    def _is_own(self, content: dict[str, Any]) -> bool:
        return content.get("start") == self._content["start"]

    def _newest(self) -> tuple[int, dict[str, Any]]:
        """Number and content of the object that counts; 0 and nothing where there is none."""
        while numbers := [int(name) for name in names_in(self._objects) if name.isdigit()]:
            number = max(numbers)
            if content := _read(self._objects / str(number)):
                return number, content
        return 0, {}


def _read(path: UPath) -> dict[str, Any]:
    """Content of one object; nothing where it is gone."""
    try:
        return dict(json.loads(read(path)))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}. Delete it when no run writes there.") from error


def _this_process() -> dict[str, Any]:
    """What tells this process from all others, of this machine and of others: numbers are used again."""
    return {"space": _process_space(), "number": os.getpid(), "begun": _begun(os.getpid())}


def _process_space() -> str | None:
    """Where a process number means one process: this boot of this machine, and its namespace. None where that is not known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _begun(number: int) -> str | None:
    """When the kernel started a process, in its own unit; None for one that has ended."""
    try:
        state, *fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _is_alive_here(process: dict[str, Any]) -> bool | None:
    """Whether a process of this machine is alive; None for one that cannot be seen from here."""
    if process["space"] is None or process["space"] != _process_space():
        return None
    return _begun(process["number"]) == process["begun"]


def _lost(folder: UPath, holder: dict[str, Any]) -> UserError:
    if not holder:
        return UserError(f"{folder} was deleted while this run was writing there. It ends, and saves nothing more.")
    host, process = holder["ranks"][0]
    return UserError(
        f"{folder}: another run has taken it over, started at {holder['since']} on {host}, process {process}: this one did not"
        f" renew its lease within {LENGTH_S:.0f} s, as when a process is stopped. It ends, and saves nothing more."
    )
