"""What a run tells: speed of training alone, and the metric that the choice of weights follows."""

import json
import logging

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmlrec.distributed.step_parts import DATA, PARTS
from mmlrec.distributed.world import World, logger
from mmlrec.run_folder.folder import RunFolder
from mmlrec.training import reporting
from mmlrec.training.reporting import Reporter
from mmlrec.training.slowest import RankTimes


@pytest.fixture
def clock(monkeypatch):
    """Time by hand."""
    now = [0.0]
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def reporter(tmp_path, clock):
    world = World(0, 1, 1, torch.device("cpu"), None)
    with Reporter(RunFolder(tmp_path), world, first_step=0, total_steps=100, batch_size=10) as reporter:
        yield reporter


@pytest.fixture
def heard():
    """What is logged."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)


def waited(seconds):
    return RankTimes([[seconds if part == DATA else 0.0 for part in PARTS]])


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_what_happens_between_segments_is_no_training_time(reporter, clock, tmp_path):
    """Two segments of 20 steps of a tenth of a second, 60 seconds of checkpoint between them and one report at the end."""
    for _ in range(2):
        clock[0] += 2.0
        reporter.stop_clock()
        clock[0] += 60.0
        reporter.restart_clock()
    reporter.train_metrics(40, 0, {"t": 0.5}, 1.0, waited(1.0), {})
    clock[0] += 5.0
    reporter.train_metrics(50, 0, {"t": 0.5}, 1.0, waited(0.0), {})
    assert [line["samples_per_second"] for line in lines(tmp_path)] == [100.0, 20.0]
    assert lines(tmp_path)[0]["data_wait_share"] == 0.25


def test_a_validation_names_the_metric_that_selects(reporter, heard, tmp_path):
    tasks = {
        "click": {"auc": 0.75},
        "price": {"mse": 1.5, "r2": None},
        "seconds": {"mse": 9.0, "r2": 0.5},
        "buy": {"auc": None},
        "stay": {"mse": None, "r2": None},
    }
    reporter.validation(7, 0, {"tasks": tasks, "mean": {"auc": 0.75}}, {"all": 0.625}, "best so far")
    reporter.validation(8, 0, {"tasks": {}, "mean": {}}, {"click": 0.75, "buy": -1.5}, "no better for 1 of 3")
    shown = "auc click 0.7500 mse price 1.5000 r2 seconds 0.5000 auc buy - r2 stay -"
    assert heard == [
        f"epoch 0 step 7 | valid {shown} | monitor 0.6250, best so far",
        "epoch 0 step 8 | valid  | monitor click 0.7500, buy -1.5000, no better for 1 of 3",
    ]
    assert [line["monitor"] for line in lines(tmp_path)] == [{"all": 0.625}, {"click": 0.75, "buy": -1.5}]


def entry(auc, rows, **more):
    return {"auc": auc, "gauc": None, "logloss": auc and auc / 2, "rows": rows, "positives": 1, **more}


def curves(tmp_path):
    """Tag -> (step, value) of each point, as TensorBoard reads them."""
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_curves_of_tasks_scenarios_and_their_means(tmp_path):
    world = World(0, 1, 1, torch.device("cpu"), None)
    scenarios = {"F": entry(0.5, 10), "M": entry(0.75, 30)}
    means = {"scenario_mean": {"auc": 0.625}, "scenario_weighted_mean": {"auc": 0.6875}}
    click = entry(0.25, 40, scenarios=scenarios, **means)
    with Reporter(RunFolder(tmp_path), world, first_step=0, total_steps=100, batch_size=10) as reporter:
        reporter.validation(
            7, 0, {"tasks": {"click": click, "buy": entry(None, 4)}, "mean": {"auc": 0.25, "gauc": None}}, {"all": 0.25}, ""
        )
    assert curves(tmp_path) == {
        "valid/auc/click": [(7, 0.25)],
        "valid/logloss/click": [(7, 0.125)],
        "valid/auc/mean_over_tasks": [(7, 0.25)],
        "valid/monitor/all": [(7, 0.25)],
        "valid_scenarios/auc/click/F": [(7, 0.5)],
        "valid_scenarios/logloss/click/F": [(7, 0.25)],
        "valid_scenarios/auc/click/M": [(7, 0.75)],
        "valid_scenarios/logloss/click/M": [(7, 0.375)],
        "valid_scenarios/auc/click/scenario_mean": [(7, 0.625)],
        "valid_scenarios/auc/click/scenario_weighted_mean": [(7, 0.6875)],
    }


def test_of_many_scenarios_those_with_most_rows_have_curves(tmp_path, heard):
    world = World(0, 1, 1, torch.device("cpu"), None)
    scenarios = {f"s{index}": entry(0.5, index) for index in range(100)}
    click = entry(0.25, 40, scenarios=scenarios, scenario_mean={"auc": 0.5}, scenario_weighted_mean={"auc": 0.5})
    with Reporter(RunFolder(tmp_path), world, first_step=0, total_steps=100, batch_size=10) as reporter:
        for step in (7, 8):
            reporter.validation(step, 0, {"tasks": {"click": click}, "mean": {"auc": 0.25}}, {"all": 0.25}, "")
    shown = [tag for tag in curves(tmp_path) if tag.startswith("valid_scenarios/auc/click/s") and "mean" not in tag]
    assert {int(tag.rpartition("/s")[2]) for tag in shown} == set(range(68, 100))
    assert len([line for line in heard if "32 scenarios with most rows" in line and "all 100" in line]) == 1
    assert (
        len(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["report"]["tasks"]["click"]["scenarios"])
        == 100
    )
