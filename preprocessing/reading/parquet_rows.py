"""Parquet files, some rows at a time, with exact complaints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmlrec.encoding.cells import NESTED, SEVERAL, VECTORS, Cells
from mmlrec.encoding.conversions import FOUND, ROUNDED, UNSIGNED, whole
from mmlrec.encoding.typed import as_lists, as_type, is_list
from mmlrec.errors import DataError
from preprocessing.reading.packed import check_size
from preprocessing.reading.raw_files import Block, Piece, RawFolder, Source, where_else

_MOST_ROWS = 1 << 17
#: Type of texts -> that of the same bytes.
_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


@dataclass(frozen=True)
class ParquetRows(Source):
    """The wanted columns of a Parquet file. In complaints a row is a line; the first is line 1.

    Null stays null; a column of nulls alone has no type of its own and may be any. Bad rows are those with an integer beyond 64
    bits or with a fraction (pandas stores integers with gaps as float, which must be less than 2^53 then; databases store them
    as decimals), or with a number that is nan, infinite or too large for the wanted type.

    Attributes:
        columns: name -> int64, float32, float64, bool or string, or a list of one of these. As strings, times and dates are
            given in ISO 8601, integers in digits, and booleans as `true` and `false`.
        cells: what is done to a value first. None: values are taken as they stand.
        optional: columns that the file may lack; they are then null.
    """

    columns: dict[str, pa.DataType]
    cells: Cells | None = None
    optional: tuple[str, ...] = ()

    def pieces(self, raw: RawFolder, piece_bytes: int) -> Iterator[Piece]:
        """Rows as an Arrow stream of one batch. Raises DataError when a column is missing or of another kind."""
        path = raw.paths[self.name]
        if not path.stat().st_size:
            return
        with _readable(path), _open(path) as file:
            self._check(path, file.schema_arrow)
            groups = range(file.metadata.num_row_groups)
            unpacked_bytes = sum(file.metadata.row_group(g).total_byte_size for g in groups)
            check_size(path, path.stat().st_size, unpacked_bytes)
            row_bytes = unpacked_bytes // max(file.metadata.num_rows, 1)
            rows = min(max(piece_bytes // max(row_bytes, 1), 1), _MOST_ROWS)
            start = 1
            there = [name for name in self.columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(rows, columns=there):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as stream:
                    stream.write_batch(batch)
                yield Piece(path, start, sink.getvalue().to_pybytes())
                start += batch.num_rows

    def may_be_empty(self, raw: RawFolder) -> bool:
        """Engines that write in parallel leave Parquet files without rows."""
        path = raw.paths[self.name]
        if not path.stat().st_size:
            return False
        with _readable(path), _open(path) as file:
            return bool(file.metadata.num_rows == 0)

    def parse(self, piece: Piece) -> Block:
        """The rows of a piece; see `Source`."""
        with pa.ipc.open_stream(piece.text) as stream:
            table = stream.read_all().combine_chunks()
        cells = self.cells or Cells()
        for index, name in enumerate(table.column_names):
            values = _without_views(table[name].combine_chunks())
            table, found = table.set_column(index, name, values), values.type
            # Of texts the bytes are looked at first, and decimals that are integers would become floats.
            if not _is_text(found) and not (pa.types.is_decimal(found) and pa.types.is_integer(self.columns[name])):
                table = table.set_column(index, name, cells.take(name, values))
        for name in self.optional:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), self.columns[name]))
        block = Block(self, piece.path, np.arange(piece.first_line, piece.first_line + len(table)), table)
        for name, kind in self.columns.items():
            good = _fits(table[name].combine_chunks(), name, kind, cells)
            if good is not None:
                remedy = "Mend the row, or leave it null."
                if _is_text(table[name].type) and not _is_text(kind):
                    remedy = f"{remedy} {_remedy_of_text(name, kind)}"
                elif pa.types.is_integer(_element(kind)) and pa.types.is_floating(_element(table[name].type)):
                    remedy = f"{remedy} {ROUNDED}"
                elif pa.types.is_integer(_element(kind)) and self.cells is not None:
                    remedy = f"{remedy} {UNSIGNED}"
                complaint = f"{name} is no {_word(kind)} that can be used{FOUND}. {remedy}"
                here = good.to_numpy(zero_copy_only=False)[block.lines - piece.first_line]
                block = block.require(here, complaint, shown=name)
        columns = {name: self._as(name, block.table[name].combine_chunks(), cells) for name in self.columns}
        return Block(self, piece.path, block.lines, pa.table(columns), block.bad_rows)

    def _as(self, name: str, values: pa.Array, cells: Cells) -> pa.Array:
        """Values that fit, as they are wanted."""
        kind = self.columns[name]
        if not _is_text(values.type) or _is_text(kind):
            return cells.take(name, _as(values, kind))
        of_text = as_lists(values, _element(kind), None, name, cells) if is_list(kind) else as_type(values, kind, name, cells)
        return of_text[0]

    def _check(self, path: Path, schema: pa.Schema) -> None:
        for name, kind in self.columns.items():
            if name in self.optional and name not in schema.names:
                continue
            if name not in schema.names:
                raise DataError(
                    f"{path}: there is no column '{name}'.{where_else(path, name, schema.names)}"
                    f" Columns: {', '.join(schema.names[:20])}{' ...' if len(schema.names) > 20 else ''}."
                )
            if schema.names.count(name) > 1:
                raise DataError(f"{path}: two columns have the name '{name}'. Write the file anew with one of them renamed.")
            found = schema.field(name).type
            if pa.types.is_null(found):  # as pandas writes a column in which all is missing
                continue
            if is_list(kind) != is_list(found) or not _usable(_element(found), _element(kind)):
                remedy = _remedy(name, found, kind)
                raise DataError(f"{path}: column '{name}' is of type {found}; {_word(kind)} is needed. {remedy}")


def _open(path: Path) -> pq.ParquetFile:
    """Pages are read as they are needed; otherwise a whole row group, of any size, would be in memory."""
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises DataError when the file is damaged, no Parquet, or cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start != b"PAR1":
            raise DataError(f"{path}: no Parquet file: it begins with {start!r}. Unpack it, or name its format.")
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
        # Arrow's own OSError has no number
        why = " ".join(str(error).split())
        raise DataError(f"{path}: the Parquet file is truncated or damaged ({why}). Fetch it again.") from error


def _element(kind: pa.DataType) -> pa.DataType:
    kind = kind.value_type if is_list(kind) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return _element(kind) in _BYTES


def _usable(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_null(found):
        return True
    number = pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
    text = found in _BYTES
    if pa.types.is_integer(wanted):
        return number or text
    if pa.types.is_floating(wanted):
        return number or text or pa.types.is_boolean(found)
    if pa.types.is_string(wanted):
        return text or pa.types.is_temporal(found) or pa.types.is_integer(found) or pa.types.is_boolean(found)
    return pa.types.is_boolean(found)


def _word(kind: pa.DataType) -> str:
    words = {"int64": "integer", "float": "number", "double": "number", "bool": "boolean"}
    word = words.get(str(_element(kind)), "string")
    return f"list of {word}s" if is_list(kind) else word


def _remedy(name: str, found: pa.DataType, wanted: pa.DataType) -> str:
    """What can be done with a column of another type than the wanted one."""
    if is_list(found) and pa.types.is_floating(_element(found)):
        return VECTORS
    if pa.types.is_struct(_element(found)) or pa.types.is_map(found):
        return NESTED
    if is_list(found) and not is_list(wanted):
        return SEVERAL
    if (pa.types.is_floating(found) or pa.types.is_decimal(found)) and pa.types.is_string(wanted):
        return "Whole numbers are ids with type: int, and times with a format, such as format: seconds."
    if pa.types.is_boolean(found) and pa.types.is_integer(wanted):
        return "Booleans are ids with type: string, 'true' and 'false'."
    if is_list(wanted) and not is_list(found):
        return "A value a row is a feature of kind: id, and ids in a text have a separator."
    if pa.types.is_boolean(wanted):
        return "Compare it with what it holds, such as 1 or 'true'."
    return "Leave it away, or write it anew in that type."


def _remedy_of_text(name: str, kind: pa.DataType) -> str:
    """What can be done with a text that is no number."""
    words = "Texts that mean a missing value stand under missing."
    if pa.types.is_integer(_element(kind)):
        return f"{words} Others are ids, keys or scenarios with type: string, or in quotes."
    words += " Numbers have a point before decimals and nothing between thousands."
    return f"{words} A label of words is a condition, such as \"`{name}` == 'yes'\"."


def _fits(values: pa.Array, name: str, kind: pa.DataType, cells: Cells) -> pa.BooleanArray | None:
    """[rows] whether a value can be given as the wanted type; None where every value of this type can."""
    if pa.types.is_null(values.type):
        return None
    if is_list(kind):
        inner = _fits(pc.list_flatten(values), name, _element(kind), cells)
        if inner is None or pc.all(inner).as_py() is not False:
            return None
        good = np.ones(len(values), bool)
        good[pc.list_parent_indices(values).filter(pc.invert(inner)).to_numpy()] = False
        return pa.array(good)
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    if pa.types.is_floating(values.type):
        fits = whole(values) if pa.types.is_integer(kind) else pc.is_finite(values.cast(pa.float64()).cast(kind))
        return fits.fill_null(True)
    if pa.types.is_decimal(values.type) and pa.types.is_integer(kind):
        try:
            values.cast(kind)
        except pa.ArrowInvalid:
            return pa.array([number is None or _is_integer(number) for number in values.to_pylist()])
        return None
    if pa.types.is_uint64(values.type) and pa.types.is_integer(kind):
        return pc.less(values, pa.scalar(2**63, pa.uint64())).fill_null(True)
    if not _is_text(values.type):
        return None
    decodes = None
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        texts = values.view(_BYTES[values.type]).to_pylist()
        decodes = pa.array([_decodes(text) for text in texts])
        values = pa.array([text and text.decode(errors="replace") for text in texts], pa.string())
    if _is_text(kind):
        return decodes
    found, faults = as_type(values, kind, name, cells)
    good = np.logical_and.reduce([good for good, _, _ in faults]) if faults else np.ones(len(values), bool)
    if pa.types.is_floating(kind):
        good = good & pc.is_finite(found).fill_null(True).to_numpy(zero_copy_only=False)
    return pa.array(good) if decodes is None else pc.and_(decodes, pa.array(good))


def _is_integer(number: Decimal) -> bool:
    """Whether it is one of 64 bits."""
    return -(2**63) <= number < 2**63 and number == int(number)


def _decodes(text: bytes | None) -> bool:
    try:
        return text is None or text.decode() is not None
    except UnicodeDecodeError:
        return False


def _plain_lists(values: pa.Array) -> pa.Array:
    """Lists of a fixed size, in which a null takes room, too, and views, which a cast takes wrongly beside nulls, as others."""
    if not is_list(values.type) or pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return values
    lengths = pc.list_value_length(values).fill_null(0).to_numpy().astype(np.int64)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pc.list_flatten(values), mask=values.is_null())


def _without_views(values: pa.Array) -> pa.Array:
    """Views of texts and lists as what they hold, bytes that are no text, too: Arrow takes no rows of views out of a table."""
    values = _plain_lists(values)
    if not is_list(values.type):
        return values.cast(pa.string()) if pa.types.is_string_view(values.type) else values
    if not pa.types.is_string_view(values.type.value_type):
        return values
    return values.cast(pa.large_list(pa.string()) if pa.types.is_large_list(values.type) else pa.list_(pa.string()))


def _as(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_boolean(values.type) and pa.types.is_floating(kind):
        values = values.cast(pa.int8())
    # Integers beyond 2^53 are rounded where a number is wanted.
    return values.cast(kind, safe=not (pa.types.is_integer(values.type) and pa.types.is_floating(kind)))
