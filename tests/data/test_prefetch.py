import threading

import pytest

from mmlrec.data.prefetch import prefetch


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise ValueError("broken")

    out = []
    with pytest.raises(ValueError, match="broken"):
        out.extend(prefetch(items(), 2))
    got = prefetch(items(), 2)
    assert [next(got), next(got)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(got)


def test_runs_at_most_depth_ahead_and_closing_ends_the_source():
    made, closed = [], threading.Event()

    def items():
        try:
            for i in range(100):
                made.append(i)
                yield i
        finally:
            closed.set()

    iterator = prefetch(items(), 3)
    assert next(iterator) == 0
    iterator.close()
    assert closed.is_set()
    # One taken, three waiting, one in the hand of the thread.
    assert len(made) <= 5


def test_all_items_in_order():
    assert list(prefetch((i for i in range(50)), 1)) == list(range(50))
