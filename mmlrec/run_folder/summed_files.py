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


class _SummedStream:
    """A file to append to, and the checksum of what it was given."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.crc32 = 0

    def write(self, content: Any) -> int:
        """As of a file."""
        self.crc32 = zlib.crc32(content, self.crc32)
        return int(self._file.write(content))

    def __getattr__(self, name: str) -> Any:
        if name in ("seek", "truncate", "writelines"):
            raise AttributeError(f"the checksum of a file that uses {name} would be wrong")
        return getattr(self._file, name)


class _SummedFiles(FileSystem):
    """DCP's files, with size and checksum of each one written."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, int]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """A file to write."""
        with super().create_stream(path, mode) as file:
            stream = _SummedStream(file)
            yield stream
        self.written[Path(path).name] = {"bytes": Path(path).stat().st_size, "crc32": stream.crc32}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """The index gets its name when it is whole."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class Writer(FileSystemWriter):
    """DCP's writer of a folder, with checksums of the files of this rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _SummedFiles()

    @property
    def written(self) -> dict[str, dict[str, int]]:
        """File name -> bytes and crc32."""
        return cast(_SummedFiles, self.fs).written
