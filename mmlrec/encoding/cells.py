"""How the cells of a table of one's own are taken, in every format: blanks around them, texts that mean a missing value."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

BLANKS = " \t"
#: Texts that often mean a missing value, in small letters.
TYPICAL_MARKS = (
    *("null", "(null)", "\\n", "na", "n/a", "#n/a", "<na>", "n.a.", "nan", "nat", "none", "nil", "undefined"),
    *("?", "-", "--"),
)
#: What can be done with a list of numbers.
VECTORS = "A vector is not read yet: give its components as columns of numbers, such as e_0, e_1, e_2."
#: What can be done with a list where one value is wanted.
SEVERAL = "A list of ids is a feature of kind: ids, without a separator."
#: What can be done with fields of a struct, or values of a JSON object.
NESTED = "What lies in an object is not read: write it as a column, or a key, of its own."
#: A number as some write it, with a comma, or with something between thousands.
_AS_ELSEWHERE = re.compile(r"[+-]?[0-9]+([.,' \u00a0\u202f\u2019_]+[0-9]+)+", re.ASCII)
INTEGER = "^-?[0-9]+$"
#: A number, which may be nan or infinite.
NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.IGNORECASE | re.ASCII)
#: An integer with a point: so does pandas write those of a column in which others are missing.
WHOLE = r"^(-?[0-9]+)\.0*$"


def how_numbers_stand(text: str) -> str:
    """What can be done where a number of another notation stands, with a leading space; empty where none does."""
    if _AS_ELSEWHERE.fullmatch(text.strip(BLANKS)) is None:
        return ""
    return " Numbers have a point before decimals and nothing between thousands: write 1234.5, not 1.234,5 or 1,234.5."


@dataclass(frozen=True)
class Cells:
    """What is done to a cell before it is a value. An empty one is missing in any case.

    Attributes:
        missing: texts that mean a missing value in every column; or column -> its own. A number is missing where such a text
            writes it, too: `-1` is -1 and -1.0.
        strip: blanks and tabs around a text are dropped, and around those of `missing`.
    """

    missing: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    strip: bool = False

    @property
    def as_they_stand(self) -> bool:
        """Whether nothing is done to any cell."""
        return not (self.missing or self.strip)

    def marks(self, column: str) -> tuple[str, ...]:
        """The texts that mean a missing value in a column."""
        found = self.missing.get(column, ()) if isinstance(self.missing, dict) else self.missing
        return tuple(mark.strip(BLANKS) for mark in found) if self.strip else found

    def facts(self, *columns: str) -> dict[str, Any]:
        """What is done to cells of these columns, for the identity of the encoding."""
        marks = sorted({mark for column in columns for mark in self.marks(column)})
        return ({"missing": marks} if marks else {}) | ({"strip": True} if self.strip else {})

    def text(self, column: str, cell: str) -> str:
        """A cell of text; empty where it is missing."""
        cell = cell.strip(BLANKS) if self.strip else cell
        return "" if cell in self.marks(column) else cell

    def take(self, column: str, values: pa.Array) -> pa.Array:
        """Cells, or elements of lists, of any Arrow type, with null for what `missing` names; an empty text stays empty."""
        marks = self.marks(column)
        if not (marks or self.strip):
            return values
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if marks and (pa.types.is_decimal(values.type) or pa.types.is_float16(values.type)):
            values = values.cast(pa.float64())
        kind = values.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            values = pc.utf8_trim(values, characters=BLANKS) if self.strip else values
            named = pa.array(marks, kind)
        else:
            named = _numbers(marks, kind)
        if not len(named):
            return values
        return pc.if_else(pc.is_in(values, value_set=named), pa.scalar(None, kind), values)


def _numbers(marks: tuple[str, ...], kind: pa.DataType) -> pa.Array:
    """The numbers of a type that the texts write."""
    found = []
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        for mark in marks:
            with contextlib.suppress(ValueError, OverflowError, pa.ArrowInvalid):
                found.append(pa.scalar(int(mark) if pa.types.is_integer(kind) else float(mark), kind).as_py())
    return pa.array(found, kind)
