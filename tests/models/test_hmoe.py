"""HMoE against a loop over rows, heads and experts; mixes worked by hand; who learns from whom; refusals."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch

from mmlrec.errors import ConfigError
from mmlrec.models.base.model import ModelSpec
from mmlrec.models.hmoe import mix_scores
from mmlrec.registry import method
from mmlrec.schema import Setting
from tests.models.support import build, make_data, make_spec, step

F64 = torch.float64
OWN_GATES = {"gate_mode": "per_scenario"}
SHARED = {"weight_mode": "shared"}

pytestmark = pytest.mark.filterwarnings("ignore:hmoe mixes scores of different tasks")


def disturbed(net, seed=3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=g))
    return net


def chain(x, stack, member):
    for weight, bias in zip(stack.weights, stack.biases, strict=True):
        x = torch.relu(x @ weight[member] + bias[member])
    return x


def softmax_net(x, gates, member):
    exps = torch.exp(chain(x, gates.hidden, member) @ gates.weight[member])
    return exps / exps.sum()


def partners(net, head):
    """Heads whose scores are mixed for a head, and its own place among them."""
    scenarios = net.spec.num_scenarios
    if net.config.mix_axis == "head" or scenarios == 1:
        return list(range(net.spec.num_heads)), head
    return [head // scenarios * scenarios + s for s in range(scenarios)], head % scenarios


def reference(net, x):
    """[H] logits of one row; the gradient of foreign scores is stopped."""
    experts = [chain(x, net.experts, e) for e in range(net.experts.stack)]
    scores = []
    for h in range(net.spec.num_heads):
        gate = softmax_net(x, net.gates, h if net.config.gate_mode == "per_scenario" else 0)
        m = sum(gate[e] * f for e, f in enumerate(experts))
        scores.append((chain(m, net.towers.hidden, h) @ net.towers.weight[h])[0] + net.towers.bias[h])
    logits = []
    for h in range(net.spec.num_heads):
        mixed, place = partners(net, h)
        row = h if len(net.score_weights.weight) > 1 else 0
        weights = softmax_net(x, net.score_weights, row)
        values = [scores[j] if i == place else scores[j].detach() for i, j in enumerate(mixed)]
        if net.config.mix_space == "logit":
            logits.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        else:
            p = sum(w * torch.sigmoid(v) for w, v in zip(weights, values, strict=True))
            logits.append(torch.log(p / (1 - p)))
    return torch.stack(logits)


SIZES = [(2, 1), (3, 1), (1, 2), (1, 6), (2, 2), (2, 3), (3, 4)]
OPTIONS = [
    {},
    SHARED,
    SHARED | OWN_GATES | {"mix_space": "prob"},
    {"score_weight_hidden_units": []},
    OWN_GATES | {"mix_axis": "head", "gate_hidden_units": [], "expert_hidden_units": [13, 7]},
    OWN_GATES | {"mix_axis": "head", "mix_space": "prob", "tower_hidden_units": []},
]


# One W over tasks is refused.
@pytest.mark.parametrize(
    ("options", "tasks", "scenarios"),
    [(o, *size) for o in OPTIONS for size in SIZES if size[1] > 1 or o.get("weight_mode") != "shared"],
)
def test_values_and_gradients_equal_a_loop(options, tasks, scenarios):
    spec = make_spec(tasks, scenarios, fields=2, dim=4, num_dense=3, seed=tasks)
    net = disturbed(build("hmoe", spec, **options).double())
    data = make_data(net, 9, dtype=F64)
    expected = torch.stack([reference(net, row) for row in data.x])
    every = net(data.x, data.fields, data.scenario, return_all_heads=True).all_logits
    torch.testing.assert_close(every, expected, rtol=1e-6, atol=1e-6)
    heads = torch.arange(tasks) * scenarios + data.scenario.view(-1, 1)
    own = expected.gather(1, heads)
    got = net(data.x, data.fields, data.scenario).logits
    pull = torch.randn(9, tasks, dtype=F64, generator=torch.Generator().manual_seed(5))
    gradients = [torch.autograd.grad(y, list(net.parameters()), pull) for y in (own, got)]
    for (key, _), theirs, ours in zip(net.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9, msg=key)
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 1e-5)):
        logits = net.to(dtype)(data.x.to(dtype), data.fields, data.scenario).logits
        torch.testing.assert_close(logits.to(F64), own, rtol=tolerance, atol=tolerance)


def gate_size(width, hidden, outputs):
    """Parameters of a gate with one hidden layer."""
    return width * hidden + hidden + hidden * outputs


@pytest.mark.parametrize(
    ("options", "tiny", "benchmark"),
    [
        (SHARED, 763, 214_274),
        # The other scenario's W.
        ({}, 763 + gate_size(14, 5, 2), 214_274 + gate_size(56, 64, 2)),
        (OWN_GATES, 938, 221_954),
    ],
)
def test_parameter_counts(options, tiny, benchmark):
    nets = (
        build("hmoe", make_spec(1, 2), **options),
        method("hmoe")(make_spec(1, 2, fields=7, dim=8, num_dense=0), method("hmoe").Config(**options)),
    )
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [tiny, benchmark]


def constant_net(scores, weights, **options):
    """A net of one task whose scores and mix weights are these numbers, for every row (its last feature is 1)."""
    net = build("hmoe", make_spec(1, len(scores)), score_weight_hidden_units=[], **options).double()
    with torch.no_grad():
        net.towers.weight.zero_()
        net.towers.bias.copy_(torch.tensor(scores))
        net.score_weights.weight.zero_()
        net.score_weights.weight[:, -1] = torch.tensor(weights, dtype=F64).log()
    data = make_data(net, 1, dtype=F64)
    data.x[:, -1] = 1
    return net, data


def test_worked_mix():
    net, data = constant_net([1.0, -1.0, 2.0], [0.5, 0.3, 0.2])
    z = net(data.x, data.fields, torch.tensor([0])).logits
    assert z.item() == pytest.approx(0.6, abs=1e-12)
    z.backward()
    expected = torch.tensor([0.5, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(net.towers.bias.grad, expected, rtol=0, atol=1e-6)
    # dz/dW = S, and through the softmax dz/dlogit_j = W_j (S_j - z).
    expected = torch.tensor([0.5 * 0.4, 0.3 * -1.6, 0.2 * 1.4], dtype=F64)
    torch.testing.assert_close(net.score_weights.weight.grad[0, -1], expected, rtol=0, atol=1e-6)


def test_worked_mix_of_logits():
    weights = torch.tensor([0.5, 0.3, 0.2], requires_grad=True)
    scores = torch.tensor([1.0, -1.0, 2.0])
    mix_scores(weights, scores, "logit").backward()
    torch.testing.assert_close(weights.grad, scores)


CASES = [
    ([0.5, 0.5], [-200.0, 200.0]),
    ([0.3, 0.7], [200.0, 200.0]),
    ([0.3, 0.7], [-200.0, -200.0]),
    ([0.3, 0.7], [-200.0, -190.0]),
    ([0.2, 0.3, 0.5], [80.0, 200.0, 120.0]),
    ([0.2, 0.3, 0.5], [1.5, -0.25, 0.0]),
    ([0.9999, 0.0001], [12.0, -12.0]),
]


@pytest.mark.parametrize(("weights", "scores"), CASES)
def test_mix_of_probabilities_is_exact(weights, scores):
    leaf = torch.tensor(scores, requires_grad=True)
    shares = torch.tensor(weights).requires_grad_()
    z = mix_scores(shares, leaf, "prob")
    z.backward()
    with localcontext() as context:
        context.prec = 250
        exact = [Decimal(s) for s in scores]
        parts = [Decimal(w) for w in shares.tolist()]
        p, q = (sum(w / (1 + (sign * -s).exp()) for w, s in zip(parts, exact, strict=True)) for sign in (1, -1))
        slopes = [w * (s.exp() / (1 + s.exp()) ** 2) * (1 / p + 1 / q) for w, s in zip(parts, exact, strict=True)]
        assert z.item() == pytest.approx(float((p / q).ln()), rel=1e-5, abs=1e-6)
        for got, expected in zip(leaf.grad.tolist(), slopes, strict=True):
            assert got == pytest.approx(float(expected), rel=1e-4, abs=1e-30)
    assert shares.grad.isfinite().all()


def test_a_vanished_weight_is_harmless():
    weights, scores = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor([0.5, 3.0], requires_grad=True)
    z = mix_scores(weights, scores, "prob")
    z.backward()
    assert z.item() == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(scores.grad, torch.tensor([1.0, 0.0]))
    assert weights.grad.isfinite().all()


def test_mixed_probability_lies_between_those_of_the_towers():
    net = disturbed(build("hmoe", make_spec(1, 5), mix_space="prob").double())
    data = make_data(net, 50, dtype=F64)
    scores = net.towers((net.gates(data.x).transpose(1, 2) * net.experts(data.x).transpose(0, 1)).sum(dim=1))
    z = net(data.x, data.fields, data.scenario).logits[:, 0]
    low, high = scores.min(dim=1).values, scores.max(dim=1).values
    assert ((low < z) & (z < high)).all()


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("space", ["logit", "prob"])
def test_with_the_weight_on_the_own_head_it_is_mmoe(tasks, scenarios, space):
    spec = make_spec(tasks, scenarios)
    options = OWN_GATES | {"score_weight_hidden_units": [], "mix_space": space}
    hmoe, mmoe = build("hmoe", spec, **options), build("mmoe", spec)
    with torch.no_grad():
        for part in ("experts", "gates", "towers"):
            for mine, theirs in zip(getattr(hmoe, part).parameters(), getattr(mmoe, part).parameters(), strict=True):
                theirs.copy_(mine)
        hmoe.score_weights.weight.zero_()
        for h in range(spec.num_heads):
            hmoe.score_weights.weight[h, -1, partners(hmoe, h)[1]] = 1000.0
    data = make_data(hmoe, 40)
    data.x[:, -1] = 1.0
    expected = mmoe(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(hmoe(data.x, data.fields, data.scenario).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, SHARED, OWN_GATES, {"mix_space": "prob"}])
def test_one_scenario_with_one_expert_is_shared_bottom(options):
    spec = ModelSpec(Setting.MSL, make_spec(1).tasks, 1, {"f0": 4, "f1": 4}, 1)
    hmoe, bottom = build("hmoe", spec, num_experts=1, **options), build("shared_bottom", spec)
    with torch.no_grad():
        for mine, theirs in zip(hmoe.experts.parameters(), bottom.bottom.parameters(), strict=True):
            theirs.copy_(mine[0])
        for mine, theirs in zip(hmoe.towers.parameters(), bottom.towers.parameters(), strict=True):
            theirs.copy_(mine)
    data = make_data(hmoe, 20)
    expected = bottom(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(hmoe(data.x, data.fields, data.scenario).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", ["logit", "prob"])
@pytest.mark.parametrize("options", [{}, SHARED, OWN_GATES, OWN_GATES | {"mix_axis": "head"}])
@pytest.mark.parametrize("tasks", [1, 2])
def test_towers_learn_from_their_own_scenario_and_the_rest_from_all(space, options, tasks):
    net = build("hmoe", make_spec(tasks, 3), mix_space=space, **options)
    data = make_data(net, 60)
    data.scenario[:] = 1
    _, gradients = step(net, data)
    for key, gradient in gradients.items():
        part = key.split(".")[0]
        of_heads = {"towers": True, "score_weights": options != SHARED, "gates": "gate_mode" in options}.get(part, False)
        assert net.owner(key) == ("head" if of_heads else None)
        if of_heads:
            by_scenario = gradient.reshape(tasks, 3, -1)
            assert (by_scenario[:, [0, 2]] == 0).all(), key
            assert (by_scenario[:, 1] != 0).any(dim=1).all(), key
        else:
            assert (gradient != 0).any(), key


@pytest.mark.parametrize("options", [{}, SHARED])
def test_the_scores_of_other_scenarios_count(options):
    net = build("hmoe", make_spec(1, 3), **options)
    data = make_data(net, 20)
    before = net(data.x, data.fields, data.scenario).logits
    with torch.no_grad():
        net.towers.bias[1] += 1
    after = net(data.x, data.fields, data.scenario).logits
    own = torch.zeros_like(data.scenario) if options == SHARED else data.scenario
    weights = net.score_weights(data.x)[torch.arange(20), own, 1:2]
    torch.testing.assert_close(after - before, weights, rtol=1e-4, atol=1e-6)


def test_over_tasks_each_task_has_its_own_weights():
    with pytest.warns(UserWarning, match=r"different tasks \(t0, t1\)"):
        net = build("hmoe", make_spec())
    assert net.score_weights.weight.shape == (2, 5, 2)
    data = make_data(net, 20)
    logits = net(data.x, data.fields, data.scenario).logits
    assert (logits[:, 0] != logits[:, 1]).all()
    for shape, options in (((2, 1), {}), ((2, 2), {"mix_axis": "head"})):
        with pytest.raises(ConfigError, match=r"weight_mode: shared .* t0, t1 one and the same prediction"):
            build("hmoe", make_spec(*shape), weight_mode="shared", **options)


@pytest.mark.parametrize(
    ("shape", "axis", "message"),
    [
        ((2, 1), "scenario", r"model\.mix_axis: .*'mtl' takes task or head, not scenario"),
        ((1, 2), "task", r"model\.mix_axis: .*'msl' takes scenario or head, not task"),
        ((2, 2), "task", r"model\.mix_axis: .*'mtmsl' takes scenario or head, not task"),
    ],
)
def test_refuses_an_axis_the_setting_does_not_have(shape, axis, message):
    with pytest.raises(ConfigError, match=message):
        build("hmoe", make_spec(*shape), mix_axis=axis)


def test_kinds_of_tasks():
    tasks = make_spec().tasks
    mixed = (tasks[0], tasks[1].model_copy(update={"kind": "regression"}))
    mtl, mtmsl = ModelSpec(Setting.MTL, mixed, 1, {"f": 4}, 0), ModelSpec(Setting.MTMSL, mixed, 2, {"f": 4}, 0)
    for spec, options in ((mtl, {}), (mtmsl, {"mix_axis": "head"})):
        with pytest.raises(ConfigError, match="both binary and regression"):
            build("hmoe", spec, **options)
    build("hmoe", mtmsl)  # Scenarios of one task are mixed: each task has its own space.
    with pytest.raises(ConfigError, match=r"mix_space: prob needs binary tasks"):
        build("hmoe", mtmsl, mix_space="prob")
