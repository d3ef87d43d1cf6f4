"""The order of samples for any sizes: every row once, the same batches at every number of ranks, equal shares."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from mmlrec.data.order import EpochOrder, SequentialOrder
from tests.data.test_order import defined_order, read


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    group_rows=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    batch_size=st.integers(1, 90),
    num_lanes=st.integers(1, 12),
    world_size=st.integers(1, 6),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 5),
)
def test_every_row_once_in_the_defined_batches(group_rows, batch_size, num_lanes, world_size, seed, epoch):
    options = {"seed": seed, "epoch": epoch, "batch_size": batch_size, "num_lanes": num_lanes}
    ranks = [EpochOrder(group_rows, **options, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [[read(order, batch) for order in ranks] for batch in range(ranks[0].num_batches)]
    batches = [list(itertools.chain(*of_ranks)) for of_ranks in shares]
    assert batches == defined_order(group_rows, batch_size, num_lanes, ranks[0])
    assert sorted(itertools.chain(*batches)) == [(g, i) for g, rows in enumerate(group_rows) for i in range(rows)]
    assert all(max(map(len, of_ranks)) <= -(-batch_size // world_size) for of_ranks in shares)
    assert all(max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1 for of_ranks in shares)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=8), batch_size=st.integers(1, 50), world_size=st.integers(1, 6))
def test_evaluation_reads_the_disk_from_end_to_end(rows, batch_size, world_size):
    total = sum(rows)
    ranks = [SequentialOrder(rows, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({order.num_batches for order in ranks}) == 1
    found = [position for order in ranks for batch in range(order.num_batches) for position in positions(order, batch)]
    assert found == list(range(total))


def positions(order, batch):
    return [position for segment in order.segments(batch) for position in range(segment[1], segment[2])]
