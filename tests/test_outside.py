"""The contracts of mmlrec.testing, used by a package outside the tree: they pass what is right and name what is wrong."""

import os
import re
import subprocess
import sys

import pytest

from tests.test_documents import DATASET, METHOD, REPOSITORY

TESTS = """
import random

from mmlrec.testing.datasets import DatasetContract, Fake
from mmlrec.testing.methods import MethodContract
from my_package.blockwise import Blockwise
from my_package.leaking import Leaking
from my_package.mean_experts import MeanExperts
from my_package.shop import Shop
from my_package.telling import Telling
from my_package.unsteady import Unsteady


def write_shop(folder):
    folder.mkdir()
    draw = random.Random(0)
    rows = []
    for _ in range(2000):
        click = draw.randint(0, 1)
        user, item = draw.randint(1, 30), draw.choice(["", *(f"item {k}" for k in range(9))])
        rows.append(f"{user}|{item}|{draw.choice(['', '0.5', '12.25', '7'])}|{click}|{click * draw.randint(0, 1)}")
    (folder / "views.csv").write_text("\\n".join(rows) + "\\n")
    return folder


class TestMeanExperts(MethodContract):
    method = MeanExperts
    options = {"num_experts": 3, "expert_hidden_units": [7, 5]}


class TestLeaking(MethodContract):
    method = Leaking


class TestUnsteady(MethodContract):
    method = Unsteady


class TestShop(DatasetContract):
    dataset = Shop
    fake = Fake(write_shop)


class TestBlockwise(DatasetContract):
    dataset = Blockwise
    fake = Fake(write_shop)


class TestTelling(DatasetContract):
    dataset = Telling
    fake = Fake(write_shop)
"""
MEAN = "mean = self.experts(x, valid).mean(dim=0)"
PRICE = '"label.click": view["click"],'


def changed(source, name, old, new):
    """An example with another name and a fault."""
    assert old in source
    return re.sub("MeanExperts|Shop", name, source.replace(old, new))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    modules = {
        "mean_experts": METHOD,
        "shop": DATASET,
        # Every row's logits depend on all rows of the batch, those of other scenarios too.
        "leaking": changed(METHOD, "Leaking", MEAN, f"{MEAN}\n        mean = mean + mean.mean(dim=0)"),
        # Zeros divided by zero.
        "unsteady": changed(METHOD, "Unsteady", MEAN, f"{MEAN}\n        mean = mean / mean.norm(dim=-1, keepdim=True)"),
        # Rows depend on the others of their block, of whatever split.
        "blockwise": changed(
            DATASET, "Blockwise", PRICE, f'{PRICE}\n            "price": pc.subtract(view["price"], pc.mean(view["price"])),'
        ).replace("import pyarrow as pa", "import pyarrow as pa\nimport pyarrow.compute as pc"),
    }
    # A feature is the label.
    modules["telling"] = changed(DATASET, "Telling", PRICE, f'{PRICE}\n            "price": view["click"],')
    (folder / "my_package").mkdir()
    for name, source in modules.items():
        (folder / "my_package" / f"{name}.py").write_text(source)
    (folder / "test_mine.py").write_text(TESTS)
    return folder


def run(folder, *options):
    """Test -> its outcome, and the whole report, of pytest in a process that knows the repository as a library only."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(folder)])
    command = [sys.executable, "-m", "pytest", "-v", "-rA", "--strict-markers", "-p", "no:cacheprovider"]
    command += ["--basetemp", str(folder / "temporary"), *options]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    outcomes = dict(re.findall(r"^test_mine\.py::(\S.*?) (PASSED|FAILED|SKIPPED|ERROR)", result.stdout, re.MULTILINE))
    assert outcomes, result.stdout[-4000:] + result.stderr[-4000:]
    return outcomes, result.stdout


def failed(outcomes, name):
    """The tests of a class that fail, without their parameters."""
    return {
        test.split("::")[1].split("[")[0] for test, found in outcomes.items() if test.startswith(name) and found != "PASSED"
    }


def test_contracts_pass_the_examples_and_name_what_is_broken(folder):
    tests = "features_of_other or (extreme_inputs and zeros) or equal_bytes or leave_no_trace or decides_a_label"
    outcomes, report = run(folder, "-k", tests)
    assert failed(outcomes, "TestMeanExperts") == failed(outcomes, "TestShop") == set()
    assert failed(outcomes, "TestLeaking") == {"test_features_of_other_scenarios_change_no_bit_of_a_scenario"}
    assert failed(outcomes, "TestUnsteady") == {"test_extreme_inputs"}
    assert failed(outcomes, "TestBlockwise") == {
        "test_equal_bytes_for_any_number_of_workers_and_size_of_pieces",
        "test_valid_and_test_rows_leave_no_trace_in_train",
    }
    assert failed(outcomes, "TestTelling") == {"test_no_feature_decides_a_label"}
    assert len(outcomes) > 50
    # Assertions of the contracts show their values.
    assert re.search(r"assert \['manifest.js.*\] == \[\]", report)
    assert re.search(r"where False = .*equal.*\(tensor\(", report)
    assert "= tensor(nan" in report
    assert "price tells click: 0 wrong" in report


@pytest.mark.long
def test_the_examples_pass_the_whole_contracts(folder):
    outcomes, report = run(folder, "-k", "MeanExperts or Shop")
    assert failed(outcomes, "TestMeanExperts") == set(), report[-4000:]
    # Shop's rule of splitting keeps no groups together.
    assert failed(outcomes, "TestShop") == {"test_groups_are_on_one_side"}, report[-4000:]
    assert len([test for test in outcomes if test.startswith("TestMeanExperts")]) > 150
