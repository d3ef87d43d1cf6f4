"""A folder of this machine that comes into being at once: built beside its place, then renamed. Never half."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from mmlrec.errors import DataError
from mmlrec.storage.places import Place


@contextmanager
def new_local_folder(out: Path, what: str) -> Iterator[Path]:
    """A temporary folder beside `out`; at a clean exit it takes the place of `out`, otherwise it is removed.

    What a killed process left behind is removed at the start. An old `out` is replaced only when the new one is complete.

    Args:
        what: is written there, for messages.

    Raises:
        DataError: the place cannot be written, the disk is full, or another process is writing there.
    """
    out = out.resolve()
    temporary, old = out.with_name(f".{out.name}.tmp"), out.with_name(f".{out.name}.old")
    with temporary_folder(out, temporary, what):
        _mend(out, old)
        yield temporary
        _sync(temporary)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        _sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def temporary_folder(out: Place, temporary: Path, what: str) -> Iterator[Path]:
    """An empty folder, of this process alone; it is removed in the end, if it is there.

    Args:
        out: for what it is made.
        what: that is, for messages.
    """
    lock, parents = None, absent_parents(temporary)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            lock = None
            raise DataError(f"{out}: another run is writing this {what}. Wait for it, or choose another --out.") from None
        _empty(temporary)
        yield temporary
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        where = "" if isinstance(out, Path) else f" in {temporary.parent}, where it is made (TMPDIR names another folder),"
        raise DataError(
            f"{out}: the {what} cannot be written: {reason}. Free space{where} or choose another --out; nothing was left"
            " behind."
        ) from error
    finally:
        if lock is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
        remove_if_empty(parents)


def absent_parents(path: Path) -> list[Path]:
    """Folders above a path that do not exist yet, the innermost first."""
    return [parent for parent in path.resolve().parents if not parent.exists()]


def remove_if_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as nothing is in them."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _mend(out: Path, old: Path) -> None:
    if old.exists():  # killed between the two renames, or just after them
        if out.exists():
            shutil.rmtree(old)
        else:
            old.rename(out)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    with ThreadPoolExecutor(16) as pool:  # who wait for the disk together: there may be ten thousand vocabularies
        list(pool.map(_sync_file, (path for path in folder.rglob("*") if path.is_file())))
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _sync_folder(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
