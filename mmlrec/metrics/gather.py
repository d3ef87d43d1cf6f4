"""Predictions of all ranks on rank 0, exact and in the order of the rows on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mmlrec.errors import DataError


@dataclass(frozen=True)
class PredictionRows:
    """Rows with their predictions, without padding.

    Attributes:
        logits: [N, T] float32, of each row's own scenario; the predicted value of regression tasks.
        labels: [N, T] float32, 0 where missing.
        mask: [N, T] bool, True where the label is present.
        scenario: [N] int64.
        weight: [N] float32.
        group: [N] int64, by which GAUC groups.
        row: [N] int64, position of the row in its split on disk.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    scenario: npt.NDArray[np.int64]
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

        return cls(rows(logits.float()), rows(labels), rows(mask > 0), rows(scenario), rows(weight), rows(group), rows(row))


def joined(parts: Sequence[PredictionRows]) -> PredictionRows:
    """The rows of all parts, one part behind the other; at least one."""
    if len(parts) == 1:
        return parts[0]
    return PredictionRows(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(PredictionRows)})


def gather_rows(
    collected: Sequence[PredictionRows], *, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None
) -> PredictionRows | None:
    """Join what each rank collected (any number of rows each), sorted by row, so the result is the same for every W.

    Args:
        collected: this rank's batches, at least one (it may hold no row).
        group: process group of all ranks that takes CPU tensors (gloo); unused at world size 1.

    Returns:
        All rows on rank 0, None on the others.

    Raises:
        DataError: on rank 0, when a row comes twice: the readers of the ranks did not share one order.
    """
    own: dict[str, npt.NDArray[Any]] = vars(joined(collected))
    if world_size > 1:
        counts = [0] * world_size
        dist.all_gather_object(counts, len(own["row"]), group=group)
        if rank > 0:
            for values in own.values():
                if len(values):
                    dist.send(_wire(values), dst=0, group=group)
            return None
        own = {name: _receive(values, counts, group) for name, values in own.items()}
    order = np.argsort(own["row"], kind="stable")
    rows = PredictionRows(**{name: values[order] for name, values in own.items()})
    twice = np.flatnonzero(rows.row[1:] == rows.row[:-1])
    if len(twice):
        raise DataError(
            f"row {rows.row[twice[0]]} was predicted twice ({len(twice)} such rows in all):"
            " do all ranks read the same dataset, split and batch size?"
        )
    return rows


def _receive(own: npt.NDArray[Any], counts: list[int], group: dist.ProcessGroup | None) -> npt.NDArray[Any]:
    out = np.empty((sum(counts), *own.shape[1:]), own.dtype)
    out[: counts[0]] = own
    ends = np.cumsum(counts)
    for source in range(1, len(counts)):
        if counts[source]:
            dist.recv(_wire(out[ends[source - 1] : ends[source]]), src=source, group=group)
    return out


def _wire(values: npt.NDArray[Any]) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
