"""Training as users start it: torchx, which starts torchrun, to a good end; torchrun, with one rank that fails."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests import processes
from tests.datasets import rewrite_part, write_dataset
from tests.processes import ROOT, environment

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [8], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 32, max_steps: 12}}
"""
TORCHX = Path(sys.executable).with_name("torchx")
TORCHRUN = [sys.executable, "-m", "mmlrec.launch.agent", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def data(tmp_path):
    written = write_dataset(tmp_path / "data", rows=200)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=written.folder))
    return written


def run(command: list, folder: Path) -> subprocess.CompletedProcess:
    text = [str(part) for part in command]
    return subprocess.run(text, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False)


def test_torchx_trains_with_two_processes_by_torchrun(data, tmp_path):
    where = [ROOT / "apps/components.py:train", "--preset", "local", "--config", tmp_path / "config.yaml"]
    log = tmp_path / "logs"
    done = run([TORCHX, "run", "-s", "local_cwd", "-cfg", f"log_dir={log}", *where, "--run_dir", tmp_path / "run"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run/environment.json").read_text())["world_size"] == 2
    before = json.loads((tmp_path / "run/result.json").read_text())["test"]["tasks"]
    assert set(before) == {"click", "buy"}
    done = processes.run([sys.executable, "-m", "apps.evaluate", "--run", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "run/result.json").read_text())["test"]["tasks"]
    assert after["click"]["auc"] == pytest.approx(before["click"]["auc"], abs=1e-9)


def test_one_failing_rank_ends_the_run(data, tmp_path):
    # The bad row is in the last row group of valid, which only the second rank reads; the first must not wait for ever.
    last = len(data.manifest.splits["valid"].parts) - 1
    rows = data.manifest.splits["valid"].parts[last].num_rows
    table = data.tables["valid"].slice(data.tables["valid"].num_rows - rows)
    values = [*[0.0] * (rows - 1), float("nan")]
    spoilt = table.set_column(table.column_names.index("d0"), "d0", pa.array(np.array(values, np.float32)))
    rewrite_part(data, spoilt, part=last, split="valid")
    done = run([*TORCHRUN, "-m", "apps.train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run"], tmp_path)
    assert done.returncode == 2, done.stderr  # a mistake of the user, to be mended before another start
    assert done.stderr.count("error: ") == 1
    assert str(data.folder / data.manifest.splits["valid"].parts[last].path) in done.stderr
    assert not (tmp_path / "run/result.json").exists()
