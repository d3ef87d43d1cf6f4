"""Rows of one file looked up by id; rows kept on disk: what is taken equals what was added, for every kind of column."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from preprocessing.reading.raw_files import BadRows, Block
from preprocessing.rows.join import IdIndex, RowsOnDisk

KINDS = {"id": pa.int64(), "price": pa.float32(), "exact": pa.float64(), "kind": pa.string(), "tags": pa.list_(pa.int64())}


def some_rows(num_rows, seed):
    draw = random.Random(seed)
    rows = [
        {
            "id": draw.choice([None, 0, -(2**62), draw.randrange(2**60)]),
            "price": draw.choice([None, 0.0, 0.25, -3.0]),
            "exact": draw.choice([None, 0.1, 1e300]),
            "kind": draw.choice([None, "", "a", f"k{draw.randrange(9)}", "Łódź"]),
            "tags": draw.choice([[], [1], [draw.randrange(9) for _ in range(draw.randrange(40))]]),
            "unwanted": 1,
        }
        for _ in range(num_rows)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema([*KINDS.items(), ("unwanted", pa.int64())]))


def test_rows_taken_equal_rows_added(tmp_path):
    tables = [some_rows(size, seed) for seed, size in enumerate([3, 0, 200, 1])]
    kept = RowsOnDisk(tmp_path / "rows", KINDS)
    for table in tables:
        kept.add(table)
    every = pa.concat_tables(tables).select(list(KINDS))
    assert kept.num_rows == len(every) == 204
    draw = np.random.default_rng(0)
    for wanted in (np.arange(204), draw.integers(0, 204, 1000), np.array([203, 0, 0]), np.zeros(0, np.int64)):
        found = pa.table(kept.take(wanted), schema=every.schema)
        assert found.to_pylist() == every.take(pa.array(wanted, pa.int64())).to_pylist()
    kept.remove()
    assert not (tmp_path / "rows").exists()


def test_no_rows_and_lists_that_are_all_empty(tmp_path):
    kept, schema = RowsOnDisk(tmp_path / "rows", KINDS), pa.schema(KINDS.items())
    assert pa.table(kept.take(np.zeros(0, np.int64)), schema=schema).num_rows == 0
    row = {"id": 1, "price": None, "exact": None, "kind": None, "tags": []}
    kept.add(pa.Table.from_pylist([row], schema=schema))
    assert pa.table(kept.take(np.array([0, 0]))).to_pylist() == [row, row]


@pytest.mark.parametrize("ids", [[7], [3, -2, 9, 0], [5, 10**6, 17], [-(2**63), 2**63 - 1, 0], [2**62, 2**62 + 5, 2**62 + 1]])
def test_ids_are_found_wherever_they_lie(ids):
    table = pa.table({"id": pa.array(ids, pa.int64())})
    block = Block(None, Path("a.csv"), np.arange(1, len(ids) + 1), table)
    index = IdIndex("id", [block], BadRows(0, Path()))
    near = {min(max(i + step, -(2**63)), 2**63 - 1) for i in ids for step in (-1, 0, 1)} | {-(2**63), 2**63 - 1, 0}
    wanted = sorted(near)
    expected = [ids.index(i) if i in ids else -1 for i in wanted]
    assert index.locate(np.array(wanted, np.int64)).tolist() == expected
    assert index.locate(np.zeros(0, np.int64)).tolist() == []
