"""Strategies with a warm-up say when a run never left it."""

import json

import pytest
import torch

from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.registry import strategy_names
from mmlrec.training.advice import advise_on_warmup
from mmlrec.training.run import train
from tests.balancing.support import make
from tests.datasets import write_dataset

CONFIG = """
dataset: {{path: {folder}/data}}
model: {{name: shared_bottom, bottom_hidden_units: [8], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
training: {{batch_size: 40, epochs: 3, patience: 1}}
"""


def coefficients_that_are_plain(name, **options):
    """The steps, from the first on, in which a strategy on losses does as it does in its warm-up."""
    strategy = make(name, 2, **options)
    for step in range(1, 40):
        losses = torch.tensor([0.5 + 0.01 * step, 0.2], dtype=torch.float64)
        c = strategy.coefficients(losses, step)
        if not any(torch.allclose(c, plain) for plain in (torch.ones(2, dtype=torch.float64), 1 / losses)):
            return step - 1
    return None


@pytest.mark.parametrize(
    ("name", "options"),
    [("dwa", {}), ("dwa", {"window_steps": 3}), ("stch", {}), ("stch", {"window_steps": 3, "warmup_windows": 2})],
)
def test_the_warmup_is_as_long_as_the_strategy_says(name, options):
    assert make(name, 2, **options).warmup_steps == coefficients_that_are_plain(name, **options)


def test_other_strategies_have_none():
    assert {name for name in strategy_names() if make(name, 2).warmup_steps} == {"dwa", "stch"}


@pytest.mark.parametrize(
    ("strategy", "options", "wanted"),
    [
        # 5 steps an epoch, 3 epochs: the warm-ups of 10, 15 and 20 steps.
        ("dwa", [], None),
        ("dwa", ["training.epochs=2"], "has 10 steps at most, and the strategy's warm-up takes 10: it will never weigh"),
        ("stch", [], "has 15 steps at most, and the strategy's warm-up takes 20"),
        ("stch", ["balancing.window_steps=2"], None),
        ("static", ["training.epochs=1"], None),
    ],
)
def test_a_run_that_cannot_leave_it_says_so_before_it_starts(tmp_path, strategy, options, wanted):
    write_dataset(tmp_path / "data", rows=200)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    overrides = [f"balancing.name={strategy}", "training.patience=null", *options]
    with process_group() as world:
        train(load_config(tmp_path / "config.yaml", overrides), tmp_path / "run", world)
    told = [line for line in (tmp_path / "run/train.log").read_text().splitlines() if "warm-up" in line]
    assert len(told) == (wanted is not None)
    if wanted:
        assert f"balancing.name={strategy}: the run {wanted}" in told[0]
        assert "balancing.window_steps" in told[0]


def test_a_run_that_stops_early_in_it_says_so_at_its_end(tmp_path):
    write_dataset(tmp_path / "data", rows=200)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    overrides = ["balancing.name=dwa", "training.epochs=40", "balancing.window_steps=70", "embeddings.optimizer.lr=3.0"]
    with process_group() as world:
        train(load_config(tmp_path / "config.yaml", overrides), tmp_path / "run", world)
    last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()][-1]["step"]
    assert last < 140
    told = [line for line in (tmp_path / "run/train.log").read_text().splitlines() if "warm-up" in line]
    assert len(told) == 1
    assert told[0].endswith(advise_on_warmup("dwa", 140, last, ended=True))
    assert f"the run ended at step {last}" in told[0]
