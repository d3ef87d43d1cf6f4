"""Managed tables in checkpoints: which key holds which slot, and what the rule has to remember.

Each rank writes what its buckets hold, as tensors `managed.TABLE.RANK.NAME`; the keys of rank after rank are sorted. What is
uint64 is written as int64 of the same bits, counts and steps as int32. The best checkpoint has the map alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmlrec.errors import CheckpointError, StorageError
from mmlrec.hashing import UInt64Array
from mmlrec.run_folder import whole
from mmlrec.run_folder.index import SavedTensor, saved_tensors
from mmlrec.slots.buckets import Buckets
from mmlrec.slots.occurrences import KeyCounts, Occurrences
from mmlrec.slots.rule import Holders, OwnBuckets
from mmlrec.slots.slot_map import SlotArray
from mmlrec.storage.places import Place

_PREFIX = "managed"


def to_tensors(table: str, rank: int, own: OwnBuckets, *, history: bool) -> dict[str, torch.Tensor]:
    """What a rank writes of a table, by flat key; the tensors are the arrays themselves.

    Args:
        history: what the rule has to remember, too.
    """
    holders, arrived = own.holders, own.arrived
    found: dict[str, NDArray[Any]] = {"keys": holders.keys, "slots": holders.slots}
    if history:
        found |= {"counts": holders.counts, "last": holders.last}
        found |= {f"arrived_{name}": column for name, column in arrived._asdict().items()}
        if own.others is not None:
            found |= dict(zip(("other_keys", "other_counts"), own.others.entries(), strict=True))
    signed = {"u": {8: np.int64, 4: np.int32}}
    return {
        f"{_PREFIX}.{table}.{rank}.{name}": torch.from_numpy(
            np.ascontiguousarray(array.view(signed["u"][array.itemsize]) if array.dtype.kind == "u" else array)
        )
        for name, array in found.items()
    }


class StoredTable:
    """A managed table of a checkpoint, written by any number of ranks; read without a process group.

    Args:
        folder: the checkpoint, training or best, which is whole (see `checkpoint.verify`).
        saved: its tensors, where several tables are read; `saved_tensors` of it when absent.

    Raises:
        CheckpointError: it has no managed table of that name, or cannot be read.
    """

    def __init__(self, folder: Place, table: str, saved: Mapping[str, SavedTensor] | None = None) -> None:
        self._folder, self._table = folder, table
        saved = tensors_of(folder) if saved is None else saved
        begin = f"{_PREFIX}.{table}."
        self._saved = {key.removeprefix(begin): tensor for key, tensor in saved.items() if key.startswith(begin)}
        self._ranks = len({name.partition(".")[0] for name in self._saved})
        if not self._ranks:
            raise CheckpointError(f"{folder}: this checkpoint has no managed table '{table}': it is of another run or dataset.")

    @property
    def has_history(self) -> bool:
        """Whether it is a checkpoint to train on from, not the best one."""
        return "0.counts" in self._saved

    def map(self) -> tuple[UInt64Array, SlotArray]:
        """All keys that hold slots, sorted, and their slots 1..S."""
        return self._all("keys").view(np.uint64), self._all("slots")

    def read(self, own: OwnBuckets, buckets: Buckets, of: range) -> None:
        """Let the buckets of a rank be what was saved, map and history.

        Args:
            of: which they are.
        """
        keys = ("keys", "slots", "counts", "last")
        held, slots, counts, last = self._range(buckets, of, *keys)
        own.holders = Holders(held.view(np.uint64), slots, counts.view(np.uint32), last.view(np.uint32))
        arrived, numbers, steps = self._range(buckets, of, *(f"arrived_{name}" for name in Occurrences._fields))
        own.arrived = Occurrences(arrived.view(np.uint64), numbers, steps)
        if own.others is not None:
            others, numbers = self._range(buckets, of, "other_keys", "other_counts")
            own.others = KeyCounts(others.view(np.uint64), numbers.view(np.uint32))

    def history(self) -> Occurrences:
        """Of a checkpoint with history, all keys that are known, with or without a slot.

        The last step is 0 of keys of which only the occurrences are remembered.
        """
        parts = [Occurrences(self._all("keys").view(np.uint64), *self._numbers("counts", "last"))]
        keys, counts, last = (self._all(f"arrived_{name}") for name in Occurrences._fields)
        parts.append(Occurrences(keys.view(np.uint64), counts, last))
        if "0.other_keys" in self._saved:
            (numbers,) = self._numbers("other_counts")
            parts.append(Occurrences(self._all("other_keys").view(np.uint64), numbers, np.zeros(len(numbers), np.int64)))
        return Occurrences.joined(parts)

    def _numbers(self, *names: str) -> list[NDArray[np.int64]]:
        """Columns of uint32, as int64."""
        return [self._all(name).view(np.uint32).astype(np.int64) for name in names]

    def _all(self, name: str) -> NDArray[Any]:
        return np.concatenate([self._tensor(rank, name) for rank in range(self._ranks)])

    def _range(self, buckets: Buckets, of: range, *names: str) -> list[NDArray[Any]]:
        """Some columns, sorted by the first one, which are keys, of some buckets."""
        parts = []
        for rank in range(self._ranks):
            written = buckets.of_rank(rank, self._ranks)
            if written.start < of.stop and of.start < written.stop:
                columns = [self._tensor(rank, name) for name in names]
                places = buckets.places(columns[0].view(np.uint64), of)
                parts.append([column[places[0] : places[-1]] for column in columns])
        if not parts:
            return [self._tensor(0, name)[:0] for name in names]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def _tensor(self, rank: int, name: str) -> NDArray[Any]:
        found = self._saved.get(f"{rank}.{name}")
        if found is None:
            raise CheckpointError(f"{self._folder}: it lacks '{name}' of the managed table '{self._table}'.")
        try:
            content: NDArray[Any] = found.read().numpy()
            return content
        except StorageError:
            raise
        except OSError as cause:
            raise CheckpointError(f"{self._folder}: '{name}' of '{self._table}' cannot be read: {cause}.") from cause


def tensors_of(folder: Place) -> dict[str, SavedTensor]:
    """All tensors of a checkpoint by flat key."""
    return saved_tensors(whole.inside(folder))


def read(folder: Place, table: str) -> tuple[UInt64Array, NDArray[np.int64]]:
    """Keys that hold slots of a managed table in a checkpoint, training or best, sorted, and their slots 1..S; [n] each.

    Raises:
        CheckpointError: it has no managed table of that name, or cannot be read.
    """
    keys, slots = StoredTable(folder, table).map()
    return keys, slots.astype(np.int64)
