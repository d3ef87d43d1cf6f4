"""Folders that go with the object that holds them."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path


class TemporaryFolder:
    """A new folder below the machine's folder for temporary files (TMPDIR); deleted with this object, or when Python ends."""

    def __init__(self, name: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"mmlrec-{name}-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
