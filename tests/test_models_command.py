"""`python -m apps.models`, the listing of methods, and the convention of the methods' docstrings that it reads."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apps.models import describe, details, overview
from mmlrec.config import load_config
from mmlrec.errors import UserAdvice
from mmlrec.models.base.model import NetworkConfig
from mmlrec.registry import aliases, method, method_names, model_config, resolve, strategy, strategy_names
from mmlrec.testing.networks import build, spec_of
from tests import processes

REPOSITORY = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.run([sys.executable, "-m", *arguments], timeout=120)


def test_overview_has_a_line_for_each_method_and_train_prints_the_same():
    shown, listed = run("apps.models"), run("apps.train", "--list")
    assert shown.returncode == listed.returncode == 0, shown.stderr + listed.stderr
    assert shown.stdout == listed.stdout
    header, *lines = shown.stdout.split("\n\n")[0].splitlines()
    assert header.split()[:4] == ["method", "mtl", "msl", "mtmsl"]
    for line, name in zip(lines, [*method_names(), *aliases()], strict=True):
        settings = [str(setting) for setting in method(name).settings]
        assert line.split()[:4] == [name, *("yes" if s in settings else "-" for s in ("mtl", "msl", "mtmsl"))]


def test_methods_are_shown_in_the_order_asked_for():
    shown = run("apps.models", "ple", "mmoe")
    assert shown.returncode == 0, shown.stderr
    ple, mmoe = shown.stdout.split("\n\n\n")
    assert ple.startswith("ple: ")
    assert '"Progressive Layered Extraction (PLE): A Novel Multi-Task Learning' in ple
    assert "  num_levels = 2    [integer >= 1]\n" in ple
    assert "  expert_hidden_units = [256, 128]    [list of 1 or more integers > 0]\n" in ple
    assert '  activation = "relu"    [relu | gelu | silu | tanh]\n' in ple
    assert "settings: mtl, msl, mtmsl\n" in mmoe
    assert mmoe.endswith("configs/mtl/movielens.yaml model.name=mmoe\n")


def test_an_unknown_method_is_one_line_with_a_suggestion():
    shown = run("apps.models", "mmo")
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: model.name: unknown method 'mmo'. Did you mean 'mmoe'?")
    assert shown.stderr.count("\n") == 1


def test_strategies_are_listed_and_shown():
    overview_lines = overview()
    assert all(name in overview_lines for name in strategy_names())
    shown = run("apps.models", "dwa", "mmoe")
    assert shown.returncode == 0, shown.stderr
    dwa, _ = shown.stdout.split("\n\n\n")
    assert "tau = 2.0    [number > 0]" in dwa
    (found,) = json.loads(run("apps.models", "--json", "metabalance").stdout)
    options = {option["name"]: option["default"] for option in found["options"]}
    assert options == strategy("metabalance").Config().model_dump()


def test_an_alias_says_what_it_stands_for():
    assert "  mmoe with balancing.name=pcgrad\n" in overview()
    text = details(describe("pcg"))
    assert text.startswith("pcg is short for mmoe with balancing.name=pcgrad.\n\nmmoe: shared experts")
    assert text.endswith("model.name=pcg")


def test_json_holds_all_options_with_their_defaults():
    shown = run("apps.models", "--json")
    assert shown.returncode == 0, shown.stderr
    for found, name in zip(json.loads(shown.stdout), [*method_names(), *aliases()], strict=True):
        config = method(name).Config
        assert found["name"] == name
        assert {option["name"]: option["default"] for option in found["options"]} == config().model_dump(mode="json")
        own = {option["name"] for option in found["options"] if not option["common"]}
        assert own == set(config.model_fields) - set(NetworkConfig.model_fields)


@pytest.mark.parametrize("name", method_names())
def test_what_a_method_says_about_itself(name):
    """The first paragraph of its file is `Name: what it is`, the second its citation with title and year, or `No paper`."""
    found = describe(name)
    assert found["summary"], f"mmlrec/models/{name}.py: the first paragraph must be 'Name: what it is.'"
    assert len(found["summary"].partition(". ")[0]) <= 115, "the first sentence does not fit on a line of the listing"
    if found["paper"]:
        assert found["venue"], f'mmlrec/models/{name}.py: the second paragraph must be: authors, "title", venue year.'
    for option in found["options"]:
        assert option["description"], option["name"]
        assert option["type"] != "any", option["name"]
    assert found["alternative"] or all(found["settings"].values()), "say what to use in the other settings"
    text = details(found)
    assert all(f"\n  {option['name']} = " in text for option in found["options"])
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", [*method_names(), *aliases()])
def test_the_example_command_is_a_valid_configuration(name):
    module, *arguments = shlex.split(describe(name)["example"])[2:]
    assert module == "apps.train"
    config = load_config(REPOSITORY / arguments[1], arguments[2:])
    assert config.dataset.setting in method(name).settings
    assert resolve(config, "example").model["name"] == name


@pytest.mark.parametrize("name", method_names())
def test_a_printed_default_is_the_default(name):
    """Handing every printed default back changes nothing."""
    options = {option["name"]: yaml.safe_load(json.dumps(option["default"])) for option in describe(name)["options"]}
    assert model_config({"name": name, **options}, {}, "x.yaml") == method(name).Config()


def test_mlp_tells_that_its_tasks_share_one_ranking(recwarn):
    """In the listing, and when it is built for several tasks; not with one task, nor with an output for each."""
    line = next(line for line in overview().splitlines() if line.startswith("mlp "))
    assert "one ranking, for all tasks" in line
    build(method("mlp"), spec_of("msl"))
    build(method("mlp"), spec_of("mtl"), per_head_output=True)
    assert not [warning for warning in recwarn if issubclass(warning.category, UserAdvice)]
    with pytest.warns(UserAdvice, match="one logit for all tasks: t0, t1 rank rows alike"):
        build(method("mlp"), spec_of("mtl"))
