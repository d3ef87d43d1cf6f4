"""Strategies on loss values: worked numbers, fixed points, and plain loops beside them."""

import math

import numpy as np
import pytest
import torch

from tests.balancing.support import make

X = torch.zeros(1, 1)


def run(strategy, history):
    """Coefficients [steps, K] of a history of losses."""
    made = []
    for step, losses in enumerate(history, 1):
        objectives = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
        total = strategy(objectives, X, {}, step)
        (slope,) = torch.autograd.grad(total, objectives, retain_graph=True)
        made.append(slope.tolist())
    return np.array(made)


def random_history(steps, count, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 0.9, (steps, count)).tolist()


def test_gls_worked_number():
    assert run(make("gls", 2), [[0.5, 0.2]])[0] == pytest.approx((0.3162278, 0.7905694), abs=1e-6)


def test_gls_is_the_gradient_of_the_geometric_mean():
    losses = torch.tensor([0.3, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    losses.log().mean().exp().backward()
    assert run(make("gls", 3), [losses.tolist()])[0] == pytest.approx(losses.grad.tolist(), rel=1e-12)


def test_dwa_worked_number():
    strategy = make("dwa", 2, window_steps=1)
    found = run(strategy, [[1.0, 0.5], [0.9, 0.55], [0.3, 0.3]])
    assert found[:2].tolist() == [[1, 1], [1, 1]]
    assert found[2] == pytest.approx((0.9500416, 1.0499584), abs=1e-6)


def test_dwa_equals_a_loop_over_windows():
    history, window, tau = random_history(23, 3), 5, 1.5
    found = run(make("dwa", 3, tau=tau, window_steps=window), history)
    means = [np.mean(history[i : i + window], axis=0) for i in range(0, 20, window)]
    for step in range(23):
        n = step // window
        expected = np.ones(3)
        if n >= 2:
            e = np.exp(means[n - 1] / means[n - 2] / tau)
            expected = 3 * e / e.sum()
        assert found[step] == pytest.approx(expected, rel=1e-12)


def test_dwa_of_constant_losses_is_plain():
    np.testing.assert_allclose(run(make("dwa", 2, window_steps=2), [[0.7, 0.1]] * 9), 1)


def test_rlw_depends_on_seed_and_step_and_averages_to_one():
    first = run(make("rlw", 3, seed=0), [[1.0, 1, 1]] * 2000)
    assert (first == run(make("rlw", 3, seed=0), [[2.0, 1, 1]] * 2000)).all()
    assert not np.allclose(first, run(make("rlw", 3, seed=1), [[1.0, 1, 1]] * 2000))
    np.testing.assert_allclose(first.sum(1), 3)
    assert first.mean(0) == pytest.approx((1, 1, 1), abs=0.05)


def test_stch_is_the_gradient_of_its_loss():
    history, mu = random_history(9, 3), 0.3
    found = run(make("stch", 3, mu=mu, warmup_windows=2, window_steps=3), history)
    np.testing.assert_allclose(found[:6], 1 / np.array(history[:6]), rtol=1e-12)
    reference = np.mean(history[:6], axis=0)
    for step in range(6, 9):
        losses = torch.tensor(history[step], dtype=torch.float64, requires_grad=True)
        (3 * mu * torch.logsumexp(torch.log(losses / torch.tensor(reference)) / mu, 0)).backward()
        assert found[step] == pytest.approx(losses.grad.tolist(), rel=1e-10)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "decay": 0.05}])
def test_famo_equals_autograd_and_torch_adam(options):
    history = random_history(12, 3, seed=3)
    found = run(make("famo", 3, **options), history)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=options.get("lr", 0.025), weight_decay=options.get("decay", 1e-3))
    for step, values in enumerate(history):
        losses = torch.tensor(values, dtype=torch.float64)
        if step:
            progress = torch.tensor(history[step - 1]).double().log() - losses.log()
            w.grad = torch.autograd.grad(torch.softmax(w, 0), w, progress)[0]
            adam.step()
        variable = losses.clone().requires_grad_()
        z = torch.softmax(w, 0).detach()
        (z / (z / losses).sum() * variable.log()).sum().backward()
        assert found[step] == pytest.approx((3 * variable.grad).tolist(), rel=1e-6)


def test_famo_favours_what_does_not_fall():
    history = [[0.9 * 0.97**n, 0.9 * 0.999**n] for n in range(100)]
    found = run(make("famo", 2), history)
    z = found[-1] * history[-1]  # c is z / L up to a factor
    assert z[1] > 2 * z[0]


def test_uw_loss_gradient_and_fixed_point():
    strategy = make("uw", 3, kinds="bbr")
    losses = torch.tensor([0.5, 0.2, 0.9])
    optimizer = torch.optim.SGD(strategy.parameters(), lr=0.5)
    for step in range(400):
        optimizer.zero_grad()
        strategy(losses, X, {}, step + 1).backward()
        optimizer.step()
    expected = [math.log(2 * kappa * loss) for kappa, loss in zip((1, 1, 0.5), (0.5, 0.2, 0.9), strict=True)]
    assert strategy.log_variances.tolist() == pytest.approx(expected, abs=1e-5)
    assert expected[:2] == pytest.approx((0, -0.9162907), abs=1e-6)
    total = strategy(losses, X, {}, 401)
    v = expected
    by_hand = sum(k * math.exp(-v) * x + v / 2 for k, v, x in zip((1, 1, 0.5), v, losses.tolist(), strict=True))
    assert total.item() == pytest.approx(by_hand, rel=1e-5)


def test_uw_log_variances_stay_in_range():
    strategy = make("uw", 1)
    with torch.no_grad():
        strategy.log_variances.fill_(12.0)
    strategy(torch.tensor([0.5]), X, {}, 1)
    assert strategy.log_variances.item() == 10.0


def test_uw_leaves_an_objective_alone_in_steps_without_its_rows():
    """The same loss in both objectives, the second in one of five batches only: their weights become the same."""
    strategy = make("uw", 2)
    optimizer = torch.optim.SGD(strategy.parameters(), lr=0.2)
    for step in range(2000):
        before = strategy.log_variances.detach().clone()
        optimizer.zero_grad()
        strategy(torch.tensor([0.3, 0.0 if step % 5 else 0.3]), X, {}, step + 1).backward()
        optimizer.step()
        assert step % 5 == 0 or strategy.log_variances[1] == before[1]
    assert strategy.log_variances.tolist() == pytest.approx([math.log(0.6)] * 2, abs=1e-4)


def test_dwa_averages_over_steps_with_rows():
    """Constant losses, the second in one of five batches of each of three windows, and in none of the fourth."""
    history = [[0.5, 0.0 if step % 5 or step >= 15 else 0.5] for step in range(25)]
    np.testing.assert_allclose(run(make("dwa", 2, window_steps=5), history), 1, rtol=1e-12)


def test_stch_references_are_means_over_steps_with_rows():
    """Equal losses, the second in two of ten warm-up batches: equal weights, K softmax(0) / L = 2 * 0.5 / 0.5, afterwards."""
    history = [[0.5, 0.0 if step % 5 else 0.5] for step in range(10)] + [[0.5, 0.5]]
    found = run(make("stch", 2, mu=0.5, warmup_windows=1, window_steps=10), history)
    assert found[-1] == pytest.approx((2, 2), rel=1e-12)


STRATEGIES = {
    "dwa": lambda k: make("dwa", k, window_steps=2),
    "gls": lambda k: make("gls", k),
    "stch": lambda k: make("stch", k, mu=0.5, warmup_windows=1, window_steps=2),
    "famo": lambda k: make("famo", k),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_permuting_objectives_permutes_coefficients(name):
    history, order = np.array(random_history(8, 4)), [2, 0, 3, 1]
    expected = run(STRATEGIES[name](4), history.tolist())[:, order]
    np.testing.assert_allclose(run(STRATEGIES[name](4), history[:, order].tolist()), expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["dwa", "gls", "famo", "rlw"])
def test_one_objective_is_plain(name):
    strategy = make("rlw", 1, seed=0) if name == "rlw" else STRATEGIES[name](1)
    np.testing.assert_allclose(run(strategy, random_history(6, 1)), 1, rtol=1e-12)


@pytest.mark.parametrize("name", STRATEGIES)
def test_objective_without_rows_leaves_finite_numbers(name):
    history = random_history(10, 3)
    for step in (0, 4, 7):
        history[step][1] = 0.0
    history[5] = [0.0, 0.0, 0.0]
    assert np.isfinite(run(STRATEGIES[name](3), history)).all()


@pytest.mark.parametrize(
    ("made", "told"), [([0.5, 0.5], "a list"), (np.ones(2), "a ndarray"), (torch.tensor(0.5), r"a tensor \[\]")]
)
def test_coefficients_that_are_no_tensor_of_the_objectives_are_refused(made, told):
    """One number for all would be spread over them without a word."""
    strategy = make("gls", 2)
    strategy.coefficients = lambda losses, step: made
    with pytest.raises(TypeError, match=rf"balancing.name=gls: GLS.coefficients returns {told} where a tensor \[2\] is wanted"):
        run(strategy, [[0.5, 0.2]])
