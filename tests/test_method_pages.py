"""The pages of docs/models say what the code says: options, defaults, settings, cost."""

import re
from pathlib import Path

import pytest
import yaml

from benchmarks.flops import FORWARD, Case
from mmlrec.models.base.model import NetworkConfig
from mmlrec.registry import method, method_names
from mmlrec.schema import Setting

PAGES = Path(__file__).parents[1] / "docs" / "models"
HEADINGS = ["What it is for", "Equations", "Options", "When to choose it", "Differences from the MMLRec code", "Source"]


def page(name):
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def option_rows(text):
    """Option -> default, of the rows "| `option` | default | meaning |"."""
    return {name: yaml.safe_load(default) for name, default in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.MULTILINE)}


def defaults(config, names):
    values = config().model_dump(mode="json")
    return {name: values[name] for name in values if name in names}


@pytest.mark.parametrize("name", method_names())
def test_a_page_lists_the_options_of_its_method_with_their_defaults(name):
    config = method(name).Config
    assert option_rows(page(name)) == defaults(config, set(config.model_fields) - set(NetworkConfig.model_fields))


@pytest.mark.parametrize("name", method_names())
def test_pages_have_one_form(name):
    text = page(name)
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in HEADINGS] == HEADINGS
    assert text.count("```mermaid\nflowchart") == 1
    settings = ", ".join(setting for setting in Setting if setting in method(name).settings)
    assert f"\n\n`model.name: {name}` · {settings} · [mmlrec/models/{name}.py](../../mmlrec/models/{name}.py)\n" in text
    assert len(text.splitlines()) <= 100


def test_every_page_has_a_method():
    assert {path.stem for path in PAGES.glob("*.md")} == {"README", *method_names()}


def test_common_options_are_described_once():
    section = page("README").partition("## Common options")[2].partition("\n## ")[0]
    assert option_rows(section) == defaults(NetworkConfig, NetworkConfig.model_fields)


def test_the_overview_gives_settings_and_cost_of_every_method():
    rows = re.findall(r"^\| \[[^|]*\]\((\w+)\.md\) \|(.*?)\|(.*?)\|(.*?)\|(.*?)\|", page("README"), re.MULTILINE)
    assert sorted(name for name, *_ in rows) == method_names()
    case = Case(num_fields=7, dim=8, num_dense=0, tasks=2, scenarios=1)
    for name, *marks, cost in rows:
        assert [bool(mark.strip()) for mark in marks] == [setting in method(name).settings for setting in Setting], name
        assert cost.strip() == f"{FORWARD[name](case) / FORWARD['shared_bottom'](case):.1f}", name
