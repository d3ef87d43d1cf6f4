"""A report of slices in which hardly anything is defined: that of the scores that were written, and told alike everywhere."""

import csv
import json
import math
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.metrics import log_loss, mean_squared_error, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mmlrec
from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.errors import DataError
from mmlrec.metrics.report import lines_of, report_table
from mmlrec.schema import Scenario
from mmlrec.training.run import train
from tests.datasets import rewrite_part, write_dataset
from tests.training.launch import launch, validations

#: Scenarios, some called like lines of a report; of valid and test the rows of each are what the comment says.
NAMES = [
    "mean",  # as they come
    "weighted mean",  # of one class
    "",  # of weight 0
    "scenario_mean",  # there are none
    '"mean"',  # without a label of click, and with one row of buy
    "Zürich/東京, 1",  # 1e-20 as heavy as others
]
TASKS = ("click", "mean")
CONFIG = """
dataset: {{path: {dataset}, setting: {setting}}}
model: {{name: {model}, expert_hidden_units: [6, 4], tower_hidden_units: [3]}}
embeddings: {{dim: 4, init_std: 0.3, optimizer: {{name: adagrad, lr: 0.2}}}}
dense: {{optimizer: {{name: adam, lr: 0.02}}}}
training: {{batch_size: 40, max_steps: 8, validate_every_steps: 4, log_every_steps: 2}}
"""


def degenerate(table):
    """Of a table whose rows are of five scenarios, as `NAMES` says; of users some have labels of one class."""
    scenario = np.array([0, 1, 2, 4, 5])[table["sample.scenario"].to_numpy()]
    columns = {name: table[name].to_pandas().to_numpy().copy() for name in table.column_names if name.startswith("label.")}
    weight = table["sample.weight"].to_numpy().copy()
    for name in ("label.click", "label.mean"):
        columns[name][scenario == 1] = np.where(np.isnan(columns[name][scenario == 1]), np.nan, 1)
    columns["label.click"][scenario == 4] = np.nan
    columns["label.mean"][np.flatnonzero(scenario == 4)[1:]] = np.nan
    columns["label.mean"][np.flatnonzero(scenario == 4)[0]] = 0
    weight[scenario == 2] = 0
    weight[scenario == 5] *= 1e-20
    columns = {name: pa.array(values.astype(np.float32), from_pandas=True) for name, values in columns.items()}
    columns |= {"sample.scenario": pa.array(scenario), "sample.weight": pa.array(weight)}
    return pa.table({name: columns.get(name, table[name]) for name in table.column_names})


def count(table):
    scenario = table["sample.scenario"].to_numpy()
    found = {}
    for name in [name for name in table.column_names if name.startswith("label.")]:
        label, where = table[name].to_pandas().to_numpy(), {"all": scenario >= 0}
        where |= {value: scenario == index for index, value in enumerate(NAMES)}
        found[name.removeprefix("label.")] = {
            value: (int((~np.isnan(label[own])).sum()), int((label[own] > 0).sum())) for value, own in where.items()
        }
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("degenerate") / "data"
    written = write_dataset(
        folder, rows=240, tasks=TASKS, num_scenarios=5, weights=True, rows_per_part=1000, regression={"seconds": (1, 0)}
    )
    splits = {}
    for split, table in written.tables.items():
        changed = degenerate(table) if split != "train" else table
        manifest = rewrite_part(written, changed, split=split)
        written.manifest = manifest
        splits[split] = manifest.splits[split].model_copy(update={"label_counts": count(changed), "scenario_rows": {}})
    known = manifest.statistics["label_values"]["seconds"]["train"]
    statistics = {"label_values": {"seconds": {"train": dict.fromkeys(("all", *NAMES[:4]), known["all"])}}}
    update = {"splits": splits, "scenario": Scenario(name="place", values=NAMES), "statistics": statistics}
    manifest.model_copy(update=update).save(folder)
    return folder


@pytest.fixture(scope="module")
def run(data):
    file = data.parent / "config.yaml"
    file.write_text(CONFIG.format(dataset=data, setting="mtmsl", model="mmoe"))
    with process_group() as world:
        train(load_config(file, []), data.parent / "run", world)
    return data.parent / "run"


@pytest.fixture(scope="module")
def result(run):
    return json.loads((run / "result.json").read_text())["test"]


def worked_out(rows, task):
    """Metrics of a slice from columns of written scores; NaN where they are not defined."""
    rows = rows[rows[f"label.{task}"].notna()]
    label, score, weight = (rows[name].to_numpy(np.float64) for name in (f"label.{task}", f"score.{task}", "sample.weight"))
    counts = {"rows": len(rows)} | ({} if task == "seconds" else {"positives": int(label.sum())})
    kept = weight > 0
    label, score, weight, user = label[kept], score[kept], weight[kept], rows["key.user"].to_numpy()[kept]
    if task == "seconds":
        mse = mean_squared_error(label, score, sample_weight=weight) if len(label) else math.nan
        return counts | {"mse": mse}
    if not len(label):
        return counts | dict.fromkeys(("auc", "gauc", "logloss", "normalized_entropy", "calibration"), math.nan)
    found = counts | {"logloss": log_loss(label, score, sample_weight=weight, labels=[0, 1])}
    found["calibration"] = (weight * score).sum() / (weight * label).sum() if label.any() else math.nan
    if len(set(label)) < 2:
        return found | dict.fromkeys(("auc", "gauc", "normalized_entropy"), math.nan)
    rate = np.average(label, weights=weight)
    found["auc"] = roc_auc_score(label, score, sample_weight=weight)
    found["normalized_entropy"] = found["logloss"] / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    of_users = []
    for each in np.unique(user):
        own = user == each
        if len(set(label[own])) == 2:
            of_users.append((roc_auc_score(label[own], score[own], sample_weight=weight[own]), weight[own].sum()))
    total = sum(size for _, size in of_users)
    return found | {"gauc": sum(value * size for value, size in of_users) / total if of_users else math.nan}


def numbers(entry):
    """The metrics of an entry of a report, undefined ones as NaN."""
    return {name: math.nan if value is None else value for name, value in entry.items() if not isinstance(value, dict)}


def test_every_number_is_that_of_the_written_scores(data, run, result):
    """Which are read by names: of the scenario, too."""
    scores = mmlrec.load_run(run).predict(data)
    assert list(scores)[-2:] == ["scenario.place", "sample.weight"]
    assert [NAMES[index] for index in scores["sample.scenario"]] == list(scores["scenario.place"])
    undefined = 0
    for task, entry in result["tasks"].items():
        for name, part in {None: entry, **entry["scenarios"]}.items():
            rows = scores if name is None else scores[scores["scenario.place"] == name]
            expected, found = worked_out(rows, task), numbers(part)
            for metric, value in expected.items():
                assert found[metric] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), (task, name, metric)
                undefined += math.isnan(value)
    assert undefined > 20


def test_scores_as_csv_and_json_have_the_same_names(data, run, tmp_path, run_app):
    for ending in ("csv", "jsonl"):
        code, error = run_app("predict", "--run-dir", run, "--input", data, "--output", tmp_path / f"scores.{ending}")
        assert code == 0, error
    expected = mmlrec.load_run(run).predict(data)
    with (tmp_path / "scores.csv").open(encoding="utf-8") as file:
        of_csv = list(csv.DictReader(file))
    of_json = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    for found in (of_csv, of_json):
        assert [row["scenario.place"] for row in found] == list(expected["scenario.place"])
        np.testing.assert_allclose([float(row["sample.weight"]) for row in found], expected["sample.weight"], rtol=1e-6)


def test_ranks_find_the_same_numbers(run, result, tmp_path):
    launch(2, [{"kind": "evaluate", "run_dir": str(run), "overrides": [], "output": str(tmp_path / "report.json")}], tmp_path)

    def flat(report, prefix=()):
        for name, value in report.items():
            if isinstance(value, dict):
                yield from flat(value, (*prefix, name))
            else:
                yield (*prefix, name), math.nan if value is None else value

    # Scores of two ranks are equal to rounding.
    expected = dict(flat(result))
    assert dict(flat(json.loads((tmp_path / "report.json").read_text()))) == pytest.approx(expected, rel=1e-4, nan_ok=True)


def test_table_frame_and_curves_tell_the_same(run, result):
    """No line is called like another, and what is not defined is `-`, NaN, and no point of a curve; never 0."""
    lines = {(task, scenario): entry for task, scenario, entry in lines_of(result)}
    assert len(lines) == len(list(lines_of(result))) == 3 * (1 + len(NAMES) + 2) + 1
    assert lines[("click", '"mean"')] is result["tasks"]["click"]["scenarios"]["mean"]
    assert lines[("click", '"\\"mean\\""')] is result["tasks"]["click"]["scenarios"]['"mean"']
    assert lines[("click", '""')] is result["tasks"]["click"]["scenarios"][""]
    assert lines[("click", "mean")] is result["tasks"]["click"]["scenario_mean"]
    assert lines[('"mean"', "all")] is result["tasks"]["mean"]
    assert lines[("mean", "all")] is result["mean"]

    frame = mmlrec.load_run(run).evaluate()
    assert frame.index.is_unique
    heading, _, *rows = report_table(result).splitlines()
    names = heading[heading.index("rows") :].split()
    stops = [heading.index(f" {name}") + 1 + len(name) for name in names]  # numbers stand at the right of their column
    for row, ((task, scenario), entry) in zip(rows, lines.items(), strict=True):
        assert row.startswith(f"{task} ")
        assert f" {scenario} " in row
        for name, start, stop in zip(names, [heading.index("rows") - 1, *stops], stops, strict=False):
            cell, value = row[start:stop].strip(), entry.get(name)
            written = str(value) if name in ("rows", "positives") else f"{value or 0:.4f}"
            assert cell == ("" if name not in entry else "-" if value is None else written), (task, scenario, name)
            assert frame.loc[(task, scenario), name] == value or (pd.isna(frame.loc[(task, scenario), name]) and value is None)

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    (last,) = [line for line in validations(run) if line["step"] == 8]
    expected = {}
    for task, scenario, entry in lines_of(last["report"]):
        if task == "mean":
            group, name = "valid", "mean_over_tasks"
        elif scenario == "all":
            group, name = "valid", task
        else:
            means = {"mean": "scenario_mean", "weighted mean": "scenario_weighted_mean"}
            group, name = "valid_scenarios", f"{task}/{means.get(scenario, scenario)}"
        metrics = {metric: value for metric, value in entry.items() if metric in ("auc", "gauc", "logloss", "mse", "r2")}
        expected |= {f"{group}/{metric}/{name}": value for metric, value in metrics.items()}
    assert len([tag for tag, value in expected.items() if value is None]) > 20
    found = {}
    for tag in events.Tags()["scalars"]:
        points = [point.value for point in events.Scalars(tag) if point.step == 8]
        if tag.split("/")[0] in ("valid", "valid_scenarios") and tag.split("/")[1] in ("auc", "gauc", "logloss", "mse", "r2"):
            (found[tag],) = points
    assert found == pytest.approx({tag: value for tag, value in expected.items() if value is not None}, rel=1e-6)


def test_what_is_undefined_is_told_with_the_reason(run):
    log = (run / "train.log").read_text()
    places = ['"weighted mean"', '""', '"scenario_mean"', '"\\"mean\\""']
    for told in (
        "Labels of one class only (or no rows, or weights of 0): AUC is undefined and left out of means for "
        + ", ".join(f"click in place={place}" for place in places),
        'No rows (or weights of 0): errors are undefined and left out of means for seconds in place="", seconds in place="scen',
        'Labels of one value in train, or none recorded: R² is undefined and left out of means for seconds in place="\\"mean',
    ):
        assert told in log


def test_a_run_without_any_value_to_go_by_ends_with_the_reason(data, tmp_path):
    """All rows of valid that have labels of both classes weigh 0: what the manifest counts cannot tell that."""
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(dataset=data, setting="mtmsl", model="mmoe"))
    with process_group() as world, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"gives no value to click\.\.auc, by which .*or its rows weigh 0"):
            train(load_config(file, ["training.monitor=click..auc"]), tmp_path / "run", world)
