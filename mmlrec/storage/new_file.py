"""A large file that comes into being at once: written beside its place, then renamed. What a killed process left of it goes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mmlrec.storage.places import Place, put_file
from mmlrec.storage.scratch import ScratchFolder


@contextlib.contextmanager
def new_file(out: Place, start: str) -> Iterator[Path]:
    """A file of this machine to write, which takes the place of `out` at a clean exit; otherwise nothing is left of it.

    It is made beside `out`, or where that is an address in the machine's folder for temporary files. This process holds a lock
    on it (flock), so what others have left that were killed is known by nobody's holding it, and is deleted.

    Args:
        start: `World.start`: another process may write the same output, and the last one wins.

    Raises:
        OSError: it cannot be written.
        StorageError: the store cannot be reached, or refuses.
    """
    if not isinstance(out, Path):
        with ScratchFolder("file") as scratch:
            yield scratch.path / out.name
            put_file(scratch.path / out.name, out)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    of_start = re.compile(re.escape(out.name) + r"\.[0-9a-f]{12}\.tmp")
    for left in [path for path in out.parent.iterdir() if of_start.fullmatch(path.name)]:
        _delete_if_left(left)
    temporary = out.with_name(f"{out.name}.{start}.tmp")
    lock = _made(temporary)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def _made(path: Path) -> int:
    """Descriptor of a new file that this process holds."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):  # where there are no locks, nothing is taken for left behind
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # deleted, as left behind, before it was held
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _delete_if_left(path: Path) -> None:
    with contextlib.suppress(OSError):  # held, of somebody else, or gone
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)
