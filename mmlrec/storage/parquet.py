"""Parquet files wherever they lie. Of parts on an object store row groups are fetched by ranges, and kept (cache.py).

A row group is fetched with all its columns, as one range: its part is compared with its checksum sooner or later, which takes
all bytes, and those that were fetched for training need not come again for that.
"""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from mmlrec.errors import StorageError
from mmlrec.storage.cache import Cache, cache
from mmlrec.storage.places import Place

if TYPE_CHECKING:
    from upath import UPath

_TAIL_BYTES = 1 << 16  # that are fetched at most in the hope that the footer is in them
_AHEAD_BYTES = 8 << 20  # of files that are read from the beginning to the end
_MAGIC = b"PAR1"


def open_parquet(there: Place, num_bytes: int = 0, sha256: str = "") -> pq.ParquetFile:
    """A Parquet file, to be closed.

    Args:
        num_bytes, sha256: of a part, as its manifest says; row groups of it are then kept on this machine.

    Raises:
        OSError, pa.ArrowException: it cannot be read.
        StorageError: the object store cannot be reached, or refuses.
    """
    if isinstance(there, Path):
        return pq.ParquetFile(there)
    if not sha256:
        file = there.open("rb", block_size=_AHEAD_BYTES, cache_type="readahead")
        return pq.ParquetFile(pa.PythonFile(file, "r"))
    part = _stored_part(there, num_bytes, sha256)
    return pq.ParquetFile(pa.PythonFile(_PartFile(part), "r"), metadata=part.metadata)


def stored_size(there: Place) -> int | None:
    """Bytes of a file; None when there is none."""
    try:
        if isinstance(there, Path):
            return there.stat().st_size if there.is_file() else None
        status = there.fs.info(there.path)  # one request
        return int(status["size"]) if status["type"] == "file" else None
    except FileNotFoundError:
        return None


def stored_sha256(there: UPath, num_bytes: int, sha256: str) -> str:
    """Hex digest of a part on an object store, of what is held of it and fetched of it. What is wrong is held no longer."""
    part = _stored_part(there, num_bytes, sha256)
    digest = hashlib.sha256()
    for index in range(len(part.borders) - 1):
        digest.update(part.section(index))
    if digest.hexdigest() != sha256:
        part.forget()
    return digest.hexdigest()


@lru_cache(1 << 12)
def _stored_part(there: UPath, num_bytes: int, sha256: str) -> _StoredPart:
    return _StoredPart(there, num_bytes, sha256)


class _StoredPart:
    """A part on an object store: its footer, and sections that make up the file, one a row group and the footer as the last.

    Attributes:
        borders: [sections + 1] where the sections begin and end.
    """

    def __init__(self, there: UPath, num_bytes: int, sha256: str) -> None:
        self._there, self._num_bytes = there, num_bytes
        self._file = f"{there}\n{sha256}"
        self._cache: Cache = cache()
        self._footer = self._cache.get(self._file, "footer", self._fetch_footer)
        footer_start = num_bytes - len(self._footer)
        self.metadata = pq.read_metadata(pa.BufferReader(_MAGIC + self._footer))
        starts = [_start(self.metadata.row_group(index)) for index in range(self.metadata.num_row_groups)]
        self.borders = [0, *starts[1:], footer_start, num_bytes]

    def section(self, index: int) -> bytes:
        """The bytes of a section."""
        if index == len(self.borders) - 2:
            return self._footer
        start, stop = self.borders[index : index + 2]
        return self._cache.get(self._file, f"{start}-{stop}", lambda: self._fetch(start, stop))

    def forget(self) -> None:
        """Hold nothing of it any more."""
        self._cache.forget(self._file)
        _stored_part.cache_clear()

    def _fetch(self, start: int, stop: int) -> bytes:
        data = self._there.fs.cat_file(self._there.path, start=start, end=stop)
        if len(data) != stop - start:
            raise StorageError(f"{self._there}: has no bytes {start} to {stop}: cut off or changed while it was in use.")
        return bytes(data)

    def _fetch_footer(self) -> bytes:
        tail = self._fetch(self._num_bytes - min(_TAIL_BYTES, 8 + self._num_bytes // 64), self._num_bytes)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != _MAGIC or length > self._num_bytes:
            raise pa.ArrowInvalid("it ends with no Parquet footer")
        missing = length - len(tail)
        if missing > 0:
            start = self._num_bytes - length
            tail = self._fetch(start, start + missing) + tail
        return tail[-length:]


def _start(group: pq.RowGroupMetaData) -> int:
    columns = (group.column(index) for index in range(group.num_columns))
    return min(column.dictionary_page_offset or column.data_page_offset for column in columns)


class _PartFile(io.RawIOBase):
    """A part as a file: reads within a section take it from the one that was used last."""

    def __init__(self, part: _StoredPart) -> None:
        super().__init__()
        self._part, self._position = part, 0
        self._held: tuple[int, bytes] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As files do."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._part.borders[-1]}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """As files do."""
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """As files do."""
        borders = self._part.borders
        stop = borders[-1] if size is None or size < 0 else min(self._position + size, borders[-1])
        pieces = []
        while self._position < stop:
            index = bisect_right(borders, self._position) - 1
            if self._held is None or self._held[0] != index:
                self._held = index, self._part.section(index)
            first = self._position - borders[index]
            pieces.append(self._held[1][first : stop - borders[index]])
            self._position += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
