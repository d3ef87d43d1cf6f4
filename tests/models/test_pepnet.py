"""PEPNet against loops over rows, towers and layers, per-task MLPs, and gradients with what gates read held fast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmlrec.errors import ConfigError
from mmlrec.losses import LossOptions
from mmlrec.models.base.model import ModelSpec
from mmlrec.models.pepnet import _GateUnits
from mmlrec.registry import method
from tests.models.support import Data, build, make_data, make_spec, step

F64 = torch.float64
SHAPES = [(2, 1), (3, 1), (1, 2), (1, 6), (2, 2), (3, 4)]
SCENARIO_SHAPES = [shape for shape in SHAPES if shape[1] > 1]


def disturb(net, size=0.3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(size * torch.randn(parameter.shape, dtype=F64, generator=generator))
    return net


def gate_unit(v: Tensor, units: _GateUnits, index: int, gamma: float) -> Tensor:
    """One gate unit for one row, from its own columns of the joint first layer."""
    start = sum(units.hidden[:index])
    columns = range(start, start + units.hidden[index])
    hidden = torch.stack([v @ units.weight[:, column] + units.bias[column] for column in columns]).clamp(min=0)
    out = hidden @ units.out_weights[index] + units.out_biases[index]
    return gamma / (1 + torch.exp(-out))


def reference(net, row: Data, held: Data | None = None) -> Tensor:
    """All heads of one row. What the gates read of x is `held`'s, when it is given: a constant."""
    config, spec = net.config, net.spec
    own_vectors = net.scenario_embedding is not None
    scenario = [net.scenario_embedding.weight[row.scenario]] if own_vectors else [row.fields[n] for n in config.scenario_fields]
    x, held_x = row.x, row.x if held is None else held.x
    x_ep = x
    if net.epnet is not None:
        x_ep = gate_unit(torch.cat([*scenario, held_x]), net.epnet, 0, config.gate_gamma) * x
    held_ep = x_ep if held is None else held.fields["x_ep"]
    priors = [row.fields[name] for name in config.prior_fields]
    towers = spec.num_tasks if config.head_scope == "per_task" else spec.num_heads
    logits = []
    for tower in range(towers):
        h = x_ep
        for layer, (weight, bias) in enumerate(zip(net.networks.weights, net.networks.biases, strict=True)):
            h = torch.clamp(h @ weight[tower] + bias[tower], min=0)
            if net.ppnet is not None:
                gate = gate_unit(torch.cat([*priors, held_ep]), net.ppnet, layer, config.gate_gamma)
                width = len(h)
                h = h * gate[tower * width : (tower + 1) * width]
        logits.append(h @ net.outputs.weight[tower, :, 0] + net.outputs.bias[tower])
    repeats = spec.num_heads // towers
    return torch.stack([logit for logit in logits for _ in range(repeats)])


def rows_of(data: Data) -> list[Data]:
    return [data.rows(b) for b in range(len(data.x))]


@pytest.mark.parametrize(("tasks", "scenarios"), SHAPES)
@pytest.mark.parametrize("head_scope", ["per_task", "per_head"])
@pytest.mark.parametrize(
    "options",
    [
        {"dnn_hidden_units": [13, 7], "epnet_hidden": 5},
        {"scenario_fields": ["f2", "f0"], "prior_fields": ["f1"], "ppnet_gate_hidden": 5, "gate_gamma": 3.0},
        {"use_epnet": False, "dnn_hidden_units": [7]},
        {"use_ppnet": False, "scenario_fields": ["f1"], "dnn_hidden_units": [5, 13, 7]},
    ],
)
def test_equals_a_loop_over_rows_towers_and_layers(tasks, scenarios, head_scope, options):
    spec = make_spec(tasks, scenarios, fields=3, dim=4, num_dense=3, seed=tasks)
    net = disturb(build("pepnet", spec, head_scope=head_scope, **options).double())
    data = make_data(net, 9, dtype=F64)
    expected = torch.stack([reference(net, row) for row in rows_of(data)])
    got = net(data.x, data.fields, data.scenario, return_all_heads=True)
    torch.testing.assert_close(got.all_logits, expected, rtol=1e-6, atol=1e-6)
    own = expected.gather(1, torch.arange(tasks) * scenarios + data.scenario.view(-1, 1))
    torch.testing.assert_close(net(data.x, data.fields, data.scenario).logits, own, rtol=1e-6, atol=1e-6)
    net.float()
    fields = {name: field.float() for name, field in data.fields.items()}
    logits = net(data.x.float(), fields, data.scenario).logits
    torch.testing.assert_close(logits.to(F64), own, rtol=1e-5, atol=1e-5)


def held_fast(net, data: Data) -> list[Data]:
    """Of each row what gates read of x and of x_ep, as it is now."""
    held = []
    with torch.no_grad():
        vectors = None if net.scenario_embedding is None else net.scenario_embedding(data.scenario)
        for b, row in enumerate(rows_of(data)):
            scenario = [vectors[b]] if vectors is not None else [row.fields[name] for name in net.config.scenario_fields]
            x_ep = row.x.clone()
            if net.epnet is not None:
                x_ep = gate_unit(torch.cat([*scenario, row.x]), net.epnet, 0, net.config.gate_gamma) * row.x
            held.append(Data(row.x.clone(), {"x_ep": x_ep}, *[row.scenario] * 4))
    return held


def total(net, logits, data):
    """Loss of given logits of all heads."""
    net_loss = net.make_loss(LossOptions())
    targets = (data.labels, data.mask, data.scenario, data.weight)
    output = net.select(logits, data.scenario, False)
    return sum(net_loss(output, *targets, net_loss.denominators(*targets)).values())


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("head_scope", ["per_task", "per_head"])
def test_gradients_equal_finite_differences_with_what_gates_read_held_fast(tasks, scenarios, head_scope):
    options = {"scenario_fields": ["f0"] if scenarios == 1 else [], "head_scope": head_scope}
    net = disturb(build("pepnet", make_spec(tasks, scenarios), **options).double())
    data = make_data(net, 5, dtype=F64)
    _, gradients = step(net, data)
    held = held_fast(net, data)
    for key, parameter in net.named_parameters():
        direction = torch.randn(parameter.shape, dtype=F64, generator=torch.Generator().manual_seed(7))
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(sign * 1e-6 * direction)
                logits = torch.stack([reference(net, row, h) for row, h in zip(rows_of(data), held, strict=True)])
                values.append(total(net, logits, data))
                parameter.sub_(sign * 1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((gradients[key] * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=key)


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 2), (2, 3)])
def test_x_and_fields_learn_as_the_detach_rules_say(tasks, scenarios):
    """x through the towers only; prior and scenario fields, here no parts of x, through the gates only."""
    net = disturb(build("pepnet", make_spec(tasks, scenarios), scenario_fields=["f0"]).double())
    data = make_data(net, 5, dtype=F64)
    generator = torch.Generator().manual_seed(2)
    data.fields = {name: torch.randn(5, 4, dtype=F64, generator=generator) for name in data.fields}
    held = held_fast(net, data)

    def by_reference(x: Tensor, fields: dict[str, Tensor]) -> Tensor:
        moved = Data(x, fields, data.scenario, data.labels, data.mask, data.weight)
        return torch.stack([reference(net, row, h) for row, h in zip(rows_of(moved), held, strict=True)]).sum()

    leaves = {"x": data.x.clone().requires_grad_()}
    leaves |= {name: field.clone().requires_grad_() for name, field in data.fields.items()}
    fields = {name: leaf for name, leaf in leaves.items() if name != "x"}
    output = net(leaves["x"], fields, data.scenario, return_all_heads=True)
    gradients = dict(zip(leaves, torch.autograd.grad(output.all_logits.sum(), list(leaves.values())), strict=True))
    for name in leaves:
        direction = torch.randn(leaves[name].shape, dtype=F64, generator=generator)
        values = []
        for sign in (1, -1):
            now = {key: leaf.detach() for key, leaf in leaves.items()}
            now[name] = now[name] + sign * 1e-6 * direction
            values.append(by_reference(now.pop("x"), now))
        slope = (values[0] - values[1]) / 2e-6
        assert slope.abs() > 1e-3
        torch.testing.assert_close((gradients[name] * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize(("part", "field"), [("epnet", "f0"), ("ppnet", "f1")])
def test_a_field_outside_x_learns_through_its_gate_only(part, field):
    net = disturb(build("pepnet", make_spec(), scenario_fields=["f0"]).double())
    data = make_data(net, 8, dtype=F64)
    leaf = data.fields[field] = torch.randn(8, 4, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(data.x, data.fields, data.scenario).logits.sum(), leaf)
    assert (gradient != 0).any()
    with torch.no_grad():
        for weight in getattr(net, part).out_weights:
            weight.zero_()
    (gradient,) = torch.autograd.grad(net(data.x, data.fields, data.scenario).logits.sum(), leaf)
    assert (gradient == 0).all()


@pytest.mark.parametrize(("tasks", "scenarios"), SHAPES)
@pytest.mark.parametrize("head_scope", ["per_task", "per_head"])
def test_gates_that_start_at_one_leave_an_mlp_for_each_tower(tasks, scenarios, head_scope):
    options = {"scenario_fields": ["f0"] if scenarios == 1 else [], "head_scope": head_scope}
    net = build("pepnet", make_spec(tasks, scenarios), gate_zero_init=True, **options).double()
    data = make_data(net, 20, dtype=F64)
    gates = net.epnet(torch.randn(20, 18, dtype=F64)) + net.ppnet(torch.randn(20, 22, dtype=F64))
    assert all((gate == 1).all() for gate in gates)
    towers = []
    for u in range(net.towers):
        h = data.x
        for weight, bias in zip(net.networks.weights, net.networks.biases, strict=True):
            h = torch.relu(h @ weight[u] + bias[u])
        towers.append(h @ net.outputs.weight[u, :, 0] + net.outputs.bias[u])
    expected = torch.stack(towers, dim=1).repeat_interleave(net.spec.num_heads // net.towers, dim=1)
    got = net(data.x, data.fields, data.scenario, return_all_heads=True).all_logits
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # The gates are not stuck there.
    _, gradients = step(net, data)
    assert all((gradients[key] != 0).any() for key in gradients if ".out_weights." in key)


def test_worked_gate():
    config = method("pepnet").Config(gate_zero_init=True)
    units = _GateUnits(3, [5], [4], config, torch.Generator().manual_seed(0))
    assert torch.equal(units(torch.randn(7, 3))[0], torch.ones(7, 4))
    # One hidden unit relu(2 * 1 - 1) = 1, logit ln 3: 2 * 3 / 4.
    units = _GateUnits(1, [1], [1], method("pepnet").Config(), torch.Generator())
    with torch.no_grad():
        units.weight.fill_(2.0)
        units.bias.fill_(-1.0)
        units.out_weights[0].fill_(3.0).log_()
    torch.testing.assert_close(units(torch.ones(1, 1))[0], torch.tensor([[1.5]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
def test_gates_lie_between_zero_and_gamma(gamma):
    config = method("pepnet").Config(gate_gamma=gamma)
    units = _GateUnits(5, [13, 7], [7, 3], config, torch.Generator().manual_seed(0)).double()
    gates = torch.cat(units(4 * torch.randn(200, 5, dtype=F64, generator=torch.Generator().manual_seed(1))), dim=1)
    assert (gates > 0).all()
    assert (gates < gamma).all()
    assert gates.min() < 0.05 * gamma
    assert gates.max() > 0.95 * gamma


@pytest.mark.parametrize(("tasks", "scenarios"), SCENARIO_SHAPES)
def test_without_epnet_towers_of_tasks_do_not_see_the_scenario(tasks, scenarios):
    net = disturb(build("pepnet", make_spec(tasks, scenarios), use_epnet=False).double())
    data = make_data(net, 30, dtype=F64)
    one = net(data.x, data.fields, data.scenario)
    other = net(data.x, data.fields, (data.scenario + 1) % scenarios)
    assert torch.equal(one.logits, other.logits)
    with_epnet = disturb(build("pepnet", make_spec(tasks, scenarios)).double())
    one, other = (with_epnet(data.x, data.fields, s).logits for s in (data.scenario, (data.scenario + 1) % scenarios))
    assert (one != other).any(dim=0).all()


@pytest.mark.parametrize(("tasks", "scenarios"), SCENARIO_SHAPES)
@pytest.mark.parametrize("head_scope", ["per_task", "per_head"])
def test_who_owns_what(tasks, scenarios, head_scope):
    """Rows and labels of one head train its own tower and its scenario's vector, and no others."""
    net = disturb(build("pepnet", make_spec(tasks, scenarios), head_scope=head_scope).double())
    data = make_data(net, 64, dtype=F64)
    task, scenario = tasks - 1, 1
    alone = data.rows(data.scenario == scenario)
    alone.mask = torch.zeros_like(alone.mask)
    alone.mask[:, task] = 1
    _, gradients = step(net, alone)
    for key, gradient in gradients.items():
        owner = net.owner(key)
        expected = "scenario" if "scenario_embedding" in key else {"per_task": "task", "per_head": "head"}[head_scope]
        assert owner == (None if key.startswith(("epnet", "ppnet")) else expected)
        if owner is not None:
            mine = {"scenario": scenario, "task": task, "head": task * scenarios + scenario}[owner]
            trained = (gradient != 0).reshape(len(gradient), -1).any(dim=1)
            assert trained.nonzero().flatten().tolist() == [mine], key


def parameters(net):
    return sum(p.numel() for key, p in net.named_parameters() if not key.startswith("scenario_embedding."))


def test_parameter_counts():
    """Of the specification: two towers, a scenario field of width 4 (8), prior fields of width 8 (16)."""
    tiny = 1_910
    assert parameters(build("pepnet", make_spec(2), scenario_fields=["f0"])) == tiny
    # The vectors that the network owns are not counted there; by their width they are the field's.
    net = build("pepnet", make_spec(1, 2), head_scope="per_head")
    assert parameters(net) == tiny
    assert sum(p.numel() for p in net.parameters()) == tiny + 2 * 4
    assert parameters(build("pepnet", make_spec(2, 3))) == tiny
    assert parameters(build("pepnet", make_spec(2))) == tiny - 476
    assert parameters(build("pepnet", make_spec(2), scenario_fields=["f0"], use_ppnet=False)) == tiny - 640 - 432
    large = method("pepnet").Config(epnet_hidden=56, scenario_fields=["f0"], prior_fields=["f1", "f2"])
    assert parameters(method("pepnet")(make_spec(fields=7, dim=8, num_dense=0), large)) == 486_578


def test_first_layers_of_all_gates_are_one_parameter():
    net = build("pepnet", make_spec(3))
    assert net.ppnet.weight.shape == (14 + 8, 3 * (8 + 6))
    assert build("pepnet", make_spec(3), ppnet_gate_hidden=5).ppnet.weight.shape == (14 + 8, 2 * 5)


def test_epnet_is_on_where_something_drives_it():
    assert build("pepnet", make_spec(2)).epnet is None
    assert build("pepnet", make_spec(2), scenario_fields=["f0"]).epnet is not None
    assert build("pepnet", make_spec(2), scenario_fields=["f0"], use_epnet=False).epnet is None
    own = build("pepnet", make_spec(2, 3))
    assert own.scenario_embedding.weight.shape == (3, 4)
    assert build("pepnet", make_spec(2, 3), scenario_fields=["f0"]).scenario_embedding is None
    one = build("pepnet", ModelSpec("msl", make_spec(1).tasks, 1, make_spec().fields, 0))
    data = make_data(one, 5)
    assert one(data.x, data.fields, data.scenario).logits.shape == (5, 1)


@pytest.mark.parametrize("use_ppnet", [False, True])
@pytest.mark.parametrize("head_scope", ["per_task", "per_head"])
def test_normalisation_by_towers(use_ppnet, head_scope):
    """Towers of tasks take statistics over all rows; towers of heads over rows of their scenario."""
    net = disturb(build("pepnet", make_spec(2, 2), use_bn=True, use_ppnet=use_ppnet, head_scope=head_scope).double())
    data = make_data(net, 30, dtype=F64)
    norm = net.networks.norms[0]
    norm.running_mean.zero_()
    x_ep = data.x * net.epnet(torch.cat([net.scenario_embedding(data.scenario), data.x], dim=1))[0]
    net(data.x, data.fields, data.scenario)
    means = norm.running_mean.view(net.towers, -1) / 0.1
    for u in range(net.towers):
        rows = slice(None) if head_scope == "per_task" else data.scenario == u % 2
        expected = (x_ep[rows] @ net.networks.weights[0][u] + net.networks.biases[0][u]).mean(dim=0)
        torch.testing.assert_close(means[u], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 1), {"use_epnet": True}, r"model\.use_epnet.*'mtl'.*model\.scenario_fields.*model\.use_epnet=false"),
        ((2, 1), {"use_ppnet": False}, r"model\.use_epnet.*'mtl'.*model\.scenario_fields.*model\.use_ppnet=true"),
        ((2, 1), {"scenario_fields": ["f9"]}, r"model\.scenario_fields: no field 'f9'.*f0, f1, f2"),
        ((1, 2), {"prior_fields": ["f9"]}, r"model\.prior_fields: no field 'f9'.*f0, f1, f2"),
    ],
)
def test_refusals(shape, options, message):
    with pytest.raises(ConfigError, match=message):
        build("pepnet", make_spec(*shape), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_epnet": False, "use_ppnet": False}, "must not both be false"),
        ({"gate_gamma": 0.0}, "gate_gamma"),
        ({"dnn_hidden_units": []}, "dnn_hidden_units"),
        ({"head_scope": "per_scenario"}, "per_head"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        method("pepnet").Config(**options)


def test_no_prior_fields_is_a_warning():
    with pytest.warns(UserWarning, match=r"model\.prior_fields is empty"):
        build("pepnet", make_spec(), prior_fields=[])
