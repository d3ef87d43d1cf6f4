"""MSSM: a loop over rows, fields, sub-networks and cells; sizes; special cases; the penalty on open gates."""

from __future__ import annotations

import math

import pytest
import torch

from mmlrec.registry import method
from tests.models.support import build, losses, make_data, make_spec, mean_gate, step

F64 = torch.float64


def gate(config, log_alpha, u=None):
    """One hard-concrete gate: of a training step with the uniform number u, or of evaluation."""
    if u is None:
        return mean_gate(log_alpha, config.hc_beta, config.hc_gamma, config.hc_zeta)
    logit = (math.log(u) - math.log(1 - u) + log_alpha) / config.hc_beta
    return min(1.0, max(0.0, (config.hc_zeta - config.hc_gamma) / (1 + math.exp(-logit)) + config.hc_gamma))


def values(config, gates, numbers):
    """All gates of a module as a tensor, one after the other; `numbers` yields the noise, or is None."""
    found = [gate(config, a, None if numbers is None else next(numbers)) for a in gates.log_alpha.flatten().tolist()]
    return torch.tensor(found, dtype=F64).view(gates.log_alpha.shape)


def tower(x, towers, head):
    for weight, bias in zip(towers.hidden.weights, towers.hidden.biases, strict=True):
        x = torch.clamp(x @ weight[head] + bias[head], min=0)
    return (x @ towers.weight[head])[0] + towers.bias[head]


def columns_of_fields(net):
    """Columns of x that belong to each field gate."""
    start, groups = 0, []
    for width in net.spec.fields.values():
        groups.append(list(range(start, start + width)))
        start += width
    dense = list(range(start, start + net.spec.num_dense))
    return groups + ([dense] if net.config.dense_as_one_field else [[column] for column in dense])


def reference(net, rows, noise=None):
    """Logits of all heads, [B, H]: fields are scaled before the first layer, cells after each map."""
    numbers = None if noise is None else iter(noise.tolist())
    cells = [values(net.config, connections.gates, numbers) for connections in net.connections]
    experts = net.config.num_experts
    scale = torch.ones(experts, net.spec.input_width, dtype=F64)
    if net.config.fscm:
        m = values(net.config, net.field_gates, numbers)
        for e in range(experts):
            for f, columns in enumerate(columns_of_fields(net)):
                scale[e, columns] = m[e, f]
    logits = []
    for x in rows:
        v = [x * scale[e] for e in range(experts)]
        for stack, connections, z in zip(net.subnetworks, net.connections, cells, strict=True):
            u = [torch.clamp(v[j] @ stack.weights[0][j] + stack.biases[0][j], min=0) for j in range(experts)]
            v = [sum(z[i, j] * (u[j] @ connections.weight[i, j]) for j in range(experts)) for i in range(len(z))]
        logits.append(torch.stack([tower(v[h], net.towers, h) for h in range(net.spec.num_heads)]))
    return torch.stack(logits)


def perturbed(spec, seed=3, **options):
    """A float64 network away from its start; some gates are clamped, some are not."""
    net = build("mssm", spec, **options).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            scale = 1.5 if key.endswith("log_alpha") else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, dtype=F64, generator=g))
    return net


STRETCHED = {"hc_beta": 0.5, "hc_gamma": -0.3, "hc_zeta": 1.4, "log_alpha_init": 0.3}
OPTIONS = {"all": {}, "one-dense": {"dense_as_one_field": True}, "no-fields": {"fscm": False}, "stretched": STRETCHED}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 2), (1, 6), (2, 2), (3, 4)])
def test_equals_a_loop_over_rows_fields_and_cells(options, training, tasks, scenarios):
    spec = make_spec(tasks, scenarios, fields=2, dim=5, num_dense=3, seed=tasks)
    net = perturbed(spec, expert_hidden_units=[7, 13], num_experts=4, **options).train(training)
    data = make_data(net, 9, dtype=F64)
    noise = torch.rand(net.num_noise, generator=torch.Generator().manual_seed(5))
    expected = reference(net, data.x, noise.double() if training else None)
    got = net(data.x, data.fields, data.scenario, noise=noise, return_all_heads=True)
    torch.testing.assert_close(got.all_logits, expected, rtol=1e-6, atol=1e-6)
    heads = torch.arange(tasks) * scenarios + data.scenario.view(-1, 1)
    own = expected.gather(1, heads)
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 1e-5)):
        logits = net.to(dtype)(data.x.to(dtype), data.fields, data.scenario, noise=noise).logits
        torch.testing.assert_close(logits.to(F64), own, rtol=tolerance, atol=tolerance)


def test_fields_of_different_widths_have_their_own_columns():
    spec = make_spec()
    spec = type(spec)(spec.setting, spec.tasks, 1, {"a": 1, "b": 7, "c": 3}, 2)
    net = perturbed(spec).eval()
    data = make_data(net, 5, dtype=F64)
    expected = reference(net, data.x)
    torch.testing.assert_close(net(data.x, data.fields, data.scenario).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (2, 3)])
def test_gradients_equal_finite_differences(tasks, scenarios):
    net = perturbed(make_spec(tasks, scenarios), activation="tanh", l0_field=0.2, l0_cell=0.1)
    data = make_data(net, 6, dtype=F64)
    _, gradients = step(net, data)
    for key, parameter in net.named_parameters():
        direction = torch.randn(parameter.shape, dtype=F64, generator=torch.Generator().manual_seed(7))
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
                found.append(sum(losses(net, data).values()))
                parameter.sub_(sign * 1e-5 * direction)
        slope = (found[0] - found[1]) / 2e-5
        torch.testing.assert_close((gradients[key] * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=key)


def test_parameter_counts():
    for scenarios in (1, 2):
        net = build("mssm", make_spec(2 // scenarios, scenarios))
        assert sum(p.numel() for p in net.parameters()) == 1503
    assert sum(p.numel() for p in build("mssm", make_spec(), dense_as_one_field=True).parameters()) == 1503 - 3
    assert sum(p.numel() for p in build("mssm", make_spec(), fscm=False).parameters()) == 1503 - 15
    net = method("mssm")(make_spec(fields=7, dim=8, num_dense=0), method("mssm").Config())
    assert sum(p.numel() for p in net.parameters()) == 1_391_390


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 3), (2, 3)])
def test_open_fields_and_constant_cells_are_snr_with_maps(tasks, scenarios):
    spec = make_spec(tasks, scenarios)
    net, snr = build("mssm", spec), build("snr", spec)
    constant = torch.Generator().manual_seed(1)
    with torch.no_grad():
        net.field_gates.log_alpha.fill_(20.0)
        for mine, theirs in zip(net.connections, snr.connections, strict=True):
            theirs.gates.log_alpha.normal_(0.0, 1.5, generator=constant)
            mine.gates.log_alpha.copy_(theirs.gates.log_alpha.unsqueeze(2).expand_as(mine.gates.log_alpha))
            theirs.weight.copy_(mine.weight)
        for part in ("subnetworks", "towers"):
            getattr(snr, part).load_state_dict(getattr(net, part).state_dict())
    data = make_data(net, 40)
    # One uniform number for each connection in training, given to all its cells.
    numbers = [torch.rand(gates.log_alpha.shape, generator=constant) for gates in snr.gates]
    spread = [n.unsqueeze(2).expand(*n.shape, width).flatten() for n, width in zip(numbers, (8, 6), strict=True)]
    noise = torch.cat([*spread, torch.full((net.field_gates.num_noise,), 0.5)])
    expected = snr(data.x, data.fields, data.scenario, noise=torch.cat([n.flatten() for n in numbers])).logits
    found = net(data.x, data.fields, data.scenario, noise=noise).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected, found = (n.eval()(data.x, data.fields, data.scenario).logits for n in (snr, net))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_closed_field_has_no_influence_and_no_gradient():
    net = build("mssm", make_spec(2, 3))
    with torch.no_grad():
        net.field_gates.log_alpha[:, 1] = -20.0
    data, changed = make_data(net, 24), make_data(net, 24)
    changed.x[:, 4:8] = 5.0
    before, after = (net(d.x, d.fields, d.scenario).logits for d in (data, changed))
    assert torch.equal(before, after)
    data.x.requires_grad_()
    step(net, data)
    assert (data.x.grad[:, 4:8] == 0).all()
    assert (data.x.grad[:, :4] != 0).any()
    assert (data.x.grad[:, 8:] != 0).any()


def test_permuting_fields_with_gates_and_weights_is_neutral():
    net = perturbed(make_spec(2, 1, fields=3, dim=4)).eval()
    data = make_data(net, 12, dtype=F64)
    expected = net(data.x, data.fields, data.scenario).logits
    # Fields in the order 2, 0, 1, then the dense features in the order 1, 0.
    columns = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7, 13, 12])
    with torch.no_grad():
        net.field_gates.log_alpha.copy_(net.field_gates.log_alpha[:, [2, 0, 1, 4, 3]].clone())
        first = net.subnetworks[0].weights[0]
        first.copy_(first[:, columns].clone())
    moved = net(data.x[:, columns], data.fields, data.scenario).logits
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_penalty_counts_open_fields_and_connections():
    net = perturbed(make_spec(), l0_field=0.3, l0_cell=0.7)

    def opened(gates):
        return sum(1 / (1 + math.exp(-(a - 0.9 * math.log(0.1 / 1.1)))) for a in gates.log_alpha.flatten().tolist())

    fields, connections = (
        opened(net.field_gates),
        sum(opened(c.gates) / h for c, h in zip(net.connections, (8, 6), strict=True)),
    )
    penalty = losses(net, make_data(net, 4, dtype=F64))["l0"].item()
    assert penalty == pytest.approx(0.3 * fields + 0.7 * connections, rel=1e-12)
    assert net.diagnostics() == pytest.approx({"open_connections": connections, "open_fields": fields})
    assert set(build("mssm", make_spec(), fscm=False).diagnostics()) == {"open_connections"}


@pytest.mark.parametrize(
    ("tasks", "scenarios", "autocast"),
    [(2, 1, False), *(pytest.param(*case, marks=pytest.mark.long) for case in [(2, 1, True), (2, 3, False), (2, 3, True)])],
)
def test_two_thousand_steps_at_a_high_rate_stay_finite(tasks, scenarios, autocast):
    net = build("mssm", make_spec(tasks, scenarios), l0_field=1e-4, l0_cell=1e-4)
    data, draws = make_data(net, 8), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, fused=True)
    for _ in range(2000):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = net(data.x, data.fields, data.scenario, noise=torch.rand(net.num_noise, generator=draws))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, data.labels)
        (loss + output.extra_losses["l0"]).backward()
        optimizer.step()
    assert loss.isfinite()
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_a_masked_task_does_not_touch_the_connections_to_its_heads():
    net = build("mssm", make_spec())
    data = make_data(net, 16)
    data.mask[:, 0] = 0
    _, gradients = step(net, data)
    for key in ("connections.1.gates.log_alpha", "connections.1.weight", "towers.weight"):
        assert (gradients[key][0] == 0).all(), key
        assert (gradients[key][1] != 0).any(), key
    assert (gradients["field_gates.log_alpha"] != 0).any()


@pytest.mark.parametrize("tasks", [1, 2])
def test_relabelling_scenarios_with_their_parameters_changes_nothing(tasks):
    net = perturbed(make_spec(tasks, 3)).eval()
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
