"""A line in ten minutes: a run that is alive says where it is, whatever takes so long, and whom it waits for."""

import logging
import re
import time

import pytest

from mmlrec.distributed.sign_of_life import signs_of_life
from tests.datasets import write_dataset
from tests.training.test_slowest_rank import train

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4, sharding: row_wise}}
training: {{batch_size: 12, max_steps: 30, patience: null, log_every_steps: 100000}}
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    dataset = write_dataset(folder / "data", rows=400, table_rows=30).folder
    (folder / "config.yaml").write_text(CONFIG.format(dataset=dataset))
    output = train(folder, world_size=2, script="quiet_run.py")
    assert "still at work" not in output[1]
    return [line for line in output[0].splitlines() if "still at work" in line]


@pytest.mark.parametrize(
    "place",
    [
        "waiting for all of 2 ranks to join",
        # The pipeline takes batches two ahead.
        r"(training|reading a batch) since \S+ \(\d+ s\), at step 18; 1 of 2 ranks wait for rank 1 \(process \d+ on \S+\):"
        r" at step 18, reading a batch for \d+ s",
        r"computing the metrics of valid since \S+ \(\d+ s\), at step 30; the other ranks wait for this one",
        r"saving a checkpoint since \S+ \(\d+ s\), at step 30; 1 of 2 ranks wait for rank 1 \(process \d+ on \S+\): at step 30,"
        r" saving a checkpoint for \d+ s",
    ],
    ids=["start", "data", "metrics", "checkpoint"],
)
def test_where_it_is_and_whom_it_waits_for(said, place):
    pattern = rf"\d\d:\d\d:\d\d no line for \d+ s; still at work: (\d+ steps since the last such line; )?{place}"
    assert any(re.fullmatch(pattern, line) for line in said), "\n".join(said)


def test_silence_alone_is_ended():
    """Lines in time keep it quiet, debug lines do not, and each silence has its line."""
    logger = logging.Logger("quiet", logging.DEBUG)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    with signs_of_life(logger, lambda: "here", 0.6):
        for _ in range(5):
            time.sleep(0.2)
            logger.info("a line")
        assert lines == ["a line"] * 5
        lines.clear()
        for _ in range(8):
            time.sleep(0.2)
            logger.debug("for the file")
        told = [line for line in lines if line != "for the file"]
        assert told == ["no line for 1 s; still at work: here"] * 2
    lines.clear()
    time.sleep(0.8)
    assert lines == []
    assert logger.handlers == [handler]
