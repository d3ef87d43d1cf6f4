"""A validation split by which nothing can be chosen is refused from the manifest's counts alone."""

import pytest

from mmlrec.errors import DataError
from mmlrec.schema import Task
from mmlrec.training.monitor import build_monitor
from tests.datasets import write_dataset


@pytest.fixture
def with_counts(tmp_path):
    """The manifest of a dataset with two tasks and two scenarios, whose valid split has these label counts."""
    manifest = write_dataset(tmp_path / "data", num_scenarios=2).manifest

    def change(**counts):
        valid = manifest.splits["valid"].model_copy(update={"label_counts": counts})
        return manifest.model_copy(update={"splits": {**manifest.splits, "valid": valid}})

    return change


CLICK, BUY, SECONDS = Task(name="click"), Task(name="buy"), Task(name="seconds", kind="regression")
BOTH, NONE, ONLY_0, ONLY_1 = (10, 4), (0, 0), (8, 0), (8, 8)


@pytest.mark.parametrize("wrong", [NONE, ONLY_0, ONLY_1])
def test_every_task_without_both_classes_is_refused_with_its_counts(with_counts, wrong):
    manifest = with_counts(click={"all": wrong}, buy={"all": ONLY_0})
    with pytest.raises(DataError) as error:
        build_monitor(None, manifest, [CLICK, BUY])
    message = str(error.value)
    assert "dataset 'written', split valid: task 'click' has " in message
    assert f"task 'click' has {wrong[0]} labelled rows" in message
    assert "task 'buy' has 8 labelled rows, 0 of them positive" in message
    assert (f"{wrong[1]} of them positive" in message.split(";")[0]) == (wrong != NONE)
    for remedy in ("more rows", "--seed", "dataset.tasks"):
        assert remedy in message


def test_one_task_that_can_be_scored_is_enough(with_counts):
    build_monitor(None, with_counts(click={"all": BOTH}, buy={"all": ONLY_1}), [CLICK, BUY])


def test_only_chosen_tasks_count(with_counts):
    manifest = with_counts(click={"all": BOTH}, buy={"all": ONLY_1})
    with pytest.raises(DataError, match=r"task 'buy' has 8 labelled rows, 8 of them positive\. "):
        build_monitor(None, manifest, [BUY])


def test_a_regression_task_needs_labels_of_no_class(with_counts):
    build_monitor(None, with_counts(seconds={"all": (8, 8)}), [SECONDS])
    with pytest.raises(DataError, match="task 'seconds' has 0 labelled rows"):
        build_monitor(None, with_counts(seconds={"all": NONE}), [SECONDS])


def test_a_branch_without_its_own_is_left_out_and_named(with_counts):
    click, buy = {"all": BOTH, "s0": BOTH, "s1": (5, 0)}, {"all": ONLY_0, "s0": BOTH, "s1": BOTH}
    manifest = with_counts(click=click, buy=buy)
    monitor = build_monitor(None, manifest, [CLICK, BUY], [("click:s0", "click", "s0"), ("buy:s1", "buy", "s1")])
    assert (list(monitor.targets), monitor.notes) == (["click:s0", "buy:s1"], [])
    monitor = build_monitor(None, manifest, [CLICK, BUY], [("click:s0", "click", "s0"), ("click:s1", "click", "s1")])
    assert list(monitor.targets) == ["click:s0"]
    (note,) = monitor.notes
    assert "branch 'click:s1' (task 'click' in scenario s1 has 5 labelled rows, 0 of them positive)" in note
    assert "click:s0" not in note
    monitor = build_monitor(None, manifest, [CLICK, BUY], [("click", "click", None), ("buy", "buy", None)])
    assert list(monitor.targets) == ["click"]
    assert "branch 'buy' (task 'buy' has 8 labelled rows, 0 of them positive)" in monitor.notes[0]


def test_branches_none_of_which_can_be_scored_are_refused(with_counts):
    manifest = with_counts(click={"all": BOTH, "s0": (4, 4), "s1": (5, 0)})
    with pytest.raises(DataError) as error:
        build_monitor(None, manifest, [CLICK], [("click:s0", "click", "s0"), ("click:s1", "click", "s1")])
    for part in ("scenario s0 has 4 labelled rows, 4 of", "scenario s1 has 5 labelled rows, 0 of", "model.branches"):
        assert part in str(error.value)
