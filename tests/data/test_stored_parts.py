"""Datasets on an object store: the same batches, each byte fetched once, what is kept on this machine, and what goes wrong."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mmlrec.data.reader import Reader
from mmlrec.data.verification import Verification
from mmlrec.errors import DataError, StorageError
from mmlrec.schema import DatasetManifest
from mmlrec.storage.cache import Cache
from mmlrec.storage.places import place
from tests.datasets import write_dataset
from tests.storage import upload

TASKS = ["click", "buy"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Some megabyte of train in four parts of eight row groups."""
    return write_dataset(
        tmp_path_factory.mktemp("written"),
        rows=64_000,
        num_sparse=6,
        row_group_size=2_000,
        rows_per_part=16_000,
        table_rows=5_000,
    )


@pytest.fixture
def stored(written, tmp_path, monkeypatch):
    """The dataset on an object store that is quick."""
    monkeypatch.setenv("MMLREC_CACHE", str(tmp_path / "cache"))
    folder = place(f"memory://{tmp_path.name}/data")
    upload(written.folder, folder)
    return folder


@pytest.fixture
def on_s3(written, store):
    """The dataset on a server."""
    folder = place(f"{store.address}/data")
    upload(written.folder, folder)
    store.link.num_bytes = 0
    return folder


def batches(folder, split="train", **options):
    manifest = DatasetManifest.load(folder)
    reader = Reader(folder, manifest, split, tasks=TASKS, batch_size=4_000, **options)
    return list(reader.epoch(0) if split == "train" else reader.sequential())


def equal(these, those):
    for this, that in zip(these, those, strict=True):
        assert torch.equal(this.sparse.values(), that.sparse.values())
        for name in ("dense", "labels", "mask", "scenario", "weight", "valid", "row", "group"):
            assert torch.equal(getattr(this, name), getattr(that, name)), name


def part_bytes(manifest, *splits):
    return sum(part.num_bytes for split in splits for part in manifest.splits[split].parts)


def verified(folder, manifest, *splits):
    verification = Verification()
    for split in splits:
        verification.add(folder, manifest.splits[split].parts)
    assert verification.finished(30)
    return verification.failure


def test_batches_are_those_of_the_local_folder(written, stored, on_s3):
    for split in ("train", "valid"):
        expected = batches(written.folder, split, rank=1, world_size=2)
        equal(batches(stored, split, rank=1, world_size=2), expected)
        equal(batches(on_s3, split, rank=1, world_size=2), expected)


def test_each_byte_is_fetched_once(written, on_s3, store):
    """By the reader, who meets the row groups in another order and several times, and by who compares the checksums."""
    batches(on_s3)
    read = store.link.num_bytes
    assert read <= 1.1 * part_bytes(written.manifest, "train")
    assert verified(on_s3, written.manifest, "train") is None
    assert store.link.num_bytes <= read + 1_000
    batches(on_s3, "valid")
    batches(on_s3)
    assert store.link.num_bytes <= 1.1 * part_bytes(written.manifest, "train", "valid")


def test_a_rank_fetches_what_it_reads(written, on_s3, store, monkeypatch):
    """Without a cache, too: one of four ranks, each on a machine of its own, fetches a quarter and what it shares."""
    monkeypatch.setenv("MMLREC_CACHE_GIB", "0")
    batches(on_s3, rank=0, world_size=4)
    footers = sum(
        pq.read_metadata(written.folder / part.path).serialized_size for part in written.manifest.splits["train"].parts
    )
    assert store.link.num_bytes <= 1.1 * (part_bytes(written.manifest, "train") * 8 / 32 + footers)


def test_a_damaged_object_is_named_and_not_kept(written, stored, tmp_path):
    part = written.manifest.splits["train"].parts[1]
    whole = (written.folder / part.path).read_bytes()
    (stored / part.path).write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    failure = verified(stored, written.manifest, "train")
    assert isinstance(failure, DataError)
    assert str(failure).startswith(f"{stored / part.path} is damaged: its checksum is ")
    (stored / part.path).write_bytes(whole)
    assert verified(stored, written.manifest, "train") is None


def test_what_is_kept_and_damaged_is_fetched_again(written, stored, tmp_path):
    expected = batches(written.folder)
    equal(batches(stored), expected)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert len(kept) == 4 * (8 + 1)
    for path in kept:
        if path.name != "footer":
            path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    equal(batches(stored), expected)
    assert verified(stored, written.manifest, "train") is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path, data: path.unlink(), "the file is missing, but the manifest lists it"),
        (lambda path, data: path.write_bytes(data[:-1]), "cut off or changed"),
        (lambda path, data: path.write_bytes(bytes(len(data))), "not a readable Parquet file"),
    ],
)
def test_bad_parts_are_named(written, stored, spoil, message):
    part = written.manifest.splits["train"].parts[2]
    path = stored / part.path
    spoil(path, (written.folder / part.path).read_bytes())
    with pytest.raises(DataError, match=rf"^{path}: .*{message}"):
        batches(stored)


def test_no_dataset_there(stored):
    with pytest.raises(DataError, match=rf"^{stored}-x is no.* a dataset: the folder does not exist"):
        DatasetManifest.load(place(f"{stored}-x"))
    with pytest.raises(DataError, match="it has no manifest"):
        DatasetManifest.load(stored / "train")


def test_the_cache_keeps_to_its_bound_and_drops_what_was_not_used_for_longest(tmp_path):
    cache, fetched = Cache(tmp_path, 100_000), []

    def get(name):
        return cache.get("file", name, lambda: fetched.append(name) or name.encode() * 1_000)

    for number in range(30):
        assert get(f"piece{number:02d}") == f"piece{number:02d}".encode() * 1_000
        get("piece00")  # is used all the time
        time.sleep(0.002)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 110_000
    assert fetched == [f"piece{number:02d}" for number in range(30)]
    get("piece29")
    get("piece00")
    get("piece01")
    assert fetched[30:] == ["piece01"]


def test_a_piece_that_another_process_drops_while_it_is_written_is_only_not_kept(tmp_path, monkeypatch):
    mine, others, plain = Cache(tmp_path, 100), Cache(tmp_path, 100), Path.rename

    def rename(path, target):
        monkeypatch.setattr(Path, "rename", plain)
        assert others.get("file", "b", lambda: b"b" * 1_000) == b"b" * 1_000
        return plain(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert mine.get("file", "a", lambda: b"a" * 1_000) == b"a" * 1_000


FETCH = """
import sys, time
from pathlib import Path
from mmlrec.storage.cache import Cache
folder, log = map(Path, sys.argv[1:])
def fetch(name):
    time.sleep(0.05)
    with log.open("a") as file:
        file.write(name + "\\n")
    return name.encode() * 100
cache = Cache(folder, 1 << 20)
for name in ("a", "b", "c"):
    assert cache.get("file", name, lambda: fetch(name)) == name.encode() * 100
"""


def test_processes_fetch_nothing_twice(tmp_path):
    command = [sys.executable, "-c", FETCH, tmp_path / "cache", tmp_path / "log"]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == ["a", "b", "c"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=rf"^{tmp_path}/file: what is read .* cannot be kept here: .*MMLREC_CACHE"):
        Cache(tmp_path / "file", 1000).get("a", "b", bytes)


def test_a_connection_that_is_cut_while_batches_are_read(written, on_s3, store, monkeypatch):
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "30")
    reader = Reader(on_s3, DatasetManifest.load(on_s3), "train", tasks=TASKS, batch_size=4_000)
    store.link.cut_after(3)
    threading.Timer(0.8, store.link.mend).start()
    equal(list(reader.epoch(0)), batches(written.folder))


def test_a_connection_that_is_cut_for_good(written, on_s3, store, monkeypatch):
    reader = Reader(on_s3, DatasetManifest.load(on_s3), "train", tasks=TASKS, batch_size=4_000)
    store.link.cut_after(3)
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "0.3")
    with pytest.raises(StorageError, match=rf"^{on_s3}/train/part-\d+.parquet: reading failed at http://127"):
        list(reader.epoch(0))
