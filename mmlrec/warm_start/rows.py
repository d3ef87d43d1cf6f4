"""Which rows of a table stand for the same values in another run: old ids of new ones, for the rows that a rank holds.

Ids of a vocabulary are matched by value. Where one vocabulary begins with the other, as after `--extend`, ids are equal and
nothing has to be read for it; elsewhere a rank holds the values of its own rows of one table, sorted by their hashes, and
reads the other vocabulary past them, in pieces. Rows of managed tables are matched by key (`keys`). Hashed ids, buckets of
numbers, and ids that come as such are equal where what makes them is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmlrec.encoding.vocabularies import Vocabularies
from mmlrec.errors import DataError
from mmlrec.identity import check_vocabulary, vocabulary_digest
from mmlrec.schema import DatasetManifest, Table
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place

#: Values of a vocabulary that are read at a time.
_PIECE = 1 << 20

How = Literal["by value", "by id", "by key", "not"]


@dataclass(frozen=True)
class Matching:
    """How the rows of a table are found in another run.

    Attributes:
        common: rows 0..common-1 have the same ids in both; the others are looked for by value where `how` says so.
        why_not: why none is taken.
    """

    how: How
    common: int = 0
    why_not: str = ""


@dataclass(frozen=True)
class Encoded:
    """A manifest, and the folder in which its vocabularies lie."""

    manifest: DatasetManifest
    folder: Place

    def vocabulary(self, table: str) -> Place:
        """The file of a table that has one."""
        name = self.manifest.table(table).vocabulary
        assert name is not None
        return self.folder / name

    def kind(self, table: Table) -> str:
        """What makes its ids: hash, managed, given, quantiles or vocabulary.

        Raises:
            DataError: its vocabulary cannot be read.
        """
        encoding = self.manifest.encoding
        if encoding is not None and (kind := encoding.tables.get(table.name, {}).get("ids")) is not None:
            return str(kind)
        if table.hash_seed is not None:
            return "managed" if table.managed else "hash"
        if table.vocabulary is None:
            return "given"
        return "quantiles" if pa.types.is_floating(_value_type(self.folder / table.vocabulary)) else "vocabulary"

    def raw_types(self, table: Table) -> list[str]:
        """Of the values of a table whose encoding is on record."""
        features = self.manifest.encoding.features if self.manifest.encoding is not None else {}
        return sorted({str(of["type"]) for of in features.values() if of.get("table") == table.name})

    def check(self, table: Table) -> None:
        """Raise DataError where the vocabulary of a table is not there, or not the one that was written."""
        if table.vocabulary is None:
            return
        path = self.folder / table.vocabulary
        if not path.is_file():
            raise DataError(f"{path}: the vocabulary is missing, so rows cannot be matched by value. Bring it back.")
        encoding = self.manifest.encoding
        check_vocabulary(path, encoding.tables.get(table.name, {}) if encoding else {})


def matching(name: str, new: Encoded, old: Encoded) -> Matching:
    """How the rows of a table are found in another run. Reads vocabularies through, in pieces: one rank does it for all.

    Raises:
        DataError: a vocabulary is missing or damaged.
    """
    mine, theirs = new.manifest.table(name), old.manifest.by_name.get(name)
    if theirs is None:
        return Matching("not", why_not="a new table")
    new.check(mine)
    old.check(theirs)
    kinds = new.kind(mine), old.kind(theirs)
    if "managed" in kinds and {*kinds} <= {"managed", "vocabulary"}:
        return _by_key(mine, theirs, new, old)
    if kinds[0] != kinds[1]:
        return Matching("not", why_not=f"its ids come by {kinds[0]} here, by {kinds[1]} there")
    if kinds[0] == "hash":
        here, there = ((t.num_rows, t.num_hashes, t.hash_seed) for t in (mine, theirs))
        if here != there:
            return Matching("not", why_not=f"rows, hashes and seed are {here} here, {there} there")
        return Matching("by id", mine.num_rows)
    if kinds[0] == "given":
        return Matching("by id", min(mine.num_rows, theirs.num_rows))
    paths = new.vocabulary(name), old.vocabulary(name)
    types = [_value_type(path) for path in paths]
    if pa.types.is_integer(types[0]) != pa.types.is_integer(types[1]):
        return Matching("not", why_not=f"its values are {types[0]} here, {types[1]} there")
    common = min(mine.num_rows, theirs.num_rows) - 1
    same = vocabulary_digest(paths[0], common) == vocabulary_digest(paths[1], common)
    if kinds[0] == "quantiles":
        if not same or mine.num_rows != theirs.num_rows:
            return Matching("not", why_not="the borders of its buckets are others")
        return Matching("by id", mine.num_rows)
    return Matching("by value", common + 1 if same else 0)


def _by_key(mine: Table, theirs: Table, new: Encoded, old: Encoded) -> Matching:
    """Between managed tables, or one and a vocabulary, whose values tell the keys."""
    types = new.raw_types(mine), old.raw_types(theirs)
    if types[0] != types[1]:
        return Matching("not", why_not=f"its values are {', '.join(types[0])} here, {', '.join(types[1])} there")
    if mine.managed and theirs.managed and mine.hash_seed != theirs.hash_seed:
        return Matching("not", why_not=f"the seed of its keys is {mine.hash_seed} here, {theirs.hash_seed} there")
    return Matching("by key")


def old_rows(name: str, found: Matching, start: int, stop: int, new: Encoded, old: Encoded) -> NDArray[np.int64]:
    """Rows of the other run's table that rows start..stop-1 of this one take; -1 for those that are new, [stop - start].

    Row 0, of missing, rare and unseen values, takes row 0.
    """
    rows = np.arange(start, stop)
    if found.how == "not":
        return np.full(stop - start, -1)
    if found.how == "by id" or found.common:
        return np.where(rows < found.common, rows, -1)
    rows = np.where(rows == 0, 0, -1)
    ids, held = _between(new.vocabulary(name), start, stop)
    index = Vocabularies.of({name: held})
    for others, their_ids, _ in values_of(old.vocabulary(name)):
        at = index.look_up(name, others)
        found_here = at > 0
        rows[ids[at[found_here] - 1] - start] = their_ids[found_here]
    return rows


def _between(path: Place, start: int, stop: int) -> tuple[NDArray[np.int64], list[pa.Array]]:
    """The ids start..stop-1 that a vocabulary has, [n], and their values, in pieces."""
    ids, values = [np.empty(0, np.int64)], []
    for some, their_ids, _ in values_of(path):
        own = (their_ids >= start) & (their_ids < stop)
        if own.any():
            ids.append(their_ids[own])
            values.append(some.filter(pa.array(own)))
    return np.concatenate(ids), values


def values_of(path: Place) -> Iterator[tuple[pa.Array, NDArray[np.int64], NDArray[np.int64]]]:
    """Values of a vocabulary, ids and counts, some at a time. Texts are large strings, which may be more than 2 GiB together.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open_parquet(path) as file:
            for batch in file.iter_batches(_PIECE, columns=["value", "id", "count"]):
                values = batch.column("value")
                kind: Any = pa.int64() if pa.types.is_integer(values.type) else pa.large_string()
                if len(values):
                    yield values.cast(kind), batch.column("id").to_numpy(), batch.column("count").to_numpy()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged: the vocabulary cannot be read: {error}.") from error


def _value_type(path: Place) -> pa.DataType:
    try:
        with open_parquet(path) as file:
            return file.schema_arrow.field("value").type
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged: the vocabulary cannot be read: {error}.") from error
