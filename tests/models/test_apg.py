"""APG against loops over rows and layers, a plain low-rank network, a dense layer, and its own folded form."""

from __future__ import annotations

import copy

import pytest
import torch

from mmlrec.errors import ConfigError
from mmlrec.layers.scenario import Dispatch
from mmlrec.models.base.model import ModelSpec
from mmlrec.registry import method
from tests.models.support import assert_gradients_are_slopes, build, make_data, make_spec, step

F64 = torch.float64
ACTIVATIONS = {None: lambda x: x, "relu": lambda x: x.clamp(min=0), "tanh": torch.tanh}
SHAPES = [(2, 1), (3, 1), (1, 2), (1, 6), (2, 2), (3, 4)]
CONDITIONS = ["group", "mix", "self"]
CASES = [(*shape, condition) for shape in SHAPES for condition in CONDITIONS[shape[1] == 1 :]]


def disturb(net, size=0.3, seed=3):
    """Weights far from the start, where cores are the identity and biases zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(size * torch.randn(parameter.shape, dtype=F64, generator=generator))
    return net


def product(factor):
    result = factor.parts[0]
    for part in list(factor.parts)[1:]:
        result = result @ part
    return result


def reference(net, x, fields, scenario):
    """All heads of one row: x [d_in], fields name -> [D_f]."""
    inner_act, act = ACTIVATIONS[net.config.inner_activation], ACTIVATIONS[net.config.activation]
    h = x
    for layer in net.layers:
        if net.condition == "group":
            c = net.scenario_embedding.weight[scenario]
        elif net.condition == "mix":
            c = torch.cat([fields[name] for name in net.config.condition_fields])
        else:
            c = h
        k = len(layer.v_bias)
        r = inner_act(h @ product(layer.v) + layer.v_bias)
        core, bias = layer.core.clone(), layer.core_bias.clone()
        for weight, by_core, by_bias in zip(c, layer.core_weight, layer.core_bias_weight, strict=True):
            core, bias = core + weight * by_core, bias + weight * by_bias
        t = [sum(r[row] * core[row * k + column] for row in range(k)) + bias[column] for column in range(k)]
        h = act(inner_act(torch.stack(t)) @ product(layer.u) + layer.u_bias)
    return torch.stack([h @ weight[:, 0] + bias for weight, bias in zip(net.heads.weight, net.heads.bias, strict=True)])


@pytest.mark.parametrize(("tasks", "scenarios", "condition"), CASES)
@pytest.mark.parametrize(
    "options",
    [
        {"dnn_hidden_units": [13, 7], "mf_k": 2},
        {"dnn_hidden_units": [5, 13, 7], "mf_k": 1, "inner_activation": "tanh", "apg_overparam": True},
        {"apg_overparam": True, "apg_p": 3, "inner_activation": "relu"},
    ],
)
def test_equals_a_loop_over_rows_and_layers(tasks, scenarios, condition, options):
    spec = make_spec(tasks, scenarios, fields=3, dim=4, num_dense=3, seed=tasks)
    options = {"condition": condition, "condition_fields": ["f2", "f0"], **options}
    net = disturb(build("apg", spec, **options).double())
    data = make_data(net, 9, dtype=F64)
    rows = zip(range(9), data.x, data.scenario, strict=True)
    expected = torch.stack([reference(net, x, {n: f[b] for n, f in data.fields.items()}, s) for b, x, s in rows])
    got = net(data.x, data.fields, data.scenario, return_all_heads=True)
    torch.testing.assert_close(got.all_logits, expected, rtol=1e-6, atol=1e-6)
    own = expected.gather(1, torch.arange(tasks) * scenarios + data.scenario.view(-1, 1))
    torch.testing.assert_close(net(data.x, data.fields, data.scenario).logits, own, rtol=1e-6, atol=1e-6)
    net.float()
    fields = {name: field.float() for name, field in data.fields.items()}
    logits = net(data.x.float(), fields, data.scenario).logits
    torch.testing.assert_close(logits.to(F64), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tasks", "scenarios", "condition"), [case for case in CASES if case[:2] in [(2, 1), (1, 2), (2, 2)]])
def test_gradients_equal_finite_differences(tasks, scenarios, condition):
    options = {"condition": condition, "activation": "tanh", "apg_overparam": True, "inner_activation": "tanh"}
    net = disturb(build("apg", make_spec(tasks, scenarios), **options).double())
    data = make_data(net, 6, dtype=F64)
    assert_gradients_are_slopes(net, data)


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 2), (2, 3)])
def test_parameter_counts(tasks, scenarios):
    """Of the specification, for two heads; the vectors that the network owns for scenarios are not counted there."""
    tiny = build("apg", make_spec(tasks, scenarios))
    assert parameters(tiny) - owned(tiny) == 164 + 7 * (tasks * scenarios - 2)
    assert owned(tiny) == (4 * scenarios if scenarios > 1 else 0)
    large = method("apg")(make_spec(tasks, scenarios, fields=7, dim=8, num_dense=0), config(condition_fields=["f0"]))
    assert parameters(large) - owned(large) == 28_738 + 129 * (tasks * scenarios - 2)


def test_parameter_count_of_products():
    """V [14, 14] and [14, 2], U [2, 14] and [14, 8] in the first layer; [8, 8], [8, 2], [2, 8], [8, 6] in the second."""
    more = (14 * 14 + 14 * 2 + 2 * 14 + 14 * 8) - (14 * 2 + 2 * 8) + (8 * 8 + 8 * 2 + 2 * 8 + 8 * 6) - (8 * 2 + 2 * 6)
    assert parameters(build("apg", make_spec(), apg_overparam=True)) == 164 + more


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def owned(net):
    return sum(p.numel() for key, p in net.named_parameters() if key.startswith("scenario_embedding."))


def config(**options):
    return method("apg").Config(**options)


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 3), (2, 3)])
def test_without_generated_parts_it_is_a_low_rank_mlp(tasks, scenarios):
    net = disturb(build("apg", make_spec(tasks, scenarios)).double())
    with torch.no_grad():
        for layer in net.layers:
            layer.core_weight.zero_()
            layer.core_bias_weight.zero_()
    data = make_data(net, 20, dtype=F64)
    h = data.x
    for layer in net.layers:
        k = len(layer.v_bias)
        weight = layer.v() @ layer.core.view(k, k) @ layer.u()
        bias = (layer.v_bias @ layer.core.view(k, k) + layer.core_bias) @ layer.u() + layer.u_bias
        assert torch.linalg.matrix_rank(weight) == k
        h = torch.relu(h @ weight + bias)
    expected = h @ net.heads.weight[:, :, 0].t() + net.heads.bias
    got = net(data.x, data.fields, data.scenario, return_all_heads=True).all_logits
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_full_rank_with_identity_cores_is_an_mlp():
    """V U = W exactly, with k = min(i, o): V = W and U = I where o is the smaller, V = I and U = W where i is."""
    units = [13, 5, 7]
    net = build("apg", make_spec(), dnn_hidden_units=units, mf_k=1).double()
    mlp = build("mlp", make_spec(), dnn_hidden_units=units, per_head_output=True).double()
    with torch.no_grad():
        for layer, weight, bias in zip(net.layers, mlp.trunk.weights, mlp.trunk.biases, strict=True):
            i, o = weight.shape
            eye = torch.eye(min(i, o), dtype=F64)
            layer.v.parts[0].copy_(eye if i <= o else weight)
            layer.u.parts[0].copy_(weight if i <= o else eye)
            layer.u_bias.copy_(bias.normal_())
            layer.core_weight.zero_()
            layer.core_bias_weight.zero_()
        net.heads.load_state_dict(mlp.outputs.state_dict())
    data = make_data(net, 20, dtype=F64)
    expected = mlp(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(net(data.x, data.fields, data.scenario).logits, expected, rtol=1e-12, atol=1e-12)


def test_starts_as_a_plain_low_rank_network():
    """At tables' initial scale the generated parts are 1e-4 of the core."""
    net = build("apg", make_spec(2, 3))
    for layer in net.layers:
        k = len(layer.v_bias)
        core = torch.addmm(layer.core, net.scenario_embedding.weight, layer.core_weight).view(-1, k, k)
        torch.testing.assert_close(core, torch.eye(k).expand(3, k, k), rtol=0, atol=2e-3)


@pytest.mark.parametrize("condition", ["group", "mix"])
def test_rows_differ_by_their_condition_only(condition):
    net = disturb(build("apg", make_spec(1, 3), condition=condition).double())
    data = make_data(net, 3, dtype=F64)
    data.x[:] = data.x[:1].clone()
    data.fields["f0"] = torch.randn(3, 4, dtype=F64)
    data.fields["f0"][2] = data.fields["f0"][0]
    data.scenario[:] = torch.tensor([0, 1, 0])
    with torch.no_grad():  # One head for all, so that only the trunk can tell rows apart.
        for parameter in (net.heads.weight, net.heads.bias):
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
    logits = net(data.x, data.fields, data.scenario).logits[:, 0]
    assert logits[0] == logits[2]
    assert (logits[0] - logits[1]).abs() > 1e-3


@pytest.mark.parametrize("scenarios", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_core_for_each_scenario_equals_a_core_for_each_row(scenarios, dtype):
    spec = make_spec(2, scenarios)
    group = disturb(build("apg", spec, condition="group").double())
    mix = build("apg", spec, condition="mix").double()
    mix.load_state_dict({key: value for key, value in group.state_dict().items() if key != "scenario_embedding.weight"})
    group, mix = group.to(dtype), mix.to(dtype)
    data = make_data(group, 50, dtype=dtype)
    fields = {"f0": group.scenario_embedding(data.scenario)}
    tolerance = {torch.float32: 1e-5, F64: 1e-12}[dtype]
    one = group(data.x, data.fields, data.scenario).logits
    two = mix(data.x, fields, data.scenario).logits
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    wanted = [group.scenario_embedding.weight]
    (direct,), (by_row,) = (torch.autograd.grad(z.square().mean(), wanted) for z in (one, two))
    torch.testing.assert_close(direct, by_row, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("scenarios", [2, 5])
def test_only_one_core_for_each_scenario_is_made(scenarios, monkeypatch):
    seen = []
    plain = Dispatch.linear

    def noted(self, x, weight, bias):
        seen.append(tuple(weight.shape))
        return plain(self, x, weight, bias)

    monkeypatch.setattr(Dispatch, "linear", noted)
    net = build("apg", make_spec(1, scenarios))
    data = make_data(net, 40)
    net(data.x, data.fields, data.scenario)
    assert seen == [(scenarios, 2, 2)] * 2


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (2, 5)])
@pytest.mark.parametrize("options", [{"apg_p": 3}, {"dnn_hidden_units": [13, 7], "mf_k": 3}])
def test_folded_equals_the_trained_network_and_is_as_small_as_a_plain_one(use_bn, tasks, scenarios, options):
    spec = make_spec(tasks, scenarios)
    net = disturb(build("apg", spec, apg_overparam=True, use_bn=use_bn, **options).double())
    data = make_data(net, 30, dtype=F64)
    step(net, data)
    before = copy.deepcopy(net.eval().state_dict())
    folded = net.folded()
    expected = net(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(folded(data.x, data.fields, data.scenario).logits, expected, rtol=1e-12, atol=1e-12)
    sizes = {key: value for key, value in options.items() if key != "apg_p"}
    assert parameters(folded) == parameters(build("apg", spec, use_bn=use_bn, **sizes)) < parameters(net)
    assert not folded.training
    assert not folded.config.apg_overparam
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert type(folded)(spec, folded.config).load_state_dict(folded.state_dict())


@pytest.mark.parametrize("detach", [False, True])
def test_condition_fields_learn_through_the_generator_unless_detached(detach):
    net = disturb(build("apg", make_spec(), detach_condition=detach).double())
    data = make_data(net, 12, dtype=F64)
    data.fields["f0"] = torch.randn(12, 4, dtype=F64, requires_grad=True)  # Not part of x.
    logits = net(data.x, data.fields, data.scenario).logits.sum()
    (gradient,) = torch.autograd.grad(logits, data.fields["f0"], allow_unused=True)
    assert (gradient is None) == detach
    assert detach or (gradient != 0).any()


@pytest.mark.parametrize("detach", [False, True])
def test_a_layers_input_learns_through_its_own_core_unless_detached(detach):
    net = disturb(build("apg", make_spec(), condition="self", dnn_hidden_units=[6], detach_condition=detach).double())
    data = make_data(net, 12, dtype=F64)
    x = data.x.clone().requires_grad_()

    def gradient(condition):
        return torch.autograd.grad(net.heads(net.layers[0](x, condition, None, None)).sum(), x)[0]

    held, along = gradient(data.x), gradient(x)
    assert not torch.allclose(held, along)
    (got,) = torch.autograd.grad(net(x, {}, data.scenario).logits.sum(), x)
    torch.testing.assert_close(got, held if detach else along, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tasks", "scenarios"), [(1, 4), (2, 3)])
def test_relabelling_scenarios_with_their_parameters_changes_nothing(tasks, scenarios):
    net = disturb(build("apg", make_spec(tasks, scenarios)).double())
    data = make_data(net, 30, dtype=F64)
    expected = net(data.x, data.fields, data.scenario).logits
    new_id = torch.tensor([2, 0, 1, 3])[:scenarios]
    with torch.no_grad():
        for parameter in (net.scenario_embedding.weight, net.heads.weight, net.heads.bias):
            by_scenario = parameter.view(-1, scenarios, parameter[0].numel())
            parameter.copy_(by_scenario[:, new_id.argsort()].reshape(parameter.shape))
    moved = net(data.x, data.fields, new_id[data.scenario]).logits
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_the_condition_that_is_used_when_none_is_named():
    assert build("apg", make_spec(1, 2)).condition == "group"
    assert build("apg", make_spec(2, 3)).condition == "group"
    assert build("apg", make_spec(2, 1)).condition == "mix"


def test_one_scenario_is_accepted():
    spec = ModelSpec("msl", make_spec(1).tasks, 1, {"f0": 4, "f1": 4}, 0)
    net = build("apg", spec, condition_fields=[])
    data = make_data(net, 5)
    assert net(data.x, data.fields, data.scenario).logits.shape == (5, 1)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 1), {"condition_fields": []}, r"setting 'mtl'.*model\.condition_fields \(fields: f0, f1, f2\).*condition=self"),
        ((2, 3), {"condition": "mix", "condition_fields": []}, r"model\.condition_fields"),
        ((2, 1), {"condition": "group"}, r"model\.condition: 'group' needs scenarios.*'mix' or 'self'"),
        ((2, 1), {"condition_fields": ["f9"]}, r"model\.condition_fields: no field 'f9'.*f0, f1, f2"),
        ((1, 2), {"detach_condition": True}, r"model\.detach_condition.*'group'"),
    ],
)
def test_refusals(shape, options, message):
    with pytest.raises(ConfigError, match=message):
        build("apg", make_spec(*shape), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"apg_p": 4}, "apg_overparam"),
        ({"mf_k": 0}, "mf_k"),
        ({"dnn_hidden_units": []}, "dnn_hidden_units"),
        ({"condition": "scenario"}, "group"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
