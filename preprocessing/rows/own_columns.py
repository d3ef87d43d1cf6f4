"""Labels, weights and times of a table of one's own, from columns of a block; with what is wrong in which rows.

Features are made by mmlrec/encoding/conversions.py, which also says what faults are.
"""

from __future__ import annotations

import contextlib
import keyword
import re
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.encoding.conversions import FOUND, REMEDY, Converted, present

#: Unit of times since 1970 -> how many are a second.
TIME_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_DIGITS = {"seconds": "9,10", "milliseconds": "12,13", "microseconds": "15,16", "nanoseconds": "18,19"}  # from 1973 to 2286
_LARGEST_WEIGHT = float(np.float32(1e30))  # as a column holds it
#: Names of zones that are offset 0 everywhere. Python takes those of the machine's own zone, too, and gives no offset for any.
_ZONES = ("UTC", "GMT")
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799  # of the years 1 and 9999


def in_condition(column: str) -> str:
    """A column's name as it stands in a condition: in backquotes where it is no plain word."""
    plain = column.isidentifier() and column.isascii() and not keyword.iskeyword(column) and column not in ("true", "false")
    return column if plain else f"`{column.replace('`', '``')}`"


def label(values: pa.Array, column: str) -> Converted:
    """0, 1 or null, float32."""
    result = values.cast(pa.float32(), safe=False)
    good = _bools(pc.or_(pc.equal(values, 0), pc.equal(values, 1)).fill_null(True))
    remedy = f"Mend the line, or make the label a condition such as '{in_condition(column)} > 0'."
    return result, [(good, f"{column} must be 0 or 1, or empty where it is not known{FOUND}. {remedy}", column)]


def weight(values: pa.Array, column: str) -> Converted:
    """What rows count, float32: neither missing nor negative, and such that no sum of them overflows."""
    result = values.cast(pa.float32(), safe=False)
    good = _bools(pc.and_(pc.greater_equal(values, 0), pc.less_equal(result, _LARGEST_WEIGHT)).fill_null(False))
    complaint = f"{column}, the weight of a row, must be a number from 0 to 1e30{FOUND}. {REMEDY}"
    return result, [(good, complaint, column)]


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
    forms = _without_zones(form)
    known = f" Of names of zones, %Z, {' and '.join(_ZONES)} are known: give offsets, %z." if len(forms) > 1 else ""
    complaint = f"{column} must be a time of the form {form}{FOUND}. {REMEDY}{known}"
    return _each_once(present(values), lambda text: _by_form(text, forms), complaint, column)


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


def _without_zones(form: str) -> list[str]:
    """The form, once for each of `_ZONES` where it holds the name of a zone."""
    marks = re.findall("%.|[^%]+|%", form)
    return list(dict.fromkeys("".join(zone if mark == "%Z" else mark for mark in marks) for zone in _ZONES))


def _by_form(text: str, forms: list[str]) -> datetime:
    """By the first form that reads it. Raises ValueError where none does."""
    for form in forms[:-1]:
        with contextlib.suppress(ValueError):
            return datetime.strptime(text, form)
    return datetime.strptime(text, forms[-1])


def _bools(values: pa.BooleanArray) -> NDArray[np.bool_]:
    return values.to_numpy(zero_copy_only=False)


def _moment(text: str, read: Callable[[str], datetime]) -> int | None:
    """Seconds, or None where the text is no time."""
    try:
        moment = read(text)
    except ValueError:
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() // 1)
