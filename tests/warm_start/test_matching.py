"""Which rows of a table stand for the same values in another dataset."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.errors import DataError
from mmlrec.warm_start import rows
from mmlrec.warm_start.rows import Encoded, Matching, matching, old_rows
from tests.datasets import with_vocabularies, write_dataset


def encoded(folder, values=None, *, num_rows=None, hashed=None, recorded=True):
    """One table, t0, with the vocabulary `values`, or with as many rows as told."""
    num_rows = len(values) + 1 if values is not None else num_rows
    data = write_dataset(folder, rows=8, num_sparse=1, num_multi=0, table_rows=num_rows)
    data = with_vocabularies(data, {} if values is None else {"t0": values}, hashed)
    manifest = data.manifest if recorded else data.manifest.model_copy(update={"encoding": None})
    return Encoded(manifest, folder)


def found(new, old, pieces=1):
    """How, and the old row of each new one, as several ranks find them."""
    match = matching("t0", new, old)
    ends = [new.manifest.table("t0").num_rows * piece // pieces for piece in range(pieces + 1)]
    parts = [old_rows("t0", match, start, stop, new, old) for start, stop in itertools.pairwise(ends)]
    return match.how, np.concatenate(parts).tolist()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("kind", [str, int])
def test_values_are_found_wherever_they_are(tmp_path, monkeypatch, kind, pieces, recorded):
    monkeypatch.setattr(rows, "_PIECE", 10)
    draw = np.random.default_rng(3)
    pool = [int(value) for value in draw.integers(-(2**62), 2**62, 150)]
    pool = [f"wört {value}" for value in pool] if kind is str else pool
    theirs, mine = ([pool[i] for i in draw.choice(150, count, replace=False)] for count in (101, 77))
    how, got = found(*(encoded(tmp_path / n, v, recorded=recorded) for n, v in (("new", mine), ("old", theirs))), pieces)
    assert how == "by value"
    assert got == [0] + [theirs.index(value) + 1 if value in theirs else -1 for value in mine]
    assert 20 < sum(row > 0 for row in got) < 75


def test_where_one_begins_with_the_other_no_value_is_looked_for(tmp_path, monkeypatch):
    short, long = ["a", "b", "c"], ["a", "b", "c", "d", "e"]
    both = encoded(tmp_path / "short", short), encoded(tmp_path / "long", long)
    assert matching("t0", *both) == matching("t0", *both[::-1]) == Matching("by value", 4)
    monkeypatch.setattr(rows, "values_of", None)
    assert found(*both)[1] == [0, 1, 2, 3]
    assert found(*both[::-1], pieces=2)[1] == [0, 1, 2, 3, -1, -1]


def test_hashed_ids_are_taken_where_all_that_makes_them_is_equal(tmp_path):
    seven, again = (encoded(tmp_path / name, num_rows=6, hashed={"t0": 7}) for name in ("a", "b"))
    assert found(seven, again) == ("by id", [0, 1, 2, 3, 4, 5])
    for other in (encoded(tmp_path / "c", num_rows=6, hashed={"t0": 8}), encoded(tmp_path / "d", num_rows=7, hashed={"t0": 7})):
        assert found(seven, other) == ("not", [-1] * 6)
        assert "rows, hashes and seed are (6, 1, 7) here" in matching("t0", seven, other).why_not


def test_ids_that_come_as_such_are_their_own_values(tmp_path):
    few, many = encoded(tmp_path / "few", num_rows=4), encoded(tmp_path / "many", num_rows=6)
    assert found(many, few) == ("by id", [0, 1, 2, 3, -1, -1])
    assert found(few, many) == ("by id", [0, 1, 2, 3])


@pytest.mark.parametrize("recorded", [True, False])
def test_buckets_of_numbers_are_taken_where_their_borders_are_equal(tmp_path, recorded):
    def quantiles(name, borders):
        data = encoded(tmp_path / name, pa.array(borders, pa.float32()))
        encoding = data.manifest.encoding
        tables = {"t0": encoding.tables["t0"] | {"ids": "quantiles"}}
        now = type(encoding).of(encoding.features, tables, encoding.scenario, encoding.labels) if recorded else None
        return Encoded(data.manifest.model_copy(update={"encoding": now}), data.folder)

    first = quantiles("first", [0.0, 0.5, 2.0])
    assert found(quantiles("same", [0.0, 0.5, 2.0]), first) == ("by id", [0, 1, 2, 3])
    assert found(quantiles("moved", [0.0, 0.6, 2.0]), first) == ("not", [-1] * 4)
    assert found(quantiles("more", [0.0, 0.5, 2.0, 3.0]), first) == ("not", [-1] * 5)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"values": [1, 2, 3]}, "its values are string here, int64 there"),
        ({"num_rows": 4}, "its ids come by vocabulary here, by given there"),
        ({"num_rows": 4, "hashed": {"t0": 1}}, "its ids come by vocabulary here, by hash there"),
    ],
)
def test_ids_of_another_kind_are_not_taken(tmp_path, other, why):
    new, old = encoded(tmp_path / "new", ["1", "2", "3"]), encoded(tmp_path / "old", **other)
    assert found(new, old) == ("not", [-1] * 4)
    assert matching("t0", new, old).why_not == why


def test_a_vocabulary_that_is_missing_or_another_one_is_named(tmp_path):
    new, old = encoded(tmp_path / "new", ["a", "b"]), encoded(tmp_path / "old", ["b", "c"])
    path = tmp_path / "old/vocab/t0.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "value", pa.array(["b", "d"])), path)
    with pytest.raises(DataError, match=r"old/vocab/t0.parquet is damaged: the digest of its values"):
        matching("t0", new, old)
    path.unlink()
    with pytest.raises(DataError, match=r"old/vocab/t0.parquet: the vocabulary is missing"):
        matching("t0", new, old)
    with pytest.raises(DataError, match=r"old/vocab/t0.parquet: the vocabulary is missing"):
        matching("t0", old, new)
