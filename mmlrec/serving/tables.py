"""Embedding tables as they lie on disk: mapped, not read. A lookup touches the pages of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mmlrec.errors import DataError
from mmlrec.serving.card import AGAIN

#: dtype of a table in the card -> that of its `weight` in the file.
_DTYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.uint8}


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
        path = folder / entry["file"]
        parts = ("weight", "scale", "offset") if entry["dtype"] == "int8" else ("weight",)
        shape = (entry["rows"], entry["dim"])
        wanted = {
            "weight": (_DTYPES.get(entry["dtype"]), shape),
            "scale": (np.float32, shape[:1]),
            "offset": (np.float32, shape[:1]),
        }
        try:
            with safe_open(path, framework="pt") as file:
                found = {part: file.get_tensor(part).numpy() for part in parts}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: the table '{entry['name']}' cannot be read: {error}. {AGAIN}") from error
        for part, array in found.items():
            if (array.dtype, array.shape) != wanted[part]:
                raise DataError(
                    f"{path}: {part} of the table '{entry['name']}' is {array.dtype} {list(array.shape)}, the card says"
                    f" {entry['dtype']} {list(shape)}. {AGAIN}"
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
        rows, lengths = self.rows(ids), np.diff(offsets)
        if (lengths == 1).all():
            return rows
        bags = np.zeros((len(lengths), self.weight.shape[1]), np.float32)
        if len(filled := np.flatnonzero(lengths)):
            bags[filled] = np.add.reduceat(rows, offsets[:-1][filled], axis=0)
        if pooling == "mean":
            bags /= np.maximum(lengths, 1)[:, None].astype(np.float32)
        return bags
