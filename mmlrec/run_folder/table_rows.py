"""Rows of a tensor of a checkpoint, some at a time: a table that is larger than memory can be read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from mmlrec.errors import CheckpointError, StorageError
from mmlrec.run_folder import whole
from mmlrec.run_folder.index import Reader, Section
from mmlrec.storage.places import Place

#: Number formats of tables; float32 holds the numbers of both.
_DTYPES = (torch.float32, torch.float16)


class TableRows:
    """The tables of a checkpoint, which is whole (see `checkpoint.verify`), as its index knows them.

    Args:
        folder: the checkpoint.
        keys: flat key of each table that is going to be read.

    Raises:
        CheckpointError: the index is damaged, or lacks a table; or one is no matrix in shards of whole rows, in float32
            or float16.
    """

    def __init__(self, folder: Place, keys: list[str]) -> None:
        self._folder = folder
        self._reader = Reader(whole.inside(folder))
        index = self._reader.read_metadata()
        self._stored = cast("dict[MetadataIndex, Any]", index.storage_data)
        self._tables = {key: self._table(key, index.state_dict_metadata.get(key)) for key in keys}

    def shape(self, key: str) -> tuple[int, int]:
        """V and D of a table."""
        rows, dim = self._tables[key].size
        return rows, dim

    def read(self, key: str, num_rows: int) -> Iterator[Tensor]:
        """The rows of a table in order, [N, D] float32 on the CPU whatever they are stored as, N at most `num_rows`.

        Raises:
            CheckpointError: a file of the checkpoint is damaged.
        """
        expected, dim, dtype = 0, self.shape(key)[1], self._tables[key].properties.dtype
        for chunk in sorted(self._tables[key].chunks, key=lambda chunk: chunk.offsets[0]):
            start, count = chunk.offsets[0], chunk.sizes[0]
            if start != expected:
                raise CheckpointError(f"{self._folder}: '{key}' has no rows from {expected} on, but from {start} on.")
            expected += count
            stored = next(self._stored[at] for at in self._stored if at.fqn == key and at.offset == chunk.offsets)
            try:
                yield from self._rows(stored, (count, dim), dtype, num_rows)
            except StorageError:
                raise
            except (OSError, zipfile.BadZipFile, EOFError, KeyError, ValueError) as cause:
                raise CheckpointError(f"{self._folder}: '{key}' cannot be read: {cause}. Choose another checkpoint.") from cause
        if expected != self.shape(key)[0]:
            raise CheckpointError(f"{self._folder}: '{key}' has {expected} rows instead of {self.shape(key)[0]}.")

    def _table(self, key: str, found: Any) -> TensorStorageMetadata:
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(f"{self._folder}: this checkpoint is of another model: it lacks '{key}'.")
        table = len(found.size) == 2 and found.properties.dtype in _DTYPES
        if not table or any(chunk.offsets[1] != 0 or chunk.sizes[1] != found.size[1] for chunk in found.chunks):
            raise CheckpointError(f"{self._folder}: '{key}' is no table of float32 or float16 in shards of whole rows.")
        return found

    def _rows(self, stored: Any, shape: tuple[int, int], dtype: torch.dtype, num_rows: int) -> Iterator[Tensor]:
        """A shard's rows. It is what `torch.save` writes: an archive, not compressed, with the numbers as one file in it."""
        (count, dim), of_row = shape, shape[1] * dtype.itemsize
        with self._reader.fs.create_stream(self._reader.path / stored.relative_path, "rb") as stream:

            def bytes_of(start: int, num_bytes: int) -> bytes:
                stream.seek(start)
                return bytes(stream.read(num_bytes))

            archive = zipfile.ZipFile(Section(bytes_of, stored.offset, stored.length))
            name = next(name for name in archive.namelist() if name.endswith("/data/0"))
            num_bytes = archive.getinfo(name).file_size
            if num_bytes != count * of_row:
                raise ValueError(f"{stored.relative_path} holds {num_bytes} bytes of it instead of {count * of_row}")
            with archive.open(name) as numbers:  # which compares its checksum at the end
                for start in range(0, count, num_rows):
                    content = bytearray(numbers.read(min(num_rows, count - start) * of_row))
                    yield torch.frombuffer(content, dtype=dtype).view(-1, dim).float()
