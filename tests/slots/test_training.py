"""Runs with managed tables on one and two ranks: slots as by plain dictionaries, rows that belong to one id at a time."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.run_folder.checkpoint import read_state
from mmlrec.slots import stored
from tests.datasets import WrittenDataset, rewrite_part
from tests.slots.brute_force import BruteForce
from tests.slots.support import FEATURES, brute_force, write_managed, write_with_tenures
from tests.training.launch import launch, losses, tensors, validations

BATCH, STEPS = 30, 24  # of an epoch of 25
SLOTS = {"user": 17, "item": 12}
#: Optimizer of the tables -> rule of who has a slot.
RULES = {
    "sgd": {"admit_after": 1, "evict": "lfu", "update_every": 5},
    "adagrad": {"admit_after": 3, "evict": "lru", "update_every": 4},
    "rowwise_adagrad": {"admit_after": 1, "evict": "lru", "update_every": 1},
}
#: Ranks -> how the tables lie, by the optimizer.
SHARDINGS = {
    1: dict.fromkeys(RULES, "auto"),
    2: {"sgd": "table_wise", "adagrad": "row_wise", "rowwise_adagrad": "table_row_wise"},
}
#: Tables for each task.
SINGLE = "model={name: single_task, activation: silu, expert_hidden_units: [8], tower_hidden_units: [4]}"
# Initial rows are as good as 0, so that it does not matter of which row they are. The activation is smooth: on another number
# of ranks sums differ in the last bit, and a value before a ReLU may have the other sign.
CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, activation: silu}}
model_defaults: {{bottom_hidden_units: [12, 8], tower_hidden_units: [4]}}
embeddings: {{dim: 4, init_std: 1.0e-20}}
dense: {{optimizer: {{name: sgd, lr: 0.05}}}}
training: {{batch_size: {batch}, eval_batch_size: 25, epochs: 30, max_steps: {steps}, patience: null, log_every_steps: 1,
  validate_every_steps: 8, keep_checkpoints: 50}}
"""


def write_all(folder: Path) -> dict[str, dict[str, BruteForce]]:
    """A dataset, the same with a row for each tenure by each rule, and a configuration."""
    dataset = write_managed(folder / "data", steps=25, batch_size=BATCH, slots=SLOTS)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data", batch=BATCH, steps=STEPS))
    return {name: write_with_tenures(folder / f"tenures-{name}", dataset, BATCH, STEPS, **rule) for name, rule in RULES.items()}


def options(name: str) -> list[str]:
    """Of a run by the rule of that optimizer."""
    optimizer = f"embeddings.optimizer={{name: {name}, lr: 0.1}}"
    return [f"embeddings.managed={json.dumps(RULES[name])}", optimizer, "training.monitor=buy.auc"]


def train(root: Path, run_dir: Path, *overrides: str) -> dict:
    config = str(root / "config.yaml")
    return {"kind": "train", "name": "all", "config": config, "overrides": list(overrides), "run_dir": str(run_dir)}


def held(folder: Path, table: str) -> dict[int, int]:
    keys, slots = stored.read(folder, table)
    assert np.all(keys[1:] > keys[:-1])
    return dict(zip(keys.view(np.int64).tolist(), slots.tolist(), strict=True))


def assert_rows_of_tenures(checkpoint: Path, of_tenures: Path, truths: dict[str, BruteForce]) -> None:
    """Each key has in its slot, of weights and optimizer state alike, what its newest tenure has in a row of its own."""
    found, expected = tensors(checkpoint), tensors(of_tenures)
    for table, truth in truths.items():
        assert held(checkpoint, table) == truth.slots
        slots = [0, *truth.slots.values()]
        tenures = [0, *(truth.tenures[key] for key in truth.slots)]
        keys = [key for key in expected if re.search(rf"[./]{table}\.", key) and not key.startswith("managed")]
        assert len(keys) >= 1
        for key in keys:
            np.testing.assert_allclose(found[key][slots], expected[key][tenures], atol=1e-6, err_msg=key)
            assert expected[key][tenures].abs().max() > 1e-3  # there is something to compare


def told(run_dir: Path) -> dict[int, tuple[dict, dict]]:
    """Step -> losses, and what is said of managed tables."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["diagnostics"]) for line in lines if line["split"] == "train"}


def assert_same_to_the_bit(whole: Path, resumed: Path, step: int) -> None:
    """Weights, state, who holds which slot, and all that the rule has to remember; losses and what the log says."""
    newest = f"checkpoints/step_{step:09d}"
    expected, found = tensors(whole / newest), tensors(resumed / newest)
    assert expected.keys() == found.keys()
    assert any(key.startswith("managed.user.1.arrived_keys") for key in expected)
    assert [key for key in expected if not expected[key].equal(found[key])] == []
    assert told(whole) == told(resumed)
    assert read_state(whole / newest)["managed"] == read_state(resumed / newest)["managed"]
    assert json.loads((whole / "result.json").read_text()) == json.loads((resumed / "result.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("managed")


@pytest.fixture(scope="module")
def dataset(root):
    """The one of the runs, written once more."""
    return write_managed(root / "again", steps=25, batch_size=BATCH, slots=SLOTS)


@pytest.fixture(scope="module")
def truths(root):
    """What each table is in the end, by each rule; the runs are done on 1 and 2 ranks."""
    found = write_all(root)
    for world_size, shardings in SHARDINGS.items():
        actions = [
            train(root, root / f"{name}-{world_size}", *options(name), f"embeddings.sharding={shardings[name]}")
            for name in RULES
        ]
        if world_size == 1:
            for name in RULES:
                optimizer, dataset = options(name)[1], f"dataset.path={root}/tenures-{name}"
                actions.append(train(root, root / f"{name}-tenures", dataset, optimizer))
            tenures = f"dataset.path={root}/tenures-adagrad"
            actions.append(train(root, root / "single-tenures", tenures, options("adagrad")[1], SINGLE))
        else:
            actions.append(train(root, root / "single", *options("adagrad"), SINGLE, "training.checkpoint_every_steps=8"))
            # Another run, which ends in the middle of an interval, and goes on.
            for last in (10, STEPS):
                stopped = [f"training.max_steps={last}", "embeddings.sharding=row_wise"]
                actions.append(train(root, root / "resumed", *options("adagrad"), *stopped))
        launch(world_size, actions, root / f"logs-{world_size}")
    return found


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("world_size", SHARDINGS)
def test_each_key_trains_a_row_of_its_own_that_begins_anew_with_each_tenure(root, truths, name, world_size):
    """The truth is a run without managed tables, in which each tenure, as plain dictionaries find it, has a row of its own."""
    assert all(truth.evictions > 10 for truth in truths[name].values())
    alone, found = losses(root / f"{name}-tenures"), losses(root / f"{name}-{world_size}")
    assert found.keys() == alone.keys()
    for step, values in alone.items():
        assert found[step] == pytest.approx(values, abs=1e-6), step
    step = f"checkpoints/step_{STEPS:09d}"
    assert_rows_of_tenures(root / f"{name}-{world_size}" / step, root / f"{name}-tenures" / step, truths[name])


def test_branches_with_tables_of_their_own_have_one_map_and_one_best_step(root, truths, dataset, run_app):
    """Each branch trains the rows that it has where each tenure has one of its own."""
    run_dir, step = root / "single", f"checkpoints/step_{STEPS:09d}"
    assert losses(run_dir) == {step: pytest.approx(of, abs=1e-6) for step, of in losses(root / "single-tenures").items()}
    assert_rows_of_tenures(run_dir / step, root / "single-tenures" / step, truths["adagrad"])
    best = run_dir / "checkpoints/best"
    chosen = read_state(best)
    assert chosen["selection"]["best_step"] == {"all": chosen["step"]}
    assert read_state(root / "single-tenures/checkpoints/best")["selection"]["best_step"].keys() == {"click", "buy"}
    known = brute_force(dataset, "user", BATCH, chosen["step"], **RULES["adagrad"]).slots
    assert held(best, "user") == known
    at_step = run_dir / f"checkpoints/step_{chosen['step']:09d}"
    found, expected = tensors(best), tensors(at_step)
    weights = [key for key in found if key.startswith("model.")]
    assert len([key for key in weights if "click/" in key]) == len([key for key in weights if "buy/" in key]) == 3
    assert [key for key in weights if not found[key].equal(expected[key])] == []
    test = json.loads((run_dir / "result.json").read_text())["test"]
    keys = [key for name in FEATURES["user"] for key in dataset.tables["test"].column(name).to_pylist()]
    keys = [key for cell in keys for key in (cell if isinstance(cell, list) else [cell]) if key != 0]
    assert test["managed"]["user"]["looked_up"] == len(keys)
    assert test["managed"]["user"]["without_slot"] == sum(key not in known for key in keys)
    assert run_app("evaluate", "--run-dir", run_dir)[0] == 0  # in one process
    again = json.loads((run_dir / "result.json").read_text())["test"]
    for task in ("click", "buy"):
        assert again["tasks"][task]["auc"] == test["tasks"][task]["auc"]


def test_a_run_resumed_in_the_middle_of_an_interval_is_the_same_to_the_bit(root, truths):
    assert_same_to_the_bit(root / "adagrad-2", root / "resumed", STEPS)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("world_size", SHARDINGS)
def test_the_log_tells_what_plain_dictionaries_count(root, truths, dataset, name, world_size):
    ended = told(root / f"{name}-{world_size}")[STEPS][1]
    for table, truth in truths[name].items():
        assert ended[f"managed/{table}/occupancy"] == len(truth.slots) / SLOTS[table]
        every = RULES[name]["update_every"]
        # The line of step 24 was written before what happens behind it.
        steps = (STEPS - 1) // every * every
        before = brute_force(dataset, table, BATCH, steps, **RULES[name])
        assert ended[f"managed/{table}/admissions"] == before.admissions
        assert ended[f"managed/{table}/evictions"] == before.evictions
        share = before.without[-2] / before.looked_up[-2]
        assert ended[f"managed/{table}/without_slot"] == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("world_size", SHARDINGS)
def test_validation_and_test_look_up_in_the_map_of_their_weights_and_count_nothing(root, truths, dataset, world_size, run_app):
    """Padding and missing ids are not looked up; who lost its slot, or was never seen, has none."""
    run_dir = root / f"adagrad-{world_size}"
    result = json.loads((run_dir / "result.json").read_text())
    assert result["step"] < STEPS  # The map of the newest weights is another one.
    reports = [(record["step"], "valid", record["report"]) for record in validations(run_dir)]
    assert len(reports) == 3
    for step, split, report in [*reports, (result["step"], "test", result["test"])]:
        for table, features in FEATURES.items():
            truth = brute_force(dataset, table, BATCH, step, **RULES["adagrad"])
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
                assert held(run_dir / "checkpoints/best", table) == truth.slots
    assert run_app("evaluate", "--run-dir", run_dir)[0] == 0  # in one process
    again = json.loads((run_dir / "result.json").read_text())["test"]
    assert again["managed"] == result["test"]["managed"]
    for task, metrics in result["test"]["tasks"].items():
        assert again["tasks"][task]["auc"] == metrics["auc"]
        assert again["tasks"][task]["logloss"] == pytest.approx(metrics["logloss"], abs=1e-7)


@pytest.mark.parametrize("world_size", SHARDINGS)
def test_ids_without_a_slot_score_as_missing_ones(root, truths, dataset, world_size, run_app):
    """By the map of the best checkpoint; the truth are rows in which they are missing."""
    run_dir, table = root / f"adagrad-{world_size}", dataset.tables["test"]
    step = read_state(run_dir / "checkpoints/best")["step"]
    columns = {name: table.column(name) for name in table.column_names}
    for name, features in FEATURES.items():
        known = brute_force(dataset, name, BATCH, step, **RULES["adagrad"]).slots
        for feature in features:
            cells = [cell if isinstance(cell, list) else [cell] for cell in table.column(feature).to_pylist()]
            found = [[key if key in known else 0 for key in cell] for cell in cells]
            assert sum(map(len, cells)) > sum(key in known for cell in cells for key in cell) + 20
            columns[feature] = pa.array(
                found if feature == "m0" else [key for (key,) in found], table.schema.field(feature).type
            )
    other = root / f"missing-{world_size}"
    shutil.copytree(dataset.folder, other)
    rewrite_part(WrittenDataset(other, dataset.manifest, {}), pa.table(columns), split="test")
    scores = []
    for folder in (dataset.folder, other):
        output = root / f"scores-{folder.name}-{world_size}.parquet"
        code, said = run_app("predict", "--run-dir", run_dir, "--input", folder, "--split", "test", "--output", output)
        assert code == 0, said
        scores.append(pq.read_table(output).select(["score.click", "score.buy"]))
    assert scores[0].equals(scores[1])
    assert len(set(scores[0]["score.click"].to_pylist())) > 20


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.path={root}/tenures-sgd", "embeddings.managed.update_every=5"], "has no managed table"),
        (["embeddings.managed.admit_after=0"], "embeddings.managed.admit_after"),
    ],
)
def test_what_cannot_be_is_refused(root, truths, run_app, overrides, words):
    options = [option.format(root=root) if "{root}" in option else option for option in overrides]
    code, said = run_app("train", "--config", root / "config.yaml", "--run-dir", root / "refused", *options)
    assert code == 2
    assert words in said
