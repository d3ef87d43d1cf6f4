"""ESCM2's counterfactual risks: worked by hand, against loops over rows, without bias in simulation, and over ranks."""

from __future__ import annotations

import math
import os
import socket

import pytest
import torch
import torch.distributed as dist

from mmlrec.losses import LossOptions, chain_logit
from mmlrec.output import Output
from tests.models.support import build, losses, make_data, make_spec, step
from tests.processes import spawn

F64 = torch.float64
NORMS = ("exposure", "click", "snips")
VARIANTS = [("ips", True), ("dr", True), ("dr", False)]


def risk(a, c, o, r, imputed=None, weight=None, scenario=None, reduction="pooled", mask=None, **options):
    """lambda_c L_cvr (lambda_c = 1 unless given) of rows with logits a, c and labels o, r."""
    scenarios = 1 if scenario is None else int(scenario.max()) + 1
    variant = "ips" if imputed is None else "dr"
    net = build("escm2", make_spec(2, scenarios), **{"variant": variant, "lambda_c": 1.0} | options)
    named = {"ctr": a, "cvr": c, "ctcvr": chain_logit(a, c)} | ({} if imputed is None else {"imputed_error": imputed})
    output = Output(torch.stack([a, named["ctcvr"]], dim=1), named=named)
    labels = torch.stack([o, r], dim=1)
    targets = (
        labels,
        torch.ones_like(labels) if mask is None else mask,
        torch.zeros(len(a), dtype=torch.long) if scenario is None else scenario,
        torch.ones_like(a) if weight is None else weight,
    )
    loss = net.make_loss(LossOptions(reduction))
    return loss(output, *targets, loss.denominators(*targets))["counterfactual"]


def f64(*values):
    return torch.tensor(values, dtype=F64)


CTR = f64(0.0, -math.log(3), 0.3, -0.2)  # ctr = 1/2, 1/4, ., .
CLICKS = f64(1, 1, 0, 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1.0397208),
        ({"propensity_weight_max": 3.0}, 0.8664340),
        ({"ips_norm": "click"}, 2.0794415),
        ({"ips_norm": "snips"}, 0.6931472),
    ],
)
def test_ips_worked_by_hand(options, expected):
    for r in (f64(1, 0, 0, 0), f64(0, 0, 1, 1)):
        assert risk(CTR, torch.zeros(4, dtype=F64), CLICKS, r, **options).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dr_detach", [True, False])
def test_dr_worked_by_hand(dr_detach):
    imputed = torch.full((4,), 0.5, dtype=F64, requires_grad=True)
    value = risk(CTR, torch.zeros(4, dtype=F64), CLICKS, CLICKS, imputed=imputed, dr_detach=dr_detach)
    assert value.item() == pytest.approx(0.7897208 + 0.0559588, abs=1.5e-7)
    if dr_detach:
        # Apart: d^ learns from the squared error alone, whose derivative is -2 o omega (delta - d^) / N for each row. All
        # clicked rows have one delta - d^ = ln 2 - 0.5, so that the square is -(ln 2 - 0.5) / 2 times the derivatives' sum.
        (slope,) = torch.autograd.grad(value, imputed)
        squared = -(math.log(2) - 0.5) / 2 * slope.sum().item()
        assert squared == pytest.approx(0.0559588, abs=1e-7)
        assert value.item() - squared == pytest.approx(0.7897208, abs=1e-7)


def batch(rows=23, seed=0):
    g = torch.Generator().manual_seed(seed)
    a, c = torch.randn(2, rows, generator=g, dtype=F64) * 2
    o, r = (torch.rand(2, rows, generator=g) < 0.5).to(F64)
    imputed, weight = torch.rand(2, rows, generator=g, dtype=F64) + 0.2
    return a, c, o, r, imputed, weight, torch.arange(rows) % 3


def plain(rows, a, c, o, r, imputed, weight, norm, cap):
    """The risk of some rows, one after the other."""
    total = sum(weight[b].item() for b in rows)
    direct = corrected = squared = divisor = 0.0
    for b in rows:
        omega = min(1 + math.exp(-a[b].item()), cap)
        p = 1 / (1 + math.exp(-c[b].item()))
        delta = -math.log(p if r[b] == 1 else 1 - p)
        guess = 0.0 if imputed is None else imputed[b].item()
        w, clicked = weight[b].item(), o[b].item()
        direct += w * guess
        corrected += w * clicked * omega * (delta - guess)
        squared += 0.0 if imputed is None else w * clicked * omega * (delta - guess) ** 2
        divisor += w * {"exposure": 1.0, "click": clicked, "snips": clicked * omega}[norm]
    return direct / total, corrected / divisor, squared / divisor


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", ["ips", "dr"])
def test_equals_a_loop_over_rows(norm, variant):
    a, c, o, r, imputed, weight, _ = batch()
    imputed = None if variant == "ips" else imputed
    found = risk(a, c, o, r, imputed, weight, ips_norm=norm, propensity_weight_max=4.0)
    expected = sum(plain(range(23), a, c, o, r, imputed, weight, norm, 4.0))
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_balanced_is_a_mean_over_scenarios():
    a, c, o, r, imputed, weight, scenario = batch()
    found = risk(a, c, o, r, imputed, weight, scenario, "balanced")
    parts = [
        sum(plain([b for b in range(23) if b % 3 == s], a, c, o, r, imputed, weight, "exposure", 1000.0)) for s in range(3)
    ]
    assert found.item() == pytest.approx(sum(parts) / 3, rel=1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", ["ips", "dr"])
def test_rows_without_a_click_label_and_clicked_ones_without_a_conversion_label_are_left_out(norm, variant):
    a, c, o, r, imputed, weight, _ = batch()
    imputed = None if variant == "ips" else imputed
    expected = plain(range(4, 23), a, c, o, r, imputed, weight, norm, 1000.0)
    mask = torch.ones(23, 2, dtype=F64)
    o, r = o.clone(), r.clone()
    # Either the mask or the label says that it is missing.
    mask[0, 0], o[1], r[2], mask[3, 1] = 0, math.nan, math.nan, 0
    o[2:4] = 1
    found = risk(a, c, o, r, imputed, weight, mask=mask, ips_norm=norm)
    assert found.item() == pytest.approx(sum(expected), rel=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_click_the_risk_is_zero(norm):
    a, c, _, r, *_ = batch()
    assert risk(a, c, torch.zeros_like(a), r, ips_norm=norm).item() == 0


@pytest.mark.parametrize("variant", ["ips", "dr"])
@pytest.mark.parametrize("scenarios", [1, 3])
@pytest.mark.parametrize("lambda_g", [1.0, 0.3])
def test_without_the_counterfactual_risk_it_is_esmm(variant, scenarios, lambda_g):
    net = build("escm2", make_spec(2, scenarios), variant=variant, lambda_c=0.0, lambda_g=lambda_g)
    esmm = build("esmm", make_spec(2, scenarios))
    with torch.no_grad():
        for mine, theirs in zip(esmm.parameters(), net.parameters(), strict=False):
            mine.copy_(theirs)
    data = make_data(net, 50)
    expected = losses(esmm, data)
    found = losses(net, data)
    assert found["counterfactual"] == 0
    torch.testing.assert_close(found["t0"], expected["t0"], rtol=0, atol=0)
    torch.testing.assert_close(found["t1"], lambda_g * expected["t1"], rtol=1e-6, atol=0)
    _, gradients = step(net, data)
    esmm.zero_grad()
    (expected["t0"] + lambda_g * expected["t1"]).backward()
    for name, parameter in esmm.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_certain_clicks_leave_the_mean_error_of_clicked_rows(norm):
    _, c, o, r, *_ = batch()
    p = torch.sigmoid(c)
    errors = -(r * p.log() + (1 - r) * (1 - p).log())
    found = risk(torch.full_like(c, 60.0), c, o, r, ips_norm=norm)
    mean = (o * errors).sum() / o.sum()
    torch.testing.assert_close(found, mean * o.mean() if norm == "exposure" else mean)


def test_dr_on_certain_clicks_everywhere_is_the_mean_error_for_any_imputation():
    _, c, _, r, *_ = batch()
    p = torch.sigmoid(c)
    errors = -(r * p.log() + (1 - r) * (1 - p).log())
    for guess in (0.1, 2.0):
        imputed = torch.full_like(c, guess)
        found = risk(torch.full_like(c, 60.0), c, torch.ones_like(c), r, imputed)
        torch.testing.assert_close(found - (errors - imputed).square().mean(), errors.mean())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("variant", "dr_detach"), VARIANTS)
def test_the_risk_gives_the_propensity_no_gradient(norm, variant, dr_detach):
    a, c, o, r, imputed, *_ = batch()
    leaves = [a.requires_grad_(), c.requires_grad_(), imputed.requires_grad_()]
    value = risk(a, c, o, r, None if variant == "ips" else imputed, ips_norm=norm, dr_detach=dr_detach)
    by_ctr, by_cvr, _ = torch.autograd.grad(value, leaves, allow_unused=True)
    assert by_ctr is None
    assert bool((by_cvr[o == 1] != 0).all())
    assert bool((by_cvr[o == 0] == 0).all())


def test_detached_dr_trains_each_tower_by_its_own_term():
    a, c, o, r, imputed, *_ = batch()
    c.requires_grad_(), imputed.requires_grad_()
    by_cvr, by_imputed = torch.autograd.grad(risk(a, c, o, r, imputed), [c, imputed])
    # delta enters the first term alone, which is then the gradient of IPS; d^ the squared error alone.
    (expected,) = torch.autograd.grad(risk(a, c, o, r), [c])
    torch.testing.assert_close(by_cvr, expected)
    omega = (1 + torch.exp(-a)).clamp(max=1000)
    delta = -(r * torch.sigmoid(c).log() + (1 - r) * (1 - torch.sigmoid(c)).log())
    torch.testing.assert_close(by_imputed, (-2 * o * omega * (delta - imputed) / 23).detach())
    joint = torch.autograd.grad(risk(a, c, o, r, imputed, dr_detach=False), [c, imputed])
    slope = torch.sigmoid(c) - r
    torch.testing.assert_close(joint[0], (o * omega * slope * (1 + 2 * (delta - imputed)) / 23).detach())
    torch.testing.assert_close(joint[1], ((1 - o * omega - 2 * o * omega * (delta - imputed)) / 23).detach())


@pytest.mark.parametrize(("variant", "dr_detach"), VARIANTS)
def test_conversions_of_rows_without_a_click_change_nothing(variant, dr_detach):
    net = build("escm2", make_spec(2, 3), variant=variant, dr_detach=dr_detach)
    data = make_data(net, 40)
    total, gradients = step(net, data)
    for label in (1.0, math.nan):
        data.labels[:, 1] = torch.where(data.labels[:, 0] == 0, label, data.labels[:, 1])
        again, others = step(net, data)
        assert torch.equal(total, again)
        assert all(torch.equal(gradients[key], others[key]) for key in gradients)


@pytest.mark.parametrize("norm", NORMS)
def test_inverse_propensities_are_capped(norm):
    a = torch.tensor([math.log(1e-8), -200.0, 0.0])
    c, o, r = torch.zeros(3, requires_grad=True), torch.ones(3), torch.zeros(3)
    value = risk(a, c, o, r, ips_norm=norm)
    expected = {"exposure": 2002 / 3, "click": 2002 / 3, "snips": 1.0}[norm] * math.log(2)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.grad(value, c)[0].isfinite().all()


def test_imputation_runs_in_training_only():
    net = build("escm2", make_spec(2, 3), variant="dr")
    data = make_data(net, 16)
    assert (net(data.x, data.fields, data.scenario).named["imputed_error"] > 0).all()
    net.eval()
    before = net(data.x, data.fields, data.scenario)
    assert sorted(before.named) == ["ctcvr", "ctr", "cvr"]
    assert "counterfactual" not in losses(net, data)
    net.imputation = None
    assert torch.equal(net(data.x, data.fields, data.scenario).logits, before.logits)


@pytest.mark.parametrize("scenarios", [1, 2, 4])
@pytest.mark.parametrize("scenario_towers", ["per_scenario", "shared"])
@pytest.mark.parametrize("use_bn", [False, True])
def test_the_imputed_error_is_that_of_the_own_scenario(scenarios, scenario_towers, use_bn):
    net = build("escm2", make_spec(2, scenarios), variant="dr", scenario_towers=scenario_towers, use_bn=use_bn).double()
    data = make_data(net, 21, dtype=F64)
    if use_bn:  # Statistics of a tower are those of its own scenario's rows; here only that it trains.
        total, gradients = step(net, data)
        assert total.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        return
    found = net(data.x, data.fields, data.scenario).named["imputed_error"]
    for b, x in enumerate(data.x):
        m = data.scenario[b].item() if net.replicas > 1 else 0
        for weight, bias in zip(net.imputation.hidden.weights, net.imputation.hidden.biases, strict=True):
            x = torch.clamp(x @ weight[m] + bias[m], min=0)
        logit = (x @ net.imputation.weight[m])[0] + net.imputation.bias[m]
        assert found[b].item() == pytest.approx(math.log1p(math.exp(logit.item())), rel=1e-10)


@pytest.mark.parametrize("scenarios", [1, 3])
def test_every_parameter_of_dr_trains_and_other_scenarios_stay(scenarios):
    net = build("escm2", make_spec(2, scenarios), variant="dr")
    data = make_data(net, 200)
    _, gradients = step(net, data)
    assert all(bool((gradient != 0).any()) for gradient in gradients.values())
    data.scenario[:] = 0
    _, gradients = step(net, data)
    for key, gradient in gradients.items():
        assert net.owner(key) == ("scenario" if scenarios > 1 else None)
        members = gradient.reshape(-1, scenarios, gradient.numel() // len(gradient))
        assert (members[:, 1:] == 0).all(), key


def test_inverse_propensities_and_dr_estimate_the_risk_of_all_rows_without_bias():
    """The expectation over all patterns of clicks, each with its probability: exact, no simulation noise."""
    g = torch.Generator().manual_seed(1)
    rows = 8
    c = torch.randn(rows, generator=g, dtype=F64).abs() * 2
    a, r = 1.5 * c - 2, torch.zeros(rows, dtype=F64)  # the wrong rows are the likely clicks
    errors, clicked = torch.log1p(torch.exp(c)), torch.sigmoid(a)
    imputed, omega = torch.rand(rows, generator=g, dtype=F64), 1 / torch.sigmoid(a)
    naive = ips = dr = 0.0
    for pattern in range(2**rows):
        o = torch.tensor([pattern >> b & 1 for b in range(rows)], dtype=F64)
        probability = torch.where(o == 1, clicked, 1 - clicked).prod()
        naive += probability * (o * errors).sum() / o.sum().clamp(min=1)
        ips += probability * risk(a, c, o, r, propensity_weight_max=1e12)
        # Without the squared error, which trains the imputation and is not part of the estimate.
        squared = (o * omega * (errors - imputed).square()).mean()
        dr += probability * (risk(a, c, o, r, imputed, propensity_weight_max=1e12) - squared)
    truth = errors.mean().item()
    assert ips.item() == pytest.approx(truth, rel=1e-10)
    assert dr.item() == pytest.approx(truth, rel=1e-10)
    assert naive.item() > 1.2 * truth


def rank_main(rank, port, shares, cases, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=len(shares))
    torch.set_num_threads(1)
    found = {}
    for norm, (net, data) in cases.items():
        own = data.rows(torch.arange(*shares[rank]))
        loss = net.make_loss(LossOptions())
        targets = (own.labels, own.mask, own.scenario, own.weight)
        sums = loss.denominators(*targets)
        dist.all_reduce(sums)
        values = loss(net(own.x, own.fields, own.scenario), *targets, sums, len(shares))
        sum(values.values()).backward()
        flat = torch.cat([torch.stack(list(values.values())).detach(), *[p.grad.flatten() for p in net.parameters()]])
        dist.all_reduce(flat)
        found[norm] = flat / len(shares)
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    cases, expected = {}, {}
    for norm in NORMS:
        net = build("escm2", make_spec(2, 3), variant="dr", ips_norm=norm, dr_detach=False, lambda_c=1.0).double()
        data = make_data(net, 30, dtype=F64)
        data.labels[:4] = 0  # No click on the first rank.
        data.mask[7:9, 0] = 0
        values = torch.stack(list(losses(net, data).values())).detach()
        expected[norm] = torch.cat([values, *[gradient.flatten() for gradient in step(net, data)[1].values()]])
        net.zero_grad()
        cases[norm] = net, data
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(rank_main, (port, ((0, 4), (4, 30)), cases, tmp_path / "mean.pt"), nprocs=2)
    for norm, found in torch.load(tmp_path / "mean.pt").items():
        torch.testing.assert_close(found, expected[norm], rtol=1e-9, atol=1e-12)


def clicks_of_a_usual_log(rows=20_000):
    """Logits whose click rates are 2 % in the mean and .3 % to 10 % in most rows, and clicks drawn with them."""
    g = torch.Generator().manual_seed(3)
    a = math.log(0.015) + 0.9 * torch.randn(rows, generator=g, dtype=F64)
    clicks = (torch.rand(rows, generator=g, dtype=F64) < torch.sigmoid(a)).to(F64)
    assert 0.01 < clicks.mean() < 0.03
    return a, clicks


def test_rows_of_a_usual_click_rate_are_weighed_by_their_own_propensity():
    """With the default bound the slope of IPS has the weights 1 / ctr, row by row; at 15 nearly all rows have one weight."""
    a, clicks = clicks_of_a_usual_log()
    c = torch.zeros(len(a), dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(risk(a, c, clicks, torch.zeros_like(a)), c)
    exact = torch.isclose(slope, clicks / torch.sigmoid(a) * 0.5 / len(a), rtol=1e-10, atol=0)
    assert exact.double().mean() > 0.999
    assert slope[clicks == 1].unique().numel() > 0.99 * clicks.sum()


@pytest.mark.parametrize(("bound", "low", "high"), [(1000.0, 0.0, 0.01), (15.0, 0.8, 1.0)])
def test_the_share_of_clipped_rows_is_in_the_log(bound, low, high):
    a, clicks = clicks_of_a_usual_log()
    net = build("escm2", make_spec(2), propensity_weight_max=bound)
    loss = net.make_loss(LossOptions())
    zeros = torch.zeros_like(a)
    output = Output(torch.stack([a, a], dim=1), named={"ctr": a, "cvr": zeros, "ctcvr": a})
    targets = (torch.stack([clicks, zeros], dim=1), torch.ones(len(a), 2), torch.zeros(len(a), dtype=torch.long), 1 + zeros)
    assert net.diagnostics() == {}
    net.eval()
    loss(output, *targets, loss.denominators(*targets))
    assert net.diagnostics() == {}  # of training batches only
    net.train()
    loss(output, *targets, loss.denominators(*targets))
    share = float((1 / torch.sigmoid(a)[clicks == 1] > bound).double().mean())
    assert low <= share <= high
    assert net.diagnostics() == {"clipped_share": pytest.approx(share)}
    loss(output, targets[0] * 0, *targets[1:], loss.denominators(*targets))
    assert net.diagnostics() == {}  # no clicks
