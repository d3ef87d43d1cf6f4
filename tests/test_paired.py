"""The interval of a median, of `benchmarks.paired`."""

from math import comb

import pytest

from benchmarks.paired import median_interval


@pytest.mark.parametrize(("count", "first", "last"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (12, 3, 10), (20, 6, 15)])
def test_ranks_are_those_of_the_tables_of_the_sign_test(count, first, last):
    values = [float(rank) for rank in range(count, 0, -1)]
    assert median_interval(values) == (first, last)
    # The next narrower interval would hold the median less often than asked for.
    holds = sum(comb(count, k) for k in range(first + 1, count - first)) / 2**count
    assert holds < 0.95 or first + 1 > count - first


def test_few_values_give_all_of_them():
    assert median_interval([2.0]) == (2.0, 2.0)
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
