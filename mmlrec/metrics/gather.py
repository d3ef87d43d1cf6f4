"""Predictions of this rank, and those of all ranks on rank 0, exact and in the order of the rows on disk."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import Tensor

from mmlrec.errors import DataError
from mmlrec.hashing import mix64
from mmlrec.metrics.exact import CHUNK_ROWS
from mmlrec.metrics.ranks import Ranks, wire


@dataclass(frozen=True)
class PredictionRows:
    """Rows with their predictions, without padding.

    Attributes:
        logits: [N, T] float32, of each row's own scenario; the predicted value of regression tasks.
        labels: [N, T] float32, 0 where missing.
        mask: [N, T] bool, True where the label is present.
        scenario: [N] int32.
        weight: [N] float32.
        group: [N] int64, by which GAUC groups.
        row: [N] int64, position of the row in its split on disk.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    scenario: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float32]
    group: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]

    @classmethod
    def from_batch(
        cls,
        logits: Tensor,
        *,
        labels: Tensor,
        mask: Tensor,
        scenario: Tensor,
        weight: Tensor,
        group: Tensor,
        row: Tensor,
        valid: Tensor,
    ) -> PredictionRows:
        """The valid rows of a batch, copied to the host. Shapes as in `mmlrec.data.batch.Batch`, any device."""

        def rows(values: Tensor) -> npt.NDArray[Any]:
            # Always a copy: what a batch holds may be reused for the next one.
            return values.detach()[valid].cpu().numpy()

        return cls(
            rows(logits.float()), rows(labels), rows(mask > 0), rows(scenario.int()), rows(weight), rows(group), rows(row)
        )


class Collected:
    """Room for the rows of many batches, none of which is in memory twice; what is not filled takes no memory.

    Args:
        most: rows that come at most.
    """

    def __init__(self, most: int) -> None:
        self._most, self._num_rows = most, 0
        self._columns: dict[str, npt.NDArray[Any]] = {}

    def add(self, rows: PredictionRows) -> None:
        """Append the rows of a batch."""
        stop = self._num_rows + len(rows.row)
        for name, values in vars(rows).items():
            if name not in self._columns:
                self._columns[name] = np.empty((self._most, *values.shape[1:]), values.dtype)
            self._columns[name][self._num_rows : stop] = values
        self._num_rows = stop

    def rows(self) -> PredictionRows:
        """All rows of at least one batch; the same memory."""
        return PredictionRows(**{name: values[: self._num_rows] for name, values in self._columns.items()})


def check_each_once(row: npt.NDArray[np.int64], ranks: Ranks) -> None:
    """Raise DataError, on every rank, unless the rows of all ranks are 0, 1, ..., each once: by the sum of their hashes.

    Args:
        row: those of this rank, [N].
    """
    found = ranks.gather((len(row), _hashed(row)))
    num_rows = sum(count for count, _ in found)
    if sum(hashed for _, hashed in found) % 2**64 != _hashed(range(num_rows)):
        raise DataError(
            f"{num_rows} rows were predicted, some of them twice, or others than those of the split: do all ranks read the same"
            " dataset, split and batch size?"
        )


def _hashed(row: npt.NDArray[np.int64] | range) -> int:
    total = 0
    for start in range(0, len(row), CHUNK_ROWS):
        some = np.asarray(row[start : start + CHUNK_ROWS], np.int64)
        total += int(mix64(some.view(np.uint64)).sum(dtype=np.uint64))
    return total % 2**64


def joined(parts: list[PredictionRows]) -> PredictionRows:
    """The rows of all parts, one part behind the other; at least one. The list is emptied: no row is in memory twice."""
    if len(parts) == 1:
        return parts.pop()
    columns = [dict(vars(part)) for part in parts]
    parts.clear()
    return PredictionRows(**{f.name: np.concatenate([of.pop(f.name) for of in columns]) for f in fields(PredictionRows)})


def gather_rows(
    rows: PredictionRows, *, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None
) -> PredictionRows | None:
    """Join what each rank collected (any number of rows each), sorted by row, so the result is the same for every W.

    Args:
        rows: this rank's.
        group: process group of all ranks that takes CPU tensors (gloo); unused at world size 1.

    Returns:
        All rows on rank 0, None on the others.

    Raises:
        DataError: on rank 0, when a row comes twice: the readers of the ranks did not share one order.
    """
    own = dict(vars(rows))
    if world_size > 1:
        counts = [0] * world_size
        dist.all_gather_object(counts, len(own["row"]), group=group)
        if rank > 0:
            for values in own.values():
                if len(values):
                    dist.send(wire(values), dst=0, group=group)
            return None
        own = {name: _receive(values, counts, group) for name, values in own.items()}
    order = np.argsort(own["row"], kind="stable")
    joined = PredictionRows(**{name: values[order] for name, values in own.items()})
    twice = np.flatnonzero(joined.row[1:] == joined.row[:-1])
    if len(twice):
        raise DataError(
            f"row {joined.row[twice[0]]} was predicted twice ({len(twice)} such rows in all):"
            " do all ranks read the same dataset, split and batch size?"
        )
    return joined


def _receive(own: npt.NDArray[Any], counts: list[int], group: dist.ProcessGroup | None) -> npt.NDArray[Any]:
    out = np.empty((sum(counts), *own.shape[1:]), own.dtype)
    out[: counts[0]] = own
    ends = np.cumsum(counts)
    for source in range(1, len(counts)):
        if counts[source]:
            dist.recv(wire(out[ends[source - 1] : ends[source]]), src=source, group=group)
    return out
