"""Raw rows as users have them - a DataFrame, an Arrow table, a list of dicts - to an Arrow table, and scores back."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmlrec.encoding.specs import RawColumn
from mmlrec.errors import DataError, kind_of

if TYPE_CHECKING:
    import pandas

#: What `Model.score` takes, and gives.
Rows: TypeAlias = "pandas.DataFrame | pa.Table | list[dict[str, Any]]"

_LONGEST_SHOWN = 80


def raw_table(rows: Any, columns: Mapping[str, RawColumn]) -> pa.Table:
    """The columns that an encoder reads; values as they are, whatever their type.

    Of dicts, a key that some of them lack is a missing cell there; one that all lack is a missing column.

    Raises:
        DataError: rows are none of `Rows`, lack a column, or have one twice; or a value is none that a column can hold.
    """
    if isinstance(rows, pa.Table):
        return rows.select(_named(rows.schema.names, columns))
    if _is_frame(rows):
        return pa.table({name: _array(rows[name], columns[name]) for name in _named(list(rows.columns), columns)})
    if not isinstance(rows, list):
        raise DataError(f"rows must be a pandas DataFrame, an Arrow table or a list of dicts, found {kind_of(rows)}.")
    for row, cells in enumerate(rows):
        if not isinstance(cells, dict):
            raise _refusal(row, "an object with a value for each column is needed", cells)
    if rows:
        _named(list(dict.fromkeys(name for cells in rows for name in cells)), columns)
    return pa.table({name: _array([cells.get(name) for cells in rows], column) for name, column in columns.items()})


def scores_like(rows: Any, names: Sequence[str], scores: NDArray[np.float32]) -> Any:
    """Scores [B, num_outputs] as the kind of thing that the rows are, one column `score.<name>` for each output.

    A DataFrame has the index of the rows.
    """
    columns = {f"score.{name}": scores[:, index] for index, name in enumerate(names)}
    if isinstance(rows, pa.Table):
        return pa.table(columns)
    if isinstance(rows, list):
        return [dict(zip(columns, row, strict=True)) for row in scores.tolist()]
    return type(rows)(columns, index=rows.index)


def _is_frame(rows: object) -> bool:
    """Whether it is a pandas DataFrame. Does not import pandas: whoever has a DataFrame has done so."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(rows, pandas.DataFrame)


def _named(names: list[Any], columns: Mapping[str, RawColumn]) -> list[str]:
    """The columns, all of which are there. Raises DataError where one is not, or is there twice."""
    there = Counter(names)
    for name, column in columns.items():
        if there[name] > 1:
            raise DataError(f"the column '{name}' is there {there[name]} times: drop all but one.")
        if not there[name]:
            raise DataError(column.missing_among(names))
    return [*columns]


def _array(values: list[Any] | pandas.Series, column: RawColumn) -> pa.Array:
    """Cells of a column. The encoder takes every type, but texts beside numbers are of none: they become texts."""
    try:
        found = pa.array(values, from_pandas=True)
        if not _one_by_one(found.type, column):
            return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass
    if not isinstance(values, list):
        values = values.astype(object).where(values.notna(), None)
    if column.is_list:
        return _lists(list(values), column)
    return pa.array([_text(row, value, column) for row, value in enumerate(values)], pa.string())


def _one_by_one(found: pa.DataType, column: RawColumn) -> bool:
    """Whether cells are looked at one by one: the encoder would refuse all of them, where a single one may be wrong."""
    if not column.is_list:
        return bool(pa.types.is_nested(found) or (pa.types.is_floating(found) and pa.types.is_string(column.type)))
    return pa.types.is_list(found) and pa.types.is_floating(found.value_type) and pa.types.is_string(column.type.value_type)


def _lists(values: list[Any], column: RawColumn) -> pa.Array:
    """Cells that hold lists, some of which hold texts beside numbers; or lists beside other things."""
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, (list, tuple, np.ndarray)):
            raise _refusal(row, f"{column.name} must be a list in each row", value)
    texts = [None if value is None else [_text(row, item, column) for item in value] for row, value in enumerate(values)]
    return pa.array(texts, pa.list_(pa.string()))


def _text(row: int, value: Any, column: RawColumn) -> str | None:
    """A cell as text, as the encoder would write it."""
    number = isinstance(value, (float, np.floating))
    kind = column.type.value_type if column.is_list else column.type
    if value is None or (number and value != value):
        return None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _refusal(row, f"{column.name} is no text: it holds half of a surrogate pair", ascii(value)) from None
        return value
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (int, np.integer)) or (number and not pa.types.is_string(kind)):
        return str(value)
    wanted = "text or an integer" if pa.types.is_string(kind) else "a number" if pa.types.is_floating(kind) else "an integer"
    raise _refusal(row, f"{column.name} must be {wanted}", value)


def _refusal(row: int, complaint: str, value: object) -> DataError:
    shown = str(value)
    shown = shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."
    return DataError(f"row {row} (counted from 0): {complaint}, found {shown}.")
