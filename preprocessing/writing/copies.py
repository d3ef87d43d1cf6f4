"""Rows that are equal to others, known by their hashes (encoding/row_hashes.py): counted, or found. In bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmlrec.hashing import UInt64Array
from preprocessing.split_rules import Duplicates

IntArray = NDArray[np.int64]

_SPLIT = np.uint64(3)  # the bits of a hash that make room for a split
_CHUNK = 1 << 16  # hashes compared at a time: they stay in the cache


@dataclass(frozen=True)
class Copies:
    """What was counted.

    Attributes:
        rows: that are equal to another one, the first of each set of equal rows left out.
        most: size of the largest set.
        valid_in_train, test_in_train: rows of valid and of test that are equal to one of train.
    """

    rows: int = 0
    most: int = 1
    valid_in_train: int = 0
    test_in_train: int = 0

    def __add__(self, other: Copies) -> Copies:
        """Of both together, which have no equal rows in common."""
        return Copies(
            self.rows + other.rows,
            max(self.most, other.most),
            self.valid_in_train + other.valid_in_train,
            self.test_in_train + other.test_in_train,
        )

    def statistics(self, policy: Duplicates, num_dropped: int = 0) -> dict[str, Any]:
        """For the manifest."""
        return {"policy": policy} | ({"dropped": num_dropped} if policy == "drop" else {}) | asdict(self)


def marked(hashes: IntArray, splits: IntArray) -> UInt64Array:
    """Hashes whose last two bits tell the split, 0 train, 1 valid, 2 test, [rows]."""
    return (hashes.view(np.uint64) & ~_SPLIT) | splits.view(np.uint64)


def count_copies(marks: UInt64Array) -> Copies:
    """Of rows in any order, from what `marked` gave; sorts it in place."""
    marks.sort()
    found = []
    for start in range(0, len(marks) - 1, _CHUNK):
        some = marks[start : start + _CHUNK + 1]
        found.append(np.flatnonzero((some[1:] ^ some[:-1]) <= _SPLIT) + start + 1)
    later = np.concatenate(found) if found else np.empty(0, np.int64)  # equal to the one before
    if not len(later):
        return Copies()
    first = later[np.append(True, np.diff(later) > 1)] - 1
    members = np.sort(np.concatenate([first, later]))
    splits = marks[members] & _SPLIT  # ascending within each set
    starts = np.searchsorted(members, first)
    sizes = np.diff(np.append(starts, len(splits)))
    known = np.repeat(splits[starts] == 0, sizes)
    valid, test = (int(np.count_nonzero(known & (splits == split))) for split in (1, 2))
    return Copies(len(splits) - len(starts), int(sizes.max()), valid, test)


class CopyCounter:
    """`count_copies` of more rows than fit into memory."""

    def __init__(self, folder: Path, num_rows: int, limit_bytes: int) -> None:
        self._files = _HashFiles(folder, np.dtype(np.uint64), num_rows, limit_bytes)

    def add(self, marks: UInt64Array) -> None:
        """Take note of what `marked` gave for some rows."""
        self._files.add(marks, marks)

    def count(self) -> Copies:
        """No row is left to come."""
        return sum(map(count_copies, self._files.contents()), Copies())


_ENTRY = np.dtype([("hash", np.uint64), ("row", np.int64)])


def later_copies(hashes: Iterable[IntArray], num_rows: int, folder: Path, limit_bytes: int) -> NDArray[np.bool_]:
    """Whether a row is equal to an earlier one, [rows]; kept in a file.

    Args:
        hashes: of all rows in their order, some at a time.
    """
    files, start = _HashFiles(folder, _ENTRY, num_rows, limit_bytes // 4), 0  # sorting takes more than the entries
    for some in hashes:
        entries = np.empty(len(some), _ENTRY)
        entries["hash"], entries["row"] = some.view(np.uint64), np.arange(start, start + len(some))
        files.add(entries["hash"], entries)
        start += len(some)
    later = np.memmap(folder / "later.bin", np.bool_, "w+", shape=(num_rows,))
    for entries in files.contents():
        order = np.argsort(entries["hash"], kind="stable")
        ordered = entries["hash"][order]
        later[entries["row"][order[1:][ordered[1:] == ordered[:-1]]]] = True
    return later


class _HashFiles:
    """Entries in files by their hash: equal ones in one file, in the order in which they came; each fits into memory."""

    def __init__(self, folder: Path, kind: np.dtype[Any], num_rows: int, limit_bytes: int) -> None:
        self._kind = kind
        num_files = max(-(-num_rows * kind.itemsize // limit_bytes), 1)
        folder.mkdir()
        self._paths = [folder / f"{index}.bin" for index in range(num_files)]

    def add(self, hashes: UInt64Array, entries: NDArray[Any]) -> None:
        if len(self._paths) == 1:
            self._append(0, entries)
            return
        places = (hashes >> np.uint64(32)) % np.uint64(len(self._paths))
        places = places.astype(np.uint16 if len(self._paths) <= 1 << 16 else np.int64)  # numpy sorts 16 bits by radix
        order = np.argsort(places, kind="stable")
        ends = np.cumsum(np.bincount(places, minlength=len(self._paths)))
        for index, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if first < end:
                self._append(index, entries[order[first:end]])

    def contents(self) -> Iterator[NDArray[Any]]:
        """What is in each file, which is removed."""
        for path in self._paths:
            if path.exists():
                yield np.fromfile(path, self._kind)
                path.unlink()

    def _append(self, index: int, entries: NDArray[Any]) -> None:
        with self._paths[index].open("ab") as file:
            file.write(np.ascontiguousarray(entries).data)
