"""Ids of a table of one's own that look as if they were none: marks of missing values, blanks, 7 and 7.0, 1.2E+11."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmlrec.encoding.cells import TYPICAL_MARKS
from mmlrec.schema import DatasetManifest
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place

_SHOWN = 8
_POINT = r"^-?[0-9]+\.0+$"
_ROUNDED = r"^-?[0-9]([.,][0-9]+)?[eE]\+[0-9]+$"
_MOST_POINTED = 1 << 20  # values with a point that are looked for without it


@dataclass
class _Found:
    """What one vocabulary holds.

    Attributes:
        marks: value that looks like a missing one -> train rows.
        blanks: some values with blanks around them. num_blanks: how many there are.
        pointed: integers with a point, without it.
        rounded: some numbers as spreadsheets write long ones, without their last digits. num_rounded: how many there are.
    """

    marks: dict[str, int] = field(default_factory=dict)
    blanks: list[str] = field(default_factory=list)
    num_blanks: int = 0
    pointed: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    num_rounded: int = 0


def suspicious_ids(folder: Place, manifest: DatasetManifest) -> list[str]:
    """A line for each kind of suspicious id, by vocabulary, with the key of the configuration that mends it.

    Only of datasets that `table` made: those with a file of their own know what their values mean.
    """
    lines = []
    names_of: dict[str | None, list[str]] = {}
    for feature in manifest.features:
        names_of.setdefault(feature.table, []).append(feature.name)
    for table in manifest.tables if "config" in manifest.preprocessing else ():
        if table.vocabulary is None:
            continue
        found = _Found()
        with open_parquet(folder / table.vocabulary) as file:
            if not pa.types.is_string(file.schema_arrow.field("value").type):
                continue
            for values, counts in _entries(file):
                _look(values, counts, found)
            twice = _twice(file, found.pointed)
        names = ", ".join(names_of.get(table.name, []))
        if found.marks:
            shown = [f"{_quoted(value)} ({count:,})" for value, count in list(found.marks.items())[:_SHOWN]]
            written = ", ".join(_quoted(value) for value in list(found.marks)[:_SHOWN])
            lines.append(
                f"{names}: {_number(found.marks, 'value')} may mean a missing one, but got ids (occurrences in train):"
                f" {', '.join(shown)}{_more(found.marks)}. If so, say: missing: [{written}]"
            )
        if found.num_blanks:
            examples = ", ".join(map(_quoted, found.blanks))
            count = f"{found.num_blanks:,} value{'s have' if found.num_blanks > 1 else ' has'}"
            lines.append(f"{names}: {count} blanks around it, such as {examples}. strip: true drops them")
        if found.num_rounded:
            count = f"{found.num_rounded:,} value{'s look' if found.num_rounded > 1 else ' looks'}"
            lines.append(
                f"{names}: {count} like a number whose last digits a spreadsheet has left out, such as"
                f" {', '.join(map(_quoted, found.rounded))}: other ids may have become the same. Save the column as text there"
            )
        if twice:
            examples = f"{_quoted(twice[0])} and {_quoted(twice[0] + '.0')}"
            lines.append(f"{names}: {_number(twice, 'id')} stand twice, such as {examples}. type: int makes them one")
    return lines


def _entries(file: pq.ParquetFile) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Values and counts of a vocabulary, some at a time."""
    for batch in file.iter_batches(columns=["value", "count"]):
        yield batch.column(0), batch.column(1)


def _look(values: pa.Array, counts: pa.Array, found: _Found) -> None:
    bare = pc.utf8_trim_whitespace(values)
    marks = pc.is_in(pc.utf8_lower(bare), value_set=pa.array(["", *TYPICAL_MARKS]))
    found.marks |= zip(values.filter(marks).to_pylist(), counts.filter(marks).to_pylist(), strict=True)
    blanks = values.filter(pc.not_equal(bare, values))
    found.num_blanks += len(blanks)
    found.blanks += blanks.slice(0, max(3 - len(found.blanks), 0)).to_pylist()
    rounded = values.filter(pc.match_substring_regex(values, _ROUNDED))
    found.num_rounded += len(rounded)
    found.rounded += rounded.slice(0, max(3 - len(found.rounded), 0)).to_pylist()
    pointed = values.filter(pc.match_substring_regex(values, _POINT))
    room = max(_MOST_POINTED - len(found.pointed), 0)
    found.pointed += pc.replace_substring_regex(pointed.slice(0, room), pattern=r"\.0+$", replacement="").to_pylist()


def _twice(file: pq.ParquetFile, pointed: list[str]) -> list[str]:
    """Those of the integers that the vocabulary holds without a point, too."""
    if not pointed:
        return []
    known = pa.array(pointed)
    return [value for values, _ in _entries(file) for value in values.filter(pc.is_in(values, value_set=known)).to_pylist()]


def _quoted(value: str) -> str:
    """As YAML takes it, whatever is in it."""
    return "'" + value.replace("'", "''") + "'"


def _number(what: dict[str, int] | list[str], word: str) -> str:
    return f"{len(what):,} {word}{'s' if len(what) > 1 else ''}"


def _more(marks: dict[str, int]) -> str:
    return ", ..." if len(marks) > _SHOWN else ""
