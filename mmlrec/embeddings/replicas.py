"""Several copies of all tables, each on a part of the ranks, averaged at intervals (`embeddings.replicas`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.types import ShardingPlan

from mmlrec.config import EmbeddingsConfig
from mmlrec.embeddings.hardware import Hardware
from mmlrec.embeddings.network_gradients import SameBuckets
from mmlrec.embeddings.placement import PortableSharder
from mmlrec.embeddings.sharding import name_gpus
from mmlrec.errors import ConfigError


def check_replicas(config: EmbeddingsConfig, device: torch.device) -> None:
    """Refuse replicas where nothing can average them.

    Raises:
        ConfigError: on a CPU.
    """
    if config.replicas > 1 and device.type == "cpu":
        raise ConfigError(
            f"embeddings.replicas: {config.replicas} copies of the tables need GPUs; torchrec averages them there only. Leave"
            " it out on CPUs. python -m apps.plan plans it anywhere."
        )


def shard(
    module: nn.Module,
    plan: ShardingPlan,
    sharder: PortableSharder,
    device: torch.device,
    replicas: int,
    hardware: Hardware,
    gpus: Sequence[int],
) -> DistributedModelParallel:
    """Shard the tables of a module by a plan, and join its other parameters over all ranks.

    Args:
        replicas: how many times; 1: once, over all ranks.
        hardware: the ranks of one replica.
        gpus: the number of the GPU of each of all ranks, as that rank sees it; empty on CPUs.
    """
    # It tells the root logger of each group, and where no launcher says which ranks a host has.
    logging.disable(logging.WARNING)
    try:
        if replicas > 1:
            return _collection(module, plan, sharder, device, hardware, gpus)
        if gpus:
            name_gpus(plan, gpus)
        return DistributedModelParallel(
            module,
            device=device,
            plan=plan,
            sharders=[sharder],
            init_data_parallel=dist.get_world_size() > 1,
            data_parallel_wrapper=SameBuckets(),
        )
    finally:
        logging.disable(logging.NOTSET)


class Replicas(DMPCollection):
    """torchrec's, with the shards of each replica on the GPUs that its ranks have: see `name_gpus`.

    Args:
        gpus: of `shard`.
    """

    def __init__(self, *args: Any, gpus: Sequence[int], **kwargs: Any) -> None:
        self._gpus = gpus
        super().__init__(*args, **kwargs)

    def _remap_sharding_plan(self, plan: ShardingPlan, *args: Any, **kwargs: Any) -> None:
        super()._remap_sharding_plan(plan, *args, **kwargs)
        if self._gpus:
            name_gpus(plan, self._gpus)


def _collection(
    module: nn.Module,
    plan: ShardingPlan,
    sharder: PortableSharder,
    device: torch.device,
    hardware: Hardware,
    gpus: Sequence[int],
) -> DMPCollection:
    world = dist.group.WORLD
    assert world is not None
    return Replicas(
        module,
        device,
        plan,
        world.size(),
        hardware.world_size,
        world,
        node_group_size=hardware.ranks_per_host,
        sharders=[sharder],
        data_parallel_wrapper=SameBuckets(),
        # Ranks of a replica follow each other, so that looked-up vectors stay in few hosts; averages cross them.
        use_inter_host_allreduce=True,
        gpus=gpus,
    )


def average(model: DistributedModelParallel) -> None:
    """Give all replicas the mean of their weights and of their optimizer state, where there are several. All ranks call it."""
    if isinstance(model, DMPCollection):
        model.sync()
