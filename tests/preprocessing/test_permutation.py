import numpy as np
import pytest

from mmlrec.hashing import mix64
from preprocessing.writing.permutation import RowPermutation, split_ends


def test_mix64_equals_the_published_splitmix64_stream():
    # first outputs of the reference implementation for state 1234567 (used as test vector by several libraries)
    state = np.array([1234567 + k * 0x9E3779B97F4A7C15 & (2**64 - 1) for k in range(3)], np.uint64)
    assert mix64(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("num_rows", [*range(1, 70), 127, 128, 129, 1000, 4096, 4097, 65537])
def test_every_position_is_taken_once(num_rows):
    positions = RowPermutation(num_rows, seed=2024).positions(0, num_rows)
    assert np.array_equal(np.sort(positions), np.arange(num_rows))


def test_positions_do_not_depend_on_the_blocks_they_are_asked_in():
    permutation = RowPermutation(10_007, seed=5)
    blocks = np.concatenate([permutation.positions(start, min(start + 613, 10_007)) for start in range(0, 10_007, 613)])
    assert np.array_equal(blocks, permutation.positions(0, 10_007))


def test_seeds_give_unlike_permutations_that_look_random():
    num_rows = 50_000
    first, second = (RowPermutation(num_rows, seed).positions(0, num_rows) for seed in (1, 2))
    assert (first == second).sum() < 10  # expectation 1
    for positions in (first, second):
        # rank correlations of a random permutation have standard deviation 1/sqrt(N) = 0.0045
        assert abs(np.corrcoef(np.arange(num_rows), positions)[0, 1]) < 0.02
        assert abs(np.corrcoef(positions[:-1], positions[1:])[0, 1]) < 0.02
        # rows that follow each other in the log fall into train independently: .8 * .8
        train = positions < 0.8 * num_rows
        assert abs((train[:-1] & train[1:]).mean() - 0.64) < 0.01


def test_huge_tables_need_no_memory_and_stay_in_range():
    num_rows = 10**12 + 7
    positions = RowPermutation(num_rows, seed=3).positions(num_rows - 1000, num_rows)
    assert positions.min() >= 0
    assert positions.max() < num_rows
    assert len(set(positions.tolist())) == 1000


def test_split_is_exactly_8_1_1():
    def sizes(num_rows):
        train, valid = split_ends(num_rows)
        return train, valid - train, num_rows - valid

    assert sizes(1_000_209) == (800_167, 100_021, 100_021)
    assert sizes(100_000) == (80_000, 10_000, 10_000)
    assert sizes(99_762) == (79_809, 9_976, 9_977)
    assert sizes(10) == (8, 1, 1)
