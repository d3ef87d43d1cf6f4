"""The datasets' configurations train on what the preprocessing makes of fake raw files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.common.command_line import main
from tests.preprocessing.aliexpress_fake import write_aliexpress
from tests.preprocessing.census_fake import write_adult, write_kdd

ROOT = Path(__file__).parents[2]
DATASETS = {
    "census-income": (lambda raw: write_kdd(raw, 3000, 1000), "mtl/census", ["income", "marital"]),
    "adult-income": (lambda raw: write_adult(raw, 3000, 1000), "mtl/census", ["income", "marital"]),
    "aliexpress": (lambda raw: write_aliexpress(raw, num_searches=600), "msl/aliexpress", ["click"]),
}


@pytest.mark.long
@pytest.mark.parametrize("model", ["shared_bottom", "mmoe"])
@pytest.mark.parametrize("name", DATASETS)
def test_one_epoch_on_fake_files(name, model, tmp_path):
    write, config, tasks = DATASETS[name]
    assert main([name, "--raw", str(write(tmp_path / "raw")), "--out", str(tmp_path / "data")]) == 0
    options = [f"model.name={model}", f"dataset.path={tmp_path / 'data'}", "training.epochs=1", "training.batch_size=128"]
    command = [sys.executable, "-m", "apps.train", "--config", f"configs/{config}.yaml", "--run-dir", str(tmp_path / "run")]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert list(report["tasks"]) == tasks
    assert all(0 < report["tasks"][task]["auc"] < 1 for task in tasks)
