"""Integers from each rank to each: to every one others, or to all the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from mmlrec.distributed.world import World

#: [n, c] int64.
Rows = NDArray[np.int64]


def exchange(world: World, rows: Sequence[Sequence[Rows]]) -> list[list[Rows]]:
    """Send each rank its own rows and get those of all. All ranks call it; it copies what is sent once.

    Args:
        rows: for each rank, the same number of arrays of the same c.

    Returns:
        From each rank, its arrays.
    """
    if world.world_size == 1:
        return [list(rows[0])]
    width = rows[0][0].shape[1]
    sizes = torch.tensor([[len(array) for array in of_rank] for of_rank in rows])
    found = torch.empty_like(sizes)
    dist.all_to_all_single(found, sizes, group=world.control)
    sent = torch.from_numpy(np.concatenate([array for of_rank in rows for array in of_rank]))
    received = torch.empty(int(found.sum()), width, dtype=torch.int64)
    dist.all_to_all_single(received, sent, found.sum(1).tolist(), sizes.sum(1).tolist(), group=world.control)
    arrays = np.split(received.numpy(), np.cumsum(found.flatten().numpy())[:-1])
    count = found.shape[1]
    return [arrays[first : first + count] for first in range(0, len(arrays), count)]


def share(world: World, rows: Sequence[Rows]) -> list[list[Rows]]:
    """Let all ranks have the rows of each. All ranks call it; they have about as many rows, as it takes room for the most.

    Args:
        rows: some arrays of the same c, the same number on each rank.

    Returns:
        From each rank, its arrays.
    """
    if world.world_size == 1:
        return [list(rows)]
    own = torch.from_numpy(np.concatenate(list(rows)))
    found = [torch.empty(len(rows), dtype=torch.int64) for _ in range(world.world_size)]
    dist.all_gather(found, torch.tensor([len(array) for array in rows]), group=world.control)
    sizes = [of_rank.tolist() for of_rank in found]
    padded = torch.zeros(max(map(sum, sizes)), own.shape[1], dtype=torch.int64)
    padded[: len(own)] = own
    received = [torch.empty_like(padded) for _ in range(world.world_size)]
    dist.all_gather(received, padded, group=world.control)
    return [
        [array.numpy() for array in of_rank[: sum(lengths)].split(lengths)]
        for of_rank, lengths in zip(received, sizes, strict=True)
    ]
