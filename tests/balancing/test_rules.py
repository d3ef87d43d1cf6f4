"""Rules on Gram matrices against explicit gradient vectors, worked numbers, and what defines each rule."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from mmlrec.balancing.hull import shortest_in_hull
from mmlrec.balancing.strategies.aligned import aligned
from mmlrec.balancing.strategies.cagrad import cagrad
from mmlrec.balancing.strategies.gradnorm import gradnorm_slope
from mmlrec.balancing.strategies.imtl_g import imtl_g
from mmlrec.balancing.strategies.metabalance import metabalance
from mmlrec.balancing.strategies.nash import nash
from tests.balancing.support import make, pcgrad_of

WORKED = np.array([[1.0, 0.0], [-1.0, 1.0]])
GRAM_RULES = {
    "pcgrad": lambda gram: pcgrad_of(gram, [range(len(gram))] * len(gram)),
    "mgda": shortest_in_hull,
    "cagrad": lambda gram: cagrad(gram, 0.5),
    "imtl_g": imtl_g,
    "nash": lambda gram: nash(gram / np.linalg.norm(gram), 0.01),
    "aligned": aligned,
}


def random_gradients(seed):
    """K gradients of P numbers, of different lengths and directions; some sets are linearly dependent."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 8))
    return rng.normal(size=(count, rng.integers(max(count - 1, 2), 20))) * np.exp(rng.normal(size=(count, 1)))


def gram_of(g):
    return g @ g.T


def slope_of(*arrays):
    return gradnorm_slope(*map(torch.from_numpy, arrays), 1.5).numpy()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("pcgrad", (2, 1.5)),
        ("mgda", (0.6, 0.4)),
        ("cagrad", (0.6, 0.4)),
        ("imtl_g", (0.5857864, 0.4142136)),
        ("aligned", (1.1055728, 0.8291796)),
    ],
)
def test_worked_numbers(rule, expected):
    assert GRAM_RULES[rule](gram_of(WORKED)) == pytest.approx(expected, abs=1e-6)


def test_worked_numbers_of_nash_and_gradnorm():
    gram = gram_of(WORKED)
    assert nash(gram) == pytest.approx((1.8477591, 1.3065630), abs=1e-6)
    arguments = (np.array([0.5, 0.2]), np.array([1.0, 0.8]), np.ones(2))
    assert slope_of(gram, *arguments) == pytest.approx((-1, 1.4142136), abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_pcgrad_equals_projected_vectors(seed):
    g = random_gradients(seed)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(g)) for _ in g]
    total = np.zeros(g.shape[1])
    for i, order in enumerate(orders):
        projected = g[i].copy()
        for j in order:
            if j != i and projected @ g[j] < 0:
                projected -= projected @ g[j] / (g[j] @ g[j]) * g[j]
        total += projected
    np.testing.assert_allclose(pcgrad_of(gram_of(g), orders) @ g, total, rtol=1e-10, atol=1e-12)


def test_pcgrad_special_cases():
    orders = [[1], [0]]
    assert pcgrad_of(gram_of(np.array([[1.0, 0.5], [0.2, 1.0]])), orders).tolist() == [1, 1]  # no conflict: the sum
    assert pcgrad_of(np.ones((2, 2)), orders).tolist() == [1, 1]  # identical
    opposite = np.array([[1.0, -2.0], [-1.0, 2.0]])
    np.testing.assert_allclose(pcgrad_of(gram_of(opposite), orders) @ opposite, 0, atol=1e-15)
    # Of two conflicting gradients each projected one is orthogonal to the other original.
    c = pcgrad_of(gram_of(WORKED), orders)
    for i, other in ((0, 1), (1, 0)):
        row = WORKED[i] + (c[other] - 1) * WORKED[other]
        assert row @ WORKED[other] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("seed", range(20))
def test_mgda_is_the_shortest_vector(seed):
    g = random_gradients(seed)
    w = shortest_in_hull(gram_of(g))
    assert w.sum() == pytest.approx(1)
    assert w.min() >= 0
    direction = w @ g
    assert (g @ direction).min() >= direction @ direction - 1e-9 * (g**2).sum(1).max()
    if len(g) == 2:
        (a, b), c = (g**2).sum(1), g[0] @ g[1]
        assert w[0] == pytest.approx(np.clip((b - c) / (a + b - 2 * c), 0, 1), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_cagrad_helps_the_worst_most_within_its_ball(seed):
    g = random_gradients(seed)
    mean = g.mean(0)
    radius = 0.5 * np.linalg.norm(mean)
    direction = cagrad(gram_of(g), 0.5) @ g * 1.25
    assert np.linalg.norm(direction - mean) <= radius * (1 + 1e-6)
    # By duality the best worst-case progress is the minimum over the simplex of w . G g0 + radius |G^T w|.
    dual = minimize(
        lambda w: w @ g @ mean + radius * np.sqrt(np.sum((w @ g) ** 2) + 1e-20),
        np.full(len(g), 1 / len(g)),
        bounds=[(0, 1)] * len(g),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    assert (g @ direction).min() == pytest.approx(dual.fun, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_cagrad_stays_in_its_ball_when_gradients_cancel(seed):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(rng.integers(3, 7), rng.integers(2, 12)))
    g[1] = -g[0]
    if seed % 4 == 3:  # all cancel: next to nothing is left of the mean
        g = np.concatenate([g, -g]) + 1e-8 * rng.normal(size=(2 * len(g), g.shape[1]))
    mean, c_a = g.mean(0), rng.choice([0.2, 0.5, 0.9])
    direction = cagrad(gram_of(g), c_a) @ g * (1 + c_a**2)
    assert np.linalg.norm(direction - mean) <= c_a * np.linalg.norm(mean) * (1 + 1e-4)


def test_cagrad_between_opposite_gradients_keeps_what_helps_the_third():
    # No direction helps both (1, 0) and (-1, 0): of the mean (1/3, 1), which is in the ball of radius 0.95, the first part goes
    g = np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 3.0]])
    assert cagrad(gram_of(g), 0.9) @ g * 1.81 == pytest.approx([0, 1], abs=1e-4)


def test_cagrad_without_radius_is_the_mean():
    np.testing.assert_allclose(cagrad(gram_of(random_gradients(3)), 0.0) @ random_gradients(3), random_gradients(3).mean(0))


@pytest.mark.parametrize("seed", range(20))
def test_imtl_g_projects_equally(seed):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(rng.integers(2, 6), 20))
    direction = imtl_g(gram_of(g)) @ g
    projections = (g / np.linalg.norm(g, axis=1, keepdims=True)) @ direction
    np.testing.assert_allclose(projections, projections[0], rtol=1e-8)
    # The paper's form on vectors.
    units = g / np.linalg.norm(g, axis=1, keepdims=True)
    d, u = g[0] - g[1:], units[0] - units[1:]
    others = g[0] @ u.T @ np.linalg.inv(d @ u.T)
    np.testing.assert_allclose(imtl_g(gram_of(g)), [1 - others.sum(), *others], rtol=1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_nash_solves_its_equation(seed):
    gram = gram_of(random_gradients(seed))
    gram /= np.linalg.norm(gram)
    c = nash(gram, 0.01)
    np.testing.assert_allclose(gram @ c + 0.01 * c, 1 / c, rtol=1e-8)
    assert (c > 0).all()
    assert c @ c <= len(c) / 0.01
    two = gram_of(np.array([[3.0, 0.0], [1.0, 1.0]]))
    cosine = 1 / math.sqrt(2)
    expected = [1 / (n * math.sqrt(1 + cosine)) for n in (3, math.sqrt(2))]
    assert nash(two) == pytest.approx(expected, abs=1e-8)


def test_nash_of_opposite_gradients_is_bounded():
    gram = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert nash(gram / np.linalg.norm(gram), 0.01) == pytest.approx((10, 10))


@pytest.mark.parametrize("seed", range(20))
def test_aligned_equals_the_singular_value_form(seed):
    g = random_gradients(seed)
    u, sigma, v = np.linalg.svd(g.T, full_matrices=False)
    kept = sigma > 1e-5 * sigma[0]
    balanced = sigma[kept].min() * u[:, kept] @ v[kept]  # all singular values become the smallest
    np.testing.assert_allclose(aligned(gram_of(g)) @ g, balanced.sum(1), rtol=1e-7, atol=1e-9)


def test_aligned_leaves_orthonormal_gradients():
    np.testing.assert_allclose(aligned(np.eye(3)), 1)


@pytest.mark.parametrize("seed", range(10))
def test_gradnorm_slope_is_the_derivative(seed):
    rng = np.random.default_rng(seed)
    g, losses, first = random_gradients(seed), rng.uniform(0.1, 1, 7), rng.uniform(0.1, 1, 7)
    count = len(g)
    losses, first, weights = losses[:count], first[:count], rng.uniform(0.5, 1.5, count)
    norms = np.linalg.norm(g, axis=1)
    rate = losses / first / (losses / first).mean()
    target = (weights * norms).mean() * rate**1.5

    def distance(w):
        return np.abs(w * norms - target).sum()

    slope = slope_of(gram_of(g), losses, first, weights)
    for t in range(count):
        h = 1e-7 * np.eye(count)[t]
        assert (distance(weights + h) - distance(weights - h)) / 2e-7 == pytest.approx(slope[t], rel=1e-4)


def test_gradnorm_equal_objectives_stay():
    gram = np.array([[2.0, 0.3], [0.3, 2.0]])
    assert slope_of(gram, np.full(2, 0.4), np.full(2, 0.8), np.ones(2)).tolist() == [0, 0]


def test_metabalance_moves_norms_to_the_main_one():
    norms = np.array([2.0, 8.0, 0.5])
    for r in (0.0, 0.7, 1.0):
        np.testing.assert_allclose(metabalance(torch.from_numpy(norms), 0, r) * norms, r * 2.0 + (1 - r) * norms)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", GRAM_RULES)
def test_permuting_objectives_permutes_coefficients(rule, seed):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(2 if rule == "pcgrad" else 4, 20))  # with 3 or more PCGrad depends on its orders
    order = rng.permutation(len(g))
    np.testing.assert_allclose(GRAM_RULES[rule](gram_of(g[order])), GRAM_RULES[rule](gram_of(g))[order], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", ["mgda", "imtl_g", "pcgrad", "aligned"])
def test_one_objective_is_plain(rule):
    np.testing.assert_allclose(GRAM_RULES[rule](np.array([[0.37]])), [1.0])


@pytest.mark.parametrize("rule", ["mgda", "cagrad", "imtl_g", "pcgrad", "aligned", "nash"])
def test_scaling_all_gradients_changes_nothing(rule):
    gram = gram_of(random_gradients(5))
    np.testing.assert_allclose(GRAM_RULES[rule](1e-10 * gram), GRAM_RULES[rule](gram), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("normalisation", ["none", "l2", "loss", "loss+"])
def test_mgda_normalisation(normalisation):
    g, losses = random_gradients(8), np.random.default_rng(8).uniform(0.1, 1, 7)
    losses = losses[: len(g)]
    norms = np.linalg.norm(g, axis=1)
    scales = {"none": np.ones(len(g)), "l2": norms, "loss": losses, "loss+": norms * losses}[normalisation]
    rule = make("mgda", len(g), normalisation=normalisation).rule
    expected = len(g) * shortest_in_hull(gram_of(g / scales[:, None])) @ (g / scales[:, None])
    np.testing.assert_allclose(rule(gram_of(g), losses, 1) @ g, expected, rtol=1e-9)


def test_pcgrad_orders_depend_on_seed_and_step_only():
    gram = torch.from_numpy(gram_of(np.random.default_rng(1).normal(size=(6, 3))))

    def c(seed, step):
        return make("pcgrad", 6, seed=seed).coefficients(gram, torch.ones(6, dtype=torch.float64), step).numpy()

    assert (c(0, 3) == c(0, 3)).all()
    assert not np.allclose(c(0, 3), c(0, 4))
    assert not np.allclose(c(0, 3), c(1, 3))
