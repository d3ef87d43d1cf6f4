"""Each method's own properties: an independent loop, sizes, special cases, and equalities between methods."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mmlrec.errors import ConfigError
from mmlrec.layers.gates import mix
from mmlrec.losses import LossOptions
from mmlrec.models.base.model import ModelSpec
from mmlrec.registry import method
from tests.models.support import assert_gradients_are_slopes, build, make_data, make_spec, spec_of, step

F64 = torch.float64


def chain(x, stack, member):
    """A stacked MLP's member, one row and one layer at a time."""
    for weight, bias in zip(stack.weights, stack.biases, strict=True):
        x = torch.clamp(x @ weight[member] + bias[member], min=0)
    return x


def plain(x, mlp):
    for weight, bias in zip(mlp.weights, mlp.biases, strict=True):
        x = torch.clamp(x @ weight + bias, min=0)
    return x


def gate(x, gates, head):
    logits = chain(x, gates.hidden, head) @ gates.weight[head]
    e = torch.exp(logits - logits.max())
    return e / e.sum()


def tower(x, towers, head):
    return (chain(x, towers.hidden, head) @ towers.weight[head])[0] + towers.bias[head]


def ref_mlp(net, x):
    u = plain(x, net.trunk)
    return [(u @ net.weight)[0] + beta for beta in net.bias]


def ref_shared_bottom(net, x):
    u = plain(x, net.bottom)
    return [tower(u, net.towers, h) for h in range(net.spec.num_heads)]


def ref_mmoe(net, x):
    experts = [chain(x, net.experts, e) for e in range(net.experts.stack)]
    logits = []
    for h in range(net.spec.num_heads):
        g = gate(x, net.gates, h)
        logits.append(tower(sum(g[e] * f for e, f in enumerate(experts)), net.towers, h))
    return logits


def ref_ple(net, x):
    heads = net.spec.num_heads
    branch, shared = [x] * heads, x
    for level in net.levels:
        n_t = 0 if level.specific is None else level.specific.stack // heads
        n_s = 0 if level.shared is None else level.shared.stack
        p = [[chain(branch[h], level.specific, j * heads + h) for j in range(n_t)] for h in range(heads)]
        q = [chain(shared, level.shared, j) for j in range(n_s)]
        outputs = []
        for h in range(heads):
            g = gate(branch[h], level.gates, h)
            outputs.append(sum(g[i] * f for i, f in enumerate(p[h] + q)))
        if level.shared_gate is not None:
            g = gate(shared, level.shared_gate, 0)
            shared = sum(g[i] * f for i, f in enumerate([p[h][j] for j in range(n_t) for h in range(heads)] + q))
        branch = outputs
    return [tower(branch[h], net.towers, h) for h in range(heads)]


def ref_single_task(net, x):
    return [tower(chain(x[h], net.networks, h), net.towers, h) for h in range(net.spec.num_heads)]


REFERENCES = {
    "mlp": ref_mlp,
    "shared_bottom": ref_shared_bottom,
    "mmoe": ref_mmoe,
    "ple": ref_ple,
    "single_task": ref_single_task,
}


def assert_equals_a_loop(net):
    name, tasks, scenarios = type(net).__module__.split(".")[-1], net.spec.num_tasks, net.spec.num_scenarios
    net = net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=F64, generator=torch.Generator().manual_seed(3)))
    data = make_data(net, 9, dtype=F64)
    expected = torch.stack([torch.stack(REFERENCES[name](net, row)) for row in data.x])
    got = net(data.x, data.fields, data.scenario, return_all_heads=True)
    torch.testing.assert_close(got.all_logits, expected, rtol=1e-10, atol=1e-10)
    heads = torch.arange(tasks) * scenarios + data.scenario.view(-1, 1)
    own = expected.gather(1, heads)
    for dtype, tolerance in ((F64, 1e-10), (torch.float32, 1e-5)):
        logits = net.to(dtype)(data.x.to(dtype), data.fields, data.scenario).logits
        torch.testing.assert_close(logits.to(F64), own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (3, 1), (1, 2), (1, 6), (2, 2), (3, 4)])
def test_equals_a_loop_over_rows_and_members(name, tasks, scenarios):
    assert_equals_a_loop(build(name, make_spec(tasks, scenarios, fields=2, dim=4, num_dense=3, seed=tasks)))


@pytest.mark.parametrize("shape", ["mtl", "msl", "mtmsl", "msl-many"])
@pytest.mark.parametrize("towers", [[], [7, 5]])
def test_shared_bottom_without_a_bottom_equals_a_loop(shape, towers):
    assert_equals_a_loop(build("shared_bottom", spec_of(shape), bottom_hidden_units=[], tower_hidden_units=towers))


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("seed", range(6))
def test_equals_a_loop_at_widths_that_no_kernel_likes(name, seed):
    rng = random.Random(seed)
    tasks, scenarios = rng.choice([(2, 1), (5, 1), (1, 3), (1, 7), (2, 3), (3, 5)])
    options = {
        key: [rng.choice([1, 3, 5, 7, 13, 33]) for _ in range(rng.randint(key.startswith(("expert", "bottom")), 3))]
        for key in ("dnn_hidden_units", "bottom_hidden_units", "expert_hidden_units", "gate_hidden_units", "tower_hidden_units")
    }
    options |= {key: rng.randint(1, 3) for key in ("num_experts", "num_shared_experts", "num_specific_experts", "num_levels")}
    known = {key: value for key, value in options.items() if key in method(name).Config.model_fields}
    spec = make_spec(tasks, scenarios, fields=rng.randint(1, 4), dim=rng.choice([1, 3, 5]), num_dense=rng.randint(0, 3))
    assert_equals_a_loop(build(name, spec, **known))


@pytest.mark.parametrize("name", REFERENCES)
def test_gradients_equal_finite_differences(name):
    net = build(name, make_spec(2, 3), activation="tanh").double()
    data = make_data(net, 6, dtype=F64)
    assert_gradients_are_slopes(net, data)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("mlp", {}, 182),
        ("single_task", {}, 414),
        ("shared_bottom", {}, 240),
        ("mmoe", {}, 768),
        ("mmoe", {"gate_hidden_units": []}, 672),
        ("ple", {}, 2175),
    ],
)
@pytest.mark.parametrize("scenarios", [1, 2])
def test_parameter_counts_of_the_tiny_configuration(name, options, count, scenarios):
    net = build(name, make_spec(2 // scenarios, scenarios), **options)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("mlp", {}, 47_618),
        ("single_task", {}, 111_618),
        ("shared_bottom", {}, 64_130),
        ("mmoe", {}, 214_402),
        ("mmoe", {"gate_hidden_units": []}, 207_042),
        ("ple", {}, 953_154),
    ],
)
def test_parameter_counts_at_benchmark_sizes(name, options, count):
    net = method(name)(make_spec(fields=7, dim=8, num_dense=0), method(name).Config(**options))
    assert sum(p.numel() for p in net.parameters()) == count


def copy_into(target, source):
    with torch.no_grad():
        for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs.view_as(mine))


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 3), (2, 3)])
def test_mmoe_with_one_expert_is_shared_bottom(tasks, scenarios):
    spec = make_spec(tasks, scenarios)
    mmoe, bottom = build("mmoe", spec, num_experts=1), build("shared_bottom", spec)
    copy_into(bottom.bottom, mmoe.experts)
    copy_into(bottom.towers, mmoe.towers)
    data = make_data(mmoe, 40)
    expected = bottom(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(mmoe(data.x, data.fields, data.scenario).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (1, 3), (2, 3)])
def test_cgc_without_specific_experts_is_mmoe(tasks, scenarios):
    spec = make_spec(tasks, scenarios)
    ple = build("ple", spec, num_levels=1, num_specific_experts=0, num_shared_experts=3)
    mmoe = build("mmoe", spec)
    copy_into(ple.levels[0].shared, mmoe.experts)
    copy_into(ple.levels[0].gates, mmoe.gates)
    copy_into(ple.towers, mmoe.towers)
    data = make_data(mmoe, 40)
    expected = mmoe(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(ple(data.x, data.fields, data.scenario).logits, expected, rtol=1e-5, atol=1e-6)


def test_shared_bottom_with_tied_empty_towers_is_mlp():
    spec = make_spec()
    bottom, mlp = build("shared_bottom", spec, tower_hidden_units=[]), build("mlp", spec)
    copy_into(bottom.bottom, mlp.trunk)
    with torch.no_grad():
        bottom.towers.weight.copy_(mlp.weight.expand_as(bottom.towers.weight))
    data = make_data(mlp, 20)
    expected = mlp(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(bottom(data.x, data.fields, data.scenario).logits, expected, rtol=1e-6, atol=1e-6)
    own = build("mlp", spec, per_head_output=True)
    copy_into(own.trunk, bottom.bottom)
    copy_into(own.outputs, bottom.towers)
    torch.testing.assert_close(own(data.x, data.fields, data.scenario).logits, expected, rtol=1e-6, atol=1e-6)


def test_mlp_with_one_head_is_a_plain_network_with_output_bias():
    net = build("mlp", make_spec(1, 1)).double()
    with torch.no_grad():
        net.bias.fill_(0.3)
    layers = [torch.nn.Linear(14, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 1)]
    plain_net = torch.nn.Sequential(*layers).double()
    weights, biases = [*net.trunk.weights, net.weight], [*net.trunk.biases, net.bias]
    with torch.no_grad():
        for layer, weight, bias in zip(layers[::2], weights, biases, strict=True):
            layer.weight.copy_(weight.t())
            layer.bias.copy_(bias)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in plain_net.parameters())
    data = make_data(net, 20, dtype=F64)
    logits = net(data.x, data.fields, data.scenario).logits
    torch.testing.assert_close(logits, plain_net(data.x), rtol=1e-12, atol=1e-12)


def test_mlp_heads_differ_by_their_biases_only():
    net = build("mlp", make_spec(2, 3)).double()
    with torch.no_grad():
        net.bias.copy_(torch.randn(6, dtype=F64))
    data = make_data(net, 20, dtype=F64)
    logits = net(data.x, data.fields, data.scenario, return_all_heads=True).all_logits
    expected = (net.bias - net.bias[0]).expand(20, 6)
    torch.testing.assert_close(logits - logits[:, :1], expected, rtol=0, atol=1e-12)


def test_gates_are_uniform_with_zero_weights_and_normalised_over_experts():
    net = build("mmoe", make_spec(3))
    data = make_data(net, 10)
    gates = net.gates(data.x)
    assert gates.shape == (10, 3, 3)
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(10, 3))
    assert not torch.allclose(gates.sum(dim=0), torch.ones(3, 3))
    with torch.no_grad():
        net.gates.weight.zero_()
    experts = net.experts(data.x)
    expected = experts.mean(dim=0).expand(3, -1, -1)
    torch.testing.assert_close(mix(net.gates(data.x), experts), expected)


def test_worked_gate():
    gates = torch.softmax(torch.tensor([[[0.0, math.log(3.0)]]]), dim=-1)
    experts = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    torch.testing.assert_close(mix(gates, experts)[0, 0], torch.tensor([2.5, 3.5]), rtol=0, atol=1e-6)


def test_permuting_experts_with_gate_columns_is_neutral():
    net = build("mmoe", make_spec())
    data = make_data(net, 10)
    expected = net(data.x, data.fields, data.scenario).logits
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for parameter in net.experts.parameters():
            parameter.copy_(parameter[order].clone())
        net.gates.weight.copy_(net.gates.weight[:, :, order].clone())
    torch.testing.assert_close(net(data.x, data.fields, data.scenario).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (2, 3)])
@pytest.mark.parametrize("kind", ["shared", "specific"])
@pytest.mark.parametrize("permuted", [0, 1])
def test_permuting_experts_of_a_ple_level_with_gate_columns_is_neutral(tasks, scenarios, kind, permuted):
    count, heads = 3, tasks * scenarios
    net = build("ple", make_spec(tasks, scenarios), num_shared_experts=count, num_specific_experts=count).double()
    data = make_data(net, 20, dtype=F64)
    expected = net(data.x, data.fields, data.scenario).logits
    level, order = net.levels[permuted], torch.tensor([2, 0, 1])
    # Columns of a head's gate: its specific experts, the shared ones. Of the shared gate: expert j of each head for each j.
    every = count * heads
    if kind == "shared":
        members, columns = order, torch.cat([torch.arange(count), count + order])
        shared_columns = torch.cat([torch.arange(every), every + order])
    else:
        members, columns = (
            (order.view(-1, 1) * heads + torch.arange(heads)).flatten(),
            torch.cat([order, count + torch.arange(3)]),
        )
        shared_columns = torch.cat([members, every + torch.arange(count)])
    with torch.no_grad():
        for parameter in getattr(level, kind).parameters():
            parameter.copy_(parameter[members].clone())
    assert not torch.allclose(net(data.x, data.fields, data.scenario).logits, expected)
    with torch.no_grad():
        level.gates.weight.copy_(level.gates.weight[:, :, columns].clone())
        if level.shared_gate is not None:
            level.shared_gate.weight.copy_(level.shared_gate.weight[:, :, shared_columns].clone())
    torch.testing.assert_close(net(data.x, data.fields, data.scenario).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mmoe", "ple", "shared_bottom", "single_task"])
def test_a_masked_task_does_not_touch_its_own_members(name):
    net = build(name, make_spec())
    data = make_data(net, 16)
    data.mask[:, 0] = 0
    _, gradients = step(net, data)
    own = {"single_task": ["networks.weights.0"], "ple": ["levels.1.gates.weight"], "mmoe": ["gates.weight"]}.get(name, [])
    for key in ["towers.weight", "towers.bias", "towers.hidden.weights.0", *own]:
        assert (gradients[key][0] == 0).all(), key
        assert (gradients[key][1] != 0).any(), key


def test_ple_levels_below_the_last_mix_heads_and_the_last_does_not():
    net = build("ple", make_spec())
    data = make_data(net, 64)
    data.mask[:, 1] = 0
    _, gradients = step(net, data)
    first, last = (gradients[f"levels.{level}.specific.weights.0"].view(2, 2, -1) for level in (0, 1))
    assert (first[:, 1] != 0).any()
    assert (last[:, 1] == 0).all()
    assert (last[:, 0] != 0).any()


@pytest.mark.parametrize(
    ("levels", "options"), [(1, {}), (2, {}), (3, {}), (3, {"num_shared_experts": 0}), (4, {"num_specific_experts": 0})]
)
def test_ple_heads_own_exactly_what_one_head_trains(levels, options):
    net = build("ple", make_spec(3), num_levels=levels, **options)
    data = make_data(net, 256)
    trained = []
    for task in range(3):
        data.mask = torch.zeros_like(data.mask)
        data.mask[:, task] = 1
        trained.append(step(net, data)[1])
    for key, _ in net.named_parameters():
        own = []
        for task, gradients in enumerate(trained):
            # Member m of a stack of heads is head m modulo 3; a stack of another size belongs to no head.
            members = gradients[key].reshape(-1, 3, gradients[key][0].numel()) if len(gradients[key]) % 3 == 0 else None
            own.append(members is not None and not members[:, [h for h in range(3) if h != task]].any())
        assert all(own) == (net.owner(key) == "head"), key


def test_ple_without_shared_experts_shares_nothing():
    for levels in (1, 2):
        net = build("ple", make_spec(), num_levels=levels, num_shared_experts=0)
        data = make_data(net, 16)
        data.mask[:, 1] = 0
        _, gradients = step(net, data)
        for key, gradient in gradients.items():
            assert (gradient.view(-1, 2, gradient.numel() // gradient.shape[0])[:, 1] == 0).all(), key


def test_ple_refuses_no_experts_and_warns_about_many():
    with pytest.raises(ValueError, match="must not both be 0"):
        method("ple").Config(num_shared_experts=0, num_specific_experts=0)
    with pytest.warns(UserWarning, match="17 heads x 2"):
        build("ple", make_spec(1, 17))


def test_gate_extra_fields_reach_the_gates_only():
    spec = make_spec()
    net = build("mmoe", spec, gate_extra_fields=["f1"])
    data = make_data(net, 8)
    moved = {**data.fields, "f1": data.fields["f1"] + 1}
    before, after = (net(data.x, fields, data.scenario).logits for fields in (data.fields, moved))
    assert not torch.equal(before, after)
    # One expert: whatever the gates say, the towers read the same.
    alone = build("mmoe", spec, gate_extra_fields=["f1"], num_experts=1)
    one, two = (alone(data.x, fields, data.scenario).logits for fields in (data.fields, moved))
    assert torch.equal(one, two)
    with pytest.raises(ConfigError, match=r"gate_extra_fields: no field 'f9'.*f0, f1, f2"):
        build("mmoe", spec, gate_extra_fields=["f9"])


@pytest.mark.parametrize("use_bn", [False, True])
def test_a_branch_trained_alone_equals_the_joint_run(use_bn):
    spec = make_spec(2, 2, seed=3)
    joint, alone = build("single_task", spec, use_bn=use_bn), build("single_task", spec, branches=[2], use_bn=use_bn)
    data = make_data(joint, 32)
    loss = joint.make_loss(LossOptions())
    for net in (joint, alone):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        # Branch 2 is task 1 in scenario 0. Every branch has its own denominator, so nothing of the joint run is needed.
        x, mask = (data.x, data.mask) if net is joint else (data.x[:, 2:3], data.mask.clone())
        if net is alone:
            mask[:, 0], mask[data.scenario == 1] = 0, 0
        for _ in range(3):
            optimizer.zero_grad()
            output = net(x, {}, data.scenario)
            denominators = loss.denominators(data.labels, mask, data.scenario, data.weight)
            terms = loss(output, data.labels, mask, data.scenario, data.weight, denominators)
            sum(terms.values()).backward()
            optimizer.step()
    started = build("single_task", spec, branches=[2], use_bn=use_bn)
    assert not torch.equal(started.towers.weight, alone.towers.weight)
    for (key, both), one in zip(joint.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(both.view(4, -1)[2], one.view(-1), rtol=1e-4, atol=1e-6, msg=key)


def test_single_task_refuses_bad_branches():
    with pytest.raises(ConfigError, match=r"model.branches: \[2\].* 0\.\.1"):
        build("single_task", make_spec(), branches=[2])


def test_mlp_refuses_mixed_kinds():
    tasks = make_spec().tasks
    mixed = (tasks[0], tasks[1].model_copy(update={"kind": "regression"}))
    with pytest.raises(ConfigError, match="both binary and regression"):
        build("mlp", ModelSpec("mtl", mixed, 1, {"f": 4}, 0))


@pytest.mark.parametrize("name", ["mmoe", "ple", "shared_bottom", "single_task"])
@pytest.mark.parametrize("tasks", [1, 2])
def test_relabelling_scenarios_with_their_parameters_changes_nothing(name, tasks):
    scenarios = 3
    net = build(name, make_spec(tasks, scenarios)).double()
    data = make_data(net, 30, dtype=F64)
    expected = net(data.x, data.fields, data.scenario).logits
    new_id = torch.tensor([2, 0, 1])

    def relabel(members):
        """Members [.., t * S + s, ...] in dimension 0, moved to their scenarios' new ids."""
        by_scenario = members.reshape(-1, scenarios, members[0].numel())
        return by_scenario[:, new_id.argsort()].reshape(members.shape)

    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith("shared_gate.weight"):  # Its columns are the specific experts, then the shared ones.
                columns = parameter[0].t().clone()
                count = net.levels[0].specific.stack
                columns[:count] = relabel(columns[:count])
                parameter[0] = columns.t()
            elif any(part in key.split(".") for part in ("towers", "gates", "specific", "networks")):
                parameter.copy_(relabel(parameter))
    x = data.x
    if net.tables_per_branch:
        x = relabel(x.transpose(0, 1)).transpose(0, 1)
    moved = net(x, data.fields, new_id[data.scenario]).logits
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
