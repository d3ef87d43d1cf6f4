"""The split rules against plain loops; groups, time, leaks and memory."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.errors import DataError
from mmlrec.schema import Task
from preprocessing.dataset import Dataset, dense, sparse
from preprocessing.engines.local import build
from preprocessing.reading.raw_files import RawFolder
from preprocessing.split_rules import FileSplit, GroupSplit, RandomSplit, TimeSplit
from preprocessing.writing import splits
from preprocessing.writing.splits import Placement

NUM_ROWS = 1000
MASK = (1 << 64) - 1


class Toy(Dataset):
    """Rows with a user, a name, a time and the side a file gives; `columns` holds plain lists."""

    name = "toy"
    features = (sparse("item", pa.int64()), dense("price"))
    tasks = (Task(name="click"),)
    keys = {"row": pa.int64(), "user": pa.int64(), "name": pa.string(), "time": pa.int64()}

    def __init__(self, split, columns):
        self.split, self.columns = split, columns

    def batches(self, raw):
        schema = self.canonical_schema()
        yield from pa.table({name: self.columns[name] for name in schema.names}, schema=schema).to_batches(max_chunksize=77)


def toy_columns(sides=(0.6, 0.1, 0.3), num_rows=NUM_ROWS):
    chance = random.Random(3)
    users = [chance.randrange(-50, 200) for _ in range(num_rows)]
    return {
        "item": [chance.randrange(30) for _ in range(num_rows)],
        "price": [chance.gauss(0, 9) for _ in range(num_rows)],
        "label.click": [float(chance.random() < 0.3) for _ in range(num_rows)],
        "key.row": list(range(num_rows)),
        "key.user": users,
        "key.name": [f"user {user}" for user in users],
        "key.time": [chance.randrange(-(10**6), 10**6) for _ in range(num_rows)],
        "split.side": chance.choices([0, 1, 2], sides, k=num_rows),
    }


def run(out, split, columns, seed=5):
    build(Toy(split, columns), RawFolder(out, (), ""), out, seed=seed, parity=False, options={})
    return {name: pq.read_table(out / name / "part-00000.parquet").to_pydict() for name in ("train", "valid", "test")}


def rows_of(found):
    return {name: sorted(part["key.row"]) for name, part in found.items()}


def train_bytes(out):
    return {p.relative_to(out): p.read_bytes() for folder in ("train", "vocab") for p in (out / folder).iterdir()}


def mix(value):
    """SplitMix64's finaliser in plain integers."""
    z = (value + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def chance(key, seed):
    return (mix((key & MASK) ^ mix(seed)) >> 11) / 2**53


def test_sides_that_the_files_give_are_kept(tmp_path):
    columns = toy_columns()
    found = run(tmp_path / "out", FileSplit(), columns)
    for side, name in enumerate(("train", "valid", "test")):
        assert rows_of(found)[name] == [row for row in range(NUM_ROWS) if columns["split.side"][row] == side]
        assert found[name]["key.row"] != sorted(found[name]["key.row"])  # shuffled
        assert found[name]["label.click"] == [columns["label.click"][row] for row in found[name]["key.row"]]
        assert "split.side" not in found[name]


@pytest.mark.parametrize(("valid_from", "one_in"), [("test", 2), ("train", 10), ("train", 7)])
def test_valid_takes_an_exact_random_share_of_one_file(tmp_path, valid_from, one_in):
    columns = toy_columns((0.7, 0, 0.3))
    of_side = {name: [r for r in range(NUM_ROWS) if columns["split.side"][r] == s] for s, name in ((0, "train"), (2, "test"))}
    found = rows_of(run(tmp_path / "out", FileSplit(valid_from, one_in), columns))
    assert len(found["valid"]) == len(of_side[valid_from]) // one_in
    assert set(found["valid"]) < set(of_side[valid_from])
    other = "train" if valid_from == "test" else "test"
    assert found[other] == of_side[other]
    assert sorted(found["valid"] + found[valid_from]) == of_side[valid_from]
    # drawn all over the file: the mean rank of n out of N without replacement, within 4 standard deviations
    ranks = [of_side[valid_from].index(row) for row in found["valid"]]
    total = len(of_side[valid_from])
    deviation = (total**2 / 12 / len(ranks) * (1 - len(ranks) / total)) ** 0.5
    assert abs(np.mean(ranks) - (total - 1) / 2) < 4 * deviation
    assert rows_of(run(tmp_path / "again", FileSplit(valid_from, one_in), columns, seed=6))["valid"] != found["valid"]


@pytest.mark.parametrize(("valid_from", "side"), [("train", 0), ("test", 2)])
def test_share_of_a_file_by_group_keeps_groups_whole(tmp_path, valid_from, side):
    columns = toy_columns((0.7, 0, 0.3))
    found = rows_of(run(tmp_path / "out", FileSplit(valid_from, one_in=4, group="user"), columns))
    sides, users = columns["split.side"], columns["key.user"]
    assert found["valid"] == [r for r in range(NUM_ROWS) if sides[r] == side and chance(users[r], 5) < 1 / 4]
    assert found[valid_from] == [r for r in range(NUM_ROWS) if sides[r] == side and chance(users[r], 5) >= 1 / 4]
    assert 0.1 < len(found["valid"]) / sides.count(side) < 0.4


def test_groups_go_to_one_side_each_by_the_hash_of_their_key(tmp_path):
    columns = toy_columns()
    found = rows_of(run(tmp_path / "out", GroupSplit("user"), columns))
    users = columns["key.user"]
    assert found["train"] == [r for r in range(NUM_ROWS) if chance(users[r], 5) < 0.8]
    assert found["valid"] == [r for r in range(NUM_ROWS) if 0.8 <= chance(users[r], 5) < 0.9]
    groups = {name: {users[r] for r in rows} for name, rows in found.items()}
    assert sum(map(len, groups.values())) == len(set(users))
    assert rows_of(run(tmp_path / "again", GroupSplit("user"), columns, seed=6)) != found


def test_groups_with_text_keys_stay_whole_and_have_their_shares(tmp_path):
    columns = toy_columns()
    found = rows_of(run(tmp_path / "out", GroupSplit("name"), columns))
    groups = {name: {columns["key.name"][r] for r in rows} for name, rows in found.items()}
    assert sum(map(len, groups.values())) == len(set(columns["key.name"]))
    keys = pa.array([f"k{i}" for i in range(20_000)])
    drawn = splits._chance(keys, 1)
    assert abs(np.mean(drawn < 0.8) - 0.8) < 4 * (0.8 * 0.2 / 20_000) ** 0.5
    assert abs(np.corrcoef(drawn, splits._chance(keys, 2))[0, 1]) < 4 / 20_000**0.5


@pytest.mark.parametrize("spread", [10**6, 40, 2**62])
def test_time_cuts_at_80_and_90_percent_and_equal_times_stay_together(tmp_path, spread, monkeypatch):
    monkeypatch.setattr(splits, "_READ_BYTES", 800)  # the file of times in ten pieces
    columns = toy_columns()
    draw = random.Random(spread)
    columns["key.time"] = times = [draw.randrange(-spread, spread) for _ in range(NUM_ROWS)]
    found = rows_of(run(tmp_path / "out", TimeSplit("time"), columns))
    ordered = sorted(times)
    first, second = ordered[800], ordered[900]
    assert found["train"] == [r for r in range(NUM_ROWS) if times[r] < first]
    assert found["valid"] == [r for r in range(NUM_ROWS) if first <= times[r] < second]
    assert found["test"] == [r for r in range(NUM_ROWS) if times[r] >= second]
    if spread == 2**62:
        assert list(map(len, found.values())) == [800, 100, 100]


def test_given_time_cuts(tmp_path):
    columns = toy_columns()
    found = rows_of(run(tmp_path / "out", TimeSplit("time", (-5000, 900_000)), columns))
    assert found["train"] == [r for r in range(NUM_ROWS) if columns["key.time"][r] < -5000]
    assert found["test"] == [r for r in range(NUM_ROWS) if columns["key.time"][r] >= 900_000]


@pytest.mark.parametrize(
    ("split", "given"),
    [
        (TimeSplit("time", (0, 10**7)), {}),
        (TimeSplit("time"), {"key.time": [7] * NUM_ROWS}),
        (GroupSplit("user"), {"key.user": [1] * NUM_ROWS}),
        (FileSplit(), {"split.side": [0] * NUM_ROWS}),
    ],
)
def test_an_empty_side_is_told(tmp_path, split, given):
    with pytest.raises(DataError, match=r"toy: no row of 1,000 falls to (train|valid|test): they are divided "):
        run(tmp_path / "out", split, toy_columns() | given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", [GroupSplit("user"), TimeSplit("time"), FileSplit("train", 10, "user")])
def test_a_missing_key_is_told(tmp_path, split):
    columns = toy_columns((0.7, 0, 0.3))
    columns["key.user"][500] = columns["key.time"][500] = None
    with pytest.raises(DataError, match=r"key '(user|time)' divides the rows into train, valid and test, but is missing"):
        run(tmp_path / "out", split, columns)


@pytest.mark.parametrize(
    "split",
    [
        RandomSplit(),
        FileSplit(),
        FileSplit("train", 10),
        FileSplit("test", 2),
        FileSplit("train", 10, "user"),
        GroupSplit("user"),
        TimeSplit("time"),
    ],
    ids=repr,
)
def test_changing_valid_and_test_rows_changes_no_byte_of_train(tmp_path, split):
    given = isinstance(split, FileSplit) and split.valid_from
    columns = toy_columns((0.7, 0, 0.3) if given else (0.6, 0.1, 0.3))
    before = rows_of(run(tmp_path / "before", split, columns))
    changed = {name: list(values) for name, values in columns.items()}
    for row in before["valid"] + before["test"]:
        changed["item"][row] = 10**12 + row
        changed["price"][row] = 1e9
        changed["label.click"][row] = 1 - columns["label.click"][row]
    assert rows_of(run(tmp_path / "after", split, changed)) == before
    assert train_bytes(tmp_path / "before") == train_bytes(tmp_path / "after")
    assert (tmp_path / "before/test/part-00000.parquet").read_bytes() != (
        tmp_path / "after/test/part-00000.parquet"
    ).read_bytes()


@pytest.mark.parametrize("split", [FileSplit("test", 2), FileSplit("train", 10), GroupSplit("user")], ids=repr)
def test_even_fewer_test_rows_change_no_byte_of_train(tmp_path, split):
    columns = toy_columns((0.7, 0, 0.3))
    before = rows_of(run(tmp_path / "before", split, columns))
    gone = set(before["test"][::2])
    left = {name: [v for row, v in enumerate(values) if row not in gone] for name, values in columns.items()}
    run(tmp_path / "after", split, left)
    assert train_bytes(tmp_path / "before") == train_bytes(tmp_path / "after")


def test_positions_are_a_permutation_and_do_not_depend_on_the_batches(tmp_path):
    columns = toy_columns((0.7, 0, 0.3))
    data = Toy(FileSplit("train", 10), columns)
    rows = pa.table({n: columns[n] for n in data.canonical_schema().names}, schema=data.canonical_schema())
    found = []
    for size in (NUM_ROWS, 13):
        placement = Placement(data.split, 1, tmp_path)
        batches = rows.to_batches(max_chunksize=size)
        for batch in batches:
            placement.count(batch)
        placement.close("toy")
        found.append(np.concatenate([placement.positions(batch) for batch in batches]))
    assert np.array_equal(np.sort(found[0]), np.arange(NUM_ROWS))
    assert np.array_equal(found[0], found[1])
