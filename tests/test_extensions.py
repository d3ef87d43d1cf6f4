"""Methods, strategies and datasets of other packages: by entry point, by --import, and never because a file names them."""

import os
import random
import re
import sys

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mmlrec import extensions
from mmlrec.errors import ConfigError, UserError
from mmlrec.extensions import import_modules
from mmlrec.registry import method, method_names, resolve, strategy
from preprocessing.dataset import dataset_class, datasets
from tests import processes
from tests.datasets import write_dataset
from tests.test_documents import DATASET, METHOD, STRATEGY

ENTRY_POINTS = """
[mmlrec.methods]
mean_experts = shop_extras.mean_experts:MeanExperts

[mmlrec.strategies]
inverse_loss = shop_extras.inverse_loss:InverseLoss

[mmlrec.datasets]
shop = shop_extras.shop:Shop
"""
CONFIG = """
dataset: {path: data, setting: mtl, tasks: [click, buy]}
model: {name: mean_experts, num_experts: 2, expert_hidden_units: [8]}
balancing: {name: inverse_loss, floor: 0.01}
embeddings: {dim: 4}
training: {batch_size: 128, max_steps: 4}
"""
IMPORTS = ["--import", "shop_extras.mean_experts", "--import", "shop_extras.inverse_loss"]


@pytest.fixture
def package(tmp_path):
    """The three examples of CONTRIBUTING.md as a package outside the tree, and a raw log."""
    folder = tmp_path / "site" / "shop_extras"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    for name, source in (("mean_experts", METHOD), ("inverse_loss", STRATEGY), ("shop", DATASET)):
        (folder / f"{name}.py").write_text(source)
    draw = random.Random(0)
    (tmp_path / "raw").mkdir()
    with (tmp_path / "raw" / "views.csv").open("w") as file:
        for _ in range(1200):
            click = draw.randint(0, 1)
            file.write(
                f"{draw.randint(1, 30)}|i{draw.randint(1, 9)}|{draw.random():.2f}|{click}|{click * draw.randint(0, 1)}\n"
            )
    (tmp_path / "shop.yaml").write_text(CONFIG)
    return tmp_path


def declare(package, text=ENTRY_POINTS, name="shop_extras"):
    """What installing the package leaves beside it."""
    information = package / "site" / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(text)


def run(package, module, *arguments):
    environment = processes.environment()
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(package / "site")])
    return processes.run([sys.executable, "-m", module, *map(str, arguments)], cwd=package, env=environment, timeout=200)


def succeed(package, *command):
    result = run(package, *command)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_by_import_from_raw_files_to_scores(package):
    succeed(package, "preprocessing", "--import", "shop_extras.shop", "shop", "--raw", "raw", "--out", "data")
    assert "num_experts" in succeed(package, "apps.models", "--import", "shop_extras.mean_experts", "mean_experts")
    succeed(package, "apps.train", *IMPORTS, "--config", "shop.yaml", "--run-dir", "run")
    resolved = yaml.safe_load((package / "run" / "config.yaml").read_text())
    assert resolved["balancing"]["floor"] == 0.01
    assert "shop_extras" not in (package / "run" / "config.yaml").read_text()
    succeed(package, "apps.evaluate", *IMPORTS, "--run-dir", "run")
    succeed(package, "apps.predict", *IMPORTS, "--run-dir", "run", "--input", "data", "--output", "scores.parquet")
    assert {"score.click", "score.buy"} <= set(pq.read_schema(package / "scores.parquet").names)
    result = run(package, "apps.evaluate", "--run-dir", "run")
    assert result.returncode == 2
    assert re.search(r"error: .*unknown (method 'mean_experts'|strategy 'inverse_loss')", result.stderr)
    assert "--import package.module" in result.stderr


def test_by_entry_point_of_an_installed_package(package):
    declare(package)
    succeed(package, "preprocessing", "shop", "--raw", "raw", "--out", "data")
    assert "mean_experts" in succeed(package, "apps.models")
    assert "floor" in succeed(package, "apps.strategies", "inverse_loss")
    succeed(package, "apps.train", "--config", "shop.yaml", "--run-dir", "run")
    succeed(package, "apps.evaluate", "--run-dir", "run")


PLAIN = """
import torch
from torch import nn

from mmlrec.models.base.model import MultiTaskModel


class Planted(MultiTaskModel):
    def __init__(self, spec, config):
        super().__init__(spec, config)
        self.outputs = nn.Linear(spec.input_width, spec.num_heads)

    def forward(self, x, fields, scenario, *, valid=None, noise=None, return_all_heads=False):
        return self.select(self.outputs(x), scenario, return_all_heads)
"""


@pytest.fixture
def here(package, monkeypatch):
    """The package within reach of this process."""
    monkeypatch.syspath_prepend(package / "site")
    monkeypatch.setattr(extensions, "_imported", [])
    extensions._declared.cache_clear()
    yield package
    extensions._declared.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("shop_extras", "planted", "broken"))]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "section",
    [
        "model: {name: 'planted:Planted'}",
        "model: {name: planted}",
        "model: {name: planted.Planted}",
        "balancing: {name: 'planted:Planted'}",
        "balancing: {name: planted}",
    ],
)
def test_a_name_in_a_configuration_is_never_imported(here, monkeypatch, section):
    target = here / "was_imported"
    (here / "site" / "planted.py").write_text(f"open({str(target)!r}, 'w')\nclass Planted: pass\n")
    (here / "config.yaml").write_text(f"dataset: {{path: data}}\n{section}\n")
    from mmlrec.config import load_config

    with pytest.raises(ConfigError, match=r"unknown (method|strategy) 'planted"):
        resolve(load_config(here / "config.yaml"), "config.yaml")
    assert not target.exists()


def test_what_is_declared_is_loaded_only_when_asked_for(here):
    (here / "site" / "broken.py").write_text("raise ImportError('no such library')\n")
    declare(here, ENTRY_POINTS.replace("[mmlrec.methods]", "[mmlrec.methods]\nbroken = broken:Broken"))
    assert {"broken", "mean_experts", "mmoe"} <= set(method_names())
    assert not any(name.startswith("shop_extras") for name in sys.modules)
    assert method("mmoe").__name__ == "MMoE"
    assert method("mean_experts").__module__ == "shop_extras.mean_experts"
    assert strategy("inverse_loss").__module__ == "shop_extras.inverse_loss"
    assert dataset_class("shop").name == "shop"
    assert "shop" in datasets()
    with pytest.raises(UserError, match=r"method 'broken': broken:Broken .* cannot be loaded: ImportError: no such library"):
        method("broken")


def test_one_name_of_two_places_is_refused(here):
    declare(here)
    declare(here, "[mmlrec.methods]\nmmoe = shop_extras.mean_experts:MeanExperts\n", "other")
    with pytest.raises(ConfigError, match=r"method 'mmoe' is there more than once: .*mmoe\.py and .*shop_extras\.mean_experts"):
        method("mmoe")
    # The same class by both roads is one.
    import_modules(["shop_extras.mean_experts"])
    assert method("mean_experts").__name__ == "MeanExperts"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module", "cannot be imported: ModuleNotFoundError"),
        ("shop_extras", "there is no method or strategy in it"),
        ("../evil", "give the name of a module"),
    ],
)
def test_an_import_that_gives_nothing_is_told(here, name, message):
    with pytest.raises(UserError, match=message):
        import_modules([name])


def test_a_method_that_draws_its_weights_from_torchs_own_state_repeats_by_the_seed(here, run_app):
    (here / "site" / "planted.py").write_text(PLAIN)
    write_dataset(here / "data", rows=100)
    config = CONFIG.replace("path: data", f"path: {here / 'data'}").replace(
        "mean_experts, num_experts: 2, expert_hidden_units: [8]", "planted"
    )
    (here / "planted.yaml").write_text(config.replace("inverse_loss, floor: 0.01", "static"))
    results = []
    for folder, seed in (("one", 3), ("again", 3), ("other", 4)):
        torch.manual_seed(len(folder))
        command = ["--import", "planted", "--config", here / "planted.yaml", "--run-dir", here / folder]
        code, error = run_app("train", *command, f"training.seed={seed}", "dense.optimizer.lr=1e-9", "embeddings.init_std=1e-9")
        assert code == 0, error
        results.append((here / folder / "result.json").read_text())
    assert results[0] == results[1] != results[2]
