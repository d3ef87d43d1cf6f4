"""Files of a checkpoint with their checksums, taken while they are written: nobody has to read them again for it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from mmlrec.run_folder.whole import Sums


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


class _SummedFiles(FileSystem):
    """DCP's files, with size and checksum of each one written."""

    def __init__(self) -> None:
        self.written: dict[str, Sums] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """A file to write."""
        path = cast(Path, path)
        with path.open(mode) as file:
            stream = _SummedStream(file)
            yield stream
        self.written[path.name] = stream.sums

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> Path:
        """A file of the folder."""
        return cast(Path, path) / suffix

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file is there."""
        return cast(Path, path).exists()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """The index gets its name when it is whole."""
        path, new_path = cast(Path, path), cast(Path, new_path)
        path.rename(new_path)
        self.written[new_path.name] = self.written.pop(path.name)


class Writer(FileSystemWriter):
    """DCP's writer of a folder, with checksums of the files of this rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__("")
        self.fs, self.path = _SummedFiles(), folder

    @property
    def checkpoint_id(self) -> str:
        """What the index says of where it was written."""
        return str(self.path)

    @property
    def written(self) -> dict[str, Sums]:
        """File name -> bytes and crc32."""
        return cast(_SummedFiles, self.fs).written
