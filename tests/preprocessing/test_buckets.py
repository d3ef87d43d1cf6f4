"""Quantile buckets and the measured collisions of hashed ids, against sorting and brute force; features of both kinds."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.hashing import bucket_ids, hash_ids
from mmlrec.schema import DatasetManifest, Task
from preprocessing.dataset import Dataset, Hashing, bucketed, multi, sparse
from preprocessing.encoding import buckets
from preprocessing.encoding.buckets import CollisionCounter, QuantileBuckets
from preprocessing.engines.local import build
from preprocessing.reading.raw_files import RawFolder


def sorted_borders(values, n):
    """The definition, by sorting."""
    ordered = sorted(values)
    return sorted({ordered[j * len(ordered) // n] for j in range(1, n)} - {ordered[0]})


def fitted(values, num_buckets, chunk=1000):
    found = QuantileBuckets(num_buckets)
    for start in range(0, len(values), chunk):
        found.add(pa.array(values[start : start + chunk], pa.float32()))
    found.freeze()
    return found


RANDOM = np.random.default_rng(0)
CASES = {
    "normal": RANDOM.normal(0, 1e3, 5000),
    "positive and huge": np.exp(RANDOM.normal(0, 20, 5000)),
    "many zeros": np.where(RANDOM.random(5000) < 0.6, 0.0, RANDOM.random(5000)),
    "few values": RANDOM.integers(-2, 3, 5000),
    "one value": np.full(50, 7.0),
    "few rows": np.array([3.0, 1.0, 2.0]),
    "zeros of both signs": np.array([-0.0, 0.0, -1.0, 1.0] * 5),
}


@pytest.mark.parametrize("num_buckets", [2, 10, 64])
@pytest.mark.parametrize("case", CASES)
def test_borders_are_those_of_the_sorted_values(case, num_buckets):
    values = CASES[case].astype(np.float32)
    found = fitted(values, num_buckets)
    borders = sorted_borders(values.tolist(), num_buckets)
    assert found.borders.tolist() == borders
    assert found.num_rows == len(borders) + 2
    odd = np.concatenate([values, values - 1, [-3e38, 3e38]]).astype(np.float32).tolist()
    ids = found.encode(pa.array([None, *odd], pa.float32())).to_pylist()
    assert ids == [0, *(1 + sum(border <= value for border in borders) for value in odd)]
    train = found.encode(pa.array(values, pa.float32())).to_numpy()
    assert set(train) == set(range(1, found.num_rows))


def test_entries_say_least_number_and_count(tmp_path):
    values = CASES["many zeros"].astype(np.float32)
    found = fitted(values, 10)
    found.save(tmp_path / "x.parquet")
    entries = pq.read_table(tmp_path / "x.parquet").to_pydict()
    assert entries["value"] == [-np.inf, *found.borders.tolist()]
    assert dict(zip(entries["id"], entries["count"], strict=True)) == Counter(found.encode(pa.array(values)).to_pylist())


def test_without_values_all_are_in_one_bucket(tmp_path):
    found = fitted(np.empty(0, np.float32), 10)
    assert found.encode(pa.array([None, 2.5], pa.float32())).to_pylist() == [0, 1]
    found.save(tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == [{"value": -np.inf, "id": 1, "count": 0}]


def test_many_distinct_values_are_counted_coarsely_but_alike_in_any_order(monkeypatch):
    monkeypatch.setattr(buckets, "LIMIT", 1 << 10)
    values = np.concatenate([RANDOM.normal(0, 1, 50_000), RANDOM.random(50_000) * 1e6]).astype(np.float32)
    forward = fitted(values, 20)
    for other in (fitted(values[::-1], 20, chunk=77), fitted(RANDOM.permutation(values), 20, chunk=100_000)):
        assert other.borders.tobytes() == forward.borders.tobytes()
    below = (values[:, None] < forward.borders).mean(axis=0)
    assert np.abs(below - np.arange(1, 20) / 20).max() < 0.02  # each of the 1,024 cells holds few of the values


def brute_force(values, num_buckets, num_hashes, seed):
    ids = {value: tuple(sorted(row)) for value, row in zip(values, rows(values, num_buckets, num_hashes, seed), strict=True)}
    taken = Counter(ids.values())
    return len(ids), sum(taken[own] > 1 for own in ids.values())


def rows(values, num_buckets, num_hashes, seed):
    return bucket_ids(pa.array(values), seed, num_buckets, num_hashes).tolist()


@pytest.mark.parametrize(("num_buckets", "num_hashes"), [(1, 1), (500, 1), (5000, 1), (50, 2), (300, 2), (20, 3)])
def test_collisions_equal_brute_force(num_buckets, num_hashes):
    values = [f"user{i}" for i in RANDOM.integers(0, 2000, 6000)]
    counter = CollisionCounter(num_buckets, num_hashes)
    for start in range(0, len(values), 700):
        counter.add(hash_ids(pa.array(values[start : start + 700]), 9))
    distinct, collisions = brute_force(values, num_buckets, num_hashes, 9)
    assert counter.result() == {"values": distinct, "collisions": collisions, "rate": collisions / distinct}
    assert CollisionCounter(10, 1).result() == {"values": 0, "collisions": 0, "rate": 0.0}


@pytest.mark.parametrize(("num_buckets", "num_hashes"), [(1 << 18, 1), (1 << 10, 2)])
def test_collisions_of_very_many_values_are_estimated_alike_in_any_order(num_buckets, num_hashes, monkeypatch):
    monkeypatch.setattr(buckets, "LIMIT", 1 << 14)
    values = RANDOM.permutation(100_000)

    def result(values, chunk):
        counter = CollisionCounter(num_buckets, num_hashes)
        for start in range(0, len(values), chunk):
            counter.add(hash_ids(pa.array(values[start : start + chunk]), 1))
        return counter.result()

    found = result(values, 5000)
    assert found == result(values[::-1], 333)
    distinct, collisions = brute_force(values.tolist(), num_buckets, num_hashes, 1)
    assert found["counted_one_in"] == 8
    assert found["values"] == pytest.approx(distinct, rel=0.03)
    assert found["rate"] == pytest.approx(collisions / distinct, rel=0.05)


@pytest.mark.parametrize("sizes", [(100, 5000), (90_000, 10_000), (20_000, 30_000, 50_000)])
def test_counts_of_parts_merge_to_those_of_all(sizes, monkeypatch):
    monkeypatch.setattr(buckets, "LIMIT", 1 << 14)
    numbers = RANDOM.normal(0, 1, sum(sizes)).astype(np.float32)
    ends = np.cumsum(sizes)

    def counted(start, stop):
        collisions, quantiles = CollisionCounter(1 << 16, 2), QuantileBuckets(20)
        for at in range(start, stop, 3000):
            collisions.add(hash_ids(pa.array(np.arange(at, min(at + 3000, stop))), 1))
            quantiles.add(pa.array(numbers[at : min(at + 3000, stop)]))
        return collisions, quantiles

    whole = counted(0, sum(sizes))
    for order in (1, -1):
        parts = [counted(end - size, end) for size, end in zip(sizes, ends, strict=True)][::order]
        for other in parts[1:]:
            for mine, more in zip(parts[0], other, strict=True):
                mine.merge(more)
        assert parts[0][0].result() == whole[0].result()
        parts[0][1].freeze()
        expected = fitted(numbers, 20)
        assert parts[0][1].borders.tobytes() == expected.borders.tobytes()


def test_few_buckets_for_very_many_values_collide_all(monkeypatch):
    monkeypatch.setattr(buckets, "LIMIT", 1 << 12)
    counter = CollisionCounter(3, 1)
    counter.add(hash_ids(pa.array(np.arange(50_000)), 1))
    found = counter.result()
    assert found["rate"] == 1
    assert found["values"] == pytest.approx(50_000, rel=0.1)


class Toy(Dataset):
    name = "toy"

    def __init__(self, columns):
        self.features = (
            sparse("user", pa.int64(), hashing=Hashing(40, seed=3)),
            sparse("friend", pa.int64(), table="user", hashing=Hashing(40, seed=3)),
            multi("words", hashing=Hashing(1000, num_hashes=2, seed=5)),
            bucketed("price", 4),
        )
        self.tasks = (Task(name="click"),)
        self.keys = {"row": pa.int64()}
        self.columns = columns

    def batches(self, raw):
        yield from pa.table(self.columns, schema=self.canonical_schema()).to_batches(max_chunksize=37)


def test_hashed_and_bucketed_features_in_a_dataset_folder(tmp_path):
    raw = {
        "user": [None if i % 9 == 0 else i * 31 % 60 for i in range(200)],
        "friend": [i % 70 for i in range(200)],
        "words": [None if i % 8 == 0 else [f"w{i % 5}", None, "x"][: i % 4] for i in range(200)],
        "price": [None if i % 10 == 0 else float(i * i % 97) for i in range(200)],
        "label.click": [i % 2 for i in range(200)],
        "key.row": list(range(200)),
    }
    manifest = build(Toy(raw), RawFolder(tmp_path, (), ""), tmp_path / "out", seed=1, parity=False, options={})
    assert DatasetManifest.load(tmp_path / "out") == manifest
    user, words, price = manifest.tables
    assert (user.num_rows, user.hash_seed, user.num_hashes, user.vocabulary) == (41, 3, 1, None)
    assert (words.num_rows, words.hash_seed, words.num_hashes) == (1001, 5, 2)
    assert price.vocabulary == "vocab/price.parquet"
    assert [path.name for path in (tmp_path / "out" / "vocab").iterdir()] == ["price.parquet"]
    found = {name: pq.read_table(tmp_path / "out" / name).to_pylist() for name in ("train", "valid", "test")}
    train = [row["key.row"] for row in found["train"]]
    borders = sorted_borders([raw["price"][i] for i in train if raw["price"][i] is not None], 4)
    assert len(borders) + 2 == price.num_rows
    for row in (row for rows_ in found.values() for row in rows_):
        i = row["key.row"]
        for name in ("user", "friend"):
            value = raw[name][i]
            assert row[name] == (0 if value is None else rows([value], 40, 1, 3)[0][0])
        expected = [[0, 0] if word is None else rows([word], 1000, 2, 5)[0] for word in raw["words"][i] or []]
        assert row["words"] == [k for ids in expected for k in ids]
        value = raw["price"][i]
        assert row["price"] == (0 if value is None else 1 + sum(border <= value for border in borders))
    distinct, collisions = brute_force(sorted({raw[name][i] for name in ("user", "friend") for i in train} - {None}), 40, 1, 3)
    assert manifest.statistics["hash_collisions"]["user"]["values"] == distinct
    assert manifest.statistics["hash_collisions"]["user"]["rate"] == collisions / distinct
