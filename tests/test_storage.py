"""Places on an object store: what s3fs does through ours, lost connections, refusals; local paths import nothing of it."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmlrec.errors import StorageError, UserError
from mmlrec.storage.places import create, is_local, place, refusal, remove_tree


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    """A folder of each kind of place."""
    if request.param == "local":
        return place(str(tmp_path / "folder"))
    if request.param == "memory":
        return place(f"memory://{request.node.name.replace('[', '-').rstrip(']')}/folder")
    return place(f"{request.getfixturevalue('store').address}/folder")


def test_what_every_place_does(folder):
    file = folder / "below" / "a.txt"
    assert not folder.exists()
    assert not file.is_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("first")
    file.write_bytes(b"second")
    (folder / "empty").write_bytes(b"")
    with (folder / "b").open("wb") as opened:
        opened.write(b"x" * 100)
    assert file.read_bytes() == b"second"
    assert (folder / "empty").read_bytes() == b""
    assert file.is_file()
    assert not file.is_dir()
    assert folder.is_dir()
    assert (folder / "b").stat().st_size == 100
    assert sorted(path.name for path in folder.iterdir()) == ["b", "below", "empty"]
    assert files_below(folder) == ["b", "below/a.txt", "empty"]
    with (folder / "b").open("rb") as opened:
        opened.seek(98)
        assert opened.read() == b"xx"
    (folder / "b").unlink()
    assert sorted(path.name for path in folder.iterdir()) == ["below", "empty"]
    with pytest.raises(FileNotFoundError):
        (folder / "b").read_bytes()
    remove_tree(folder)
    assert not folder.exists()
    remove_tree(folder)


def test_one_writer_creates(folder):
    folder.mkdir(parents=True, exist_ok=True)
    create(folder / "lease", b"mine")
    with pytest.raises(FileExistsError):
        create(folder / "lease", b"theirs")
    assert (folder / "lease").read_bytes() == b"mine"


def test_one_of_many_writers_wins(store):
    folder, won = place(store.address), []

    def write(number):
        try:
            create(folder / "lease", str(number).encode())
        except FileExistsError:
            return
        won.append(number)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [str(number).encode() for number in won] == [(folder / "lease").read_bytes()]


def test_a_lost_connection_is_tried_again(store, monkeypatch):
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "30")
    folder = place(store.address)
    (folder / "a").write_bytes(b"first")
    store.link.cut()
    threading.Timer(0.7, store.link.mend).start()
    assert (folder / "a").read_bytes() == b"first"


def test_a_connection_lost_for_good_is_named(store, monkeypatch):
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "0.5")
    folder = place(store.address)
    (folder / "a").write_bytes(b"first")
    store.link.cut()
    began = time.monotonic()
    for attempt, doing in (
        (lambda: (folder / "a").read_bytes(), "reading|looking for it"),
        (lambda: (folder / "a").write_bytes(b"second"), "writing"),
        (lambda: list(folder.iterdir()), "listing"),
        ((folder / "a").is_file, "looking for it"),
        ((folder / "a").exists, "looking for it"),
    ):
        with pytest.raises(
            StorageError, match=rf"^{store.address}.*: ({doing}) failed at http://127.*Tried \d+ times"
        ) as caught:
            attempt()
        assert caught.value.exit_code == 1
        assert "S3RVER" not in str(caught.value)  # the keys of this test
        monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "0.1")
    assert time.monotonic() - began < 30


def test_a_refusal_is_named_at_once(store):
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/a: writing failed at .*bucket does not exist") as caught:
        (place("s3://no-such-bucket") / "a").write_bytes(b"x")
    assert caught.value.exit_code == 2
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "Unable to locate credentials"),
        ({"MMLREC_STORAGE_SECONDS": "soon"}, "MMLREC_STORAGE_SECONDS=soon: a number of seconds is needed"),
        ({"AWS_ENDPOINT_URL_S3": "nonsense"}, "nonsense"),
    ],
)
def test_wrong_settings_are_named_at_once(store, monkeypatch, variables, message):
    from mmlrec.storage.s3 import RetryingS3

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    RetryingS3.clear_instance_cache()
    with pytest.raises(StorageError, match=message) as caught:
        place(f"{store.address}/a").exists()
    assert caught.value.exit_code == 2


def test_a_bucket_that_cannot_be(store):
    with pytest.raises(StorageError, match=r"^s3://No_Bucket!/a: looking for it failed"):
        place("s3://No_Bucket!/a").exists()


def test_local_paths_import_no_library_of_object_stores(tmp_path):
    code = (
        "import sys; from mmlrec.storage.places import place, create; create(place(sys.argv[1]), b'x');"
        "from preprocessing.command_line import main; import mmlrec.config, mmlrec.data.row_groups;"
        "assert main(['synthetic', '--rows', '100', '--out', sys.argv[1] + '-data']) == 0;"
        "print(sorted({'fsspec', 's3fs', 'upath', 'botocore', 'aiohttp'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules, "mmlrec.storage.s3", raising=False)
    monkeypatch.delattr("mmlrec.storage.s3", raising=False)
    with pytest.raises(UserError, match=r"^s3://b/a: addresses need packages .*pip install 'mmlrec\[s3\]'$") as caught:
        place("s3://b/a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs://bucket/a", "gs:// are neither read nor written"),
        ("file:///data", "file:// are neither read nor written"),
        ("https://h/x", "https:// are neither read nor written"),
        ("s3:/bucket/a", "is no address"),
        ("s3://", "is no address"),
        ("s3://bucket//a", "is no address"),
        ("s3://bucket/../a", "is no address"),
        ("s3://key:secret@bucket/a", "keys have no place in an address"),
        ("s3://bucket/*.parquet", "cannot stand in an address"),
    ],
)
def test_what_is_refused(text, message):
    assert message in (refusal(text) or "")
    assert "secret" not in (refusal(text) or "")
    with pytest.raises(UserError, match=message):
        place(text)


@pytest.mark.parametrize("text", ["data/a", "/data/a", "a:b/c", "x/s3:/y", "~", "c:/d", "runs/x-dense.optimizer.lr=0.1"])
def test_what_is_a_path(text):
    assert place(text) == Path(text)
    assert is_local(place(text))


@pytest.mark.cluster
def test_a_store_that_is_killed_keeps_what_was_written(disk_store, monkeypatch):
    monkeypatch.setenv("MMLREC_STORAGE_SECONDS", "30")
    folder = place(disk_store.address)
    create(folder / "a", b"first")
    with pytest.raises(FileExistsError):
        create(folder / "a", b"second")
    (folder / "large").write_bytes(b"x" * (12 << 20))
    disk_store.server.kill()
    threading.Timer(0.5, disk_store.server.start).start()
    assert (folder / "a").read_bytes() == b"first"
    assert (folder / "large").stat().st_size == 12 << 20
    assert files_below(folder) == ["a", "large"]
