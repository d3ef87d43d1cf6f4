"""Losses against hand-worked numbers, a loop, and the gradient of one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmlrec.errors import ConfigError
from mmlrec.losses import Loss, LossOptions, chain_logit
from mmlrec.models.single_task import BranchLoss
from mmlrec.output import Output
from mmlrec.schema import Task

BINARY = (Task(name="click"), Task(name="buy"))


def call(loss, logits, labels, mask, scenario, weight, denominators=None, world_size=1):
    if denominators is None:
        denominators = loss.denominators(labels, mask, scenario, weight)
    return loss(Output(logits), labels, mask, scenario, weight, denominators, world_size)


def random_batch(rows, scenarios=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, 2, generator=g) < 0.5).double()
    mask = (torch.rand(rows, 2, generator=g) < 0.7).double()
    scenario = torch.randint(0, scenarios, (rows,), generator=g)
    weight = torch.rand(rows, generator=g, dtype=torch.float64) + 0.5
    return labels, mask, scenario, weight


def test_masked_mean_worked_number():
    # Squared errors 1, 2, 3, 4 with labels 0.
    logits = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).sqrt()
    mask, weight = torch.tensor([[1.0], [0.0], [1.0], [0.0]]), torch.tensor([1.0, 1.0, 3.0, 1.0])
    loss = Loss((Task(name="t", kind="regression"),), 1)
    value = call(loss, logits, torch.zeros(4, 1), mask, torch.zeros(4, dtype=torch.long), weight)["t"]
    assert value.item() == pytest.approx(2.5, abs=1e-6)


@pytest.mark.parametrize("of", [Loss, BranchLoss])
@pytest.mark.parametrize("reduction", ["pooled", "balanced"])
def test_weights_of_which_a_step_has_next_to_nothing_are_none(reduction, of):
    """Less than float32 has reciprocals of."""
    labels, mask, scenario, _ = (each.float() if each.is_floating_point() else each for each in random_batch(40))
    logits = torch.randn(40, 2, requires_grad=True)
    loss, weight = of(BINARY, 3, LossOptions(reduction)), torch.where(scenario == 1, 1e-42, 1.0)
    for weights in (weight, torch.full([40], 1e-42)):
        values = call(loss, logits, labels, mask, scenario, weights)
        expected = call(loss, logits, labels, mask, scenario, torch.where(weights < 1, 0.0, weights))
        assert torch.stack([*values.values()]).tolist() == pytest.approx(torch.stack([*expected.values()]).tolist(), abs=1e-30)
        (gradient,) = torch.autograd.grad(sum(values.values()), logits)
        assert gradient.isfinite().all()


def test_huber_worked_number():
    """Delta 2: errors -1, 2, 3, -5 cost 1, 4, 2 (6 - 2) = 8 and 2 (10 - 2) = 16; the slope is 2 |e|, and 4 from 2 on."""
    logits = torch.tensor([[-1.0], [2.0], [3.0], [-5.0]], requires_grad=True)
    ones, zeros = torch.ones(4), torch.zeros(4, dtype=torch.long)
    loss = Loss((Task(name="t", kind="regression"),), 1, LossOptions(huber_delta=2.0))
    value = call(loss, logits, torch.zeros(4, 1), torch.ones(4, 1), zeros, ones)["t"]
    value.backward()
    assert value.item() == pytest.approx((1 + 4 + 8 + 16) / 4, abs=1e-6)
    assert (4 * logits.grad).flatten().tolist() == pytest.approx([-2, 4, 4, -4], abs=1e-6)


@pytest.mark.parametrize("reduction", ["pooled", "balanced"])
def test_equals_a_loop(reduction):
    labels, mask, scenario, weight = random_batch(40)
    logits = torch.randn(40, 2, dtype=torch.float64)
    got = call(Loss(BINARY, 3, LossOptions(reduction)), logits, labels, mask, scenario, weight)
    for t, name in enumerate(("click", "buy")):
        sums, norms = [0.0] * 3, [0.0] * 3
        for b in range(40):
            p = 1 / (1 + math.exp(-logits[b, t].item()))
            entropy = -math.log(p) if labels[b, t] == 1 else -math.log(1 - p)
            share = weight[b].item() * mask[b, t].item()
            sums[scenario[b]] += share * entropy
            norms[scenario[b]] += share
        pooled = sum(sums) / sum(norms)
        balanced = sum(s / n for s, n in zip(sums, norms, strict=True)) / 3
        assert got[name].item() == pytest.approx(pooled if reduction == "pooled" else balanced, rel=1e-12)


@pytest.mark.parametrize("reduction", ["pooled", "balanced"])
def test_ranks_with_averaged_gradients_equal_one_process(reduction):
    labels, mask, scenario, weight = random_batch(30)
    scenario = torch.where(scenario == 2, 1, scenario)  # Scenario 2 is absent.
    mask[:12, 0] = 0  # The first rank has no row of task 0.
    x = torch.randn(30, 4, dtype=torch.float64)
    loss = Loss(BINARY, 3, LossOptions(reduction))
    one = torch.randn(4, 2, dtype=torch.float64).requires_grad_()
    terms = call(loss, x @ one, labels, mask, scenario, weight)
    expected = torch.autograd.grad(terms["click"] + 0.3 * terms["buy"], one)[0]

    ranks = [slice(0, 12), slice(12, 17), slice(17, 30)]
    total = sum(loss.denominators(labels[r], mask[r], scenario[r], weight[r]) for r in ranks)
    gradients, values = [], []
    for r in ranks:
        part = call(loss, x[r] @ one, labels[r], mask[r], scenario[r], weight[r], total, world_size=3)
        gradients.append(torch.autograd.grad(part["click"] + 0.3 * part["buy"], one)[0])
        values.append(part["click"].detach())
    torch.testing.assert_close(sum(gradients) / 3, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sum(values) / 3, terms["click"].detach(), rtol=1e-12, atol=1e-14)


def test_balanced_ignores_absent_scenarios():
    logits, labels = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    loss = Loss(BINARY[:1], 5, LossOptions("balanced"))
    value = call(loss, logits, labels, torch.ones(2, 1, dtype=torch.float64), torch.tensor([4, 4]), ones)["click"]
    assert value.item() == pytest.approx(math.log(2), rel=1e-12)


def test_nothing_labelled_is_zero_with_zero_gradient():
    logits = torch.randn(3, 2, requires_grad=True)
    scenario = torch.zeros(3, dtype=torch.long)
    for reduction in ("pooled", "balanced"):
        terms = call(
            Loss(BINARY, 2, LossOptions(reduction)),
            logits,
            torch.full((3, 2), math.nan),
            torch.ones(3, 2),
            scenario,
            torch.ones(3),
        )
        assert terms["click"] == 0
        (gradient,) = torch.autograd.grad(terms["click"] + terms["buy"], logits)
        assert (gradient == 0).all()


def test_mixed_kinds_and_extra_losses():
    tasks = (BINARY[0], Task(name="stay", kind="regression"))
    logits, labels = torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 1.0]])
    loss = Loss(tasks, 1)
    arguments = (labels, torch.ones(1, 2), torch.zeros(1, dtype=torch.long), torch.ones(1))
    output = Output(logits, extra_losses={"l0": torch.tensor(0.25)})
    terms = loss(output, *arguments, loss.denominators(*arguments))
    assert list(terms) == ["click", "stay", "l0"]
    assert loss.objectives == ("click", "stay")
    torch.testing.assert_close(torch.stack(list(terms.values())), torch.tensor([math.log(2), 4.0, 0.25]))


def test_losses_are_float32_from_half_logits():
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.randn(4, 2).bfloat16()
        batch = [t.float() if t.is_floating_point() else t for t in random_batch(4)]
        assert call(Loss(BINARY, 3), logits, *batch)["click"].dtype == torch.float32
        assert chain_logit(logits[:, 0], logits[:, 1]).dtype == torch.float32


@pytest.mark.parametrize(
    ("a", "c", "expected"),
    [(2.0, -1.0, -1.1698460), (0.0, 0.0, -math.log(3)), (200.0, 200.0, 199.3068528), (-200.0, 200.0, -200.0)],
)
def test_chain_logit_worked_numbers(a, c, expected):
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 2e-5)):
        value = chain_logit(torch.tensor(a, dtype=dtype), torch.tensor(c, dtype=dtype)).item()
        assert value == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("reduction", ["pooled", "balanced"])
def test_objectives_of_every_unit_are_parts_of_the_same_sums(reduction):
    labels, mask, scenario, weight = random_batch(29)
    logits = torch.randn(29, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = dict.fromkeys([(t, s) for t in range(2) for s in range(3)], 0.0)
    for t in range(2):
        rows = {s: [b for b in range(29) if mask[b, t] and scenario[b] == s] for s in range(3)}
        total = sum(weight[b].item() for own in rows.values() for b in own)
        for s, own in rows.items():
            over = total if reduction == "pooled" else 3 * sum(weight[b].item() for b in own)
            for b in own:
                p = 1 / (1 + math.exp(-logits[b, t].item()))
                expected[t, s] -= weight[b].item() * math.log(p if labels[b, t] else 1 - p) / over
    names = ("click", "buy")
    wanted = {
        "task": {name: sum(expected[t, s] for s in range(3)) for t, name in enumerate(names)},
        "scenario": {place: sum(expected[t, s] for t in range(2)) for s, place in enumerate("xyz")},
        "head": {f"{name}/{place}": expected[t, s] for t, name in enumerate(names) for s, place in enumerate("xyz")},
    }
    for unit, values in wanted.items():
        loss = Loss(BINARY, 3, LossOptions(reduction, unit, ("x", "y", "z")))
        found = call(loss, logits, labels, mask, scenario, weight)
        assert tuple(found) == loss.objectives == tuple(values)
        for name, value in values.items():
            assert found[name].item() == pytest.approx(value, rel=1e-6)


def test_an_objective_with_the_name_of_a_term_is_refused():
    # The term would take the objective's place, and its task would not be trained.
    labels, mask, scenario, weight = random_batch(4)
    loss = Loss(BINARY, 3, LossOptions())
    output = Output(torch.zeros(4, 2, dtype=torch.float64), extra_losses={"buy": torch.tensor(1.0)})
    with pytest.raises(ConfigError, match=r"'buy'.*rename"):
        loss(output, labels, mask, scenario, weight, loss.denominators(labels, mask, scenario, weight))


def test_chain_logit_loss_and_gradient():
    a, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, -1.0))
    z = chain_logit(a, c)
    assert torch.sigmoid(z).item() == pytest.approx(0.2368828, abs=1e-6)
    losses = [F.binary_cross_entropy_with_logits(z, torch.tensor(y, dtype=torch.float64)) for y in (1.0, 0.0)]
    assert [loss.item() for loss in losses] == pytest.approx([1.4401897, 0.2703437], abs=1e-6)
    assert torch.autograd.grad(losses[1], a)[0].item() == pytest.approx(0.0370023, abs=1e-6)


def test_chain_logit_equals_the_product_and_stays_finite():
    a, c = torch.randn(2, 100, dtype=torch.float64) * 3
    p = torch.sigmoid(a) * torch.sigmoid(c)
    torch.testing.assert_close(torch.sigmoid(chain_logit(a, c)), p, rtol=1e-13, atol=1e-15)
    for first in (-200.0, 0.0, 200.0):
        for second in (-200.0, 200.0):
            logits = torch.tensor([first, second], requires_grad=True)
            z = chain_logit(logits[0], logits[1])
            for y in (0.0, 1.0):
                loss = F.binary_cross_entropy_with_logits(z, torch.tensor(y))
                (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
                assert loss.isfinite()
                assert gradient.isfinite().all()
