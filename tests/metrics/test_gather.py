import pickle
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmlrec.errors import DataError
from mmlrec.metrics.gather import Collected, PredictionRows, check_each_once, gather_rows, joined
from mmlrec.metrics.ranks import ALONE
from mmlrec.metrics.report import build_report
from mmlrec.schema import Task
from tests.processes import spawn

N = 41


def batch(rows, padding=0):
    """Rows as a batch whose every value tells its row, with padding in front."""
    row = torch.tensor([-1] * padding + list(rows))
    value = row.float()
    return PredictionRows.from_batch(
        torch.stack([value.sin(), value.cos()], 1),
        labels=torch.stack([row % 2, row % 3 == 0], 1).float(),
        mask=torch.stack([row >= 0, row % 5 > 0], 1).float(),
        scenario=row % 4,
        weight=1 + value / 10,
        group=row % 7 + 10**12,
        row=row,
        valid=row >= 0,
    )


def collected(*batches):
    room = Collected(100)
    for rows in batches:
        room.add(rows)
    return room.rows()


def equal(left, right):
    return all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(vars(left).values(), vars(right).values(), strict=True)
    )


def test_padding_is_dropped_and_rows_come_back_in_disk_order():
    order = np.random.default_rng(0).permutation(N).tolist()
    joined = gather_rows(collected(batch(order[:20], padding=3), batch(order[20:], padding=1)))
    assert joined.row.tolist() == list(range(N))
    assert equal(joined, batch(range(N)))
    assert joined.mask.dtype == np.bool_


def test_batches_may_be_reused_after_they_were_collected():
    row = torch.arange(4)
    values = {name: torch.ones(4, 1) for name in ("labels", "mask")}
    logits = torch.ones(4, 1)
    rest = {"scenario": row, "weight": torch.ones(4), "group": row, "row": row, "valid": row >= 0}
    kept = PredictionRows.from_batch(logits, **values, **rest)
    logits.zero_()
    assert kept.logits.tolist() == [[1.0]] * 4


def test_a_row_predicted_twice_is_an_error():
    with pytest.raises(DataError, match=r"row 3 was predicted twice \(1 such rows"):
        gather_rows(collected(batch([0, 1, 3]), batch([3, 5])))


def test_rows_that_are_not_those_of_the_split_each_once_are_an_error():
    check_each_once(np.array([2, 0, 3, 1]), ALONE)
    for rows in ([0, 1, 3, 3], [0, 1, 2, 4], [0, 0, 3, 3]):
        with pytest.raises(DataError, match=r"4 rows were predicted, some of them twice, or others"):
            check_each_once(np.array(rows), ALONE)


def _gather_on(rank, world_size, shares, folder):
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    own = collected(*(batch(rows, padding=rank) for rows in shares[rank]))
    joined = gather_rows(own, rank=rank, world_size=world_size)
    if rank == 0:
        with open(f"{folder}/joined", "wb") as file:
            pickle.dump(joined, file)
    assert (joined is None) == (rank > 0)
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_with_any_number_of_rows_join_to_the_same_as_one_process(tmp_path):
    order = np.random.default_rng(1).permutation(N).tolist()
    shares = [[order[:7], order[7:10]], [[], []], [order[10:40], order[40:]]]
    spawn(_gather_on, (3, shares, str(tmp_path)), nprocs=3)
    joined = pickle.loads((tmp_path / "joined").read_bytes())
    assert equal(joined, batch(range(N)))
    tasks = [Task(name="a"), Task(name="b")]
    alone = gather_rows(batch(order))
    report = build_report(joined, tasks=tasks, scenario=None)
    assert report == build_report(alone, tasks=tasks, scenario=None)
    # Weights have come along: GAUC is that of all pairs of rows of one group, worked out one by one.
    for column, task in enumerate(tasks):
        aucs, totals = [], []
        for group in range(7):
            rows = [row for row in range(N) if row % 7 == group and joined.mask[row, column]]
            right = pairs = 0.0
            for high in (row for row in rows if joined.labels[row, column] == 1):
                for low in (row for row in rows if joined.labels[row, column] == 0):
                    pair, ahead = (1 + high / 10) * (1 + low / 10), joined.logits[[high, low], column]
                    pairs += pair
                    right += pair * (0.5 if ahead[0] == ahead[1] else float(ahead[0] > ahead[1]))
            if pairs:
                aucs.append(right / pairs)
                totals.append(sum(1 + row / 10 for row in rows))
        assert report["tasks"][task.name]["gauc"] == pytest.approx(np.average(aucs, weights=totals), rel=1e-6)


def test_rows_of_several_splits_are_joined_without_being_in_memory_twice():
    tracemalloc.start()
    try:
        parts = []
        for start in (0, 100_000):
            room = Collected(100_000)
            room.add(batch(range(start, start + 100_000)))
            parts.append(room.rows())
        del room
        expected = [part.row.sum() for part in parts]
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        rows = joined(parts)
        assert tracemalloc.get_traced_memory()[1] < 1.4 * before
    finally:
        tracemalloc.stop()
    assert (rows.row[:100_000].sum(), rows.row[100_000:].sum()) == tuple(expected)
    assert len(rows.logits) == len(rows.mask) == 200_000
