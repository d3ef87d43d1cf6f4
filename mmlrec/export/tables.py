"""Tables of a checkpoint as memory-mapped files, in float32, float16, or 8 bits with scale and offset of each row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmlrec.errors import DataError

Precision = Literal["fp32", "fp16", "int8"]
#: Of float32 rows in memory at a time, in bytes.
CHUNK_BYTES = 32 << 20
#: How safetensors calls the numbers of a table, and their bytes.
_KINDS = {"fp32": ("F32", 4), "fp16": ("F16", 2), "int8": ("U8", 1)}
_LARGEST_HALF = float(np.finfo(np.float16).max)


def write_table(path: Path, name: str, rows: Iterable[Tensor], shape: tuple[int, int], precision: Precision) -> None:
    """Write a table as a safetensors file, while its rows come.

    `weight` [V, D] is F32, F16 or U8; with int8 there are `scale` and `offset`, [V] F32: see `quantised`.

    Args:
        name: of the table, for messages.
        rows: [N, D] float32, in order.
        shape: V, D.

    Raises:
        DataError: a number is not finite, or does not fit; naming table and row.
    """
    num_rows, dim = shape
    kind, num_bytes = _KINDS[precision]
    tensors = {"weight": (kind, [num_rows, dim], num_bytes * num_rows * dim)}
    if precision == "int8":
        # First, for their numbers take 4 bytes each and begin at a multiple of that.
        tensors = {part: ("F32", [num_rows], 4 * num_rows) for part in ("scale", "offset")} | tensors
    with _safetensors(path, tensors) as (file, places):
        start = 0
        for chunk in rows:
            _check_finite(chunk, name, start)
            numbers = chunk.numpy()
            weight: npt.NDArray[Any]
            if precision == "int8":
                weight, scale, offset = quantised(numbers)
                for part, values in (("scale", scale), ("offset", offset)):
                    file.seek(places[part] + 4 * start)
                    file.write(values.tobytes())
            else:
                weight = numbers if precision == "fp32" else _halves(numbers, name, start)
            file.seek(places["weight"] + num_bytes * dim * start)
            file.write(weight.tobytes())
            start += len(numbers)


def quantised(
    rows: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Row-wise affine quantisation to 8 bits: row r is `weight[r] * scale[r] + offset[r]`, to half a scale.

    Args:
        rows: [N, D], finite.

    Returns:
        weight [N, D] uint8; scale and offset, both [N]: a 255th of the row's range, and its least number.
    """
    least, greatest = rows.min(axis=1), rows.max(axis=1)
    # In float64: the range of a row may be twice what float32 holds, a 255th of it nothing.
    scale = ((greatest.astype(np.float64) - least) / 255).astype(np.float32)
    steps = (rows.astype(np.float64) - least[:, None]) / np.where(scale > 0, scale, 1)[:, None]
    return np.clip(np.rint(steps), 0, 255).astype(np.uint8), scale, least


def _halves(numbers: npt.NDArray[np.float32], name: str, start: int) -> npt.NDArray[np.float16]:
    """Nearest numbers in float16."""
    with np.errstate(over="ignore"):
        halves = numbers.astype(np.float16)
    large = np.flatnonzero(np.isinf(halves).any(axis=1))
    if len(large):
        row = int(large[0])
        worst = float(np.abs(numbers[row]).max())
        raise DataError(
            f"table '{name}', row {start + row}: {worst:g} is too large for fp16, which ends at {_LARGEST_HALF:g}: export with"
            " --tables fp32 or int8."
        )
    return halves


def _check_finite(chunk: Tensor, name: str, start: int) -> None:
    bad = torch.nonzero(~chunk.isfinite().all(dim=1))
    if len(bad):
        raise DataError(
            f"table '{name}', row {start + int(bad[0])}: a number is not finite, so the run has diverged there. Train again"
            " with lower learning rates, or from an earlier checkpoint of the run."
        )


@contextmanager
def _safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Iterator[tuple[BinaryIO, dict[str, int]]]:
    """A new file with a header, and where each tensor's bytes begin. The package's own writer wants all bytes at once.

    Args:
        tensors: name -> kind, shape, bytes.
    """
    header, places, offset = {}, {}, 0
    for name, (kind, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + num_bytes]}
        places[name] = offset
        offset += num_bytes
    text = json.dumps(header).encode()
    text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8)  # so that numbers begin at a multiple of 64 bytes
    first = 8 + len(text)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.truncate(first + offset)
        yield file, {name: first + place for name, place in places.items()}
