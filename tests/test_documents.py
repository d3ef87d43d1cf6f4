"""The documents' code, commands and links are true."""

import ast
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from mmlrec.models.base.model import ModelSpec
from mmlrec.registry import method, method_names
from mmlrec.schema import DatasetManifest, Setting, Task
from tests import processes

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
METHOD, STRATEGY, DATASET = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
(DATASET_CONFIG,) = re.findall(r"```yaml\n(.*?)```", CONTRIBUTING, re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_configs_and_modules_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    for config in re.findall(r"configs/\S+\.yaml", text):
        assert (REPOSITORY / config).is_file(), config
    for module in re.findall(r"-m ((?:apps|mmlrec|preprocessing|benchmarks)[\w.]*\w)", text):
        place = REPOSITORY / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"^ *make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)


def test_where_is_leads_to_files_that_define_what_they_are_named_for():
    table = CONTRIBUTING.partition("### Where is …?")[2].partition("\n## ")[0]
    questions = re.findall(r"^\| (.*\?) \| (.*) \|$", table, re.MULTILINE)
    assert len(questions) >= 10
    for question, answer in questions:
        links = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)\)", answer)
        assert links, question
        for name, path in links:
            defined = [node.name for node in ast.parse((REPOSITORY / path).read_text()).body if hasattr(node, "name")]
            assert name in defined, f"{question} {path} defines no {name}"


def test_readme_lists_all_methods_and_their_settings():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\(docs/models/(\w+)\.md\)[^|]*\| `(\w+)` \|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)
    assert {name: [bool(mark.strip()) for mark in marks] for page, name, *marks in rows if page == name} == {
        name: [setting in method(name).settings for setting in Setting] for name in method_names()
    }


@pytest.mark.parametrize(("setting", "tasks", "scenarios"), [(Setting.MTL, 2, 1), (Setting.MSL, 1, 3), (Setting.MTMSL, 2, 3)])
def test_example_method_works(setting, tasks, scenarios, monkeypatch):
    module = types.ModuleType("mmlrec.models.mean_experts")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(METHOD, vars(module))
    spec = ModelSpec(setting, tuple(Task(name=f"t{t}") for t in range(tasks)), scenarios, {"user": 4, "item": 8}, 1)
    model = module.MeanExperts(spec, module.MeanExperts.Config(num_experts=3, expert_hidden_units=[6]))
    x, scenario = torch.randn(10, 13), torch.arange(10) % scenarios
    output = model(x, {}, scenario, return_all_heads=True)
    assert output.logits.shape == (10, tasks)
    assert output.all_logits.shape == (10, tasks * scenarios)
    # The logit of task t in scenario s is head t * S + s.
    expected = output.all_logits.view(10, tasks, scenarios)[torch.arange(10), :, scenario]
    assert torch.equal(output.logits, expected)
    output.all_logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_example_dataset_works(tmp_path):
    """One file and one YAML are put beside the real ones in a copy; a small log is preprocessed and trained on."""
    shutil.copytree(REPOSITORY / "preprocessing", tmp_path / "preprocessing", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "preprocessing" / "datasets" / "shop.py").write_text(DATASET)
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "mtl" / "shop.yaml").write_text(DATASET_CONFIG)
    (tmp_path / "raw").mkdir()
    draw = random.Random(0)
    rows = [(draw.randint(1, 30), f"i{draw.randint(1, 9)}", f"{draw.random():.2f}", draw.randint(0, 1)) for _ in range(1000)]
    lines = [f"{user}|{item}|{price}|{click}|{click if user % 2 else 0}" for user, item, price, click in rows]
    (tmp_path / "raw" / "views.csv").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "preprocessing", "shop", "--raw", "raw", "--out", "data/shop"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    manifest = DatasetManifest.load(tmp_path / "data/shop")
    assert [task.name for task in manifest.tasks] == ["click", "buy"]
    assert sum(split.num_rows for split in manifest.splits.values()) == 1000
    clicked = sum(row[3] for row in rows)
    assert sum(split.label_counts["click"]["all"][1] for split in manifest.splits.values()) == clicked
    command = [sys.executable, "-m", "apps.train", "--config", "configs/mtl/shop.yaml", "--run-dir", "run"]
    command += ["training.max_steps=3", "training.batch_size=200"]
    result = processes.run(command, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_readme_shows_what_make_quickstart_runs(tmp_path):
    command = ["make", "--always-make", "--dry-run", "quickstart", f"VENV={tmp_path}/venv"]
    planned = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    steps = [line.strip() for line in planned.splitlines() if f"{tmp_path}/venv/bin/python -" in line]
    assert len(steps) == 4
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for step in steps:
        assert step.replace(f"{tmp_path}/venv/bin/", "") in readme


def test_continuous_integration_runs_make_test_in_a_fresh_environment():
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ['rm -rf "$VENV"', "make test"]
