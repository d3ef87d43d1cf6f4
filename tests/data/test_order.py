"""The order of samples against its definition, written out again in plain Python."""

import itertools

import numpy as np
import pytest

from mmlrec.data.order import EpochOrder, SequentialOrder

CASES = [
    # rows of the row groups, batch size, lanes
    ([16] * 12 + [8], 33, 4),
    ([16] * 12 + [8], 32, 4),
    ([7, 16, 1, 16, 3], 10, 1),
    ([5, 5], 100, 4),
    ([3], 2, 8),
    ([40, 40, 40], 3, 8),
    ([100, 1, 1, 1, 100], 17, 6),
    ([64] * 3, 64, 64),
    ([1] * 50, 7, 5),
]
PINNED = [[(2, 2), (1, 3), (1, 1)], [(2, 0), (0, 1), (0, 0)], [(2, 3), (0, 3), (0, 2)], [(2, 1), (1, 2), (1, 0)]]


def defined_order(group_rows, batch_size, num_lanes, order):
    """Batches as lists of (row group, row in it), straight from the definition."""
    virtual = [(int(g), int(i)) for g in order.group_order for i in order.row_permutation(int(g))]
    total = len(virtual)
    lanes = [virtual[i * total // num_lanes : (i + 1) * total // num_lanes] for i in range(num_lanes)]
    quotas = [(i + 1) * batch_size // num_lanes - i * batch_size // num_lanes for i in range(num_lanes)]
    full = min(len(lane) // q for lane, q in zip(lanes, quotas, strict=True) if q > 0)
    batches = [[lane.pop(0) for lane, q in zip(lanes, quotas, strict=True) for _ in range(q)] for _ in range(full)]
    tail = list(itertools.chain(*lanes))
    return batches + [tail[i : i + batch_size] for i in range(0, len(tail), batch_size)]


def read(order, batch):
    rows = []
    for _, start, stop in order.segments(batch):
        for position in range(start, stop):
            index = int(np.searchsorted(order.bounds, position, "right")) - 1
            group = int(order.group_order[index])
            permutation = order.row_permutation(group)
            offset = position - int(order.bounds[index])
            rows.append((group, offset if permutation is None else int(permutation[offset])))
    return rows


@pytest.mark.parametrize(("group_rows", "batch_size", "num_lanes"), CASES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_union_over_ranks_is_the_defined_batch(group_rows, batch_size, num_lanes, world_size):
    options = {"seed": 3, "epoch": 2, "batch_size": batch_size, "num_lanes": num_lanes}
    ranks = [EpochOrder(group_rows, **options, rank=r, world_size=world_size) for r in range(world_size)]
    expected = defined_order(group_rows, batch_size, num_lanes, ranks[0])
    assert ranks[0].num_batches == len(expected)
    for batch, rows in enumerate(expected):
        assert ranks[0].batch_rows(batch) == len(rows)
        shares = [read(order, batch) for order in ranks]
        assert list(itertools.chain(*shares)) == rows
        assert [len(s) for s in shares] == [
            (r + 1) * len(rows) // world_size - r * len(rows) // world_size for r in range(world_size)
        ]
        assert max(len(s) for s in shares) <= -(-batch_size // world_size)
    every_row = {(g, i) for g, rows in enumerate(group_rows) for i in range(rows)}
    assert sorted(itertools.chain(*expected)) == sorted(every_row)


def test_random_sizes_give_every_row_once():
    rng = np.random.default_rng(0)
    for _ in range(60):
        group_rows = rng.integers(1, 30, rng.integers(1, 12)).tolist()
        batch_size, num_lanes, world_size = (int(rng.integers(1, high)) for high in (80, 20, 6))
        options = {"seed": 1, "epoch": 0, "batch_size": batch_size, "num_lanes": num_lanes}
        orders = [EpochOrder(group_rows, **options, rank=r, world_size=world_size) for r in range(world_size)]
        batches = [list(itertools.chain(*(read(o, k) for o in orders))) for k in range(orders[0].num_batches)]
        assert batches == defined_order(group_rows, batch_size, num_lanes, orders[0])


def test_seed_and_epoch_change_both_permutations_and_nothing_else_does():
    def signature(seed, epoch, batch_size=10):
        order = EpochOrder([16] * 20, seed=seed, epoch=epoch, batch_size=batch_size, num_lanes=4)
        return order.group_order.tolist(), order.row_permutation(3).tolist()

    base = signature(0, 0)
    for other in (signature(1, 0), signature(0, 1)):
        assert other[0] != base[0]
        assert other[1] != base[1]
    assert signature(0, 0, batch_size=64) == base
    order = EpochOrder([16] * 20, seed=0, epoch=0, batch_size=10, num_lanes=4)
    assert order.row_permutation(3).tolist() != order.row_permutation(4).tolist()


def test_order_is_pinned():
    """A changed random stream would break the resume of older runs: this must not change unnoticed."""
    order = EpochOrder([4, 4, 4], seed=7, epoch=1, batch_size=3, num_lanes=2)
    assert [read(order, batch) for batch in range(4)] == PINNED


def test_a_rank_meets_its_own_lanes_only_in_full_batches():
    for rank in range(4):
        order = EpochOrder([50] * 16, seed=0, epoch=0, batch_size=64, num_lanes=8, rank=rank, world_size=4)
        lanes = {s.lane for batch in range(order.num_full_batches) for s in order.segments(batch)}
        assert lanes == {2 * rank, 2 * rank + 1}


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize(("total", "batch_size"), [(100, 12), (5, 40), (97, 14), (1, 1)])
def test_sequential_order_reads_the_disk_in_order(world_size, total, batch_size):
    group_rows = [total // 2 + 1, total - total // 2 - 1]
    seen = []
    for rank in range(world_size):
        order = SequentialOrder(group_rows, batch_size=batch_size, rank=rank, world_size=world_size)
        assert order.num_batches == -(-total // batch_size)
        shares = [read(order, batch) for batch in range(order.num_batches)]
        assert all(len(s) <= -(-batch_size // world_size) for s in shares)
        seen += list(itertools.chain(*shares))
    assert seen == [(g, i) for g, rows in enumerate(group_rows) for i in range(rows)]
