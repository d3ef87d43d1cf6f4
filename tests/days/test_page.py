"""The commands of docs/days.md do what the page shows."""

import re
import shlex
import sys
from pathlib import Path

from tests.days.support import lines
from tests.processes import environment, run

PAGE = Path(__file__).parents[2] / "docs" / "days.md"


def cells(text: str) -> list[list[str]]:
    """Of the table of days that a text has, its header first."""
    rows = [re.split(r"  +", line.strip()) for line in re.findall(r"^ *day(?: .*|-\d\d.*)$", text, re.MULTILINE)]
    return [row for row in rows if row[0] != "day" or "new ids" in row]


def test_the_page_is_true(tmp_path):
    text = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    commands = re.findall(r"^    (python -m .*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        done = run([sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, env=environment())
        assert done.returncode == 0, done.stderr
    shown, found = cells(text), cells(done.stdout)
    assert [row[:3] for row in found] == [row[:3] for row in shown]  # rows and new ids
    assert found[0] == shown[0]
    for mine, theirs in zip(found[2:], shown[2:], strict=True):
        for one, other in zip(mine[3:], theirs[3:], strict=True):
            assert abs(float(one) - float(other)) < 0.01  # another CPU
    assert [line["day"] for line in lines(tmp_path / "runs" / "days")] == ["day-01", "day-02", "day-03"]
    for name in ("days.jsonl", "days.yaml", "days.png", "day-03/result.json"):
        assert (tmp_path / "runs" / "days" / name).is_file()
