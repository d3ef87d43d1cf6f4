"""STAR against a loop over rows, members and layers; its special cases, owners and refusals."""

from __future__ import annotations

import pytest
import torch

from mmlrec.errors import ConfigError
from mmlrec.layers.scenario import Dispatch
from mmlrec.models.base.model import ModelSpec
from mmlrec.registry import method
from mmlrec.schema import Setting
from tests.models.support import assert_gradients_are_slopes, build, make_data, make_spec, step

F64 = torch.float64
PLAIN = {"use_pn": False, "use_aux": False}
OPTIONS = [
    {},
    {"dnn_hidden_units": [13, 7], "scenario_fields": ["f1", "f0"], "aux_hidden_units": []},
    {"dnn_hidden_units": [], "use_aux": False},
    {"use_pn": False, "aux_hidden_units": [5, 3]},
    {"pn_min_count": 4, "pn_eps": 0.1, "activation": "tanh"},
]


def disturbed(net, seed=3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]:
            tensor.add_(0.4 * torch.rand(tensor.shape, dtype=tensor.dtype, generator=g) - 0.1)
    return net


def normalised(net, data, b):
    """x' of row b."""
    if net.norm is None:
        return data.x[b]
    norm, s = net.norm, data.scenario[b]
    rows = data.x[data.scenario == s]
    mean, var = norm.running_mean[s], norm.running_var[s]
    if net.training and len(rows) >= net.config.pn_min_count:
        mean, var = rows.mean(dim=0), rows.var(dim=0, unbiased=False)
    z = (data.x[b] - mean) / torch.sqrt(var + net.config.pn_eps)
    return norm.weight * norm.scenario_weight[s] * z + norm.bias + norm.scenario_bias[s]


def reference(net, data):
    """[B, H] logits, a row, a head and a layer at a time."""
    scenarios = net.spec.num_scenarios
    act = torch.tanh if net.config.activation == "tanh" else torch.relu
    logits = torch.zeros(len(data.x), net.spec.num_heads, dtype=F64)
    for b in range(len(data.x)):
        extra = 0.0
        if net.aux is not None:
            named = [data.fields[name][b] for name in net.config.scenario_fields]
            a = torch.cat([*(named or [net.scenario_embedding.weight[data.scenario[b]]]), data.x[b]])
            for weight, bias in zip(net.aux.hidden.weights, net.aux.hidden.biases, strict=True):
                a = act(a @ weight[0] + bias[0])
            extra = a @ net.aux.weight[0, :, 0] + net.aux.bias[0]
        for head in range(net.spec.num_heads):
            by_scenario = net.config.star_axis == "scenario"
            u, column = (head % scenarios, head // scenarios) if by_scenario else (head, 0)
            h = normalised(net, data, b)
            layers = list(zip(net.star.weights, net.star.own_weights, net.star.biases, net.star.own_biases, strict=True))
            for weight, own_weight, bias, own_bias in layers[:-1]:
                h = act(h @ (weight * own_weight[u]) + bias + own_bias[u])
            weight, own_weight, bias, own_bias = layers[-1]
            logits[b, head] = (h @ (weight * own_weight[u]) + bias + own_bias[u])[column] + extra
    return logits


def own(logits, data):
    index = torch.arange(data.labels.shape[1]) * (logits.shape[1] // data.labels.shape[1]) + data.scenario.view(-1, 1)
    return logits.gather(1, index)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("tasks", "scenarios", "axis"), [(2, 1, "task"), (3, 1, "head"), (1, 2, "head"), (1, 6, "scenario"),
                                                          (2, 2, "scenario"), (2, 3, "head"), (3, 4, "scenario")])  # fmt: skip
def test_equals_a_loop_over_rows_and_members(training, options, tasks, scenarios, axis):
    spec = make_spec(tasks, scenarios, fields=2, dim=4, num_dense=3, seed=tasks)
    if scenarios == 1:
        options = {key: value for key, value in options.items() if key not in ("use_pn", "use_aux")}
    net = disturbed(build("star", spec, star_axis=axis, **options).double()).train(training)
    data = make_data(net, 13, dtype=F64)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    expected = reference(net, data)
    every = net(data.x, data.fields, data.scenario, return_all_heads=True)
    torch.testing.assert_close(every.all_logits, expected, rtol=1e-6, atol=1e-6)
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 1e-5)):
        net.load_state_dict(before)
        fields = {name: value.to(dtype) for name, value in data.fields.items()}
        logits = net.to(dtype)(data.x.to(dtype), fields, data.scenario).logits
        torch.testing.assert_close(logits.to(F64), own(expected, data), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_running_statistics_move_by_the_momentum(momentum):
    net = build("star", make_spec(1, 2), **({} if momentum is None else {"pn_momentum": momentum}))
    data, later = make_data(net, 40), make_data(net, 40, seed=2)
    for _ in range(5):
        net(data.x, data.fields, data.scenario)
    net(later.x, later.fields, later.scenario)
    for s in range(2):
        rows, newest = data.x[data.scenario == s], later.x[later.scenario == s]
        weight = momentum or 1 / 6  # The sixth batch: 0.01 is below its share of the mean.
        expected = (torch.lerp(rows.mean(0), newest.mean(0), weight), torch.lerp(rows.var(0), newest.var(0), weight))
        torch.testing.assert_close((net.norm.running_mean[s], net.norm.running_var[s]), expected, rtol=1e-5, atol=1e-6)


def test_normalisation_centres_scenarios_and_does_not_amplify_embeddings():
    """Tables start at a deviation of 0.01 and learn at a rate that fits it: scaled up, each step of theirs would be, too."""
    net = build("star", make_spec(1, 2, dim=8))
    scenario = torch.arange(4000) % 2
    x = 0.01 * torch.randn(4000, net.spec.input_width) + torch.tensor([0.2, -0.1])[scenario].unsqueeze(1)
    normed = net.norm(x, scenario)
    for s in range(2):
        rows = normed[scenario == s]
        torch.testing.assert_close(rows.mean(dim=0), torch.zeros(net.spec.input_width), rtol=0, atol=1e-5)
        assert rows.std() < 0.011
    # After one batch, evaluation normalises as training does.
    torch.testing.assert_close(net.eval().norm(x, scenario), normed, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("tasks", "scenarios", "axis"), [(2, 1, "task"), (1, 3, "head"), (2, 3, "head"), (2, 3, "scenario")])
def test_gradients_equal_finite_differences(tasks, scenarios, axis):
    net = disturbed(build("star", make_spec(tasks, scenarios), star_axis=axis, activation="tanh").double())
    data = make_data(net, 12, dtype=F64)
    assert_gradients_are_slopes(net, data)


def size(net):
    """Parameters without embeddings: the network's own vectors of the scenarios are not counted, as tables are not."""
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("scenario_embedding."))


@pytest.mark.parametrize(("options", "tiny", "benchmark"), [({}, 708, 147_412), (PLAIN, 543, 142_851)])
def test_parameter_counts(options, tiny, benchmark):
    assert size(build("star", make_spec(1, 2), **options)) == tiny
    net = method("star")(make_spec(1, 2, fields=7, dim=8, num_dense=0), method("star").Config(**options))
    assert size(net) == benchmark
    if not options:
        assert net.scenario_embedding.weight.shape == (2, 8)


def test_in_mtl_there_is_neither_normalisation_nor_auxiliary_network():
    net = build("star", make_spec())
    assert size(net) == 543
    assert net.norm is None
    assert net.aux is None


@pytest.mark.parametrize(("tasks", "scenarios", "axis"), [(2, 1, "task"), (1, 3, "head"), (2, 3, "head"), (2, 3, "scenario")])
def test_without_normalisation_and_auxiliary_network_it_starts_as_mlp(tasks, scenarios, axis):
    spec = make_spec(tasks, scenarios)
    star = build("star", spec, star_axis=axis, **({} if scenarios == 1 else PLAIN))
    mlp = build("mlp", spec)
    with torch.no_grad():
        for ours, theirs in ((star.star.weights, mlp.trunk.weights), (star.star.biases, mlp.trunk.biases)):
            for mine, other in zip(ours[:-1], theirs, strict=True):
                other.copy_(mine)
        star.star.weights[-1].copy_(star.star.weights[-1][:, :1].clone().expand_as(star.star.weights[-1]))
        mlp.weight.copy_(star.star.weights[-1][:, :1])
        star.star.biases[-1].fill_(0.3)
        mlp.bias.fill_(0.3)
    data = make_data(star, 40)
    expected = mlp(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(star(data.x, data.fields, data.scenario).logits, expected, rtol=1e-5, atol=1e-6)


def test_both_dispatch_strategies_agree():
    net = disturbed(build("star", make_spec(2, 5), dnn_hidden_units=[13, 7]))
    x, scenario = torch.randn(33, 14), torch.arange(33) % 5
    one, two = (Dispatch(scenario, 5, grouped=grouped) for grouped in (False, True))
    dense, grouped = (d.restore(net.star(d.arrange(x), None, d)) for d in (one, two))
    torch.testing.assert_close(grouped, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tasks", "axis"), [(1, "head"), (1, "scenario"), (2, "head"), (2, "scenario")])
@pytest.mark.parametrize("use_bn", [False, True])
def test_a_scenario_without_rows_keeps_its_part(tasks, axis, use_bn):
    net = disturbed(build("star", make_spec(tasks, 3), star_axis=axis, use_bn=use_bn))
    data = make_data(net, 30)
    data.scenario = data.scenario % 2  # None in scenario 2.
    before = {key: value.clone() for key, value in net.named_buffers()}
    _, gradients = step(net, data)
    owned = [key for key in gradients if net.owner(key)]
    assert len(owned) == 3 + 3 + 3 + 4 * use_bn  # weights and biases of three layers; two of the norm, one vector; BatchNorm
    for key in owned:
        shared_by = 3 if net.owner(key) == "scenario" else tasks * 3
        by_scenario = gradients[key].reshape(-1, shared_by, gradients[key].numel() // (net.star.stack if "star" in key else 3))
        absent = torch.arange(shared_by) % 3 == 2
        assert (by_scenario[:, absent] == 0).all(), key
        assert (by_scenario[:, ~absent] != 0).any(), key
    for key in ("norm.running_mean", "norm.running_var"):
        after = net.get_buffer(key)
        assert torch.equal(after[2], before[key][2])
        assert (after[:2] != before[key][:2]).all()


@pytest.mark.parametrize("axis", ["head", "scenario"])
def test_members_belong_to_the_axis(axis):
    net = build("star", make_spec(2, 3), star_axis=axis)
    stack, columns = (3, 2) if axis == "scenario" else (6, 1)
    assert [tuple(p.shape) for p in net.star.own_weights] == [(stack, 14, 8), (stack, 8, 6), (stack, 6, columns)]
    assert net.norm.running_mean.shape == (3, 14)
    assert {net.owner(f"star.own_weights.{layer}") for layer in range(3)} == {axis}
    assert net.owner("norm.scenario_bias") == net.owner("scenario_embedding.weight") == "scenario"
    assert net.owner("star.weights.0") is net.owner("norm.weight") is net.owner("aux.bias") is None
    data = make_data(net, 60)
    data.mask[:, 1] = 0  # Task 0 trains.
    _, gradients = step(net, data)
    first = gradients["star.own_weights.0"]
    if axis == "head":
        assert (first[:3] != 0).any(dim=2).any(dim=1).all()
        assert (first[3:] == 0).all()
    else:
        assert (first != 0).any(dim=2).any(dim=1).all()
        assert (gradients["star.own_weights.2"][:, :, 1] == 0).all()


@pytest.mark.parametrize("axis", ["head", "scenario"])
@pytest.mark.parametrize("use_bn", [False, True])
def test_a_scenario_alone_gives_what_it_gives_among_others(axis, use_bn):
    """All statistics are of the row's own scenario; all but those of the auxiliary network, which is shared."""
    net = disturbed(build("star", make_spec(2, 3), star_axis=axis, use_bn=use_bn, use_aux=False).double())
    data = make_data(net, 30, dtype=F64)
    together = net(data.x, data.fields, data.scenario).logits
    for s in range(3):
        part = data.rows(data.scenario == s)
        alone = net(part.x, part.fields, part.scenario).logits
        torch.testing.assert_close(alone, together[data.scenario == s], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("axis", ["head", "scenario"])
def test_relabelling_scenarios_with_their_parameters_changes_nothing(axis):
    net = disturbed(build("star", make_spec(2, 3), star_axis=axis).double())
    data = make_data(net, 30, dtype=F64)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    expected = net(data.x, data.fields, data.scenario).logits
    new_id = torch.tensor([2, 0, 1])
    net.load_state_dict(state)
    for key, tensor in net.state_dict().items():
        if net.owner(key) or "running" in key:
            tensor.copy_(tensor.reshape(-1, 3, tensor[0].numel())[:, new_id.argsort()].reshape(tensor.shape))
    moved = net(data.x, data.fields, new_id[data.scenario]).logits
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_all_members_are_saved_and_trained():
    net = build("star", make_spec(1, 4))
    before = {key: value.clone() for key, value in net.state_dict().items() if ".own_" in key}
    assert {key: len(value) for key, value in before.items()} == {
        f"star.own_{kind}.{layer}": 4 for kind in ("weights", "biases") for layer in range(3)
    }
    step(net, make_data(net, 200))
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    for key, value in net.state_dict().items():
        if key in before:
            assert (value != before[key]).flatten(1).any(dim=1).all(), key


@pytest.mark.parametrize("axis", ["head", "scenario"])
def test_logits_are_float32_under_autocast(axis):
    net = build("star", make_spec(2, 4), star_axis=axis)
    data = make_data(net, 32)
    exact = net(data.x, data.fields, data.scenario).logits
    with torch.autocast("cpu", torch.bfloat16):
        for every in (False, True):
            logits = net(data.x, data.fields, data.scenario, return_all_heads=every).logits
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, exact, rtol=0.05, atol=0.05)


def test_named_fields_tell_the_scenario():
    net = build("star", make_spec(1, 2), scenario_fields=["f1"])
    assert net.scenario_embedding is None
    data = make_data(net, 16)
    moved = data.fields | {"f1": data.fields["f1"] + 1}
    before, after = (net(data.x, fields, data.scenario).logits for fields in (data.fields, moved))
    assert not torch.equal(before, after)
    with pytest.raises(ConfigError, match=r"scenario_fields: no field 'f9'.*f0, f1, f2"):
        build("star", make_spec(1, 2), scenario_fields=["f9"])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 1), {"use_pn": True}, r"model\.use_pn: .*'mtl'"),
        ((2, 1), {"use_aux": True}, r"model\.use_aux: .*'mtl'"),
        ((2, 1), {"star_axis": "scenario"}, r"model\.star_axis: .*'mtl' takes head or task, not scenario"),
        ((1, 2), {"star_axis": "task"}, r"model\.star_axis: .*'msl' takes head or scenario, not task"),
        ((2, 2), {"star_axis": "task"}, r"model\.star_axis: .*'mtmsl' takes head or scenario, not task"),
    ],
)
def test_refusals(shape, options, message):
    with pytest.raises(ConfigError, match=message):
        build("star", make_spec(*shape), **options)


def test_regression_tasks_are_allowed_but_not_beside_binary_ones():
    tasks = make_spec().tasks
    regression = [task.model_copy(update={"kind": "regression"}) for task in tasks]
    build("star", ModelSpec(Setting.MTL, tuple(regression), 1, {"f": 4}, 0))
    with pytest.raises(ConfigError, match="both binary and regression"):
        build("star", ModelSpec(Setting.MTL, (tasks[0], regression[1]), 1, {"f": 4}, 0))
