"""Packed raw files: what is in them, and how large it may become.

A few megabytes can unpack to gigabytes, and so fill a disk. What unpacks to more than `FREE_BYTES` may be `MOST_TIMES` as large
as it is packed: logs are packed to a tenth, rarely to a hundredth, and gzip packs nothing to less than a thousandth. A zip file
says beforehand how large its members are; of gzip the bytes are counted as they come.
"""

from __future__ import annotations

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from mmlrec.errors import DataError

#: How the bytes of a file begin -> what has packed them, and in a way that is not read.
_OTHERS = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2"}
FREE_BYTES = 1 << 30
MOST_TIMES = 200


class Bounded(io.BufferedIOBase):
    """Unpacked bytes, read forward; `source` is what complaints name. Reading raises DataError when there are too many."""

    def __init__(self, stream: IO[bytes], source: Path | str, packed_bytes: int) -> None:
        self._stream, self._source, self._packed_bytes = stream, source, packed_bytes
        self._left = _most(packed_bytes)

    def readable(self) -> bool:
        """True."""
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes; all where it is negative."""
        most = self._left + 1
        content = self._stream.read(most if size is None or size < 0 else min(size, most))
        self._left -= len(content)
        if self._left < 0:
            raise _too_large(self._source, self._packed_bytes)
        return content

    def close(self) -> None:
        """Close the stream, too."""
        self._stream.close()
        super().close()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around what reads a raw file. Raises DataError when the file is damaged or cannot be read."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        kind = "zip" if path.suffix in (".zip", ".npz") else "gzip"
        raise DataError(f"{path}: the {kind} file is truncated or damaged ({error}). Fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def open_unpacked(path: Path, name: str) -> BinaryIO:
    """The bytes of a file, unpacked; `name` picks it out of a zip archive that holds several.

    Raises:
        DataError: the archive does not hold it, or would unpack to too much or out of its folder; the latter also in reading.
            Or the file is packed in another way.
    """
    with path.open("rb") as file:
        start = file.read(10)
    if start[:2] == b"\x1f\x8b":
        return Bounded(gzip.open(path, "rb"), path, path.stat().st_size)  # type: ignore[arg-type, return-value]
    if not start.startswith(b"PK\x03\x04"):
        packer = next((packer for first, packer in _OTHERS.items() if start.startswith(first)), None)
        if packer is not None and (packer != "bzip2" or start[4:] == b"1AY&SY"):
            raise DataError(f"{path}: packed by {packer}, which is not read. Unpack it, or pack it by gzip.")
        return path.open("rb")
    archive = zipfile.ZipFile(path)
    members = [member for member in archive.namelist() if not member.endswith("/")]
    for member in members:
        check_place(path, member)
    # what macOS adds to an archive
    members = [member for member in members if not member.startswith("__MACOSX/") and Path(member).name[0] != "."]
    wanted = Path(name).name.lower().removesuffix(".zip")
    chosen = [member for member in members if member.rpartition("/")[2].lower() == wanted]
    if not chosen and len(members) == 1:
        chosen = members
    if not chosen:
        raise DataError(f"{path}: the archive holds no {Path(name).name}. Unpack the right one, or fetch it again.")
    return open_member(archive, chosen[0], path)


def open_member(archive: zipfile.ZipFile, name: str, source: Path | str) -> BinaryIO:
    """A member of a zip archive, which never gives more bytes than the archive says. Raises DataError when that is too many."""
    member = archive.getinfo(name)
    check_size(f"{source}, {name}", member.compress_size, member.file_size)
    return archive.open(member)  # type: ignore[return-value]


def check_size(source: Path | str, packed_bytes: int, unpacked_bytes: int) -> None:
    """Raise DataError where what is said beforehand about a packed file is too much."""
    if unpacked_bytes > _most(packed_bytes):
        raise _too_large(source, packed_bytes)


def check_place(source: Path | str, member: str) -> None:
    """Raise DataError where the name of an archive's member leads out of the folder into which it would be unpacked."""
    parts = PurePosixPath(member.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match("[A-Za-z]:", member):
        raise DataError(
            f"{source}: the archive holds '{member}', a path that leads out of its folder, as none of an honest archive does."
            " Fetch the archive from its home."
        )


def _most(packed_bytes: int) -> int:
    return max(FREE_BYTES, MOST_TIMES * packed_bytes)


def _too_large(source: Path | str, packed_bytes: int) -> DataError:
    return DataError(
        f"{source}: {packed_bytes:,} packed bytes unpack to more than {_most(packed_bytes):,}, as only what is made to fill a"
        " disk does. If you trust it, unpack it by hand, or write it anew without compression, and put that into its place."
    )
