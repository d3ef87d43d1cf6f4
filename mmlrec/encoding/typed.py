"""Raw cells of any Arrow type, or as text, to int64, string or float64, as the readers of raw files take them.

See mmlrec/encoding/conversions.py for what faults are.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.encoding.cells import BLANKS, NUMBER, Cells
from mmlrec.encoding.columns import valid
from mmlrec.encoding.conversions import (
    FOUND,
    REMEDY,
    ROUNDED,
    Converted,
    beyond,
    integers,
    json_lists,
    present,
    separated,
    whole,
)
from mmlrec.errors import DataError

#: Booleans as text -> the numbers that they are.
WORDS = {"true": "1", "TRUE": "1", "True": "1", "false": "0", "FALSE": "0", "False": "0"}
_LIST_TYPES = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)
_KINDS = {pa.int64(): "an integer", pa.float64(): "a number", pa.string(): "text"}


def is_list(kind: pa.DataType) -> bool:
    """Whether it is a type of lists, in any of Arrow's forms."""
    return any(test(kind) for test in _LIST_TYPES)


def plain(values: pa.Array) -> pa.Array:
    """The values of a dictionary as such, and text of any type as string."""
    values = values.dictionary_decode() if isinstance(values, pa.DictionaryArray) else values
    return values.cast(pa.string()) if isinstance(values, pa.LargeStringArray | pa.StringViewArray) else values


def words_as_numbers(texts: pa.Array) -> pa.Array:
    """Texts with those that are booleans as numbers, see `WORDS`."""
    words = pc.index_in(texts, value_set=pa.array(list(WORDS)))
    return pc.if_else(words.is_valid(), pa.array(list(WORDS.values())).take(words), texts)


def as_type(values: pa.Array, kind: pa.DataType, column: str, cells: Cells) -> Converted:
    """int64, float64 or string. A cell that `cells` names, and NaN where it is no text, are null; an empty text stays one.

    Integers may stand as 7.0, numbers as booleans, which are 1 and 0; where text is wanted, integers stand in digits, booleans
    as `true` and `false`, times in ISO 8601.

    Raises:
        DataError: no value of the column's type can be taken as one of this kind.
    """
    values = plain(values)
    if pa.types.is_null(values.type):
        return pa.nulls(len(values), kind), []
    if pa.types.is_string(values.type):
        return _from_text(cells.take(column, values), kind, column, cells)
    if pa.types.is_decimal(values.type) and pa.types.is_integer(kind):
        return _from_text(cells.take(column, values.cast(pa.string())), kind, column, cells)
    values = cells.take(column, values)
    found = values.type
    if pa.types.is_floating(found):
        numbers = values.cast(pa.float64())
        numbers = pc.if_else(pc.is_nan(numbers), None, numbers)
        return _from_numbers(numbers, whole(values), kind, column)
    if pa.types.is_uint64(found) and pa.types.is_integer(kind):
        good = pc.less(values, pa.scalar(2**63, pa.uint64())).fill_null(True)
        return pc.if_else(good, values, None).cast(kind), [(_bools(good), beyond(column), column)]
    if pa.types.is_floating(kind) and (pa.types.is_integer(found) or pa.types.is_boolean(found) or pa.types.is_decimal(found)):
        numbers = values.cast(pa.int8()) if pa.types.is_boolean(found) else values
        return cells.take(column, numbers.cast(kind, safe=False)), []  # a mark such as 7.0, or 1 for true
    if pa.types.is_integer(kind) and pa.types.is_integer(found):
        return values.cast(kind), []
    if pa.types.is_string(kind) and (pa.types.is_integer(found) or pa.types.is_boolean(found) or pa.types.is_temporal(found)):
        return cells.take(column, values.cast(kind)), []
    raise DataError(
        f"column '{column}' is of type {found}; {_KINDS[kind]} is needed in each row. Convert it, or give it as text."
    )


def as_lists(values: pa.Array, kind: pa.DataType, separator: str | None, column: str, cells: Cells) -> Converted:
    """Lists of int64 or string, from lists or text; null is an empty list, or stays null. Raises as `as_type`."""
    values = plain(values)
    if not is_list(values.type):
        if separator is None and not (pa.types.is_string(values.type) or pa.types.is_null(values.type)):
            raise DataError(
                f"column '{column}' is of type {values.type}; a list of ids is needed in each row, or a JSON list as text."
            )
        texts, faults = as_type(values, pa.string(), column, cells)
        if separator is not None:
            lists, more = separated(texts, column, separator, kind, cells)
        else:
            lists, more = json_lists(texts, column, kind, cells)
        return lists, faults + more
    # A cast from lists that are views to others gives wrong ones where some are null; this does not.
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy().astype(np.int64)
    ids, of_ids = as_type(pc.list_flatten(values), kind, column, cells)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), ids)
    faults = []
    for good, complaint, _ in of_ids:
        of_rows = np.ones(len(values), bool)
        of_rows[np.repeat(np.arange(len(values)), lengths)[~good]] = False
        faults.append((of_rows, complaint, column))
    return lists, faults


def _from_numbers(numbers: pa.Array, exact: pa.BooleanArray, kind: pa.DataType, column: str) -> Converted:
    """From float64 without NaN; `exact`: which of them are integers for certain."""
    if pa.types.is_floating(kind):
        return numbers, []
    if pa.types.is_string(kind):
        complaint = f"{column} must be text, or an integer{FOUND}. Give it as text: its id hangs on how it is written."
        return pa.nulls(len(numbers), kind), [(~valid(numbers), complaint, column)]
    good = pc.or_(exact.fill_null(True), numbers.is_null())
    complaint = f"{column} must be an integer of 64 bits{FOUND}. {ROUNDED}"
    return pc.if_else(good, numbers, None).cast(kind), [(_bools(good), complaint, column)]


def _from_text(texts: pa.Array, kind: pa.DataType, column: str, cells: Cells) -> Converted:
    if pa.types.is_string(kind):
        return texts, []
    texts = pc.utf8_trim(present(texts), characters=BLANKS)
    if pa.types.is_integer(kind):
        known = texts.is_valid()
        found, faults = integers(texts.fill_null("0"), f"{column} must be an integer of 64 bits{FOUND}. {REMEDY}", column)
        found = pc.if_else(known, found, None)
    else:
        texts = words_as_numbers(texts)
        good = np.ones(len(texts), bool)
        try:
            found = texts.cast(kind)
        except pa.ArrowInvalid:
            good = np.array([text is None or _is_number(text) for text in texts.to_pylist()], bool)
            found = pc.if_else(pa.array(good), texts, None).cast(kind)
        good = good & ~_bools(pc.is_nan(found).fill_null(False))
        faults = [(good, f"{column} must be a number{FOUND}. {REMEDY}", column)]
    return cells.take(column, found), faults


def _is_number(text: str) -> bool:
    try:
        pa.scalar(text).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return NUMBER.fullmatch(text) is not None


def _bools(values: pa.BooleanArray) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False)
