"""A service as a process of its own, and clients that do what no library does."""

import contextlib
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests import processes


class Served:
    """`python -m apps.serve` on a free port."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        arguments = [sys.executable, "-m", "apps.serve", "--model", str(model), "--port", "0", *options]
        self.log = log
        self.command = processes.Command(arguments, log=log)
        deadline = time.monotonic() + 120
        while not (found := re.search(r"ready: http://127.0.0.1:(\d+)/", log.read_text())):
            assert self.command.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def peak_bytes(self) -> int:
        """The most memory that it has held."""
        status = Path(f"/proc/{self.command._process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            yield connection


@contextlib.contextmanager
def served(model: Path, log: Path, *options: str) -> Iterator[Served]:
    service = Served(model, log, *options)
    try:
        yield service
    finally:
        service.command.kill()


def head(body_bytes: int | str) -> bytes:
    """Of a request to score."""
    return f"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: {body_bytes}\r\n\r\n".encode()


def answer(connection: socket.socket) -> tuple[int, dict]:
    """Status and content of the answer, when the server has closed the connection."""
    text = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            text += piece
    start, _, body = text.partition(b"\r\n\r\n")
    return int(start.split()[1]), json.loads(body)
