"""Placements as torchrec's sharding plans; the plan report; table optimizers."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torch.distributed.remote_device import _remote_device
from torchrec import EmbeddingBagCollection
from torchrec.distributed import comm
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    construct_module_sharding_plan,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import CacheParams, EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mmlrec.config import EmbeddingsConfig, TableOptimizerConfig
from mmlrec.embeddings.hardware import Hardware, host_memory
from mmlrec.embeddings.placement import CACHED, PlacedTable, PortableSharder, place_tables, state_bytes, weight_bytes
from mmlrec.embeddings.plan_file import placement_of_plan
from mmlrec.embeddings.tables import NoTables
from mmlrec.errors import ConfigError, UserAdvice


def apply_table_optimizer(tables: nn.Module, config: TableOptimizerConfig, device: torch.device) -> None:
    """Attach the optimizer that the fused kernel runs inside backward. Call before sharding.

    Raises:
        ConfigError: Adam on a CPU, whose fused kernels do not have it.
    """
    arguments: dict[str, Any] = {"lr": config.lr}
    if config.name == "adam":
        if device.type == "cpu":
            raise ConfigError(
                "embeddings.optimizer.name: 'adam' needs a GPU: the CPU's fused table kernels have none."
                " Use 'adagrad', 'rowwise_adagrad' or 'sgd'; the dense part may keep Adam (dense.optimizer.name)."
            )
        optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
        arguments |= {"eps": config.eps, "beta1": config.beta1, "beta2": config.beta2}  # as the kernel has it, not torch
    elif config.name == "sgd":
        optimizer = torch.optim.SGD
    else:
        optimizer = torch.optim.Adagrad if config.name == "adagrad" else RowWiseAdagrad
        arguments["eps"] = config.eps
    for parameter in tables.parameters():
        # What torchrec reads, and all that its apply_optimizer_in_backward would leave here for it: that imports
        # torch.distributed.optim, which compiles seven optimizers that nobody uses, a tenth of the time of all imports.
        # TorchRec changes the dict that it is given, so each parameter gets a fresh one.
        vars(parameter).update(_optimizer_classes=[optimizer], _optimizer_kwargs=[dict(arguments)])


def tell_rounding(config: EmbeddingsConfig, device: torch.device) -> None:
    """Say (`UserAdvice`) that a training on a CPU rounds tables in fp16 otherwise than on a GPU."""
    if config.dtype == "fp16" and device.type == "cpu":
        warnings.warn(
            "embeddings.dtype=fp16 on a CPU: after each update a row is rounded to the nearest numbers, so updates that are too"
            " small are lost (docs/scaling.md). GPUs round at random, which keeps them on average.",
            UserAdvice,
            stacklevel=2,
        )


def make_plan(
    path: str,
    tables: EmbeddingBagCollection | NoTables,
    config: EmbeddingsConfig,
    hardware: Hardware,
    *,
    batch_size: int,
    lengths: Mapping[str, float] | None = None,
    reserved: int = 0,
) -> ShardingPlan:
    """The sharding plan of the tables found at `path` in the model; the same on every rank, without communication.

    Args:
        batch_size: rows per rank, for the planner's cost model.
        lengths: feature -> mean number of ids of a row.
        reserved: bytes of each rank that the rest of the model takes.

    Tables with too few rows for a split, which would leave a rank without any, are placed table-wise.

    Raises:
        ConfigError: a table that does not exist or is too small for the sharding it is given by name, no placement fits
            the memory, or the plan that `embeddings.plan` names is of other tables or ranks.
    """
    names = [c.name for c in tables.embedding_bag_configs()]
    if config.table_sharding and not names:
        raise ConfigError("embeddings.table_sharding: the dataset has no tables, all its features are numbers. Leave it out.")
    if isinstance(tables, NoTables):
        return ShardingPlan({})
    given = placement_of_plan(tables, config, hardware)
    placed = place_tables(tables, config, hardware, batch_size=batch_size, lengths=lengths, reserved=reserved, given=given)
    plan = construct_module_sharding_plan(
        tables,
        {table.name: _generator(table, hardware) for table in placed},
        sharder=PortableSharder(),
        local_size=hardware.ranks_per_host,
        world_size=hardware.world_size,
        device_type=hardware.device,
    )
    for table in placed:
        plan[table.name].compute_kernel = table.kernel
        if table.kernel == CACHED:
            plan[table.name].cache_params = CacheParams(load_factor=config.host_cache)
    if config.dtype != "fp32":
        for sharding in plan.values():
            sharding.stochastic_rounding = True  # on GPUs; the kernels of CPUs round to nearest
    return ShardingPlan({path: plan})


def _generator(table: PlacedTable, hardware: Hardware) -> ParameterShardingGenerator:
    """What makes torchrec's plan of a table, but for its kernel."""
    if table.sharding == "row_wise":
        return row_wise()
    if table.sharding == "table_row_wise":
        return table_row_wise(host_index=table.ranks[0] // hardware.ranks_per_host)
    return table_wise(rank=table.ranks[0])


def name_gpus(plan: ShardingPlan, numbers: Sequence[int]) -> None:
    """Put the GPUs that ranks have into a plan for GPUs; torchrec refuses shards that lie on others.

    It takes the GPUs of a host to be numbered as its ranks are, on hosts of equal size: so it is not where hosts are unequal,
    or where each rank sees one GPU alone.

    Args:
        numbers: of the GPU of each rank, as that rank sees it.
    """
    for of_module in plan.plan.values():
        assert isinstance(of_module, EmbeddingModuleShardingPlan)
        for sharding in of_module.values():
            assert isinstance(sharding.sharding_spec, EnumerableShardingSpec)
            for shard in sharding.sharding_spec.shards:
                assert isinstance(shard.placement, _remote_device)
                rank = shard.placement.rank()
                assert rank is not None
                shard.placement = _remote_device(f"rank:{rank}/cuda:{numbers[rank]}")


def forget_former_groups() -> None:
    """Have torchrec make the groups of the ranks of a host anew where those it has are of a process group that has ended.

    It keeps them as long as the process lives, which may open one process group after another.
    """
    for name in ("_INTRA_PG", "_CROSS_PG", "_INTRA_PG_2D", "_CROSS_PG_2D"):
        if getattr(comm, name) not in distributed_c10d._world.pg_map:
            setattr(comm, name, None)


def plan_report(
    plan: ShardingPlan, path: str, tables: EmbeddingBagCollection | NoTables, optimizer: str, replicas: int = 1
) -> list[dict[str, Any]]:
    """The plan as plain data, a dict for each table: name, rows, dim, sharding, kernel, ranks, bytes of weights and state.

    Args:
        replicas: copies of the tables, of which ranks are those of the first, and bytes those of one.
    """
    if isinstance(tables, NoTables):
        return []
    module_plan = plan.plan[path]
    assert isinstance(module_plan, EmbeddingModuleShardingPlan)
    return [
        {
            "table": config.name,
            "rows": config.num_embeddings,
            "dim": config.embedding_dim,
            "sharding": module_plan[config.name].sharding_type,
            "kernel": module_plan[config.name].compute_kernel,
            "ranks": module_plan[config.name].ranks,
            "replicas": replicas,
            "weight_bytes": weight_bytes(config.data_type, config.num_embeddings, config.embedding_dim),
            "state_bytes": state_bytes(optimizer, config.num_embeddings, config.embedding_dim),
        }
        for config in tables.embedding_bag_configs()
    ]


def short_of_memory(
    report: list[dict[str, Any]],
    optimizer: str,
    *,
    rank: int,
    sizes: Sequence[int],
    replica: int,
    device: torch.device,
    host_bytes: int = 0,
) -> ConfigError | None:
    """What to tell where tables do not fit into what is free on this rank's GPU or on its host, in GiB; None where they do.

    Args:
        sizes: what each rank knows as the number of ranks on its host.
        replica: ranks of one copy of the tables, which follow each other.
        host_bytes: what each rank takes of its host beside them, for maps of managed tables.
    """
    on_gpu = device.type == "cuda"
    of_host = [_need(report, other % replica, in_host=True, on_gpu=on_gpu) for other in ranks_of_host(sizes, rank)]
    checks = [("host", sum(of_host) + host_bytes * len(of_host), host_memory("MemAvailable"))]
    if on_gpu:
        own = _need(report, rank % replica, in_host=False, on_gpu=on_gpu)
        gc.collect()  # tables of this process before these, which their pipeline holds in a circle
        torch.cuda.empty_cache()  # torch keeps what was freed, and the driver does not count that as free
        checks.append(("GPU", own, torch.cuda.mem_get_info(device)[0]))
    for kind, need, free in checks:
        if need > free:
            return ConfigError(
                f"the tables with the state of '{optimizer}' need {need / 2**30:.2f} GiB on the {kind} of rank {rank},"
                f" {free / 2**30:.2f} GiB are free: train on more GPUs or hosts, or choose"
                " embeddings.optimizer.name=rowwise_adagrad, a smaller embeddings.dim, embeddings.dtype=fp16, or fewer ids in"
                " preprocessing."
            )
    return None


def ranks_of_host(sizes: Sequence[int], rank: int) -> range:
    """The ranks of a rank's host, from what each rank knows as the number of these; hosts may differ in it."""
    first = 0
    while first + sizes[first] <= rank:
        first += sizes[first]
    return range(first, first + sizes[first])


def _need(report: Sequence[dict[str, Any]], rank: int, *, in_host: bool, on_gpu: bool) -> float:
    """Bytes of the shards of a rank that lie in the memory of its host, or on its GPU."""
    return sum(
        (table["weight_bytes"] + table["state_bytes"]) * table["ranks"].count(rank) / len(table["ranks"])
        for table in report
        if in_host == (not on_gpu or table["kernel"] == CACHED)
    )


def plan_table(report: list[dict[str, Any]]) -> str:
    """The plan report as text."""
    rows = [
        [r["table"], r["rows"], r["dim"], r["sharding"], ",".join(map(str, r["ranks"])), f"{r['weight_bytes'] / 2**20:.2f}"]
        for r in report
    ]
    return tabulate(rows, headers=["table", "rows", "dim", "sharding", "ranks", "weights MiB"], disable_numparse=True)
