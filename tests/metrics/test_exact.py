"""Exact metrics against scikit-learn, brute force over pairs, and numbers worked by hand."""

import functools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from sklearn import metrics as sk

from mmlrec.errors import UserAdvice
from mmlrec.metrics import exact
from mmlrec.metrics.exact import conditional_logit
from mmlrec.metrics.gather import PredictionRows
from mmlrec.metrics.report import build_report
from mmlrec.schema import Scenario, Task


def measured(name, score, label, weight=None, group=None, deviation=None):
    """One metric of a report of one task; NaN where it is undefined."""
    n = len(label)
    rows = PredictionRows(
        logits=score[:, None],
        labels=label[:, None],
        mask=np.ones((n, 1), bool),
        scenario=np.zeros(n, np.int64),
        weight=np.ones(n, np.float32) if weight is None else weight,
        group=np.arange(n) if group is None else group,
        row=np.arange(n),
    )
    task = Task(name="t", kind="regression" if name in ("mse", "mae", "r2") else "binary")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserAdvice)
        found = build_report(rows, tasks=[task], scenario=None, deviations={"t": {"all": deviation}})["tasks"]["t"][name]
    return math.nan if found is None else found


def gauc(score, label, group, weight=None):
    """All rows of one group make no GAUC in a report: a group with one class, which is left out, stands beside them."""
    more = None if weight is None else np.append(weight, weight.dtype.type(1))
    groups = np.append(group, group.max(initial=0) + 1)
    return measured("gauc", np.append(score, score.dtype.type(0)), np.append(label, label.dtype.type(1)), more, groups)


def r2(prediction, label, deviation, weight=None):
    return measured("r2", prediction, label, weight, deviation=deviation)


auc, logloss, normalized_entropy, calibration, mse, mae = (
    functools.partial(measured, name) for name in ("auc", "logloss", "normalized_entropy", "calibration", "mse", "mae")
)


def sample(seed, n=400, distinct=None, rate=0.3):
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < rate).astype(np.float32)
    logit = rng.normal(label * 0.7 - 1, 1.2).astype(np.float32)
    if distinct:
        logit = np.round(logit * distinct) / distinct
    return logit.astype(np.float32), label, rng.uniform(0.1, 3, n).astype(np.float32), rng.integers(0, 40, n)


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit.astype(np.float64)))


@pytest.mark.parametrize("distinct", [None, 4, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_auc_equals_scikit_learn(seed, distinct):
    logit, label, weight, _ = sample(seed, distinct=distinct)
    assert auc(logit, label) == pytest.approx(sk.roc_auc_score(label, logit), abs=1e-13)
    assert auc(logit, label, weight) == pytest.approx(sk.roc_auc_score(label, logit, sample_weight=weight), abs=1e-12)
    assert auc(logit, label, np.ones_like(label)) == pytest.approx(auc(logit, label), abs=1e-14)


def test_auc_equals_brute_force_over_weighted_pairs():
    logit, label, weight, _ = sample(2, n=60, distinct=2)
    right = total = 0.0
    for i in np.flatnonzero(label == 1):
        for j in np.flatnonzero(label == 0):
            pair = float(weight[i]) * float(weight[j])
            total += pair
            right += pair * (1.0 if logit[i] > logit[j] else 0.5 if logit[i] == logit[j] else 0.0)
    assert auc(logit, label, weight) == pytest.approx(right / total, abs=1e-12)


def test_auc_worked_by_hand():
    # Pairs of (.9, .3) against (.3, .1): right, right, tie, right.
    assert auc(np.array([0.9, 0.3, 0.3, 0.1]), np.array([1, 1, 0, 0])) == 3.5 / 4
    assert auc(np.zeros(7), np.array([1, 0, 0, 1, 0, 0, 0])) == 0.5


def test_auc_is_the_same_under_float32_scores_that_sigmoid_would_tie():
    logit = np.array([20.0, 30.0, 40.0], np.float32)
    assert auc(logit, np.array([0.0, 0.0, 1.0])) == 1.0


@pytest.mark.parametrize("weighted", [False, True])
def test_logloss_and_normalized_entropy(weighted):
    logit, label, weight, _ = sample(3)
    weight = weight if weighted else None
    expected = sk.log_loss(label, sigmoid(logit), sample_weight=weight)
    assert logloss(logit, label, weight) == pytest.approx(expected, rel=1e-12)
    rate = np.average(label.astype(np.float64), weights=weight)
    entropy = sk.log_loss(label, np.full(len(label), rate), sample_weight=weight)
    assert normalized_entropy(logit, label, weight) == pytest.approx(expected / entropy, rel=1e-9)


def test_logloss_does_not_clip():
    assert logloss(np.array([200.0, -200.0], np.float32), np.array([0.0, 0.0], np.float32)) == pytest.approx(100, rel=1e-12)
    assert logloss(np.array([np.inf, -np.inf], np.float32), np.array([1.0, 0.0], np.float32)) == 0


def test_normalized_entropy_of_the_base_rate_is_one():
    label = np.array([1, 0, 0, 0], np.float32)
    assert normalized_entropy(np.full(4, math.log(1 / 3)), label) == pytest.approx(1, rel=1e-12)


def test_calibration_worked_by_hand():
    logit = np.log(np.array([0.2, 0.4, 0.6]) / np.array([0.8, 0.6, 0.4]))
    assert calibration(logit, np.array([0.0, 0.0, 1.0])) == pytest.approx(1.2, rel=1e-12)
    weights = np.array([1.0, 2.0, 0.5])
    assert calibration(logit, np.array([0.0, 0.0, 1.0]), weights) == pytest.approx((0.2 + 0.8 + 0.3) / 0.5, rel=1e-12)


@pytest.mark.parametrize("distinct", [None, 2])
def test_gauc_equals_a_loop_over_groups(distinct):
    logit, label, _, group = sample(4, n=600, distinct=distinct, rate=0.1)
    total = rows = left_out = 0
    for g in np.unique(group):
        own = group == g
        if len(set(label[own])) == 2:
            total += sk.roc_auc_score(label[own], logit[own]) * own.sum()
            rows += own.sum()
        else:
            left_out += 1
    assert left_out > 0
    assert gauc(logit, label, group) == pytest.approx(total / rows, abs=1e-12)


@pytest.mark.parametrize("distinct", [None, 2])
def test_weighted_gauc_equals_a_loop_over_groups(distinct):
    logit, label, weight, group = sample(4, n=600, distinct=distinct, rate=0.1)
    weight[::5] = 0
    total = summed = left_out = 0
    for g in np.unique(group):
        own = group == g
        if len(set(label[own & (weight > 0)])) == 2:
            of_group = weight[own].sum(dtype=np.float64)
            total += sk.roc_auc_score(label[own], logit[own], sample_weight=weight[own]) * of_group
            summed += of_group
        else:
            left_out += 1
    assert left_out > 0
    assert gauc(logit, label, group, weight) == pytest.approx(total / summed, abs=1e-12)
    shuffled = np.random.default_rng(0).permutation(len(label))
    assert gauc(*(values[shuffled] for values in (logit, label, group, weight))) == pytest.approx(total / summed, abs=1e-12)


def test_weighted_gauc_worked_by_hand():
    """Group 7: of the pairs (.9, .5), (.9, .2), (.5, .5), (.5, .2) of weights 2, 6, 3, 9 the third is a tie; weight 7.

    Group 8: both pairs are wrong; weight 4. Group 9 has positives only.
    """
    score = np.array([0.9, 0.5, 0.5, 0.2, 0.1, 0.6, 0.4, 0.3])
    label = np.array([1, 1, 0, 0, 1, 0, 0, 1], np.float32)
    weight = np.array([2, 3, 1, 3, 1, 1, 2, 50], np.float32)
    group = np.array([7, 7, 7, 7, 8, 8, 8, 9])
    of_7 = (2 + 6 + 3 / 2 + 9) / 20
    assert gauc(score, label, group, weight) == pytest.approx((of_7 * 9 + 0 * 4) / 13, abs=1e-15)


def test_gauc_of_equal_weights_is_the_one_without():
    logit, label, _, group = sample(4, n=600, distinct=3, rate=0.2)
    assert gauc(logit, label, group, np.full(600, 2.5)) == pytest.approx(gauc(logit, label, group), abs=1e-14)


def test_gauc_of_one_group_is_the_auc():
    logit, label, weight, _ = sample(5, distinct=3)
    group = np.zeros(len(label), np.int64)
    assert gauc(logit, label, group) == pytest.approx(auc(logit, label), abs=1e-13)
    assert gauc(logit, label, group, weight) == pytest.approx(auc(logit, label, weight), abs=1e-13)


def test_errors_of_regression():
    prediction, label, weight, _ = sample(6)
    label = label * 3 + np.linspace(0, 1, len(label)).astype(np.float32)
    expected = sk.mean_squared_error(label, prediction.astype(np.float64), sample_weight=weight)
    assert mse(prediction, label, weight) == pytest.approx(expected, rel=1e-10)
    expected = sk.mean_absolute_error(label, prediction.astype(np.float64), sample_weight=weight)
    assert mae(prediction, label, weight) == pytest.approx(expected, rel=1e-10)
    # Against the mean and variance of these very rows it is the usual R².
    expected = sk.r2_score(label, prediction.astype(np.float64))
    assert r2(prediction, label, float(np.std(label.astype(np.float64)))) == pytest.approx(expected, rel=1e-10)


def test_r2_worked_by_hand():
    """Train's labels have a variance of 4; squared errors 1 and 9, with weights 3 and 1."""
    prediction, label = np.array([1.0, 5.0]), np.array([2.0, 2.0])
    assert r2(prediction, label, 2.0) == 1 - 5 / 4
    assert r2(prediction, label, 2.0, np.array([3.0, 1.0])) == 1 - 3 / 4
    assert math.isnan(r2(prediction, label, 0.0))


def pairs(score, label, weight):
    """Twice the weight of pairs in the right order, and of all pairs, one by one and without rounding."""
    right = total = Fraction(0)
    for i in np.flatnonzero(label > 0):
        for j in np.flatnonzero(label <= 0):
            pair = Fraction(float(weight[i])) * Fraction(float(weight[j]))
            total += 2 * pair
            right += pair * (2 if score[i] > score[j] else 1 if score[i] == score[j] else 0)
    return right, total


def of_groups(score, label, weight, group):
    """GAUC, without rounding but for that of each group's AUC."""
    found = Fraction(0), Fraction(0)
    for each in np.unique(group):
        own = group == each
        right, total = pairs(score[own], label[own], weight[own])
        if total:
            size = sum(map(Fraction, weight[own].tolist()))
            found = found[0] + size * (right / total), found[1] + size
    return found[0] / found[1]


@pytest.mark.parametrize("seed", range(6))
def test_weights_of_other_scenarios_and_groups_do_not_drown_those_of_one(monkeypatch, seed):
    """Weights of 1e-35 to 1e30, each scenario and group in a range of its own, alone and some rows at a time."""
    monkeypatch.setattr(exact, "ROUND_ROWS", [1 << 22, 16][seed % 2])
    rng, n = np.random.default_rng(seed), 90
    label = (rng.random(n) < 0.4).astype(np.float32)
    score = rng.normal(label, 1).astype(np.float32)
    score = np.round(score) if seed < 3 else score
    scenario, group = rng.integers(0, 3, n), rng.integers(0, 6, n)
    of_scenario, of_group = rng.permutation([-33.0, -2.0, 28.0]), rng.uniform(-2, 2, 6) * 5 * (seed % 3)
    weight = rng.uniform(0.1, 1, n) * 10 ** np.clip(of_scenario[scenario] + of_group[group], -35, 30)
    weight = weight.astype(np.float32)
    rows = PredictionRows(score[:, None], label[:, None], np.ones((n, 1), bool), scenario, weight, group, np.arange(n))
    pages = Scenario(name="page", values=["a", "b", "c"])
    entry = build_report(rows, tasks=[Task(name="t")], scenario=pages)["tasks"]["t"]
    for index, part in enumerate([entry, *entry["scenarios"].values()]):
        own = scenario == index - 1 if index else np.ones(n, bool)
        right, total = pairs(score[own], label[own], weight[own])
        assert part["auc"] == pytest.approx(float(right / total), abs=1e-14)
        assert part["gauc"] == pytest.approx(float(of_groups(score[own], label[own], weight[own], group[own])), abs=1e-14)


def test_entropy_of_a_rate_that_no_float_tells_from_1():
    """One negative of weight 1e-20: -(1 - q) log(1 - q) - q log q is q (1 - log q), to the first 19 digits."""
    logit, label, weight = np.zeros(2, np.float32), np.array([1, 0], np.float32), np.array([1, 1e-20], np.float32)
    q = float(weight[1])
    assert normalized_entropy(logit, label, weight) == pytest.approx(math.log(2) / (q * (1 - math.log(q))), rel=1e-12)
    swapped = normalized_entropy(logit, 1 - label, weight)
    assert swapped == pytest.approx(math.log(2) / (q * (1 - math.log(q))), rel=1e-12)


def test_rounding_of_weights_makes_no_auc_above_1():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        label = (rng.random(300) < 0.4).astype(np.float32)
        weight = (rng.uniform(0.1, 2, 300) * 10 ** rng.uniform(-6, 6, 300)).astype(np.float32)
        found = auc(label + rng.random(300), label, weight), gauc(label, label, np.arange(300) % 4, weight)
        assert all(1 - 1e-14 < value <= 1 for value in found)


@pytest.mark.parametrize("label", [np.zeros(5, np.float32), np.ones(5, np.float32), np.zeros(0, np.float32)])
def test_one_class_is_nan(label):
    logit = np.linspace(-1, 1, len(label)).astype(np.float32)
    weight, group = np.ones(len(label), np.float32), np.zeros(len(label), np.int64)
    assert math.isnan(auc(logit, label))
    assert math.isnan(auc(logit, label, weight))
    assert math.isnan(normalized_entropy(logit, label))
    assert math.isnan(gauc(logit, label, group))
    assert math.isnan(gauc(logit, label, group, weight))
    if not label.any():
        assert math.isnan(calibration(logit, label))


def test_zero_weights_leave_rows_out():
    logit, label, weight, _ = sample(7, distinct=2)
    weight[::3] = 0
    kept = weight > 0
    for metric in (auc, logloss, normalized_entropy, calibration, mse, mae):
        assert metric(logit, label, weight) == pytest.approx(metric(logit[kept], label[kept], weight[kept]), rel=1e-10)
    assert math.isnan(auc(logit, label, np.zeros_like(weight)))
    assert math.isnan(logloss(logit, label, np.zeros_like(weight)))


def test_conditional_logit_is_that_of_the_ratio_of_probabilities():
    rng = np.random.default_rng(0)
    first, given = rng.normal(0, 3, (2, 200))
    p = 1 / (1 + np.exp(-first)) / (1 + np.exp(-given))
    np.testing.assert_allclose(conditional_logit(first, np.log(p / (1 - p))), given, rtol=1e-7, atol=1e-7)
    # 1 - 1e-7 at most, which is what float32 can tell from 1; finite for large logits.
    capped = conditional_logit(np.array([0.0, -200.0]), np.array([1.0, 200.0]))
    np.testing.assert_allclose(capped, np.log(1e7), rtol=1e-6)
    np.testing.assert_allclose(conditional_logit(np.array([200.0]), np.array([-200.0])), [-200.0], rtol=1e-12)
