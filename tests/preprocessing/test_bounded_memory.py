"""The same bytes whatever the workers, the memory, the pieces and the buckets; memory that does not grow with the rows."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import Scenario, Task
from preprocessing.dataset import Dataset, dense, multi, sparse
from preprocessing.encoding import dictionaries, ranking
from preprocessing.engines.local import build
from preprocessing.reading import raw_files
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import RawFile, RawFolder
from preprocessing.writing import parts, shuffle
from tests.preprocessing.movielens_fake import folder_bytes

ROOT = Path(__file__).parents[2]
NUM_ROWS = 12_000


class Log(Dataset):
    """Every kind of column: shared tables, lists, texts and numbers with missing values, groups by scenario."""

    name = "log"
    raw_files = (RawFile("log.csv"),)

    def __init__(self, min_count=2):
        self.features = (
            sparse("user", pa.int64()),
            sparse("item", min_count=min_count, table="item"),
            sparse("last", min_count=min_count, table="item"),
            multi("tags", min_count=3),
            dense("price"),
        )
        self.tasks = (Task(name="click", role="ctr"),)
        self.scenario = Scenario(name="page", values=["a", "b"])
        self.keys = {"user": pa.int64(), "text": pa.string()}
        self.group_key = "user"

    def sources(self):
        number, text = pa.int64(), pa.string()
        columns = {
            "user": number,
            "item": text,
            "last": text,
            "tags": text,
            "price": pa.float32(),
            "page": number,
            "click": number,
        }
        yield DelimitedText("log.csv", ",", columns)

    def rows(self, block):
        columns = {name: block.table[name] for name in ("user", "item", "last", "price")}
        empty = pa.compute.equal(block.table["tags"], "")
        tags = pa.compute.split_pattern(block.table["tags"], "|").combine_chunks()
        columns["tags"] = pa.compute.if_else(empty, pa.scalar(None, tags.type), tags)
        columns |= {"item": _missing_if_empty(block.table["item"]), "last": _missing_if_empty(block.table["last"])}
        columns |= {"sample.scenario": block.table["page"], "label.click": block.table["click"].cast(pa.float32())}
        return columns | {"key.user": block.table["user"], "key.text": block.table["last"]}


def _missing_if_empty(column):
    return pa.compute.if_else(pa.compute.equal(column, ""), None, column)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    random = np.random.default_rng(3)
    with (folder / "log.csv").open("w") as file:
        for row in range(NUM_ROWS):
            item, last = (int(500 * x**3) for x in random.random(2))
            tags = "|".join(f"t{int(40 * x**2)}" for x in random.random(random.integers(0, 4)))
            name = "" if item % 50 == 7 else f"item-{item}-{'x' * (item % 20)}"
            price = "" if row % 9 == 0 else f"{random.normal():.4f}"
            user = int(random.integers(-900, 900)) * 10**15
            before = f"item-{last}-" if last % 3 else f"only-{row}"
            file.write(f"{user},{name},{before},{tags},{price},{row % 3 % 2},{row % 5 == 0:d}\n")
    return folder


def make(log, out, *, workers=2, parity=False, **options):
    dataset = Log()
    raw = RawFolder(log, dataset.raw_files, "", workers=workers)
    return build(dataset, raw, out, seed=5, parity=parity, options={}, **options)


@pytest.fixture(scope="module", params=[False, True], ids=["fitted on train", "parity"])
def ample(request, log, tmp_path_factory):
    out = tmp_path_factory.mktemp("ample") / "out"
    manifest = make(log, out, parity=request.param)
    assert manifest.statistics["rows"] == NUM_ROWS
    return request.param, folder_bytes(out)


def test_bytes_do_not_depend_on_workers(log, ample, tmp_path):
    parity, expected = ample
    for workers in (1, 5):
        make(log, tmp_path / str(workers), workers=workers, parity=parity)
        assert folder_bytes(tmp_path / str(workers)) == expected


def test_bytes_do_not_depend_on_pieces_and_buckets(log, ample, tmp_path, monkeypatch):
    parity, expected = ample
    monkeypatch.setattr(raw_files, "PIECE_BYTES", 7_000)
    monkeypatch.setattr(shuffle, "BUCKET_ROWS", 700)
    make(log, tmp_path / "out", parity=parity)
    assert folder_bytes(tmp_path / "out") == expected


@pytest.mark.parametrize("memory_bytes", [1 << 10, 1 << 16, 1 << 19])
def test_bytes_do_not_depend_on_memory(log, ample, tmp_path, monkeypatch, memory_bytes):
    parity, expected = ample
    spilled = []
    close = dictionaries.Dictionary._close
    monkeypatch.setattr(dictionaries.Dictionary, "_close", lambda self: spilled.append(self) or close(self))
    monkeypatch.setattr(raw_files, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(ranking, "_MERGED_BYTES", 1 << 20)  # so that runs are merged batch by batch
    make(log, tmp_path / "out", parity=parity, memory_bytes=memory_bytes, workers=3)
    assert len(spilled) > 5
    assert folder_bytes(tmp_path / "out") == expected


def test_vocabulary_is_what_a_counter_gives(log, tmp_path):
    """The ground the other tests stand on: counts of train rows, ids by (descending count, value)."""
    make(log, tmp_path / "out", memory_bytes=1 << 10)
    vocabulary = pq.read_table(tmp_path / "out/vocab/item.parquet")
    decoded = [None, *vocabulary["value"].to_pylist()]
    train = pq.read_table(tmp_path / "out/train")
    counts = {}
    for name in ("item", "last"):
        for k in train[name].to_pylist():
            counts[decoded[k]] = counts.get(decoded[k], 0) + 1
    missing = counts.pop(None)
    assert missing > 100
    expected = sorted(((value, count) for value, count in counts.items()), key=lambda entry: (-entry[1], entry[0]))
    assert list(zip(vocabulary["value"].to_pylist(), vocabulary["count"].to_pylist(), strict=True)) == expected
    assert vocabulary["id"].to_pylist() == list(range(1, len(expected) + 1))
    assert min(counts.values()) == 2
    texts = train["key.text"].to_pylist()
    assert all(k == 0 or decoded[k] == text for k, text in zip(train["last"].to_pylist(), texts, strict=True))


def test_groups_of_scenarios_are_counted_once_each(log, tmp_path):
    rows = [line.split(",") for line in (log / "log.csv").read_text().splitlines()]
    expected = {name: len({row[0] for row in rows if row[5] == str(k)}) for k, name in enumerate("ab")}
    for memory_bytes in (1 << 10, 1 << 32):
        manifest = make(log, tmp_path / str(memory_bytes), memory_bytes=memory_bytes)
        assert manifest.statistics["scenario_users"] == expected


def test_parts_are_cut_and_joined(log, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_ROWS", 2048)
    manifest = make(log, tmp_path / "out", workers=3)
    train = manifest.splits["train"]
    assert [part.num_rows for part in train.parts] == [2048] * 4 + [1408]
    for part in train.parts:
        content = (tmp_path / "out" / part.path).read_bytes()
        assert (part.num_bytes, part.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    table = pq.read_table(tmp_path / "out/train")
    assert table.num_rows == train.num_rows == 9600
    for scenario, name in enumerate("ab"):
        here = table.filter(pa.compute.equal(table["sample.scenario"], scenario))
        assert train.scenario_rows[name] == here.num_rows
        assert train.label_counts["click"][name] == (here.num_rows, int(pa.compute.sum(here["label.click"]).as_py()))


BIG = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from mmlrec.schema import Task
from preprocessing.dataset import Dataset, dense, sparse
from preprocessing.engines.local import build
from preprocessing.reading.raw_files import RawFolder

class Many(Dataset):
    name = "many"
    features = (*(sparse(f"s{i}") for i in range(4)), *(dense(f"d{i}") for i in range(4)))
    tasks = (Task(name="t"),)
    def batches(self, raw):
        for chunk in range(num_rows // 20_000):
            random = np.random.default_rng(chunk)
            ids = random.integers(0, 1 << 62, (4, 20_000))  # nearly every value is new
            columns = {f"s{i}": pa.array(ids[i]).cast(pa.string()) for i in range(4)}
            columns |= {f"d{i}": random.random(20_000, dtype=np.float32) for i in range(4)}
            columns["label.t"] = random.integers(0, 2, 20_000).astype(np.float32)
            yield pa.RecordBatch.from_pydict(columns, schema=self.canonical_schema())

num_rows = int(sys.argv[1])
if len(sys.argv) > 4:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
raw, out, memory_bytes = RawFolder(Path(), (), "", workers=2), Path(sys.argv[2]), int(sys.argv[3])
build(Many(None), raw, out, seed=1, parity=False, options={}, memory_bytes=memory_bytes)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def big(out, num_rows, memory_bytes, *limit):
    command = [sys.executable, "-c", BIG, str(num_rows), str(out), str(memory_bytes), *map(str, limit)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_memory_stays_within_the_setting_though_vocabularies_do_not_fit(tmp_path):
    def peak_mib(num_rows):
        output, errors = big(tmp_path / str(num_rows), num_rows, 512 << 20).communicate(timeout=300)
        assert output, errors
        return int(output) / 1024

    # 4.8 million more distinct strings of 19 bytes would take 130 MB, with offsets, and as much again to be found by
    small, large = peak_mib(400_000), peak_mib(1_600_000)
    assert large < 512
    assert large - small < 128


def test_full_disk_in_a_thread_is_told_and_leaves_nothing(tmp_path):
    for limit in (50_000, 1_000_000):  # a dictionary; the coded rows
        process = big(tmp_path / "out", 60_000, 1 << 20, limit)
        _, errors = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "the dataset cannot be written: File too large" in errors
        assert list(tmp_path.iterdir()) == []


def test_kill_while_dictionaries_are_on_disk_is_cleaned_up_by_the_next_start(tmp_path):
    out = tmp_path / "out"
    process = big(out, 2_000_000, 1 << 20)
    for _ in range(600):
        if list(tmp_path.glob(".out.tmp/scratch/coder/dictionaries/*.arrow")):
            break
        time.sleep(0.05)
    else:
        pytest.fail("no dictionary went to disk")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == [".out.tmp"]
    process = big(out, 20_000, 1 << 20)
    assert process.communicate(timeout=120)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "test", "train", "valid", "vocab"]
