"""The bare gather and scatter: what it reads and writes, worked by hand and by plain loops."""

import os
from tempfile import TemporaryDirectory

import pytest
import torch

from benchmarks.resident import ResidentSteps, TablesAlone
from benchmarks.scaling.bare import BareTable, BareTables, KernelsAlone
from benchmarks.scaling.data import batches_of, config_of, manifest_of
from benchmarks.scaling.page import explained
from benchmarks.scaling.points import Point
from benchmarks.scaling.results import MEASURED, Row
from benchmarks.scaling.work import num_batches
from mmlrec.distributed.world import process_group
from mmlrec.session.session import build_session
from mmlrec.storage.places import place


@pytest.mark.parametrize("width", [0, 1, 4])
def test_rows_and_state_are_read_added_to_and_written(width):
    weight, state = torch.arange(24.0).view(6, 4), torch.zeros(6, width)
    before = weight.clone()
    gradient = torch.ones(3, 4) * torch.tensor([[1.0], [2.0], [3.0]])
    ids = torch.tensor([5, 0, 2])
    looked_up = BareTable(weight, state if width else None).gather_and_scatter(ids, gradient)
    assert torch.equal(looked_up, before[ids])
    for row in range(6):
        added = {5: 1.0, 0: 2.0, 2: 3.0}.get(row, 0.0)
        assert torch.equal(weight[row], before[row] + added)
        assert torch.equal(state[row], torch.full((width,), added))


@pytest.mark.parametrize(("width", "each"), [(0, 8 + 4 * 64), (1, 8 + 4 * 64 + 8), (16, 8 + 4 * 64 + 128)])
def test_bytes_by_hand(width, each):
    """Of an id of width 16: itself; its row read, given back and written, its gradient; its state read and written."""
    state = torch.zeros(9, width) if width else None
    assert BareTable(torch.zeros(9, 16), state).bytes_of(7) == 7 * each


@pytest.mark.parametrize(("optimizer", "state"), [("rowwise_adagrad", 1), ("adagrad", 16), ("sgd", 0)])
def test_it_touches_the_rows_of_the_ids_in_the_tables_of_the_session_and_no_others(optimizer, state, monkeypatch):
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    point = Point(ids=800, batch=16)
    with TemporaryDirectory() as folder, process_group() as world:
        manifest_of(point).save(place(folder))
        config = config_of(point, "scaling/synthetic", [f"embeddings.optimizer.name={optimizer}"], place(folder))
        session = build_session(config, world, for_training=True)
        steps = ResidentSteps(session, batches_of(point, 0, 2, 0.0))
        steps.train(3)
        TablesAlone(session, steps.batches)()
        bare = BareTables(session, steps.batches)
        assert bare.num_bytes == 8 * 16 * (8 + 4 * 64 + 2 * 4 * state)
        assert [table.weight.shape for table in bare.tables] == [(100, 16)] * 8
        before = [table.weight.clone() for table in bare.tables]
        bare()
        for number, table in enumerate(bare.tables):
            changed = (table.weight != before[number]).any(1).nonzero().flatten().tolist()
            assert changed == sorted(set(steps.batches[0].sparse[f"sparse_{number}"].values().tolist()))
        # The very tables that the kernel trains, no copies of them.
        lookup = session.model.module.tables(steps.batches[0].sparse) if hasattr(session.model, "module") else None
        first = steps.batches[0].sparse["sparse_0"].values()
        assert lookup is not None
        assert torch.equal(lookup["sparse_0"], bare.tables[0].weight[first])
    assert "RANK" not in os.environ


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd"])
@pytest.mark.parametrize("widths", ["{}", "{sparse_3: 8}"], ids=["one kernel", "two widths"])
def test_the_kernels_alone_do_what_the_tables_do(optimizer, widths, monkeypatch):
    """The same rows change, those of the batch in turn, and the tables do no more by themselves afterwards."""
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    point = Point(ids=800, batch=16)
    overrides = [f"embeddings.optimizer.name={optimizer}", f"embeddings.table_dim={widths}"]
    with TemporaryDirectory() as folder, process_group() as world:
        manifest_of(point).save(place(folder))
        session = build_session(config_of(point, "scaling/synthetic", overrides, place(folder)), world, for_training=True)
        steps = ResidentSteps(session, batches_of(point, 0, 2, 0.0))
        steps.train(2)
        TablesAlone(session, steps.batches)
        alone, weights = KernelsAlone(session, steps.batches), BareTables(session, steps.batches).tables
        for batch in (*steps.batches, steps.batches[0]):
            before = [table.weight.clone() for table in weights]
            alone()
            for number, table in enumerate(weights):
                changed = (table.weight != before[number]).any(1).nonzero().flatten().tolist()
                assert changed == sorted(set(batch.sparse[f"sparse_{number}"].values().tolist()))


def test_half_tables_are_gathered_and_scattered_too():
    weight = torch.ones(4, 2, dtype=torch.float16)
    BareTable(weight, torch.zeros(4, 1)).gather_and_scatter(torch.tensor([2]), torch.ones(1, 2))
    assert weight[:, 0].tolist() == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("point", "batches"),
    [
        (Point(ids=10**8, batch=4096), 128),
        (Point(ranks=2, ids=10**8, batch=4096), 256),
        (Point(ids=10**8, batch=65536), 8),
        (Point(ids=10**8, batch=64), 512),
        (Point(ids=10**5, batch=4096), 13),
        (Point(ids=800, batch=64), 8),
    ],
)
def test_batches_reach_beyond_the_caches_where_the_tables_do(point, batches):
    """4e6 ids or each row four times, in 8 to 512 batches: 4096 rows of 8 features are 32,768 ids."""
    assert num_batches(point) == batches


def test_what_memory_explains_is_the_smallest_tables_and_what_bare_accesses_take_more():
    rows = [(ids, Row(MEASURED, kernel_ms=ours, bare_ms=bare)) for ids, ours, bare in [(10, 3.0, 1.0), (100, 5.5, 3.0)]]
    assert explained(rows) == {10: 3.0, 100: 5.0}
    assert explained([]) == {}
