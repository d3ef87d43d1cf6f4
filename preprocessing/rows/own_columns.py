"""Columns of a block to columns of the canonical table, as a table's configuration says; with what is wrong in which rows.

Each function gives the new column and `faults`: [rows] bool, the good ones, a complaint, and the column that it is about. A
faulty row may hold anything in the new column.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from numpy.typing import NDArray

from preprocessing.reading.cells import INTEGER, WHOLE, Cells
from preprocessing.reading.raw_files import FOUND

Faults = list[tuple[NDArray[np.bool_], str, str]]
Converted = tuple[pa.Array, Faults]

#: Unit of times since 1970 -> how many are a second.
TIME_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_DIGITS = {"seconds": "9,10", "milliseconds": "12,13", "microseconds": "15,16", "nanoseconds": "18,19"}  # from 1973 to 2286
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799  # of the years 1 and 9999
_REMEDY = "Mend the line."


def present(values: pa.Array) -> pa.Array:
    """An empty string is a missing value."""
    return pc.if_else(pc.equal(values, ""), None, values) if pa.types.is_string(values.type) else values


def in_condition(column: str) -> str:
    """A column's name as it stands in a condition: in backquotes where it is no plain word."""
    plain = column.isidentifier() and column.isascii() and not keyword.iskeyword(column) and column not in ("true", "false")
    return column if plain else f"`{column.replace('`', '``')}`"


def number(values: pa.Array, column: str, kind: pa.DataType, *, log: bool = False) -> Converted:
    """float32 or float64, as it is or sign(x) log(1 + |x|)."""
    numbers = values.cast(pa.float64(), safe=False)
    if log:
        numbers = pc.multiply(pc.sign(numbers), pc.log1p(pc.abs(numbers)))
    finite = _bools(pc.is_finite(numbers.cast(pa.float32())).fill_null(True))
    return numbers.cast(kind), [(finite, f"{column} must be a finite number that float32 can hold{FOUND}. {_REMEDY}", column)]


def label(values: pa.Array, column: str) -> Converted:
    """0, 1 or null, float32."""
    result = values.cast(pa.float32(), safe=False)
    good = _bools(pc.or_(pc.equal(values, 0), pc.equal(values, 1)).fill_null(True))
    remedy = f"Mend the line, or make the label a condition such as '{in_condition(column)} > 0'."
    return result, [(good, f"{column} must be 0 or 1, or empty where it is not known{FOUND}. {remedy}", column)]


def weight(values: pa.Array, column: str) -> Converted:
    """What rows count, float32: neither missing nor negative."""
    result = values.cast(pa.float32(), safe=False)
    good = _bools(pc.and_(pc.is_finite(result), pc.greater_equal(result, 0)).fill_null(False))
    complaint = f"{column}, the weight of a row, must be a number from 0 on that float32 can hold{FOUND}. {_REMEDY}"
    return result, [(good, complaint, column)]


def separated(values: pa.Array, column: str, separator: str, kind: pa.DataType, cells: Cells) -> Converted:
    """Lists of int64 or string from text; blanks around an id do not count, nor do ids that are empty or missing."""
    lists = pc.split_pattern(present(values), separator)
    ids = cells.take(column, pc.utf8_trim_whitespace(pc.list_flatten(lists)))
    parents = pc.list_parent_indices(lists).to_numpy()
    filled = pc.not_equal(ids, "").fill_null(False)
    ids, parents = ids.filter(filled), parents[_bools(filled)]
    faults: Faults = []
    if pa.types.is_integer(kind):
        ids, integers = _integers(ids)
        good = np.ones(len(values), bool)
        good[parents[~integers]] = False
        complaint = f"{column} must hold integers of 64 bits, divided by {separator!r}{FOUND}. {_REMEDY}"
        faults.append((good, complaint, column))
    return _lists(ids, parents, len(values)), faults


def listed(values: pa.Array, column: str, cells: Cells) -> pa.Array:
    """Lists without missing values and empty strings."""
    ids, parents = present(cells.take(column, pc.list_flatten(values))), pc.list_parent_indices(values).to_numpy()
    return _lists(ids.drop_null(), parents[_bools(ids.is_valid())], len(values))


def json_lists(values: pa.Array, column: str, kind: pa.DataType, cells: Cells) -> Converted:
    """Lists of int64 or string from text such as `[1, 2]` or `["a", "b"]`, without missing values."""
    filled = present(values).fill_null("null")
    lines = pc.binary_join_element_wise('{"v":', filled, "}\n", "")
    schema = pa.schema([("v", pa.list_(kind))])
    options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    try:
        if len(values) == 0 or pc.any(pc.match_substring_regex(filled, r"[\n}]")).as_py():
            raise pa.ArrowInvalid("no single list")
        text = "".join(lines.to_pylist()).encode()
        read = pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1)
        lists = pyarrow.json.read_json(pa.py_buffer(text), read_options=read, parse_options=options)["v"].combine_chunks()
        return listed(lists, column, cells), []
    except pa.ArrowInvalid:
        one_by_one = [_json_list(text, column, kind, cells) for text in filled.to_pylist()]
    good = np.array([ids is not None for ids in one_by_one], bool)
    what = "integers of 64 bits" if pa.types.is_integer(kind) else "strings"
    complaint = f"{column} must be a JSON list of {what}{FOUND}. Mend the line, or name the separator between the ids."
    lists = pa.array([ids or [] for ids in one_by_one], pa.list_(kind))
    return listed(lists, column, cells), [(good, complaint, column)]


def seconds(values: pa.Array, column: str, form: str | None) -> Converted:
    """Seconds since 1970, int64, rounded down; without a zone a time is UTC. Null stays null.

    Args:
        values: strings; numbers where the form is a unit of `TIME_UNITS`.
        form: ISO 8601 where None, a unit since 1970, or a pattern of strptime.
    """
    if form is None:
        return _iso_seconds(present(values), column)
    if form in TIME_UNITS:
        return _unit_seconds(values, column, form)
    complaint = f"{column} must be a time of the form {form}{FOUND}. {_REMEDY}"
    return _each_once(present(values), lambda text: datetime.strptime(text, form), complaint, column)


def _iso_seconds(text: pa.Array, column: str) -> Converted:
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return pc.floor(pc.divide(text.cast(kind).cast(pa.int64()).cast(pa.float64()), 1e6)).cast(pa.int64()), []
        except pa.ArrowInvalid:
            continue
    need = f"{column} must be a time in ISO 8601, such as 2024-05-31 or 2024-05-31T12:00:00Z{FOUND}."
    remedy = "Mend the line; or give the key the format of its times: format: seconds (or milliseconds, microseconds,"
    complaint = f"{need} {remedy} nanoseconds) since 1970, or a pattern such as format: '%d.%m.%Y %H:%M'."
    moments, faults = _each_once(text, datetime.fromisoformat, complaint, column)
    good = faults[0][0]
    for unit, digits in _DIGITS.items():
        here = _bools(pc.match_substring_regex(text, rf"^[0-9]{{{digits}}}(\.[0-9]*)?$").fill_null(False)) & ~good
        told = f"{need} It looks like {unit} since 1970: say so at the key, format: {unit}."
        faults.insert(0, (~here, told, column))
    return moments, faults


def _unit_seconds(numbers: pa.Array, column: str, unit: str) -> Converted:
    known = _bools(numbers.is_valid())
    values = numbers.fill_null(0).to_numpy(zero_copy_only=False)
    whole = np.floor(values / TIME_UNITS[unit]) if values.dtype.kind == "f" else values // TIME_UNITS[unit]
    good = (whole >= _FIRST_SECOND) & (whole <= _LAST_SECOND)
    seconds = pa.array(np.where(good, whole, 0).astype(np.int64), mask=~known)
    complaint = f"{column} in {unit} since 1970 is no time from year 1 to 9999{FOUND}. Mend the line, or give another format."
    return seconds, [(good, complaint, column)]


def _each_once(texts: pa.Array, read: Callable[[str], datetime], complaint: str, column: str) -> Converted:
    """Seconds of each text as Python reads it; of equal ones once, as times are read slowly."""
    distinct = texts.dictionary_encode()
    moments = [_moment(text, read) for text in distinct.dictionary.to_pylist()]
    found = pa.array(moments, pa.int64()).take(distinct.indices)
    return found, [(_bools(pc.or_(found.is_valid(), texts.is_null())), complaint, column)]


def places(values: pa.Array, known: pa.Array) -> NDArray[np.int64]:
    """Place of each value among the known ones, -1 for others and nulls, [rows] int64."""
    return pc.index_in(values, value_set=known).fill_null(-1).to_numpy().astype(np.int64)


def _bools(values: pa.BooleanArray) -> NDArray[np.bool_]:
    return values.to_numpy(zero_copy_only=False)


def _lists(ids: pa.Array, parents: NDArray[np.int64], num_rows: int) -> pa.ListArray:
    offsets = np.append(0, np.cumsum(np.bincount(parents, minlength=num_rows))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), ids)


def _integers(texts: pa.Array) -> tuple[pa.Array, NDArray[np.bool_]]:
    """int64, and which of the texts are such; 7.0 is 7."""
    try:
        if not pc.all(pc.match_substring_regex(texts, INTEGER)).as_py() and len(texts):
            raise pa.ArrowInvalid("no integers")
        return texts.cast(pa.int64()), np.ones(len(texts), bool)
    except pa.ArrowInvalid:
        texts = pc.replace_substring_regex(texts, pattern=WHOLE, replacement=r"\1")
        # 20 characters hold any integer of 64 bits, and Python refuses to read very long ones.
        values = [int(text) if re.match(INTEGER, text) and len(text) <= 20 else None for text in texts.to_pylist()]
        good = np.array([value is not None and -(2**63) <= value < 2**63 for value in values], bool)
        return pa.array([value if fits else 0 for value, fits in zip(values, good, strict=True)], pa.int64()), good


def _json_list(text: str, column: str, kind: pa.DataType, cells: Cells) -> list[int] | list[str] | None:
    """The ids, or None where the text is no list of them; JSON's null is an empty list, or a missing id, and 7.0 is 7."""
    try:
        ids = json.loads(text)
        text.encode(), json.dumps(ids, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    if ids is None:
        return []
    if not isinstance(ids, list):
        return None
    ids = [each for each in ids if each is not None]
    if pa.types.is_integer(kind):
        ids = [each for each in ids if not (isinstance(each, str) and each in cells.marks(column))]
        ids = [int(each) if isinstance(each, float) and each.is_integer() else each for each in ids]
        return ids if all(type(each) is int and -(2**63) <= each < 2**63 for each in ids) else None
    return ids if all(isinstance(each, str) for each in ids) else None


def _moment(text: str, read: Callable[[str], datetime]) -> int | None:
    """Seconds, or None where the text is no time."""
    try:
        moment = read(text)
    except ValueError:
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() // 1)
