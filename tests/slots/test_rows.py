"""Rows that begin anew have their initial weights and no state, others keep theirs; and what was fed holds no whole batches."""

import numpy as np
import pytest
import torch
from torch import nn

from mmlrec.embeddings.tables import begin_anew, initial_rows
from mmlrec.slots.occurrences import Gathered

DIM, ROWS = 3, 40_000  # three blocks of initial weights
ANEW = [1, 16_383, 16_384, 16_390, 39_999]


class State:
    def __init__(self) -> None:
        self.state = {"tables.embedding_bags.t.weight": {"t.momentum1": torch.ones(ROWS, DIM)}}

    def state_dict(self) -> dict:
        return {"state": self.state}


def test_at_each_boundary_these_rows_begin_anew_and_nothing_else_changes():
    tables = nn.Module()
    tables.embedding_bags = nn.ModuleDict({"t": nn.Embedding(ROWS, DIM)})
    before = tables.embedding_bags["t"].weight.detach().clone()
    optimizer = State()
    for _ in range(3):
        begin_anew(tables, optimizer, {"t": np.array(ANEW)}, std=0.5, seed=4)
    begin_anew(tables, optimizer, {"t": np.zeros(0, np.int64)}, std=0.5, seed=4)
    found = tables.embedding_bags["t"].weight
    assert torch.equal(found[ANEW], initial_rows("t", 0, ROWS, DIM, 0.5, 4)[ANEW])
    others = np.setdiff1d(np.arange(ROWS), ANEW)
    assert torch.equal(found[others], before[others])
    (momentum,) = optimizer.state["tables.embedding_bags.t.weight"].values()
    assert momentum[ANEW].eq(0).all()
    assert momentum[others].eq(1).all()
    assert not tables._state_dict_hooks  # each of which would be called at every boundary from then on


@pytest.mark.parametrize("missing", [0, 0.5, 1])
def test_what_was_fed_holds_no_memory_of_its_batch(missing):
    batch = np.arange(1, 100_001, dtype=np.uint64)
    batch[: int(100 * missing)] = 0
    gathered = Gathered()
    gathered.add(batch[:100], 7)
    batch[:] = 0  # as by a batch that takes its place
    assert gathered.take().keys.tolist() == list(range(int(100 * missing) + 1, 101))
