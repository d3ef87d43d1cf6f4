"""What was read of the parts of datasets on an object store, kept on this machine's disk for the next epoch, rank and run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from mmlrec.errors import StorageError

FOLDER, GIB = "MMLREC_CACHE", "MMLREC_CACHE_GIB"
_DEFAULT_GIB = 20.0
_DIGEST_BYTES = hashlib.sha256().digest_size


class Cache:
    """Pieces of files, each whole or absent. All processes of a machine share it; none fetches what another one is fetching.

    Behind each piece stands its checksum: one that is damaged is fetched again. When there is too much, those that were not
    used for longest go.

    Args:
        folder: where they lie; made when it is needed.
        max_bytes: that they may take, but for the pieces that come while it is counted; 0 keeps none.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._uncounted = max_bytes  # bytes written since the pieces were counted; at the first, nobody knows

    def get(self, file: str, piece: str, fetch: Callable[[], bytes]) -> bytes:
        """A piece of a file, from `fetch` when it is not held.

        Args:
            file: identifies the content of the file.
            piece: identifies the piece in it; a name.

        Raises:
            StorageError: the folder cannot be written.
        """
        if not self._max_bytes:
            return fetch()
        folder = self._folder / hashlib.sha256(file.encode()).hexdigest()[:32]
        path = folder / piece
        try:
            if (held := _read(path)) is not None:
                return held
            self._make(folder)
            with _locked(folder / f"{piece}.lock"):
                if (held := _read(path)) is not None:
                    return held
                data = fetch()
                self._write(path, data)
                return data
        except OSError as error:
            raise StorageError(
                f"{self._folder}: what is read of an object store cannot be kept here: {error.strerror or error}. {FOLDER}"
                f" names another folder, {GIB} how much may lie there; 0 keeps nothing."
            ) from error

    def forget(self, file: str) -> None:
        """Drop what is held of a file."""
        folder = self._folder / hashlib.sha256(file.encode()).hexdigest()[:32]
        for path in folder.glob("*[!k]"):  # locks stay: another process may hold one
            path.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._folder.stat().st_uid != os.geteuid():
            raise StorageError(f"{self._folder} belongs to another user. {FOLDER} names another folder.")

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.write(hashlib.sha256(data).digest())
            with suppress(FileNotFoundError):  # another process, with too much there, has dropped it
                temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._uncounted += len(data)
        if self._uncounted > self._max_bytes // 50:
            self._uncounted = 0
            self._drop_oldest(path)

    def _drop_oldest(self, newest: Path) -> None:
        held = []
        for path in self._folder.glob("*/*[!k]"):
            with suppress(FileNotFoundError):
                status = path.stat()
                held.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            if total <= self._max_bytes or path == newest:
                return
            path.unlink(missing_ok=True)
            total -= size


def cache() -> Cache:
    """The cache of this machine, as the environment says.

    Raises:
        StorageError: there is no folder for it, or its size is no number.
    """
    text = os.environ.get(GIB, str(_DEFAULT_GIB))
    try:
        max_bytes = int(float(text) * (1 << 30))
        folder = os.environ.get(FOLDER) or os.path.join(tempfile.gettempdir(), f"mmlrec-cache-{os.geteuid()}")
    except ValueError:
        raise StorageError(f"{GIB}={text}: a number of GiB is needed.") from None
    except FileNotFoundError as error:
        raise StorageError(f"no folder for what is read of an object store: {error}. Name one in {FOLDER}.") from error
    return Cache(Path(folder), max_bytes)


def _read(path: Path) -> bytes | None:
    """What a piece holds, None when it is not there or damaged. It is the newest now."""
    try:
        data = path.read_bytes()
        os.utime(path)
    except FileNotFoundError:
        return None
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
