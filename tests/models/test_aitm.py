"""AITM against a loop over rows, steps and scenarios; its attention and calibrator worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mmlrec.losses import LossOptions
from mmlrec.output import Output
from tests.models.support import build, losses, make_data, make_spec, step

F64 = torch.float64


def relu_chain(x, weights, biases):
    for weight, bias in zip(weights, biases, strict=True):
        x = torch.clamp(x @ weight + bias, min=0)
    return x


def reference(net, x, s):
    """Logits of one row in scenario s, step after step."""
    replicas, logits, before = net.replicas, [None] * net.spec.num_tasks, None
    for number, t in enumerate(net.chain):
        m = t * replicas + (s if replicas > 1 else 0)
        bottom = net.bottoms
        a = relu_chain(x, [w[m] for w in bottom.weights], [b[m] for b in bottom.biases])
        if before is not None:
            transfer = net.transfers[number - 1]
            pair = [relu_chain(before, transfer.weights, transfer.biases), a]
            biases = torch.zeros(3, len(a), dtype=F64) if net.map_biases is None else net.map_biases
            query, key, value = ([u @ net.maps[i] + biases[i] for u in pair] for i in range(3))
            exps = [math.exp((query[i] @ key[i]).item() / math.sqrt(len(a))) for i in range(2)]
            a = sum(e / sum(exps) * v for e, v in zip(exps, value, strict=True))
        hidden = relu_chain(a, [w[m] for w in net.towers.hidden.weights], [b[m] for b in net.towers.hidden.biases])
        logits[t] = (hidden @ net.towers.weight[m])[0] + net.towers.bias[m]
        before = a
    return torch.stack(logits)


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (2, 2), (2, 4), (3, 1), (4, 3)])
@pytest.mark.parametrize("scenario_towers", ["per_scenario", "shared"])
@pytest.mark.parametrize("options", [{}, {"use_tower": True, "tower_hidden_units": [5], "ait_bias": True}])
def test_equals_a_loop_over_rows_and_steps(tasks, scenarios, scenario_towers, options):
    spec = make_spec(tasks, scenarios, fields=2, dim=4, num_dense=3, seed=tasks)
    net = build("aitm", spec, expert_hidden_units=[13, 7], scenario_towers=scenario_towers, **options).double()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=F64, generator=g))
    data = make_data(net, 11, dtype=F64)
    expected = torch.stack([torch.stack([reference(net, x, s) for s in range(scenarios)], dim=1) for x in data.x])
    every = net(data.x, data.fields, data.scenario, return_all_heads=True).all_logits
    torch.testing.assert_close(every, expected.flatten(1), rtol=1e-6, atol=1e-6)
    own = expected[torch.arange(11), :, data.scenario]
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 1e-5)):
        logits = net.to(dtype)(data.x.to(dtype), data.fields, data.scenario).logits
        torch.testing.assert_close(logits.to(F64), own, rtol=tolerance, atol=tolerance)


def test_the_roles_order_the_steps():
    net = build("aitm", make_spec(3), roles=["t2", "t0", "t1"]).double()
    data = make_data(net, 5, dtype=F64)
    expected = torch.stack([reference(net, x, 0) for x in data.x])
    torch.testing.assert_close(net(data.x, data.fields, data.scenario).logits, expected, rtol=1e-10, atol=1e-10)


def test_attention_worked_by_hand():
    net = build("aitm", make_spec(), expert_hidden_units=[2]).double()
    with torch.no_grad():
        net.maps.copy_(torch.eye(2).expand(3, 2, 2))
    mixed = net.mix(torch.tensor([[0.0, 2.0]], dtype=F64), torch.tensor([[1.0, 0.0]], dtype=F64))
    assert mixed[0].tolist() == pytest.approx([0.1070418, 1.7859164], abs=1e-7)


@pytest.mark.parametrize("scenarios", [1, 3])
def test_attention_that_selects_the_own_candidate_gives_independent_towers(scenarios):
    net = build("aitm", make_spec(2, scenarios)).double()
    with torch.no_grad():
        net.maps.copy_(torch.eye(6).expand(3, 6, 6))
        net.maps[0] *= 1e6
        for transfer in net.transfers:
            for parameter in transfer.parameters():
                parameter.zero_()
        for bias in net.bottoms.biases:
            bias.add_(0.2)  # No own candidate is all zeros, so that its score is above that of the zeros passed on.
    alone = build("esmm", make_spec(2, scenarios)).double()
    with torch.no_grad():
        for mine, theirs in zip(alone.towers.hidden.parameters(), net.bottoms.parameters(), strict=True):
            mine.copy_(theirs)
        alone.towers.weight.copy_(net.towers.weight)
        alone.towers.bias.copy_(net.towers.bias)
    data = make_data(net, 30, dtype=F64)
    heads = net(data.x, data.fields, data.scenario, return_all_heads=True).all_logits
    torch.testing.assert_close(heads, alone.towers(data.x), rtol=1e-9, atol=1e-9)


def calibrator(net, logits, labels=None, mask=None, weight=None):
    rows = len(logits)
    loss = net.make_loss(LossOptions())
    labels = torch.ones_like(logits) if labels is None else labels  # After a 0 a missing label would count as 0.
    mask = torch.ones_like(logits) if mask is None else mask
    weight = torch.ones(rows, dtype=logits.dtype) if weight is None else weight
    targets = (labels.detach(), mask.detach(), torch.zeros(rows, dtype=torch.long), weight)
    return loss(Output(logits), *targets, loss.denominators(*targets))["calibrator"]


def test_calibrator_worked_by_hand():
    net = build("aitm", make_spec(), aitm_constraint_weight=1.0)
    logits = torch.tensor([[0.0, 1.0]], dtype=F64, requires_grad=True)
    value = calibrator(net, logits)
    assert value.item() == pytest.approx(0.2310586, abs=1e-7)
    (gradient,) = torch.autograd.grad(value, logits)
    # Down for the later step, up for the earlier: the same amount in probability.
    in_probability = gradient[0] / (torch.sigmoid(logits[0]) * (1 - torch.sigmoid(logits[0])))
    assert in_probability.tolist() == pytest.approx([-1.0, 1.0], rel=1e-12)
    assert calibrator(net, torch.tensor([[1.0, 0.0], [2.0, 2.0]])).item() == 0


def test_calibrator_is_a_mean_over_rows_with_both_labels():
    net = build("aitm", make_spec(3))
    g = torch.Generator().manual_seed(0)
    logits, weight = torch.randn(17, 3, generator=g, dtype=F64) * 2, torch.rand(17, generator=g, dtype=F64) + 0.5
    mask = torch.ones(17, 3, dtype=F64)
    mask[3:6, 1] = 0
    p = 1 / (1 + torch.exp(-logits))
    expected = 0.0
    for t in (1, 2):
        norm = sum(weight[b].item() for b in range(17) if mask[b, t])
        for b in range(17):
            if mask[b, t] and mask[b, t - 1]:
                expected += 0.6 * weight[b].item() * max(0.0, (p[b, t] - p[b, t - 1]).item()) / norm
    assert calibrator(net, logits, mask=mask, weight=weight).item() == pytest.approx(expected, rel=1e-12)
    labels = torch.ones(17, 3, dtype=F64)
    labels[mask == 0] = math.nan
    assert calibrator(net, logits, labels=labels, weight=weight).item() == pytest.approx(expected, rel=1e-12)


def test_calibrator_over_ranks_equals_one_process():
    net = build("aitm", make_spec())
    loss = net.make_loss(LossOptions())
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 2, generator=g, dtype=F64)
    targets = [torch.zeros(12, 2), torch.ones(12, 2), torch.zeros(12, dtype=torch.long), torch.ones(12)]
    targets[1][:5, 0] = 0
    whole = loss(Output(logits), *targets, loss.denominators(*targets))
    parts = [slice(0, 3), slice(3, 12)]
    total = sum(loss.denominators(*(t[r] for t in targets)) for r in parts)
    each = [loss(Output(logits[r]), *(t[r] for t in targets), total, world_size=2) for r in parts]
    for name, value in whole.items():
        torch.testing.assert_close((each[0][name] + each[1][name]) / 2, value, rtol=1e-6, atol=0)


def test_the_second_loss_trains_the_first_network_and_not_the_other_way_round():
    net = build("aitm", make_spec(), aitm_constraint_weight=0.0)
    data = make_data(net, 64)
    data.labels[:] = 1  # A first step not taken would tell the second.
    for only, touched in ((0, (True, False)), (1, (True, True))):
        data.mask = torch.zeros_like(data.mask)
        data.mask[:, only] = 1
        _, gradients = step(net, data)
        for member, expected in enumerate(touched):
            assert bool((gradients["bottoms.weights.0"][member] != 0).any()) == expected


def test_what_is_passed_on_is_dropped_out():
    """With dropout in the transfers only, the first step's logit is fixed and the second one's is not."""
    net = build("aitm", make_spec(), dropout=0.5)
    net.bottoms.dropout = 0.0
    data = make_data(net, 32)
    first, second = (net(data.x, data.fields, data.scenario).logits for _ in range(2))
    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.equal(first[:, 1], second[:, 1])


def test_attention_is_shared_over_scenarios():
    one, three = build("aitm", make_spec()), build("aitm", make_spec(2, 3))
    shared = 6 * 6 + 6 + 3 * 6 * 6
    assert sum(p.numel() for p in three.parameters()) == 3 * (sum(p.numel() for p in one.parameters()) - shared) + shared


def test_without_weight_the_calibrator_adds_nothing():
    net = build("aitm", make_spec(), aitm_constraint_weight=0.0)
    assert losses(net, make_data(net, 8))["calibrator"] == 0
