"""`--raw` and `--out` on an object store: bytes as of local folders, whole or no dataset, nothing of others touched."""

import os
import tempfile

import pytest

from mmlrec.storage.places import place
from preprocessing.command_line import main
from preprocessing.writing.upload import MARK
from tests.preprocessing.movielens_fake import write_movielens
from tests.storage import upload
from tests.test_own_table import write_log

NAME = "movielens-1m"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Raw files, and a dataset made of them in a local folder."""
    folder = tmp_path_factory.mktemp("movielens")
    write_movielens(folder / "raw", 2_000)
    assert main([NAME, "--raw", str(folder / "raw"), "--out", str(folder / "data")]) == 0
    return folder


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where copies lie while they are needed; empty at the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def stored(scratch, tmp_path):
    """A folder on an object store that is quick."""
    return place(f"memory://{tmp_path.name}")


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(raw, out, *options):
    return main([NAME, "--raw", str(raw), "--out", str(out), *options])


def test_the_bytes_are_those_of_local_folders(raw, scratch, store, capfd):
    there = place(store.address)
    upload(raw / "raw", there / "raw")
    (scratch / f"mmlrec-raw-{os.geteuid()}-left").mkdir()  # by one that was killed
    assert make(there / "raw", there / "data") == 0
    assert content(there / "data") == content(raw / "data")
    assert f"dataset.path={store.address}/data" in capfd.readouterr().out
    assert make(there / "raw", there / "data") == 0
    assert f"{store.address}/data: already there, made from the same raw files" in capfd.readouterr().out
    assert main(["describe", f"{store.address}/data"]) == 0
    described = capfd.readouterr().out
    assert main(["describe", str(raw / "data")]) == 0
    assert described.splitlines()[1:] == capfd.readouterr().out.splitlines()[1:]


def test_a_table_is_read_and_written_there(tmp_path, stored, monkeypatch):
    monkeypatch.setenv("MMLREC_CACHE", str(tmp_path / "cache"))
    write_log(tmp_path / "mine")
    arguments = ["table", "--config", str(tmp_path / "mine" / "table.yaml")]
    assert main([*arguments, "--out", str(tmp_path / "data")]) == 0
    upload(tmp_path / "mine", stored / "raw")
    (stored / "raw" / "large, and nobody asks for it").write_bytes(b"x")
    assert main([*arguments, "--raw", str(stored / "raw"), "--out", str(stored / "data")]) == 0
    assert content(stored / "data") == content(tmp_path / "data")


def test_complaints_name_the_object(raw, stored, tmp_path, capfd):
    upload(raw / "raw", stored / "raw")
    (ratings,) = [path for path in (stored / "raw").rglob("*") if path.name == "ratings.dat"]
    ratings.write_bytes(ratings.read_bytes() + b"nonsense\n")
    assert make(stored / "raw", tmp_path / "data") == 2
    assert f"error: {ratings}, line 2001: " in capfd.readouterr().err
    ratings.unlink()
    assert make(stored / "raw", tmp_path / "data") == 2
    assert f"error: raw folder {stored / 'raw'} lacks: ratings.dat" in capfd.readouterr().err
    assert make(stored / "nothing", tmp_path / "data") == 2
    assert f"error: {stored / 'nothing'}: there is nothing" in capfd.readouterr().err


_MORE = [pytest.param(requests, marks=pytest.mark.cluster) for requests in (2, 6, 9, 17, 20, 25)]


@pytest.mark.parametrize("requests", [1, 12, 22, *_MORE])
def test_cut_for_good_while_it_is_written(raw, scratch, store, monkeypatch, capfd, requests):
    """What is left is no dataset, and the next attempt makes it whole."""
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "0.2")
    out = place(f"{store.address}/data")
    (out / "train" / "part-99999.parquet").write_bytes(b"of an attempt that was killed")
    (out / MARK).write_bytes(b"of it")
    store.link.cut_after(requests)
    assert make(raw / "raw", out) == 1
    error = capfd.readouterr().err
    assert f"error: {store.address}/data" in error
    assert error.count("error: ") == 1
    assert " failed at http://127.0.0.1" in error
    store.link.mend()
    assert not (out / "manifest.json").exists() or content(out) == content(raw / "data") | {MARK: content(out)[MARK]}
    assert make(raw / "raw", out) == 0
    assert content(out) == content(raw / "data")


def test_a_dataset_is_replaced_and_anything_else_is_not(raw, stored, capfd):
    assert make(raw / "raw", stored) == 0
    assert make(raw / "raw", stored, "--seed", "5") == 2
    assert "made with other options: seed=2024 (now 5)" in capfd.readouterr().err
    (stored / "train" / "part-00001.parquet").write_bytes(b"stale")
    assert make(raw / "raw", stored, "--seed", "5", "--overwrite") == 0
    assert content(stored).keys() == content(raw / "data").keys()
    assert content(stored) != content(raw / "data")
    (stored / "notes").write_bytes(b"mine")
    assert make(raw / "raw", stored, "--overwrite") == 2
    assert "holds more than a dataset (notes)" in capfd.readouterr().err
    (stored / "manifest.json").unlink()
    assert make(raw / "raw", stored, "--overwrite") == 2
    assert "exists and is no dataset, so it is never replaced" in capfd.readouterr().err
    assert (stored / "notes").read_bytes() == b"mine"


def test_of_two_writers_the_first_gives_way(raw, stored, monkeypatch, capfd):
    from preprocessing.engines import local

    complete = local.complete

    def another_begins(*arguments):
        (stored / MARK).write_bytes(b"another")
        return complete(*arguments)

    monkeypatch.setattr(local, "complete", another_begins)
    assert make(raw / "raw", stored) == 2
    assert f"error: {stored}: another run is writing this dataset" in capfd.readouterr().err
    assert content(stored) == {MARK: b"another"}


def test_what_cannot_be_at_an_address(raw, store, capfd):
    assert make(store.address, "data", "--download") == 2
    assert "--download: files are fetched into a folder" in capfd.readouterr().err
    assert make(raw / "raw", f"{store.address}/data", "--engine", "spark") == 2
    assert "--engine spark: --raw and --out must be folders" in capfd.readouterr().err
