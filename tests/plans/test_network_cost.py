"""What a network costs: operations of all methods against formulas by hand, operators and collectives against a real step."""

import json
from collections import Counter

import pytest
import torch

from benchmarks.flops import FORWARD, Case
from mmlrec.embeddings.hardware import CPU, Hardware
from mmlrec.models.base.model import ModelSpec
from mmlrec.registry import load, method, method_names
from mmlrec.schema import Setting, Task
from mmlrec.session.network_cost import _Operators, network_cost
from mmlrec.session.planning import Request, plan_training
from tests import processes
from tests.datasets import write_dataset
from tests.plans.growth import count
from tests.training.launch import free_port

DIM, FIELDS = 16, 8
#: Options of what benchmarks.flops counts, where they are not the defaults.
OPTIONS = {
    "snr aver": {"variant": "aver"},
    "escm2 dr": {"variant": "dr"},
    "apg": {"condition_fields": ["f0"]},
    "pepnet": {"prior_fields": ["f0", "f1"]},
}


def spec_of(tasks, scenarios):
    roles = ("ctr", "ctcvr", *[None] * tasks)
    named = tuple(Task(name=f"t{i}", role=roles[i], implied_by_next=i + 1 < tasks) for i in range(tasks))
    setting = Setting.MTL if scenarios == 1 else Setting.MSL if tasks == 1 else Setting.MTMSL
    fields = {f"f{i}": DIM for i in range(FIELDS)}
    return ModelSpec(setting, named, scenarios, fields, 4, 0, embedding_dim=DIM)


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (2, 3)], ids=["mtl", "mtmsl"])
@pytest.mark.parametrize("name", FORWARD)
def test_operations_are_three_times_the_forward_pass(name, tasks, scenarios):
    """Forward, gradient of the inputs, gradient of the weights; the formulas are those of benchmarks.flops. To 2 %."""
    spec, kind, case = spec_of(tasks, scenarios), method(name.split()[0]), Case(FIELDS, DIM, 4, tasks, scenarios)
    assert spec.setting in kind.settings
    found = network_cost(kind(spec, kind.Config(**OPTIONS.get(name, {}))), bf16=False)
    assert found.operations == pytest.approx(3 * FORWARD[name](case), rel=0.02)
    assert found.occupied >= found.operations


def test_all_methods_have_a_formula():
    assert {name.split()[0] for name in FORWARD} == set(method_names())


def test_narrow_weights_occupy_as_much_as_wide_ones():
    kind, spec = method("mlp"), spec_of(1, 1)
    narrow, wide = (
        network_cost(kind(spec, kind.Config(dnn_hidden_units=units)), bf16=False) for units in ([32, 8], [256, 256])
    )
    width = FIELDS * DIM + 4
    # The logit is a product and a sum by itself; 132 x 32 counts as 132 x 128, 32 x 8 as if 8 were 128.
    assert narrow.operations == pytest.approx(6 * (width * 32 + 32 * 8), rel=0.02)
    assert narrow.occupied == pytest.approx(6 * (width * 128 + 32 * 128), rel=0.02)
    assert wide.occupied == pytest.approx(wide.operations, rel=0.02) == pytest.approx(6 * (width * 256 + 256 * 256), rel=0.02)


def test_bytes_and_starts_of_operators_that_are_no_products():
    x, y = torch.ones(10, 6), torch.ones(10, 6)
    with _Operators() as found:
        x.view(6, 10).t()  # nothing is started
        torch.empty(1000)  # started, and nothing written
        x @ y.t()  # counted by its operations
        torch.add(x, y)  # 60 numbers of 4 bytes: two read, one written
        x.relu_()  # read and written
        torch.mul(x, y, out=y)  # two read, one written
    assert found.launches == 5
    assert found.traffic == 4 * 60 * (3 + 2 + 3)


def test_each_further_scenario_starts_operators_of_its_own():
    kind = method("mmoe")
    found = [network_cost(kind(spec_of(2, scenarios), kind.Config()), bf16=False) for scenarios in (3, 64)]
    assert found[0].launches == found[1].launches
    assert found[0].launches_of_scenario == pytest.approx(found[1].launches_of_scenario, rel=0.1)
    # A product forward and two backward, and a sum for a bias, of the layers of gates and towers, for each task.
    assert 2 * 3 * 3 <= found[0].launches_of_scenario <= 2 * 4 * 4
    assert network_cost(kind(spec_of(2, 1), kind.Config()), bf16=False).launches_of_scenario == 0


COLLECTIVES = {
    "c10d::alltoall_base_": "all_to_all",
    "c10d::_reduce_scatter_base_": "half",
    "c10d::_allgather_base_": "half",
    "c10d::allreduce_": "all_reduce",
}


@pytest.mark.parametrize(("world_size", "on_host"), [(1, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.long)])
def test_operators_and_collectives_of_a_step_are_those_of_a_real_one(tmp_path, world_size, on_host):
    data = write_dataset(tmp_path / "data", num_sparse=2, num_multi=0, rows=2000)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"dataset: {{path: {data.folder}, setting: mtl}}\nmodel: {{name: mmoe}}\ntraining: {{batch_size: {64 * world_size}}}\n"
    )
    cases = [[f"embeddings.sharding={kind}"] for kind in ("table_wise", "row_wise", "table_row_wise")[:world_size]]
    if world_size > 1:
        cases += [["embeddings.table_sharding={t0: row_wise, t1: table_wise}", "model.expert_hidden_units=[512,512]"]]
    processes.spawn(count, (world_size, str(free_port()), on_host, config, cases, tmp_path), world_size)
    hardware = Hardware(world_size, on_host, "cpu", 2**30, CPU)
    for overrides, names in zip(cases, json.loads((tmp_path / "operators.json").read_text()), strict=True):
        plan = plan_training(Request(load(str(config), overrides), data.manifest, hardware, 1e11, "x"))
        met = Counter()
        for name, number in names.items():
            met[COLLECTIVES.get(name, "")] += number
        if world_size > 1:  # one rank alone still asks itself for sizes, and does not wait
            assert {kind: met[kind] for kind in plan.collectives} == plan.collectives
        beside = sum(names.values()) - plan.cost.launches
        assert beside == pytest.approx(plan.launches_beside_network, rel=0.1), names
