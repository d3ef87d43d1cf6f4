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

    def find(self, block: Block) -> tuple[Block, NDArray[np.int64]]:
        """The block's rows whose id is known, and the row of each, [rows] int64. The others are bad rows."""
        wanted = block.table[self._name].to_numpy()
        at = np.minimum(np.searchsorted(self._ids, wanted), len(self._ids) - 1)
        known = self._ids[at] == wanted if len(self._ids) else np.zeros(len(wanted), bool)
        remedy = f"is not in {self._path.name}. Fetch both files again from one release."
        block = block.require(known, f"{self._name} {{{self._name}}} {remedy}")
        return block, self._order[at[known]]
