"""Embedding tables as they lie on disk, in safetensors' format: mapped, not read. A lookup touches the pages of its rows.

Mapped here and not by the safetensors package: that maps for writing, which the kernel refuses for tables larger than memory,
and does not tell it that rows are read at random, so that it would read their neighbours, too.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmlrec.errors import DataError
from mmlrec.serving.card import AGAIN

#: dtype of a table in the card -> that of its `weight` in the file.
_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "int8": np.dtype("u1")}
#: dtypes as the file has them.
_STORED: dict[str, np.dtype[Any]] = {"F32": _DTYPES["fp32"], "F16": _DTYPES["fp16"], "U8": _DTYPES["int8"]}


@dataclass(frozen=True)
class Table:
    """A table of V rows of width D.

    Attributes:
        weight: [V, D] float32 or float16; or uint8, when row r stands for weight[r] * scale[r] + offset[r].
        scale, offset: [V] float32 of an int8 table, else None.
    """

    weight: NDArray[Any]
    scale: NDArray[np.float32] | None = None
    offset: NDArray[np.float32] | None = None

    @classmethod
    def open(cls, folder: Path, entry: dict[str, Any]) -> Table:
        """Map a table's file.

        Args:
            folder: of the exported model.
            entry: of the table, in the card.

        Raises:
            DataError: the file cannot be read, or is not what the card says.
        """
        path, of_row = folder / entry["file"], (_DTYPES["fp32"], (entry["rows"],))
        wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
            "weight": (_DTYPES.get(entry["dtype"]), (entry["rows"], entry["dim"]))
        }
        if entry["dtype"] == "int8":
            wanted |= {"scale": of_row, "offset": of_row}
        try:
            found = {part: array for part, array in _mapped(path).items() if part in wanted}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: the table '{entry['name']}' cannot be read: {error}. {AGAIN}") from error
        if lacking := [part for part in wanted if part not in found]:
            raise DataError(f"{path}: the table '{entry['name']}' has no {lacking[0]}. {AGAIN}")
        for part, array in found.items():
            if (array.dtype, array.shape) != wanted[part]:
                raise DataError(
                    f"{path}: {part} of the table '{entry['name']}' is {array.dtype} {list(array.shape)}, the card says"
                    f" {entry['dtype']} {list(wanted['weight'][1])}. {AGAIN}"
                )
        return cls(**found)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows of some ids, [n, D].

        Raises:
            IndexError: an id is no row.
        """
        rows = self.weight[ids].astype(np.float32, copy=False)
        if self.scale is not None and self.offset is not None:
            rows *= self.scale[ids][:, None]
            rows += self.offset[ids][:, None]
        return rows

    def pooled(self, ids: NDArray[np.int64], offsets: NDArray[np.int64], pooling: str) -> NDArray[np.float32]:
        """Sum or mean of the rows of each bag, [B, D]; of an empty bag 0.

        Args:
            ids: [n], those of all bags one after the other.
            offsets: [B + 1], where in `ids` each bag begins, and the last one ends; the first is 0.
            pooling: "sum" or "mean".
        """
        rows, lengths = self.rows(ids), offsets[1:] - offsets[:-1]
        if len(ids) == len(lengths) and lengths.all():  # one id in each
            return rows
        bags = np.zeros((len(lengths), self.weight.shape[1]), np.float32)
        if len(filled := np.flatnonzero(lengths)):
            bags[filled] = np.add.reduceat(rows, offsets[:-1][filled], axis=0)
        if pooling == "mean":
            bags /= np.maximum(lengths, 1)[:, None].astype(np.float32)
        return bags


def _mapped(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file: 8 bytes with the length of a JSON header, the header, the numbers.

    Raises ValueError, KeyError or TypeError where it is none, or cut off.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content.madvise(mmap.MADV_RANDOM)
    first = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:first])
    found = {}
    for name, of in header.items():
        if name != "__metadata__":
            start, stop = of["data_offsets"]
            dtype = _STORED[of["dtype"]]
            found[name] = np.frombuffer(content, dtype, (stop - start) // dtype.itemsize, first + start).reshape(of["shape"])
    return found
