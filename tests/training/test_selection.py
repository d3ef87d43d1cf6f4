"""A validation split by which nothing can be chosen is refused from the manifest's counts alone."""

import pytest

from mmlrec.errors import DataError
from mmlrec.schema import Task
from mmlrec.training.selection import check_selectable
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
        check_selectable(manifest, [CLICK, BUY], [])
    message = str(error.value)
    assert "dataset 'written', split valid: task 'click' has " in message
    assert f"task 'click' has {wrong[0]} labelled rows" in message
    assert "task 'buy' has 8 labelled rows, 0 of them positive" in message
    assert (f"{wrong[1]} of them positive" in message.split(";")[0]) == (wrong != NONE)
    for remedy in ("more rows", "--seed", "dataset.tasks"):
        assert remedy in message


def test_one_task_that_can_be_scored_is_enough(with_counts):
    check_selectable(with_counts(click={"all": BOTH}, buy={"all": ONLY_1}), [CLICK, BUY], [])


def test_only_chosen_tasks_count(with_counts):
    manifest = with_counts(click={"all": BOTH}, buy={"all": ONLY_1})
    with pytest.raises(DataError, match=r"task 'buy' has 8 labelled rows, 8 of them positive\. "):
        check_selectable(manifest, [BUY], [])


def test_a_regression_task_needs_labels_of_no_class(with_counts):
    check_selectable(with_counts(seconds={"all": (8, 8)}), [SECONDS], [])
    with pytest.raises(DataError, match="task 'seconds' has 0 labelled rows"):
        check_selectable(with_counts(seconds={"all": NONE}), [SECONDS], [])


def test_each_branch_needs_its_own(with_counts):
    click, buy = {"all": BOTH, "s0": BOTH, "s1": (5, 0)}, {"all": ONLY_0, "s0": BOTH, "s1": BOTH}
    manifest = with_counts(click=click, buy=buy)
    check_selectable(manifest, [CLICK, BUY], [("click:s0", "click", "s0"), ("buy:s1", "buy", "s1")])
    check_selectable(manifest, [CLICK, BUY], [("click", "click", None)])
    with pytest.raises(DataError, match=r"task 'click' in scenario s1 has 5 labelled rows, 0 of them positive\. .*branches"):
        check_selectable(manifest, [CLICK, BUY], [("click:s0", "click", "s0"), ("click:s1", "click", "s1")])
    with pytest.raises(DataError, match=r"valid: task 'buy' has 8 labelled rows"):
        check_selectable(manifest, [CLICK, BUY], [("click", "click", None), ("buy", "buy", None)])
