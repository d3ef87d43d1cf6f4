"""What the best checkpoint goes by: any metric of the report, sums of them, and regression tasks beside binary ones."""

import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.errors import ConfigError, DataError
from mmlrec.evaluation.evaluation import evaluate_split
from mmlrec.evaluation.prediction import write_predictions
from mmlrec.metrics.gather import PredictionRows
from mmlrec.metrics.report import BINARY_METRICS, RANKING_METRICS, REGRESSION_METRICS, build_report
from mmlrec.run_folder.folder import RunFolder
from mmlrec.session.parts import build_parts
from mmlrec.session.session import build_session, load_session
from mmlrec.training import run as run_module
from mmlrec.training.monitor import HIGHER, LOWER, Term, build_monitor, metrics_of_cvr
from mmlrec.training.run import train
from mmlrec.training.selection import Selection
from tests.datasets import rewrite_part, write_dataset
from tests.training.launch import launch, tensors, validations

CONFIG = """
dataset: {{path: {dataset}, setting: {setting}}}
model: {{name: {name}, expert_hidden_units: [6, 4], tower_hidden_units: [3]}}
embeddings: {{dim: 4, init_std: 0.3, optimizer: {{name: adagrad, lr: 0.2}}}}
dense: {{optimizer: {{name: adam, lr: 0.02}}}}
training:
  {{batch_size: 40, max_steps: 12, validate_every_steps: 2, checkpoint_every_steps: 2, keep_checkpoints: 50, patience: 50}}
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A dataset with two binary tasks and a regression task."""
    return write_dataset(tmp_path_factory.mktemp("mixed") / "data", rows=400, num_scenarios=2, regression={"seconds": (1, 0)})


def config_of(dataset, *overrides, setting="mtl", name="mmoe"):
    file = dataset.folder.parent / f"{setting}-{name}.yaml"
    file.write_text(CONFIG.format(dataset=dataset.folder, setting=setting, name=name))
    return load_config(file, list(overrides))


def run(dataset, folder, *overrides, **more):
    with process_group() as world:
        train(config_of(dataset, *overrides, **more), folder, world)
    return folder


def selection_of(folder):
    return json.loads((folder / "checkpoints/best/state.json").read_text())["selection"]


# The values themselves.


def report_of(**tasks):
    return {"tasks": tasks, "mean": {}}


def test_a_better_auc_is_not_lost_to_a_percent_of_the_squared_error(mixed):
    """AUC .80 beside MSE 100 against .50 beside 99, where labels of train have a variance of 400: R² .75 and .7525."""
    values = {"train": {"all": {"mean": 30.0, "deviation": 20.0}}}
    manifest = mixed.manifest.model_copy(update={"statistics": {"label_values": {"seconds": values}}})
    click, seconds = (next(task for task in mixed.manifest.tasks if task.name == name) for name in ("click", "seconds"))
    n, selection = 2000, Selection(patience=3)
    monitor = build_monitor(None, manifest, [click, seconds])
    for step, (auc, mse) in enumerate([(0.8, 100.0), (0.5, 99.0)]):
        # Half of the rows are positive, and a share of `auc` of the positives is ranked above all others, the rest below.
        above = np.arange(n // 2) < auc * n // 2
        logits = np.stack([np.r_[np.where(above, 1.0, -1.0), np.zeros(n // 2)], np.full(n, mse**0.5)], axis=1)
        labels = np.stack([np.r_[np.ones(n // 2), np.zeros(n // 2)], np.zeros(n)], axis=1)
        ids = np.zeros(n, np.int64)
        rows = PredictionRows(logits, labels, labels >= 0, ids, np.ones(n, np.float32), ids, np.arange(n))
        report = build_report(rows, tasks=[click, seconds], scenario=None, deviations={"seconds": {"all": 20.0}})
        assert monitor.values(report) == {"all": pytest.approx((auc + 1 - mse / 400) / 2, abs=1e-12)}
        selection.update(monitor.values(report), step)
    assert selection.best_step == {"all": 0}


def test_every_metric_of_the_report_has_a_direction():
    assert sorted([*HIGHER, *LOWER, "calibration"]) == sorted([*BINARY_METRICS, *REGRESSION_METRICS])
    for better, worse, metric in (
        *((0.9, 0.1, metric) for metric in HIGHER),
        *((0.1, 0.9, metric) for metric in LOWER),
        (1.05, 0.9, "calibration"),
        (0.9, 1.2, "calibration"),
    ):
        values = [Term("t", ("tasks", "t"), metric).value(report_of(t={metric: value})) for value in (better, worse)]
        assert values[0] > values[1], metric


def test_a_weighted_sum_worked_by_hand(mixed):
    tasks = mixed.manifest.tasks
    monitor = build_monitor({"click.s1.auc": 2.0, "buy.logloss": 0.5, "seconds.rmse": 1.0}, mixed.manifest, tasks)
    report = report_of(click={"scenarios": {"s1": {"auc": 0.75}}}, buy={"logloss": 0.5}, seconds={"rmse": 3.0})
    assert monitor.values(report) == {"all": 2 * 0.75 - 0.5 * 0.5 - 3}
    assert str(monitor) == "2 click.s1.auc - 0.5 buy.logloss - seconds.rmse"
    assert str(build_monitor(None, mixed.manifest, tasks)) == "mean of click.auc, buy.auc, seconds.r2"
    monitor = build_monitor({"mean.gauc": 1.0, "seconds.scenario_mean.mae": 1.0}, mixed.manifest, tasks)
    report = {"mean": {"gauc": 0.6}, "tasks": {"seconds": {"scenario_mean": {"mae": 2.0}}}}
    assert monitor.values(report) == {"all": 0.6 - 2}


@pytest.mark.parametrize(
    ("name", "told"),
    {
        "buy.guac": ["Did you mean 'buy.gauc'?", "buy: auc, gauc, logloss"],
        "by.auc": ["Did you mean 'buy.auc'?"],
        "auc": ["TASK.METRIC", "mean.METRIC"],
        "buy.s2.auc": ["Did you mean 'buy.s", "TASK.SCENARIO.METRIC"],
        "seconds.auc": ["seconds: mse, rmse, mae, r2"],
        "cvr.auc": ["click: auc"],
    }.items(),
)
def test_a_name_that_the_report_lacks_is_refused(mixed, name, told):
    with pytest.raises(ConfigError) as error:
        build_monitor({name: 1.0}, mixed.manifest, mixed.manifest.tasks)
    for part in (f"training.monitor: '{name}' is no metric of the report.", *told):
        assert part in str(error.value)


def test_gauc_needs_a_group(mixed):
    manifest = mixed.manifest.model_copy(update={"group_key": None})
    with pytest.raises(ConfigError, match="names no group_key, so there is no GAUC"):
        build_monitor({"buy.gauc": 1.0}, manifest, manifest.tasks)


def test_all_names_are_those_of_a_report(mixed):
    """Each name is found where it says, and nothing that a report holds is without one."""
    tasks, rng, n = mixed.manifest.tasks, np.random.default_rng(0), 200
    labels = np.c_[rng.random((n, 2)) < 0.5, rng.normal(size=n)]
    ids = rng.integers(0, 2, n)
    rows = PredictionRows(rng.normal(size=(n, 3)), labels, labels < 99, ids, np.ones(n, np.float32), ids, np.arange(n))
    deviations = {"seconds": {"all": 1.0, "s0": 1.0, "s1": 1.0}}
    report = build_report(rows, tasks=tasks, scenario=mixed.manifest.scenario, chain=(0, 1), deviations=deviations)
    names = {}

    def visit(entry, prefix):
        for key, value in entry.items():
            if isinstance(value, dict):
                visit(value, prefix if key in ("tasks", "scenarios") else f"{prefix}{key}.")
            elif key not in ("rows", "positives"):
                names[prefix + key] = value

    visit(report, "")
    assert len(names) > 60
    for name, value in names.items():
        (found,) = build_monitor({name: 1.0}, mixed.manifest, tasks, cvr=BINARY_METRICS).values(report).values()
        metric = name.rpartition(".")[2]
        wanted = -abs(math.log(value)) if metric == "calibration" else value if metric in HIGHER else -value
        assert found == wanted, name


def test_a_chosen_metric_without_labels_is_refused_before_the_first_step(mixed):
    valid = mixed.manifest.splits["valid"]
    counts = {**valid.label_counts, "buy": {"all": (90, 3), "s0": (50, 3), "s1": (40, 0)}}
    manifest = mixed.manifest.model_copy(
        update={"splits": {**mixed.manifest.splits, "valid": valid.model_copy(update={"label_counts": counts})}}
    )
    for allowed in ("buy.auc", "buy.s0.auc", "buy.scenario_mean.auc", "mean.auc", "buy.s1.logloss"):
        build_monitor({allowed: 1.0}, manifest, manifest.tasks)
    with pytest.raises(DataError, match=r"task 'buy' in scenario s1 has 40 labelled rows, 0 of .*training\.monitor"):
        build_monitor({"click.auc": 1.0, "buy.s1.auc": 1.0}, manifest, manifest.tasks)


def test_gauc_that_no_group_has_is_told_by_name(mixed):
    monitor = build_monitor({"buy.gauc": 1.0}, mixed.manifest, mixed.manifest.tasks)
    with pytest.raises(DataError, match=r"no value to buy\.gauc, by which"):
        monitor.values(report_of(buy={"gauc": None}))


def test_branches_follow_what_is_chosen_of_their_task(mixed):
    branches = [(f"{task}:{s}", task, s) for task, s in itertools.product(("click", "buy", "seconds"), ("s0", "s1"))]
    chosen = {"mean.gauc": 1.0, "buy.s1.logloss": 2.0}
    monitor = build_monitor(chosen, mixed.manifest, mixed.manifest.tasks, branches)
    assert {name: str(target) for name, target in monitor.targets.items()} == {
        "click:s0": "click.s0.gauc",
        "click:s1": "click.s1.gauc",
        "buy:s0": "buy.s0.gauc",
        "buy:s1": "buy.s1.gauc - 2 buy.s1.logloss",
        "seconds:s0": "seconds.s0.r2",
        "seconds:s1": "seconds.s1.r2",
    }
    report = report_of(
        click={"scenarios": {"s0": {"gauc": 0.6}, "s1": {"gauc": None}}},
        buy={"scenarios": {"s0": {"gauc": 0.7}, "s1": {"gauc": 0.8, "logloss": 0.25}}},
        seconds={"scenarios": {"s0": {"r2": 0.1}, "s1": {"r2": 0.2}}},
    )
    with pytest.warns(UserWarning, match=r"branch 'click:s1' \(click\.s1\.gauc\)"):
        values = monitor.values(report)
    expected = {"click:s0": 0.6, "buy:s0": 0.7, "buy:s1": 0.8 - 0.5, "seconds:s0": 0.1, "seconds:s1": 0.2}
    assert values == pytest.approx(expected)


# Runs.


def test_the_best_checkpoint_is_that_of_the_chosen_metric(mixed, tmp_path):
    """The least logloss of buy, which is reached at another step than the default's best."""
    folder = run(mixed, tmp_path / "run", "training.monitor=buy.logloss")
    logged = {line["step"]: line["report"]["tasks"]["buy"]["logloss"] for line in validations(folder)}
    best = min(logged, key=logged.get)
    assert selection_of(folder)["best_step"] == {"all": best}
    assert [line["monitor"] for line in validations(folder)] == [{"all": -value} for value in logged.values()]
    log = (folder / "train.log").read_text()
    assert "by valid, higher is better: - buy.logloss" in log
    assert f"| monitor {-logged[best]:.4f}, best so far" in log
    with pytest.raises(ConfigError, match=r"training\.monitor\.buy\.logloss: 1\.0 in the run folder, None now"):
        run(mixed, folder, "training.monitor=buy.gauc", "training.max_steps=14")
    with pytest.raises(ConfigError, match=r"training\.monitor: 'buy\.loglos' .*Did you mean 'buy\.logloss'"):
        run(mixed, tmp_path / "misspelt", "training.monitor=buy.loglos")
    assert not (tmp_path / "misspelt" / "checkpoints").exists()


@pytest.mark.parametrize("huber", [False, True])
def test_the_unit_of_regression_labels_does_not_matter(tmp_path, huber):
    """Labels 4 y - 64 in place of y: scores follow, and everything else stays, Huber's delta being in the labels' unit."""
    scores, reports, monitors = [], [], []
    for number, unit in enumerate([(1, 0), (4, -64)]):
        data = write_dataset(tmp_path / f"data{number}" / "data", rows=400, num_scenarios=2, regression={"seconds": unit})
        overrides = [f"loss.huber_delta={1.5 * unit[0]}"] if huber else []
        folder = run(data, tmp_path / f"run{number}", *overrides)
        with process_group() as world:
            session, *_ = load_session(RunFolder(folder), world, [])
            write_predictions(session, data.folder, "test", folder / "scores.parquet")
        scores.append(pq.read_table(folder / "scores.parquet")["score.seconds"].to_numpy())
        reports.append(json.loads((folder / "result.json").read_text())["test"]["tasks"])
        monitors.append([line["monitor"]["all"] for line in validations(folder)])
    np.testing.assert_allclose(scores[1], 4 * scores[0] - 64, rtol=0, atol=1e-3)
    assert np.std(scores[0]) > 0.3
    first, second = (report["seconds"] for report in reports)
    assert first["r2"] > 0.1
    for name, factor in (("mse", 16), ("rmse", 4), ("mae", 4), ("r2", 1)):
        assert second[name] == pytest.approx(factor * first[name], rel=1e-3)
        assert second["scenarios"]["s1"][name] == pytest.approx(factor * first["scenarios"]["s1"][name], rel=1e-3)
    assert reports[1]["click"]["auc"] == pytest.approx(reports[0]["click"]["auc"], abs=1e-3)
    np.testing.assert_allclose(monitors[1], monitors[0], atol=1e-3)


@pytest.mark.parametrize("standardise", [True, False])
def test_loss_and_score_of_a_batch_worked_out(mixed, standardise):
    """With outputs z of the network: scores m + s z, losses the mean of (z - (y - m) / s)², or z and the mean of (z - y)²."""
    outputs = []
    labels = mixed.tables["train"]["label.seconds"].to_numpy().astype(np.float64)
    mean, deviation = (np.nanmean(labels), np.nanstd(labels)) if standardise else (0.0, 1.0)
    with process_group() as world:
        config = config_of(mixed, f"loss.standardise_labels={str(standardise).lower()}")
        session = build_session(config, world, for_training=True)
        session.network.register_forward_hook(lambda *call: outputs.append(call[2].logits.detach()))
        batch = next(session.reader("train").epoch(0))
        _, predictions = session.model(batch)
        (logits,) = outputs
        known = batch.mask[:, 2] > 0
        z, y = logits[known, 2].double(), batch.labels[known, 2].double()
        torch.testing.assert_close(predictions.logits[known, 2].double(), mean + deviation * z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(predictions.logits[:, :2], logits[:, :2], rtol=0, atol=0)
        expected = ((z - (y - mean) / deviation) ** 2).mean()
        torch.testing.assert_close(predictions.objectives[2].double(), expected, rtol=1e-5, atol=1e-6)
        batch.labels[batch.mask == 0] = float("nan")  # what is missing has no part in it
        torch.testing.assert_close(session.model(batch)[1].objectives, predictions.objectives)


def test_labels_of_which_nothing_is_recorded_keep_their_unit(tmp_path, capfd):
    """As datasets of earlier releases: trained as before, and selected by the squared error, with a word about it."""
    data = write_dataset(tmp_path / "data" / "data", rows=200, num_scenarios=0, regression={"seconds": (1, 0)})
    data.manifest.model_copy(update={"statistics": {}}).save(data.folder)
    folder = run(data, tmp_path / "run")
    told = f"note: {data.folder} does not record mean and deviation of the labels of seconds: trained in their own unit"
    assert capfd.readouterr().err.count(told) == 1
    for line in validations(folder):
        tasks = line["report"]["tasks"]
        assert tasks["seconds"]["r2"] is None
        expected = (tasks["click"]["auc"] + tasks["buy"]["auc"] - tasks["seconds"]["mse"]) / 3
        assert line["monitor"]["all"] == pytest.approx(expected, rel=1e-12)
    plain = run(data, tmp_path / "plain", "loss.standardise_labels=false")
    assert not tensors_differ(folder, plain, 12)


def test_a_run_of_an_earlier_release_goes_on_as_it_began(mixed, tmp_path, monkeypatch):
    """Its checkpoints say nothing of labels: they are trained in their own unit, and the squared error selects to the end."""
    folder = tmp_path / "earlier"
    with monkeypatch.context() as earlier:
        plain = run_module.build_session
        earlier.setattr(run_module, "build_session", lambda *args, **more: plain(*args, **more | {"begun": {}}))
        run(mixed, folder, "training.max_steps=4")
        whole = run(mixed, tmp_path / "whole", "training.max_steps=8")
    assert "label_scales" not in (folder / "checkpoints/step_000000004/state.json").read_text()
    run(mixed, folder, "training.max_steps=6")
    run(mixed, folder, "training.max_steps=8")
    assert not tensors_differ(folder, whole, 8)
    for line in validations(folder):
        tasks = line["report"]["tasks"]
        expected = (tasks["click"]["auc"] + tasks["buy"]["auc"] - tasks["seconds"]["mse"]) / 3
        assert line["monitor"]["all"] == pytest.approx(expected, rel=1e-12)
    with process_group() as world:
        session, *_ = load_session(RunFolder(folder), world, [])
        assert session.scales == {}


def test_a_checkpoint_holds_what_its_labels_were_divided_by(mixed, tmp_path):
    folder = run(mixed, tmp_path / "run", "training.max_steps=2")
    label, scenario = (mixed.tables["train"][name].to_numpy() for name in ("label.seconds", "sample.scenario"))
    deviations = {"all": np.nanstd(label.astype(np.float64))}
    deviations |= {f"s{index}": np.nanstd(label[scenario == index].astype(np.float64)) for index in range(2)}
    for place in ("best", "step_000000002"):
        state = json.loads((folder / "checkpoints" / place / "state.json").read_text())
        expected = pytest.approx([np.nanmean(label.astype(np.float64)), deviations["all"]], rel=1e-12)
        assert state["label_scales"] == {"seconds": expected}
        assert state["label_deviations"] == {"seconds": pytest.approx(deviations, rel=1e-12)}
    # The report of the run, and the one that evaluation makes of it, divide by these.
    with process_group() as world:
        session, *_ = load_session(RunFolder(folder), world, [])
        report = evaluate_split(session, "test")
    for found in (report, json.loads((folder / "result.json").read_text())["test"]):
        seconds = found["tasks"]["seconds"]
        for name, entry in {"all": seconds, **seconds["scenarios"]}.items():
            assert entry["r2"] == pytest.approx(1 - entry["mse"] / deviations[name] ** 2, rel=1e-9)


def tensors_differ(folder, other, step):
    """Names of the tensors of a checkpoint that differ in another run."""
    first, second = (tensors(each / f"checkpoints/step_{step:09d}") for each in (folder, other))
    assert first.keys() == second.keys()
    return [key for key, value in first.items() if not value.equal(second[key])]


def test_a_branch_of_one_class_in_valid_ends_no_run(tmp_path):
    """It is named, the others choose, and it goes along with the newest of them."""
    data = write_dataset(tmp_path / "data" / "data", rows=400, table_rows=25, num_scenarios=2, rows_per_part=400)
    table = data.tables["valid"]
    label, scenario = (table[name].to_numpy().copy() for name in ("label.click", "sample.scenario"))
    label[(scenario == 1) & ~np.isnan(label)] = 0
    index = table.column_names.index("label.click")
    changed = table.set_column(index, "label.click", pa.array(label, from_pandas=True))
    rewritten = rewrite_part(data, changed, split="valid")
    valid = rewritten.splits["valid"]
    labelled = valid.label_counts["click"]["s1"][0]
    counts = {**valid.label_counts, "click": {**valid.label_counts["click"], "s1": (labelled, 0)}}
    splits = {**rewritten.splits, "valid": valid.model_copy(update={"label_counts": counts})}
    rewritten.model_copy(update={"splits": splits}).save(data.folder)

    folder = run(data, tmp_path / "run", "training.max_steps=24", setting="mtmsl", name="single_task")
    log = (folder / "train.log").read_text()
    told = f"branch 'click:s1' (task 'click' in scenario s1 has {labelled} labelled rows, 0 of them positive)"
    assert log.count(f"not selected by validation: {told}") == 1
    best_step = selection_of(folder)["best_step"]
    assert list(best_step) == ["click:s0", "buy:s0", "buy:s1"]
    assert len(set(best_step.values())) > 1, "the case shows nothing when all branches peak together"
    best = tensors(folder / "checkpoints/best")
    names = ["click:s0", "click:s1", "buy:s0", "buy:s1"]
    for number, name in enumerate(names):
        step = best_step.get(name, max(best_step.values()))
        expected = tensors(folder / f"checkpoints/step_{step:09d}")
        own = [key for key in best if f".{name}/" in key]
        stacked = [key for key in best if key.startswith("model.head.network.")]
        assert own
        assert stacked
        assert all(best[key].equal(expected[key]) for key in own), name
        for key in stacked:
            assert best[key].chunk(4)[number].equal(expected[key].chunk(4)[number]), (name, key)
    report = json.loads((folder / "result.json").read_text())["test"]
    assert report["tasks"]["click"]["scenarios"]["s1"]["rows"] > 0


def test_two_ranks_train_and_report_like_one(tmp_path):
    """Rows with weights, a regression task, and a monitor of both: the same values, and GAUC is that of a loop over users."""
    data = write_dataset(tmp_path / "data" / "data", rows=400, num_scenarios=2, weights=True, regression={"seconds": (4, -64)})
    overrides = ["training.monitor={buy.gauc: 1, seconds.mae: 0.1}"]
    config_of(data, *overrides)
    actions = [
        {"kind": "train", "name": "two", "config": str(data.folder.parent / "mtl-mmoe.yaml"), "overrides": overrides},
        {"kind": "evaluate", "overrides": [], "output": str(tmp_path / "two.json")},
    ]
    launch(2, [action | {"run_dir": str(tmp_path / "two")} for action in actions], tmp_path)
    run(data, tmp_path / "one", *overrides)
    first, second = ([line["monitor"]["all"] for line in validations(tmp_path / name)] for name in ("one", "two"))
    np.testing.assert_allclose(first, second, atol=2e-3)
    assert len(first) == 6
    with process_group() as world:
        session, *_ = load_session(RunFolder(tmp_path / "two"), world, [])
        report = evaluate_split(session, "test")
        write_predictions(session, data.folder, "test", tmp_path / "scores.parquet")
    for task, entry in json.loads((tmp_path / "two.json").read_text())["tasks"].items():
        found = {name: value for name, value in entry.items() if isinstance(value, float)}
        assert found == pytest.approx({name: report["tasks"][task][name] for name in found}, rel=1e-5)
    test, score = data.tables["test"], pq.read_table(tmp_path / "scores.parquet")["score.buy"].to_numpy()
    label, weight, user = (test[name].to_numpy() for name in ("label.buy", "sample.weight", "key.user"))
    aucs, totals = [], []
    for each in np.unique(user):
        own = (user == each) & ~np.isnan(label)
        if 0 < label[own].sum() < own.sum():
            aucs.append(roc_auc_score(label[own], score[own], sample_weight=weight[own]))
            totals.append(weight[own].sum(dtype=np.float64))
    assert report["tasks"]["buy"]["gauc"] == pytest.approx(np.average(aucs, weights=totals), abs=1e-9)


@pytest.mark.parametrize(("method", "offered"), [("mmoe", ()), ("esmm", BINARY_METRICS), ("aitm", RANKING_METRICS)])
def test_a_chain_offers_the_metrics_that_its_cvr_has(tmp_path, method, offered):
    write_dataset(tmp_path / "data", rows=60, funnel=True)
    config = tmp_path / "config.yaml"
    config.write_text(f"dataset: {{path: {tmp_path / 'data'}, setting: mtl}}\nmodel: {{name: {method}}}\n")
    _, network, *_ = build_parts(load_config(config))
    assert metrics_of_cvr(network) == offered
