"""Untrained networks predict the label rates of train: every method, in every setting, from counted rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmlrec.config import load_config
from mmlrec.models.base.model import ModelSpec
from mmlrec.registry import method_names, resolve
from mmlrec.schema import Setting, Task
from mmlrec.session.parts import build_parts
from tests.datasets import write_dataset
from tests.models.support import SHAPES, build, make_data, make_spec, spec_of, supports

#: Labelled and positive rows of [task][scenario]: a chain, with different rates in each scenario.
COUNTS = [
    [(60_000, 1_200), (20_000, 8_000), (10_000, 500)],
    [(60_000, 60), (20_000, 4_000), (10_000, 20)],
]
# Towers that scenarios share can only start at the rate of all of them.
SHARED = ("pepnet",)
CASES = [(name, shape) for name in method_names() for shape in ("mtl", "msl", "mtmsl") if supports(name, spec_of(shape))]


def rates(shape: str, name: str, counts: torch.Tensor) -> torch.Tensor:
    """Positive over labelled rows, [T, S], as plain divisions."""
    expected = counts[..., 1] / counts[..., 0]
    if name in SHARED:
        expected = (counts[..., 1].sum(1) / counts[..., 0].sum(1)).unsqueeze(1).expand_as(expected)
    if name == "hmoe":  # At the start it mixes scores in equal parts: of a task's scenarios, in mtl of all tasks.
        logits = torch.log(expected / (1 - expected))
        logits = logits.mean(0 if shape == "mtl" else 1, keepdim=True).expand_as(logits)
        expected = 1 / (1 + torch.exp(-logits))
    return expected


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_an_untrained_network_predicts_the_label_rates(name, shape):
    tasks, scenarios = SHAPES[shape]
    counts = torch.tensor(COUNTS, dtype=torch.float64)[:tasks, :scenarios]
    # STAR's auxiliary network adds something of its own to the logits.
    net = build(name, spec_of(shape), **({"use_aux": False} if name == "star" else {})).eval()
    data = make_data(net, 3 * scenarios)
    zeros = {field: torch.zeros_like(value) for field, value in data.fields.items()}
    before = net(torch.zeros_like(data.x), zeros, data.scenario).logits
    net.start_at_label_rates(counts)
    logits = net(torch.zeros_like(data.x), zeros, data.scenario).logits
    assert not torch.equal(before, logits)
    expected = rates(shape, name, counts)[:, data.scenario].t().float()
    torch.testing.assert_close(torch.sigmoid(logits), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["esmm", "escm2", "aitm"])
def test_one_chain_for_all_scenarios_starts_at_the_rate_of_all(name):
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    net = build(name, spec_of("mtmsl"), scenario_towers="shared").eval()
    net.start_at_label_rates(counts)
    x, fields = torch.zeros(1, net.spec.input_width), {f: torch.zeros(1, 4) for f in net.spec.fields}
    found = torch.sigmoid(net(x, fields, torch.zeros(1, dtype=torch.long)).logits[0])
    torch.testing.assert_close(found, torch.tensor([9700 / 90_000, 4080 / 90_000]), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["esmm", "escm2"])
def test_a_conversion_that_only_clicked_rows_have_starts_at_their_rate(name):
    net = build(name, make_spec(2))
    net.start_at_label_rates(torch.tensor([[[10_000, 1000]], [[1000, 50]]], dtype=torch.float64))
    torch.testing.assert_close(torch.sigmoid(net.towers.bias), torch.tensor([0.1, 0.05]), rtol=0.02, atol=0)


def test_options_with_other_outputs_start_at_the_rates_too():
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    expected = torch.logit(counts[..., 1] / counts[..., 0])
    for name, options, biases in (
        ("star", {"star_axis": "scenario"}, lambda net: net.star.own_biases[-1].t()),
        ("pepnet", {"head_scope": "per_head"}, lambda net: net.outputs.bias.view(2, 3)),
        ("mlp", {"per_head_output": True}, lambda net: net.outputs.bias.view(2, 3)),
        ("mlp", {}, lambda net: net.bias.view(2, 3)),
    ):
        net = build(name, spec_of("mtmsl"), **options)
        net.start_at_label_rates(counts)
        torch.testing.assert_close(biases(net), expected.float(), rtol=0.02, atol=0, msg=name)
    alone = build("single_task", spec_of("mtmsl"), branches=[4, 0])
    alone.start_at_label_rates(counts)
    torch.testing.assert_close(alone.towers.bias, expected[[1, 0], [1, 0]].float(), rtol=0.02, atol=0)


def test_rates_of_0_and_1_and_of_no_rows_are_finite_and_lean_to_the_tasks():
    counts = torch.tensor([[[0, 0], [3, 3], [996, 99]], [[0, 0], [0, 0], [0, 0]]], dtype=torch.float64)
    net = build("shared_bottom", make_spec(2, 3))
    net.start_at_label_rates(counts)
    unknown, full, known, *nothing = torch.sigmoid(net.towers.bias).tolist()
    assert unknown == pytest.approx(102.5 / 1000, rel=1e-5)
    assert full == pytest.approx((3 + 102.5 / 1000) / 4, rel=1e-5)
    assert known == pytest.approx(99 / 996, rel=0.01)
    assert nothing == [0.5] * 3


def test_a_regression_task_starts_at_0():
    tasks = (Task(name="click"), Task(name="price", kind="regression"))
    net = build("mmoe", ModelSpec(Setting.MTL, tasks, 1, {"f0": 4}, 0))
    net.start_at_label_rates(torch.tensor([[[100, 20]], [[100, 90]]], dtype=torch.float64))
    assert net.towers.bias[1] == 0
    assert net.towers.bias[0] != 0


@pytest.mark.parametrize("setting", ["mtl", "msl", "mtmsl"])
def test_a_run_starts_at_the_rates_of_its_train_rows(tmp_path, setting):
    written = write_dataset(tmp_path / "data", rows=400, num_scenarios=2)
    tasks = ["buy"] if setting == "msl" else ["buy", "click"]
    (tmp_path / "config.yaml").write_text(
        f"dataset: {{path: {tmp_path / 'data'}, setting: {setting}, tasks: {tasks}}}\nmodel: {{name: shared_bottom}}\n"
    )

    def network(*overrides):
        return build_parts(resolve(load_config(tmp_path / "config.yaml", list(overrides)), "config")).network

    train, found = written.tables["train"], network()
    scenario = train["sample.scenario"].to_numpy()
    expected = []
    for task in tasks:
        labels = train[f"label.{task}"].to_numpy()
        for rows in [scenario >= 0] if setting == "mtl" else [scenario == 0, scenario == 1]:
            rate = np.nanmean(labels[rows])
            expected.append(math.log(rate / (1 - rate)))
    np.testing.assert_allclose(found.towers.bias.detach().numpy(), expected, atol=0.05)
    plain = network("dense.start_at_label_rates=false")
    assert not plain.towers.bias.any()
    for (key, one), two in zip(found.named_parameters(), plain.parameters(), strict=True):
        assert key == "towers.bias" or torch.equal(one, two)
