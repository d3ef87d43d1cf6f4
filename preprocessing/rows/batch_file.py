"""Rows kept on disk for a while, as record batches in a file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

_LENGTH = struct.Struct("<q")


class BatchFile:
    """Record batches of one schema in a file that is opened for each access only, so that any number may be in use.

    Batches are written in their serialised form, which several threads can prepare at a time.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self.num_bytes = 0

    def append(self, serialised: pa.Buffer) -> int:
        """Append a batch; gives the offset to read it from."""
        offset = self.num_bytes
        with self._path.open("ab") as file:
            file.write(_LENGTH.pack(serialised.size))
            file.write(serialised)
        self.num_bytes += _LENGTH.size + serialised.size
        return offset

    def add(self, rows: pa.RecordBatch) -> int:
        """Append rows; gives the offset to read them from."""
        return self.append(rows.serialize())

    def at(self, offset: int) -> pa.RecordBatch:
        """The batch that was written at an offset."""
        with pa.OSFile(str(self._path), "rb") as file:
            file.seek(offset)
            return self._next(file)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All batches in the order of writing; the file is removed at the end."""
        if not self.num_bytes:
            return
        with pa.OSFile(str(self._path), "rb") as file:
            while file.tell() < self.num_bytes:
                yield self._next(file)
        self._path.unlink()

    def table(self) -> pa.Table:
        """All rows; the file is removed."""
        return pa.Table.from_batches(self.batches(), self._schema)

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)

    def _next(self, file: pa.OSFile) -> pa.RecordBatch:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        return pa.ipc.read_record_batch(file.read_buffer(length), self._schema)
