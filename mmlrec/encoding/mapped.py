"""Arrays as numpy files that are mapped when they are read; with what tells that one of them is cut off or another one."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmlrec.errors import DataError

_END_BYTES = 1 << 16  # at both ends of a file, of which the checksum is taken
#: What to do with a folder that is damaged.
RESTORE = "Copy the folder again, or export the model again."


def write_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, Any]]:
    """Write `<name>.npy` for each; gives what `read_arrays` needs: size, and sha256 of the first and last 64 KiB."""
    found = {}
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        np.save(path, array.astype(array.dtype.newbyteorder("<"), copy=False))
        found[name] = mark_of(path)
    return found


def read_arrays(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """The arrays, mapped read-only. Raises DataError naming the file that is not there or not as it was written."""
    arrays = {}
    for name, of in facts.items():
        path = folder / f"{name}.npy"
        try:
            check_mark(path, of)
            mapped = np.load(path, mmap_mode="r")
            cast(mmap.mmap, mapped.base).madvise(mmap.MADV_RANDOM)  # else the kernel reads and maps what lies around
            arrays[name] = mapped.view(np.ndarray)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}. {RESTORE}") from error
    return arrays


def mark_of(path: Path) -> dict[str, Any]:
    """What tells a file from another one at once, however large it is: size, and sha256 of the first and last 64 KiB."""
    return {"bytes": path.stat().st_size, "sha256": _ends_digest(path)}


def check_mark(path: Path, of: Mapping[str, Any]) -> None:
    """Raise DataError, or OSError, where a file is not the one that `mark_of` has seen."""
    size = path.stat().st_size
    if size != of["bytes"]:
        raise DataError(f"{path} is damaged: it has {size:,} bytes, {of['bytes']:,} were written. {RESTORE}")
    if _ends_digest(path) != of["sha256"]:
        raise DataError(f"{path} is damaged: its checksum is not that of the file that was written. {RESTORE}")


def _ends_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_END_BYTES))
        file.seek(max(path.stat().st_size - _END_BYTES, 0))
        digest.update(file.read(_END_BYTES))
    return digest.hexdigest()
