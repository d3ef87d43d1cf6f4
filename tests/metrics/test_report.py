import dataclasses
import json
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from mmlrec.days.table import days_table
from mmlrec.errors import DataError, UserAdvice
from mmlrec.metrics import exact
from mmlrec.metrics.gather import PredictionRows
from mmlrec.metrics.report import build_report, entries_of, lines_of, report_table, seeds_table
from mmlrec.schema import Scenario, Task

TASKS = [Task(name="click"), Task(name="buy")]
PAGES = Scenario(name="page", values=["home", "cart"])
COLUMNS = ["rows", "positives", "auc", "gauc", "logloss", "normalized_entropy", "calibration"]


def prediction_rows(n=500, seed=0, groups=20):
    rng = np.random.default_rng(seed)
    mask = rng.random((n, 2)) < 0.8
    labels = (rng.random((n, 2)) < 0.4).astype(np.float32) * mask
    return PredictionRows(
        logits=rng.normal(labels, 1).astype(np.float32),
        labels=labels,
        mask=mask,
        scenario=(rng.random(n) < 0.25).astype(np.int64),
        weight=np.ones(n, np.float32),
        group=rng.integers(0, groups, n),
        row=np.arange(n),
    )


def test_slices_are_those_of_task_and_scenario():
    rows = prediction_rows()
    report = build_report(rows, tasks=TASKS, scenario=PAGES)
    for t, task in enumerate(TASKS):
        entry = report["tasks"][task.name]
        for where, part in [(rows.mask[:, t], entry)] + [
            (rows.mask[:, t] & (rows.scenario == s), entry["scenarios"][value]) for s, value in enumerate(PAGES.values)
        ]:
            logit, label = rows.logits[where, t], rows.labels[where, t]
            assert part["auc"] == pytest.approx(sk.roc_auc_score(label, logit), abs=1e-12)
            assert part["rows"] == where.sum()
            assert part["positives"] == label.sum()
            assert 0 < part["gauc"] < 1
        aucs = [p["auc"] for p in entry["scenarios"].values()]
        sizes = [p["rows"] for p in entry["scenarios"].values()]
        assert entry["scenario_mean"]["auc"] == pytest.approx(np.mean(aucs))
        assert entry["scenario_weighted_mean"]["auc"] == pytest.approx(np.average(aucs, weights=sizes))
        assert sizes[0] > 2 * sizes[1]
    for name in ("auc", "gauc", "logloss", "normalized_entropy", "calibration"):
        assert report["mean"][name] == pytest.approx(np.mean([report["tasks"][t.name][name] for t in TASKS]))
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_missing_labels_do_not_matter():
    rows = prediction_rows()
    poisoned = dataclasses.replace(
        rows, labels=np.where(rows.mask, rows.labels, np.nan), logits=np.where(rows.mask, rows.logits, np.nan)
    )
    assert build_report(poisoned, tasks=TASKS, scenario=PAGES) == build_report(rows, tasks=TASKS, scenario=PAGES)


def test_weights_reach_the_metrics():
    rows = prediction_rows()
    rng = np.random.default_rng(1)
    weighted = dataclasses.replace(rows, weight=rng.uniform(0.1, 2, 500).astype(np.float32))
    entry = build_report(weighted, tasks=TASKS, scenario=PAGES)["tasks"]["buy"]["scenarios"]["cart"]
    own = rows.mask[:, 1] & (rows.scenario == 1)
    expected = sk.roc_auc_score(rows.labels[own, 1], rows.logits[own, 1], sample_weight=weighted.weight[own])
    assert entry["auc"] == pytest.approx(expected, abs=1e-12)
    probability = 1 / (1 + np.exp(-rows.logits[own, 1].astype(np.float64)))
    expected = sk.log_loss(rows.labels[own, 1], probability, sample_weight=weighted.weight[own])
    assert entry["logloss"] == pytest.approx(expected, rel=1e-10)
    assert entry["gauc"] == pytest.approx(looped_gauc(weighted, own, 1), abs=1e-12)
    buy = build_report(weighted, tasks=TASKS, scenario=PAGES)["tasks"]["buy"]
    totals = [weighted.weight[rows.mask[:, 1] & (rows.scenario == s)].sum(dtype=np.float64) for s in range(2)]
    for name in ("auc", "gauc", "logloss"):
        parts = [part[name] for part in buy["scenarios"].values()]
        assert buy["scenario_weighted_mean"][name] == pytest.approx(np.average(parts, weights=totals), rel=1e-12)
        assert buy["scenario_mean"][name] == pytest.approx(np.mean(parts), rel=1e-12)


def test_a_row_of_weight_3_counts_as_three_rows():
    tasks = [TASKS[0], Task(name="seconds", kind="regression")]
    rows = prediction_rows()
    times = np.random.default_rng(2).integers(0, 4, len(rows.row))
    weighted = dataclasses.replace(rows, weight=times.astype(np.float32))
    repeated = PredictionRows(**{name: np.repeat(values, times, axis=0) for name, values in vars(rows).items()})
    reports = [build_report(each, tasks=tasks, scenario=PAGES, chain=(0, 1)) for each in (weighted, repeated)]
    numbers = [{}, {}]
    for found, report in zip(numbers, reports, strict=True):
        for task, entry in [*report["tasks"].items(), ("cvr", report["cvr"]), ("mean", {"scenarios": {"all": report["mean"]}})]:
            for name, part in {"all": entry, **entry["scenarios"], **entry}.items():
                if isinstance(part, dict):
                    found |= {(task, name, metric): value for metric, value in part.items() if isinstance(value, float)}
    assert len(numbers[0]) > 70
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-9)


def looped_gauc(rows, own, column):
    """GAUC by weight, of the groups of the rows `own` one by one."""
    aucs, totals = [], []
    for group in np.unique(rows.group[own]):
        of_group = own & (rows.group == group)
        label = rows.labels[of_group, column]
        if 0 < label.sum() < len(label):
            weight = rows.weight[of_group].astype(np.float64)
            aucs.append(sk.roc_auc_score(label, rows.logits[of_group, column], sample_weight=weight))
            totals.append(weight.sum())
    return np.average(aucs, weights=totals)


def test_one_class_slice_is_null_left_out_of_means_and_warned_about():
    rows = prediction_rows()
    rows.labels[rows.scenario == 1, 1] = 0
    with pytest.warns(UserWarning, match=r"left out of means for buy in page=cart\.$"):
        report = build_report(rows, tasks=TASKS, scenario=PAGES)
    buy = report["tasks"]["buy"]
    assert buy["scenarios"]["cart"]["auc"] is None
    assert buy["scenarios"]["cart"]["logloss"] > 0
    for mean in ("scenario_mean", "scenario_weighted_mean"):
        assert buy[mean]["auc"] == pytest.approx(buy["scenarios"]["home"]["auc"])
    losses = [buy["scenarios"][value]["logloss"] for value in PAGES.values]
    assert buy["scenario_mean"]["logloss"] == pytest.approx(np.mean(losses))


def test_a_task_without_labels_is_null_everywhere():
    rows = prediction_rows()
    rows.mask[:, 1] = False
    with pytest.warns(UserWarning, match=r"for buy, buy in page=home, buy in page=cart"):
        report = build_report(rows, tasks=TASKS, scenario=PAGES)
    assert report["tasks"]["buy"]["rows"] == 0
    assert report["tasks"]["buy"]["scenario_weighted_mean"]["auc"] is None
    assert report["mean"]["auc"] == report["tasks"]["click"]["auc"]


def test_without_groups_and_scenarios():
    rows = prediction_rows(groups=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = build_report(rows, tasks=TASKS, scenario=None)
    assert report["tasks"]["click"]["gauc"] is None
    assert "scenarios" not in report["tasks"]["click"]
    assert "gauc" not in report_table(report)


@pytest.mark.parametrize("weighted", [False, True])
def test_regression_tasks_have_errors_of_their_own(weighted):
    tasks = [TASKS[0], Task(name="seconds", kind="regression")]
    rows = prediction_rows()
    if weighted:
        rows = dataclasses.replace(rows, weight=np.random.default_rng(1).uniform(0.1, 2, 500).astype(np.float32))
    deviations = {"seconds": {"all": 2.0, "home": 0.5}}  # of cart's labels in train nothing is known
    report = build_report(rows, tasks=tasks, scenario=PAGES, deviations=deviations)
    seconds = report["tasks"]["seconds"]
    for part, chosen, deviation in (
        (seconds, rows.scenario >= 0, 2.0),
        (seconds["scenarios"]["home"], rows.scenario == 0, 0.5),
        (seconds["scenarios"]["cart"], rows.scenario == 1, None),
    ):
        own = chosen & rows.mask[:, 1]
        value, label = rows.logits[own, 1].astype(np.float64), rows.labels[own, 1]
        mse = sk.mean_squared_error(label, value, sample_weight=rows.weight[own])
        expected = {
            "mse": mse,
            "rmse": mse**0.5,
            "mae": sk.mean_absolute_error(label, value, sample_weight=rows.weight[own]),
            "rows": own.sum(),
        }
        if deviation is not None:
            expected["r2"] = 1 - mse / deviation**2
        assert {name: part[name] for name in expected} == pytest.approx(expected, rel=1e-9)
        assert (part["r2"] is None) == (deviation is None)
        assert "auc" not in part
    assert report["mean"]["auc"] == report["tasks"]["click"]["auc"]
    assert report["mean"]["mse"] == seconds["mse"]
    assert seconds["scenario_mean"]["r2"] == seconds["scenarios"]["home"]["r2"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_regression_without_rows_is_null():
    rows = prediction_rows()
    rows.mask[:, 1] = False
    report = build_report(rows, tasks=[TASKS[0], Task(name="seconds", kind="regression")], scenario=None)
    assert report["tasks"]["seconds"] == {"mse": None, "rmse": None, "mae": None, "r2": None, "rows": 0}


def test_nan_predictions_are_an_error():
    rows = prediction_rows()
    rows.logits[np.flatnonzero(rows.mask[:, 1])[:3], 1] = np.nan
    with pytest.raises(DataError, match=r"task 'buy': 3 of \d+ predictions are NaN"):
        build_report(rows, tasks=TASKS, scenario=None)


def test_tables_are_aligned_and_complete():
    report = build_report(prediction_rows(), tasks=TASKS, scenario=PAGES)
    lines = report_table(report).splitlines()
    assert lines[0].split() == ["task", "scenario", *COLUMNS]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + 2 * 5 + 1
    home = report["tasks"]["click"]["scenarios"]["home"]
    assert [f"{home['auc']:.4f}", str(home["rows"])] == [lines[3].split()[4], lines[3].split()[2]]


def test_seeds_table_gives_mean_and_sample_deviation():
    reports = [build_report(prediction_rows(seed=s), tasks=TASKS, scenario=PAGES) for s in range(3)]
    aucs = [r["tasks"]["buy"]["scenarios"]["cart"]["auc"] for r in reports]
    line = next(x for x in seeds_table(reports).splitlines() if x.split()[:2] == ["buy", "cart"])
    assert f"{np.mean(aucs):.4f} ± {np.std(aucs, ddof=1):.4f}" in line


def test_one_seed_has_no_deviation():
    report = build_report(prediction_rows(), tasks=TASKS, scenario=None)
    line = next(x for x in seeds_table([report]).splitlines() if x.startswith("buy "))
    assert line.split()[2] == f"{report['tasks']['buy']['auc']:.4f}"
    assert "±" not in line


def test_no_line_of_a_report_is_called_like_another():
    """Tasks and scenarios may have the names of means, of the entry of a chain, and of what these become in quotes."""
    rows, tasks = prediction_rows(), [Task(name="mean"), Task(name="cvr")]
    for first, second in [("mean", '"mean"'), ("weighted mean", ""), ("scenario_mean", '""'), ('"', '"\\"mean\\""')]:
        place = Scenario(name="page", values=[first, second])
        for chain in ((), (0, 1)):
            report = build_report(rows, tasks=tasks, scenario=place, chain=chain)
            names = [(task, scenario) for task, scenario, _ in lines_of(report)]
            assert len(set(names)) == len(names) == 5 * (3 if chain else 2) + 1
            named = dict(entries_of(report))
            assert named['"mean"'] is report["tasks"]["mean"]
            assert named['"cvr"' if chain else "cvr"] is report["tasks"]["cvr"]
            assert report.get("cvr") is (named["cvr"] if chain else None)
            entry = {(task, scenario): entry for task, scenario, entry in lines_of(report)}
            assert entry[('"mean"', "mean")] is report["tasks"]["mean"]["scenario_mean"]
            assert entry[("mean", "all")] is report["mean"]
    plain = build_report(rows, tasks=TASKS, scenario=PAGES)
    assert [name for _, name, _ in lines_of(plain)][:5] == ["all", "home", "cart", "mean", "weighted mean"]


def test_a_task_called_cvr_has_its_own_numbers_in_the_table_of_days():
    """Beside the conditional rate of a chain, which has that name, too."""
    report = build_report(prediction_rows(), tasks=[Task(name="click"), Task(name="cvr")], scenario=None, chain=(0, 1))
    line = {"day": "monday", "rows": {"train": 1}, "new_ids": {}, "forgotten": None, "next_day": report}
    heading, _, cells = days_table([line]).splitlines()
    names = [f"{task} {name}" for task in ("click", '"cvr"', "cvr") for name in ("auc", "logloss")]
    assert heading.split("new ids")[1].split() == " ".join(names).split()
    entries = [report["tasks"]["click"], report["tasks"]["cvr"], report["cvr"]]
    assert cells.split()[3:] == [f"{entry[name]:.4f}" for entry in entries for name in ("auc", "logloss")]
    assert report["tasks"]["cvr"]["auc"] != report["cvr"]["auc"]


def test_what_is_undefined_everywhere_has_a_column_and_is_told():
    rows, tasks = prediction_rows(), [TASKS[0], Task(name="seconds", kind="regression")]
    rows.labels[:] = rows.mask
    with pytest.warns(UserAdvice) as told:
        report = build_report(rows, tasks=tasks, scenario=None)
    assert sorted(str(each.message).split(" for ")[-1] for each in told) == ["click.", "seconds."]
    assert any("R² is undefined" in str(each.message) for each in told)
    heading, _, click, seconds, mean = report_table(report).splitlines()
    assert [name for name in (*COLUMNS, "mse", "rmse", "mae", "r2") if name not in heading.split()] == ["gauc"]
    assert (click.count("-"), seconds.count("-"), mean.count("-")) == (2, 1, 3)
    assert "nan" not in report_table(report)


def test_gauc_that_no_group_of_a_scenario_has_is_told():
    rows = prediction_rows(groups=100)
    alone = dataclasses.replace(rows, group=np.where(rows.scenario == 1, rows.row, rows.group))
    with pytest.warns(UserWarning, match=r"No group with .* GAUC is .* for click in page=cart, buy in page=cart\.$"):
        report = build_report(alone, tasks=TASKS, scenario=PAGES)
    click = report["tasks"]["click"]
    assert click["scenarios"]["cart"]["gauc"] is None
    assert click["scenario_mean"]["gauc"] == click["scenarios"]["home"]["gauc"]
    assert click["scenarios"]["cart"]["auc"] is not None


def test_seeds_of_which_one_has_no_value():
    reports = [build_report(prediction_rows(seed=s), tasks=TASKS, scenario=None) for s in range(2)]
    for lacking in (0, 1):
        some = [json.loads(json.dumps(report)) for report in reports]
        some[lacking]["tasks"]["buy"]["auc"] = None
        heading, _, click, buy, _ = seeds_table(some).splitlines()
        assert heading.split()[2] == "auc"
        assert buy.split()[2] == "-"
        assert "±" in click.split()


def test_tables_of_one_and_of_several_reports_are_marked_where_labels_are_no_chain():
    report = build_report(prediction_rows(), tasks=TASKS, scenario=None)
    marked = report | {"allow_non_chain": True}
    assert "no chain" not in report_table(report) + seeds_table([report, report])
    for table in (report_table(marked), seeds_table([marked, marked])):
        assert table.startswith("Trained on labels that are no chain (model.allow_non_chain).\n")


def test_cvr_is_measured_on_rows_that_are_positive_in_the_first_step():
    rows = prediction_rows()
    p = 1 / (1 + np.exp(-rows.logits.astype(np.float64)))
    report = build_report(rows, tasks=TASKS, scenario=PAGES, chain=(0, 1))
    clicked = rows.mask.all(axis=1) & (rows.labels[:, 0] == 1)
    for where, entry in [(clicked, report["cvr"])] + [
        (clicked & (rows.scenario == s), report["cvr"]["scenarios"][value]) for s, value in enumerate(PAGES.values)
    ]:
        label, rate = rows.labels[where, 1], np.minimum(p[where, 1] / p[where, 0], 1)
        assert entry["rows"] == where.sum() > 0
        assert entry["auc"] == pytest.approx(sk.roc_auc_score(label, rate), abs=1e-12)
        assert entry["calibration"] == pytest.approx(rate.sum() / label.sum(), rel=1e-6)
    assert report["mean"] == build_report(rows, tasks=TASKS, scenario=PAGES)["mean"]
    assert "cvr" not in build_report(rows, tasks=TASKS, scenario=PAGES)
    lines = report_table(report).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("cvr ")] == ["all", "home", "cart", "mean", "weighted"]


def test_a_ratio_of_two_heads_ranks_and_is_no_probability():
    """Where the last step is held to be likelier than the first: a clamped ratio would cost any loss, and tie such rows."""
    rows = prediction_rows()
    p = 1 / (1 + np.exp(-rows.logits.astype(np.float64)))
    report = build_report(rows, tasks=TASKS, scenario=PAGES, chain=(0, 1), conditional=False)
    clicked = rows.mask.all(axis=1) & (rows.labels[:, 0] == 1)
    ratio = (p[:, 1] / p[:, 0])[clicked]
    assert (ratio > 1).sum() > 10
    entry = report["cvr"]
    assert entry["above_one"] == (ratio > 1).sum()
    assert entry["auc"] == pytest.approx(sk.roc_auc_score(rows.labels[clicked, 1], ratio), abs=1e-12)
    for part in (entry, *entry["scenarios"].values(), entry["scenario_mean"], entry["scenario_weighted_mean"]):
        assert part["auc"] is not None
        assert [part[metric] for metric in ("logloss", "normalized_entropy", "calibration")] == [None] * 3
    line = next(line for line in report_table(report).splitlines() if line.startswith("cvr "))
    assert line.split()[-3:] == ["-", "-", "-"]
    assert report["mean"] == build_report(rows, tasks=TASKS, scenario=PAGES)["mean"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_rounding_of_float32_logits_is_no_certain_mistake():
    rows = prediction_rows(n=4)
    logits = np.array([[1.0, 1.0]] * 4, np.float32)  # a conversion that all clicks but e^-20 have, as float32 holds it
    labels = np.array([[1, 0], [1, 1], [1, 1], [1, 1]], np.float32)
    rows = dataclasses.replace(rows, logits=logits, labels=labels, mask=np.ones((4, 2), bool))
    report = build_report(rows, tasks=TASKS, scenario=None, chain=(0, 1))
    assert report["cvr"]["logloss"] == pytest.approx(np.log(1e7) / 4, rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_many_scenarios_are_each_right_and_no_number_is_summed_more_than_once(monkeypatch, weighted):
    """300 of them: more than fit into a byte. Sums of all rows are those of the scenarios, so each number is summed once."""
    rng, num_rows = np.random.default_rng(3), 9000
    label = (rng.random(num_rows) < 0.4).astype(np.float32)
    scenario = rng.integers(0, 300, num_rows).astype(np.int32)
    rows = PredictionRows(
        logits=rng.normal(label, 1).astype(np.float32)[:, None],
        labels=label[:, None],
        mask=np.ones((num_rows, 1), bool),
        scenario=scenario,
        weight=rng.uniform(0.5, 2, num_rows).astype(np.float32) if weighted else np.ones(num_rows, np.float32),
        group=rng.integers(0, 20, num_rows),
        row=np.arange(num_rows),
    )
    summed, exact_sum = [0], exact.exact_sum

    def counting(numbers):
        summed[0] += len(numbers)
        return exact_sum(numbers)

    monkeypatch.setattr(exact, "exact_sum", counting)
    report = build_report(rows, tasks=[Task(name="click")], scenario=Scenario(name="page", values=[str(i) for i in range(300)]))
    assert summed[0] <= (7 if weighted else 4) * num_rows  # loss, label, probability, perhaps with weights; groups' AUCs
    for index in (0, 127, 128, 255, 256, 299):
        own = scenario == index
        found, weight = report["tasks"]["click"]["scenarios"][str(index)], rows.weight[own]
        logits = rows.logits[own, 0].astype(np.float64)
        assert found["rows"] == own.sum()
        assert found["auc"] == pytest.approx(sk.roc_auc_score(label[own], logits, sample_weight=weight), abs=1e-12)
        loss = sk.log_loss(label[own], 1 / (1 + np.exp(-logits)), sample_weight=weight)
        assert found["logloss"] == pytest.approx(loss, abs=1e-9)
