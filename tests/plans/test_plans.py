"""Plans without processes: sums worked by hand, what fits and what does not, and the memory that real ranks take."""

import json
import re
import time
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchrec.distributed.planner.proposers import GreedyProposer

from apps.plan import microseconds, size, text
from mmlrec.config import load_config
from mmlrec.embeddings import placement
from mmlrec.embeddings.hardware import CPU, GPU, OPERATIONS, RESERVED_SHARE, Hardware
from mmlrec.embeddings.sharding import apply_table_optimizer, make_plan
from mmlrec.embeddings.tables import build_tables, table_configs
from mmlrec.errors import ConfigError
from mmlrec.models.shared_bottom import SharedBottom
from mmlrec.registry import load
from mmlrec.schema import DatasetManifest, Setting
from mmlrec.session.alternatives import alternatives, recommendations, remedies
from mmlrec.session.planning import Request, plan_training
from mmlrec.session.table_list import TableList, read_table_list
from mmlrec.storage.places import place
from tests import processes
from tests.datasets import write_dataset
from tests.plans.growth import grow, lie, refuse
from tests.training.launch import free_port

ROOT = Path(__file__).parents[2]
GIB = 2**30
# docs of MLPerf: rows in all, at width 128.
DLRM_ROWS = 204_184_588


def dlrm(hosts, *overrides, hbm=80 * GIB):
    config = load(str(ROOT / "configs/scaling/dlrm-v2.yaml"), list(overrides))
    described = read_table_list(place(ROOT / "configs/scaling/tables/dlrm-v2.yaml"))
    return Request(config, described.manifest(), Hardware(8 * hosts, 8, "cuda", hbm, GPU), 2e13, "dlrm-v2")


def small(tables, hardware, *, dim=8, embeddings=(), batch_size=1024):
    """A plan of tables name -> (rows, pooling length)."""
    described = TableList.model_validate(
        {
            "name": "small",
            "tasks": 2,
            "tables": [{"name": name, "rows": n, "pooling_length": float(length)} for name, (n, length) in tables.items()],
        }
    )
    keys = {"dim": dim, **dict(embeddings)}
    config = load_config(
        {
            "dataset": {"path": "data/none"},
            "embeddings": keys,
            "training": {"batch_size": batch_size},
            "model": {"name": "mmoe"},
        }
    )
    return Request(config, described.manifest(), hardware, 1e11, "small")


@pytest.mark.parametrize("hosts", [8, *(pytest.param(hosts, marks=pytest.mark.long) for hosts in (1, 64))])
def test_dlrm_v2_with_16_tasks_is_planned_in_a_minute_and_its_memory_sums_to_weights_and_state(hosts):
    start = time.process_time()
    plan = plan_training(dlrm(hosts, "embeddings.optimizer.name=adagrad"))
    others = alternatives(plan)
    assert time.process_time() - start < 60
    assert len(plan.network.spec.tasks) == 16
    assert not plan.missing
    weights = 4 * DLRM_ROWS * 128
    assert sum(rank.weights for rank in plan.ranks) == weights
    assert sum(rank.state for rank in plan.ranks) == weights  # Adagrad: one number for each weight.
    assert len(plan.ranks) == 8 * hosts
    for table in plan.tables:
        assert sum(shard.rows for shard in table.shards) == table.rows
        assert table.sharding in ("table_wise", "table_row_wise", "row_wise")
    # Between hosts vectors go slowly: there the largest tables, of many ids a row, are split within one.
    assert ("table_row_wise" in {table.sharding for table in plan.tables}) == (hosts > 1)
    by_change = {other.change: other.plan for other in others}
    assert sum(rank.state for rank in by_change["embeddings.optimizer.name=rowwise_adagrad"].ranks) == 4 * DLRM_ROWS
    assert sum(rank.weights for rank in by_change["embeddings.dim=64"].ranks) == weights / 2
    half = by_change["embeddings.dtype=fp16"]
    assert sum(rank.weights for rank in half.ranks) == weights / 2
    assert sum(rank.state for rank in half.ranks) == weights  # fp32 in any case
    assert "embeddings.dtype=bf16" not in by_change  # fbgemm trains no such tables
    (advice,) = recommendations(plan, others)
    in_place = (
        f"0.76 GiB of state in place of 97.36, {by_change['embeddings.optimizer.name=rowwise_adagrad'].fullest.total / GIB:.2f}"
    )
    assert advice.startswith(f"embeddings.optimizer.name=rowwise_adagrad: {in_place} GiB on the fullest rank in place of")
    assert recommendations(by_change["embeddings.optimizer.name=rowwise_adagrad"], []) == []
    assert ("embeddings.sharding=table_row_wise" in by_change) == (hosts > 1)


def test_one_table_of_1e10_rows_on_64_ranks():
    config = load(str(ROOT / "configs/scaling/dlrm-v2.yaml"), ["embeddings.optimizer.name=rowwise_adagrad"])
    described = read_table_list(place(ROOT / "configs/scaling/tables/one-huge.yaml"))
    request = Request(config, described.manifest(), Hardware(64, 8, "cuda", 80 * GIB, GPU), 2e13, "huge")
    plan = plan_training(request.with_embeddings(table_dim=described.dims))
    assert [(table.sharding, table.ranks) for table in plan.tables] == [("row_wise", list(range(64)))]
    assert {shard.rows for shard in plan.tables[0].shards} == {10**10 // 64}
    assert {rank.weights for rank in plan.ranks} == {4 * 64 * 10**10 // 64}
    assert {rank.state for rank in plan.ranks} == {4 * 10**10 // 64}
    assert not plan.missing


def test_a_plan_that_cannot_fit_says_by_how_much_and_what_would_fit():
    """Two tables of 2 GiB with Adagrad, on two ranks: 4 GiB each, of which 0.85 * 4 can be planned with."""
    hardware = Hardware(2, 2, "cuda", 4 * GIB, GPU)
    request = small({"a": (2**26, 1), "b": (2**26, 1)}, hardware)
    plan = plan_training(request)
    rank = plan.fullest
    assert (rank.weights, rank.state) == (2 * GIB, 2 * GIB)
    usable = int(4 * GIB * (1 - RESERVED_SHARE))
    assert plan.missing == rank.total - usable > 4 * GIB - usable
    (first, *_) = plan.warnings()
    assert first.startswith("does not fit: rank")
    assert f"{plan.missing / GIB:.2f} GiB too many" in first
    found = remedies(plan, alternatives(plan))
    assert [line.partition(":")[0] for line in found] == [
        "2 hosts",
        "embeddings.optimizer.name=rowwise_adagrad",
        "embeddings.optimizer.name=sgd",
        "embeddings.dtype=fp16",
        "embeddings.dim=4",
    ]
    (advice,) = recommendations(plan, [])
    assert advice.startswith("embeddings.optimizer.name=rowwise_adagrad: 0.50 GiB of state in place of 4.00, ")
    assert ", which fits. It is another algorithm" in advice
    # Each of them really fits.
    assert not plan_training(replace(request, hardware=replace(hardware, world_size=4))).missing
    assert not plan_training(request.with_embeddings(dim=4)).missing


def test_more_hosts_are_tried_until_it_fits_and_not_where_a_table_lies_whole_on_one_rank():
    hardware = Hardware(1, 1, "cuda", GIB // 4, GPU)
    plan = plan_training(small({"a": (2**26, 1)}, hardware))  # 4 GiB with its state
    (hosts, *_) = [line for line in remedies(plan, alternatives(plan)) if "host" in line]
    assert hosts.startswith("32 hosts: ")  # 128 MiB of 217 on each; 16 would be 256 of 217
    whole = plan_training(small({"a": (2**26, 1)}, hardware, embeddings={"sharding": "table_wise"}))
    assert not [line for line in remedies(whole, alternatives(whole)) if "hosts" in line and "auto" not in line]


def test_each_replica_holds_all_tables_and_averages_cross_the_hosts():
    hardware = Hardware(16, 8, "cuda", 8 * GIB, GPU)
    tables = {"a": (10**6, 1), "b": (1000, 1)}
    one, two = (
        plan_training(small(tables, hardware, dim=64, embeddings={"replicas": replicas, "average_every": 10}))
        for replicas in (1, 2)
    )
    weights = 4 * 64 * (10**6 + 1000)
    assert sum(rank.weights for rank in one.ranks) == sum(rank.state for rank in one.ranks) == weights
    assert [rank.rank for rank in two.ranks] == list(range(16))
    for first, second in ((two.ranks[:8], two.ranks[8:]),):
        assert sum(rank.weights for rank in first) == weights
        assert [replace(rank, rank=0) for rank in first] == [replace(rank, rank=0) for rank in second]
    assert max(rank for table in two.tables for rank in table.ranks) < 8
    held = max(rank.weights + rank.state for rank in two.ranks)
    # An all-reduce of two: half of it goes out and half comes in, twice; every tenth step.
    assert two.step["average"] == pytest.approx(1000 * held / 10 / GPU.between_hosts)
    assert "average" not in one.step
    # Ids and vectors stay in a host.
    assert two.step["vectors"] < one.step["vectors"]


def test_tables_beyond_the_gpus_go_to_the_hosts_where_a_cache_is_allowed():
    """4 GiB of weights and as much state, of which two GPUs of 2 GiB hold 3.4; `b` is small, and stays."""
    hardware = Hardware(2, 2, "cuda", 2 * GIB, GPU, host_memory=16 * GIB)
    tables = {"a": (2**24, 1), "b": (1000, 1)}
    without = plan_training(small(tables, hardware, dim=64))
    assert without.missing
    plan = plan_training(small(tables, hardware, dim=64, embeddings={"host_cache": 0.05}))
    assert not plan.missing
    assert [(table.name, table.kernel) for table in plan.tables] == [("a", "fused_uvm_caching"), ("b", "fused")]
    assert sum(rank.on_host for rank in plan.ranks) == 8 * GIB
    assert sum(rank.weights for rank in plan.ranks) == 4 * 64 * 1000
    # The cache is memory of the GPUs: weights and, as torchrec counts, state of a twentieth of the rows.
    assert 0.05 * 8 * GIB < sum(rank.buffers for rank in plan.ranks) < 0.07 * 8 * GIB
    (line,) = [line for line in plan.warnings() if "in the memory of the hosts" in line]
    assert "8.00 GiB on the fullest, with 0.05 of their rows in a cache on the GPUs: a" in line
    assert {table["table"]: table["kernel"] for table in plan.as_dict()["tables"]}["a"] == "fused_uvm_caching"
    # The same where there is room.
    roomy = replace(hardware, memory=80 * GIB)
    free, cached = (plan_training(small(tables, roomy, dim=64, embeddings=keys)) for keys in ({}, {"host_cache": 0.05}))
    assert [(table.sharding, table.kernel) for table in free.tables] == [(t.sharding, t.kernel) for t in cached.tables]
    # Neither on the GPUs nor on the hosts.
    crowded = plan_training(small(tables, replace(hardware, host_memory=GIB), dim=64, embeddings={"host_cache": 0.05}))
    assert crowded.missing > 2 * GIB
    (first, second, *rest) = crowded.warnings()
    assert re.match(
        r"does not fit: rank \d in the memory of its host needs 4.00 GiB, 0.85 of its 1.00 GiB .*: 3.15 GiB too", first
    )
    assert "8.00 GiB on the fullest" in second
    assert not [line for line in rest if "no table" in line]
    with pytest.raises(
        ConfigError, match=r"host_cache: the memory of the hosts is 1.00 GiB for each of 2 ranks, .* 3.15 too many"
    ):
        make_plan_of(crowded)
    with pytest.raises(ConfigError, match=r"embeddings.host_cache needs GPUs"):
        plan_training(small(tables, Hardware(2, 2, "cpu", 2 * GIB, CPU), dim=64, embeddings={"host_cache": 0.05}))


def test_state_on_hosts_counts_for_the_advice():
    """4 GiB of weights and as much state in the memory of two hosts' ranks; on the GPUs next to nothing."""
    hardware = Hardware(2, 2, "cuda", 2 * GIB, GPU, host_memory=16 * GIB)
    tables = {"a": (2**24, 1), "b": (1000, 1)}
    plan = plan_training(small(tables, hardware, dim=64, embeddings={"host_cache": 0.05}))
    assert sum(rank.host_weights for rank in plan.ranks) == sum(rank.host_state for rank in plan.ranks) == 4 * GIB
    assert plan.imbalance["table_memory"] == pytest.approx(max(rank.on_host for rank in plan.ranks) / (4 * GIB), rel=0.01)
    (advice,) = recommendations(plan, [])
    # Row-wise: one number a row. The table of 4 GiB and 64 MiB stays where it is, as it does not fit the GPUs.
    assert advice.startswith("embeddings.optimizer.name=rowwise_adagrad: 0.06 GiB of state in place of 4.00, ")
    assert re.search(r"GiB on the fullest rank and 4\.06 GiB in the memory of its host in place of .* and 8\.00 GiB in", advice)
    # Where the hosts are too small by less than their state, it says that it fits.
    crowded = plan_training(small(tables, replace(hardware, host_memory=3 * GIB), dim=64, embeddings={"host_cache": 0.05}))
    assert crowded.missing
    (advice,) = recommendations(crowded, [])
    assert ", which fits. It is another algorithm" in advice
    (remedy,) = [line for line in remedies(crowded, alternatives(crowded)) if line.startswith("embeddings.optimizer.name=row")]
    assert "2.03 GiB in the memory of its host" in remedy
    rowwise = {"host_cache": 0.05, "optimizer": {"name": "rowwise_adagrad"}}
    assert recommendations(plan_training(small(tables, hardware, dim=64, embeddings=rowwise)), []) == []


def make_plan_of(plan):
    """As a training of it would place the tables."""
    request = plan.request
    tables = build_tables(table_configs(request.manifest, request.config.embeddings))
    apply_table_optimizer(tables, request.config.embeddings.optimizer, torch.device("cuda"))
    return make_plan("tables", tables, request.config.embeddings, request.hardware, batch_size=8)


SPLIT = {"a": (10**5, 1), "b": (5, 1)}


@pytest.mark.parametrize(
    ("embeddings", "tables", "refused"),
    [
        ({"communication": "fp8"}, SPLIT, ["embeddings.sharding=row_wise", "embeddings.sharding=table_row_wise"]),
        (
            {"table_sharding": {"b": "row_wise"}},
            {"a": (10**5, 1), "b": (7, 1)},
            ["4 hosts"],
        ),  # over 8 ranks one would have none
        ({"optimizer": {"name": "adam"}}, SPLIT, ["embeddings.replicas=2"]),
        ({"replicas": 2}, SPLIT, ["embeddings.optimizer.name=adam", "embeddings.replicas=2"]),
        ({"host_cache": 0.1}, SPLIT, ["embeddings.replicas=2"]),
    ],
)
def test_no_alternative_is_shown_that_a_training_refuses(embeddings, tables, refused):
    hardware = Hardware(4, 2, "cuda", 4 * GIB, GPU, host_memory=GIB)
    shown = [other.change for other in alternatives(plan_training(small(tables, hardware, embeddings=embeddings)))]
    assert "embeddings.dtype=fp16" in shown
    assert not {*refused} & {*shown}


def test_more_hosts_end_where_a_split_that_is_asked_for_does():
    request = small({"a": (2**26, 1), "b": (5, 1)}, Hardware(2, 2, "cuda", GIB // 4, GPU))
    plan = plan_training(request.with_embeddings(table_sharding={"b": "row_wise"}))
    assert plan.missing
    assert not [line for line in remedies(plan, alternatives(plan)) if "hosts" in line]


def test_many_tables_are_not_tried_one_after_the_other_to_the_end(monkeypatch):
    tried = []

    class Counted(GreedyProposer):
        def propose(self):
            tried.append(self)
            return super().propose()

    monkeypatch.setattr(placement, "GreedyProposer", Counted)
    request = small({f"t{i}": (10**3 * (1 + i % 7) ** 4, 1 + i % 3) for i in range(40)}, Hardware(8, 8, "cuda", GIB, GPU))
    found = []
    for most in (10**6, 10):
        monkeypatch.setattr(placement, "_MOST_IN_VAIN", most)
        tried.clear()
        placed = [(table.name, table.sharding, table.ranks) for table in plan_training(request).tables]
        found.append((placed, len(tried)))
    (all_tried, most), (some_tried, fewer) = found
    assert some_tried == all_tried
    assert 20 < fewer < most - 20


def test_times_follow_bandwidths_by_hand():
    """One row-wise table on four ranks of one host: the lookup reads B * length / 4 rows on each."""
    hardware = Hardware(4, 4, "cpu", 8 * GIB, CPU)
    tables = {"a": (100_000, 8)}
    slow = plan_training(small(tables, hardware, dim=128, embeddings={"sharding": "row_wise"}))
    bandwidths = replace(CPU, in_host=CPU.in_host / 2)
    halved = plan_training(
        small(tables, replace(hardware, bandwidths=bandwidths), dim=128, embeddings={"sharding": "row_wise"})
    )
    assert halved.step["all_reduce"] == pytest.approx(2 * slow.step["all_reduce"])
    assert halved.step["vectors"] == pytest.approx(2 * slow.step["vectors"])
    assert halved.step["lookup"] == pytest.approx(slow.step["lookup"])
    assert halved.step_ms > slow.step_ms
    parameters = sum(parameter.numel() for parameter in slow.network.parameters())
    assert slow.step["all_reduce"] == pytest.approx(1000 * 2 * 3 / 4 * 4 * parameters / CPU.in_host)
    # Ids at 8 bytes and vectors at 4 bytes a number, read at the bandwidth of the memory.
    longer = plan_training(small({"a": (100_000, 16)}, hardware, dim=128, embeddings={"sharding": "row_wise"}))
    assert 1.5 < longer.step["lookup"] / slow.step["lookup"] <= 2


def test_what_passes_however_little_there_is_to_do_by_hand():
    """Messages and operators cost the same for any batch: of the difference of two rates only they remain."""
    hardware = Hardware(4, 2, "cpu", 8 * GIB, CPU)
    request = small({"a": (100_000, 1), "b": (1000, 1)}, hardware, embeddings={"table_sharding": {"a": "row_wise"}})
    plan = plan_training(request.with_embeddings(sharding="table_wise"))
    # Sizes; ids and lengths of each kind, and vectors there and back; sums of the loss, and gradients of the network.
    assert plan.collectives == {"all_to_all": 1 + 4 + 2, "half": 2, "all_reduce": 2}
    assert plan.rounds == 7 + 2 * 2 + 2 * 2 * 2  # log2 of 4 ranks is 2; an all-reduce is two halves
    assert plan.step["rounds"] == pytest.approx(1000 * 19 * CPU.round)
    assert plan.step["host"] == pytest.approx(1000 * (plan.cost.launches + 4 * 200) * CPU.launch)
    slow = replace(CPU, round=1e-3, launch=1e-5)
    slower = plan_training(replace(plan.request, hardware=replace(hardware, bandwidths=slow)), plan)
    assert slower.step["rounds"] == pytest.approx(19.0)
    assert {name for name in plan.step if slower.step[name] != plan.step[name]} == {"rounds", "host"}
    alone = plan_training(replace(request, hardware=Hardware(1, 1, "cpu", 8 * GIB, CPU)))
    assert (alone.rounds, alone.step["rounds"]) == (0, 0.0)
    # A GPU works while its host starts what comes next: of a large batch nothing is seen of it.
    on_gpus = Hardware(4, 2, "cuda", 8 * GIB, GPU)
    few, many = (
        plan_training(small({"a": (100_000, 1)}, on_gpus, batch_size=rows, embeddings={"sharding": "table_wise"}))
        for rows in (64, 2**22)
    )
    assert many.step["host"] == 0
    hidden = sum(few.step[phase] for phase in ("lookup", "network", "update", "optimizer"))
    assert few.step["host"] == pytest.approx(1000 * (few.cost.launches + 4 * 150) * GPU.launch - hidden)


def test_messages_wait_for_the_ranks_that_share_a_table_only():
    """On 4 hosts of 4: sums over a host take log2 of 4 messages, over all log2 of 16; each copy of the tables is a host."""
    hardware = Hardware(16, 4, "cuda", 8 * GIB, GPU)
    beside = 2 * 2 * 4  # sums of the loss, gradients of the network: two all-reduces of 16
    for embeddings, wanted in (
        ({"sharding": "table_wise"}, 1 + 4),
        ({"sharding": "row_wise"}, 1 + 2 + 2 * 4),
        ({"sharding": "table_row_wise"}, 1 + 4 + 2 * 2),
        ({"sharding": "row_wise", "replicas": 4}, 1 + 2 + 2 * 2),
        ({"sharding": "table_wise", "replicas": 16}, 0),  # each rank has all tables
    ):
        plan = plan_training(small({"a": (100_000, 1)}, hardware, embeddings=embeddings))
        assert plan.rounds == wanted + beside, embeddings


def test_scenarios_without_a_row_start_no_operators():
    """A rank of 8 rows has 8 scenarios at most, however many there are."""
    hardware = Hardware(2, 2, "cpu", 8 * GIB, CPU)
    described = TableList.model_validate(
        {"name": "s", "tasks": 2, "scenarios": 40, "tables": [{"name": "a", "rows": 100, "pooling_length": 1.0}]}
    )
    request = small({"a": (100, 1)}, hardware)
    dataset = request.config.dataset.model_copy(update={"setting": Setting.MTMSL})
    request = replace(request, manifest=described.manifest(), config=request.config.model_copy(update={"dataset": dataset}))
    plan = None
    for rows, present in ((16, 8), (2 * 40, 40), (2 * 4000, 40)):
        training = request.config.training.model_copy(update={"batch_size": rows})
        plan = plan_training(replace(request, config=request.config.model_copy(update={"training": training})), plan)
        launches = plan.cost.launches + plan.cost.launches_of_scenario * (present - 1) + 4 * plan.launches_beside_network
        assert plan.cost.launches_of_scenario > 4
        assert plan.step["host"] == pytest.approx(1000 * launches * CPU.launch)


def test_times_of_the_command_line_are_microseconds():
    assert (microseconds("25us"), microseconds("4.5 us"), microseconds("0us")) == (25e-6, 4.5e-6, 0.0)
    for given in ("25", "25ms", "-1us", "nanus", "us", "1e3us", f"{'9' * 400}us"):
        with pytest.raises(ArgumentTypeError, match="is no time: microseconds such as 25us"):
            microseconds(given)


def test_sizes_of_the_command_line_have_a_unit():
    assert (size("80GiB"), size("80 GB"), size("1.5KiB"), size("7B")) == (80 * GIB, 80 * 10**9, 1536, 7)
    for given in ("80", "80G", "80gib", "0GiB", "0.5B", "-1GiB", "1e3GiB", f"{'9' * 400}GiB"):
        with pytest.raises(ArgumentTypeError, match="is no size"):
            size(given)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ("[{name: user.id, rows: 10}]", "'user.id' may hold letters, digits, '_' and '-' only"),
        ("[{name: dense_0, rows: 10}]", "feature names are not unique: ['dense_0', 'dense_0']"),
        ("[{name: a, rows: 10000000000000000000}]", "tables.0.rows: Input should be less than or equal to 1000000000000000"),
    ],
)
def test_described_tables_that_no_dataset_may_have_are_refused(tmp_path, tables, words):
    (tmp_path / "tables.yaml").write_text(f"name: odd\ndense: 1\ntables: {tables}\n")
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_table_list(tmp_path / "tables.yaml")


def test_a_plan_for_gpus_says_which_rates_nobody_has_measured():
    usual = Hardware(2, 2, "cuda", 8 * GIB, GPU)
    told = replace(usual, bandwidths=replace(GPU, round=1e-5, memory=1e12))
    request = small({"a": (1000, 1)}, usual)
    for hardware, operations, wanted in (
        (usual, OPERATIONS["cuda"], "--bandwidth, --bandwidth-in-host, --memory-bandwidth, --round, --launch, --tflops"),
        (told, 1e15, "--bandwidth, --bandwidth-in-host, --launch"),
        (Hardware(2, 2, "cpu", 8 * GIB, CPU), OPERATIONS["cpu"], None),
    ):
        said = text(plan_training(replace(request, hardware=hardware, operations=operations)), [], [], [])
        lines = [line for line in said.splitlines() if line.startswith("Not measured")]
        assert lines == ([f"Not measured, but usual figures of GPUs: {wanted}. Give those of yours."] if wanted else [])


def test_an_overloaded_rank_a_table_too_small_to_split_and_an_uncounted_length_are_told(tmp_path):
    hardware = Hardware(4, 4, "cuda", 8 * GIB, GPU)
    plan = plan_training(
        small({"a": (10**6, 100), "b": (1000, 1), "c": (3, 1)}, hardware, embeddings={"sharding": "table_wise"})
    )
    told = "\n".join(plan.warnings())
    (rank,) = next(table.ranks for table in plan.tables if table.name == "a")
    assert f"rank {rank} is overloaded" in told
    assert "most of it a" in told
    assert "too small to split over 4 ranks, so whole on one: c" in told
    assert "1 of 4 ranks hold no table" in told
    data = write_dataset(tmp_path / "data")
    config = load_config({"dataset": {"path": str(tmp_path / "data")}, "model": {"name": "mmoe"}})
    told = "\n".join(plan_training(Request(config, data.manifest, hardware, 1e11, "x")).warnings())
    assert "does not record how many ids a row has of m0" in told
    counted = data.manifest.model_copy(update={"statistics": {"mean_lengths": {"m0": 2.5}}})
    plan = plan_training(Request(config, counted, hardware, 1e11, "x"))
    assert "does not record" not in "\n".join(plan.warnings())
    assert {table.name: table.lengths for table in plan.tables}["tm0"] == (2.5,)


def test_what_maps_of_managed_tables_take_is_told_where_it_is_much():
    request = small({"users": (10**8 + 1, 1.0)}, Hardware(4, 4, "cuda", 16 * GIB, GPU))
    assert not any("managed" in text for text in plan_training(request).warnings())
    tables = [table.model_copy(update={"managed": True, "hash_seed": 1}) for table in request.manifest.tables]
    managed = replace(request, manifest=request.manifest.model_copy(update={"tables": tables}))
    # 12 bytes a slot, and 4 for each of 2^27 places of the directory.
    told = f"each rank keeps {(12 * 10**8 + 4 * 2**27) / GIB:.2f} GiB in its host's memory"
    assert any(told in text for text in plan_training(managed).warnings())
    plenty = replace(managed, hardware=Hardware(4, 4, "cuda", 1000 * GIB, GPU))
    assert not any("managed" in text for text in plan_training(plenty).warnings())


def test_managed_tables_that_no_training_can_have_are_not_planned():
    request = small({"users": (1001, 1.0)}, Hardware(2, 2, "cuda", GIB, GPU))
    table = request.manifest.table("users").model_copy(update={"managed": True, "hash_seed": 1, "num_rows": 2**31 + 1})
    with pytest.raises(ConfigError, match="table 'users' is managed: it may have 2,147,483,648 rows at most"):
        plan_training(replace(request, manifest=request.manifest.model_copy(update={"tables": [table]})))


def test_backward_passes_that_a_strategy_adds_are_told():
    request = small({"a": (1000, 1)}, Hardware(2, 2, "cpu", GIB, CPU))
    for name, told in (("static", False), ("uw", False), ("pcgrad", True), ("gradnorm", True)):
        config = request.config.model_copy(update={"balancing": {"name": name}})
        warnings = "\n".join(plan_training(replace(request, config=config)).warnings())
        assert (f"balancing.name={name} takes a backward pass of the network for each objective" in warnings) == told


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--compare", "a", "b", "--json", "c"], "leave out --json"),
        (["--compare", "a", "b", "--hosts", "2"], "leave out --hosts"),
        (["--compare", "a", "b", "--round", "0us"], "leave out --round"),
        (["--compare", "a", "b", "embeddings.dim=8"], "leave out embeddings.dim=8"),
        (["--config", "x", "--processes-per-host", "2", "--hbm", "8GiB"], "is --ram"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(run_app, given, words):
    code, said = run_app("plan", *given)
    assert code == 2
    assert words in said


@pytest.mark.parametrize("name", ["single_task", "star", "snr"])
def test_networks_of_all_kinds_have_a_cost(tmp_path, name):
    data = write_dataset(tmp_path / "data")
    setting = "msl" if name == "star" else "mtl"
    tasks = ["click"] if name in ("star",) else ["click", "buy"]
    config = load(
        {
            "dataset": {"path": str(tmp_path / "data"), "setting": setting, "tasks": tasks},
            "model": {"name": name},
            "model_defaults": {"dnn_hidden_units": [64, 32]},
        },
        [],
    )
    plan = plan_training(Request(config, data.manifest, Hardware(2, 2, "cuda", GIB, GPU), 1e12, "x"))
    assert plan.cost.operations > 0
    assert plan.cost.activations > 0


def test_operations_of_an_mlp_by_hand(tmp_path):
    data = write_dataset(tmp_path / "data", num_multi=0, num_sparse=3, num_dense=2)
    sizes = {"dnn_hidden_units": [64, 32]}
    config = load({"dataset": {"path": "x", "tasks": ["click"]}, "model": {"name": "mlp", **sizes}}, [])
    plan = plan_training(Request(config, data.manifest, Hardware(1, 1, "cpu", GIB, CPU), 1e12, "x"))
    products = (3 * 8 + 2) * 64 + 64 * 32 + 32
    # Forward, gradient of the inputs and of the weights: two operations for each weight in each.
    assert plan.cost.operations == pytest.approx(6 * products, rel=0.02)


def test_a_training_lays_its_tables_where_the_plan_says_when_activations_leave_little_room(tmp_path):
    data = write_dataset(tmp_path / "data", num_sparse=2, num_multi=0, table_rows=20_000)
    config = tmp_path / "config.yaml"
    # A normalisation, whose sums are over ranks: what a row takes is found by each rank alone.
    config.write_text(
        f"dataset: {{path: {data.folder}}}\nmodel: {{name: shared_bottom, use_bn: true}}\n"
        "model_defaults: {bottom_hidden_units: [256], tower_hidden_units: []}\n"
        "embeddings: {dim: 16, table_dim: {t0: 64}}\ntraining: {batch_size: 4096}\n"
    )
    plenty = Request(load(str(config), []), data.manifest, Hardware(2, 2, "cpu", GIB, CPU), 1e11, "x")
    roomy = plan_training(plenty)
    assert [(table.sharding, table.ranks) for table in roomy.tables] == [("table_wise", [0]), ("table_wise", [1])]
    # On the rank of the wide table all would fit but a quarter of the activations.
    memory = int((roomy.fullest.total - roomy.fullest.activations / 4) / (1 - RESERVED_SHARE))
    tight = plan_training(replace(plenty, hardware=replace(plenty.hardware, memory=memory)))
    assert [table.sharding for table in tight.tables] == ["row_wise", "row_wise"]
    assert not tight.missing
    processes.spawn(lie, (2, str(free_port()), config, memory, tmp_path), 2)
    for rank in (0, 1):
        placed = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert [(row["sharding"], row["ranks"]) for row in placed] == [("row_wise", [0, 1])] * 2


def test_a_network_that_cannot_be_tried_out_trains_and_the_log_says_what_is_kept_free(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "data", num_sparse=2, num_multi=0)
    config = tmp_path / "config.yaml"
    config.write_text(f"dataset: {{path: {data.folder}}}\nmodel: {{name: shared_bottom}}\nembeddings: {{dim: 4}}\n")
    processes.spawn(refuse, (2, str(free_port()), config, tmp_path), 2)
    plans, told = zip(*(json.loads((tmp_path / f"refused-{rank}.json").read_text()) for rank in (0, 1)), strict=True)
    assert plans[0] == plans[1]
    words = "SharedBottom: a step of 32 or 64 random rows on the CPU, which tells what a row costs, fails: NotImplementedError"
    said = [message for message in told[0] if words in message]
    assert len(said) == 1
    assert re.search(r"keeps 0\.\d\d GiB free on each rank, for the network, and nothing for its activations", said[0])
    assert not [message for message in told[1] if words in message]  # once is enough
    monkeypatch.setattr(SharedBottom, "forward", lambda *_, **__: 1 / 0)
    request = Request(load(str(config), []), data.manifest, Hardware(2, 2, "cpu", GIB, CPU), 1e11, "x")
    with pytest.raises(ConfigError, match="fails: ZeroDivisionError: division by zero"):
        plan_training(request)


@pytest.mark.parametrize(
    ("world_size", "sharding", "mib", "dtype"),
    [
        (2, "auto", 128, "fp32"),
        pytest.param(2, "auto", 1024, "fp16", marks=pytest.mark.long),
        *(
            pytest.param(world, kind, 1024, "fp32", marks=pytest.mark.long)
            for world in (1, 2, 4)
            for kind in ("auto", "row_wise")
        ),
    ],
)
def test_predicted_memory_is_what_ranks_grow_by(tmp_path, world_size, sharding, mib, dtype):
    rows = mib * 2**20 // (4 * 64)
    data = write_dataset(tmp_path / "data", num_sparse=2, num_multi=0, table_rows=rows, tasks=("click",))
    write_dataset(tmp_path / "small", num_sparse=2, num_multi=0, tasks=("click",))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"dataset: {{path: {data.folder}}}\nmodel: {{name: mlp, dnn_hidden_units: [8]}}\n"
        f"embeddings: {{dim: 64, sharding: {sharding}, dtype: {dtype}}}\ntraining: {{batch_size: 64}}\n"
    )
    processes.spawn(grow, (world_size, str(free_port()), config, tmp_path / "small", tmp_path), world_size)
    hardware = Hardware(world_size, world_size, "cpu", 16 * GIB, CPU)
    plan = plan_training(Request(load(str(config), []), DatasetManifest.load(data.folder), hardware, 1e11, "x"))
    for rank in plan.ranks:
        found = json.loads((tmp_path / f"rank-{rank.rank}.json").read_text())
        if rank.weights:
            assert found["growth"] == pytest.approx(rank.weights + rank.state, rel=0.1), rank
        else:  # Two tables, each whole on one of four ranks.
            assert found["growth"] < 0.01 * sum(table.rows for table in plan.tables) * 64 * 4, rank
        assert [(row["sharding"], row["ranks"]) for row in found["plan"]] == [(t.sharding, t.ranks) for t in plan.tables]
