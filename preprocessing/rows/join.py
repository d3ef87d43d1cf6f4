"""Rows of one raw file looked up by id from another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from preprocessing.reading.raw_files import BadRow, BadRows, Block

_LARGEST_LIST = 1 << 22  # ids that lie as close as this are looked up in a list by id; a search takes ten times as long


class IdIndex:
    """Finds a row of a file by its unique int64 id, in 16 bytes a row. The row of a second occurrence of an id is a bad row."""

    def __init__(self, name: str, blocks: Iterable[Block], bad_rows: BadRows, shown: Callable[[np.int64], str] = str) -> None:
        """Read column `name`, which has no nulls, of blocks of one file; rows are numbered from 0 through them all.

        `shown` writes an id for a complaint.
        """
        ids, lines = [], []
        for block in blocks:
            ids.append(block.table[name].to_numpy())
            lines.append(block.lines)
            self._path = block.path
        self._name = name
        every = np.concatenate(ids)
        order = np.argsort(every, kind="stable")
        again = np.append(False, every[order[1:]] == every[order[:-1]]) if len(every) else np.zeros(0, bool)
        line = np.concatenate(lines)
        for row in np.sort(order[again]):
            complaint = f"{name} {shown(every[row])} appears a second time. Remove one of the lines."
            bad_rows.add(BadRow(self._path, int(line[row]), complaint))
        self._order = order[~again]
        self._ids = every[self._order]
        self._first, self._rows = 0, np.zeros(0, np.int64)
        if len(self._ids) and int(self._ids[-1]) - int(self._ids[0]) < _LARGEST_LIST:
            self._first = int(self._ids[0])
            self._rows = np.full(int(self._ids[-1]) - self._first + 1, -1)
            self._rows[self._ids - self._first] = self._order

    def locate(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row of each id, [ids] int64; -1 where it is unknown."""
        if not len(self._ids):
            return np.full(len(ids), -1)
        if len(self._rows):
            known = (ids >= self._first) & (ids <= int(self._ids[-1]))
            return np.where(known, self._rows[np.where(known, ids - self._first, 0)], -1)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[at] == ids, self._order[at], -1)

    def find(self, block: Block) -> tuple[Block, NDArray[np.int64]]:
        """The block's rows whose id is known, and the row of each, [rows] int64. The others are bad rows."""
        rows = self.locate(block.table[self._name].to_numpy())
        remedy = f"is not in {self._path.name}. Fetch both files again from one release."
        block = block.require(rows >= 0, f"{self._name} {{{self._name}}} {remedy}")
        return block, rows[rows >= 0]


class RowsOnDisk:
    """Columns of a file too large for memory, kept in a folder and read back by row number; missing values are kept.

    A row takes 8 bytes a column, and a list 8 bytes an id more. In memory are the distinct values of string columns only.
    """

    _NO_ID, _NO_CODE = np.iinfo(np.int64).min, -1

    def __init__(self, folder: Path, columns: dict[str, pa.DataType]) -> None:
        """Make the folder, which does not exist yet. `columns`: name -> int64, float32, float64, string or list of int64."""
        folder.mkdir()
        self._folder, self._columns = folder, columns
        self._codes: dict[str, dict[str, int]] = {name: {} for name, kind in columns.items() if pa.types.is_string(kind)}
        self._list_ends = {name: 0 for name, kind in columns.items() if pa.types.is_list(kind)}
        fields: list[tuple[str, Any]] = []
        for name, kind in columns.items():
            if pa.types.is_list(kind):
                fields.append((name, [("start", np.int64), ("length", np.int32)]))
            else:
                fields.append((name, np.int64 if pa.types.is_string(kind) else kind.to_pandas_dtype()))
        self._dtype = np.dtype(fields)
        self.num_rows = 0

    def add(self, table: pa.Table) -> None:
        """Append the rows of a table, which may have further columns."""
        rows = np.empty(len(table), self._dtype)
        for name, kind in self._columns.items():
            column = table[name].combine_chunks()
            if pa.types.is_list(kind):
                self._add_lists(name, column, rows[name])
            elif pa.types.is_string(kind):
                codes, distinct = self._codes[name], column.dictionary_encode()
                of_distinct = [codes.setdefault(value, len(codes)) for value in distinct.dictionary.to_pylist()]
                of_distinct.append(self._NO_CODE)
                rows[name] = np.array(of_distinct)[distinct.indices.fill_null(-1).to_numpy()]
            else:
                rows[name] = column.fill_null(np.nan if pa.types.is_floating(kind) else self._NO_ID).to_numpy()
        with (self._folder / "rows.bin").open("ab") as file:
            file.write(rows.data)  # unlike tofile, it tells why it failed
        self.num_rows += len(rows)

    def store(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Append the rows of blocks as they pass."""
        for block in blocks:
            self.add(block.table)
            yield block

    def take(self, rows: NDArray[np.int64]) -> dict[str, pa.Array]:
        """Columns of these rows."""
        if not self.num_rows:
            return {name: pa.array([], kind) for name, kind in self._columns.items()}
        taken = np.memmap(self._folder / "rows.bin", self._dtype, mode="r")[rows]
        found = {}
        for name, kind in self._columns.items():
            values = np.ascontiguousarray(taken[name])
            if pa.types.is_list(kind):
                found[name] = self._take_lists(name, values)
            elif pa.types.is_string(kind):
                indices = pa.array(values, mask=values == self._NO_CODE)
                found[name] = pa.DictionaryArray.from_arrays(indices, pa.array(list(self._codes[name]), kind)).cast(kind)
            else:
                missing = np.isnan(values) if pa.types.is_floating(kind) else values == self._NO_ID
                found[name] = pa.array(values, kind, mask=missing)
        return found

    def remove(self) -> None:
        """Delete the folder."""
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()

    def _add_lists(self, name: str, lists: pa.ListArray, rows: NDArray[Any]) -> None:
        lengths = lists.value_lengths().fill_null(0).to_numpy()
        ends = self._list_ends[name] + np.cumsum(lengths)
        rows["start"], rows["length"] = ends - lengths, lengths
        with (self._folder / f"{name}.bin").open("ab") as file:
            file.write(lists.flatten().to_numpy().data)
        self._list_ends[name] = int(ends[-1]) if len(ends) else self._list_ends[name]

    def _take_lists(self, name: str, rows: NDArray[Any]) -> pa.ListArray:
        """Lists as they are; a missing one has become empty."""
        ends = np.cumsum(rows["length"], dtype=np.int64)
        values = np.zeros(0, np.int64)
        if self._list_ends[name]:
            shift = rows["start"] - (ends - rows["length"])
            kept = np.memmap(self._folder / f"{name}.bin", np.int64, mode="r")
            values = kept[np.arange(ends[-1] if len(ends) else 0) + np.repeat(shift, rows["length"])]
        return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), pa.array(values))
