"""Runs on an object store whose server is killed at random requests: what is sealed stays; the run goes on, or says why not."""

import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mmlrec.run_folder import saver, whole
from mmlrec.storage.places import place
from tests.datasets import write_dataset
from tests.processes import Command
from tests.training.launch import tensors

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
training:
  {{batch_size: 50, epochs: 1000, max_steps: 12, patience: null, log_every_steps: 1, checkpoint_every_steps: 2,
    validate_every_steps: 4}}
"""
LAST = "step_000000012"

pytestmark = pytest.mark.cluster


class Unbroken(NamedTuple):
    """A run on a disk."""

    config: Path
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    write_dataset(folder / "data", rows=690, table_rows=30)
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(dataset=folder / "data"))
    run = Command(command(config, folder / "run"))
    _, error = run.communicate(120)
    assert run.poll() == 0, error
    return Unbroken(config, tensors(folder / "run" / "checkpoints" / LAST))


def command(config: Path, run_dir: object) -> list[str]:
    return [sys.executable, "-m", "apps.train", "--config", str(config), "--run-dir", str(run_dir)]


def impatient() -> None:
    saver.RETRY_AFTER_S = (0.1,)


@pytest.mark.parametrize("comes_back", [True, False], ids=["comes back", "stays away"])
@pytest.mark.parametrize("number", range(10))
def test_the_server_is_killed_at_a_random_request(unbroken, disk_store, tmp_path, number, comes_back):
    run_dir = place(f"{disk_store.address}/runs/a")
    at = random.Random(2 * number + comes_back).randint(1, 400)  # a whole run has some more
    environment = {**os.environ, "MMLREC_STORAGE_SECONDS": "30" if comes_back else "1"}
    run = Command(command(unbroken.config, run_dir), env=environment, prepare=impatient)
    try:
        deadline = time.monotonic() + 120
        while len(disk_store.link.requests) < at and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        disk_store.server.kill()
        if comes_back:
            time.sleep(0.5)
            disk_store.server.start()
        _, error = run.communicate(240)
    finally:
        run.kill()
    if comes_back:
        assert run.poll() == 0, error
    else:
        disk_store.server.start()
        if run.poll() != 0:  # 0: it was killed after the last request
            lines = [line for line in error.splitlines() if "error: " in line]
            assert len(lines) == 1, error
            assert f"{disk_store.address}/runs/a" in lines[0]
            assert run.poll() == 1, lines
    for folder in whole.folders(run_dir / "checkpoints"):
        assert whole.damage(folder) is None
    again = Command(command(unbroken.config, run_dir), env={**os.environ, "MMLREC_STORAGE_SECONDS": "30"})
    _, error = again.communicate(240)
    assert again.poll() == 0, error
    run_dir.fs.get((run_dir / "checkpoints").path, str(tmp_path / "copy"), recursive=True)
    ours = tensors(whole.inside(tmp_path / "copy" / LAST))
    assert ours.keys() == unbroken.tensors.keys()
    assert all(torch.equal(ours[key], unbroken.tensors[key]) for key in ours)
