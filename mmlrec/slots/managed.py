"""The managed tables of a session: keys of batches to slots, and slots to other keys at boundaries.

Between boundaries nobody's slot changes, so batches may be looked up as far ahead as a pipeline likes. All ranks have the same
map; what decides about it is shared out by buckets, and the outcome depends on the global batches alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mmlrec.config import ManagedConfig
from mmlrec.data.batch import Batch
from mmlrec.distributed.step_parts import LOOKUP
from mmlrec.distributed.world import World
from mmlrec.errors import ConfigError
from mmlrec.run_folder.index import SavedTensor
from mmlrec.schema import DatasetManifest, Table
from mmlrec.slots.buckets import Buckets
from mmlrec.slots.exchange import Rows, exchange, share
from mmlrec.slots.occurrences import Gathered, Occurrences
from mmlrec.slots.rule import OwnBuckets
from mmlrec.slots.slot_map import SlotMap, map_bytes
from mmlrec.slots.stored import StoredTable, tensors_of, to_tensors
from mmlrec.storage.places import Place

#: Slots are kept as int32.
_MOST_ROWS = 2**31


def managed_of(manifest: DatasetManifest) -> list[Table]:
    """The managed tables that features use.

    Raises:
        ConfigError: one has more rows than a slot can tell.
    """
    used = {feature.table for feature in manifest.sparse_features}
    tables = [table for table in manifest.tables if table.managed and table.name in used]
    if large := [table.name for table in tables if table.num_rows > _MOST_ROWS]:
        raise ConfigError(f"table '{large[0]}' is managed: it may have {_MOST_ROWS:,} rows at most.")
    return tables


class _Table:
    """One managed table on this rank.

    Attributes:
        looked_up: ids that this rank has looked up since that was asked last, and those of them without a slot; in training,
            and otherwise. Missing ids are not among them.
        window: the same of all ranks since the last boundary, as far as they have told each other.
        shares: of the interval before: ids looked up, and those without a slot.
        steps_before: of the run that it began with, and of those before that: steps count on, so that what was seen there was
            seen earlier.
    """

    def __init__(self, num_slots: int, world: World, config: ManagedConfig) -> None:
        self.buckets = Buckets.of(num_slots)
        self.own_range = self.buckets.of_rank(world.rank, world.world_size)
        self.map = SlotMap(num_slots)
        self.own = OwnBuckets(self.buckets, self.own_range, config)
        self.fed = Gathered()
        self.looked_up = {True: np.zeros(2, np.int64), False: np.zeros(2, np.int64)}
        self.window = np.zeros(2, np.int64)
        self.shares = np.zeros(2, np.int64)
        self.admitted = self.evicted = 0
        self.steps_before = 0

    def look_up(self, values: NDArray[np.int64], *, training: bool) -> NDArray[np.int64]:
        """Slots of keys, 0 for a missing one and for one that holds none."""
        slots = self.map.look_up(values.view(np.uint64))
        there = np.count_nonzero(values)
        self.looked_up[training] += (there, there - np.count_nonzero(slots))
        return slots


class ManagedTables:
    """All managed tables of a session; there may be none.

    Attributes:
        step: training steps whose batches were looked up.

    Raises:
        ConfigError: see `managed_of`.
    """

    def __init__(self, manifest: DatasetManifest, config: ManagedConfig, world: World) -> None:
        self._world, self._config = world, config
        self._tables = {table.name: _Table(table.num_rows - 1, world, config) for table in managed_of(manifest)}
        #: By the place of a feature among those of a batch.
        self._features = {
            place: self._tables[str(feature.table)]
            for place, feature in enumerate(manifest.sparse_features)
            if feature.table in self._tables
        }
        self.step = 0

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._tables)

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._tables)

    @property
    def num_bytes(self) -> int:
        """Of the maps on each rank, once all slots are held."""
        return sum(map_bytes(table.buckets.num_slots) for table in self._tables.values())

    def next_update(self, step: int) -> int | None:
        """The first boundary behind a step; None without managed tables."""
        every = self._config.update_every
        return (step // every + 1) * every if self else None

    def prepared(self, batches: Iterator[Batch], *, training: bool) -> Iterator[Batch]:
        """Batches with slots in place of keys; those of training are counted."""
        for batch in batches:
            with self._world.parts.of(LOOKUP, "slots of managed tables"):
                prepared = self._prepared(batch, training)
            yield prepared

    def _prepared(self, batch: Batch, training: bool) -> Batch:
        sparse = batch.sparse
        values, ends = sparse.values(), np.append(0, np.cumsum(sparse.length_per_key()))
        slots = torch.empty_like(values, pin_memory=True) if values.is_pinned() else torch.empty_like(values)
        slots.copy_(values)
        keys, out = values.numpy(), slots.numpy()
        self.step += training
        for place, table in self._features.items():
            of_feature = keys[ends[place] : ends[place + 1]]
            out[ends[place] : ends[place + 1]] = table.look_up(of_feature, training=training)
            if training:
                table.fed.add(of_feature.view(np.uint64), table.steps_before + self.step)
        looked_up = KeyedJaggedTensor(sparse.keys(), slots, lengths=sparse.lengths(), stride=sparse.stride())
        return replace(batch, sparse=looked_up)

    def tell(self) -> None:
        """Tell the ranks that own them how often keys were seen since the last time. All ranks call it."""
        tables = list(self._tables.values())
        fed = [table.fed.take() for table in tables]
        counts = np.array([[*table.looked_up[True], 0] for table in tables])
        parts = [
            [*(_of_rank(table, of, rank, self._world) for table, of in zip(tables, fed, strict=True)), counts]
            for rank in range(self._world.world_size)
        ]
        found = exchange(self._world, parts)
        for index, table in enumerate(tables):
            arrived = [of_rank[index] for of_rank in found]
            columns = [(rows[:, 0].view(np.uint64), rows[:, 1], rows[:, 2]) for rows in map(np.asfortranarray, arrived)]
            table.own.arrived = Occurrences.joined([table.own.arrived, *(Occurrences(*of) for of in columns)])
            table.looked_up[True][:] = 0
            table.window += sum(of_rank[-1][index, :2] for of_rank in found)

    def update(self) -> dict[str, NDArray[np.int64]]:
        """At a boundary: let slots change their keys. All ranks call it.

        Returns:
            Table -> slots that have another key than before, sorted: their rows have to begin anew. A slot that was free has
            the row that it was made with.
        """
        self.tell()
        own = [table.own.update() for table in self._tables.values()]
        rows = [np.stack([c.keys.view(np.int64), c.slots.astype(np.int64), c.gone.view(np.int64)], axis=1) for c in own]
        found = share(self._world, rows)
        anew = {}
        for index, (name, table) in enumerate(self._tables.items()):
            # The buckets of rank after rank are sorted.
            keys, slots, gone = np.concatenate([of_rank[index] for of_rank in found]).T.copy()
            lost = gone != 0
            if len(keys):
                table.map.change(np.sort(gone[lost].view(np.uint64)), keys.view(np.uint64), slots.astype(np.int32))
            table.admitted += len(keys)
            table.evicted += int(np.count_nonzero(lost))
            table.shares, table.window = table.window, np.zeros(2, np.int64)
            anew[name] = np.sort(slots[lost])
        return anew

    def begin(self, name: str, held: Occurrences, others: Occurrences, steps_before: int = 0) -> NDArray[np.int64]:
        """Before the first step: let keys that had rows in another run hold slots, each in its bucket.

        Where a bucket has fewer slots than keys, the rule says which of them have one. It is the same on all ranks.

        Args:
            held: these keys, with what the rule knows of them, which goes along.
            others: the keys that had none.
            steps_before: of the other run, which its last steps count.

        Returns:
            The slot of each of the keys of `held`, [n]; 0 for those without.
        """
        table = self._tables[name]
        # They have earned a row already, by the rule of the other run.
        everywhere = OwnBuckets(table.buckets, range(table.buckets.count), self._config.model_copy(update={"admit_after": 1}))
        everywhere.arrived = held
        changes = everywhere.update()
        table.map.replace(changes.keys, changes.slots)
        table.steps_before = steps_before
        places = table.buckets.places(changes.keys, table.own_range)
        table.own.holders = everywhere.holders.between(places[0], places[-1])
        slots = table.map.look_up(held.keys)
        if table.own.others is not None:
            left = Occurrences.joined([held.where(slots == 0), others])
            places = table.buckets.places(left.keys, table.own_range)
            own = slice(places[0], places[-1])
            table.own.others.add(left.keys[own], left.counts[own])
        return slots

    def tensors(self, *, history: bool) -> dict[str, torch.Tensor]:
        """What this rank writes into a checkpoint, by flat key. With history, `tell` comes before.

        Args:
            history: what training has to remember beside the map.
        """
        rank = self._world.rank
        found: dict[str, torch.Tensor] = {}
        for name, table in self._tables.items():
            found |= to_tensors(name, rank, table.own, history=history)
        return found

    @property
    def state(self) -> dict[str, Any]:
        """What the state of a checkpoint says of them, as `load` takes it; nothing where there are none."""
        numbers = {
            name: {
                "admitted": table.admitted,
                "evicted": table.evicted,
                "window": table.window.tolist(),
                "shares": table.shares.tolist(),
                "steps_before": table.steps_before,
            }
            for name, table in self._tables.items()
        }
        return {"managed": numbers} if numbers else {}

    def load(self, folder: Place, state: Mapping[str, Any], *, history: bool) -> None:
        """Be what a checkpoint holds, written by any number of ranks.

        Args:
            folder: the checkpoint, which is whole.
            state: its state.
            history: what training has to remember, too; a best checkpoint has none.

        Raises:
            CheckpointError: it has no such tables.
        """
        saved: dict[str, SavedTensor] = tensors_of(folder) if self else {}
        for name, table in self._tables.items():
            stored = StoredTable(folder, name, saved)
            table.map.replace(*stored.map())
            if history:
                stored.read(table.own, table.buckets, table.own_range)
            numbers = state["managed"][name]
            table.admitted, table.evicted = numbers["admitted"], numbers["evicted"]
            table.window, table.shares = np.array(numbers["window"]), np.array(numbers["shares"])
            table.steps_before = numbers["steps_before"]

    def diagnostics(self) -> dict[str, float]:
        """For the log of training, by key.

        The share of slots that are held, how many keys got and lost one so far, and the share of ids without a slot among those
        looked up between the last two boundaries.
        """
        found: dict[str, float] = {}
        for name, table in self._tables.items():
            found[f"managed/{name}/occupancy"] = len(table.map.keys) / table.buckets.num_slots
            found[f"managed/{name}/admissions"] = table.admitted
            found[f"managed/{name}/evictions"] = table.evicted
            if table.shares[0]:
                found[f"managed/{name}/without_slot"] = table.shares[1] / table.shares[0]
        return found

    def begin_report(self) -> None:
        """Count from now on what is looked up outside of training."""
        for table in self._tables.values():
            table.looked_up[False][:] = 0

    def report(self) -> dict[str, dict[str, int]]:
        """Of each table, with what was looked up outside of training since `begin_report`. All ranks call it."""
        counts = np.array([table.looked_up[False] for table in self._tables.values()]).reshape(-1, 2)
        total = sum(self._world.gather(counts)) if self else counts
        found = {}
        for (name, table), (looked_up, without) in zip(self._tables.items(), total.tolist(), strict=True):
            found[name] = {
                "slots": table.buckets.num_slots,
                "occupied": len(table.map.keys),
                "admissions": table.admitted,
                "evictions": table.evicted,
                "looked_up": looked_up,
                "without_slot": without,
            }
        return found


def _of_rank(table: _Table, fed: Occurrences, rank: int, world: World) -> Rows:
    """What a rank has to know of the keys that this one was fed."""
    places = table.buckets.places(fed.keys, table.buckets.of_rank(rank, world.world_size))
    chosen = slice(places[0], places[-1])
    return np.stack([fed.keys[chosen].view(np.int64), fed.counts[chosen], fed.last[chosen]], axis=1)
