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


def test_a_validation_names_the_metric_that_selects(reporter):
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        report = {"tasks": {"click": {"auc": 0.75, "mse": None}, "price": {"mse": 1.5}, "buy": {"auc": None}}}
        reporter.validation(7, 0, report, "best so far")
    finally:
        logger.removeHandler(handler)
    assert heard == ["epoch 0 step 7 | valid auc click 0.7500 mse price 1.5000 auc buy - | best so far"]
