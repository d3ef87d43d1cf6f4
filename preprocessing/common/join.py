"""Rows of one raw file looked up by id from another."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from preprocessing.common.raw_files import BadRow, BadRows, Block


class IdIndex:
    """Finds a row of a file by its unique int64 id, in 16 bytes a row. The row of a second occurrence of an id is a bad row."""

    def __init__(self, name: str, blocks: Iterable[Block], bad_rows: BadRows) -> None:
        """Read column `name`, which has no nulls, of blocks of one file; rows are numbered from 0 through them all."""
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
            complaint = f"{name} {every[row]} appears a second time. Remove one of the lines."
            bad_rows.add(BadRow(self._path, int(line[row]), complaint))
        self._order = order[~again]
        self._ids = every[self._order]

    def locate(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row of each id, [ids] int64; -1 where it is unknown."""
        if not len(self._ids):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[at] == ids, self._order[at], -1)

    def find(self, block: Block) -> tuple[Block, NDArray[np.int64]]:
        """The block's rows whose id is known, and the row of each, [rows] int64. The others are bad rows."""
        rows = self.locate(block.table[self._name].to_numpy())
        remedy = f"is not in {self._path.name}. Fetch both files again from one release."
        block = block.require(rows >= 0, f"{self._name} {{{self._name}}} {remedy}")
        return block, rows[rows >= 0]
