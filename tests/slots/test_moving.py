"""Runs with managed tables that are stopped and killed in the middle of an interval, and go on, on other ranks, too."""

import json
import signal

import pytest

from mmlrec.run_folder.checkpoint import read_state
from mmlrec.slots import stored
from tests.slots.support import brute_force, write_managed
from tests.slots.test_training import (
    BATCH,
    RULES,
    SLOTS,
    STEPS,
    assert_rows_of_tenures,
    assert_same_to_the_bit,
    held,
    options,
    told,
    train,
    write_all,
)
from tests.training.launch import launch, losses
from tests.training.test_changing_ranks import Part, run_part

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

ROW_WISE, TABLE_WISE = ("embeddings.sharding=row_wise",), ("embeddings.sharding=table_wise",)
EVERY_7 = "training.checkpoint_every_steps=7"
OTHER_RULES = {
    "lfu-3": {"admit_after": 3, "evict": "lfu", "update_every": 7},
    "lru-3": {"admit_after": 3, "evict": "lru", "update_every": 4},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("moving")


@pytest.fixture(scope="module")
def truths(root):
    return write_all(root)


@pytest.mark.parametrize("name", RULES)
def test_over_1_2_3_and_1_ranks_each_key_keeps_its_row_and_state(root, truths, name):
    """Stopped after 6 steps, killed after 18 with a checkpoint of 14, stopped after 20, all in the middle of intervals."""
    run_dir, alone = root / f"{name}-moved", root / f"{name}-tenures"
    launch(1, [train(root, alone, f"dataset.path={root}/tenures-{name}", options(name)[1])], root / f"logs-{name}")
    parts = (
        Part(1, ROW_WISE, ("", ""), 0, 6, signal.SIGTERM),
        Part(2, TABLE_WISE, ("", ""), 6, 18, signal.SIGKILL),
        Part(3, ROW_WISE, ("", ""), 14, 17, signal.SIGTERM),
        Part(1, TABLE_WISE, ("", ""), 24),
    )
    for number, part in enumerate(parts):
        run_part(root, run_dir, part, number, [*options(name), EVERY_7])
    assert losses(run_dir) == {step: pytest.approx(values, abs=1e-5) for step, values in losses(alone).items()}
    newest = f"checkpoints/step_{STEPS:09d}"
    assert_rows_of_tenures(run_dir / newest, alone / newest, truths[name])
    # Each checkpoint on the way, whatever ranks wrote it, has the map of its step.
    dataset = write_managed(root / f"again-{name}", steps=25, batch_size=BATCH, slots=SLOTS)
    for path in (run_dir / "checkpoints").glob("step_*"):
        step = read_state(path)["progress"]["step"]
        for table in SLOTS:
            assert held(path, table) == brute_force(dataset, table, BATCH, step, **RULES[name]).slots


def test_stopped_and_killed_in_the_middle_of_an_interval_it_ends_the_same_to_the_bit(root, truths):
    """On two ranks, over two epochs; also with checkpoints in the background, and where it went back."""
    overrides = [*options("adagrad"), "training.max_steps=40", EVERY_7, "training.validate_every_steps=9"]
    whole = root / "whole"
    launch(2, [train(root, whole, *overrides, *ROW_WISE)], root / "logs-whole")
    for name, extra in (("plain", ()), ("background", ("training.checkpoint_async=true",))):
        run_dir = root / f"killed-{name}"
        for number, part in enumerate(
            (
                Part(2, ROW_WISE, ("", ""), 0, 7, signal.SIGTERM),
                Part(2, ROW_WISE, ("", ""), 10, 24, signal.SIGKILL),
                Part(2, ROW_WISE, ("", ""), 21, 31, signal.SIGKILL),
                Part(2, ROW_WISE, ("", ""), 28),
            )
        ):
            run_part(root, run_dir, part, number, [*overrides, *extra])
        assert_same_to_the_bit(whole, run_dir, 40)
    back = root / "killed-plain"
    part = Part(2, (*ROW_WISE, "--from-step", "21"), ("", ""), 21)
    run_part(root, back, part, 9, overrides)
    assert_same_to_the_bit(whole, back, 40)


def test_many_slots_have_several_buckets_on_ranks_of_their_own(root):
    """40,000 slots: two buckets, on three ranks; and rules that the quick tests do not have."""
    slots = {"user": 40_000, "item": 12}
    write_managed(root / "large", steps=25, batch_size=BATCH, slots=slots, pool=10_000, drift=3000)
    dataset = write_managed(root / "large-again", steps=25, batch_size=BATCH, slots=slots, pool=10_000, drift=3000)
    actions = []
    for name, rule in OTHER_RULES.items():
        managed = f"embeddings.managed={json.dumps(rule)}"
        actions.append(train(root, root / f"large-{name}", managed, f"dataset.path={root}/large", "training.max_steps=40"))
    write_all(root) if not (root / "config.yaml").exists() else None
    launch(3, actions, root / "logs-large")
    for name, rule in OTHER_RULES.items():
        newest = root / f"large-{name}/checkpoints/step_000000040"
        for table, bits in (("user", 1), ("item", 0)):
            truth = brute_force(dataset, table, BATCH, 40, **rule, bits=bits)
            assert held(newest, table) == truth.slots
            seen = stored.StoredTable(newest, table).history()
            assert dict(zip(seen.keys.view("int64").tolist(), seen.counts.tolist(), strict=True)) == truth.counts
        assert told(root / f"large-{name}")[40][1]["managed/user/evictions"] == 0
