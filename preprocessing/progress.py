"""Progress of long passes: a bar at a terminal, one line a pass elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class Counter(Protocol):
    """Counts what a pass has done."""

    def update(self, n: int) -> object:
        """`n` more units are done."""


class _Count:
    def __init__(self) -> None:
        self.n = 0

    def update(self, n: int) -> None:
        self.n += n


@contextmanager
def progress(what: str, total: int | None = None, unit: str = "rows") -> Iterator[Counter]:
    """Show a pass. `total` in units of `unit`; None when unknown."""
    if sys.stderr.isatty():
        with tqdm(desc=what, total=total, unit=" " + unit, unit_scale=True) as bar:
            yield bar
        return
    count, start = _Count(), time.perf_counter()
    yield count
    print(f"{what}: {count.n:,} {unit} in {time.perf_counter() - start:.1f} s", file=sys.stderr)
