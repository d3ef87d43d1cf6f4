"""ESMM against loops over rows and scenarios, closed forms, and what a chain of tasks must be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mmlrec.errors import ConfigError
from mmlrec.losses import LossOptions
from mmlrec.models.base.model import ModelSpec
from mmlrec.schema import Setting, Task
from tests.models.support import build, losses, make_data, make_spec, step

F64 = torch.float64


def tower(x, towers, member):
    """One row through one member of a stack of towers, in plain steps."""
    for weight, bias in zip(towers.hidden.weights, towers.hidden.biases, strict=True):
        x = torch.clamp(x @ weight[member] + bias[member], min=0)
    return (x @ towers.weight[member])[0] + towers.bias[member]


def shaken(net):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=g))
    return net


def reference(net, data):
    """Probabilities [B, T, S] of reaching each step, and of each step given the one before."""
    tasks, scenarios = net.spec.num_tasks, net.spec.num_scenarios
    reached = torch.empty(len(data.x), tasks, scenarios, dtype=F64)
    given = torch.empty_like(reached)
    for b, x in enumerate(data.x):
        for s in range(scenarios):
            product = 1.0
            for t in net.chain:
                member = t * scenarios + s if net.replicas > 1 else t
                given[b, t, s] = 1 / (1 + math.exp(-tower(x, net.towers, member).item()))
                product *= given[b, t, s].item()
                reached[b, t, s] = product
    return reached, given


@pytest.mark.parametrize(("tasks", "scenarios"), [(2, 1), (2, 2), (2, 4), (3, 1), (3, 3)])
@pytest.mark.parametrize("scenario_towers", ["per_scenario", "shared"])
@pytest.mark.parametrize("widths", [[13, 7], [5, 70]])
def test_equals_a_loop_over_rows_and_scenarios(tasks, scenarios, scenario_towers, widths):
    spec = make_spec(tasks, scenarios, fields=2, dim=4, num_dense=3, seed=tasks)
    net = shaken(build("esmm", spec, expert_hidden_units=widths, scenario_towers=scenario_towers).double())
    data = make_data(net, 11, dtype=F64)
    reached, given = reference(net, data)
    output = net(data.x, data.fields, data.scenario, return_all_heads=True)
    torch.testing.assert_close(torch.sigmoid(output.all_logits), reached.flatten(1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(output.all_logits, torch.logit(reached.flatten(1)), rtol=1e-6, atol=1e-6)
    rows = torch.arange(11)
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 1e-5)):
        output = net.to(dtype)(data.x.to(dtype), data.fields, data.scenario)
        own = torch.logit(reached[rows, :, data.scenario])
        torch.testing.assert_close(output.logits.to(F64), own, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(output.named["ctr"], output.logits[:, 0], rtol=0, atol=0)
        torch.testing.assert_close(output.named["ctcvr"], output.logits[:, -1], rtol=0, atol=0)
        cvr = given[rows, 1:, data.scenario].prod(dim=1)
        torch.testing.assert_close(torch.sigmoid(output.named["cvr"]).to(F64), cvr, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scenarios", [1, 3])
@pytest.mark.parametrize("reduction", ["pooled", "balanced"])
def test_losses_are_entropies_of_the_products_over_all_labelled_rows(scenarios, reduction):
    net = shaken(build("esmm", make_spec(2, scenarios)).double())
    data = make_data(net, 29, dtype=F64)
    g = torch.Generator().manual_seed(4)
    data.mask = (torch.rand(29, 2, generator=g) < 0.8).to(F64)
    data.weight = torch.rand(29, generator=g, dtype=F64) + 0.5
    reached, _ = reference(net, data)
    found = losses(net, data, reduction)
    assert list(found) == ["t0", "t1"]
    for t in range(2):
        sums, norms = [0.0] * scenarios, [0.0] * scenarios
        for b, s in enumerate(data.scenario.tolist()):
            # Without a click there is no conversion, labelled or not.
            unclicked = t == 1 and data.mask[b, 0] == 1 and data.labels[b, 0] == 0
            p, share = reached[b, t, s].item(), data.weight[b].item() * float(unclicked or data.mask[b, t])
            sums[s] -= share * math.log(p if data.labels[b, t] == 1 else 1 - p)
            norms[s] += share
        pooled = sum(sums) / sum(norms)
        balanced = sum(a / n for a, n in zip(sums, norms, strict=True)) / scenarios
        assert found[f"t{t}"].item() == pytest.approx(pooled if reduction == "pooled" else balanced, rel=1e-10)


def plain_step(net, data, reduction):
    """Losses, denominators and gradients."""
    sums = net.make_loss(LossOptions(reduction)).denominators(data.labels, data.mask, data.scenario, data.weight)
    found = losses(net, data, reduction)
    return [sums, *found.values(), *step(net, data, reduction)[1].values()]


@pytest.mark.parametrize("reduction", ["pooled", "balanced"])
@pytest.mark.parametrize(
    ("name", "options"), [("esmm", {}), ("aitm", {}), ("escm2", {}), ("escm2", {"variant": "dr", "ips_norm": "snips"})]
)
def test_a_label_missing_after_a_step_not_taken_is_0(name, options, reduction):
    tasks = 2 if name == "escm2" else 3
    net = build(name, make_spec(tasks, 2), **options)

    def batch():
        data = make_data(net, 40)
        data.weight = torch.rand(40, generator=torch.Generator().manual_seed(2)) + 0.5
        data.mask[::5, 0] = 0  # These stay out: nobody knows whether there was a click.
        data.mask[::5, 1:] = 0
        return data

    expected = plain_step(net, batch(), reduction)
    rows = (batch().labels[:, 0] == 0) & (batch().mask[:, 0] == 1)
    assert 10 < rows.sum() < 30
    by_label, by_mask = batch(), batch()
    by_label.labels[rows, 1:] = math.nan
    by_mask.mask[rows, 1:] = 0
    by_mask.labels[rows, 1:] = 1.0
    for data in (by_label, by_mask):
        assert all(map(torch.equal, plain_step(net, data, reduction), expected))


@pytest.mark.parametrize("name", ["esmm", "aitm", "escm2"])
def test_a_label_missing_after_a_step_taken_stays_missing(name):
    net = build(name, make_spec())
    data = make_data(net, 40)
    rows = (data.labels[:, 0] == 1).nonzero().flatten()[:4]
    data.mask[rows, 1] = 0
    sums = net.make_loss(LossOptions()).denominators(data.labels, data.mask, data.scenario, data.weight)
    assert sums.tolist() == [40, 36]
    values = []
    for label in (0.0, 1.0, math.nan):
        data.labels[rows, 1] = label
        values.append(losses(net, data)["t1"])
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_labels_that_are_no_chain_imply_nothing():
    for name, counted in (("esmm", 30), ("aitm", 30), ("escm2", 40)):  # ESCM2 takes the product with the click.
        net = build(name, make_spec(), allow_non_chain=True)
        data = make_data(net, 40)
        data.labels[:10] = torch.tensor([0.0, math.nan])
        sums = net.make_loss(LossOptions()).denominators(data.labels, data.mask, data.scenario, data.weight)
        assert sums.tolist() == [40, counted]


def with_logits(net, a, c):
    """The network with constant logits a (ctr) and c (cvr)."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.towers.bias.copy_(torch.tensor([a, c], dtype=F64))
    return net


def one_row(net, click, conversion, dtype=torch.float32):
    data = make_data(net, 1, dtype=dtype)
    data.labels = torch.tensor([[click, conversion]], dtype=dtype)
    return data


def test_worked_numbers_and_their_gradients():
    net = with_logits(build("esmm", make_spec()).double(), 2.0, -1.0)
    output = net(*(lambda d: (d.x, d.fields, d.scenario))(make_data(net, 1, dtype=F64)))
    assert output.logits[0, 1].item() == pytest.approx(-1.1698460, abs=1e-7)
    for label, expected in ((1.0, 1.4401897), (0.0, 0.2703437)):
        data = one_row(net, 1.0, label, F64)
        net.zero_grad()
        loss = losses(net, data)["t1"]
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-7)
        p = 0.2368828180
        closed = [1 / (1 + math.exp(z)) * (p - label) / (1 - p) for z in (2.0, -1.0)]
        assert net.towers.bias.grad.tolist() == pytest.approx(closed, abs=1e-7)
    assert closed[0] == pytest.approx(0.0370023, abs=1e-7)


def test_a_certain_click_leaves_the_conversion_loss():
    net = with_logits(build("esmm", make_spec()).double(), 50.0, -0.7)
    for label in (0.0, 1.0):
        p = 1 / (1 + math.exp(0.7))
        expected = -math.log(p if label else 1 - p)
        assert losses(net, one_row(net, 1.0, label, F64))["t1"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scenarios", [1, 3])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["esmm", "aitm", "escm2"])
def test_extreme_logits_have_finite_losses_and_gradients(name, autocast, scenarios):
    for options in [{}, *([{"variant": "dr", "dr_detach": False, "ips_norm": "snips"}] if name == "escm2" else [])]:
        net = build(name, make_spec(2, scenarios), **options)
        data = make_data(net, 4 * scenarios)
        # A dispatched row meets the towers of its own scenario only.
        assert (net.chain_dispatch(data.scenario, [8], False) is not None) == (scenarios > 1)
        data.labels = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]).repeat(scenarios, 1)
        data.scenario = torch.arange(4 * scenarios) // 4
        for a in (-200.0, 0.0, 200.0):
            for c in (-200.0, 200.0):
                with torch.no_grad():
                    net.towers.bias.copy_(torch.tensor([a, c]).repeat_interleave(scenarios))
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits = net(data.x, data.fields, data.scenario).logits
                    assert logits.dtype == torch.float32
                    total, gradients = step(net, data)
                assert logits.isfinite().all()
                assert total.dtype == torch.float32
                assert total.isfinite()
                assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["esmm", "escm2"])
def test_the_roles_decide_which_task_is_which(name):
    spec = make_spec()
    turned = replace(spec, tasks=spec.tasks[::-1])
    net, other = build(name, spec), build(name, turned)
    assert (net.chain, other.chain) == ((0, 1), (1, 0))
    swapped = build(name, spec, roles=["t1", "t0"])
    data = make_data(net, 40)
    values = losses(net, data)
    assert losses(swapped, data)["t1"] != values["t1"]
    # The same network on the same columns the other way round.
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
            mine.copy_(theirs.flip(0))
    named = [n(data.x, data.fields, data.scenario).named for n in (net, other)]
    for key in ("ctr", "cvr", "ctcvr"):
        torch.testing.assert_close(named[1][key], named[0][key], msg=key)
    data.labels = data.labels.flip(1)
    for key, value in losses(other, data).items():
        torch.testing.assert_close(value, values[key])


@pytest.mark.parametrize("name", ["esmm", "escm2", "aitm"])
def test_a_shared_chain_belongs_to_no_scenario(name):
    net = build(name, make_spec(2, 3), scenario_towers="shared")
    data = make_data(net, 300)
    for s in range(3):
        _, gradients = step(net, data.rows(data.scenario == s))
        assert all((gradient != 0).any() for gradient in gradients.values())
    assert {net.owner(key) for key, _ in net.named_parameters()} <= {None, "task"}


def test_a_shared_chain_does_not_look_at_the_scenario():
    net = build("esmm", make_spec(2, 3), scenario_towers="shared")
    data = make_data(net, 20)
    before = net(data.x, data.fields, data.scenario).logits
    assert torch.equal(before, net(data.x, data.fields, (data.scenario + 1) % 3).logits)


@pytest.mark.parametrize(
    ("name", "options", "tiny", "benchmark"),
    [
        ("esmm", {}, 362, 95_234),
        ("escm2", {}, 362, 95_234),
        ("escm2", {"variant": "dr"}, 543, 142_851),
        ("aitm", {}, 512, 160_898),
        ("aitm", {"use_tower": True, "ait_bias": True}, 582, 177_666),
    ],
)
def test_parameter_counts(name, options, tiny, benchmark):
    def size(net):
        return sum(p.numel() for p in net.parameters())

    net = build(name, make_spec(), **options)
    assert size(net) == tiny
    large = type(net)(make_spec(fields=7, dim=8, num_dense=0), type(net).Config(**options))
    assert size(large) == benchmark
    assert size(build(name, make_spec(2, 3), scenario_towers="shared", **options)) == tiny
    if name != "aitm":  # AITM shares its attention over scenarios; see its tests.
        assert size(build(name, make_spec(2, 3), **options)) == 3 * tiny


def chain_spec(*tasks, setting=Setting.MTL, scenarios=1):
    return ModelSpec(setting, tuple(tasks), scenarios, {"f": 4}, 1)


@pytest.mark.parametrize("name", ["esmm", "aitm", "escm2"])
@pytest.mark.parametrize(
    ("tasks", "roles", "message"),
    [
        ((Task(name="a"), Task(name="b")), None, r"needs a chain.*'a': None, 'b': None.*model\.roles.*mmoe"),
        ((Task(name="a", role="ctr"), Task(name="b")), None, r"needs a chain.*'a': 'ctr', 'b': None"),
        ((Task(name="a", role="ctr"), Task(name="b", role="ctr")), None, r"needs a chain.*once each"),
        ((Task(name="a"), Task(name="b")), ["a", "c"], r"model\.roles: no task 'c'"),
        ((Task(name="a"), Task(name="b")), ["a", "a"], r"model\.roles: \['a', 'a'\] must name each of the tasks"),
        ((Task(name="a"), Task(name="b")), ["a"], r"model\.roles: \['a'\] must name each of the tasks"),
    ],
)
def test_a_chain_without_its_roles_is_refused(name, tasks, roles, message):
    with pytest.raises(ConfigError, match=message):
        build(name, chain_spec(*tasks), roles=roles)


@pytest.mark.parametrize("name", ["esmm", "aitm", "escm2"])
def test_settings_and_tasks_that_are_no_chain_are_refused(name):
    method = type(build(name, make_spec()))
    with pytest.raises(ConfigError, match=rf"{method.__name__} is not defined for setting 'msl'.*'mtl' or 'mtmsl'"):
        method.check_setting(chain_spec(Task(name="a"), setting=Setting.MSL, scenarios=2))
    with pytest.raises(ConfigError, match=rf"{method.__name__} in setting 'mtl' needs binary tasks, \['b'\] are regression"):
        method.check_setting(chain_spec(Task(name="a"), Task(name="b", kind="regression")))
    method.check_setting(chain_spec(Task(name="a"), Task(name="b")))
    three = chain_spec(Task(name="a"), Task(name="b"), Task(name="c"))
    if name == "escm2":
        with pytest.raises(ConfigError, match=r"ESCM2 in setting 'mtl' needs exactly 2 tasks.*esmm or aitm"):
            method.check_setting(three)
    else:
        method.check_setting(three)


def test_a_funnel_of_the_dataset_is_a_chain_without_roles():
    funnel = (Task(name="view", implied_by_next=True), Task(name="cart", implied_by_next=True), Task(name="buy"))
    assert build("esmm", chain_spec(*funnel)).chain == (0, 1, 2)
    assert build("esmm", chain_spec(*funnel[1:])).chain == (0, 1)
    with pytest.raises(ConfigError, match="needs a chain"):
        build("esmm", chain_spec(*funnel[::-1]))
    assert build("esmm", chain_spec(*funnel[::-1]), roles=["view", "cart", "buy"]).chain == (2, 1, 0)
