"""SNR: a loop over rows, sub-networks and connections; sizes; special cases; the penalty on open connections."""

from __future__ import annotations

import math

import pytest
import torch

from mmlrec.losses import LossOptions
from mmlrec.registry import method
from tests.models.support import assert_gradients_are_slopes, build, losses, make_data, make_spec, mean_gate, step

F64 = torch.float64
SIZES = [(2, 1), (3, 1), (1, 2), (1, 6), (2, 2), (3, 4)]
VARIANTS = ["trans", "aver"]


STRETCHED = {"hc_beta": 0.5, "hc_gamma": -0.3, "hc_zeta": 1.4, "log_alpha_init": 0.3}


def gate(config, log_alpha, u=None):
    """One hard-concrete gate: of a training step with the uniform number u, or of evaluation."""
    if u is None:
        return mean_gate(log_alpha, config.hc_beta, config.hc_gamma, config.hc_zeta)
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / config.hc_beta))
    return min(1.0, max(0.0, s * (config.hc_zeta - config.hc_gamma) + config.hc_gamma))


def layer(x, stack, member):
    return torch.clamp(x @ stack.weights[0][member] + stack.biases[0][member], min=0)


def tower(x, towers, head):
    for weight, bias in zip(towers.hidden.weights, towers.hidden.biases, strict=True):
        x = torch.clamp(x @ weight[head] + bias[head], min=0)
    return (x @ towers.weight[head])[0] + towers.bias[head]


def reference(net, x, noise=None):
    """Logits of all heads of one row."""
    experts, numbers = net.config.num_experts, None if noise is None else iter(noise.tolist())
    v = [x] * experts
    for stack, connections in zip(net.subnetworks, net.connections, strict=True):
        u = [layer(v[j], stack, j) for j in range(experts)]
        v = []
        for i, row in enumerate(connections.gates.log_alpha.tolist()):
            z = [gate(net.config, log_alpha, None if numbers is None else next(numbers)) for log_alpha in row]
            trans = net.config.variant == "trans"
            v.append(sum(z[j] * (u[j] @ connections.weight[i, j] if trans else u[j]) for j in range(experts)))
    return torch.stack([tower(v[h], net.towers, h) for h in range(net.spec.num_heads)])


def perturbed(spec, seed=3, **options):
    """A float64 network away from its start; some gates are clamped, some are not."""
    net = build("snr", spec, **options).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            scale = 1.5 if key.endswith("log_alpha") else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, dtype=F64, generator=g))
    return net


def set_open(net, value=20.0):
    with torch.no_grad():
        for gates in net.gates:
            gates.log_alpha.fill_(value)


def copy_into(target, source):
    with torch.no_grad():
        for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs.view_as(mine))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("tasks", "scenarios", "options"), [*((*size, {}) for size in SIZES), (2, 2, STRETCHED)])
def test_equals_a_loop_over_rows_and_connections(variant, training, tasks, scenarios, options):
    spec = make_spec(tasks, scenarios, fields=2, dim=5, num_dense=3, seed=tasks)
    net = perturbed(spec, variant=variant, expert_hidden_units=[7, 13], num_experts=4, **options).train(training)
    data = make_data(net, 9, dtype=F64)
    noise = torch.rand(net.num_noise, generator=torch.Generator().manual_seed(5))
    expected = torch.stack([reference(net, row, noise.double() if training else None) for row in data.x])
    got = net(data.x, data.fields, data.scenario, noise=noise, return_all_heads=True)
    torch.testing.assert_close(got.all_logits, expected, rtol=1e-6, atol=1e-6)
    heads = torch.arange(tasks) * scenarios + data.scenario.view(-1, 1)
    own = expected.gather(1, heads)
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 1e-5)):
        logits = net.to(dtype)(data.x.to(dtype), data.fields, data.scenario, noise=noise).logits
        torch.testing.assert_close(logits.to(F64), own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (2, 3)])
def test_gradients_equal_finite_differences(variant, tasks, scenarios):
    net = perturbed(make_spec(tasks, scenarios), variant=variant, activation="tanh", l0_lambda=0.1)
    data = make_data(net, 6, dtype=F64)
    assert_gradients_are_slopes(net, data)


@pytest.mark.parametrize(("variant", "tiny", "benchmark"), [("trans", 1395, 1_386_266), ("aver", 603, 206_618)])
def test_parameter_counts(variant, tiny, benchmark):
    for scenarios in (1, 2):
        net = build("snr", make_spec(2 // scenarios, scenarios), variant=variant)
        assert sum(p.numel() for p in net.parameters()) == tiny
    net = method("snr")(make_spec(fields=7, dim=8, num_dense=0), method("snr").Config(variant=variant))
    assert sum(p.numel() for p in net.parameters()) == benchmark


def test_the_state_dict_holds_every_map_and_every_gate():
    state = build("snr", make_spec()).state_dict()
    assert state["connections.0.weight"].shape == (3, 3, 8, 8)
    assert state["connections.1.weight"].shape == (2, 3, 6, 6)
    assert state["connections.0.gates.log_alpha"].shape == (3, 3)
    assert state["connections.1.gates.log_alpha"].shape == (2, 3)


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_one_open_subnetwork_with_sums_is_shared_bottom(tasks, scenarios, training):
    spec = make_spec(tasks, scenarios)
    net, bottom = build("snr", spec, variant="aver", num_experts=1).train(training), build("shared_bottom", spec)
    set_open(net)
    with torch.no_grad():
        for level, stack in enumerate(net.subnetworks):
            bottom.bottom.weights[level].copy_(stack.weights[0][0])
            bottom.bottom.biases[level].copy_(stack.biases[0][0])
    copy_into(bottom.towers, net.towers)
    data = make_data(net, 40)
    expected = bottom(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(net(data.x, data.fields, data.scenario).logits, expected, rtol=1e-5, atol=1e-6)


def test_identity_connections_make_independent_networks():
    spec = make_spec(3)
    net, alone = build("snr", spec, num_experts=3), build("single_task", spec)
    with torch.no_grad():
        for level, (stack, connections) in enumerate(zip(net.subnetworks, net.connections, strict=True)):
            connections.gates.log_alpha.copy_(torch.eye(3) * 40 - 20)
            connections.weight.copy_(torch.eye(connections.weight.shape[2]).expand_as(connections.weight))
            alone.networks.weights[level].copy_(stack.weights[0])
            alone.networks.biases[level].copy_(stack.biases[0])
    copy_into(alone.towers, net.towers)
    data = make_data(net, 40)
    expected = alone(data.x.unsqueeze(1).expand(-1, 3, -1), {}, data.scenario).logits
    torch.testing.assert_close(net(data.x, data.fields, data.scenario).logits, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_is_fixed_and_training_draws():
    net = method("snr")(make_spec(), method("snr").Config(expert_hidden_units=[8, 6]))
    data = make_data(net, 16)

    def logits(seed=None):
        noise = None if seed is None else torch.rand(net.num_noise, generator=torch.Generator().manual_seed(seed))
        return net(data.x, data.fields, data.scenario, noise=noise).logits

    assert not torch.equal(logits(), logits())
    assert not torch.equal(logits(1), logits(2))
    assert torch.equal(logits(1), logits(1))
    net.eval()
    assert torch.equal(logits(), logits())
    assert torch.equal(logits(1), logits(2))


@pytest.mark.parametrize("name", ["snr", "mssm"])
def test_gates_start_where_the_option_says(name):
    for start in ({}, {"log_alpha_init": -1.5}):
        net = build(name, make_spec(), **start)
        found = torch.cat([value.flatten() for key, value in net.named_parameters() if key.endswith("log_alpha")])
        assert (found - start.get("log_alpha_init", 2.0)).abs().max() < 0.05
        assert found.std() > 0


@pytest.mark.parametrize(("cost", "weights"), [("connections", (1, 1)), ("params", (64, 36))])
def test_penalty_is_the_expected_cost_of_open_connections(cost, weights):
    net = perturbed(make_spec(), l0_cost=cost, l0_lambda=0.3)
    data = make_data(net, 4, dtype=F64)
    expected = 0.0
    for gates, weight in zip(net.gates, weights, strict=True):
        for log_alpha in gates.log_alpha.flatten().tolist():
            expected += 0.3 * weight / (1 + math.exp(-(log_alpha - 0.9 * math.log(0.1 / 1.1))))
    assert losses(net, data)["l0"].item() == pytest.approx(expected, rel=1e-12)
    # The same on every rank, whatever rows it has: it is added as it is.
    loss = net.make_loss(LossOptions())
    targets = (data.labels, data.mask, data.scenario, data.weight)
    output = net(data.x, data.fields, data.scenario)
    assert loss(output, *targets, loss.denominators(*targets), 4)["l0"].item() == pytest.approx(expected, rel=1e-12)


def train(net, steps, lr, data, draws):
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    loss = net.make_loss(LossOptions())
    targets = (data.labels, data.mask, data.scenario, data.weight)
    for _ in range(steps):
        optimizer.zero_grad()
        noise = torch.rand(net.num_noise, generator=draws)
        output = net(data.x, data.fields, data.scenario, noise=noise)
        sum(loss(output, *targets, loss.denominators(*targets)).values()).backward()
        optimizer.step()
    return output


@pytest.mark.parametrize("name", ["snr", "mssm"])
def test_gates_route_with_the_default_options(name):
    """Sub-network j reads field j alone, and task j depends on field j alone: a task needs its own sub-network only."""
    kind, spec = method(name), make_spec(2, 1, fields=2, dim=4, num_dense=0)
    net = kind(spec, kind.Config(num_experts=2, expert_hidden_units=[16], tower_hidden_units=[8]))
    with torch.no_grad():
        for j in range(2):
            net.subnetworks[0].weights[0][j, 4 * (1 - j) : 4 * (2 - j)] = 0
    net.subnetworks.requires_grad_(False)
    factors = net.lr_factors()
    groups = [
        {"params": [parameter], "lr": 1e-3 * next((f for key, f in factors.items() if name.startswith(key)), 1.0)}
        for name, parameter in net.named_parameters()
        if parameter.requires_grad
    ]
    optimizer = torch.optim.Adam(groups, fused=True)
    g = torch.Generator().manual_seed(0)
    truth, no_scenario = torch.randn(2, 4, generator=g), torch.zeros(256, dtype=torch.long)
    for _ in range(1500):
        x = torch.randn(256, 8, generator=g)
        scores = (x.view(256, 2, 4) * truth).sum(dim=2) + 0.5 * torch.randn(256, 2, generator=g)
        output = net(x, {}, no_scenario, noise=torch.rand(net.num_noise, generator=g))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, (scores > 0).float(), reduction="none")
        optimizer.zero_grad()
        (loss.mean(dim=0).sum() + output.extra_losses["l0"]).backward()
        optimizer.step()
    gates = net.eval().gates[0]().detach()
    gates = gates if name == "snr" else gates.mean(dim=2)
    own, other = gates.diagonal(), gates.flip(1).diagonal()
    assert own.min() > 0.9
    # Not every cell of a connection carries noise that is worth a gate.
    assert (own - other).min() > (0.4 if name == "snr" else 0.1), gates
    if name == "mssm":  # A field whose weights are all 0 serves nothing.
        assert net.field_gates().diagonal().min() > 0.9
        assert net.field_gates().flip(1).diagonal().max() < 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_gives_the_mean_logits_of_training(variant):
    """With one level and linear towers, logits are linear in the gates."""
    net = build("snr", make_spec(), variant=variant, expert_hidden_units=[8], tower_hidden_units=[]).double()
    data = make_data(net, 16, dtype=F64)
    with torch.no_grad():
        draws = [
            net(data.x, data.fields, data.scenario, noise=torch.full((net.num_noise,), (i + 0.5) / 1000)).logits
            for i in range(1000)
        ]
        expected = net.eval()(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(torch.stack(draws).mean(dim=0), expected, rtol=1e-4, atol=1e-5)


def test_a_larger_penalty_leaves_fewer_open_connections():
    counts = []
    for weight in (0.0, 0.3, 1.0):
        net = build("snr", make_spec(), l0_lambda=weight)
        train(net, 200, 0.02, make_data(net, 64), torch.Generator().manual_seed(0))
        counts.append(net.diagnostics()["open_connections"])
    assert counts[0] > counts[1] + 1
    assert counts[1] > counts[2] + 1
    # Written out for the last network: 9 connections between the levels and 6 to the heads.
    found = [1 / (1 + math.exp(-(a - 0.9 * math.log(0.1 / 1.1)))) for g in net.gates for a in g.log_alpha.flatten().tolist()]
    assert len(found) == 15
    assert counts[-1] == pytest.approx(sum(found), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("tasks", "scenarios", "autocast"),
    [(2, 1, False), *(pytest.param(*case, marks=pytest.mark.long) for case in [(2, 1, True), (2, 3, False), (2, 3, True)])],
)
def test_two_thousand_steps_at_a_high_rate_stay_finite(variant, tasks, scenarios, autocast):
    net = build("snr", make_spec(tasks, scenarios), variant=variant, l0_lambda=1e-4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = train(net, 2000, 0.01, make_data(net, 8), torch.Generator().manual_seed(0))
    assert output.logits.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_closed_gates_have_gradients_of_zero():
    net = build("snr", make_spec(2, 3))
    set_open(net, -20.0)
    _, gradients = step(net, make_data(net, 32))
    assert all((gradients[key] == 0).all() for key in gradients if "connections" in key)
    assert (gradients["towers.bias"] != 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_masked_task_does_not_touch_the_connections_to_its_heads(variant):
    net = build("snr", make_spec(), variant=variant)
    data = make_data(net, 16)
    data.mask[:, 0] = 0
    _, gradients = step(net, data)
    keys = ["connections.1.gates.log_alpha", "towers.weight"] + ["connections.1.weight"] * (variant == "trans")
    for key in keys:
        assert (gradients[key][0] == 0).all(), key
        assert (gradients[key][1] != 0).any(), key
    assert (gradients["connections.0.gates.log_alpha"] != 0).any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tasks", [1, 2])
def test_relabelling_scenarios_with_their_parameters_changes_nothing(variant, tasks):
    net = perturbed(make_spec(tasks, 3), variant=variant).eval()
    data = make_data(net, 30, dtype=F64)
    expected = net(data.x, data.fields, data.scenario).logits
    new_id = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if net.owner(key) == "head":
                members = parameter.unflatten(0, (tasks, 3))
                parameter.copy_(members[:, new_id.argsort()].flatten(0, 1).clone())
    moved = net(data.x, data.fields, new_id[data.scenario]).logits
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_costs_in_parameters_need_parameters():
    with pytest.raises(ValueError, match=r"l0_cost 'params' needs variant 'trans'.*use 'connections'"):
        method("snr").Config(variant="aver", l0_cost="params")
