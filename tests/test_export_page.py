"""The example of docs/export.md works as it stands."""

import json
import re
import shlex
import sys
from pathlib import Path

from tests import processes

ROOT = Path(__file__).parents[1]


def test_the_example_runs(tmp_path):
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/export.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    told = []
    for line in script.replace("\\\n", " ").splitlines():
        words = [sys.executable, *shlex.split(line, comments=True)[1:]]
        done = processes.run(words, cwd=tmp_path, env=processes.environment(PYTHONPATH=str(ROOT)))
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert len(told) == 4
    assert all("largest loss of AUC" in text for text in told[2:])
    sizes = []
    for name, dtype in (("first", "fp32"), ("first-small", "int8")):
        card = json.loads((tmp_path / "models" / name / "model.json").read_text())
        assert {table["dtype"] for table in card["tables"]} == {dtype}
        sizes.append(sum((tmp_path / "models" / name / table["file"]).stat().st_size for table in card["tables"]))
    assert sizes[1] < sizes[0]
