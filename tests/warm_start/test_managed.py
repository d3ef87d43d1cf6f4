"""Managed tables of a run that begins with another one: rows and state by key, counts go on, the rule says who holds slots.

Expected is what plain dictionaries say of the batches that were trained, and what the checkpoints of the other run hold.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mmlrec.run_folder import checkpoint
from mmlrec.slots import stored
from preprocessing.command_line import main
from tests.slots.support import brute_force, write_managed
from tests.slots.test_training import held
from tests.test_hashing import plain_key
from tests.training.launch import launch, tensors
from tests.warm_start.test_rows_and_network import here

BATCH, STEPS = 30, 33
CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [12, 8], tower_hidden_units: [4]}}
embeddings: {{dim: 4, init_std: 0.1}}
training: {{batch_size: {batch}, eval_batch_size: 25, epochs: 30, max_steps: {steps}, patience: null, keep_checkpoints: 50}}
"""
#: Of the run that is begun with; the second is that of runs that begin with it.
SLOTS = ({"user": 40, "item": 12}, {"user": 45, "item": 7})
RULES = {
    "lfu": {"admit_after": 2, "evict": "lfu", "update_every": 5},
    "lru": {"admit_after": 1, "evict": "lru", "update_every": 4},
}
WEIGHTS, STATE = "model.tables.embedding_bags.{}.weight", "optimizer.tables.tables.embedding_bags.{}.weight.{}.momentum1"


def action(root: Path, kind: str, name: str, *, data: str = "now", **more: object) -> dict:
    overrides = [f"{key}={json.dumps(value)}" for key, value in more.items()]
    path = {"config": str(root / f"{data}.yaml"), "overrides": overrides}
    return {"kind": kind, "name": name, "run_dir": str(root / name), **path}


def rule(name: str) -> dict:
    return {"embeddings.managed": RULES[name], "embeddings.optimizer": {"name": "adagrad", "lr": 1.0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of 33 steps, on 2 ranks; and what runs begin with that take them over, on 1 and 3."""
    folder = tmp_path_factory.mktemp("managed")
    for name, slots, seed in (("before", SLOTS[0], 0), ("now", SLOTS[1], 1)):
        write_managed(folder / name, steps=20, batch_size=BATCH, slots=slots, seed=seed)
        (folder / f"{name}.yaml").write_text(CONFIG.format(dataset=folder / name, batch=BATCH, steps=STEPS))
    every = {"training.validate_every_steps": 11}
    launch(2, [action(folder, "train", f"run-{name}", data="before", **rule(name), **every) for name in RULES], folder / "logs")
    for size in (1, 3):
        begun = {name: {"init_from": str(folder / f"run-{name}")} | rule(name) for name in RULES}
        actions = [action(folder, "begin", f"begun-{name}-{size}", **begun[name]) for name in RULES]
        actions.append(action(folder, "begin", f"fresh-{size}", **rule("lfu")))
        if size == 1:
            here(actions)
        else:
            launch(size, actions, folder / f"logs-{size}")
    return folder


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_rows_and_state_follow_their_keys_and_counts_go_on(root, tmp_path, name, size):
    dataset = write_managed(tmp_path / "before", steps=20, batch_size=BATCH, slots=SLOTS[0])
    run = root / f"run-{name}/checkpoints"
    best, last, begun = run / "best", run / f"step_{STEPS:09d}", root / f"begun-{name}-{size}/begun"
    best_step = checkpoint.read_state(best)["step"]
    assert best_step < STEPS or name == "lru"  # so that the maps of the two checkpoints differ
    theirs, of_state, found, fresh = (tensors(there) for there in (best, last, begun, root / f"fresh-{size}/begun"))
    told = {table["table"]: table for table in json.loads((begun.parent / "init_from.json").read_text())["tables"]}
    for table, num_slots in SLOTS[1].items():
        truth = brute_force(dataset, table, BATCH, STEPS, **RULES[name])
        at_best = brute_force(dataset, table, BATCH, best_step, **RULES[name]).slots
        assert held(best, table) == at_best
        counts, seen = dict(truth.counts), truth.last
        # The best num_slots of those that held slots in the best checkpoint, by what was known at the end.
        score = seen if name == "lru" else counts
        if name == "lru":  # who lost its slot is forgotten
            score = {key: seen[key] if key in truth.slots or seen[key] > STEPS - STEPS % 4 else 0 for key in seen}
        chosen = sorted(at_best, key=lambda key: (-score[key], key % 2**64))[:num_slots]
        mine = held(begun, table)
        assert set(mine) == set(chosen)
        assert sorted(mine.values()) == list(range(1, len(mine) + 1))
        for key, slot in mine.items():
            assert torch.equal(found[WEIGHTS.format(table)][slot], theirs[WEIGHTS.format(table)][at_best[key]])
            state = [content for other, content in found.items() if f"{table}.weight." in other and content.dim() == 2]
            before = [content for other, content in of_state.items() if f"{table}.weight." in other and content.dim() == 2]
            assert len(state) == len(before) == 1
            expected = before[0][truth.slots[key]] if key in truth.slots else torch.zeros(4)
            assert torch.equal(state[0][slot], expected)
        for slot in range(len(mine) + 1, num_slots + 1):
            assert torch.equal(found[WEIGHTS.format(table)][slot], fresh[WEIGHTS.format(table)][slot])
        assert torch.equal(found[WEIGHTS.format(table)][0], theirs[WEIGHTS.format(table)][0])
        assert (told[table]["matched"], told[table]["taken"]) == ("by key", len(mine) + 1)
        assert told[table]["dropped"] == len(at_best) - len(mine)
        if name == "lfu":
            keys, numbers, _ = stored.StoredTable(begun, table).history()
            counted = dict(zip(keys.view(np.int64).tolist(), numbers.tolist(), strict=True))
            assert counted == counts
        assert checkpoint.read_state(begun)["managed"][table]["steps_before"] == STEPS


def test_tables_of_all_branches_take_rows_by_one_map_and_counts_once(root, tmp_path):
    model = "model: {name: single_task, expert_hidden_units: [6], tower_hidden_units: []}"
    for name in ("before", "now"):
        config = (root / f"{name}.yaml").read_text().splitlines()
        (tmp_path / f"{name}.yaml").write_text("\n".join(model if "shared_bottom" in line else line for line in config))
    run = action(tmp_path, "train", "run", data="before", **rule("lfu"))
    here([run, action(tmp_path, "begin", "begun", init_from=str(tmp_path / "run"), **rule("lfu"))])
    dataset = write_managed(tmp_path / "again", steps=20, batch_size=BATCH, slots=SLOTS[0])
    best, begun = tmp_path / "run/checkpoints/best", tmp_path / "begun/begun"
    theirs, found = tensors(best), tensors(begun)
    for table, num_slots in SLOTS[1].items():
        before, mine = held(best, table), held(begun, table)
        assert len(mine) == min(num_slots, len(before))
        for branch in ("click", "buy"):
            name = WEIGHTS.format(f"{branch}/{table}")
            assert all(torch.equal(found[name][slot], theirs[name][before[key]]) for key, slot in mine.items())
        keys, numbers, _ = stored.StoredTable(begun, table).history()
        counted = dict(zip(keys.view(np.int64).tolist(), numbers.tolist(), strict=True))
        assert counted == brute_force(dataset, table, BATCH, STEPS, **RULES["lfu"]).counts


TABLE = {
    "features": {"u": {"kind": "id", "type": "int"}, "x": {"kind": "number"}},
    "tasks": [{"name": "y", "label": "y"}],
    "keys": {"row": {"type": "int"}},
}
MAPPINGS = {
    "vocabulary": {},
    "managed": {"managed": {"slots": 25, "seed": 3}},
    "other seed": {"managed": {"slots": 25, "seed": 4}},
    "hash": {"hash": {"num_buckets": 25, "seed": 3}},
    "text": {"managed": {"slots": 25, "seed": 3}, "type": "string"},
}
PAIRS = [("vocabulary", "managed"), ("managed", "vocabulary"), ("hash", "vocabulary"), ("hash", "managed")]
PAIRS += [("managed", "hash"), ("managed", "other seed"), ("managed", "text")]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A log, encoded in each way, with a run on each of some; and one of later rows, encoded in the same ways."""
    folder = tmp_path_factory.mktemp("mappings")
    random = np.random.default_rng(0)
    for log, low in (("before", -20), ("now", -10)):
        ids = np.minimum(random.zipf(1.5, 400), 35) + low
        lines = [f"{user},{random.random():.3f},{random.integers(2)},{row}" for row, user in enumerate(ids)]
        (folder / log).mkdir()
        (folder / log / "rows.csv").write_text("u,x,y,row\n" + "\n".join(lines) + "\n")
        for name, mapping in MAPPINGS.items():
            config = TABLE | {"files": ["rows.csv"], "features": TABLE["features"] | {"u": TABLE["features"]["u"] | mapping}}
            (folder / log / f"{name}.yaml").write_text(yaml.safe_dump(config))
            out = folder / f"{log} {name}"
            assert main(["table", "--config", str(folder / log / f"{name}.yaml"), "--out", str(out)]) == 0
            (folder / f"{log} {name}.yaml").write_text(CONFIG.format(dataset=json.dumps(str(out)), batch=BATCH, steps=20))
    frequent = {"embeddings.managed": {"update_every": 2}}
    actions = []
    for name in ("vocabulary", "managed", "hash"):
        more = frequent if "managed" in MAPPINGS[name] else {}
        actions.append(action(folder, "train", f"run {name}", data=f"before {name}", **more))
    for old, new in PAIRS:
        source = str(folder / f"run {old}")
        actions.append(action(folder, "begin", f"{old} to {new}", data=f"now {new}", init_from=source))
    here(actions)
    return folder


def vocabulary(folder: Path) -> dict[int, int]:
    entries = pq.read_table(folder / "vocab/u.parquet").to_pydict()
    return dict(zip(entries["value"], entries["id"], strict=True))


def test_a_vocabulary_gives_the_keys_of_a_managed_table(tables):
    before = vocabulary(tables / "before vocabulary")
    assert len(before) > 25
    mine, keys = held(tables / "vocabulary to managed/begun", "u"), {plain_key(value, 3): id for value, id in before.items()}
    counts = dict(zip(before, pq_counts(tables / "before vocabulary"), strict=True))
    best = sorted(before, key=lambda value: (-counts[value], plain_key(value, 3) % 2**64))[:25]
    assert set(mine) == {plain_key(value, 3) for value in best}
    found = tensors(tables / "vocabulary to managed/begun")[WEIGHTS.format("u")]
    theirs = tensors(tables / "run vocabulary/checkpoints/best")[WEIGHTS.format("u")]
    for key, slot in mine.items():
        assert torch.equal(found[slot], theirs[keys[key]])
    stored_keys, numbers, _ = stored.StoredTable(tables / "vocabulary to managed/begun", "u").history()
    known = dict(zip(stored_keys.view(np.int64).tolist(), numbers.tolist(), strict=True))
    assert known == {plain_key(value, 3): count for value, count in counts.items()}


def pq_counts(folder: Path) -> list[int]:
    return pq.read_table(folder / "vocab/u.parquet")["count"].to_pylist()


def test_a_value_of_a_vocabulary_finds_the_row_of_its_key(tables):
    now, theirs = vocabulary(tables / "now vocabulary"), held(tables / "run managed/checkpoints/best", "u")
    found = tensors(tables / "managed to vocabulary/begun")[WEIGHTS.format("u")]
    fresh = tensors(tables / "hash to vocabulary/begun")[WEIGHTS.format("u")]
    old = tensors(tables / "run managed/checkpoints/best")[WEIGHTS.format("u")]
    both = 0
    for value, id in now.items():
        slot = theirs.get(plain_key(value, 3))
        both += slot is not None
        assert torch.equal(found[id], fresh[id] if slot is None else old[slot])
    assert 5 < both < len(now)
    assert torch.equal(found[0], old[0])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("hash", "managed", "its ids come by managed here, by hash there"),
        ("managed", "hash", "its ids come by hash here, by managed there"),
        ("managed", "other seed", "the seed of its keys is 4 here, 3 there"),
        ("managed", "text", "its values are string here, int64 there"),
    ],
)
def test_where_no_value_gives_the_key_it_is_told_and_nothing_is_taken(tables, old, new, words):
    folder = tables / f"{old} to {new}"
    (table,) = json.loads((folder / "init_from.json").read_text())["tables"]
    assert (table["matched"], table["note"], table["taken"]) == ("not", words, 0)
    if new != "hash":
        assert held(folder / "begun", "u") == {}
