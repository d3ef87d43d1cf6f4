"""Default names of run folders: equal for equal configurations, different for runs that do not continue each other."""

import itertools
import re
from pathlib import Path

import pytest

from mmlrec.config import load_config
from mmlrec.registry import resolve
from mmlrec.run_folder.folder import differences
from mmlrec.training.run import default_run_dir

CONFIG = """
dataset: {path: data/shop, setting: mtl}
model: {name: mmoe}
model_defaults: {expert_hidden_units: [64, 32], bottom_hidden_units: [64], num_experts: 4}
dense: {clip_norm: 1.0}
"""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "shop.yaml").write_text(CONFIG)
    return tmp_path / "shop.yaml"


def name(source: Path, *overrides: str) -> str:
    folder = default_run_dir(resolve(load_config(source, list(overrides)), str(source)), source)
    assert folder.parent == Path("runs")
    return folder.name


NAMES = {
    (): "mtl-shop-mmoe-seed0",
    ("model.name=ple", "training.seed=2"): "mtl-shop-ple-seed2",
    ("balancing.name=uw",): "mtl-shop-mmoe-uw-seed0",
    ("model.name=pcg",): "mtl-shop-pcg-seed0",
    ("dataset.setting=mtmsl",): "mtmsl-shop-mmoe-seed0",
    # What may change between start and resume.
    (
        "training.epochs=2",
        "training.max_steps=9",
        "dataset.path=elsewhere/shop",
        "embeddings.sharding=row_wise",
    ): "mtl-shop-mmoe-seed0",
    # What the file says, or leaves to the default.
    ("dense.clip_norm=1.0", "dense.optimizer.lr=1e-3", "model.num_experts=4"): "mtl-shop-mmoe-seed0",
    ("dense.optimizer.lr=0.01",): "mtl-shop-mmoe-seed0-dense.optimizer.lr=0.01",
    ("dense.clip_norm=null",): "mtl-shop-mmoe-seed0-dense.clip_norm=null",
    ("balancing.name=cagrad", "balancing.c_a=0.3"): "mtl-shop-mmoe-cagrad-seed0-balancing.c_a=0.3",
    ("model.expert_hidden_units=[128, 64]",): "mtl-shop-mmoe-seed0-model.expert_hidden_units=128_64",
    (
        "training.precision=bf16",
        "training.batch_size=512",
    ): "mtl-shop-mmoe-seed0-training.batch_size=512-training.precision=bf16",
}


@pytest.mark.parametrize("overrides", NAMES)
def test_names(source, overrides):
    assert name(source, *overrides) == NAMES[overrides]
    assert name(source, *reversed(overrides)) == NAMES[overrides]


def test_many_or_awkward_differences_become_a_digest(source):
    many = [f"dense.optimizer.{key}=0.5" for key in ("lr", "eps", "beta1", "beta2")]
    awkward = ["embeddings.table_sharding={a: row_wise}", "dataset.tasks=['a/b', 'x=1-y=2']"]
    for overrides in (many, awkward):
        assert re.fullmatch(r"mtl-shop-mmoe-seed0-[0-9a-f]{10}", name(source, *overrides))
    assert name(source, *many) == name(source, *reversed(many))


def test_a_configuration_that_needs_the_command_line_has_a_name(source):
    source.write_text("dataset: {setting: mtl}\nschedule: {name: linear}\n")
    needed = ["dataset.path=data/shop", "schedule.total_steps=9"]
    first, longer = name(source, *needed), name(source, *needed, "training.max_steps=4")
    assert first == longer
    assert first.startswith("mtl-shop-mmoe-seed0-")
    assert name(source, *needed, "dense.l2=0.1") != first


VALUES = [
    *("dense.optimizer.lr=0.1", "dense.optimizer.lr=0.01", "dense.optimizer.lr=1", "embeddings.optimizer.lr=0.1"),
    *("model.gate_hidden_units=[1, 2]", "model.gate_hidden_units=[12]", "model.gate_hidden_units=[]", "model.use_bn=true"),
    *("dataset.tasks=[a, b]", "dataset.tasks=[b, a]", "dataset.tasks=[a_b, c]", "training.seed=1", "training.max_steps=3"),
    *("model.activation=tanh", "training.validate_every_steps=5", "schedule.warmup_steps=5", "model.gate_extra_fields=[f1]"),
]


def test_two_names_are_equal_only_where_one_run_may_follow_the_other(source):
    """Of all pairs of no change or one, and some of two."""
    chosen = [combined for count in (0, 1) for combined in itertools.combinations(VALUES, count)]
    chosen += list(itertools.pairwise(VALUES))
    plain = resolve(load_config(source), str(source))
    runs, names = [], []
    for overrides in chosen:
        config = resolve(load_config(source, list(overrides)), str(source))
        runs.append(differences(plain, config))
        names.append(default_run_dir(config, source).name)
    assert all(re.fullmatch(r"[A-Za-z0-9_.=+-]+", one) for one in names)
    for (run, first), (other, second) in itertools.combinations(zip(runs, names, strict=True), 2):
        assert (first == second) == (run == other), (first, second)
