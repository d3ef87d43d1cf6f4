"""What is measured: a base point, and one axis at a time around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

#: Features with one id a row, each with a table of its own of equal size; and numbers.
FEATURES, NUMBERS = 8, 4

AXES: Mapping[str, tuple[int, ...]] = {
    "ids": (10**5, 10**6, 10**7, 10**8, 10**9, 10**10),
    "batch": (1024, 4096, 16384, 65536),
    "scenarios": (2, 8, 32, 64),
    "tasks": (1, 2, 4, 8, 16),
}


@dataclass(frozen=True)
class Point:
    """One thing to measure.

    Attributes:
        ids: rows of all tables together.
        batch: global batch size.
    """

    ranks: int = 1
    ids: int = 10**6
    batch: int = 4096
    scenarios: int = 2
    tasks: int = 2

    def __str__(self) -> str:
        rest = f"{self.scenarios} scenarios, {self.tasks} task{'s' if self.tasks > 1 else ''}"
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, {self.ids:.0e} ids, batch {self.batch}, {rest}"


def points(base: Point, axes: Mapping[str, Sequence[int]]) -> list[Point]:
    """The base, each axis varied alone, and weak scaling: the batch that gives each rank as many rows as one has at the base.

    Args:
        base: with the number of ranks of all of them.
        axes: name of `AXES` -> values.
    """
    found = [base, replace(base, batch=base.batch * base.ranks)]
    for axis, values in axes.items():
        found += [replace(base, **{axis: value}) for value in values]
    return list(dict.fromkeys(found))
