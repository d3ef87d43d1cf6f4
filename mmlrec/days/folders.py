"""The days: dataset folders in the order of their names, each made with `--extend` of the one before."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmlrec.errors import ConfigError, DataError
from mmlrec.identity import encoding_differences
from mmlrec.paths import scheme_of
from mmlrec.schema import SPLITS, DatasetManifest
from mmlrec.storage.places import Place, place


@dataclass(frozen=True)
class Day:
    """One day's dataset. Its name is that of the folder."""

    name: str
    folder: Place
    manifest: DatasetManifest

    @property
    def rows(self) -> dict[str, int]:
        """Split -> rows."""
        return {name: split.num_rows for name, split in self.manifest.splits.items()}


def find_days(pattern: str) -> list[Day]:
    """The dataset folders that a pattern means, in the order of their names.

    Args:
        pattern: such as data/day-*; of an address, s3://bucket/data/day-*, the last part alone may be a pattern.

    Raises:
        ConfigError: it means no folder, two of one name, or numbers that come in another order as texts where no vocabulary
            has grown and so tells which day extends which.
        DataError: one of them is no dataset, or lacks a split.
    """
    folders = sorted(_folders(pattern), key=lambda folder: (folder.name, str(folder)))
    if not folders:
        raise ConfigError(f"--days {pattern}: no such folder. Put the pattern into quotes, so that the shell leaves it.")
    for one, other in itertools.pairwise(folders):
        if one.name == other.name:
            raise ConfigError(f"--days {pattern}: {one} and {other} have one name, which days are told apart by.")
    days = [Day(folder.name, folder, DatasetManifest.load(folder)) for folder in folders]
    for before, day in itertools.pairwise(days):
        # Where a vocabulary has grown, or has fewer values, `check_extended` tells.
        if not any(new_ids(before.manifest, day.manifest).values()) and _numbered(before.name) > _numbered(day.name):
            raise ConfigError(
                f"--days {pattern}: days are taken in the order of their names, as texts, and {before.name} would come before"
                f" {day.name}. Give all numbers as many digits, such as day-02, or write dates as 2026-03-01."
            )
    for day in days:
        if missing := [split for split in SPLITS if not day.rows.get(split)]:
            raise DataError(
                f"{day.folder} has no rows of {missing[0]}: each day has train, valid and test. Make it with --extend of the"
                " day before, and without --split."
            )
    return days


def _numbered(name: str) -> list[str | int]:
    """Texts and numbers of a name in turn, which compare as numbers."""
    return [int(part) if part.isascii() and part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def _folders(pattern: str) -> list[Place]:
    if scheme_of(pattern) is None:
        return [path for path in map(Path, glob.glob(pattern)) if path.is_dir()]
    parent, _, name = pattern.rstrip("/").rpartition("/")
    there = place(parent)
    return [folder for folder in there.iterdir() if fnmatch.fnmatchcase(folder.name, name)] if there.is_dir() else []


def check_extended(days: Sequence[Day]) -> None:
    """Raise where a day's encoding is not that of the day before with more values behind its own.

    Raises:
        ConfigError: naming the day, and what differs.
        DataError: a vocabulary is damaged.
    """
    for before, day in itertools.pairwise(days):
        if differences := _not_extended(before, day):
            listed = "\n".join(differences)
            raise ConfigError(
                f"{day.folder} was not made with --extend of {before.folder}, which comes before it by name:\n{listed}\n"
                "A model can be measured on the next day, and go on with it, only where known values keep their ids. Make it"
                f" again: python -m preprocessing ... --extend {shlex.quote(str(before.folder))} --out"
                f" {shlex.quote(str(day.folder))} --overwrite"
            )


def _not_extended(before: Day, day: Day) -> list[str]:
    old, new = before.manifest.encoding, day.manifest.encoding
    if old is None or new is None or not old.comparable(new):
        without = before if old is None else day
        return [f"  how {without.folder} is encoded is not on record in a form that this release knows"]
    found = encoding_differences(old, day.manifest, day.folder, scenario=True, labels=True, extended=True)
    return [line.replace(" in the run", f" in {before.name}").replace("the run", before.name) for line in found]


def new_ids(before: DatasetManifest | None, now: DatasetManifest) -> dict[str, int]:
    """Vocabulary -> how many values it has that the day before did not know; all of them on the first day.

    Hashed ids are not counted: their tables do not grow.
    """
    known = {table.name: table.num_rows for table in before.tables} if before is not None else {}
    return {table.name: table.num_rows - known.get(table.name, 1) for table in now.tables if table.vocabulary is not None}
