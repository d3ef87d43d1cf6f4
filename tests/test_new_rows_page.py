"""The example of docs/new_rows.md works as it stands."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests import processes

ROOT = Path(__file__).parents[1]


def test_the_example_runs(tmp_path):
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/new_rows.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    files, *commands = re.split(r"^(?=python -m )", script, flags=re.MULTILINE)
    path = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", files], cwd=tmp_path, env=path, check=True)
    told = []
    for command in commands:
        words = [sys.executable, *shlex.split(command.replace("\\\n", " "), comments=True)[1:]]
        done = processes.run(words, cwd=tmp_path, env=processes.environment(PYTHONPATH=str(ROOT)))
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert len(commands) == 5
    assert "against train, worst first" in told[2]
    with (tmp_path / "runs/monday/tuesday.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["key.source_line"]) for row in rows) == list(range(2, 1002))
    assert {row["key.source_file"] for row in rows} == {"tuesday.csv"}
    scores = np.array([[float(row["score.click"]), float(row["score.buy"])] for row in rows])
    assert ((scores > 0) & (scores < 1)).all()
    assert "<svg" in (tmp_path / "runs/monday/tuesday.html").read_text()
