"""Folders of this machine for as long as a process needs them. Those of killed processes go when the next one makes its own."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_NEW = "mmlrec-new-"


class ScratchFolder:
    """A new folder below the machine's folder for temporary files (TMPDIR), which goes at the end of `with`, or by `delete`.

    This process holds a lock on it (flock), which the kernel frees however the process ends: so the folders of this user that
    bear the same name and that nobody holds are left behind, and are deleted.

    Args:
        name: what it is for, one word.

    Attributes:
        path: the folder, which only this user can read.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, name: str) -> None:
        prefix = f"mmlrec-{name}-{os.geteuid()}-"
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            with suppress(OSError):
                if left.lstat().st_uid == os.geteuid():
                    descriptor = _locked(left)
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(descriptor)
        new = Path(tempfile.mkdtemp(prefix=_NEW))  # it bears the name when it is locked
        self._lock: int | None = None
        with suppress(OSError):  # where there are no locks, none is taken for left behind
            self._lock = _locked(new)
        self.path = new.rename(new.with_name(prefix + new.name.removeprefix(_NEW)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.delete()

    def delete(self) -> None:
        """Delete the folder with all that it holds, as far as that can be done."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def keep(self) -> None:
        """Leave the folder to the user, under another name (`path`); nothing where it is gone by now."""
        with suppress(OSError):
            self.path = self.path.rename(self.path.with_name(self.path.name.replace("mmlrec-", "mmlrec-kept-", 1)))
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(folder: Path) -> int:
    """Descriptor of a folder that this process holds now. Raises OSError when another one does, or there are no locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
