"""The index of a checkpoint, `.metadata`: which tensor lies where in its files; read without running what it may hold.

torch.distributed.checkpoint writes the index with pickle, and a pickle is a program: a run folder from elsewhere could do
anything. Here it may name only what an index consists of.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta, TensorStorageMetadata

from mmlrec.errors import CheckpointError, StorageError
from mmlrec.run_folder.summed_files import Files
from mmlrec.storage.places import Place, read

_INDEX = ".metadata"
#: Of an archive of torch.save, in the hope that its directory is in them.
_TAIL_BYTES = 1 << 12
_METADATA = "torch.distributed.checkpoint.metadata"
#: Module -> names: all that occurs in the indices that DCP has written for us, on one rank and several, with sharded tables.
ALLOWED = {
    _METADATA: {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    # Python 3.13 pickles paths under this name.
    "pathlib._local": {"PosixPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours contains")


def _memory_format(kind: Any, name: Any) -> Any:
    """The one thing that `getattr` may do: Python 3.11.0 to 3.11.3, as of Debian 12, pickle members of an enumeration so."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError("it names builtins.getattr, which no checkpoint of ours contains")
    return _MEM_FORMAT_ENCODING[name]


class Reader(FileSystemReader):
    """DCP's reader of a folder, with an index that cannot run code."""

    def __init__(self, folder: Place) -> None:
        super().__init__("")
        self.fs = Files()
        self.path = cast(Any, folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            CheckpointError: it is damaged, names anything else than an index does, or holds anything but tensors (what DCP
                calls bytes would be unpickled, too).
        """
        path = self.folder / _INDEX
        try:
            found = _Unpickler(io.BytesIO(read(path))).load()
        except StorageError:
            raise
        # A damaged pickle may raise anything.
        except Exception as error:
            raise CheckpointError(f"{path} is not the index of a checkpoint: {error}. Do not use this run folder.") from error
        if not isinstance(found, Metadata):
            raise CheckpointError(f"{path} is not the index of a checkpoint. Do not use this run folder.")
        for key, entry in found.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                kind = type(entry).__name__
                raise CheckpointError(f"{path}: entry '{key}' is no tensor: {kind}. Do not use this run folder.")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class SavedTensor:
    """A tensor of a checkpoint, read by ranges of its first axis, whatever ranks have written it. Nothing is unpickled.

    Attributes:
        size: of all of it.
    """

    def __init__(self, folder: Place, entry: TensorStorageMetadata, stored: Mapping[tuple[int, ...], Any]) -> None:
        self.size, self.dtype = tuple(entry.size), entry.properties.dtype
        self._folder = folder
        #: First row and behind the last one of each piece, and where it lies; in the order of the rows.
        self._pieces = sorted(
            (
                chunk.offsets[0] if self.size else 0,
                chunk.offsets[0] + chunk.sizes[0] if self.size else 1,
                stored[tuple(chunk.offsets)],
            )
            for chunk in entry.chunks
        )
        self._begins: dict[int, int] = {}
        if any(tuple(chunk.sizes[1:]) != self.size[1:] for chunk in entry.chunks):
            raise CheckpointError(
                f"{folder}: a tensor is cut along another axis than its first. Load it with the release it is of."
            )

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop-1, [stop - start, ...]; the whole when absent.

        Raises:
            CheckpointError: the file is not what the index says.
            OSError, StorageError: it cannot be read.
        """
        stop = (self.size[0] if self.size else 1) if stop is None else stop
        row_bytes = math.prod(self.size[1:]) * self.dtype.itemsize
        content = bytearray()
        for first, end, where in self._pieces:
            low, high = max(first, start), min(end, stop)
            if low < high:
                begin = self._begin(first, (end - first) * row_bytes, where) + (low - first) * row_bytes
                content += _range(self._folder / where.relative_path, begin, (high - low) * row_bytes)
        if len(content) != (stop - start) * row_bytes:
            raise CheckpointError(f"{self._folder}: its files are shorter than its index says. Do not use this run folder.")
        shape = (stop - start, *self.size[1:]) if self.size else ()
        return torch.frombuffer(content, dtype=self.dtype).view(shape) if content else torch.empty(shape, dtype=self.dtype)

    def _begin(self, piece: int, num_bytes: int, where: Any) -> int:
        """Byte of the file at which the numbers of a piece begin: they lie as they are in an archive of torch.save."""
        if piece not in self._begins:
            path = self._folder / where.relative_path
            section = Section(partial(_range, path), where.offset, where.length)
            try:
                with zipfile.ZipFile(io.BufferedReader(section, _TAIL_BYTES)) as archive:
                    (info,) = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
                header = _range(path, where.offset + info.header_offset, 30)
            except (ValueError, zipfile.BadZipFile, struct.error) as error:
                raise CheckpointError(f"{path} holds no tensor where its index says so: {error}. Do not use it.") from error
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != num_bytes:
                raise CheckpointError(
                    f"{path}: a tensor has {info.file_size} bytes, its index says {num_bytes}. Do not use it."
                )
            of_name, of_extra = struct.unpack("<HH", header[26:30])
            self._begins[piece] = where.offset + info.header_offset + 30 + of_name + of_extra
        return self._begins[piece]


def saved_tensors(folder: Place) -> dict[str, SavedTensor]:
    """The tensors of a checkpoint by flat key; `folder` is where its files lie (`whole.inside`).

    Raises:
        CheckpointError: the index is damaged.
    """
    metadata = Reader(folder).read_metadata()
    stored: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, where in metadata.storage_data.items():
        stored.setdefault(index.fqn, {})[tuple(index.offset or ())] = where
    return {
        key: SavedTensor(folder, cast(TensorStorageMetadata, entry), stored[key])
        for key, entry in metadata.state_dict_metadata.items()
    }


class Section(io.RawIOBase):
    """Some bytes of a file, as a file; zipfile looks for the directory of an archive at its end.

    Args:
        content: of the file, so many bytes from a place on.
    """

    def __init__(self, content: Callable[[int, int], bytes], start: int, num_bytes: int) -> None:
        super().__init__()
        self._content, self._start, self._num_bytes, self._position = content, start, num_bytes, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of a file."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, "before the begin of the section")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """As of a file."""
        length = max(0, min(len(buffer), self._num_bytes - self._position))
        found = self._content(self._start + self._position, length) if length else b""
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


def _range(path: Place, start: int, num_bytes: int) -> bytes:
    if not isinstance(path, Path):
        return bytes(path.fs.cat_file(path.path, start=start, end=start + num_bytes))
    with path.open("rb") as file:
        file.seek(start)
        return file.read(num_bytes)
