"""Numpy arrays with one row an example, one in a file (.npy) or several (.npz): read side by side, in constant memory."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy

from mmlrec.errors import DataError
from preprocessing.reading.packed import open_member, open_unpacked, readable
from preprocessing.reading.raw_files import Block, Piece, RawFolder, Source

_REMEDY = "Fetch the file again, or write it anew with numpy.save."


@dataclass(frozen=True)
class Arrays(Source):
    """Arrays [rows, width] as columns of a table. In complaints a row of an array is a line; the first is line 1.

    Attributes:
        name: the file that complaints name.
        files: name -> columns. An .npy file has one column of its array for each; an .npz file has a member K.npy, a list a
            row, for the K-th of them, from 0.
        columns: name -> int64 or float32, or a list of them.
        optional: columns whose file may be absent; they are then null.
    """

    files: tuple[tuple[str, tuple[str, ...]], ...]
    columns: dict[str, pa.DataType]
    optional: tuple[str, ...] = ()

    def pieces(self, raw: RawFolder, piece_bytes: int) -> Iterator[Piece]:
        """Rows of all arrays, as an Arrow stream of one batch. Raises DataError when the arrays do not fit together."""
        with ExitStack() as stack:
            arrays: list[_Array] = []
            for name, columns in self.files:
                if name not in raw.paths and {*columns} <= {*self.optional}:
                    continue
                arrays += self._open(raw.paths[name], name, columns, stack)
            num_rows = arrays[0].num_rows
            for array in arrays:
                if array.num_rows != num_rows:
                    found = f"{array.num_rows:,} rows, but {arrays[0].path} has {num_rows:,}"
                    raise DataError(f"{array.path}: {found}. Fetch the files of one release.")
            step = max(1, piece_bytes // sum(array.row_bytes for array in arrays))
            names = ["\t".join(array.columns) for array in arrays]
            for start in range(0, num_rows, step):
                rows = min(step, num_rows - start)
                batch = pa.RecordBatch.from_arrays([array.read(rows) for array in arrays], names)
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as stream:
                    stream.write_batch(batch)
                yield Piece(raw.paths[self.name], start + 1, sink.getvalue().to_pybytes())

    def parse(self, piece: Piece) -> Block:
        """The rows of a piece; see `Source`."""
        with pa.ipc.open_stream(piece.text) as stream:
            batch = stream.read_next_batch()
        table: dict[str, pa.Array] = {}
        for joined, array in zip(batch.schema.names, batch.columns, strict=True):
            names = joined.split("\t")
            if pa.types.is_list(self.columns[names[0]]):
                width = array.type.list_size
                offsets = np.arange(0, batch.num_rows * width + 1, width, dtype=np.int32)
                table[joined] = pa.ListArray.from_arrays(pa.array(offsets), array.flatten()).cast(self.columns[joined])
            else:
                values = array.flatten().to_numpy().reshape(batch.num_rows, len(names))
                for k, name in enumerate(names):
                    table[name] = pa.array(np.ascontiguousarray(values[:, k])).cast(self.columns[name])
        lines = np.arange(piece.first_line, piece.first_line + batch.num_rows)
        absent = {name: pa.nulls(batch.num_rows, self.columns[name]) for name in self.optional if name not in table}
        return Block(self, piece.path, lines, pa.table(table | absent))

    def _open(self, path: Path, name: str, columns: tuple[str, ...], stack: ExitStack) -> Iterator[_Array]:
        with readable(path):
            if not name.endswith(".npz"):
                file = stack.enter_context(open_unpacked(path, name))
                yield _Array(path, file, columns, self.columns[columns[0]])
                return
            archive = stack.enter_context(zipfile.ZipFile(path))
            for k, column in enumerate(columns):
                if f"{k}.npy" not in archive.namelist():
                    raise DataError(f"{path}: the archive holds no {k}.npy, for {column}. Fetch the right file.")
                member = stack.enter_context(open_member(archive, f"{k}.npy", path))
                yield _Array(path, member, (column,), self.columns[column])


class _Array:
    """An array that is read forward, some rows at a time. It holds `columns`, all of one type."""

    def __init__(self, path: Path, file: BinaryIO, columns: tuple[str, ...], kind: pa.DataType) -> None:
        self.path, self.columns = path, columns
        self._file = file
        try:
            header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
            shape, by_columns, dtype = header(file)
        except ValueError as error:
            raise DataError(f"{path}: no numpy array ({error}). {_REMEDY}") from error
        is_list = pa.types.is_list(kind)
        wanted = (kind.value_type if is_list else kind).to_pandas_dtype()
        what = f"{columns[0]}{f' ... {columns[-1]}' if len(columns) > 1 else ''}"
        if not np.can_cast(dtype, wanted):
            raise DataError(f"{path}: {what} must be of {np.dtype(wanted)}, found {dtype}. {_REMEDY}")
        self.num_rows, width = (*shape, 1)[:2] if 1 <= len(shape) <= 2 else (0, 0)
        if width < 1 or (not is_list and width != len(columns)) or (by_columns and width > 1):
            form = "[rows, any number]" if is_list else f"[rows, {len(columns)}]"
            order = ", stored column by column" if by_columns else ""
            raise DataError(f"{path}: {what} must be of shape {form}, row by row, found {list(shape)}{order}. {_REMEDY}")
        self._width, self._dtype = width, dtype
        self.row_bytes = width * dtype.itemsize

    def read(self, num_rows: int) -> pa.FixedSizeListArray:
        """The next rows, [num_rows, width]."""
        with readable(self.path):
            content = self._file.read(num_rows * self.row_bytes)
        if len(content) < num_rows * self.row_bytes:
            raise DataError(f"{self.path}: truncated: fewer than the {self.num_rows:,} rows that its header tells. {_REMEDY}")
        values = np.frombuffer(content, self._dtype)
        return pa.FixedSizeListArray.from_arrays(
            pa.array(values.astype(self._dtype.newbyteorder("="), copy=False)), self._width
        )
