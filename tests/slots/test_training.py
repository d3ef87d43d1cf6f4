"""Runs with managed tables: slots as by plain dictionaries, rows that begin anew, checkpoints that move between ranks."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmlrec.slots import stored
from tests.slots.support import FEATURES, brute_force, write_managed
from tests.training.launch import launch, losses, tensors, validations

BATCH, STEPS = 30, 40
SLOTS = {"user": 17, "item": 12}
RULES = {
    "lfu-1": {"admit_after": 1, "evict": "lfu", "update_every": 5},
    "lfu-3": {"admit_after": 3, "evict": "lfu", "update_every": 7},
    "lru-1": {"admit_after": 1, "evict": "lru", "update_every": 1},
    "lru-3": {"admit_after": 3, "evict": "lru", "update_every": 4},
}
CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [12, 8], tower_hidden_units: [4]}}
embeddings: {{dim: 4, init_std: 0.1}}
training: {{batch_size: {batch}, eval_batch_size: 25, epochs: 30, max_steps: {steps}, patience: null, log_every_steps: 1,
  keep_checkpoints: 50}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A dataset of 25 steps and a configuration: runs of 40 steps are in their second epoch."""
    folder = tmp_path_factory.mktemp("managed")
    write_managed(folder / "data", steps=25, batch_size=BATCH, slots=SLOTS)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data", batch=BATCH, steps=STEPS))
    return folder


@pytest.fixture(scope="module")
def dataset(root):
    return write_managed(root / "again", steps=25, batch_size=BATCH, slots=SLOTS)


def train(root: Path, run_dir: Path, *overrides: str, name: str = "all", rule: dict | None = None) -> dict:
    options = [f"embeddings.managed={json.dumps(rule)}"] if rule else []
    return {
        "kind": "train",
        "name": name,
        "config": str(root / "config.yaml"),
        "overrides": [*options, *overrides],
        "run_dir": str(run_dir),
    }


def held(folder: Path, table: str) -> dict[int, int]:
    keys, slots = stored.read(folder, table)
    assert np.all(keys[1:] > keys[:-1])
    return dict(zip(keys.view(np.int64).tolist(), slots.tolist(), strict=True))


def diagnostics(run_dir: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["diagnostics"] for line in lines if line["split"] == "train"}


@pytest.fixture(scope="module")
def runs(root):
    """A run by each rule on 1, 2 and 3 ranks."""
    for world_size, sharding in ((1, "table_wise"), (2, "row_wise"), (3, "auto")):
        overrides = [f"embeddings.sharding={sharding}", "embeddings.optimizer={name: sgd, lr: 0.05}"]
        overrides += ["dense.optimizer={name: sgd, lr: 0.05}"]
        actions = [train(root, root / f"{name}-{world_size}", *overrides, rule=rule) for name, rule in RULES.items()]
        launch(world_size, actions, root / f"logs-{world_size}")
    return root


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_who_holds_which_slot_is_as_plain_dictionaries_say(runs, dataset, name, world_size):
    run_dir = runs / f"{name}-{world_size}"
    found = diagnostics(run_dir)
    for table in SLOTS:
        truth = brute_force(dataset, table, BATCH, STEPS, **RULES[name])
        newest = run_dir / f"checkpoints/step_{STEPS:09d}"
        assert held(newest, table) == truth.slots
        assert truth.evictions > 10
        keys, counts = stored.StoredTable(newest, table).counts()
        if name != "lru-1":
            # Counted at boundaries; what came since is with what has arrived.
            last = STEPS - STEPS % RULES[name]["update_every"]
            before = brute_force(dataset, table, BATCH, last, **RULES[name]).counts
            assert dict(zip(keys.view(np.int64).tolist(), counts.tolist(), strict=True)) == before
        ended = found[STEPS]
        assert ended[f"managed/{table}/occupancy"] == len(truth.slots) / SLOTS[table]
        if STEPS % RULES[name]["update_every"]:
            assert ended[f"managed/{table}/admissions"] == truth.admissions
            assert ended[f"managed/{table}/evictions"] == truth.evictions
            shares = [without / of for of, without in zip(truth.looked_up, truth.without, strict=True) if of]
            assert ended[f"managed/{table}/without_slot"] == pytest.approx(shares[-2], abs=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_ranks_train_like_one(runs, name):
    alone = losses(runs / f"{name}-1")
    rows = tensors(runs / f"{name}-1/checkpoints/step_{STEPS:09d}")
    for world_size in (2, 3):
        together = losses(runs / f"{name}-{world_size}")
        assert alone.keys() == together.keys()
        for step, values in alone.items():
            assert together[step] == pytest.approx(values, abs=1e-5)
        found = tensors(runs / f"{name}-{world_size}/checkpoints/step_{STEPS:09d}")
        for key, value in rows.items():
            if key.startswith("model.tables"):
                np.testing.assert_allclose(found[key], value, atol=1e-5)
        for one, other in zip(validations(runs / f"{name}-1"), validations(runs / f"{name}-{world_size}"), strict=True):
            assert one["report"]["managed"] == other["report"]["managed"]


def test_validation_counts_ids_without_a_slot_and_nothing_else(runs, dataset):
    """Padding and missing ids are none; whoever has no slot, and whom nobody has seen, is one."""
    run_dir = runs / "lfu-1-2"
    (record,) = (line for line in validations(run_dir) if line["step"] == 25)
    result = json.loads((run_dir / "result.json").read_text())
    best = run_dir / "checkpoints/best"
    truths = {25: "valid", result["step"]: "test"}
    for step, split in truths.items():
        report = record["report"] if split == "valid" else result["test"]
        for table, features in FEATURES.items():
            truth = brute_force(dataset, table, BATCH, step, **RULES["lfu-1"])
            cells = [cell for name in features for cell in dataset.tables[split].column(name).to_pylist()]
            keys = [key for cell in cells for key in (cell if isinstance(cell, list) else [cell]) if key != 0]
            assert report["managed"][table] == {
                "slots": SLOTS[table],
                "occupied": len(truth.slots),
                "admissions": truth.admissions,
                "evictions": truth.evictions,
                "looked_up": len(keys),
                "without_slot": sum(key not in truth.slots for key in keys),
            }
            if split == "test":
                assert held(best, table) == truth.slots
