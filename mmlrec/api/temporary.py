"""Folders that go with the object that holds them."""

from __future__ import annotations

import os
import weakref

from mmlrec.storage.scratch import ScratchFolder


class TemporaryFolder:
    """A new folder below the machine's folder for temporary files (TMPDIR); deleted with this object, or when Python ends."""

    def __init__(self, name: str) -> None:
        scratch = ScratchFolder(name)
        self.path = scratch.path
        weakref.finalize(self, _delete, scratch, os.getpid())


def _delete(scratch: ScratchFolder, maker: int) -> None:
    """Not in a process that was forked from the one that made it, and ends before it."""
    if os.getpid() == maker:
        scratch.delete()
