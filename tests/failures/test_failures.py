"""Some of the failures of `python -m tests.failures`, one at a random moment each; and that what is lost would be noticed."""

from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest

from tests.failures import trials
from tests.failures.kinds import KINDS
from tests.failures.trials import EPOCHS, STEPS_PER_EPOCH, TRAIN_ROWS, prepare, run_training, train_unbroken
from tests.hosts import Hosts


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Two hosts, and a training without failures on them."""
    folder = tmp_path_factory.mktemp("failures")
    config = prepare(folder)
    with Hosts(["h1", "h2"], folder) as hosts:
        train_unbroken(hosts, folder / "unbroken", config)
        yield hosts, folder, config


@pytest.mark.cluster
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "failures"),
    [
        ("rank 1 killed", 1),
        ("first host killed", 1),
        ("link cut for 5 s", 1),
        ("link cut for good", 1),
        ("SIGTERM to one agent", 1),
        ("rank stopped for good (SIGSTOP)", 2),
        ("fewer or more nodes at the next start", 2),
        ("elastic: 1 -> 2 -> 1 hosts", 2),
    ],
)
def test_training_goes_on_from_its_last_checkpoint_and_ends_like_one_without_failures(bench, name, failures):
    hosts, folder, config = bench
    seed = Random().randrange(10**6)
    kind = replace(KINDS[name], failures=failures)
    found = run_training(name, kind, hosts, folder / f"{failures}-{seed}", config, folder / "unbroken", Random(seed))
    assert [trial.fault for trial in found] == [None] * failures, (seed, found)


def records(start: str, first: int, last: int, world_size: int) -> list[dict]:
    """What the ranks note of some steps: row number is place in the epoch."""
    found, share = [], TRAIN_ROWS // STEPS_PER_EPOCH // world_size
    for step in range(first, last + 1):
        epoch, begin = (step - 1) // STEPS_PER_EPOCH, (step - 1) % STEPS_PER_EPOCH * share * world_size
        for rank in range(world_size):
            rows = list(range(begin + rank * share, begin + (rank + 1) * share))
            keys = {"start": start, "step": step, "epoch": epoch, "rank": rank, "world_size": world_size}
            found.append({"time": float(step), "rows": rows, **keys})
    return found


def test_lost_and_repeated_rows_are_noticed():
    last = EPOCHS * STEPS_PER_EPOCH
    # Steps 91 to 100 are trained by both starts; those of the second count.
    noted = records("a", 1, 100, 2) + records("b", 91, last, 1)
    assert trials.rows_faults(SimpleNamespace(steps=lambda: noted)) == []
    skipped = records("a", 1, 100, 2) + records("b", 102, last, 2)
    assert trials.rows_faults(SimpleNamespace(steps=lambda: skipped)) == ["steps are missing", "epoch 2: not each row once"]
    twice = [record | {"rows": noted[0]["rows"]} if record["step"] == 120 else record for record in noted]
    assert trials.rows_faults(SimpleNamespace(steps=lambda: twice)) == ["epoch 2: not each row once"]
    one_rank = [record for record in noted if (record["step"], record["rank"]) != (7, 1)]
    assert trials.rows_faults(SimpleNamespace(steps=lambda: one_rank)) == ["step 7: 1 of 2 ranks", "epoch 0: not each row once"]
