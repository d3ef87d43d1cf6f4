"""Files of a checkpoint with their checksums, taken while they are written: nobody has to read them again for it."""

from __future__ import annotations

import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from mmlrec.run_folder.whole import Sums
from mmlrec.storage.places import Place, read

#: Of an object, in bytes: many tensors are small, and each read would be a request.
_READ_AHEAD = {"block_size": 4 << 20, "cache_type": "readahead"}


class _SummedStream:
    """A file to append to, and size and checksum of what it was given."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sums: Sums = {"bytes": 0, "crc32": 0}

    def write(self, content: Any) -> int:
        """As of a file."""
        self.sums = {
            "bytes": self.sums["bytes"] + memoryview(content).nbytes,
            "crc32": zlib.crc32(content, self.sums["crc32"]),
        }
        return int(self._file.write(content))

    def __getattr__(self, name: str) -> Any:
        if name in ("seek", "truncate", "writelines"):
            raise AttributeError(f"the checksum of a file that uses {name} would be wrong")
        return getattr(self._file, name)


class Files(FileSystem):
    """DCP's files in a folder of this machine or on an object store."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        """A file to write or read."""
        with path.open(mode) if isinstance(path, Path) else path.open(mode, **({} if "w" in mode else _READ_AHEAD)) as file:
            yield file

    def concat_path(self, path: Any, suffix: str) -> Any:
        """A file of the folder."""
        return path / suffix

    def exists(self, path: Any) -> bool:
        """Whether a file is there."""
        return bool(path.exists())


class _SummedFiles(Files):
    """DCP's files, with size and checksum of each one written."""

    def __init__(self) -> None:
        self.written: dict[str, Sums] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        """A file to write."""
        with super().create_stream(path, mode) as file:
            stream = _SummedStream(file)
            yield stream
        self.written[path.name] = stream.sums

    def rename(self, path: Any, new_path: Any) -> None:
        """The index gets its name when it is whole. An object is whole whenever it is there, but has no other name."""
        if isinstance(path, Path):
            path.rename(new_path)
        else:
            new_path.write_bytes(read(path))
            path.unlink()
        self.written[new_path.name] = self.written.pop(path.name)


class Writer(FileSystemWriter):
    """DCP's writer of a folder, with checksums of the files of this rank."""

    def __init__(self, folder: Place) -> None:
        # Without copies ahead: those of a GPU's tensors lie in page-locked memory, of which torch takes the next power of two
        # bytes for each, and gives none back. So each shard is copied just before it is written, and then forgotten.
        super().__init__("", sync_files=isinstance(folder, Path), per_thread_copy_ahead=0)
        self.fs = _SummedFiles()
        self.path = cast(Any, folder)

    @property
    def checkpoint_id(self) -> str:
        """What the index says of where it was written."""
        return str(self.path)

    @property
    def written(self) -> dict[str, Sums]:
        """File name -> bytes and crc32."""
        return cast(_SummedFiles, self.fs).written
