"""The rows that are kept: one CSV file for each number of ranks, in which a point is measured or planned."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.scaling.points import Point
from mmlrec.errors import ConfigError

MEASURED, PLANNED = "measured", "planned"
GIB = 2**30


def placed_as(shardings: Iterable[str]) -> str:
    """How many tables lie how, in words."""
    return ", ".join(f"{number} {kind}" for kind, number in sorted(Counter(shardings).items()))


@dataclass(frozen=True)
class Study:
    """What all points of a folder share.

    Attributes:
        machine: processor or GPU of rank 0.
        config: name of the configuration and its overrides, as on a command line.
        base: the point that the axes vary.
        zipf: exponent of the distribution of ids; 0: uniform.
        threads: of each rank, on its CPU.
    """

    device: str
    machine: str
    threads: int
    ranks_per_host: int
    config: str
    base: str
    zipf: float


@dataclass(frozen=True)
class Row:
    """One point. What was not measured is None; lists have an entry for each rank.

    Attributes:
        kind: `MEASURED` or `PLANNED`.
        step_ms: median of three windows of steps.
        parts_ms: of a step by part, mean over the ranks.
        lookup_update_ms: of the tables alone, as a step does it; on several ranks with what they exchange.
        kernel_ms: of the kernels alone, on one rank.
        bare_ms: of the bare gather and scatter on the same tables, on one rank.
        bare_bytes: that such a call reads or writes.
        resident: bytes of each rank at the end.
        grown: bytes by which each rank has grown from before it built the model.
        sent: bytes that each rank sent in a step, as counted.
        formula: the same by the formula.
        planned: bytes of the fullest rank by the plan, all that it counts.
        missing: bytes that it has too few by the plan.
        placed: how many tables lie how.
        note: why it was not measured.
    """

    kind: str
    step_ms: float | None = None
    samples_per_second: float | None = None
    parts_ms: dict[str, float] | None = None
    lookup_update_ms: float | None = None
    kernel_ms: float | None = None
    bare_ms: float | None = None
    bare_bytes: int | None = None
    resident: list[float] | None = None
    grown: list[float] | None = None
    sent: list[float] | None = None
    formula: list[float] | None = None
    planned: int = 0
    planned_step_ms: float = 0.0
    missing: int = 0
    placed: str = ""
    note: str = ""
    torch: str = ""


Rows = dict[Point, Row]


def path_of(folder: Path, ranks: int) -> Path:
    """Where the rows of so many ranks are."""
    return folder / f"ranks-{ranks:04}.csv"


def write(folder: Path, study: Study, ranks: int, rows: Rows) -> None:
    """Write the rows of so many ranks; the file is replaced as a whole."""
    path = path_of(folder, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    with new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for kind in (Point, Study, Row) for f in fields(kind)], lineterminator="\n")
        writer.writeheader()
        for point, row in rows.items():
            values = asdict(point) | asdict(study) | asdict(row)
            writer.writerow({name: _text(value) for name, value in values.items()})
    new.replace(path)


def read(folder: Path, ranks: int, study: Study | None = None) -> tuple[Study | None, Rows]:
    """The rows of so many ranks and what they share; none where there is no file yet.

    Args:
        study: what they must share.

    Raises:
        ConfigError: the file is of another study, machine or release, or damaged.
    """
    path = path_of(folder, ranks)
    if not path.is_file():
        return study, {}
    rows: Rows = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, cells in enumerate(csv.DictReader(file), start=2):
            try:
                found = Study(**{f.name: _KINDS[str(f.type)](cells[f.name]) for f in fields(Study)})
                point = Point(**{f.name: int(cells[f.name]) for f in fields(Point)})
                rows[point] = Row(**{f.name: _KINDS[str(f.type)](cells[f.name]) for f in fields(Row)})
            except (KeyError, ValueError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: not as this release writes it ({error}). Move it away.") from error
            for name, value in asdict(found).items():
                if study is not None and value != getattr(study, name):
                    wanted = getattr(study, name)
                    raise ConfigError(
                        f"{path} holds results of {name}={value}, and this is {name}={wanted}: give another --out."
                    )
            study = found
    return study, rows


def all_rows(folder: Path) -> tuple[Study, Rows]:
    """The rows of all numbers of ranks, which must share a study.

    Raises:
        ConfigError: there are none, or they do not belong together.
    """
    study: Study | None = None
    rows: Rows = {}
    for path in sorted(folder.glob("ranks-*.csv")):
        study, more = read(folder, int(path.stem.removeprefix("ranks-")), study)
        rows |= more
    if study is None:
        raise ConfigError(f"{folder} holds no results: run python -m benchmarks.scaling --out {folder}.")
    return study, rows


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ";".join(f"{name}={_text(of)}" for name, of in value.items())
    if isinstance(value, list):
        return " ".join(_text(of) for of in value)
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.7g}"
    return str(int(value)) if isinstance(value, float) else str(value)


def _numbers(text: str) -> list[float] | None:
    return [float(word) for word in text.split()] or None


def _named(text: str) -> dict[str, float] | None:
    pairs: Iterable[list[str]] = (part.split("=") for part in text.split(";") if part)
    return {name: float(value) for name, value in pairs} or None


_KINDS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
    "int | None": lambda text: int(text) if text else None,
    "list[float] | None": _numbers,
    "dict[str, float] | None": _named,
}
