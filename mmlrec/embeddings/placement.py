"""Which rank holds which rows, and what that costs: decided by torchrec's planner, without processes and without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption, Storage
from torchrec.distributed.types import CacheParams, ModuleSharder
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS, DataType

from mmlrec.config import EmbeddingsConfig
from mmlrec.embeddings.communication import Communication, communicable
from mmlrec.embeddings.hardware import Hardware
from mmlrec.errors import ConfigError, did_you_mean

#: Those that reshard into each other without loss, on every device; the more ranks share a table, the later. Column-wise is
#: wrong with row-wise Adagrad, grid is wrong with MEAN pooling, data-parallel tables would silently take the dense optimizer.
SHARDING_TYPES = ["table_wise", "table_row_wise", "row_wise"]

#: Parts of a step that tables take, in order, each with torchrec's name for it.
PHASES = {
    "ids": "input_dist_comms",
    "lookup": "fwd_compute",
    "vectors": "fwd_comms",
    "gradients": "bwd_comms",
    "update": "bwd_compute",
}


#: Of tables that lie where they are looked up, and of those in the memory of the host with a cache on the GPU.
FUSED, CACHED = "fused", "fused_uvm_caching"


#: Proposals one after the other that fit and are no better than the best one, after which no more are tried: there are as many
#: as tables, and each takes time for every table, so that all of them are hours for some thousand tables.
_MOST_IN_VAIN = 100


class Where(NamedTuple):
    """Where a table lies."""

    sharding: str
    ranks: list[int]
    kernel: str = FUSED


class PortableSharder(EmbeddingBagCollectionSharder):
    """Offers the portable sharding types on every device; TorchRec's own hides those by rows on CPU."""

    def __init__(self, communication: Communication | None = None, kernels: Sequence[str] = (FUSED,)) -> None:
        super().__init__(qcomm_codecs_registry=communication.codecs if communication else None)
        self._kernels = list(kernels)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """`SHARDING_TYPES`, whatever the device."""
        return SHARDING_TYPES

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Only fused kernels: the others ignore the table optimizer."""
        return self._kernels


class TablesDoNotFit(ConfigError):
    """No placement fits the memory of the ranks.

    Attributes:
        flattest: the placement that needs least on the fullest rank.
    """

    def __init__(self, message: str, flattest: list[PlacedTable]) -> None:
        super().__init__(message)
        self.flattest = flattest


@dataclass(frozen=True)
class Shard:
    """Rows of a table on one rank.

    Attributes:
        buffers: bytes of the ids and the looked-up vectors of a step, and of the cache of a table in the host's memory.
        times: phase of `PHASES` -> predicted milliseconds.
    """

    rank: int
    rows: int
    buffers: int
    times: dict[str, float]


@dataclass(frozen=True)
class PlacedTable:
    """A table and where its rows lie.

    Attributes:
        dtype: of its weights.
        lengths: mean number of ids of a row, of each feature that uses the table.
        shards: in the order of their rows.
        why: a sentence.
    """

    name: str
    rows: int
    dim: int
    dtype: DataType
    lengths: tuple[float, ...]
    sharding: str
    shards: tuple[Shard, ...]
    why: str
    kernel: str = FUSED

    @property
    def ranks(self) -> list[int]:
        """Ranks that hold rows."""
        return [shard.rank for shard in self.shards]

    @property
    def weight_bytes(self) -> int:
        """Of all its weights."""
        return weight_bytes(self.dtype, self.rows, self.dim)


def weight_bytes(dtype: DataType, rows: int, dim: int) -> int:
    """What the weights of some rows take."""
    return DATA_TYPE_NUM_BITS[dtype] // 8 * rows * dim


def state_bytes(optimizer: str, rows: int, dim: int) -> int:
    """What the fused kernel keeps of some rows beside their weights, all float32, whatever the weights are."""
    return {"sgd": 0, "rowwise_adagrad": 4 * rows, "adagrad": 4 * rows * dim, "adam": 8 * rows * dim}[optimizer]


class _Enumerator(EmbeddingEnumerator):
    """TorchRec's takes state of the optimizer and exchanged vectors to be numbers as short as the weights; they are float32."""

    def __init__(self, embeddings: EmbeddingsConfig, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._embeddings = embeddings

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """All ways to place the tables, with what their shards take."""
        options = super().enumerate(module, sharders)
        for option in options:
            times = 4 // option.tensor.element_size()
            for shard in option.shards if times > 1 else ():
                assert shard.storage is not None
                assert shard.perf is not None
                state = state_bytes(self._embeddings.optimizer.name, *shard.size)
                missing = state - state // times
                if option.compute_kernel == CACHED:
                    shard.storage += Storage(int(missing * (self._embeddings.host_cache or 0)), missing)
                else:
                    shard.storage += Storage(*((missing, 0) if self._compute_device == "cuda" else (0, missing)))
                if not any(sharder.qcomm_codecs_registry for sharder in sharders):
                    shard.perf.fwd_comms *= times
                    shard.perf.bwd_comms *= times
        return options


def too_small(rows: int, ranks: int) -> bool:
    """Whether a split over so many ranks would leave one without rows, where the fused kernel reads beyond its memory."""
    return -(-rows // ranks) * (ranks - 1) >= rows


def place_tables(
    tables: EmbeddingBagCollection,
    config: EmbeddingsConfig,
    hardware: Hardware,
    *,
    batch_size: int,
    lengths: Mapping[str, float] | None = None,
    reserved: int = 0,
    given: Mapping[str, Where] | None = None,
) -> list[PlacedTable]:
    """Place each table; the same on every rank, without communication.

    Args:
        tables: with their optimizer attached, see `apply_table_optimizer`.
        batch_size: rows per rank.
        lengths: feature -> mean number of ids of a row; 1 where it is not known.
        reserved: bytes of each rank that are not for tables.
        given: where each table lies, decided before; nothing is searched then.

    Raises:
        ConfigError: a table that does not exist or is too small for the sharding it is given by name, or hosts that are unequal
            where it asks for them.
        TablesDoNotFit: no placement fits the memory.
    """
    configs = tables.embedding_bag_configs()
    world_size = hardware.world_size
    if config.host_cache is not None and hardware.device == "cpu":
        raise ConfigError("embeddings.host_cache needs GPUs: on a CPU tables lie in the memory of the host. Leave it out.")
    for sharding in sorted({where.sharding for where in (given or {}).values()}):
        _check(sharding, "embeddings.plan", config, hardware)
    kernels = [FUSED] if config.host_cache is None else [FUSED, CACHED]
    asked = _asked(configs, config, hardware)
    wanted = {c.name: [given[c.name].sharding] if given else asked[c.name][0] for c in configs}
    known = lengths or {}
    constraints = {
        c.name: ParameterConstraints(
            sharding_types=wanted[c.name],
            compute_kernels=kernels,
            cache_params=None if config.host_cache is None else CacheParams(load_factor=config.host_cache),
            pooling_factors=[known.get(feature, 1.0) for feature in c.feature_names],
            output_dtype=DataType.FP32,  # of the looked-up vectors, whatever the weights are
        )
        for c in configs
    }
    dims = [c.embedding_dim for c in configs]
    sharder = PortableSharder(Communication(config.communication, batch_size * world_size, dims), kernels)
    module = nn.ModuleDict({"tables": tables})
    topology = hardware.topology(reserved)
    options: dict[str, dict[tuple[str, str], ShardingOption]] = {c.name: {} for c in configs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enumerator = _Enumerator(config, topology=topology, batch_size=batch_size, constraints=constraints)
        for option in enumerator.enumerate(module, [sharder]):
            options[option.name][option.sharding_type, option.compute_kernel] = option

    def placed(chosen: Mapping[str, Where], reasons: Mapping[str, str]) -> list[PlacedTable]:
        found = []
        for c in configs:
            where = chosen[c.name]
            option = options[c.name][where.sharding, where.kernel]
            found.append(_placed(c, option, where.ranks, constraints[c.name], reasons[c.name], config))
        return found

    if given:
        return placed(given, dict.fromkeys(given, "as the plan that was given says"))
    flattest = _by_size(configs, {name: types[-1] for name, types in wanted.items()}, hardware, kernels[-1])
    if all(len(types) == 1 for types in wanted.values()) and len(kernels) == 1:
        return placed(flattest, {name: why for name, (_, why) in asked.items()})
    # Trying all combinations (GridSearchProposer) found nothing better on 8, 64 and 512 ranks, and takes 3^8 proposals on 512.
    greedy = [GreedyProposer(use_depth=use_depth, threshold=_MOST_IN_VAIN) for use_depth in (True, False)]
    proposers = [*greedy, UniformProposer()]
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=enumerator,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        proposer=proposers,
        stats=[],
    )
    try:
        # plan() on every rank is deterministic; collective_plan() hangs the others when rank 0 raises.
        found: Any = planner.plan(module, [sharder]).plan["tables"]
    except PlannerError as error:
        tight = placed(flattest, dict.fromkeys(wanted, "needs least memory on the fullest rank"))
        fullest = max(bytes_of_ranks(tight, config.optimizer.name, world_size)) + reserved
        on_host = max(on_hosts(tight, config.optimizer.name, world_size))
        if fullest <= hardware.usable and on_host <= hardware.usable_on_host:
            return tight
        raise TablesDoNotFit(_shortage(fullest, on_host, config.optimizer.name, hardware), tight) from error
    chosen = {name: Where(found[name].sharding_type, list(found[name].ranks), found[name].compute_kernel) for name in wanted}
    reasons = {
        name: why if len(options[name]) == 1 else _comparison(options[name], chosen[name]) for name, (_, why) in asked.items()
    }
    return placed(chosen, reasons)


def _asked(
    configs: Sequence[EmbeddingBagConfig], config: EmbeddingsConfig, hardware: Hardware
) -> dict[str, tuple[list[str], str]]:
    """Sharding types that come into question for each table, and why where it is only one."""
    sizes = {c.name: c.num_embeddings for c in configs}
    for name, named in config.table_sharding.items():
        if name not in sizes:
            raise ConfigError(
                f"embeddings.table_sharding.{name}: no such table.{did_you_mean(name, sizes)} Tables: {', '.join(sizes)}."
            )
        if too_small(sizes[name], hardware.split_over(named)):
            raise ConfigError(
                f"embeddings.table_sharding.{name}: too few rows to give each of {_over(named, hardware)} some. Use table_wise."
            )
    offered = _offered(config, hardware)
    found: dict[str, tuple[list[str], str]] = {}
    for name, rows in sizes.items():
        sharding, key = config.sharding, "embeddings.sharding"
        if name in config.table_sharding:
            sharding, key = config.table_sharding[name], f"embeddings.table_sharding.{name}"
        if sharding != "auto":
            _check(sharding, key, config, hardware)
        wanted = offered if sharding == "auto" else [sharding]
        fitting = [kind for kind in wanted if not too_small(rows, hardware.split_over(kind))]
        small = f"too small to split: {rows:,} rows over {_over(wanted[-1], hardware)}"
        if hardware.world_size == 1:
            found[name] = ["table_wise" if sharding == "auto" else sharding], "there is one rank"
        elif offered == ["table_wise"] and sharding == "auto":
            found[name] = offered, f"{config.communication} is for vectors of whole tables only"
        elif sharding == "auto":
            found[name] = fitting, "" if len(fitting) > 1 else small
        elif fitting:
            found[name] = fitting, f"{key} asks for it"
        else:
            found[name] = ["table_wise"], small
    return found


def _offered(config: EmbeddingsConfig, hardware: Hardware) -> list[str]:
    """What `auto` chooses from: a host counts where it is a place of its own, sums over ranks where they can be sent."""
    kinds = [kind for kind in SHARDING_TYPES if kind != "table_row_wise" or hardware.host_of_several]
    return kinds if hardware.world_size == 1 else communicable(config.communication, hardware.device, kinds)


def _check(sharding: str, key: str, config: EmbeddingsConfig, hardware: Hardware) -> None:
    """Refuse a sharding that is asked for where the hosts or the communication do not allow it."""
    if sharding == "table_row_wise" and not hardware.has_whole_hosts:
        raise ConfigError(
            f"{key}: table_row_wise splits a table over the ranks of a host, and the launcher names hosts with different"
            " numbers of ranks. Start as many on each, or use row_wise."
        )
    if hardware.world_size > 1 and not communicable(config.communication, hardware.device, [sharding]):
        raise ConfigError(
            f"{key}: vectors of {sharding} tables are summed over ranks, which nobody does in {config.communication}"
            " (embeddings.communication). Use bf16 or fp16, or table_wise."
        )


def _over(sharding: str, hardware: Hardware) -> str:
    """`4 ranks`, or `2 ranks of a host`."""
    return f"{hardware.split_over(sharding)} ranks{' of a host' if sharding == 'table_row_wise' else ''}"


def _by_size(
    configs: Sequence[EmbeddingBagConfig], wanted: Mapping[str, str], hardware: Hardware, kernel: str
) -> dict[str, Where]:
    """Row-wise tables on all ranks, of the others the largest first, each on the rank or host that has least of them."""
    world_size, each = hardware.world_size, hardware.ranks_per_host
    load = [0] * world_size
    found: dict[str, Where] = {}
    for config in sorted(configs, key=lambda c: (-c.num_embeddings * c.embedding_dim, c.name)):
        if wanted[config.name] == "row_wise":
            found[config.name] = Where("row_wise", list(range(world_size)), kernel)
        elif wanted[config.name] == "table_row_wise":
            host = min(range(hardware.num_hosts), key=lambda host: sum(load[rank] for rank in hardware.host(host)))
            for rank in hardware.host(host):
                load[rank] += config.num_embeddings * config.embedding_dim // each
            found[config.name] = Where("table_row_wise", hardware.host(host), kernel)
        else:
            rank = load.index(min(load))
            load[rank] += config.num_embeddings * config.embedding_dim
            found[config.name] = Where("table_wise", [rank], kernel)
    return found


def _placed(
    config: EmbeddingBagConfig,
    option: ShardingOption,
    ranks: list[int],
    constraints: ParameterConstraints,
    why: str,
    embeddings: EmbeddingsConfig,
) -> PlacedTable:
    shards = []
    for rank, shard in zip(ranks, option.shards, strict=True):
        assert shard.storage is not None
        assert shard.perf is not None
        rows = int(shard.size[0])
        own = weight_bytes(config.data_type, rows, config.embedding_dim)
        own += state_bytes(embeddings.optimizer.name, rows, config.embedding_dim)
        cached = option.compute_kernel == CACHED
        buffers = shard.storage.hbm if cached else max(shard.storage.hbm + shard.storage.ddr - own, 0)
        shards.append(Shard(rank, rows, buffers, {phase: getattr(shard.perf, name) for phase, name in PHASES.items()}))
    lengths = tuple(constraints.pooling_factors)
    rows, dim, kernel = config.num_embeddings, config.embedding_dim, str(option.compute_kernel)
    return PlacedTable(config.name, rows, dim, config.data_type, lengths, option.sharding_type, tuple(shards), why, kernel)


def _comparison(options: Mapping[tuple[str, str], ShardingOption], chosen: Where) -> str:
    """What the kinds of sharding cost a rank, the chosen one first."""
    times = {kind: max(shard.perf.total for shard in option.shards if shard.perf) for kind, option in options.items()}
    words = []
    for kind in sorted(times, key=lambda kind: (kind != (chosen.sharding, chosen.kernel), times[kind])):
        on = len(options[kind].shards)
        where = " in host memory" if kind[1] == CACHED else ""
        words.append(f"{kind[0]}{where} {times[kind]:.3g} ms on {f'each of {on} ranks' if on > 1 else 'one rank'}")
    return ", ".join(words)


def _shortage(fullest: int, on_host: int, optimizer: str, hardware: Hardware) -> str:
    gib = 2**30
    if on_host > hardware.usable_on_host:
        return (
            f"embeddings.host_cache: the memory of the hosts is {hardware.host_memory / gib:.2f} GiB for each of"
            f" {hardware.world_size} ranks, of which {hardware.usable_on_host / gib:.2f} can be planned with. Tables with the"
            f" state of '{optimizer}', split as evenly as possible, take {on_host / gib:.2f} GiB of it on the fullest rank,"
            f" {(on_host - hardware.usable_on_host) / gib:.2f} too many. python -m apps.plan shows what would fit."
        )
    return (
        f"embeddings.sharding: no plan fits {hardware.world_size} ranks of {hardware.memory / gib:.2f} GiB, of which"
        f" {hardware.usable / gib:.2f} can be planned with. Split as evenly as possible, tables with the state of"
        f" '{optimizer}', their buffers, the network and its activations take {fullest / gib:.2f} GiB on the fullest rank,"
        f" {(fullest - hardware.usable) / gib:.2f} too many. python -m apps.plan shows what would fit: more ranks, another"
        " embeddings.optimizer.name, a smaller embeddings.dim, another embeddings.dtype, on GPUs embeddings.host_cache; a"
        " smaller training.batch_size leaves tables more room."
    )


def bytes_of_ranks(placed: Sequence[PlacedTable], optimizer: str, world_size: int) -> list[int]:
    """Weights, state and buffers of the tables on each rank."""
    found = [0] * world_size
    for table in placed:
        for shard in table.shards:
            found[shard.rank] += shard.buffers
            found[shard.rank] += 0 if table.kernel == CACHED else sum(bytes_of_shard(table, shard, optimizer))
    return found


def on_hosts(placed: Sequence[PlacedTable], optimizer: str, world_size: int) -> list[int]:
    """Weights and state of tables that lie in the memory of the host, of each rank."""
    found = [0] * world_size
    for table in placed:
        for shard in table.shards if table.kernel == CACHED else ():
            found[shard.rank] += sum(bytes_of_shard(table, shard, optimizer))
    return found


def bytes_of_shard(table: PlacedTable, shard: Shard, optimizer: str) -> tuple[int, int]:
    """Weights and state of some rows of a table."""
    return weight_bytes(table.dtype, shard.rows, table.dim), state_bytes(optimizer, shard.rows, table.dim)
