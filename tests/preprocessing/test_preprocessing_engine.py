"""The engine on small hand-made datasets: encoding rules, missing values, bad numbers, constant memory."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.errors import DataError
from mmlrec.schema import DatasetManifest, Scenario, Task
from preprocessing.dataset import Dataset, dense, multi, sparse
from preprocessing.encoding.encoder import DenseRange, ValueCounter, Vocabulary
from preprocessing.engines.local import build
from preprocessing.reading.raw_files import RawFolder
from preprocessing.writing import shuffle
from preprocessing.writing.permutation import RowPermutation

ROOT = Path(__file__).parents[2]
NUM_ROWS = 100


class Toy(Dataset):
    """Two features share a table with min_count 2; a list; a number; all with missing values."""

    name = "toy"

    def __init__(self, **columns):
        self.features = (
            sparse("item", table="item", min_count=3),
            sparse("last_item", table="item", min_count=3),
            multi("tags", pa.int64()),
            dense("price"),
        )
        self.tasks = (Task(name="click"),)
        self.keys = {"row": pa.string()}
        self.columns = columns

    def batches(self, raw):
        rows = pa.table(self.columns, schema=self.canonical_schema())
        yield from rows.to_batches(max_chunksize=37)


def toy_columns(seed=0):
    random = np.random.default_rng(seed)
    names = [None, *"abcdefgh"]
    return {
        "item": [names[i] for i in random.integers(0, 9, NUM_ROWS)],
        "last_item": [f"rare{i}" if i % 10 == 0 else names[i % 9] for i in range(NUM_ROWS)],
        "tags": [None if i % 7 == 0 else list(map(int, random.integers(-3, 30, i % 4))) for i in range(NUM_ROWS)],
        "price": [None if i % 11 == 0 else float(x) for i, x in enumerate(random.normal(0, 50, NUM_ROWS).astype(np.float32))],
        "label.click": [None if i % 13 == 0 else float(i % 2) for i in range(NUM_ROWS)],
        "key.row": [f"r{i}" for i in range(NUM_ROWS)],
    }


def run(out, columns, **options):
    dataset = Toy(**columns)
    raw = RawFolder(Path(), (), "")
    return build(dataset, raw, out, **({"seed": 1, "parity": False, "options": {}} | options))


def read(out):
    return [
        row for split in ("train", "valid", "test") for row in pq.read_table(out / split / "part-00000.parquet").to_pylist()
    ]


@pytest.mark.parametrize("bucket_rows", [1 << 18, 16])
def test_every_cell_is_encoded_as_a_plain_loop_would(tmp_path, monkeypatch, bucket_rows):
    monkeypatch.setattr(shuffle, "BUCKET_ROWS", bucket_rows)
    columns = toy_columns()
    manifest = run(tmp_path / "out", columns)
    order = np.argsort(RowPermutation(NUM_ROWS, 1).positions(0, NUM_ROWS)).tolist()
    train = order[:80]

    def ids(values, min_count):
        counts = {v: values.count(v) for v in values if v is not None}
        kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
        return {value: index + 1 for index, value in enumerate(kept)}

    items = ids([columns[c][i] for c in ("item", "last_item") for i in train], 3)
    tags = ids([tag for i in train for tag in columns["tags"][i] or []], 1)
    prices = [columns["price"][i] for i in train if columns["price"][i] is not None]
    low, high = min(prices), max(prices)
    assert any(price is not None and not low <= price <= high for price in columns["price"])  # clipping takes place
    assert any(tag not in tags for cell in columns["tags"] for tag in cell or [])  # and so do unseen values
    rows = read(tmp_path / "out")
    assert [row["key.row"] for row in rows] == [f"r{i}" for i in order]
    for row, i in zip(rows, order, strict=True):
        assert row["item"] == items.get(columns["item"][i], 0)
        assert row["last_item"] == items.get(columns["last_item"][i], 0)
        assert row["tags"] == [tags.get(tag, 0) for tag in columns["tags"][i] or []]
        price = columns["price"][i]
        assert row["price"] == (0 if price is None else pytest.approx(min(max((price - low) / (high - low), 0), 1), abs=1e-6))
        assert row["label.click"] == columns["label.click"][i]
    assert {t.name: t.num_rows for t in manifest.tables} == {"item": len(items) + 1, "tags": len(tags) + 1}
    assert manifest.preprocessing["dense_ranges"] == {"price": [low, high]}
    labelled = [row["label.click"] for row in rows if row["label.click"] is not None]
    assert manifest.statistics["label_rates"]["click"]["all"] == pytest.approx(np.mean(labelled))
    assert manifest == DatasetManifest.load(tmp_path / "out")


def test_parity_form_fits_on_all_rows_in_raw_order(tmp_path):
    columns = toy_columns()
    run(tmp_path / "out", columns, parity=True)
    distinct = sorted({v for c in ("item", "last_item") for v in columns[c] if v is not None})
    assert pq.read_table(tmp_path / "out/vocab/item.parquet")["value"].to_pylist() == distinct
    numbers = pq.read_table(tmp_path / "out/vocab/tags.parquet")["value"].to_pylist()
    assert numbers == sorted({tag for cell in columns["tags"] for tag in cell or []})  # -3 before 10: as numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_literal_nan_or_inf_is_refused(tmp_path, bad):
    columns = toy_columns()
    columns["price"][3] = bad
    with pytest.raises(DataError, match="'price' holds nan or inf"):
        run(tmp_path / "out", columns)
    assert list(tmp_path.iterdir()) == []


def test_range_of_one_value_or_none_gives_zero():
    for values in ([5.0, 5.0, None], [None, None, None]):
        seen = DenseRange()
        seen.add(pa.array(values, pa.float32()))
        assert seen.scale(pa.array([5.0, 9.0, None], pa.float32())).to_pylist() == [0, 0, 0]


def test_counter_counts_over_many_arrays():
    random = np.random.default_rng(0)
    values = random.integers(-(2**62), 2**62, 1000)[random.integers(0, 1000, 60_000)]
    counter = ValueCounter(pa.int64())
    for chunk in np.array_split(values, 17):
        counter.add(pa.array(chunk))
    found = counter.counts().to_pydict()
    truth = dict(zip(*np.unique(values, return_counts=True), strict=True))
    assert dict(zip(found["value"], found["count"], strict=True)) == truth
    vocabulary = Vocabulary(counter.counts(), 1, parity=False)
    assert vocabulary.encode(pa.array([None, 1, int(max(truth, key=lambda v: (truth[v], -v)))])).to_pylist() == [0, 0, 1]


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
@pytest.mark.parametrize("size", [0, 1, 300, 5000])
def test_vocabularies_smaller_and_larger_than_what_is_looked_up(kind, size):
    """Of 1, 299, 300 and 4000 values at a time, some of which are missing or unknown; sliced, as batches are."""
    random = np.random.default_rng(size)
    every = random.permutation(np.unique(random.integers(-(2**62), 2**62, size + 50)))
    known, unknown = every[:size], every[size:]
    counts = pa.table({"value": pa.array(known).cast(kind), "count": pa.array(random.integers(1, 4, size))})
    vocabulary = Vocabulary(counts, 2, parity=False)
    kept = zip(counts["value"].to_pylist(), counts["count"].to_pylist(), strict=True)
    ranked = sorted((-count, value) for value, count in kept if count >= 2)
    ids = {value: number for number, (_, value) in enumerate(ranked, start=1)}
    for number in (1, 299, 300, 4000):
        cells = random.choice(np.append(known, unknown), number + 3)
        values = pa.array(cells, mask=random.random(number + 3) < 0.1).cast(kind)[3:]
        found = vocabulary.encode(values)
        assert found.type == pa.int64()
        assert found.to_pylist() == [ids.get(value, 0) for value in values.to_pylist()]


class Rated(Toy):
    """A click, a rating, two scenarios, and weights."""

    weighted = True

    def __init__(self, **columns):
        super().__init__(**columns)
        self.tasks += (Task(name="stars", kind="regression"),)
        self.scenario = Scenario(name="page", values=["home", "cart"])


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("label.click", 2.0, "label of task 'click' is 2.0, must be 0 or 1, or null"),
        ("label.click", math.nan, "label of task 'click' is nan, must be 0 or 1, or null"),
        ("label.stars", math.nan, "label of task 'stars' is nan, must be a finite number, or null"),
        ("label.stars", math.inf, "label of task 'stars' is inf, must be a finite number, or null"),
        ("sample.scenario", 2, r"sample.scenario is 2, must be 0..1, the place of the row's scenario in home, cart"),
        ("sample.scenario", -1, r"sample.scenario is -1, must be 0..1"),
        ("sample.scenario", None, r"sample.scenario is null, must be 0..1"),
        ("sample.weight", -0.5, r"sample.weight is -0.5, must be a number from 0 on"),
        ("sample.weight", math.nan, r"sample.weight is nan, must be a number from 0 on"),
        ("sample.weight", None, r"sample.weight is null, must be a number from 0 on"),
    ],
)
def test_labels_scenarios_and_weights_that_are_none_are_refused(tmp_path, column, value, told):
    columns = toy_columns() | {"label.stars": [None, 4.5] * 50, "sample.scenario": [0, 1] * 50, "sample.weight": [0, 2.5] * 50}
    columns[column][71] = value
    with pytest.raises(DataError, match=f"^toy: {told}"):
        build(Rated(**columns), RawFolder(Path(), (), ""), tmp_path / "out", seed=1, parity=False, options={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"label.click": [1.0]}, r"rows\(\) gives no column price, key.row. It gives item, last_item, tags, label.click."),
        ({"label.click": [1.0], "price": [1.0], "key.row": ["a"], "sample.weight": [2.0]}, "weighted = True"),
    ],
)
def test_columns_that_rows_leaves_out_or_that_nothing_asks_for_are_told(given, told):
    class Given(Toy):
        def rows(self, block):
            return {"item": ["a"], "last_item": ["a"], "tags": [[1]]} | given

    with pytest.raises(DataError, match=told):
        Given().canonical(None)


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from mmlrec.schema import Task
from preprocessing.writing import shuffle
from preprocessing.dataset import Dataset, dense, sparse
from preprocessing.engines.local import build
from preprocessing.reading.raw_files import RawFolder

shuffle.BUCKET_ROWS = 1 << 14
class Many(Dataset):
    name = "many"
    features = (*(sparse(f"s{i}", pa.int64()) for i in range(10)), *(dense(f"d{i}") for i in range(5)))
    tasks = (Task(name="t"),)
    def batches(self, raw):
        for chunk in range(num_rows // 10_000):
            random = np.random.default_rng(chunk)
            columns = {f"s{i}": random.integers(0, 1000, 10_000) for i in range(10)}
            columns |= {f"d{i}": random.random(10_000, dtype=np.float32) for i in range(5)}
            columns["label.t"] = random.integers(0, 2, 10_000).astype(np.float32)
            yield pa.RecordBatch.from_pydict(columns, schema=self.canonical_schema())

num_rows = int(sys.argv[1])
build(Many(None), RawFolder(Path(), (), ""), Path(sys.argv[2]), seed=1, parity=False, options={}, memory_bytes=64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    def peak_mib(num_rows):
        command = [sys.executable, "-c", MEMORY, str(num_rows), str(tmp_path / str(num_rows))]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        return int(result.stdout) / 1024

    # 800,000 rows of 10 x 8 + 5 x 4 + 4 bytes are 83 MB; 200,000 rows fill every buffer already
    small, large = peak_mib(200_000), peak_mib(800_000)
    assert large - small < 25
