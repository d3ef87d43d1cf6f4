"""DataFrames and Arrow tables as they are given, as Arrow columns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmlrec.encoding.conversions import UNSIGNED
from mmlrec.errors import ConfigError, DataError, did_you_mean, kind_of

#: Raw rows: a pandas DataFrame or an Arrow table.
Frame: TypeAlias = pd.DataFrame | pa.Table


def columns_of(frame: Frame) -> list[str]:
    """The names of its columns.

    Raises:
        ConfigError: it is neither a DataFrame nor an Arrow table.
        DataError: names are no text, or not unique.
    """
    if not isinstance(frame, pd.DataFrame | pa.Table):
        raise ConfigError(f"frame: a pandas DataFrame or an Arrow table is needed, found {kind_of(frame)}.")
    names = frame.column_names if isinstance(frame, pa.Table) else list(frame.columns)
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"frame: the column {name!r} has no text as its name. Rename it: frame.rename(columns=str).")
        if names.count(name) > 1:
            raise DataError(f"frame: two columns have the name '{name}'. Rename one of them.")
    return names


def arrow_table(frame: Frame, columns: Mapping[str, str]) -> pa.Table:
    """Some columns of a frame as Arrow. In a DataFrame None, NaN, NaT and NA are missing cells.

    Args:
        columns: those to take -> the argument that names each, for messages.

    Raises:
        ConfigError: it is no frame, or a column is not there.
        DataError: a column's cells are of several types, or of one that Arrow does not know.
    """
    names = columns_of(frame)
    found = {}
    for column, argument in columns.items():
        if column not in names:
            listed = f"{', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
            raise ConfigError(
                f"{argument}: the frame has no column '{column}'.{did_you_mean(column, names)} Its columns: {listed}."
            )
        cells = frame[column] if isinstance(frame, pa.Table) else _arrow(frame[column], column, argument)
        found[column] = _as_files_hold(cells)
    return pa.table(found)


def values_of(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The cells of a category, each with its value; others as they are."""
    if not pa.types.is_dictionary(column.type):
        return column
    kind = column.type.value_type
    if pa.types.is_string_view(kind):  # of which Arrow cannot take some
        kind = pa.large_string()
        column = column.cast(pa.dictionary(column.type.index_type, kind, column.type.ordered))
    return pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], kind)


def write_frame(table: pa.Table, path: Path) -> None:
    """Write rows as a Parquet file.

    Raises:
        DataError: a column is of a type that Parquet does not hold, or the disk is full.
    """
    try:
        pq.write_table(table, path)
    except pa.ArrowNotImplementedError:
        for name, column in zip(table.column_names, table.columns, strict=True):
            try:
                pq.write_table(pa.table({name: column}), pa.BufferOutputStream())
            except pa.ArrowNotImplementedError as error:
                raise DataError(
                    f"frame: cells of column '{name}', of type {column.type}, cannot be read. Convert it, for example"
                    f" frame['{name}'].astype('string')."
                ) from error
        raise
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"{path.parent}: the rows cannot be written: {why}. Free space, or set TMPDIR to another folder."
        ) from error


def _as_files_hold(cells: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """The same cells in a type that Parquet can hold: of categories it knows none that means a missing value."""
    column = cells if isinstance(cells, pa.ChunkedArray) else pa.chunked_array([cells])
    if pa.types.is_dictionary(column.type) and (
        pa.types.is_string_view(column.type.value_type) or any(chunk.dictionary.null_count for chunk in column.chunks)
    ):
        column = values_of(column)
    return column.cast(pa.large_string()) if pa.types.is_string_view(column.type) else column


def _arrow(series: pd.Series, column: str, argument: str) -> pa.Array:
    if isinstance(series.dtype, pd.SparseDtype):
        series = series.sparse.to_dense()
    try:
        return pa.Array.from_pandas(series)
    except (OverflowError, UnicodeEncodeError) as error:
        # Where NumPy's unsigned integers stand beside others, each may be held, and no row is to blame.
        row = next((row for row, cell in enumerate(series) if not _is_value(cell)), None)
        where = f"{argument}: column '{column}'" + ("" if row is None else f", row {row} (counted from 0)")
        if isinstance(error, OverflowError):
            of_lists = any(isinstance(cell, list | tuple | np.ndarray) for cell in series)
            texts = ".map(lambda cell: [str(each) for each in cell])" if of_lists else ".astype('string')"
            why = f"an integer does not fit into 64 bits. {UNSIGNED} Convert it: frame['{column}']{texts}."
        else:
            why = "half of a surrogate pair is no text. Drop it."
        raise DataError(f"{where}: {why}") from error
    except (pa.ArrowException, TypeError) as error:
        kinds = sorted({type(cell).__name__ for cell in series.dropna()})
        holds = f"cells of several types ({', '.join(kinds[:5])})" if len(kinds) > 1 else f"cells that cannot be read: {error}"
        raise DataError(
            f"{argument}: column '{column}' holds {holds}. Give it one, for example frame['{column}'].astype('string')."
        ) from error


def _is_value(cell: object) -> bool:
    """Whether Arrow can hold what stands in a cell."""
    try:
        pa.array([cell], from_pandas=True)
    except (OverflowError, UnicodeEncodeError):
        return False
    return True
