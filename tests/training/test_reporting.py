"""What a run tells: speed of training alone, and the metric that the choice of weights follows."""

import json
import logging

import pytest
import torch

from mmlrec.distributed.world import World, logger
from mmlrec.run_folder.folder import RunFolder
from mmlrec.training import reporting
from mmlrec.training.reporting import Reporter


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


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_what_happens_between_segments_is_no_training_time(reporter, clock, tmp_path):
    """Two segments of 20 steps of a tenth of a second, 60 seconds of checkpoint between them and one report at the end."""
    for _ in range(2):
        clock[0] += 2.0
        reporter.stop_clock()
        clock[0] += 60.0
        reporter.restart_clock()
    reporter.train_metrics(40, 0, {"t": 0.5}, 1.0, 1.0, {})
    clock[0] += 5.0
    reporter.train_metrics(50, 0, {"t": 0.5}, 1.0, 0.0, {})
    assert [line["samples_per_second"] for line in lines(tmp_path)] == [100.0, 20.0]
    assert lines(tmp_path)[0]["data_wait_share"] == 0.25


def test_a_validation_names_the_metric_that_selects(reporter, tmp_path):
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        tasks = {
            "click": {"auc": 0.75},
            "price": {"mse": 1.5, "r2": None},
            "seconds": {"mse": 9.0, "r2": 0.5},
            "buy": {"auc": None},
        }
        reporter.validation(7, 0, {"tasks": tasks}, {"all": 0.625}, "best so far")
        reporter.validation(8, 0, {"tasks": {}}, {"click": 0.75, "buy": -1.5}, "no better for 1 of 3")
    finally:
        logger.removeHandler(handler)
    shown = "auc click 0.7500 mse price 1.5000 r2 seconds 0.5000 auc buy -"
    assert heard == [
        f"epoch 0 step 7 | valid {shown} | monitor 0.6250, best so far",
        "epoch 0 step 8 | valid  | monitor click 0.7500, buy -1.5000, no better for 1 of 3",
    ]
    assert [line["monitor"] for line in lines(tmp_path)] == [{"all": 0.625}, {"click": 0.75, "buy": -1.5}]
