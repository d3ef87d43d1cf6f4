"""Which rank holds which rows: sharders, plans and the plan report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mmlrec.config import EmbeddingsConfig, TableOptimizerConfig
from mmlrec.embeddings.tables import NoTables
from mmlrec.errors import ConfigError, did_you_mean

#: The two that reshard into each other without loss, on every device. Column-wise is wrong with row-wise Adagrad, grid is
#: wrong with MEAN pooling, data-parallel tables would silently take the dense optimizer.
SHARDING_TYPES = ["table_wise", "row_wise"]


class PortableSharder(EmbeddingBagCollectionSharder):
    """Offers the portable sharding types on every device; TorchRec's own hides row-wise on CPU."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """`SHARDING_TYPES`, whatever the device."""
        return SHARDING_TYPES

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Only the fused kernel: the others ignore the table optimizer."""
        return ["fused"]


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
        # TorchRec changes the dict that it is given, so each parameter gets a fresh one.
        apply_optimizer_in_backward(optimizer, [parameter], dict(arguments))


def make_plan(
    module: nn.Module,
    path: str,
    tables: EmbeddingBagCollection | NoTables,
    config: EmbeddingsConfig,
    *,
    world_size: int,
    local_world_size: int,
    device: torch.device,
    batch_size: int,
) -> ShardingPlan:
    """The sharding plan of the tables found at `path` in `module`; the same on every rank, without communication.

    Args:
        batch_size: rows per rank, for the planner's cost model.

    Tables with too few rows for row-wise sharding, which would leave a rank without any, are placed table-wise.

    Raises:
        ConfigError: a table that does not exist or is too small for the sharding it is given by name, or no placement fits
            the memory.
    """
    names = [c.name for c in tables.embedding_bag_configs()]
    if config.table_sharding and not names:
        raise ConfigError("embeddings.table_sharding: the dataset has no tables, all its features are numbers. Leave it out.")
    if isinstance(tables, NoTables):
        return ShardingPlan({})
    # The fused kernel reads beyond the end of memory where a rank's last shard has no rows.
    small = {
        c.name
        for c in tables.embedding_bag_configs()
        if -(-c.num_embeddings // world_size) * (world_size - 1) >= c.num_embeddings
    }
    for name in config.table_sharding:
        if name not in names:
            raise ConfigError(
                f"embeddings.table_sharding.{name}: no such table.{did_you_mean(name, names)} Tables: {', '.join(names)}."
            )
        if config.table_sharding[name] == "row_wise" and name in small and world_size > 1:
            raise ConfigError(
                f"embeddings.table_sharding.{name}: too few rows to give each of {world_size} ranks some. Use table_wise."
            )
    sharder = PortableSharder()
    wanted: dict[str, str] = {name: config.table_sharding.get(name, config.sharding) for name in names}
    if world_size == 1:
        wanted = {name: "table_wise" if sharding == "auto" else sharding for name, sharding in wanted.items()}
    else:
        wanted |= dict.fromkeys(small, "table_wise")
    if "auto" in wanted.values():
        constraints = {
            name: ParameterConstraints(
                sharding_types=SHARDING_TYPES if sharding == "auto" else [sharding], compute_kernels=["fused"]
            )
            for name, sharding in wanted.items()
        }
        topology = Topology(world_size=world_size, local_world_size=local_world_size, compute_device=device.type)
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints)
        try:
            # plan() on every rank is deterministic; collective_plan() hangs the others when rank 0 raises.
            return planner.plan(module, [sharder])
        except PlannerError as error:
            raise ConfigError(f"embeddings.sharding: no plan fits {world_size} ranks: {error}") from error
    return ShardingPlan({path: _fixed_plan(tables, wanted, sharder, world_size, local_world_size, device)})


def _fixed_plan(
    tables: EmbeddingBagCollection,
    wanted: dict[str, str],
    sharder: ModuleSharder[Any],
    world_size: int,
    local_world_size: int,
    device: torch.device,
) -> EmbeddingModuleShardingPlan:
    load = [0] * world_size
    generators = {}
    for config in sorted(tables.embedding_bag_configs(), key=lambda c: (-c.num_embeddings * c.embedding_dim, c.name)):
        if wanted[config.name] == "row_wise":
            generators[config.name] = row_wise(compute_kernel="fused")
        else:
            rank = load.index(min(load))
            load[rank] += config.num_embeddings * config.embedding_dim
            generators[config.name] = table_wise(rank=rank, compute_kernel="fused")
    return construct_module_sharding_plan(
        tables, generators, sharder=sharder, local_size=local_world_size, world_size=world_size, device_type=device.type
    )


def plan_report(plan: ShardingPlan, path: str, tables: EmbeddingBagCollection | NoTables) -> list[dict[str, Any]]:
    """The plan as plain data, a dict for each table: name, rows, dim, sharding, kernel, ranks, bytes of weights."""
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
        weights = table["weight_bytes"]
        state = {"sgd": 0, "rowwise_adagrad": 4 * table["rows"], "adagrad": weights, "adam": 2 * weights}[optimizer]
        need += (weights + state) * sum(r in sharing for r in table["ranks"]) / len(table["ranks"])
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else _free_memory()
    if need > free:
        raise ConfigError(
            f"the tables with the state of '{optimizer}' need {need / 2**30:.2f} GiB on this {'GPU' if on_gpu else 'node'},"
            f" {free / 2**30:.2f} GiB are free: train on more GPUs or nodes, or choose"
            " embeddings.optimizer.name=rowwise_adagrad, a smaller embeddings.dim, or fewer ids in preprocessing."
        )


def _free_memory() -> float:
    """Bytes that this node can still give out; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")


def plan_table(report: list[dict[str, Any]]) -> str:
    """The plan report as text."""
    rows = [
        [r["table"], r["rows"], r["dim"], r["sharding"], ",".join(map(str, r["ranks"])), f"{r['weight_bytes'] / 2**20:.2f}"]
        for r in report
    ]
    return tabulate(rows, headers=["table", "rows", "dim", "sharding", "ranks", "weights MiB"], disable_numparse=True)
