"""One writer at a time: the lock of a run folder, which ends with the processes that hold it.

Rank r of a run locks byte r of the file `.lock` (fcntl, POSIX record locks). The kernel frees such a lock when its process
ends, however it ends, so nothing is ever left to be removed by hand; and NFS hands it on to the server, so that it holds
between hosts. (An flock is inherited by child processes, which would keep it; its bytes cannot be locked one by one.) A new
run begins by locking all bytes: as long as any rank of a former one lives, that fails.

What stands in the file is for messages, and for the ranks to see whether they share the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from mmlrec.distributed.world import logger
from mmlrec.errors import UserError
from mmlrec.storage.places import Place

LOCK = ".lock"
#: Ranks that outlive their rank 0 are about to notice it; longest wait for their end.
_ORPHANS_END_WITHIN_S = 20.0
#: Longest wait until another host sees what rank 0 has written.
_SEEN_WITHIN_S = 5.0
_TAKEN = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}
#: struct flock of 64-bit Linux: type, whence, start, length, process.
_FLOCK = "hhlli0l"
#: Options of a mount under which fcntl locks stay on this host: of nfs (two versions), lustre, cifs.
_LOCAL_LOCKS = {"nolock", "local_lock=all", "local_lock=posix", "localflock", "nobrl"}


class Lock:
    """Part of this process in the lock of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LOCK
        self._descriptor: int | None = None
        #: Folders that `take` has made, the innermost first.
        self._made: list[Path] = []

    def take(self, content: dict[str, Any]) -> bool:
        """Lock all, write who holds it, and keep byte 0; False where nobody can write.

        Raises:
            UserError: another run holds it, or the folder cannot be made or written.
        """
        if self._folder.is_dir() and not os.access(self._folder, os.W_OK):
            return False
        try:
            self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
            while not self._open_and_lock():
                pass
            assert self._descriptor is not None
            text = json.dumps(content).encode()
            os.pwrite(self._descriptor, text, 0)
            os.ftruncate(self._descriptor, len(text))
            os.fsync(self._descriptor)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        if mount := _keeps_locks_to_itself(self._folder.resolve(), Path("/proc/self/mounts")):
            logger.warning(
                "note: %s: locks on its file system (%s) are not seen by other hosts: nothing tells there that it is taken.",
                self._folder,
                mount,
            )
        return True

    def join(self, start: str, rank: int) -> bool:
        """Lock the byte of a rank other than 0; False when this host does not see what rank 0 of this start has written."""
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while True:
            with contextlib.suppress(OSError):
                self._descriptor = os.open(self._path, os.O_RDWR)
                if _read(self._descriptor).get("start") == start:
                    break
                os.close(self._descriptor)
            self._descriptor = None
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def lost(self) -> UserError | None:
        """What to say where the folder is not the one that was locked any more: it was moved, deleted or replaced."""
        if self._descriptor is None:
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                return None
        return UserError(
            f"{self._folder} was moved, deleted or replaced while this run was writing there. It ends, and saves nothing"
            " more; what it has saved is where its folder is now: to continue from there, give that with --run-dir."
        )

    def leave(self) -> None:
        """Free it; what `take` has made is removed unless there is more in it by now."""
        if self._descriptor is None:
            return
        if self._made and self.lost() is None:
            with contextlib.suppress(OSError):
                if os.listdir(self._folder) == [LOCK]:
                    self._path.unlink()
                    for path in self._made:
                        path.rmdir()
        os.close(self._descriptor)
        self._descriptor = None

    def _open_and_lock(self) -> bool:
        """False when the file was removed by its holder before it was locked here."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # A link in a run folder from elsewhere could name any file.
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            self._lock_all(self._descriptor)
            if os.fstat(self._descriptor).st_ino == os.stat(self._path).st_ino:
                return True
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = None
            raise
        os.close(self._descriptor)
        self._descriptor = None
        return False

    def _lock_all(self, descriptor: int) -> None:
        deadline = None
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.lockf(descriptor, fcntl.LOCK_UN, 0, 1)  # from byte 1 on: for the other ranks of this run
                return
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    logger.warning(
                        "note: %s: its file system has no locks (%s): nothing keeps a second run from writing there.",
                        self._folder,
                        error.strerror,
                    )
                    return
                if error.errno not in _TAKEN:
                    raise
            if _holder(descriptor, 0) is not None:
                if taken_by := self._taken(descriptor):
                    raise taken_by
                continue
            if deadline is None:
                deadline = time.monotonic() + _ORPHANS_END_WITHIN_S
                logger.info("%s: waiting for the last ranks of the run before to end", self._folder)
            if time.monotonic() > deadline:
                content = _read(descriptor)
                ranks = range(1, len(content.get("ranks", [])))
                raise taken(self._folder, content, [rank for rank in ranks if _holder(descriptor, rank) is not None])
            time.sleep(0.1)

    def _taken(self, descriptor: int) -> UserError | None:
        """What to say of a rank 0 that holds the folder; None where it has ended meanwhile."""
        deadline = time.monotonic() + 2
        while (holder := _holder(descriptor, 0)) is not None:
            content = _read(descriptor)
            if _is_of_holder(content, holder) and _holder(descriptor, 0) == holder:
                return taken(self._folder, content, [0])
            # It may have it since a moment ago, and is about to write; what stands there is of the one before.
            if time.monotonic() > deadline:
                return taken(self._folder, {}, [0])
            time.sleep(0.05)
        return None


def taken(folder: Place, holder: dict[str, Any], ranks: list[int]) -> UserError:
    """What to say where another run writes.

    Args:
        holder: what it has written of itself; empty where that is not known.
        ranks: those of its ranks that hold the folder.
    """
    who = "another run"
    if holder:
        names = [f"{host}, process {process}" for host, process in (holder["ranks"][rank] for rank in ranks)]
        which = "" if ranks == [0] else f"rank {' and '.join(map(str, ranks))} of "
        job = f", {holder['job']}" if holder["job"] else ""
        who = f"{which}a run that was started at {holder['since']} on {' and '.join(names)}{job}"
    return UserError(
        f"{folder} is taken: {who} is writing there. Wait for its end or stop it, or choose another folder with --run-dir."
    )


def unwritable(folder: Place, error: OSError) -> UserError:
    """What to say of a run folder that cannot be made or written."""
    remedy = "Free space, or choose another" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Choose another"
    return UserError(f"{folder}: the run folder cannot be written: {error}. {remedy} with --run-dir.")


def _read(descriptor: int) -> dict[str, Any]:
    """What its holder has written; nothing while it is being written."""
    try:
        return dict(json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0)))
    except (ValueError, TypeError):
        return {}


def _holder(descriptor: int, byte: int) -> int | None:
    """The other process that has locked this byte, below 1 where the kernel does not know it; None where none has."""
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind, _, _, _, process = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
    return None if kind == fcntl.F_UNLCK else int(process)


def _is_of_holder(content: dict[str, Any], holder: int) -> bool:
    """False where the file is still empty, or was written on this host by another process than has locked its first byte."""
    if not content:
        return False
    host, process = content["ranks"][0]
    return bool(host != socket.gethostname() or holder < 1 or holder == process)


def _keeps_locks_to_itself(folder: Path, mounts: Path) -> str | None:
    """Kind and options of a mount whose locks other hosts do not see; None for others.

    Args:
        mounts: a file in the form of /proc/self/mounts.
    """
    try:
        lines = mounts.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found, longest = None, -1
    for line in lines:
        _, encoded, kind, options, *_ = line.split(" ")
        point = encoded.replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= longest:
            local = _LOCAL_LOCKS & set(options.split(","))
            found, longest = f"{kind}, {' '.join(sorted(local))}" if local else None, len(point)
    return found
