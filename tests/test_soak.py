"""What the soak calls flat."""

import os

import pytest

from benchmarks.soak import look_at, newest_step, table_of


def samples(**late):
    """Two ranks, 100 steps; `late` is what rank 1 has in the last tenth. Values of rank 0 move about, and end as they were."""
    found = []
    for step in range(0, 101, 2):
        usual = {"resident_mib": 400.0, "anonymous_mib": 300.0, "handles": 12, "threads": 10}
        found.append((float(step), step, 0, *(value + step % 3 for value in usual.values())))
        found.append((float(step), step, 1, *({**usual, **(late if step >= 90 else {})}.values())))
    return found


@pytest.mark.parametrize(
    ("late", "flat"),
    [
        ({}, True),
        ({"resident_mib": 415.0}, True),
        ({"resident_mib": 417.0}, False),
        ({"anonymous_mib": 330.0}, False),
        ({"handles": 13}, False),
        ({"threads": 11}, False),
        ({"threads": 9}, True),
    ],
)
def test_flat_is_as_many_handles_and_threads_and_hardly_more_memory(late, flat):
    text, found = table_of(samples(**late), 100)
    assert found is flat
    assert len(text.splitlines()) == 2 + 2 * 4


def test_too_few_samples_say_nothing():
    with pytest.raises(SystemExit, match="too few samples"):
        table_of(samples()[:4], 100)


def test_a_process_is_looked_at(tmp_path):
    before = look_at(os.getpid())
    with (tmp_path / "file").open("w"):
        resident, anonymous, handles, threads = look_at(os.getpid())
    assert handles == before[2] + 1
    assert threads >= 1
    assert resident > anonymous > 10
    assert look_at(2**22 + 1) is None
    assert newest_step(tmp_path / "none") == 0
    (tmp_path / "metrics").write_text('{"step": 50, "split": "train"}\n{"step": 100, "split": "train"}\n{"step": 15')
    assert newest_step(tmp_path / "metrics") == 100
