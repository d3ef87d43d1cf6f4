"""Object stores for tests, on this machine: moto in this process, and s3rver, which keeps its data on disk and can be killed.

    def test_something(store):                 # moto; `pytest_plugins` in conftest.py makes the fixtures known
        folder = place(f"{store.address}/run") # s3://bucket/..., a bucket of its own for every test
        store.link.cut()                       # connections end, and new ones are refused, until mend()
        store.link.cut_after(3)                # the third request from now on is the last that arrives
        store.link.delay = 0.05                # seconds before each piece of data in either direction
        store.link.requests                    # "PUT /bucket/run/config.yaml", in the order in which they came
        store.link.num_bytes                   # that the server has sent

Processes inherit what is needed (AWS_* and MMLREC_STORAGE_SECONDS=2 in os.environ): give them os.environ as it is. `disk_store`
is the same with s3rver: `store.server.kill()` (SIGKILL) and `store.server.start()`; what was written before is there again.
Tests that ask for it need `@pytest.mark.cluster`, and are skipped where s3rver is not installed (`make test-cluster` does it).
"""

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mmlrec.storage.places import Place

#: `npm install --prefix FOLDER s3rver@3.7.1`
S3RVER = Path(os.environ.get("S3RVER", Path(sys.prefix) / "s3rver"))
_SCRIPT = Path(__file__).with_name("s3rver.js")
_REQUEST = re.compile(rb"(?:^|\r\n|[^\r\n])(GET|PUT|HEAD|POST|DELETE) (\S+) HTTP/1\.1\r\n")


class Link:
    """A connection to a server that can be cut, slowed and counted: clients come to `port`, all goes on to `target`."""

    def __init__(self, target: int) -> None:
        self.target, self.delay = target, 0.0
        self.requests: list[str] = []
        self.num_bytes = 0
        self._left: int | None = None
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = 0
        self.mend()

    def mend(self) -> None:
        """Let connections in, at the port as before. Nothing is left of cut_after and delay."""
        self._left, self.delay = None, 0.0
        if self._listener is not None:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port, self._listener = listener.getsockname()[1], listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        with self._lock:
            listener, self._listener = self._listener, None
            ends, self._ends = self._ends, set()
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut_after(self, num_requests: int) -> None:
        """Cut when so many more requests have come; the last of them is not answered, and may or may not arrive."""
        self._left = num_requests

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                if self._listener is not listener:
                    return
                client.close()
                continue
            with self._lock:
                self._ends |= {client, server}
            threading.Thread(target=self._copy, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._copy, args=(server, client, False), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.delay:
                    time.sleep(self.delay)
                if from_client:
                    self._count(data)
                else:
                    self.num_bytes += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        with self._lock:
            self._ends -= {source, sink}

    def _count(self, data: bytes) -> None:
        for method, target in _REQUEST.findall(data):
            self.requests.append(f"{method.decode()} {target.decode()}")
            if self._left is not None:
                self._left -= 1
                if self._left <= 0:
                    self.cut()


class Moto:
    """moto's server in this process. Holds all in memory: cut its link, do not end it."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]


class S3rver:
    """A process of its own, with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, with what the folder holds."""
        command = ["node", str(_SCRIPT), str(S3RVER / "node_modules" / "s3rver"), str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert self.process.poll() is None, "s3rver ended"
            time.sleep(0.05)
        raise AssertionError("s3rver does not start")

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@dataclass
class Store:
    """A bucket, and the way to it."""

    address: str
    link: Link
    server: Any
    environment: dict[str, str] = field(default_factory=dict)


def upload(folder: Path, there: Place) -> None:
    """Put what a folder holds to a place."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (there / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


def _store(server: Any, link: Link, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Store:
    from mmlrec.storage.s3 import RetryingS3

    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    environment = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{link.port}",
        "AWS_ACCESS_KEY_ID": "S3RVER",
        "AWS_SECRET_ACCESS_KEY": "S3RVER",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "MMLREC_STORAGE_SECONDS": "2",
    }
    environment["MMLREC_CACHE"] = str(cache)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    RetryingS3.clear_instance_cache()
    link.mend()
    RetryingS3().call_s3("create_bucket", Bucket=bucket)
    link.requests.clear()
    link.num_bytes = 0
    return Store(f"s3://{bucket}", link, server, environment)


@pytest.fixture(scope="session")
def _moto():
    server = Moto()
    return server, Link(server.port)


@pytest.fixture
def store(_moto, monkeypatch, tmp_path):
    """A bucket of moto's."""
    server, link = _moto
    yield _store(server, link, monkeypatch, tmp_path / "cache")
    link.mend()


@pytest.fixture
def disk_store(tmp_path, monkeypatch):
    """A bucket of s3rver's."""
    if shutil.which("node") is None or not (S3RVER / "node_modules" / "s3rver").is_dir():
        pytest.skip(f"s3rver is not in {S3RVER}: npm install --prefix {S3RVER} s3rver@3.7.1")
    server = S3rver(tmp_path / "s3rver")
    link = Link(server.port)
    yield _store(server, link, monkeypatch, tmp_path / "cache")
    link.cut()
    server.kill()
