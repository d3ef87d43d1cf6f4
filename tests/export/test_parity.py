"""How far the scores of an exported model may be from those of the run's model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmlrec.export.parity import beyond_tolerance, compare
from mmlrec.metrics.gather import PredictionRows
from mmlrec.schema import Task
from mmlrec.storage.places import place


@pytest.mark.parametrize(
    ("device", "apart", "refused"), [("cpu", 5e-7, 0), ("cpu", 5e-6, 1), ("cuda", 5e-6, 0), ("cuda", 5e-5, 1)]
)
def test_a_gpu_rounds_more_than_a_cpu(device, apart, refused):
    spec = SimpleNamespace(num_scenarios=1, num_heads=1, num_tasks=1, tasks=(Task(name="click"),))
    session = SimpleNamespace(
        spec=spec,
        network=SimpleNamespace(branches=(), spec=spec),
        scales={},
        deviations={},
        manifest=SimpleNamespace(scenario=None),
        world=SimpleNamespace(device=torch.device(device)),
    )
    count = 8
    rows = PredictionRows(
        logits=np.linspace(-1, 1, count, dtype=np.float32)[:, None],
        labels=np.tile(np.float32([0, 1]), count // 2)[:, None],
        mask=np.ones((count, 1), bool),
        scenario=np.zeros(count, np.int32),
        weight=np.ones(count, np.float32),
        group=np.zeros(count, np.int64),
        row=np.arange(count),
    )
    scores = (1 / (1 + np.exp(-rows.logits.astype(np.float64))) + apart).astype(np.float32)
    found = compare(session, rows, scores, ["click"], "test", place("data"))
    assert len(beyond_tolerance(found)) == refused
