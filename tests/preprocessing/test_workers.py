"""Ordered work of several threads."""

import itertools
import time

import pytest

from preprocessing.workers import in_order


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_come_in_the_order_of_the_items(workers):
    def slow_if_even(i):
        time.sleep(0.01 * (i % 2 == 0))
        return i * i

    assert list(in_order(slow_if_even, range(20), workers)) == [i * i for i in range(20)]
    assert list(in_order(slow_if_even, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_comes_at_its_items_place(workers):
    results = in_order(lambda i: 1 / (i - 5), range(100), workers)
    assert [next(results) for _ in range(5)] == [1 / (i - 5) for i in range(5)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_more_items_are_drawn_than_are_worked_on():
    drawn = []
    items = itertools.count()
    results = in_order(lambda i: i, (drawn.append(i) or i for i in items), 2)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(drawn) <= 10 + 2
    results.close()
