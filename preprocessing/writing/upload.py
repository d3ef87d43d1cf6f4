"""A dataset on an object store, which has no rename: the manifest is written last, and what has none is no dataset.

While one is written, an object says so (`MARK`). By it the next attempt knows that one was killed, and replaces all that
lies at the address.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from mmlrec.errors import DataError, StorageError
from mmlrec.schema import MANIFEST
from mmlrec.storage.places import objects_below, put_file, read
from preprocessing.progress import progress

if TYPE_CHECKING:
    from upath import UPath

MARK = "being-written"
_FILES_AT_A_TIME = 4


def staging_folder(out: UPath) -> Path:
    """Where the dataset is made on this machine: the same at each attempt, so that the next removes what a killed one left."""
    name = f"mmlrec-{os.geteuid()}-{hashlib.sha256(str(out).encode()).hexdigest()[:16]}"
    return Path(tempfile.gettempdir()) / name


class Target:
    """An address that takes a dataset."""

    def __init__(self, out: UPath) -> None:
        self._out, self._mark = out, uuid4().hex.encode()
        self._begun = self._done = False
        (out / MARK).write_bytes(self._mark)

    def fill(self, folder: Path) -> None:
        """Upload what a folder holds in place of what is there.

        Raises:
            DataError: another run has begun to write there.
            StorageError: the store refuses, or cannot be reached.
        """
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        manifest = files.pop(MANIFEST)
        self._begun = True
        self._remove(MANIFEST)
        self._remove_others({*files, MARK})
        with (
            progress(f"{self._out}: upload", sum(path.stat().st_size for path in files.values()), "bytes") as done,
            ThreadPoolExecutor(_FILES_AT_A_TIME) as pool,
        ):
            try:
                for size in pool.map(lambda name: self._put(name, files[name]), files):
                    done.update(size)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self._put(MANIFEST, manifest)
        self._done = True
        self._remove(MARK)

    def leave(self) -> None:
        """After a failure: remove what was written, as far as it can be; the next attempt removes the rest."""
        if self._done:
            return
        with suppress(StorageError, OSError, DataError):
            self._check_mine()
            if self._begun:
                self._remove_others({MARK})
            self._remove(MARK)

    def _put(self, name: str, path: Path) -> int:
        self._check_mine()
        put_file(path, self._out / name)
        return path.stat().st_size

    def _check_mine(self) -> None:
        try:
            mine = read(self._out / MARK) == self._mark
        except FileNotFoundError:
            mine = False
        if not mine:
            raise DataError(f"{self._out}: another run is writing this dataset. Wait for it, or choose another --out.")

    def _remove_others(self, names: set[str]) -> None:
        for name in objects_below(self._out).keys() - names:
            self._remove(name)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._out.fs.rm_file((self._out / name).path)


@contextmanager
def target(out: UPath) -> Iterator[Target]:
    """An address that can be written, as is tried at once."""
    found = Target(out)
    try:
        yield found
    finally:
        found.leave()
