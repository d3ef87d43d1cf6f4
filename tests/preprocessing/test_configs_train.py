"""The datasets' configurations train on what the preprocessing makes of fake raw files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.common.command_line import main
from tests.preprocessing.fakes import FAKES

ROOT = Path(__file__).parents[2]
CASES = [(name, config) for name, fake in FAKES.items() for config in fake.configs or {}]


@pytest.mark.long
@pytest.mark.parametrize("model", ["shared_bottom", "mmoe"])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_one_epoch_on_fake_files(name, config, model, tmp_path):
    fake = FAKES[name]
    raw = fake.write(tmp_path / "raw")
    assert main([name.split()[0], "--out", str(tmp_path / "data"), *fake.arguments(raw)]) == 0
    options = [f"model.name={model}", f"dataset.path={tmp_path / 'data'}", "training.epochs=1", "training.batch_size=128"]
    command = [sys.executable, "-m", "apps.train", "--config", f"configs/{config}.yaml", "--run-dir", str(tmp_path / "run")]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert list(report["tasks"]) == (fake.configs or {})[config]
    assert all(0 < report["tasks"][task]["auc"] < 1 for task in report["tasks"])
