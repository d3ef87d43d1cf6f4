"""The code of docs/python.md runs, block after block, as in a notebook."""

import re
from pathlib import Path

import mmlrec

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")


def test_all_blocks_run_in_one_session(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert sum(bool(line.strip()) for line in blocks[0].splitlines()) <= 20  # from a DataFrame to scores
    session = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), session)
    shown = capfd.readouterr().out
    assert "score.click" in shown
    assert "train 8,000, valid 1,000, test 1,000" in shown
    assert session["run"].evaluate().loc[("click", "all"), "auc"] > 0.75
    assert len(session["scores"]) == 1000
    assert session["scores"]["score.click"].between(0, 1).all()


def test_the_table_of_short_forms_is_true(tmp_path):
    """Each cell of the first column that is an argument is taken by `prepare`, with columns that go with it."""
    import pandas as pd

    rows = range(60)
    frame = pd.DataFrame(
        {
            "user": rows,
            "price": [row + 0.5 for row in rows],
            "age": rows,
            "click": [row % 2 for row in rows],
            "buy": [row % 3 == 0 for row in rows],
            "stars": [row % 5 for row in rows],
            "device": [("phone", "desktop")[row % 2] for row in rows],
            "time": pd.date_range("2024-01-01", periods=60),
        }
    )
    given = re.findall(r"^\| `((?:features|tasks|scenario|keys|split)=.*?)` \|", PAGE, re.MULTILINE)
    assert len(given) == 8
    usual = {"features": ["user"], "tasks": ["click"]}
    for text in given:
        argument = eval(f"dict({text})")
        assert isinstance(mmlrec.prepare(frame, **usual | argument), mmlrec.Dataset), text
