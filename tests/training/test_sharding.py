"""Plans: no rank gets a shard without rows, whatever the sizes; what a name asks for in vain is refused."""

import pytest
import torch
from torchrec import EmbeddingBagConfig

from mmlrec.config import ConfigError, EmbeddingsConfig
from mmlrec.distributed.world import process_group
from mmlrec.embeddings.hardware import CPU, GPU, Hardware
from mmlrec.embeddings.replicas import Replicas
from mmlrec.embeddings.sharding import make_plan, name_gpus, plan_report
from mmlrec.embeddings.tables import build_tables

ROWS = (1, 2, 3, 4, 5, 7, 9, 1000)


def plan_of(world_size, **options):
    """The plan of tables t1, t2, ... that are named after their rows, and its report."""
    names = [EmbeddingBagConfig(name=f"t{n}", embedding_dim=4, num_embeddings=n, feature_names=[f"f{n}"]) for n in ROWS]
    tables = build_tables(names)
    hardware = Hardware(world_size, world_size, "cpu", 2**30, CPU)
    plan = make_plan("tables", tables, EmbeddingsConfig(**options), hardware, batch_size=8)
    return plan.plan["tables"], plan_report(plan, "tables", tables, "adagrad")


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("sharding", ["row_wise", "auto"])
def test_every_shard_has_rows(world_size, sharding):
    plan, report = plan_of(world_size, sharding=sharding)
    for rows in ROWS:
        sizes = [shard.shard_sizes[0] for shard in plan[f"t{rows}"].sharding_spec.shards]
        assert min(sizes) > 0
        assert sum(sizes) == rows
    if sharding == "row_wise":
        # Row-wise over W ranks gives each ceil(rows / W) until none are left.
        for row in report:
            fits = -(-row["rows"] // world_size) * (world_size - 1) < row["rows"]
            assert row["sharding"] == ("row_wise" if fits else "table_wise"), row


def test_a_table_that_is_too_small_for_what_its_name_asks_is_refused():
    with pytest.raises(ConfigError, match=r"table_sharding.t4: too few rows to give each of 3 ranks some"):
        plan_of(3, table_sharding={"t4": "row_wise"})
    plan_of(3, table_sharding={"t5": "row_wise"})


def test_shards_lie_on_the_gpus_that_ranks_have():
    """One host of one rank and one of two, and another where each rank sees one GPU alone; torchrec refuses other numbers."""
    tables = build_tables([EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=9, feature_names=["f"])])
    hardware = Hardware(3, 2, "cuda", 2**30, GPU, equal_hosts=False)
    for numbers in ([0, 0, 1], [0, 0, 0]):
        plan = make_plan("tables", tables, EmbeddingsConfig(sharding="row_wise"), hardware, batch_size=8)
        name_gpus(plan, numbers)
        places = [str(shard.placement) for shard in plan.plan["tables"]["t"].sharding_spec.shards]
        assert places == [f"rank:{rank}/cuda:{number}" for rank, number in enumerate(numbers)]


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [0, 0, 0, 0]])
def test_shards_of_each_replica_lie_on_the_gpus_that_its_ranks_have(numbers):
    """torchrec by itself takes the number of a rank on its host for that of its GPU, and then refuses where it is another."""
    tables = build_tables([EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=9, feature_names=["f"])])
    replicas = Replicas.__new__(Replicas)
    replicas._device, replicas._gpus = torch.device("cuda"), numbers
    plan = make_plan("tables", tables, EmbeddingsConfig(sharding="row_wise"), Hardware(2, 2, "cuda", 2**30, GPU), batch_size=8)
    with process_group():
        replicas._remap_sharding_plan(plan=plan, rank=2, step=2, sharding_group_size=2, use_inter_host_allreduce=True)
    places = [str(shard.placement) for shard in plan.plan["tables"]["t"].sharding_spec.shards]
    assert places == [f"rank:2/cuda:{numbers[2]}", f"rank:3/cuda:{numbers[3]}"]
