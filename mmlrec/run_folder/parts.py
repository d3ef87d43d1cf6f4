"""What each rank writes of a checkpoint: its own shards, and its part of what all ranks have alike.

The plan is DCP's, but for tensors that every rank has: they are shared out by size, the largest first, to the rank that has
least to write. It is made once and holds as long as names, shapes and places of the tensors do.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from mmlrec.distributed.world import World
from mmlrec.run_folder.summed_files import Writer
from mmlrec.run_folder.whole import FAILURES, Sums
from mmlrec.storage.places import Place


class _Planner(DefaultSavePlanner):
    """DCP's plan, evenly; data are taken from copies where there are some."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[MetadataIndex, Tensor] = {}

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """As the base class, which finds nothing left that two ranks would write."""
        return super().create_global_plan(evenly(all_plans))

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor, or shard of this rank."""
        copy = self.copies.get(index)
        return super().lookup_object(index) if copy is None else copy


class Parts:
    """What this rank writes of a checkpoint, and, the same on all ranks, what all of it consists of.

    All ranks make it together.

    Args:
        tensors: flat key -> tensor, plain or sharded; only referred to.
        before: parts of an earlier checkpoint, whose plan holds where the tensors have not changed their form.
    """

    def __init__(self, tensors: Mapping[str, Any], world: World, before: Parts | None = None) -> None:
        self._planner = _Planner()
        self._planner.set_up_planner(dict(tensors), is_coordinator=world.is_main)
        self._local = self._planner.create_local_plan()
        self._plan: SavePlan
        self._metadata: Metadata
        if before is not None and not world.any(self._local != before._local):
            self._plan, self._metadata = before._plan, before._metadata
            return
        plans, self._metadata = self._planner.create_global_plan(world.gather(self._local))
        self._plan = Writer(Path()).prepare_global_plan(plans)[world.rank]

    def copy(self, buffers: dict[MetadataIndex, Tensor]) -> None:
        """Let the tensors change from now on: written is what they are now.

        Args:
            buffers: take the copies; those of an earlier checkpoint are used again.
        """
        for item in self._plan.items:
            tensor = self._planner.lookup_object(item.index).detach()
            buffer = buffers.get(item.index)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffers[item.index] = buffer
            buffer.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._planner.copies = buffers

    @property
    def copied(self) -> bool:
        """Whether the tensors may change."""
        return bool(self._planner.copies)

    @property
    def num_bytes(self) -> int:
        """Of the tensors of all ranks."""
        entries = cast("Iterable[TensorStorageMetadata]", self._metadata.state_dict_metadata.values())
        return sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries)

    def write(self, folder: Place) -> tuple[list[WriteResult], dict[str, Sums]]:
        """Write the files of this rank.

        Returns:
            Where each tensor lies in them, and size and checksum of each file by its name.

        Raises:
            OSError, StorageError: they cannot be written.
        """
        writer = Writer(folder)
        try:
            return list(writer.write_data(self._plan, self._planner).value()), writer.written
        except RuntimeError as error:
            # What torch.save makes of an error of the file while it closes its archive.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, FAILURES):
                cause = cause.__context__
            raise error if cause is None else cause from None

    def write_index(self, folder: Place, results: list[list[WriteResult]]) -> dict[str, Sums]:
        """Write the index, which says where every tensor of all ranks lies; size and checksum of its file by its name.

        Raises:
            OSError, StorageError: it cannot be written.
        """
        writer = Writer(folder)
        writer.finish(dataclasses.replace(self._metadata), results)
        return writer.written


def evenly(plans: list[SavePlan]) -> list[SavePlan]:
    """Plans without what others write, too: that is left to the one with least to write, the largest first."""
    holders = Counter(item.index for plan in plans for item in plan.items)
    loads = [sum(_num_bytes(item) for item in plan.items if holders[item.index] == 1) for plan in plans]
    shared = {item.index: item for plan in plans for item in plan.items if holders[item.index] > 1}
    ranks: dict[MetadataIndex, list[int]] = {index: [] for index in shared}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            if item.index in shared:
                ranks[item.index].append(rank)
    writer = {}
    for index, item in sorted(shared.items(), key=lambda entry: (-_num_bytes(entry[1]), entry[0].fqn)):
        writer[index] = min(ranks[index], key=lambda rank: (loads[rank], rank))
        loads[writer[index]] += _num_bytes(item)
    return [
        dataclasses.replace(plan, items=[item for item in plan.items if writer.get(item.index, rank) == rank])
        for rank, plan in enumerate(plans)
    ]


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
