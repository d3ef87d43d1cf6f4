"""What reports say of chance, of the rate of positives, and of scores too good to be true."""

import itertools
import math

import numpy as np
import pytest

from mmlrec.metrics.gather import PredictionRows
from mmlrec.metrics.notes import chance_error, look_at, report_text
from mmlrec.metrics.report import build_report, report_table
from mmlrec.schema import Scenario, Task
from tests.metrics.test_exact import auc

TASKS = [Task(name="click"), Task(name="seconds", kind="regression")]


def report(logit, label, scenario=None):
    n = len(label)
    rows = PredictionRows(
        logits=np.stack([logit, np.zeros(n)], axis=1).astype(np.float32),
        labels=np.stack([label, np.ones(n)], axis=1).astype(np.float32),
        mask=np.ones((n, 2), bool),
        scenario=np.zeros(n, np.int64) if scenario is None else scenario,
        weight=np.ones(n, np.float32),
        group=np.zeros(n, np.int64),
        row=np.arange(n),
    )
    pages = None if scenario is None else Scenario(name="page", values=["home", "cart"])
    return build_report(rows, tasks=TASKS, scenario=pages)


@pytest.mark.parametrize(("positives", "negatives"), [(1, 1), (3, 4), (50, 7), (10**6, 10**7)])
def test_error_of_chance_is_that_of_hanley_and_mcneil(positives, negatives):
    area = 0.5
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    assert chance_error(positives, negatives) == pytest.approx(math.sqrt(variance / (positives * negatives)), rel=1e-12)


def test_error_of_chance_is_the_spread_over_all_orders():
    score, aucs = np.arange(8.0), []
    for positive in itertools.combinations(range(8), 3):
        label = np.zeros(8)
        label[list(positive)] = 1
        aucs.append(auc(score, label))
    assert np.mean(aucs) == pytest.approx(0.5)
    assert chance_error(3, 5) == pytest.approx(np.std(aucs), rel=1e-12)


def scored(area, positives=400, negatives=600):
    """Logits with this AUC, to 1 / (positives * negatives), whose mean probability is near the rate."""
    above = round(area * negatives)  # each positive is above so many negatives
    negative = np.arange(negatives) * 1e-4
    return np.append(np.full(positives, (above - 0.5) * 1e-4), negative) - 0.45, np.repeat([1.0, 0.0], [positives, negatives])


@pytest.mark.parametrize(("distance", "told"), [(-1.9, "cannot be told from chance"), (1.9, "cannot be told from chance")])
def test_within_two_errors_of_a_half_is_chance(distance, told):
    area = 0.5 + distance * chance_error(400, 600)
    (note,) = [note for note in look_at(report(*scored(area)), "test") if "AUC" in note]
    assert note.startswith("Task 'click': AUC ")
    assert told in note
    assert "on test, of 1,000 rows with 400 positives" in note
    assert f"{2 * chance_error(400, 600):.4f}" in note


def test_beyond_two_errors_is_not():
    error = chance_error(400, 600)
    assert [note for note in look_at(report(*scored(0.5 + 2.2 * error)), "test") if "AUC" in note] == []
    (note,) = [note for note in look_at(report(*scored(0.5 - 2.2 * error)), "test") if "AUC" in note]
    assert "below chance" in note


def test_logloss_above_that_of_the_rate_is_told():
    label = np.repeat([1.0, 0.0], [250, 750])
    rate = math.log(0.25 / 0.75)
    spread = np.where(np.arange(1000) % 2, 0.0, 1.0)
    worse, better = report(rate + 3 * spread, label), report(rate + 0.5 * label, label)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    (note,) = [note for note in look_at(worse, "valid") if "logloss" in note]
    assert f"logloss on valid {worse['tasks']['click']['logloss']:.4f} is above {entropy:.4f}" in note
    assert [note for note in look_at(better, "valid") if "logloss" in note] == []
    infinite = report(np.where(np.arange(1000) == 0, -np.inf, rate + 0.5 * label), label)
    assert infinite["tasks"]["click"]["logloss"] is None
    (note,) = [note for note in look_at(infinite, "valid") if "logloss" in note]
    assert "is infinite" in note


def test_rows_that_weigh_nothing_have_no_infinite_logloss():
    label = np.repeat([1.0, 0.0], 50)
    rows = PredictionRows(
        logits=label[:, None],
        labels=label[:, None],
        mask=np.ones((100, 1), bool),
        scenario=np.zeros(100, np.int64),
        weight=np.zeros(100, np.float32),
        group=np.arange(100) % 7,
        row=np.arange(100),
    )
    with pytest.warns(UserWarning, match=r"weights of 0\): AUC is undefined"):
        found = build_report(rows, tasks=TASKS[:1], scenario=None)
    assert found["tasks"]["click"]["logloss"] is None
    assert look_at(found, "test") == []


def test_an_auc_that_is_seldom_earned_is_told():
    logit, label = scored(1.0)
    (note,) = [note for note in look_at(report(logit, label), "test") if "AUC" in note]
    assert "Task 'click': AUC 1.0000 on test is seldom earned. Look for a feature that is made from the label" in note
    assert [note for note in look_at(report(*scored(0.9985)), "test") if "seldom" in note] == []


def test_slices_without_labels_of_both_classes_and_regression_tasks_say_nothing():
    with pytest.warns(UserWarning, match="click"):
        found = report(np.zeros(50), np.zeros(50))
    assert look_at(found, "test") == []


def test_the_notes_stand_below_the_table():
    found = report(*scored(1.0))
    text = report_text(found, "test")
    assert text.startswith(report_table(found))
    assert text.removeprefix(report_table(found)).splitlines()[:2] == ["", ""]
    assert "\nLook at this:\n  * Task 'click': " in text
    good = report(*scored(0.8))
    assert report_text(good, "test") == report_table(good)
