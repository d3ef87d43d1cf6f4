"""Placements as torchrec's sharding plans; the plan report; table optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mmlrec.config import EmbeddingsConfig, TableOptimizerConfig
from mmlrec.embeddings.hardware import Hardware, host_memory
from mmlrec.embeddings.placement import PortableSharder, place_tables, state_bytes
from mmlrec.embeddings.plan_file import given_placement
from mmlrec.embeddings.tables import NoTables
from mmlrec.errors import ConfigError


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
        arguments |= {"eps": config.eps, "betas": (config.beta1, config.beta2)}
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

    Tables with too few rows for row-wise sharding, which would leave a rank without any, are placed table-wise.

    Raises:
        ConfigError: a table that does not exist or is too small for the sharding it is given by name, no placement fits
            the memory, or the plan that `embeddings.plan` names is of other tables or ranks.
    """
    names = [c.name for c in tables.embedding_bag_configs()]
    if config.table_sharding and not names:
        raise ConfigError("embeddings.table_sharding: the dataset has no tables, all its features are numbers. Leave it out.")
    if isinstance(tables, NoTables):
        return ShardingPlan({})
    given = None
    if config.plan is not None:
        sizes = {c.name: (c.num_embeddings, c.embedding_dim) for c in tables.embedding_bag_configs()}
        given = given_placement(config.plan, sizes, hardware.world_size)
    placed = place_tables(tables, config, hardware, batch_size=batch_size, lengths=lengths, reserved=reserved, given=given)
    generators = {
        table.name: row_wise(compute_kernel="fused")
        if table.sharding == "row_wise"
        else table_wise(rank=table.ranks[0], compute_kernel="fused")
        for table in placed
    }
    plan = construct_module_sharding_plan(
        tables,
        generators,
        sharder=PortableSharder(),
        local_size=hardware.ranks_per_host,
        world_size=hardware.world_size,
        device_type=hardware.device,
    )
    return ShardingPlan({path: plan})


def plan_report(
    plan: ShardingPlan, path: str, tables: EmbeddingBagCollection | NoTables, optimizer: str
) -> list[dict[str, Any]]:
    """The plan as plain data, a dict for each table: name, rows, dim, sharding, kernel, ranks, bytes of weights and state."""
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
            "weight_bytes": 4 * config.num_embeddings * config.embedding_dim,
            "state_bytes": state_bytes(optimizer, config.num_embeddings, config.embedding_dim),
        }
        for config in tables.embedding_bag_configs()
    ]


def check_memory(
    report: list[dict[str, Any]], optimizer: str, *, rank: int, local_world_size: int, device: torch.device
) -> None:
    """Refuse tables that do not fit where this rank's shards go: the memory of its GPU, or of its node.

    Raises:
        ConfigError: with what is needed and what is free, in GiB.
    """
    on_gpu = device.type == "cuda"
    first = rank // local_world_size * local_world_size
    sharing = [rank] if on_gpu else range(first, first + local_world_size)
    need = 0.0
    for table in report:
        need += (table["weight_bytes"] + table["state_bytes"]) * sum(r in sharing for r in table["ranks"]) / len(table["ranks"])
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else host_memory("MemAvailable")
    if need > free:
        raise ConfigError(
            f"the tables with the state of '{optimizer}' need {need / 2**30:.2f} GiB on this {'GPU' if on_gpu else 'node'},"
            f" {free / 2**30:.2f} GiB are free: train on more GPUs or nodes, or choose"
            " embeddings.optimizer.name=rowwise_adagrad, a smaller embeddings.dim, or fewer ids in preprocessing."
        )


def plan_table(report: list[dict[str, Any]]) -> str:
    """The plan report as text."""
    rows = [
        [r["table"], r["rows"], r["dim"], r["sharding"], ",".join(map(str, r["ranks"])), f"{r['weight_bytes'] / 2**20:.2f}"]
        for r in report
    ]
    return tabulate(rows, headers=["table", "rows", "dim", "sharding", "ranks", "weights MiB"], disable_numparse=True)
