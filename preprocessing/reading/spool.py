"""Raw files on an object store: copied to this machine while they are read, because passes go over them again and seek."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mmlrec.errors import DataError, UserError
from mmlrec.storage.places import Place, get_file, objects_below
from mmlrec.storage.scratch import ScratchFolder
from preprocessing.progress import progress

if TYPE_CHECKING:
    from upath import UPath

_FILES_AT_A_TIME = 4


class Spool:
    """The raw files of a folder, found by name there; what is read of them is fetched first.

    Attributes:
        folder: of this machine. Of an address it holds an empty file for each object, until that is fetched.
    """

    def __init__(self, folder: Path, there: UPath | None = None, sizes: dict[str, int] | None = None) -> None:
        self.folder, self._there, self._sizes = folder, there, sizes or {}

    def fetch(self, paths: Iterable[Path]) -> None:
        """Copy the objects that these files stand for.

        Raises:
            DataError: the disk is full.
            StorageError: the store cannot be reached, or refuses.
        """
        if self._there is None:
            return
        there = self._there
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        total = sum(self._sizes[name] for name in names)

        def copy(name: str) -> int:
            get_file(there / name, self.folder / name)
            return self._sizes[name]

        if total > shutil.disk_usage(self.folder).free:
            raise DataError(
                f"{there}: {total:,} bytes of raw files are copied to {self.folder.parent} while they are read, which has no"
                " room for them. Free some, or name another folder in TMPDIR."
            )
        print(f"{there}: {len(names)} file(s), {total:,} bytes, copied to {self.folder} while they are read", file=sys.stderr)
        with progress(f"{there}: fetch", total, "bytes") as done, ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            for size in pool.map(copy, names):
                done.update(size)


@contextmanager
def spooled(raw: Place) -> Iterator[Spool]:
    """The raw files of a folder or an address. Complaints about a copy name the object.

    Raises:
        DataError: there is nothing at the address.
        StorageError: the store cannot be reached, or refuses.
    """
    if isinstance(raw, Path):
        yield Spool(raw)
        return
    sizes = {name: size for name, size in objects_below(raw).items() if ".." not in PurePosixPath(name).parts}
    if not sizes:
        raise DataError(f"{raw}: there is nothing, so no raw files. Give the address of their folder as --raw.")
    with ScratchFolder("raw") as scratch:
        for name in sizes:
            (scratch.path / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch.path / name).touch()
        try:
            yield Spool(scratch.path, raw, sizes)
        except UserError as error:
            error.args = (str(error).replace(str(scratch.path), str(raw)),)
            raise
