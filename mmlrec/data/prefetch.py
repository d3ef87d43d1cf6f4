"""Runs an iterator ahead of its consumer in a thread. Arrow and torch release the GIL, so no process is needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """Yield `items`, made in a background thread up to `depth` ahead.

    An exception of `items` is raised here, after what preceded it. Closing this generator stops the thread and closes
    `items` before it returns.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Item | _End) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.05)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            with closing(items):
                for item in items:
                    put(item)
                    if stop.is_set():
                        return
            put(_End(None))
        except BaseException as error:  # whatever it is, the consumer has to see it
            put(_End(error))

    thread = threading.Thread(target=work, name="mmlrec-reader", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()
