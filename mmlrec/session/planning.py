"""What a training would take on ranks that need not exist: memory of each, time of a step by phase, and what else there is.

Placement and times of tables are torchrec's planner's, memory and placement those that a training on such ranks has
(`make_plan`). Times are of a few rates of a rank: they compare plans, and are no measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mmlrec.balancing.gradients import GradientBalancing
from mmlrec.config import RunConfig
from mmlrec.embeddings.hardware import Hardware
from mmlrec.embeddings.placement import (
    FUSED,
    PHASES,
    PlacedTable,
    TablesDoNotFit,
    bytes_of_shard,
    place_tables,
    state_bytes,
    too_small,
)
from mmlrec.embeddings.plan_file import placement_of_plan
from mmlrec.embeddings.sharding import apply_table_optimizer
from mmlrec.embeddings.tables import NoTables, build_tables, table_configs
from mmlrec.models.base.model import MultiTaskModel
from mmlrec.registry import strategy
from mmlrec.schema import DatasetManifest
from mmlrec.session.network_cost import NetworkCost, bytes_beside_tables, network_cost
from mmlrec.session.optim import STATE_NUMBERS
from mmlrec.session.parts import build_network, build_spec, mean_lengths, table_branches
from mmlrec.slots.managed import managed_of
from mmlrec.slots.slot_map import map_bytes

#: Phases of a step in their order; ranks wait for each other between them.
STEP = {
    "ids": "ids to the ranks of their tables",
    "lookup": "lookup",
    "vectors": "pooled vectors to the ranks of their rows",
    "network": "network, forward and backward",
    "gradients": "gradients of the vectors back to the tables",
    "update": "update of the tables",
    "all_reduce": "gradients of the network to all ranks",
    "optimizer": "update of the network",
    "average": "averages of the replicas of the tables",
    "rounds": "exchanges between ranks, however little they carry",
    "host": "starting operators, and what of it a GPU does not hide",
}
_GIB = 2**30
_UNEVEN = 1.5  # times the mean, from which on a rank is called overloaded
_NOTABLE = 0.01  # of the memory of a rank, from which on what maps take is told
_TIGHT = 0.9  # of the memory that can be planned with
_HALVES = {"table_wise": 0, "table_row_wise": 2, "row_wise": 2}  # of all-reduces, for vectors there and back
_PYTHON = 4  # times what it takes to start an operator beside the network: torchrec and we do much around few of them


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        operations: floating-point operations per second that a rank does in wide matrix products.
        source: config file, for messages.
    """

    config: RunConfig
    manifest: DatasetManifest
    hardware: Hardware
    operations: float
    source: str

    def with_embeddings(self, **update: Any) -> Request:
        """The same with other keys of `embeddings`."""
        embeddings = self.config.embeddings.model_copy(update=update)
        return replace(self, config=self.config.model_copy(update={"embeddings": embeddings}))


@dataclass(frozen=True)
class Rank:
    """What one rank holds and does; bytes, and milliseconds of `PHASES`."""

    rank: int
    weights: int
    state: int
    network: int
    activations: int
    buffers: int
    times: dict[str, float]
    #: Bytes of tables in the memory of the host: their weights, and the optimizer's state.
    host_weights: int = 0
    host_state: int = 0

    @property
    def total(self) -> int:
        """All bytes, but those on the host."""
        return self.weights + self.state + self.network + self.activations + self.buffers

    @property
    def on_host(self) -> int:
        """Bytes of tables in the memory of the host."""
        return self.host_weights + self.host_state

    @property
    def table_ms(self) -> float:
        """Time of its tables in a step."""
        return sum(self.times.values())


@dataclass(frozen=True)
class Short:
    """Memory that is too small.

    Attributes:
        where: in words.
        needed, usable, memory: bytes.
    """

    where: str
    needed: int
    usable: int
    memory: int

    @property
    def missing(self) -> int:
        """Bytes that it is too small by."""
        return self.needed - self.usable


@dataclass(frozen=True)
class TrainingPlan:
    """A placement and what it costs. Where none fits, it is the one that needs least on the fullest rank.

    Attributes:
        unknown: features whose length is not recorded, and taken as 1.
        map_bytes: of the maps of managed tables, on each rank.
    """

    request: Request
    tables: list[PlacedTable]
    network: MultiTaskModel
    cost: NetworkCost
    unknown: list[str]
    map_bytes: int

    @property
    def rows_per_rank(self) -> int:
        """Rows of a global batch on each rank."""
        return -(-self.request.config.training.batch_size // self.request.hardware.world_size)

    @cached_property
    def ranks(self) -> list[Rank]:
        """All ranks, in their order."""
        optimizer = self.request.config.embeddings.optimizer.name
        world_size, replicas = self.request.hardware.world_size, self.request.config.embeddings.replicas
        sums = [[0, 0, 0, 0, 0] for _ in range(world_size // replicas)]
        times = [dict.fromkeys(PHASES, 0.0) for _ in sums]
        for table in self.tables:
            for shard in table.shards:
                own, first = sums[shard.rank], 0 if table.kernel == FUSED else 2
                weights, state = bytes_of_shard(table, shard, optimizer)
                own[first] += weights
                own[first + 1] += state
                own[4] += shard.buffers
                for phase, milliseconds in shard.times.items():
                    times[shard.rank][phase] += milliseconds
        network, activations = bytes_beside_tables(self.network, self.cost, self.request.config, world_size)
        return [
            Rank(rank, weights, state, network, activations, buffers, times[rank % len(sums)], *of_host)
            for rank, (weights, state, *of_host, buffers) in enumerate(sums * replicas)
        ]

    @cached_property
    def step(self) -> dict[str, float]:
        """Milliseconds of each phase of `STEP` on the slowest rank, for which the others wait."""
        hardware = self.request.hardware
        found = {phase: max(rank.times[phase] for rank in self.ranks) for phase in PHASES}
        bandwidths, cost = hardware.bandwidths, self.cost
        of_row = cost.occupied / self.request.operations + cost.traffic / bandwidths.memory
        found["network"] = 1000 * of_row * self.rows_per_rank
        parameters = sum(parameter.numel() * parameter.element_size() for parameter in self.network.parameters())
        # Each number is read and written once, and so is its state; its gradient is read.
        touched = parameters * (3 + 2 * STATE_NUMBERS[self.request.config.dense.optimizer.name])
        found["optimizer"] = 1000 * touched / bandwidths.memory
        bandwidth = bandwidths.in_host if hardware.num_hosts == 1 else bandwidths.between_hosts
        found["all_reduce"] = 1000 * 2 * (hardware.world_size - 1) / hardware.world_size * parameters / bandwidth
        if (replicas := self.request.config.embeddings.replicas) > 1:
            held = max(rank.weights + rank.state + rank.on_host for rank in self.ranks)
            of_step = held / self.request.config.embeddings.average_every
            found["average"] = 1000 * 2 * (replicas - 1) / replicas * of_step / bandwidth
        found["rounds"] = 1000 * self.rounds * bandwidths.round
        on_gpu = hardware.device == "cuda"
        present = min(self.network.spec.num_scenarios, self.rows_per_rank)  # What has no row is passed over.
        of_scenarios = 0.0 if on_gpu else cost.launches_of_scenario * (present - 1)
        launches = cost.launches + of_scenarios + _PYTHON * self.launches_beside_network
        hidden = sum(found[phase] for phase in ("lookup", "network", "update", "optimizer")) if on_gpu else 0.0
        found["host"] = max(0.0, 1000 * launches * bandwidths.launch - hidden)
        return {phase: found[phase] for phase in STEP if phase in found}

    @property
    def launches_beside_network(self) -> int:
        """Operators of a step for ids, tables, loss and optimizers, counted in steps; each way to place tables has its own."""
        if self.request.hardware.world_size == 1:
            return 93
        return 100 + sum(75 if kind == "table_row_wise" else 50 for kind in {table.sharding for table in self.tables})

    @property
    def collectives(self) -> dict[str, int]:
        """How often ranks meet in a step: in all-to-alls, halves of all-reduces (reduce-scatter, all-gather), all-reduces.

        Once for the sizes of messages, twice for ids and their lengths and once each way for vectors, for each kind of
        placement; with table_row_wise once more each way, within a host. Once for the sums of the loss, and for the gradients
        of the network, which DistributedDataParallel joins.
        """
        kinds = {table.sharding for table in self.tables} if self._copy.world_size > 1 else set()
        all_to_alls = {"table_wise": 4, "table_row_wise": 4, "row_wise": 2}
        return {
            "all_to_all": bool(kinds) + sum(all_to_alls[kind] for kind in kinds),
            "half": sum(_HALVES[kind] for kind in kinds),
            "all_reduce": 2 if self.request.hardware.world_size > 1 else 0,
        }

    @property
    def rounds(self) -> int:
        """Messages of a step that wait for each other: one for an all-to-all, log2 of its ranks for half of an all-reduce.

        Those are the ranks that share a table; sums of the loss and gradients are of all.
        """
        found = self.collectives
        halves = [(_HALVES[kind], self._copy.split_over(kind)) for kind in {table.sharding for table in self.tables}]
        halves.append((2 * found["all_reduce"], self.request.hardware.world_size))
        return found["all_to_all"] + sum(number * (ranks - 1).bit_length() for number, ranks in halves)

    @property
    def _copy(self) -> Hardware:
        """The ranks of one copy of the tables."""
        return self.request.hardware.of_replica(self.request.config.embeddings.replicas)

    @property
    def step_ms(self) -> float:
        """Predicted time of a step."""
        return sum(self.step.values())

    @property
    def fullest(self) -> Rank:
        """The rank that needs most memory."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def fullest_on_host(self) -> Rank:
        """The rank whose tables take most of the memory of its host."""
        return max(self.ranks, key=lambda rank: rank.on_host)

    @property
    def fullest_words(self) -> str:
        """What the fullest ranks need, of their own memory and of that of their hosts, where they use it."""
        of_host = self.fullest_on_host.on_host
        beside = f" and {of_host / _GIB:.2f} GiB in the memory of its host" if of_host else ""
        return f"{self.fullest.total / _GIB:.2f} GiB on the fullest rank{beside}"

    @property
    def short(self) -> Short | None:
        """What most bytes are missing of; None where all fits."""
        hardware, on_host = self.request.hardware, self.fullest_on_host
        found = [Short(f"rank {self.fullest.rank}", self.fullest.total, hardware.usable, hardware.memory)]
        if on_host.on_host:
            share = f"rank {on_host.rank} in the memory of its host"
            found.append(Short(share, on_host.on_host, hardware.usable_on_host, hardware.host_memory))
        most = max(found, key=lambda short: short.missing)
        return most if most.missing > 0 else None

    @property
    def missing(self) -> int:
        """Bytes that the fullest rank has too few, of its own or of its host's memory; 0 when all fits."""
        short = self.short
        return short.missing if short else 0

    @property
    def imbalance(self) -> dict[str, float]:
        """Largest over mean of the ranks: memory of the tables, wherever it is, and their time in a step."""
        found = {}
        for name, values in (
            ("table_memory", [rank.weights + rank.state + rank.on_host for rank in self.ranks]),
            ("table_time", [rank.table_ms for rank in self.ranks]),
        ):
            mean = sum(values) / len(values)
            found[name] = max(values) / mean if mean else 1.0
        return found

    def warnings(self) -> list[str]:
        """What is wrong or unwise, a sentence each."""
        return list(self._warnings())

    def _warnings(self) -> Iterator[str]:
        hardware = self.request.hardware
        if short := self.short:
            yield (
                f"does not fit: {short.where} needs {short.needed / _GIB:.2f} GiB,"
                f" {short.usable / _GIB:.2f} of its {short.memory / _GIB:.2f} GiB can be planned with:"
                f" {short.missing / _GIB:.2f} GiB too many"
            )
        elif self.fullest.total > _TIGHT * hardware.usable:
            yield (
                f"tight: rank {self.fullest.rank} fills {self.fullest.total / hardware.usable:.0%} of the memory that can be"
                " planned with"
            )
        if hardware.world_size > 1 and self.tables and self.imbalance["table_time"] > _UNEVEN:
            slowest = max(self.ranks, key=lambda rank: rank.table_ms)
            times = {
                table.name: sum(sum(shard.times.values()) for shard in table.shards if shard.rank == slowest.rank)
                for table in self.tables
            }
            names = sorted((name for name, time in times.items() if time), key=lambda name: -times[name])
            yield (
                f"rank {slowest.rank} is overloaded: its tables take {slowest.table_ms:.2f} ms of a step,"
                f" {self.imbalance['table_time']:.1f} times the mean of the ranks; most of it {_some(names, 3)}"
            )
        embeddings = self.request.config.embeddings
        if on_host := [table.name for table in self.tables if table.kernel != FUSED]:
            of_hosts = Counter[int]()
            for rank in self.ranks:
                of_hosts[rank.rank // hardware.ranks_per_host] += rank.on_host
            most = max(of_hosts.values())
            yield (
                f"{len(on_host)} table(s) lie in the memory of the hosts, {most / _GIB:.2f} GiB on the fullest, with"
                f" {embeddings.host_cache:g} of their rows in a cache on the GPUs: {_some(on_host, 5)}"
            )
        sharing = self._copy.world_size
        small = [table.name for table in self.tables if len(table.ranks) == 1 and too_small(table.rows, sharing)]
        if small and sharing > 1:
            yield f"too small to split over {sharing} ranks, so whole on one: {_some(small, 5)}"
        empty = sum(not (rank.weights or rank.on_host) for rank in self.ranks)
        if empty and self.tables:
            yield f"{empty} of {hardware.world_size} ranks hold no table"
        if self.map_bytes >= _NOTABLE * hardware.memory:
            yield (
                f"managed tables: each rank keeps {self.map_bytes / _GIB:.2f} GiB in its host's memory to find their slots, and"
                " all ranks together 12 bytes for each distinct id; neither is counted here (docs/managed_ids.md)"
            )
        name = self.request.config.balancing["name"]
        if issubclass(strategy(name), GradientBalancing):
            yield (
                f"balancing.name={name} takes a backward pass of the network for each objective, in place of one for all, and"
                " keeps their gradients: the network takes longer, and more memory, than counted here"
                " (docs/balancing/README.md)"
            )
        if self.unknown:
            yield (
                f"the dataset does not record how many ids a row has of {_some(self.unknown, 5)}: taken as 1. Preprocess again"
                " to have them counted"
            )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data; `embeddings.plan` takes it."""
        hardware, config = self.request.hardware, self.request.config
        optimizer = config.embeddings.optimizer.name
        return {
            "form": 1,
            "config": self.request.source,
            "hardware": {
                "hosts": hardware.num_hosts,
                "ranks_per_host": hardware.ranks_per_host,
                "ranks": hardware.world_size,
                "device": hardware.device,
                "memory_bytes": hardware.memory,
                "usable_bytes": hardware.usable,
                "bytes_per_second": {
                    "in_host": hardware.bandwidths.in_host,
                    "between_hosts": hardware.bandwidths.between_hosts,
                    "memory": hardware.bandwidths.memory,
                },
                "seconds": {"round": hardware.bandwidths.round, "launch": hardware.bandwidths.launch},
                "operations_per_second": self.request.operations,
            },
            "batch_size": config.training.batch_size,
            "optimizer": optimizer,
            "dtype": config.embeddings.dtype,
            "fits": not self.missing,
            "missing_bytes": self.missing,
            "tables": [
                {
                    "table": table.name,
                    "rows": table.rows,
                    "dim": table.dim,
                    "pooling_lengths": list(table.lengths),
                    "sharding": table.sharding,
                    "kernel": table.kernel,
                    "ranks": table.ranks,
                    "replicas": config.embeddings.replicas,
                    "weight_bytes": table.weight_bytes,
                    "state_bytes": state_bytes(optimizer, table.rows, table.dim),
                    "why": table.why,
                }
                for table in self.tables
            ],
            "ranks": [
                {
                    "rank": rank.rank,
                    "host": rank.rank // hardware.ranks_per_host,
                    "weight_bytes": rank.weights,
                    "state_bytes": rank.state,
                    "network_bytes": rank.network,
                    "activation_bytes": rank.activations,
                    "buffer_bytes": rank.buffers,
                    "total_bytes": rank.total,
                    "host_bytes": rank.on_host,
                    "table_ms": rank.table_ms,
                }
                for rank in self.ranks
            ],
            "step": self.step,
            "step_ms": self.step_ms,
            "samples_per_second": 1000 * config.training.batch_size / self.step_ms if self.step_ms else None,
            "imbalance": self.imbalance,
            "warnings": self.warnings(),
        }


def _some(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def plan_training(request: Request, known: TrainingPlan | None = None) -> TrainingPlan:
    """Place the tables of a training and predict what it takes; reads no row, needs no GPU and no process group.

    Args:
        known: another plan of the same network, whose cost need not be measured again if its tables are as wide.

    Raises:
        ConfigError: the method, its options or the setting do not fit, `embeddings` names tables that are not there, managed
            ones with more rows than slots can tell, or a plan of other tables or ranks.
    """
    config, manifest, hardware = request.config, request.manifest, request.hardware
    embeddings = config.embeddings
    replica = hardware.of_replica(embeddings.replicas)
    spec = build_spec(config, manifest)
    if known is not None and known.network.spec == spec:
        network, cost = known.network, known.cost
    else:
        network = build_network(config, spec, request.source)
        cost = network_cost(network, bf16=config.training.precision == "bf16")
    branches = table_branches(network, manifest)
    maps = sum(map_bytes(table.num_rows - 1) for table in managed_of(manifest))
    tables = build_tables(table_configs(manifest, embeddings, branches))
    lengths, without = mean_lengths(manifest, branches)
    if isinstance(tables, NoTables):
        return TrainingPlan(request, [], network, cost, without, maps)
    apply_table_optimizer(tables, embeddings.optimizer, torch.device(hardware.device))
    rows = -(-config.training.batch_size // hardware.world_size)
    try:
        placed = place_tables(
            tables,
            embeddings,
            replica,
            batch_size=rows,
            lengths=lengths,
            reserved=sum(bytes_beside_tables(network, cost, config, hardware.world_size)),
            given=placement_of_plan(tables, embeddings, replica),
        )
    except TablesDoNotFit as error:
        placed = error.flattest
    return TrainingPlan(request, placed, network, cost, without, maps)
