"""The commands of docs/warm_start.md do what the page says."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np

from tests.processes import environment, run

PAGE = Path(__file__).parents[2] / "docs" / "warm_start.md"
TABLE = """
files: [{day}.csv]
features:
  user: {{kind: id}}
  item: {{kind: id, type: int}}
tasks: [{{name: click, label: clicked}}, {{name: buy, label: bought}}]
"""
TRAIN = """
dataset: {path: data/monday}
model: {name: mmoe, num_experts: 2, expert_hidden_units: [4], gate_hidden_units: [], tower_hidden_units: []}
embeddings: {dim: 4}
training: {batch_size: 100, max_steps: 4}
"""


def test_the_page_is_true(tmp_path):
    values = {}
    for number, day in enumerate(("monday", "tuesday")):
        draw = np.random.default_rng(number)
        users, items = draw.integers(10 * number, 40 + 10 * number, 600), draw.integers(0, 20, 600)
        clicked, bought = draw.integers(0, 2, (2, 600))
        lines = [f"u{u},{i},{c},{b}" for u, i, c, b in zip(users, items, clicked, bought, strict=True)]
        (tmp_path / f"{day}.csv").write_text("\n".join(["user,item,clicked,bought", *lines]) + "\n")
        (tmp_path / f"{day}.yaml").write_text(TABLE.format(day=day))
        values[day] = {f"u{user}" for user in users}
    (tmp_path / "train.yaml").write_text(TRAIN)
    text = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^    (python -m .*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        words = [sys.executable, *shlex.split(command)[1:]]
        result = run(words, cwd=tmp_path, env=environment())
        assert result.returncode == 0, result.stderr
    told = json.loads((tmp_path / "runs/tuesday/init_from.json").read_text())
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert json.loads(example).keys() == told.keys()
    (users,) = [table for table in told["tables"] if table["table"] == "user"]
    assert users.keys() == json.loads(example)["tables"][0].keys()
    known = len(values["monday"] & values["tuesday"])
    # Vocabularies are of train rows, of which there are enough to have met nearly all.
    assert known - 3 <= users["taken"] <= known + 1
    assert users["new"] > 0 < users["dropped"]
    assert (tmp_path / "runs/tuesday/result.json").is_file()
