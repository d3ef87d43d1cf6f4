"""Slices of networks by name: with more tasks and scenarios, in another order, and other fields, known heads say the same."""

import warnings

import pytest
import torch

from mmlrec.models.base.model import ModelSpec
from mmlrec.registry import method, method_names
from mmlrec.schema import Setting, Task
from mmlrec.testing.networks import TINY
from mmlrec.warm_start.slices import Known, layouts, taken

SHAPES = {Setting.MTL: (2, [""]), Setting.MSL: (1, ["s0", "s1", "s2"]), Setting.MTMSL: (2, ["s0", "s1", "s2"])}
CASES = [(name, setting) for name in method_names() for setting in method(name).settings]
FIELDS, DENSE = ["f0", "f1", "f2"], ["d0"]
#: Methods whose known heads also read what others make, or what is there once for all heads: what is new changes them.
MIXED = {
    "cross_stitch": "each head's layer reads those of all",
    "hmoe": "each head's score is a mean over those of all scenarios, or tasks",
    "ple": "a gate of the shared experts weighs the experts of all heads",
}
#: With more tasks.
MIXED_TASKS = MIXED | {"pepnet": "one gate makes the weights of all tasks, in a layout of its own"}


def build(name, setting, tasks, scenarios, fields=FIELDS, dense=DENSE, seed=0, use_bn=False):
    named = tuple(Task(name=task, implied_by_next=True) for task in tasks)
    spec = ModelSpec(setting, named, max(len(scenarios), 1), dict.fromkeys(fields, 4), len(dense), seed)
    known = {key: value for key, value in TINY.items() if key in method(name).Config.model_fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = method(name)(spec, method(name).Config(**known, use_bn=use_bn))
    network.eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.05)
    return network, Known.of(network, scenarios if len(scenarios) > 1 else [], dense)


def take(new, old):
    """Copy by name; what is not taken as a whole."""
    (network, mine), (other, theirs) = new, old
    state, source, left = network.state_dict(), other.state_dict(), {}
    plans = layouts(network)
    for name, value in state.items():
        plan = taken(plans[name], value.shape, source[name].shape, mine, theirs) if name in source else None
        if plan is not None and not plan.why_not:
            plan.copy(source[name], value)
        if plan is None or not plan.whole or plan.why_not:
            left[name] = "absent" if plan is None else plan.why_not
    return left


def scores(network, columns, scenario, tasks):
    """Logits of the tasks by name, of rows with these columns of the input; others are 0."""
    (net, known) = network
    x = torch.zeros(len(scenario), len(known.inputs))
    for place, column in enumerate(known.inputs):
        if column in columns:
            x[:, place] = columns[column]
    ids = torch.tensor([known.scenarios.index(name) for name in scenario])
    spec = net.spec
    fields = dict(zip(spec.fields, x.split([*spec.fields.values(), spec.num_dense], 1), strict=False))
    if net.branches:
        x = x.unsqueeze(1).expand(-1, len(net.branches), -1)
        fields = {name: value.unsqueeze(1).expand(-1, len(net.branches), -1) for name, value in fields.items()}
    with torch.no_grad():
        noise = torch.full((net.num_noise,), 0.5) if net.num_noise else None
        logits = net(x, fields, ids, noise=noise).logits
    names = [task.name for task in spec.tasks]
    return logits[:, [names.index(task) for task in tasks]]


def columns_of(known, rows):
    generator = torch.Generator().manual_seed(9)
    return {column: torch.rand(rows, generator=generator) for column in known.inputs}


def tasks_of(setting):
    return [f"t{number}" for number in range(SHAPES[setting][0])]


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize(("name", "setting"), CASES)
def test_nothing_is_left_of_a_network_that_is_made_for_the_same(name, setting, use_bn):
    tasks, scenarios = tasks_of(setting), SHAPES[setting][1]
    old, new = (build(name, setting, tasks, scenarios, seed=seed, use_bn=use_bn) for seed in (1, 2))
    assert take(new, old) == {}
    for key, value in new[0].state_dict().items():
        assert torch.equal(value, old[0].state_dict()[key])


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize(("name", "setting"), CASES)
def test_known_heads_say_the_same_among_more_in_another_order(name, setting, use_bn):
    """More tasks and scenarios, in another order where the method has no chain."""
    tasks, scenarios = tasks_of(setting), SHAPES[setting][1]
    old = build(name, setting, tasks, scenarios, seed=1, use_bn=use_bn)
    more_tasks, more_scenarios = tasks, scenarios
    if setting is not Setting.MSL and name not in MIXED_TASKS and name != "escm2":
        more_tasks = [*tasks, "new"] if old[0].chain else ["new", *reversed(tasks)]
    if setting is not Setting.MTL and name not in MIXED:
        more_scenarios = [scenarios[2], "new", *scenarios[:2]]
    new = build(name, setting, more_tasks, more_scenarios, seed=2, use_bn=use_bn)
    take(new, old)
    scenario = [scenarios[row % len(scenarios)] for row in range(12)]
    columns = columns_of(old[1], 12)
    expected, found = (scores(of, columns, scenario, tasks) for of in (old, new))
    torch.testing.assert_close(found, expected)
    if more_tasks != tasks or more_scenarios != scenarios:
        fresh = build(name, setting, more_tasks, more_scenarios, seed=2, use_bn=use_bn)
        assert not torch.allclose(scores(fresh, columns, scenario, tasks), expected)


@pytest.mark.parametrize("name", ["shared_bottom", "mmoe", "mlp", "single_task", "ple", "cross_stitch", "snr"])
def test_columns_of_known_fields_keep_their_weights_where_fields_come_go_and_move(name):
    old = build(name, Setting.MTL, ["t0", "t1"], [""], ["f0", "f1", "f2"], ["d0", "d1"], seed=1)
    new = build(name, Setting.MTL, ["t0", "t1"], [""], ["f2", "g", "f0"], ["d1", "e"], seed=2)
    take(new, old)
    both = {column: value for column, value in columns_of(old[1], 8).items() if column in new[1].inputs}
    assert len(both) == 9
    scenario = [""] * 8
    expected, found = (scores(of, both, scenario, ["t0", "t1"]) for of in (old, new))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", sorted({*MIXED_TASKS, "escm2"}))
def test_what_has_no_slices_is_left_fresh_and_said(name):
    tasks = ["t0", "t1"]
    old = build(name, Setting.MTL, tasks, [""], seed=1)
    new = build(name, Setting.MTL, ["new", "t1"] if name == "escm2" else [*tasks, "new"], [""], seed=2)
    before = {key: value.clone() for key, value in new[0].state_dict().items()}
    left = take(new, old)
    said = {key: why for key, why in left.items() if why}
    if name in ("ple", "pepnet", "escm2"):
        assert said
    for key in said:
        assert torch.equal(new[0].state_dict()[key], before[key]), key
    words = {"escm2": "it stands for tasks by their order", "ple": "tasks that differ", "pepnet": "tasks that differ"}
    assert all(words.get(name, "") in why for why in said.values()), said


def test_a_head_of_the_same_name_and_another_kind_is_a_new_one():
    old = build("shared_bottom", Setting.MTL, ["t0", "t1"], [""], seed=1)
    spec = old[0].spec
    tasks = (spec.tasks[0], Task(name="t1", kind="regression"))
    network = type(old[0])(ModelSpec(spec.setting, tasks, 1, spec.fields, spec.num_dense), old[0].config)
    before = network.towers.weight.detach().clone()
    assert take((network, Known.of(network, [], DENSE)), old).keys() == {key for key in network.state_dict() if "tower" in key}
    assert torch.equal(network.towers.weight[0], old[0].towers.weight[0])
    assert torch.equal(network.towers.weight[1], before[1])
