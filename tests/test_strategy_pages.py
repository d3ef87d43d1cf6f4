"""The pages of docs/balancing are those that the strategies' own docstrings and options give."""

import re
from pathlib import Path

import pytest
import yaml

from apps.strategies import page
from mmlrec.registry import strategy, strategy_names

PAGES = Path(__file__).parents[1] / "docs" / "balancing"


@pytest.mark.parametrize("name", strategy_names())
def test_a_page_is_what_its_strategy_gives(name):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert text == page(name), f"python -m apps.strategies --pages {PAGES.name} writes it again"
    options = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.MULTILINE)
    own = {option: yaml.safe_load(default) for option, default in options}
    assert own == {key: value for key, value in strategy(name).Config().model_dump(mode="json").items() if key in own}


def test_every_page_has_a_strategy_and_every_strategy_a_row():
    assert {path.stem for path in PAGES.glob("*.md")} == {"README", *strategy_names()}
    rows = re.findall(r"\]\((\w+)\.md\)", (PAGES / "README.md").read_text(encoding="utf-8"))
    assert set(strategy_names()) <= set(rows)
