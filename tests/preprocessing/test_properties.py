"""What holds for any condition and any delimited text, against Python's own evaluation and Python's csv."""

import csv
import io
import operator
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlrec.errors import DataError
from preprocessing.rows.expressions import parse_condition
from tests.preprocessing.test_raw_files import read

COMPARISONS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
CONSTANTS = {"a": st.integers(-3, 3), "b": st.sampled_from([-1.5, 0.0, 0.5, 2.0]), "s": st.sampled_from(["x", "y z", "no"])}


def missing_or(value, found):
    return None if value is None else found(value)


@st.composite
def comparisons(draw):
    """Text of a comparison, and what computes it of a row; None where a value is missing."""
    name = draw(st.sampled_from(sorted(CONSTANTS)))
    if draw(st.booleans()):
        sign, value = draw(st.sampled_from(sorted(COMPARISONS))), draw(CONSTANTS[name])
        function = COMPARISONS[sign]
        if draw(st.booleans()):
            return f"{value!r} {sign} {name}", lambda row: missing_or(row[name], lambda cell: function(value, cell))
        return f"{name} {sign} {value!r}", lambda row: missing_or(row[name], lambda cell: function(cell, value))
    values, negated = draw(st.lists(CONSTANTS[name], min_size=1, max_size=3)), draw(st.booleans())
    text = f"{name} {'not in' if negated else 'in'} {values!r}"
    return text, lambda row: missing_or(row[name], lambda cell: (cell in values) != negated)


def joined(parts):
    """`and` and `or` of SQL: a missing part leaves open only what it could still change."""
    word, conditions = parts
    decides = word == "or"

    def value(row):
        found = [function(row) for _, function in conditions]
        return decides if decides in found else None if None in found else not decides

    return f" {word} ".join(f"({text})" for text, _ in conditions), value


def turned(part):
    return f"not ({part[0]})", lambda row: missing_or(part[1](row), operator.not_)


CONDITIONS = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=3)).map(joined), inner.map(turned)
    ),
    max_leaves=6,
)
ROWS = [{"a": a, "b": b, "s": s} for a in (None, -3, 0, 2) for b in (None, -1.5, 0.5) for s in (None, "", "x", "y z")]
TABLE = pa.table(
    {
        "a": pa.array([row["a"] for row in ROWS], pa.int64()),
        "b": pa.array([row["b"] for row in ROWS], pa.float64()),
        "s": pa.array([row["s"] for row in ROWS], pa.string()),
    }
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(CONDITIONS)
def test_conditions_are_what_python_makes_of_them(condition):
    text, value = condition
    expected = [value(row | {"s": row["s"] or None}) for row in ROWS]  # an empty text is a missing value
    assert parse_condition(text).evaluate(TABLE).to_pylist() == expected, text


FIELDS = st.text(st.sampled_from('ab"", #é\t\'\u2028'), max_size=8)
LINES = st.lists(st.tuples(st.integers(-(2**40), 2**40), st.none() | st.integers(-99, 99), FIELDS), min_size=1, max_size=12)


def written(lines, quoting, end, start=""):
    file = io.StringIO()
    csv.writer(file, quoting=quoting, lineterminator=end).writerows([("" if c is None else c for c in line) for line in lines])
    return start + file.getvalue()


def folder_read(text, **options):
    with tempfile.TemporaryDirectory() as folder:
        return read(Path(folder), text, quoted=True, **options)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lines=LINES,
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
    start=st.sampled_from(["", "\ufeff"]),
    block_bytes=st.integers(1, 200),
)
def test_what_csv_writes_is_read_in_blocks_of_any_size(lines, quoting, end, start, block_bytes):
    rows, numbers, bad = folder_read(written(lines, quoting, end, start), block_bytes=block_bytes)
    assert rows == [(a, None if b is None else float(b), c) for a, b, c in lines]
    assert numbers == list(range(1, len(lines) + 1))
    assert bad == {}


BETWEEN = st.lists(st.sampled_from(["", " \t", "# a, b", '#"open', "#"]), max_size=3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lines=LINES,
    between=st.lists(BETWEEN, min_size=14, max_size=14),
    end=st.sampled_from(["\n", "\r\n"]),
    start=st.sampled_from(["", "\ufeff"]),
    block_bytes=st.integers(1, 200),
)
def test_lines_between_rows_change_no_row_and_no_number(lines, between, end, start, block_bytes):
    """Blank lines and comments anywhere, before the header and behind the last row, too."""
    text, numbers, number = start, [], 0
    for others, row in zip(between, ["header", *lines, None], strict=False):
        text += "".join(line + end for line in others)
        number += len(others)
        if row is not None:
            number += 1
            text += "name,price,id" + end if row == "header" else written([row[::-1]], csv.QUOTE_ALL, end)
            numbers += [] if row == "header" else [number]
    rows, found, bad = folder_read(text, header=True, comment="#", block_bytes=block_bytes)
    assert rows == [(a, None if b is None else float(b), c) for a, b, c in lines]
    assert (found, bad) == (numbers, {})


BAD = ['7,1,"open', "7,1", "x,1,a", "7,1,a,b", '7,one,"a"', "7,nan,a", '7,1,"a""']


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lines=LINES, bad=st.sampled_from(BAD), place=st.integers(0, 12), block_bytes=st.integers(1, 200))
def test_one_bad_line_is_named_and_takes_no_other_with_it(lines, bad, place, block_bytes):
    place = min(place, len(lines))
    text = written(lines[:place], csv.QUOTE_ALL, "\n") + bad + "\n" + written(lines[place:], csv.QUOTE_ALL, "\n")
    with pytest.raises(DataError, match=rf"a\.csv, line {place + 1}: "):
        folder_read(text, block_bytes=block_bytes)
    rows, numbers, counts = folder_read(text, block_bytes=block_bytes, max_bad_rows=1)
    assert rows == [(a, None if b is None else float(b), c) for a, b, c in lines]
    assert numbers == [number for number in range(1, len(lines) + 2) if number != place + 1]
    assert counts == {"a.csv": 1}
