"""Balancing on sharded tables: one update a step, two ranks train like one, and state survives a resume."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mmlrec.balancing.hull import shortest_in_hull
from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.losses import LossOptions
from mmlrec.registry import strategy_names
from mmlrec.run_folder.checkpoint import model_tensors
from mmlrec.session.session import build_session
from tests.balancing.support import GRADIENT_LEVEL, pcgrad_of
from tests.datasets import write_dataset
from tests.training.launch import launch, losses, tensors
from tests.training.worker import whole

pytestmark = pytest.mark.timeout(1800)

STEPS = 12
CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4, init_std: 0.1, sharding: row_wise, optimizer: {{name: sgd, lr: 0.1}}}}
dense: {{optimizer: {{name: sgd, lr: 0.1}}}}
training: {{batch_size: 90, epochs: 1, log_every_steps: 1, checkpoint_every_steps: 7}}
"""
MTMSL = ["dataset.setting=mtmsl", "model.name=ple"]
WINDOWS = {"dwa": ["balancing.window_steps=3"], "stch": ["balancing.window_steps=2"]}
#: Case -> overrides: every strategy; every scope; every unit; coefficients that are kept; bfloat16.
CASES = {
    **{name: [f"balancing.name={name}", *WINDOWS.get(name, [])] for name in strategy_names()},
    **{f"pcgrad-{scope}": ["balancing.name=pcgrad", f"balancing.scope={scope}"] for scope in ("embedding", "both")},
    "mgda-scenario": [*MTMSL, "balancing.name=mgda", "balancing.unit=scenario", "balancing.scope=both"],
    "pcgrad-head": [*MTMSL, "balancing.name=pcgrad", "balancing.unit=head"],  # More than two: their order counts.
    "cagrad-head": [*MTMSL, "balancing.name=cagrad", "balancing.unit=head"],
    "aligned-msl": ["dataset.setting=msl", "dataset.tasks=[click]", "balancing.name=aligned"],
    "nash-kept": ["balancing.name=nash", "balancing.refresh_every=4"],
    "weighted": ["balancing.name=imtl_g", "balancing.loss_weights={click: 3.0}", "dense.l2=0.01", "embeddings.l2=0.01"],
}
#: Runs of one step whose tables are compared: method with its options, setting, strategy.
ONCE = [
    *(("mmoe", "gate_hidden_units: [4]", "mtl", strategy) for strategy in ("static", "pcgrad", "mgda")),
    ("star", "dnn_hidden_units: [8], aux_hidden_units: [4]", "mtmsl", "pcgrad"),
    ("ple", "num_specific_experts: 1, gate_hidden_units: [4]", "mtmsl", "mgda"),
    ("escm2", "variant: dr", "mtl", "pcgrad"),
]
WITH_STATE = ("uw", "dwa", "stch", "famo", "gradnorm", "metabalance", "nash-kept")


def config_of(method, options, setting, strategy, folder):
    """A file for it; SGD with rate 1 everywhere."""
    hidden = "" if method == "star" else "expert_hidden_units: [12, 8], "
    model = f"model: {{name: {method}, {hidden}{options}}}"
    text = re.sub("^model: .*$", model, CONFIG.format(dataset=folder / "data"), flags=re.MULTILINE).replace(
        "lr: 0.1", "lr: 1.0"
    )
    text = text.replace("setting: mtl", f"setting: {setting}") + f"balancing: {{name: {strategy}}}\n"
    file = folder / f"{method}-{strategy}.yaml"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Folder of the dataset of these tests."""
    folder = tmp_path_factory.mktemp("once")
    write_dataset(folder / "data", rows=120, table_rows=30, missing_labels=0.2, funnel=True)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory, once):
    """All runs, in one launch for each world size."""
    root = tmp_path_factory.mktemp("balancing")
    write_dataset(root / "data", rows={"train": 90 * STEPS, "valid": 90, "test": 90}, table_rows=30, missing_labels=0.2)
    (root / "config.yaml").write_text(CONFIG.format(dataset=root / "data"))

    def action(kind, folder, *overrides, **more):
        return {
            "kind": kind,
            "name": "all",
            "config": str(root / "config.yaml"),
            "overrides": list(overrides),
            "run_dir": str(root / folder),
            **more,
        }

    local = action("steps", "2-local", "balancing.name=cagrad", "balancing.gram=local", steps=3)
    half = action("steps", "2-bf16", "balancing.name=mgda", "training.precision=bf16", steps=3)
    single = [
        {
            "kind": "steps",
            "config": str(config_of(*case, once)),
            "overrides": [],
            "steps": 1,
            "run_dir": str(root / f"once-{i}"),
        }
        for i, case in enumerate(ONCE)
    ]
    for world_size in (1, 2):
        actions = [action("steps", f"{world_size}-{name}", *CASES[name], steps=STEPS) for name in CASES]
        for name in WITH_STATE:
            if world_size == 1:
                actions.append(action("train", f"whole-{name}", *CASES[name]))
                actions.append(action("train", f"parts-{name}", *CASES[name], "training.max_steps=7"))
                actions.append(action("train", f"parts-{name}", *CASES[name]))
            else:
                actions.append(action("train", f"moved-{name}", *CASES[name], "training.max_steps=7"))
                output = str(root / f"resharded-{name}")
                actions.append(action("reshard", f"parts-{name}", *CASES[name], output=output))
        launch(world_size, [*actions, *([local, half, *single] if world_size == 2 else [])], root / f"logs-{world_size}")
    launch(1, [action("train", f"moved-{name}", *CASES[name]) for name in WITH_STATE], root / "logs-moved")
    return root


def kept(root: Path, case: str, world_size: int, rank: int = 0) -> dict:
    return torch.load(root / f"{world_size}-{case}" / f"{rank}.pt")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_like_one(root, case):
    one, two = kept(root, case, 1), kept(root, case, 2)
    assert len(one["losses"]) == STEPS
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=1e-7)
    assert one["weights"].keys() == two["weights"].keys()
    for key, expected in one["weights"].items():
        # FAMO's logits are sums of differences of losses that are nearly equal; what they do, they do through their softmax.
        size = 1.0 if key.endswith("balancing.logits") else expected.abs().max().clamp(min=0.01)
        assert (two["weights"][key] - expected).abs().max() <= 1e-5 * size, key
    if case in GRADIENT_LEVEL:
        gram = one["weights"]["model.head.balancing.gram"]
        assert abs(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()) > 1e-3


@pytest.mark.parametrize("case", [*CASES, "local", "bf16"])
def test_ranks_agree_to_the_bit(root, case):
    first, second = kept(root, case, 2, 0)["weights"], kept(root, case, 2, 1)["weights"]
    for key, value in first.items():
        if key.startswith("model.head."):
            assert second[key].equal(value), key
    assert all(value.isfinite().all() for value in first.values())


def test_local_gram_is_another_one(root):
    gram = [kept(root, case, 2)["weights"]["model.head.balancing.gram"] for case in ("local", "cagrad")]
    assert gram[0].diagonal().gt(0).all()
    assert not torch.allclose(*gram)


@pytest.mark.parametrize("case", [name for name in strategy_names() if name not in ("static", "monitor")])
def test_strategies_change_training(root, case):
    static, found = kept(root, "static", 1)["weights"], kept(root, case, 1)["weights"]
    experts = "model.head.network.experts.weights.0"
    assert not torch.allclose(found[experts], static[experts])


def test_monitor_trains_like_static_to_the_bit(root):
    static, monitor = kept(root, "static", 1), kept(root, "monitor", 1)
    assert all(monitor["weights"][key].equal(value) for key, value in static["weights"].items())
    assert monitor["losses"].equal(static["losses"])


@pytest.mark.parametrize("case", WITH_STATE)
def test_resumed_equals_uninterrupted_to_the_bit(root, case):
    whole, parts = (tensors(root / f"{name}-{case}" / "checkpoints" / f"step_{STEPS:09d}") for name in ("whole", "parts"))
    assert any("head.balancing." in key for key in whole)
    assert whole.keys() == parts.keys()
    assert [key for key in whole if not whole[key].equal(parts[key])] == []
    lines = [
        [line for line in map(json.loads, (root / f"{name}-{case}" / "metrics.jsonl").open()) if line["split"] == "train"]
        for name in ("whole", "parts")
    ]
    assert [line["diagnostics"] for line in lines[0]] == [line["diagnostics"] for line in lines[1]]
    assert len(lines[0]) == STEPS


@pytest.mark.parametrize("case", WITH_STATE)
def test_state_moves_to_another_world_size(root, case):
    saved = tensors(root / f"parts-{case}" / "checkpoints" / f"step_{STEPS:09d}")
    loaded = tensors(root / f"resharded-{case}")
    assert all(loaded[key].equal(value) for key, value in saved.items())
    expected, found = losses(root / f"whole-{case}"), losses(root / f"moved-{case}")
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-6), f"step {step}"


def looked_up(batch, tables):
    """The pooled fields of a batch, by a lookup of our own."""
    fields, table_of = {}, {"f0": "t0", "m0": "tm0", "f1": "t1", "f2": "t2"}
    for name, jagged in batch.sparse.to_dict().items():
        (key,) = (key for key in tables if key.endswith(f".{table_of[name]}.weight"))
        lengths, values = jagged.lengths().tolist(), jagged.values().tolist()
        bags, start = [], 0
        for length in lengths:
            rows = tables[key][values[start : start + length]]
            bags.append(rows.mean(0) if length else torch.zeros(4, dtype=torch.float64))
            start += length
        fields[name] = torch.stack(bags)
    return fields


def weights_after_one_step(network, before, batch, setting, strategy):
    """Old weights minus sum_k c_k dL_k/dw and the gradient of the method's own terms, in float64."""
    tables = {key: value.double().requires_grad_() for key, value in before.items() if "embedding_bags" in key}
    assert len(tables) == 4
    fields = looked_up(batch, tables)
    fields = {name: fields[name] for name in network.spec.fields}
    x = torch.cat([*fields.values(), batch.dense.double()], dim=1)
    scenario = batch.scenario if setting == "mtmsl" else torch.zeros_like(batch.scenario)
    output = network(x, fields, scenario, valid=batch.valid)
    loss = network.make_loss(LossOptions())
    targets = (batch.labels.double(), batch.mask.double(), scenario, batch.weight.double())
    found = loss(output, *targets, loss.denominators(*targets))

    named = {f"model.head.network.{name}": p for name, p in network.named_parameters()}
    everything = {**named, **tables}
    of_each = {}
    for name, value in found.items():
        own = torch.autograd.grad(value, list(everything.values()), retain_graph=True, materialize_grads=True)
        of_each[name] = dict(zip(everything, own, strict=True))
    shared = [key for key in named if network.owner(key.removeprefix("model.head.network.")) not in ("head", "task")]
    vectors = np.array([torch.cat([of_each[name][key].flatten() for key in shared]).numpy() for name in loss.objectives])
    gram = vectors @ vectors.T
    c = {"static": np.ones(2), "pcgrad": pcgrad_of(gram, [[1], [0]]), "mgda": 2 * shortest_in_hull(gram)}[strategy]
    factors = dict(zip(loss.objectives, c, strict=True))
    return {
        key: before[key].double()
        - sum((factors.get(name, 1.0) if key in tables or key in shared else 1.0) * own[key] for name, own in of_each.items())
        for key in everything
    }


@pytest.mark.parametrize("case", ONCE, ids=lambda case: f"{case[0]}-{case[3]}")
@pytest.mark.parametrize("world_size", [1, 2])
def test_tables_are_updated_exactly_once(once, request, case, world_size):
    """SGD with rate 1: the new table is the old one minus sum_k c_k dL_k/dtable, from a float64 lookup of our own."""
    with process_group() as world:
        session = build_session(load_config(config_of(*case, once)), world, for_training=True)
        session.model.train()
        batch = next(iter(session.reader("train").epoch(0)))
        before = {key: whole(value, world) for key, value in model_tensors(session.model).items()}
        network = copy.deepcopy(session.network).double()
        if world_size == 1:
            session.pipeline.progress(iter([batch]))
            after = {key: whole(value, world) for key, value in model_tensors(session.model).items()}
    if world_size == 2:
        root = request.getfixturevalue("root")
        after = torch.load(root / f"once-{ONCE.index(case)}" / "0.pt")["weights"]
    for key, expected in weights_after_one_step(network, before, batch, *case[2:]).items():
        torch.testing.assert_close(
            after[key].double(), expected, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
        assert (after[key] - before[key]).abs().max() > 1e-4, key
