"""Folders that are whole or absent: written under another name, sealed by a marker with size and checksum of every file.

What has no such marker, or does not match it, is damaged. All that happens to the folders of checkpoints as such happens here:
they are made, sealed, put in place, checked and taken away; on object storage, which knows no renaming, as stored.py says.
Ranks that check one together read equal shares of its bytes, in ranges where files are large: the checksum of a file (crc32)
follows from those of its pieces.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from mmlrec.distributed.world import World
from mmlrec.errors import StorageError
from mmlrec.run_folder import stored
from mmlrec.run_folder.stored import MARKER, REPLACED
from mmlrec.storage.places import Place, objects_below, read

TEMPORARY = ".tmp"
#: What files raise, of this machine and of a store.
FAILURES = (OSError, StorageError)
#: Bytes and crc32 of a file, as the marker has them.
Sums = dict[str, int]
#: Bytes read at a time for a checksum.
_CHUNK = 1 << 22
#: The polynomial of crc32, without its highest term, lowest coefficient in the highest bit.
_POLYNOMIAL = 0xEDB88320


def make(folder: Place, start: str) -> Place:
    """A new, empty folder in which to write what is to become `folder`: beside it, or on object storage below it.

    Args:
        start: of this run alone: what ranks of another one may still write is never taken for a part of this.
    """
    if not isinstance(folder, Path):
        return folder / stored.named(start)
    temporary = folder.with_name(f"{folder.name}.{start}-{uuid.uuid4().hex[:8]}{TEMPORARY}")
    temporary.mkdir(parents=True)
    return temporary


def made(folder: Place, name: str) -> Place:
    """On any rank, the folder of this name that rank 0 has made to become `folder`."""
    return folder.with_name(name) if isinstance(folder, Path) else folder / name


def seal(folder: Place, files: Mapping[str, Sums]) -> None:
    """Write the marker of a folder that is written to the end.

    Raises:
        OSError: it cannot be written, or a file is not here.
    """
    found = _sizes(folder, files)
    for name, sums in files.items():
        if found.get(name) != sums["bytes"]:
            path = folder / name
            raise OSError(f"{path} was written by another rank and is not here, or not whole: all ranks must see one folder")
    write_synced(folder / MARKER, stored.marker_text(files))
    sync(folder)


def put(temporary: Place, folder: Place, delete: Callable[[Place], None]) -> None:
    """Give a sealed folder its name. One that has it already is kept as the one that was replaced, for `prune` to delete."""
    if not isinstance(folder, Path):
        stored.put(temporary, folder)
        return
    assert isinstance(temporary, Path)
    former = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        # The former one stays until `prune`: should this process die now, the newest step checkpoint knows that one.
        if former.exists():
            former = folder.with_name(f"{temporary.name}{TEMPORARY}")
        folder.rename(former)
    # Next, as others may be about to read it.
    temporary.rename(folder)
    if former.suffix == TEMPORARY:
        delete(former)
    sync(folder.parent)


def retire(folder: Place, delete: Callable[[Place], None]) -> None:
    """Take a folder away, at once and in one step; `delete` may take its time with what is left of it.

    Raises:
        OSError, StorageError: it stays.
    """
    if not isinstance(folder, Path):
        stored.retire(folder, delete)
        return
    # Under a name that nothing has: by the time it is deleted, there may be another folder of its own.
    left = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    folder.rename(left)
    delete(left)


def delete(folder: Place) -> None:
    """Delete what is left of a folder, as far as that can be done."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        stored.delete(folder)


def bring_back(old: Place, folder: Place) -> None:
    """Let a folder be what it was before it was replaced."""
    if isinstance(old, Path) and isinstance(folder, Path):
        delete(folder)
        old.rename(folder)
    elif not (isinstance(old, Path) or isinstance(folder, Path)):
        stored.bring_back(old, folder)


def folders(folder: Place) -> Sequence[Place]:
    """The folders in this one, whole or damaged. On object storage those that have a marker: the others are being written."""
    if not isinstance(folder, Path):
        return stored.folders(folder)
    return [path for path in folder.glob("*") if not path.suffix]


def is_there(folder: Place) -> bool:
    """Whether there is one of this name, or one that it was replacing."""
    if not isinstance(folder, Path):
        return stored.is_there(folder)
    return any(folder.parent.glob(f"{folder.name}*"))


def replaced(folder: Place) -> Sequence[Place]:
    """Of the folders in this one, those that were replaced."""
    return list(folder.glob(f"*{REPLACED}")) if isinstance(folder, Path) else stored.replaced(folder)


def leftovers(folder: Place) -> Sequence[Place]:
    """What interrupted saves have left in a folder."""
    return list(folder.glob(f"*{TEMPORARY}")) if isinstance(folder, Path) else stored.leftovers(folder)


def write_synced(path: Place, content: bytes) -> Sums:
    """Write a small file, down to the disk."""
    if not isinstance(path, Path):
        path.write_bytes(content)
        return sums(content)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return sums(content)


def sync(folder: Place) -> None:
    """Have the names in a folder on the disk."""
    if not isinstance(folder, Path):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sums(content: bytes) -> Sums:
    """Bytes and checksum of a content."""
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def damage(folder: Place, world: World | None = None) -> str | None:
    """Why a folder is not whole, naming the file, or None when it is.

    Args:
        world: of the ranks that share the checksums out, each an equal number of bytes; all call it, and get one answer.
            Without it this process does all.

    Raises:
        StorageError: the store does not tell; that is no damage.
    """
    world = None if world is None else world.without_limit()
    found, error = None, None
    if world is None or world.is_main:
        try:
            found = _sized(folder)
        except StorageError as cause:
            error = cause
    if world is not None:
        world.at(f"checking {folder.name}")
        world.raise_together(error)
        found = cast("str | dict[str, tuple[int, int]]", world.from_main(found))
    elif error is not None:
        raise error
    assert found is not None
    if isinstance(found, str):
        return found
    rank, world_size = (0, 1) if world is None else (world.rank, world.world_size)
    own: list[tuple[str, int, int | str | StorageError]] = []  # file, bytes of the piece, its checksum or what is wrong
    for name, start, length in shares({name: size for name, (size, _) in found.items()}, world_size)[rank]:
        try:
            own.append((name, length, _crc32(_base(folder) / name, start, length)))
        except StorageError as cause:
            own.append((name, length, cause))
        except OSError as cause:
            own.append((name, length, f"{_base(folder) / name} cannot be read: {cause}"))
    # In order of rank, so that the pieces of a file are in the order of its bytes.
    pieces = [piece for some in ([own] if world is None else world.gather(own)) for piece in some]
    for name, (_, expected) in found.items():
        value = 0
        for _, length, piece in (piece for piece in pieces if piece[0] == name):
            if isinstance(piece, StorageError):
                raise piece
            if isinstance(piece, str):
                return piece
            value = combined(value, piece, length)
        if value != expected:
            return f"{_base(folder) / name} does not match its checksum: it is corrupt"
    return None


def inside(folder: Place) -> Place:
    """Where the files of a whole folder lie: in itself, or on object storage, and in a copy from there, one level below it."""
    found = _listed(folder)
    names = [] if isinstance(found, str) else list(found)
    return _base(folder) / names[0].rpartition("/")[0] if names and "/" in names[0] else folder


def file_damage(folder: Place, name: str) -> str | None:
    """Why one file of a folder is not usable, or the folder has no such file; None where it is. The others are not read."""
    found = _listed(folder)
    if isinstance(found, str):
        return found
    listed = next((each for each in found if each.rpartition("/")[2] == name), None)
    if listed is None:
        return f"{folder / name} is missing"
    path, (size, crc32) = _base(folder) / listed, found[listed]
    reason = _size_damage(path, _sizes(_base(folder), [listed]).get(listed), size)
    if reason is None and _crc32(path, 0, size) != crc32:
        reason = f"{path} does not match its checksum: it is corrupt"
    return reason


def shares(sizes: Mapping[str, int], count: int) -> list[list[tuple[str, int, int]]]:
    """Files cut into `count` shares of equal bytes.

    Args:
        sizes: file -> bytes.

    Returns:
        For each share its pieces: file, first byte, number of bytes. Shares and pieces are in the order of the bytes.
    """
    total = sum(sizes.values())
    found = []
    for index in range(count):
        first, last = index * total // count, (index + 1) * total // count
        pieces, begin = [], 0
        for name, size in sizes.items():
            low, high = max(first, begin), min(last, begin + size)
            if low < high:
                pieces.append((name, low - begin, high - low))
            begin += size
        found.append(pieces)
    return found


def combined(first: int, second: int, num_bytes: int) -> int:
    """The crc32 of two contents in a row, from that of each.

    Args:
        num_bytes: of the second one.
    """
    # That of the first, times x to the power of the bits that follow it, modulo the polynomial.
    power, square = 1 << 31, 1 << 23  # x^0, x^8
    while num_bytes:
        if num_bytes & 1:
            power = _product(power, square)
        square = _product(square, square)
        num_bytes >>= 1
    return _product(power, first) ^ second


def _product(a: int, b: int) -> int:
    """Of two polynomials over GF(2), modulo that of crc32."""
    product = 0
    for place in range(31, -1, -1):
        if a >> place & 1:
            product ^= b
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


def _base(folder: Place) -> Place:
    return folder if isinstance(folder, Path) else stored.base(folder)


def _listed(folder: Place) -> str | dict[str, tuple[int, int]]:
    """Bytes and checksum of each file by its name, or why there are none."""
    marker = folder / MARKER if isinstance(folder, Path) else stored.marker(folder)
    try:
        listed = json.loads(read(marker))["files"].items()
        files = {name: (expected["bytes"], expected["crc32"]) for name, expected in listed}
        if not all(type(number) is int for sums in files.values() for number in sums):
            raise ValueError("sizes and checksums are integers")
    except (FileNotFoundError, NotADirectoryError):
        return f"{folder} has no {MARKER}: it was not written to the end"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{marker} cannot be read: {error}"
    return files


def _sized(folder: Place) -> str | dict[str, tuple[int, int]]:
    """Bytes and checksum of each file by its name, all of them here with these bytes; or what is wrong."""
    found = _listed(folder)
    if not isinstance(found, str):
        sizes = _sizes(_base(folder), found)
        for name, (size, _) in found.items():
            if (reason := _size_damage(_base(folder) / name, sizes.get(name), size)) is not None:
                return reason
    return found


def _sizes(folder: Place, names: Iterable[str]) -> dict[str, int]:
    """Name -> bytes of those of these files that are here."""
    if not isinstance(folder, Path):
        return objects_below(folder)
    found = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            state = (folder / name).stat()
            if stat.S_ISREG(state.st_mode):
                found[name] = state.st_size
    return found


def _size_damage(path: Place, size: int | None, num_bytes: int) -> str | None:
    if size is None:
        return f"{path} is missing"
    if size != num_bytes:
        return f"{path} has {size} bytes instead of {num_bytes}: it is truncated or was changed"
    return None


def _crc32(path: Place, start: int, num_bytes: int) -> int:
    value = 0
    if not isinstance(path, Path):
        for first in range(start, start + num_bytes, _CHUNK):
            last = min(first + _CHUNK, start + num_bytes)
            value = zlib.crc32(path.fs.cat_file(path.path, start=first, end=last), value)
        return value
    with path.open("rb") as file:
        file.seek(start)
        while num_bytes > 0 and (chunk := file.read(min(num_bytes, _CHUNK))):
            value = zlib.crc32(chunk, value)
            num_bytes -= len(chunk)
    return value
