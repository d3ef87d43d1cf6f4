"""A method and a strategy written as CONTRIBUTING.md says, one file each in a copy, are found, used and tested without more."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.datasets import write_dataset
from tests.test_documents import METHOD, REPOSITORY, STRATEGY

NAME = "mean_experts"
STRATEGY_NAME = "inverse_loss"
CONFIG = """
dataset: {path: data, setting: mtmsl}
model: {name: mean_experts, num_experts: 3, expert_hidden_units: [7, 5]}
balancing: {name: inverse_loss}
embeddings: {dim: 4}
training: {batch_size: 32, max_steps: 5}
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for name in ("mmlrec", "apps", "tests", "configs", "preprocessing"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    (folder / "mmlrec" / "models" / f"{NAME}.py").write_text(METHOD)
    (folder / "mmlrec" / "balancing" / "strategies" / f"{STRATEGY_NAME}.py").write_text(STRATEGY)
    (folder / "configs" / "mean_experts.yaml").write_text(CONFIG)
    return folder


# Several commands in one process, as the imports take most of their time; what each prints ends with a NUL.
ONE_AFTER_ANOTHER = """
import runpy, sys
for words in sys.argv[1:]:
    sys.argv = words.split()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    print(end="\\0")
"""


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    # A session of its own below a worker of pytest-xdist, whose settings it would inherit.
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    result = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def test_they_are_listed(copy):
    commands = ["apps.models", f"apps.models {NAME}", f"apps.strategies {STRATEGY_NAME}"]
    all_methods, method, strategy, _ = run(copy, "-c", ONE_AFTER_ANOTHER, *commands).split("\0")
    assert NAME in all_methods
    assert "num_experts" in method
    assert "floor" in strategy


def test_they_train(copy):
    write_dataset(copy / "data", rows=200)
    run(copy, "-m", "apps.train", "--config", "configs/mean_experts.yaml", "--run-dir", "run")
    assert (copy / "run" / "result.json").is_file()
    reports = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("balancing/coefficient/click" in report.get("diagnostics", {}) for report in reports)


@pytest.mark.long
def test_the_tests_of_all_strategies_take_it_in(copy):
    report = run(copy, "-m", "pytest", "tests/training/test_balancing.py", "-k", STRATEGY_NAME, "-p", "no:cacheprovider", "-vv")
    assert report.count(" PASSED") >= 2
    assert "SKIPPED" not in report


@pytest.mark.long
def test_the_tests_of_all_methods_take_it_in(copy):
    expected = {
        "tests/models/test_invariants.py": 50,
        "tests/models/test_stability.py": 80,
        "tests/models/test_compile.py": 1,
        "tests/models/test_tied_heads.py": 1,
        "tests/training/test_method_parity.py": 3,
    }
    report = run(copy, "-m", "pytest", *expected, "-k", NAME, "-m", "not long", "-p", "no:cacheprovider", "-vv")
    passed = [line.split("::")[0] for line in report.splitlines() if NAME in line and " PASSED" in line]
    for file, at_least in expected.items():
        assert passed.count(file) >= at_least, file
    assert "SKIPPED" not in report
