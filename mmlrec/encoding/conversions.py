"""Raw cells to canonical values, as the configuration of a table says; with what is wrong in which rows.

Each function gives the new column and `faults`: [rows] bool, the good ones, a complaint, and the column that it is about. A
faulty row may hold anything in the new column. A complaint may hold FOUND, which becomes the value that was found.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from numpy.typing import NDArray

from mmlrec.encoding.cells import BLANKS, INTEGER, WHOLE, Cells

Faults = list[tuple[NDArray[np.bool_], str, str]]
Converted = tuple[pa.Array, Faults]

#: What can be done with integers beyond 64 bits, as those without a sign may be.
UNSIGNED = "Integers have a sign; as text, type: string, it can be an id."
#: Why floats that are integers may be none.
ROUNDED = "Floats are rounded from 2^53 on, in float32 from 2^24 on: give integers, or text."
#: Stands in a complaint where the value that was found is told.
FOUND = "\0"
REMEDY = "Mend the line."
_MOST_DIGITS = 100  # of an integer that is told; those of 64 bits have 19


def whole(values: pa.Array) -> pa.BooleanArray:
    """[rows] whether floats, of any width, are integers that no other integer is rounded to; null where they are."""
    digits = {16: 11, 32: 24, 64: 53}[values.type.bit_width]
    numbers = values.cast(pa.float64())
    return pc.and_(pc.equal(pc.floor(numbers), numbers), pc.less(pc.abs(numbers), 2.0**digits))


def present(values: pa.Array) -> pa.Array:
    """An empty string is a missing value."""
    return pc.if_else(pc.equal(values, ""), None, values) if pa.types.is_string(values.type) else values


def number(values: pa.Array, column: str, kind: pa.DataType, *, log: bool = False) -> Converted:
    """float32 or float64, as it is or sign(x) log(1 + |x|)."""
    numbers = values.cast(pa.float64(), safe=False)
    if log:
        numbers = pc.multiply(pc.sign(numbers), pc.log1p(pc.abs(numbers)))
    finite = _bools(pc.is_finite(numbers.cast(pa.float32())).fill_null(True))
    return numbers.cast(kind), [(finite, f"{column} must be a finite number that float32 can hold{FOUND}. {REMEDY}", column)]


def separated(values: pa.Array, column: str, separator: str, kind: pa.DataType, cells: Cells) -> Converted:
    """Lists of int64 or string from text; blanks around an id do not count, nor do ids that are empty or missing."""
    lists = pc.split_pattern(present(values), separator)
    ids = cells.take(column, pc.utf8_trim_whitespace(pc.list_flatten(lists)))
    parents = pc.list_parent_indices(lists).to_numpy()
    filled = pc.not_equal(ids, "").fill_null(False)
    ids, parents = ids.filter(filled), parents[_bools(filled)]
    faults: Faults = []
    if pa.types.is_integer(kind):
        complaint = f"{column} must hold integers of 64 bits, divided by {separator!r}{FOUND}. {REMEDY}"
        ids, of_ids = integers(ids, complaint, column)
        for good_ids, why, _ in of_ids:
            good = np.ones(len(values), bool)
            good[parents[~good_ids]] = False
            faults.append((good, why, column))
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
    fits = np.array([all(isinstance(each, str) or _fits(each) for each in ids or []) for ids in one_by_one], bool)
    what, such = ("integers of 64 bits", "[1, 2]") if pa.types.is_integer(kind) else ("strings", '["a", "b"]')
    remedy = f"Mend the line, such as {such}, or name the separator between the ids."
    complaint = f"{column} must be a JSON list of {what}{FOUND}. {remedy}"
    lists = pa.array([ids if ids and fit else [] for ids, fit in zip(one_by_one, fits, strict=True)], pa.list_(kind))
    return listed(lists, column, cells), [(good, complaint, column), (fits, beyond(column), column)]


def singles(values: pa.Array) -> pa.ListArray:
    """A list of one for each value, null or not."""
    return pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1, dtype=np.int32)), values)


def places(values: pa.Array, known: pa.Array) -> NDArray[np.int64]:
    """Place of each value among the known ones, -1 for others and nulls, [rows] int64."""
    return pc.index_in(values, value_set=known).fill_null(-1).to_numpy().astype(np.int64)


def _bools(values: pa.BooleanArray) -> NDArray[np.bool_]:
    return values.to_numpy(zero_copy_only=False)


def _lists(ids: pa.Array, parents: NDArray[np.int64], num_rows: int) -> pa.ListArray:
    offsets = np.append(0, np.cumsum(np.bincount(parents, minlength=num_rows))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), ids)


def integers(texts: pa.Array, complaint: str, column: str) -> Converted:
    """int64 from texts without nulls; 7.0 is 7.

    Args:
        complaint: of texts that are no integers. Those that are integers beyond 64 bits have one of their own.
    """
    try:
        if not pc.all(pc.match_substring_regex(texts, INTEGER)).as_py() and len(texts):
            raise pa.ArrowInvalid("no integers")
        return texts.cast(pa.int64()), []
    except pa.ArrowInvalid:
        texts = pc.replace_substring_regex(texts, pattern=WHOLE, replacement=r"\1")
        good = pc.match_substring_regex(texts, INTEGER).to_numpy(zero_copy_only=False)
        texts = pc.replace_substring_regex(texts, pattern="^(-?)0+([0-9])", replacement=r"\1\2")
        # 20 characters hold any integer of 64 bits, and Python refuses to read very long ones.
        values = [int(text) if ok and len(text) <= 20 else None for text, ok in zip(texts.to_pylist(), good, strict=True)]
        fit = np.array([value is not None and _fits(value) for value in values], bool)
        found = pa.array([value if fits else 0 for value, fits in zip(values, fit, strict=True)], pa.int64())
        return found, [(good, complaint, column), (fit | ~good, beyond(column), column)]


def beyond(column: str) -> str:
    """The complaint of an integer that is none of 64 bits."""
    return f"{column} does not fit into 64 bits{FOUND}. {UNSIGNED}"


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def _json_list(text: str, column: str, kind: pa.DataType, cells: Cells) -> list[int] | list[str] | None:
    """The ids, integers of any size; None where the text is no list of them.

    JSON's null is an empty list, or a missing id, and 7.0 is 7.
    """
    try:
        ids = json.loads(text)
        text.encode(), json.dumps(ids, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    if ids is None:
        return []
    if not isinstance(ids, list):
        return None
    ids = [item for each in ids if (item := json_item(each, column, kind, cells)) is not None]
    wanted = int if pa.types.is_integer(kind) else str
    return ids if all(type(each) is wanted for each in ids) else None


def json_item(item: Any, column: str, kind: pa.DataType, cells: Cells) -> Any:
    """An element of a JSON list as int or str; None where it is missing, and itself where it is neither.

    7.0 and "7" are the integer 7; where text is wanted, integers stand in digits, booleans as `true` and `false`.
    """
    if pa.types.is_integer(kind):
        if isinstance(item, str):
            text = cells.text(column, item)
            number = integer_text(text.strip(BLANKS))
            return None if not text else item if number is None else int(number)
        return int(item) if isinstance(item, float) and item.is_integer() and abs(item) < 2**53 else item
    if isinstance(item, bool):
        return "true" if item else "false"
    return str(item) if isinstance(item, int) else item


def integer_text(text: str) -> str | None:
    """The integer that a text is, without leading zeros and what is behind the point; None where it is none.

    Of more digits than any of 64 bits has, Python reads not all: these stay, to be told.
    """
    found = re.fullmatch(r"(-?)0*([0-9]+)(?:\.0*)?", text, re.ASCII)
    return found[1] + found[2][:_MOST_DIGITS] if found else None
