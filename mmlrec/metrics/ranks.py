"""What the ranks of an evaluation say to each other: rows that go to other ranks, and small values that all know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold the rows of a split, each its own.

    Attributes:
        rank: of this process.
        world_size: how many there are.
        group: process group of all that takes CPU tensors (gloo); unused where there is one.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    def gather(self, value: T) -> list[T]:
        """The small values of all ranks, in their order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def exchange(self, rows: dict[str, NDArray[Any]], to: NDArray[np.integer]) -> dict[str, NDArray[Any]]:
        """Send rows to ranks; the rows that came to this one, those of rank 0 first.

        Args:
            rows: columns, each [N].
            to: the rank of each row, [N].
        """
        if self.world_size == 1:
            return rows
        order = np.argsort(to, kind="stable")
        counts = np.bincount(to, minlength=self.world_size)
        coming = [of_rank[self.rank] for of_rank in self.gather(counts.tolist())]
        received = {}
        for name, values in rows.items():
            out = np.empty(sum(coming), values.dtype)
            dist.all_to_all_single(wire(out), wire(values[order]), coming, counts.tolist(), group=self.group)
            received[name] = out
        return received


#: One process that has all rows.
ALONE = Ranks()


def wire(values: NDArray[Any]) -> Tensor:
    """An array as a tensor that gloo sends; the same memory."""
    tensor = torch.from_numpy(values)
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
