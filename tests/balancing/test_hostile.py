"""Every strategy on gradients, under Gram matrices as training hardly gives them: coefficients stay numbers, and stay right."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmlrec.balancing.base import step_generator
from tests.balancing.hostile import ABSENT, DEPENDENT, HOSTILE, ORDINARY, SCALED, UNEVEN
from tests.balancing.support import GRADIENT_LEVEL, make

RULES = [name for name in GRADIENT_LEVEL if name != "monitor"]  # which has no coefficients
CASES = [(name, case) for name in RULES for case in HOSTILE]
NON_NEGATIVE = ("pcgrad", "mgda", "cagrad", "nash", "gradnorm", "metabalance")


def coefficients(name, gram, steps=1):
    """Of the last of some steps on the same gradients, with losses of 1."""
    strategy = make(name, len(gram))
    for step in range(1, steps + 1):
        found = strategy.coefficients(torch.from_numpy(gram.copy()), torch.ones(len(gram), dtype=torch.float64), step)
    return found.numpy()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_coefficients_are_finite_and_the_same_every_time(name, case):
    gram = HOSTILE[case]
    for steps in (1, 5):
        found = coefficients(name, gram, steps)
        assert found.shape == (len(gram),)
        assert np.isfinite(found).all()
        assert (coefficients(name, gram, steps) == found).all()
        if name in NON_NEGATIVE:
            assert (found >= -1e-9 * np.abs(found).max()).all()


@pytest.mark.parametrize("case", ABSENT)
@pytest.mark.parametrize("name", [name for name in RULES if name != "gradnorm"])
def test_an_objective_without_a_gradient_counts_once_and_changes_nothing_for_others(name, case):
    gram = ABSENT[case]
    absent = np.diag(gram) == 0
    found = coefficients(name, gram)
    assert (found[absent] == 1).all()
    # MetaBalance measures by the first objective; without it there is nothing to measure by.
    if name not in ("metabalance", "pcgrad") and (~absent).sum() >= 2:
        np.testing.assert_allclose(found[~absent], coefficients(name, gram[np.ix_(~absent, ~absent)]), rtol=1e-12)


#: Where the squares of lengths differ by more than float64 holds, and the method wants the shortest vector.
LOST = [("mgda", "each of another length")]
ORDERED = [
    (name, case)
    for name in RULES
    for case in [*ORDINARY, *SCALED, *UNEVEN]
    if name not in ("pcgrad", "metabalance") and (name, case) not in LOST
]


@pytest.mark.parametrize(("name", "case"), ORDERED)
def test_the_order_of_objectives_does_not_matter(name, case):
    gram = (ORDINARY | SCALED | UNEVEN)[case]
    order = np.roll(np.arange(len(gram)), 1)
    found, moved = coefficients(name, gram), coefficients(name, gram[np.ix_(order, order)])
    # What counts is the update: a coefficient of a gradient that is nothing beside the others is anybody's.
    lengths = np.sqrt(np.diag(gram))
    np.testing.assert_allclose(moved * lengths[order], (found * lengths)[order], rtol=1e-5, atol=1e-5 * (found * lengths).max())


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def steps_on(strategy, gram, losses):
    """Coefficients of steps on the same gradients, [steps, K]."""
    steps = enumerate(torch.from_numpy(losses), 1)
    return np.array([strategy.coefficients(torch.from_numpy(gram), own, step).numpy() for step, own in steps])


@pytest.mark.parametrize("case", HOSTILE)
def test_pcgrad_equals_a_loop(case):
    """Each gradient as coefficients of the given ones, projected on one after the other, in the order drawn for the step."""
    gram = HOSTILE[case]
    for step in (1, 2, 3):
        generator, rows = step_generator(5, step), np.eye(len(gram))
        for i in range(len(gram)):
            for j in torch.randperm(len(gram), generator=generator).tolist():
                inner = rows[i] @ gram[:, j]
                if j != i and inner < 0:
                    rows[i, j] -= inner / gram[j, j]
        ones = torch.ones(len(gram), dtype=torch.float64)
        found = make("pcgrad", len(gram), seed=5).coefficients(torch.from_numpy(gram), ones, step)
        assert_close(found.numpy(), rows.sum(0))


class _Sizes(TorchDispatchMode):
    """The largest number of numbers that an operator returned."""

    largest = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))])
        return made


def test_pcgrad_makes_nothing_larger_than_a_few_gram_matrices():
    """With an objective for each head there are hundreds."""
    with _Sizes() as sizes:
        coefficients("pcgrad", np.eye(40))
    assert 40**2 <= sizes.largest <= 2 * 40**2


@pytest.mark.parametrize("case", HOSTILE)
def test_gradnorm_equals_a_loop(case):
    gram = HOSTILE[case]
    count, norms = len(gram), np.sqrt(np.diag(gram))
    losses = np.random.default_rng(1).uniform(0.1, 1.0, (8, count)) * (norms > 0)
    found = steps_on(make("gradnorm", count), gram, losses)
    weights, some = np.ones(count), [t for t in range(count) if norms[t]]
    for step in range(8):
        assert_close(found[step], weights)
        rates = {t: losses[step, t] / losses[0, t] for t in some}
        moved = weights.copy()
        for t in some:
            mean = sum(weights[j] * norms[j] for j in some) / len(some)
            target = mean * (rates[t] / (sum(rates.values()) / len(some))) ** 1.5
            moved[t] -= 0.025 * np.sign(weights[t] * norms[t] - target) * norms[t]
        moved = np.maximum(moved, 1e-4)
        weights = moved * count / moved.sum()


@pytest.mark.parametrize("case", HOSTILE)
def test_metabalance_equals_a_loop(case):
    """On the same gradients each step the moving averages are the norms."""
    gram = HOSTILE[case]
    norms = np.sqrt(np.diag(gram))
    for main in range(len(gram)):
        found = steps_on(make("metabalance", len(gram), main=f"t{main}"), gram, np.ones((3, len(gram))))
        expected = [0.7 * norms[main] / norm + 0.3 if norm and norms[main] else 1.0 for norm in norms]
        for step in range(3):
            assert_close(found[step], np.array(expected))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", RULES)
def test_what_is_not_finite_counts_once_and_leaves_no_trace(name, bad):
    """The trainer ends such a run; until then the plain sum is trained, and what the strategy remembers stays finite."""
    strategy, x = make(name, 3), torch.ones(4, 2, requires_grad=True)
    shared = torch.nn.Parameter(torch.ones(2, 3))
    for step, factor in enumerate((1.0, bad), 1):
        objectives = (x @ shared * torch.tensor([1.0, -0.5, factor])).square().mean(0)
        strategy(objectives, x, {"shared": shared}, step)
    assert strategy.coefficient.tolist() == [1, 1, 1]
    assert all(value.isfinite().all() for key, value in strategy.state_dict().items() if key != "gram")


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("name", RULES)
def test_the_size_of_all_gradients_does_not_matter(name, case):
    scale = float(case.rpartition(" ")[2])
    np.testing.assert_allclose(coefficients(name, SCALED[case]), coefficients(name, SCALED[case] / scale), rtol=1e-8)


@pytest.mark.parametrize("case", HOSTILE)
def test_mgda_is_the_shortest_vector_of_the_hull(case):
    # A point of a convex set is the nearest to the origin where no other one lies on this side of the plane through it.
    gram = HOSTILE[case]
    present = np.diag(gram) > 0
    if not present.any():
        return
    gram = gram[np.ix_(present, present)]
    weights = coefficients("mgda", HOSTILE[case])[present] / present.sum()
    assert weights.sum() == pytest.approx(1)
    assert (gram @ weights >= weights @ gram @ weights - 1e-9 * np.abs(gram).max()).all()


@pytest.mark.parametrize("case", [*ORDINARY, *DEPENDENT, *SCALED, *UNEVEN])
def test_nash_solves_its_equation(case):
    norms = np.sqrt(np.diag(HOSTILE[case]))
    cosines = HOSTILE[case] / norms / norms[:, None]
    shares = coefficients("nash", HOSTILE[case]) * norms / np.sqrt(np.linalg.norm(HOSTILE[case]))
    np.testing.assert_allclose((cosines + 0.01 * np.eye(len(norms))) @ shares, 1 / shares, rtol=1e-8)


@pytest.mark.parametrize("factor", [1e-4, 1e-2, 1e2, 1e4])
@pytest.mark.parametrize("case", ["random 2", "random 5", "opposite", "nearly opposite, 0.001", "rank two of six"])
def test_nash_gives_an_objective_its_share_whatever_the_scale_of_its_loss(case, factor):
    gram = HOSTILE[case]
    scales = np.array([factor, *[1.0] * (len(gram) - 1)])
    cosines = gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))

    def shares(matrix):
        found = coefficients("nash", matrix) * np.sqrt(np.diag(matrix))
        return found / found.sum()

    # Another way to the bargain: the most of sum log(a) - a . M a / 2, over log(a), by scipy.
    def distance(log_a):
        a = np.exp(log_a)
        moved = (cosines + 0.01 * np.eye(len(a))) @ a
        return a @ moved / 2 - log_a.sum(), a * moved - 1

    found = np.exp(minimize(distance, np.zeros(len(gram)), jac=True, method="BFGS", options={"gtol": 1e-9}).x)
    np.testing.assert_allclose(shares(gram * np.outer(scales, scales)), found / found.sum(), rtol=1e-5)
    np.testing.assert_allclose(shares(gram * np.outer(scales, scales)), shares(gram), rtol=1e-6)


@pytest.mark.parametrize("case", [*ORDINARY, *SCALED, *UNEVEN])
def test_imtl_g_projects_alike_on_every_gradient(case):
    gram = HOSTILE[case]
    lengths = np.sqrt(np.diag(gram))
    projections = gram / lengths[:, None] @ coefficients("imtl_g", gram)
    np.testing.assert_allclose(projections, projections.mean(), rtol=1e-6)


@pytest.mark.parametrize("case", [*ORDINARY, *SCALED])
def test_aligned_leaves_no_objective_behind(case):
    # c = B^T B 1 for a basis in which all principal components are of one length: every gradient gains alike from it.
    gram = HOSTILE[case]
    values, vectors = np.linalg.eigh(gram)
    root = (vectors / np.sqrt(values)) @ vectors.T
    np.testing.assert_allclose(coefficients("aligned", gram), np.sqrt(values[0]) * root.sum(1), rtol=1e-6)


@pytest.mark.parametrize("case", [*ORDINARY, *DEPENDENT, *SCALED])
def test_cagrad_stays_in_its_ball_around_the_mean(case):
    gram = HOSTILE[case]
    mean = np.full(len(gram), 1 / len(gram))
    # The published direction is divided by 1 + c_a^2, and multiplied by K here.
    moved = coefficients("cagrad", gram) / len(gram) * 1.25 - mean
    radius = 0.5 * np.sqrt(max(mean @ gram @ mean, 0.0))
    assert np.sqrt(max(moved @ gram @ moved, 0.0)) <= radius * (1 + 1e-5) + 1e-5 * np.sqrt(np.diag(gram).max())
