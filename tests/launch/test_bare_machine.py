"""Training where there is no git, no home folder, no user name, no PATH, and nothing to write but the run folder and /tmp."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.datasets import write_dataset
from tests.processes import ROOT

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [8], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 32, max_steps: 2}}
"""
# A user id that no file of users knows, and none of root's rights.
NOBODY = ["unshare", "--user", "--map-user=54321", "--map-group=54321", "--"]


@pytest.fixture
def code(tmp_path):
    """The packages in a folder that is only read."""
    folder = tmp_path / "code"
    for name in ("mmlrec", "apps", "preprocessing"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_run_needs_its_run_folder_only(code, tmp_path):
    if subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces on this machine")
    data = write_dataset(tmp_path / "data", rows=200)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(dataset=data.folder))
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*NOBODY, sys.executable, *arguments]
        alone = {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=code, env=alone, capture_output=True, text=True, timeout=240, check=False)

    refused = run("-c", "import os; print(os.getuid()); open('x', 'w')")
    assert refused.stdout == "54321\n"
    assert "Permission denied" in refused.stderr
    done = run("-m", "apps.train", "--config", str(config), "--run-dir", str(run_dir))
    assert done.returncode == 0, done.stderr
    assert "FBGEMM" not in done.stderr, "warnings that no user can act on"
    assert json.loads((run_dir / "result.json").read_text())["test"]["tasks"]
    assert sorted(path.name for path in code.iterdir()) == ["apps", "mmlrec", "preprocessing"]
    assert not list(Path(code).rglob("__pycache__"))
