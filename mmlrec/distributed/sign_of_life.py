"""A line in ten minutes: where a run is that has said nothing for so long."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

#: Longest time, in seconds, in which rank 0 logs nothing.
QUIET = 600.0


class _Heard(logging.Handler):
    """Notes when something was logged that everybody sees."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.last = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """See the base class."""
        self.last = time.monotonic()


@contextlib.contextmanager
def signs_of_life(logger: logging.Logger, where: Callable[[], str], quiet: float) -> Iterator[None]:
    """Within it, a line says where this process is whenever none was logged for `quiet` seconds.

    In a thread of its own: one that waits for a terminal must not keep the heartbeat from beating.

    Args:
        where: asked for the line.
    """
    heard, ended = _Heard(), threading.Event()

    def run() -> None:
        while not ended.wait(max(0.0, heard.last + quiet - time.monotonic())):
            if time.monotonic() >= heard.last + quiet:
                logger.info("no line for %.0f s; still at work: %s", time.monotonic() - heard.last, where())

    logger.addHandler(heard)
    thread = threading.Thread(target=run, name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=1)
        logger.removeHandler(heard)
