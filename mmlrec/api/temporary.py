"""Folders that go with the object that holds them."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path


class TemporaryFolder:
    """A new folder below the machine's folder for temporary files (TMPDIR); deleted with this object, or when Python ends."""

    def __init__(self, name: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"mmlrec-{name}-"))
        weakref.finalize(self, _delete, self.path, os.getpid())


def _delete(path: Path, maker: int) -> None:
    """Not in a process that was forked from the one that made it, and ends before it."""
    if os.getpid() == maker:
        shutil.rmtree(path, ignore_errors=True)
