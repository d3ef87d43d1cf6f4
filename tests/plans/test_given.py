"""`embeddings.plan`: a plan of other tables or ranks is refused by name; what fits no rank is told with amounts."""

import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchrec import EmbeddingBagConfig

from mmlrec.config import EmbeddingsConfig, load_config
from mmlrec.embeddings import sharding
from mmlrec.embeddings.hardware import CPU, GPU, Hardware, memory_of
from mmlrec.embeddings.placement import TablesDoNotFit
from mmlrec.embeddings.plan_file import compare_plans, given_placement, read_plan
from mmlrec.embeddings.sharding import apply_table_optimizer, make_plan, plan_report, ranks_of_host, short_of_memory
from mmlrec.embeddings.tables import build_tables
from mmlrec.errors import ConfigError, DataError
from mmlrec.session.session import hardware_of
from tests import processes
from tests.plans.growth import fit
from tests.training.launch import free_port

GIB = 2**30
SIZES = {"a": (1000, 8), "b": (3, 8)}


def ranks(world_size, each=None, **more):
    """So many ranks, on one host or `each` on a host."""
    return Hardware(world_size, each or world_size, "cpu", 2**30, CPU, **more)


def rows(**changes):
    """A plan of two ranks as a run writes it; `a__ranks=[0]` changes a key of table a."""
    plan = {
        "a": {"table": "a", "rows": 1000, "dim": 8, "sharding": "row_wise", "ranks": [0, 1], "weight_bytes": 32000},
        "b": {"table": "b", "rows": 3, "dim": 8, "sharding": "table_wise", "ranks": [1], "weight_bytes": 96},
    }
    for key, value in changes.items():
        table, _, name = key.partition("__")
        if name:
            plan[table][name] = value
        else:
            del plan[table]
    return list(plan.values())


def written(folder, content):
    folder.mkdir(exist_ok=True)
    path = folder / "plan.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("variable", ["TORCHREC_RESOLVED_POD_SIZE", "TOPOLOGY_DOMAIN_MULTIPLE"])
def test_hosts_that_torchrec_would_take_for_one_are_refused(monkeypatch, variable):
    """Ranks would look for rows in other groups than those of the plan; torchrec 1.6 reads the second."""
    world = SimpleNamespace(
        world_size=4,
        local_world_size=2,
        device=torch.device("cpu"),
        highest=lambda value: value,
        gather=lambda value: [value] * 4,
    )
    monkeypatch.delenv(variable, raising=False)
    assert (found := hardware_of(world)).ranks_per_host == 2
    monkeypatch.setenv(variable, "1")
    assert hardware_of(world) == found
    monkeypatch.setenv(variable, "2")
    with pytest.raises(
        ConfigError, match=rf"the environment variable {variable} is 2: torchrec would take that many hosts for one.* Unset it"
    ):
        hardware_of(world)


def test_both_kinds_of_file_are_read(tmp_path):
    wanted = {"a": ("row_wise", [0, 1], "fused"), "b": ("table_wise", [1], "fused")}
    assert given_placement(written(tmp_path, rows()), SIZES, ranks(2)) == wanted
    assert given_placement(written(tmp_path, {"tables": rows(), "form": 1}), SIZES, ranks(2)) == wanted
    assert read_plan(tmp_path)[0] == read_plan(tmp_path / "plan.json")[0]  # the folder of a run


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        ({"b": None}, 2, "has no table 'b', which the training has"),
        ({"b__table": "c"}, 2, "has no table 'b'"),
        ({"a__rows": 999}, 2, "table 'a' is 999 x 8, in the training 1000 x 8"),
        ({"a__dim": 4}, 2, "table 'a' is 1000 x 4, in the training 1000 x 8"),
        (
            {"a__sharding": "table_row_wise"},
            4,
            r"places 'a' table_row_wise on ranks 0-1; the training has 4 rank\(s\) on 1 host",
        ),
        ({}, 4, "places 'a' row_wise on ranks 0-1; the training has 4 rank"),
        ({"a__ranks": [0], "a__sharding": "table_wise"}, 1, "places 'b' table_wise on rank 1; the training has 1 rank"),
        ({"b__ranks": [0, 1], "b__sharding": "row_wise"}, 2, None),
        ({"b__ranks": [-1]}, 2, "places 'b' table_wise on rank -1"),
    ],
)
def test_a_plan_of_something_else_is_refused(tmp_path, changes, world_size, words):
    path = written(tmp_path, rows(**changes))
    if words is None:
        assert given_placement(path, SIZES, ranks(world_size))["b"][:2] == ("row_wise", [0, 1])  # 2 rows and 1
        return
    with pytest.raises(ConfigError, match=words):
        given_placement(path, SIZES, ranks(world_size))


def test_a_plan_of_fewer_ranks_is_refused_wherever_its_tables_lie(tmp_path):
    tables = rows(a__sharding="table_wise", a__ranks=[0])
    plan = {"tables": tables, "hardware": {"ranks": 2}}
    assert given_placement(written(tmp_path, plan), SIZES, ranks(2))["a"][:2] == ("table_wise", [0])
    with pytest.raises(ConfigError, match=r"is of 2 rank\(s\) for a copy of the tables; the training has 4 rank"):
        given_placement(written(tmp_path, plan), SIZES, ranks(4))
    of_copies = {"tables": [row | {"replicas": 2} for row in tables], "hardware": {"ranks": 4}}
    assert given_placement(written(tmp_path, of_copies), SIZES, ranks(2))["b"][:2] == ("table_wise", [1])


def test_a_plan_that_names_a_table_twice_or_ranks_without_number_is_told(tmp_path):
    with pytest.raises(DataError, match="is no plan of tables, or damaged: it places 'b' twice"):
        read_plan(written(tmp_path, [*rows(), rows()[1]]))
    with pytest.raises(DataError, match="is no plan of tables, or damaged"):
        read_plan(written(tmp_path, rows(a__weight_bytes=-1)))
    far = written(tmp_path, rows(a__sharding="table_wise", a__ranks=[10**12]))
    assert totals(compare_plans(far, far))["ranks with tables"] == [f"2 of {10**12 + 1}"] * 2


def test_a_table_may_lie_on_any_one_host(tmp_path):
    for own in ([0, 1], [2, 3]):
        path = written(tmp_path, rows(a__sharding="table_row_wise", a__ranks=own))
        assert given_placement(path, SIZES, ranks(4, 2))["a"][:2] == ("table_row_wise", own)
        with pytest.raises(ConfigError, match="table_row_wise on ranks"):
            given_placement(path, SIZES, ranks(4, 2, equal_hosts=False))
    for others in ([1, 2], [0, 1, 2, 3], [4, 5], [3, 2], [0, 2], [0]):
        path = written(tmp_path, rows(a__sharding="table_row_wise", a__ranks=others))
        with pytest.raises(ConfigError, match=r"places 'a' table_row_wise on rank.*the training has 4 rank.*on 2 host"):
            given_placement(path, SIZES, ranks(4, 2))
    whole = rows(a__sharding="table_row_wise", a__ranks=[0, 1, 2], b__sharding="table_row_wise", b__ranks=[3, 4, 5])
    assert given_placement(written(tmp_path, whole), SIZES, ranks(6, 3))["b"][:2] == ("table_row_wise", [3, 4, 5])
    whole[1]["ranks"] = [4, 5, 6, 7]
    whole[0]["ranks"] = [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="splits 'b', which has too few rows to give each of 4 ranks some"):
        given_placement(written(tmp_path, whole), SIZES, ranks(8, 4))


def test_a_table_too_small_to_split_is_not_split(tmp_path):
    path = written(tmp_path, rows(a__ranks=[0, 1, 2, 3], b__ranks=[0, 1, 2, 3], b__sharding="row_wise"))
    with pytest.raises(ConfigError, match="splits 'b', which has too few rows to give each of 4 ranks some"):
        given_placement(path, SIZES, ranks(4))


def test_a_table_in_the_memory_of_the_host_wants_a_cache(tmp_path):
    path = written(tmp_path, rows(a__kernel="fused_uvm_caching"))
    assert given_placement(path, SIZES, ranks(2), 0.1)["a"] == ("row_wise", [0, 1], "fused_uvm_caching")
    with pytest.raises(ConfigError, match=r"places 'a' in the memory of the host.* embeddings.host_cache=0.1"):
        given_placement(path, SIZES, ranks(2))
    with pytest.raises(DataError, match="is no plan of tables, or damaged"):
        given_placement(written(tmp_path, rows(a__kernel="dense")), SIZES, ranks(2))


@pytest.mark.parametrize("content", [{}, [1], {"tables": 3}, [{"table": "a"}], "x"])
def test_what_is_no_plan_is_told(tmp_path, content):
    with pytest.raises(DataError, match="is no plan of tables, or damaged"):
        read_plan(written(tmp_path, content))
    with pytest.raises(DataError, match="no such plan"):
        read_plan(tmp_path / "missing.json")


def test_plan_and_sharding_contradict_each_other():
    for other in ({"sharding": "row_wise"}, {"table_sharding": {"a": "row_wise"}}):
        with pytest.raises(ConfigError, match="plan says where every table lies"):
            load_config({"dataset": {"path": "x"}, "embeddings": {"plan": "p.json", **other}})


def totals(text):
    """Name -> the two cells, of the first table of a comparison."""
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 3}


def test_device_and_host_memory_are_told_apart_and_all_copies_counted(tmp_path):
    """Copies of four tables of 3 GiB with their state, two on GPUs and two on hosts, on two of four ranks each."""
    sizes = {"weight_bytes": 2 * GIB, "state_bytes": GIB, "rows": 1000, "dim": 8, "replicas": 2}
    tables = [
        {"table": "a", "sharding": "row_wise", "ranks": [0, 1], "kernel": "fused", **sizes},
        {"table": "b", "sharding": "table_wise", "ranks": [0], "kernel": "fused", **sizes},
        {"table": "c", "sharding": "row_wise", "ranks": [0, 1], "kernel": "fused_uvm_caching", **sizes},
        {"table": "d", "sharding": "table_wise", "ranks": [1], "kernel": "fused_uvm_caching", **sizes},
    ]
    one = [{**table, "replicas": 1, "kernel": "fused"} for table in tables]
    first = written(tmp_path / "first", {"tables": tables, "hardware": {"ranks": 4}, "step_ms": 1.0, "fits": True})
    told = compare_plans(first, written(tmp_path / "second", one))
    found = totals(told)
    assert found["copies of them"] == ["2", "1"]
    assert found["ranks with tables"] == ["4 of 4", "2 of 2"]
    assert found["weights of a copy, GiB"] == ["8.00", "8.00"]
    assert found["state of a copy, GiB"] == ["4.00", "4.00"]
    assert found["fullest rank, tables, GiB"] == ["4.50", "6.00"]  # on its device: half of a, and b
    assert found["emptiest rank, tables, GiB"] == ["1.50", "6.00"]
    assert found["fullest rank, tables in host memory, GiB"] == ["4.50", "0.00"]  # half of c, and d
    assert "1,000 x 8 row_wise on ranks 0-1, in host memory, 2 copies of it" in told


def test_copies_of_plans_of_releases_before_are_counted_where_their_file_tells_them(tmp_path):
    """Two ranks for each of two copies of 3 GiB: what four ranks hold is twice the tables. The file of a run says nothing."""
    table = {"table": "a", "sharding": "row_wise", "ranks": [0, 1], "weight_bytes": 2 * GIB, "state_bytes": GIB}
    table |= {"rows": 1000, "dim": 8, "kernel": "fused_uvm_caching"}
    held = {"weight_bytes": 0, "state_bytes": 0, "host_bytes": 3 * GIB // 2}
    before = written(tmp_path / "before", {"tables": [table], "hardware": {"ranks": 4}, "ranks": [held] * 4})
    now = written(tmp_path / "now", {"tables": [{**table, "replicas": 2}], "hardware": {"ranks": 4}, "ranks": [held] * 4})
    told = compare_plans(before, now)
    found = totals(told)
    assert found["copies of them"] == ["2", "2"]
    assert found["ranks with tables"] == ["4 of 4", "4 of 4"]
    assert "Every table has the same size and lies on the same ranks in both." in told
    assert totals(compare_plans(written(tmp_path / "run", [table]), now))["copies of them"] == ["not recorded", "2"]


@pytest.mark.parametrize(
    "beside",
    [{"hardware": []}, {"hardware": {"ranks": 0}}, {"hardware": {"ranks": "x"}}, {"step_ms": "x"}, {"step_ms": float("nan")}],
)
def test_a_plan_whose_other_figures_are_damaged_is_told(tmp_path, beside):
    path = written(tmp_path, {"tables": rows(), **beside})
    with pytest.raises(DataError, match="is no plan of tables, or damaged"):
        compare_plans(path, path)


def test_the_plan_of_a_run_and_of_apps_plan_say_as_many_copies(tmp_path):
    tables = build_tables([EmbeddingBagConfig(name="a", num_embeddings=1000, embedding_dim=8, feature_names=["f"])])
    config = EmbeddingsConfig(replicas=2)
    apply_table_optimizer(tables, config.optimizer, torch.device("cpu"))
    plan = make_plan("tables", tables, config, ranks(2), batch_size=8)
    report = plan_report(plan, "tables", tables, "adagrad", config.replicas)
    assert [(table.ranks, table.replicas) for table in read_plan(written(tmp_path, report))[0]] == [(report[0]["ranks"], 2)]


@pytest.mark.parametrize(
    ("sizes", "rank", "host"),
    [([2, 2, 2, 2], 1, [0, 1]), ([2, 2, 2, 2], 2, [2, 3]), ([3, 3, 3, 1], 3, [3]), ([1, 3, 3, 3], 2, [1, 2, 3])],
)
def test_ranks_of_a_host(sizes, rank, host):
    assert list(ranks_of_host(sizes, rank)) == host


def test_what_lies_on_a_host_is_of_all_its_ranks_and_copies(monkeypatch):
    """Two copies of a table of 4 GiB with its state over two ranks each, all on one host: 2 GiB for each of four ranks."""
    sizes = {"weight_bytes": 3 * GIB, "state_bytes": GIB, "kernel": "fused"}
    report = [{"table": "a", "ranks": [0, 1], **sizes}]
    arguments = {"rank": 3, "sizes": [4] * 4, "replica": 2, "device": torch.device("cpu"), "host_bytes": GIB // 4}
    for free, fits in ((9 * GIB, True), (9 * GIB - 1, False)):
        monkeypatch.setattr(sharding, "host_memory", lambda key, free=free: free)
        told = short_of_memory(report, "adagrad", **arguments)
        assert (told is None) == fits
    assert "need 9.00 GiB on the host of rank 3" in str(told)


def test_tables_behind_a_cache_need_the_memory_of_the_host(monkeypatch):
    sizes = {"weight_bytes": 3 * GIB, "state_bytes": GIB}
    report = [
        {"table": "a", "ranks": [0, 1], "kernel": "fused_uvm_caching", **sizes},
        {"table": "b", "ranks": [1], "kernel": "fused", **sizes},
    ]
    arguments = {"rank": 0, "sizes": [2, 2], "replica": 2, "device": torch.device("cuda")}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, GIB))
    monkeypatch.setattr(sharding, "host_memory", lambda key: 4 * GIB)
    assert short_of_memory(report, "adagrad", **arguments) is None
    assert "need 4.00 GiB on the GPU of rank 1" in str(short_of_memory(report, "adagrad", **{**arguments, "rank": 1}))
    monkeypatch.setattr(sharding, "host_memory", lambda key: 4 * GIB - 1)
    assert "need 4.00 GiB on the host of rank 0" in str(short_of_memory(report, "adagrad", **arguments))


def test_memory_of_a_gpu_that_torch_keeps_for_former_tables_is_free(monkeypatch):
    """As in a notebook that trains and then predicts: tables and pipeline of the first session hold each other."""

    class Former:
        pass

    former, kept = Former(), [4 * GIB]
    former.itself = former
    alive = weakref.ref(former)
    del former
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.clear() if alive() is None else None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB - sum(kept), 5 * GIB))
    report = [{"table": "a", "ranks": [0], "kernel": "fused", "weight_bytes": 3 * GIB, "state_bytes": GIB}]
    arguments = {"rank": 0, "sizes": [1], "replica": 1, "device": torch.device("cuda")}
    assert short_of_memory(report, "adagrad", **arguments) is None


def test_hosts_that_differ_count_as_they_are(tmp_path):
    """Two ranks on a host of 8 GiB, one on a host of 3: a plan takes the least of a rank; what does not fit all are told."""
    report = [{"table": "a", "ranks": [0, 1, 2], "kernel": "fused", "weight_bytes": 6 * GIB, "state_bytes": 6 * GIB}]
    processes.spawn(fit, ([2, 1], str(free_port()), report, [8, 3], tmp_path), 3)
    said = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(3)]
    assert {(one["memory"], one["ranks_per_host"], one["equal"]) for one in said} == {(3 * GIB, 2, False)}
    # 4 GiB on each rank: 8 on the first host, which has them, and 4 on the second, which has 3.
    assert len({one["told"] for one in said}) == 1
    assert "need 4.00 GiB on the host of rank 2, 3.00 GiB are free" in said[0]["told"]


def test_plans_of_runs_before_are_compared(tmp_path):
    first = written(tmp_path, rows())
    (tmp_path / "other").mkdir()
    second = written(tmp_path / "other", {"tables": rows(b__ranks=[0]), "fits": True, "step_ms": 1.5})
    told = compare_plans(first, second)
    (line,) = [line for line in told.splitlines() if line.startswith("b ")]
    assert line.split() == ["b", "3", "x", "8", "table_wise", "on", "rank", "1", "3", "x", "8", "table_wise", "on", "rank", "0"]
    assert not [line for line in told.splitlines() if line.startswith("a ")]
    assert "1.500" in told


def test_a_training_whose_tables_fit_no_rank_says_by_how_much():
    """2 GiB of weights and as much state, evenly on two ranks of 2 GiB: of each, 0.85 * 2 = 1.70 can be planned with."""
    tables = build_tables([EmbeddingBagConfig(name="a", embedding_dim=8, num_embeddings=2**26, feature_names=["a"])])
    config = EmbeddingsConfig()
    apply_table_optimizer(tables, config.optimizer, torch.device("cuda"))
    hardware = Hardware(2, 2, "cuda", 2 * 2**30, GPU)
    with pytest.raises(TablesDoNotFit, match=r"no plan fits 2 ranks of 2\.00 GiB, of which 1\.70 .* take 2\.\d\d GiB"):
        make_plan("tables", tables, config, hardware, batch_size=64)
    make_plan("tables", tables, config, Hardware(4, 4, "cuda", 2 * 2**30, GPU), batch_size=64)


def test_the_planner_gets_memory_hosts_and_bandwidths_as_they_are():
    hardware = Hardware(4, 2, "cuda", 80 * 2**30, GPU)
    topology = hardware.topology(reserved=2**30)
    assert (topology.world_size, topology.local_world_size, hardware.num_hosts) == (4, 2, 2)
    assert {device.storage.hbm for device in topology.devices} == {int(80 * 2**30 * 0.85) - 2**30}
    assert topology.inter_host_bw == GPU.between_hosts / 1000
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert memory_of(torch.device("cpu"), 2) == int(total.split()[1]) * 1024 // 2
