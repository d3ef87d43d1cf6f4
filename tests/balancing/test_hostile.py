"""Every strategy on gradients, under Gram matrices as training hardly gives them: coefficients stay numbers, and stay right."""

import numpy as np
import pytest

from tests.balancing.hostile import ABSENT, DEPENDENT, HOSTILE, ORDINARY, SCALED, UNEVEN
from tests.balancing.support import GRADIENT_LEVEL, make

RULES = [name for name in GRADIENT_LEVEL if name != "monitor"]  # which has no coefficients
CASES = [(name, case) for name in RULES for case in HOSTILE]
NON_NEGATIVE = ("pcgrad", "mgda", "cagrad", "nash", "gradnorm", "metabalance")


def coefficients(name, gram, steps=1):
    """Of the last of some steps on the same gradients, with losses of 1."""
    strategy = make(name, len(gram))
    for step in range(1, steps + 1):
        found = strategy.coefficients(gram.copy(), np.ones(len(gram)), step)
    return found


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


#: Where the squares of lengths differ by more than float64 holds. IMTL-G's matrix is of differences of gradients, in which the
#: short ones are lost from a factor of 1e7 between lengths on.
LOST = [("imtl_g", "one times 1e+15"), ("imtl_g", "each of another length"), ("mgda", "each of another length")]
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


@pytest.mark.parametrize("case", [*ORDINARY, *DEPENDENT, *SCALED])
def test_nash_solves_its_equation(case):
    gram = HOSTILE[case] / np.linalg.norm(HOSTILE[case])
    found = coefficients("nash", HOSTILE[case])
    np.testing.assert_allclose((gram + 0.01 * np.eye(len(gram))) @ found, 1 / found, rtol=1e-8)


@pytest.mark.parametrize("case", [*ORDINARY, *SCALED])
def test_imtl_g_projects_alike_on_every_gradient(case):
    gram = HOSTILE[case]
    projections = gram @ coefficients("imtl_g", gram) / np.sqrt(np.diag(gram))
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
