"""Listening, time-outs of connections, and the end: what was asked is answered, what is asked then is refused."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmlrec.errors import UserError
from mmlrec.serving.service import Service

#: How long connections are still taken after a signal, to be refused: a client that has just connected gets an answer.
_REFUSING_SECONDS = 1.0
#: Connections between two requests are kept so long: longer than the minute after which proxies give theirs up.
_IDLE_SECONDS = 75
#: Connections that wait to be accepted.
_BACKLOG = 2048
_TOO_SLOW = b'{"error": "the head of a request did not arrive in time: send it faster."}'
_SLOW_HEAD = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}. Choose another one.") from error
    # Connections have it from here. asyncio sets it only where a socket names its protocol; without it the body of an answer
    # waits until the client has acknowledged the head, 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def serve(service: Service, listening: socket.socket, seconds: float) -> None:
    """Answer requests until SIGTERM or SIGINT.

    Args:
        seconds: time-out of a client that sends the head of a request, or takes its answer, too slowly.
    """
    config = uvicorn.Config(
        service,
        http=type("Protocol", (_Protocol,), {"limit": seconds}),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=math.ceil(3 * seconds),  # body, scores and answer take each as long at most
    )
    asyncio.run(_Server(config, service).serve(sockets=[listening]))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours: uvicorn's stops listening at once, and ends the process by the signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, loop)
        yield

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        self._service.ending = True
        loop.call_later(_REFUSING_SECONDS, setattr, self, "should_exit", True)


class _Protocol(H11Protocol):
    """uvicorn's, with time-outs for clients that send a head, or take an answer, too slowly: it has none for these."""

    limit: float
    _head_due: asyncio.TimerHandle | None = None
    _answer_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._idle():
            self._expect_head()
        else:
            self._expect_no_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_no_head()
        if self._answer_due is not None:
            self._answer_due.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not take what is sent."""
        super().pause_writing()
        self._answer_due = self.loop.call_later(self.limit, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer_due is not None:
            self._answer_due.cancel()

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._head_due is None:
            self._head_due = self.loop.call_later(self.limit, self._head_is_late)

    def _expect_no_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _head_is_late(self) -> None:
        self._head_due = None
        if self._idle() and not self.transport.is_closing():
            self.transport.write(_SLOW_HEAD % (len(_TOO_SLOW), _TOO_SLOW))
            self.transport.close()
