"""JSON lines as Arrow tables, with exact complaints."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from numpy.typing import NDArray

from mmlrec.encoding.cells import BLANKS, NESTED, NUMBER, SEVERAL, TYPICAL_MARKS, VECTORS, Cells, how_numbers_stand
from mmlrec.encoding.conversions import REMEDY, UNSIGNED, integer_text, json_item
from mmlrec.encoding.typed import WORDS, as_lists, as_type
from mmlrec.errors import DataError
from preprocessing.reading.raw_files import BadRow, Block, Piece, Source

_REMEDY = "Mend the line or fetch the file again."
_BOM = b"\xef\xbb\xbf"
#: A value that is an object without lists and objects in it.
_FLAT_OBJECT = r'\{(?:[^"{}\[\]]|"(?:[^"\\]|\\.)*")*\}'
_STRING = rb'[^"\\\n]*+(?:\\.[^"\\\n]*+)*+'
_KEY = rb'(?P<key>"(?P<name>' + _STRING + rb')"[ \t]*+:[ \t]*+)'
_PLAIN = rb"true|false|-?(?:0|[1-9][0-9]*+)(?:\.0++)?"
_TEXT = rb'"' + _STRING + rb'"'
_LIST = rb'\[[^"\[\]\n]*+(?:' + _TEXT + rb'[^"\[\]\n]*+)*+\]'
#: A key and its value, where that may have to be mended.
_CELL = re.compile(_KEY + rb"(?P<value>" + _PLAIN + rb"|" + _TEXT + rb"|" + _LIST + rb")(?=[ \t]*+[,}])")
#: Lists of texts, and of integers, in which nothing has to be mended; lists are slow to read.
_TEXTS_ALONE = re.compile(rb"\[[ \t]*+(?:" + _TEXT + rb"[, \t]*+)*+\]")
_INTEGERS_ALONE = re.compile(rb"\[[0-9, \t-]*+\]")
_TO_LINES = "import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]"

Lines = list[tuple[int, bytes]]  # number and content, without blanks and line ends around it


@dataclass(frozen=True)
class JsonLines(Source):
    """One JSON object a line, in UTF-8. Blank lines are passed over, and so are keys that are not wanted.

    An absent key and a JSON null become null. Bad rows are those that are no JSON object, hold a wanted key twice or with a
    value of another type, an integer beyond 64 bits, a number that is nan, infinite or too large for its type, or bytes that
    do not decode. `1.0` and `"1"` are no integers, but with `cells`.

    Attributes:
        columns: wanted key -> int64, float32, float64, string or bool; a list of one of these; or `pa.json_()` for an object,
            which is given as its JSON text in a column of strings.
        cells: what is done to a value first; integers may then stand as 7.0, and where a number is wanted, texts, which are
            taken as cells of CSV are, and booleans, which are 1 and 0; where text is wanted, integers and booleans. In lists,
            too. None: values are taken as they stand.
    """

    columns: dict[str, pa.DataType]
    cells: Cells | None = None

    def opened(self, path: Path, text: bytes) -> JsonLines:
        """Itself. Raises DataError when the file is one JSON array instead of lines."""
        if text.lstrip(_BOM + b" \t\r\n").startswith(b"["):
            raise DataError(
                f"{path}, line 1: the file begins with '[', so it is one JSON array; one JSON object a line is needed."
                f" Fetch the original, or unpack the array into lines: python -c '{_TO_LINES}' < array.json > {self.name}"
            )
        return self

    def parse(self, piece: Piece) -> Block:
        """The rows of a piece; see `Source`."""
        text = piece.text.removeprefix(_BOM) if piece.first_line == 1 else piece.text
        bad_rows: list[BadRow] = []
        table = self._as_it_stands(text)
        if table is not None:
            lines = np.arange(piece.first_line, piece.first_line + len(table))
        else:
            text = text if self.cells is None else _mended(text, self.columns, self.cells)
            stripped = [(number, line.strip(b" \t\r")) for number, line in enumerate(text.split(b"\n"), piece.first_line)]
            remedy = _REMEDY if self.cells is None else REMEDY
            filled = [(number, line) for number, line in stripped if line]
            runs = list(_good_runs(filled, self.columns, piece.path, remedy, bad_rows))
            bad_rows.sort(key=lambda row: row.line)
            lines = np.array([number for numbers, _ in runs for number in numbers], np.int64)
            empty = _schema(self.columns).empty_table()
            table = pa.concat_tables([empty, *(run for _, run in runs)]).combine_chunks()
        if self.cells is not None:
            taken = [self.cells.take(name, table[name].combine_chunks()) for name in table.column_names]
            table = pa.table(taken, table.column_names)
        block = Block(self, piece.path, lines, table, bad_rows)
        for name, kind in self.columns.items():
            if pa.types.is_floating(kind) or (pa.types.is_list(kind) and pa.types.is_floating(kind.value_type)):
                complaint = f"{name} is nan or infinite, or too large. Leave the key out, or mend the line."
                block = block.require(_finite(block.table[name]), complaint)
        return block

    def _as_it_stands(self, text: bytes) -> pa.Table | None:
        """The rows, where nothing has to be mended and no line is bad."""
        with contextlib.suppress(pa.ArrowInvalid, UnicodeDecodeError):
            return _parse(text, self.columns)
        read = self.columns if self.cells is None else _as_first_line_has(text, self.columns)
        if read == self.columns:
            return None
        with contextlib.suppress(pa.ArrowInvalid, UnicodeDecodeError):  # ten times as fast as to mend the lines
            table = _parse(text, read)
            return pa.table({name: self._typed(name, table[name].combine_chunks()) for name in self.columns})
        return None

    def _typed(self, name: str, values: pa.Array) -> pa.Array:
        """Values that were read as another type. Raises ArrowInvalid where one is not of the wanted one."""
        assert self.cells is not None
        kind = self.columns[name]
        if values.type == kind:
            return values
        if pa.types.is_list(kind):
            found, faults = as_lists(values, kind.value_type, None, name, self.cells)
        else:
            found, faults = as_type(values, kind, name, self.cells)
        if not all(good.all() for good, _, _ in faults):
            raise pa.ArrowInvalid("a value of another type")
        return found


def _as_first_line_has(text: bytes, columns: dict[str, pa.DataType]) -> dict[str, pa.DataType]:
    """The columns with other types for numbers and texts that the first line has as booleans, or as each other."""
    try:
        first = json.loads(text.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return columns
    if not isinstance(first, dict):
        return columns
    return {name: _type_there(first.get(name), kind) for name, kind in columns.items()}


def _type_there(value: Any, kind: pa.DataType) -> pa.DataType:
    """The type as which a column is read whose first value this is."""
    if pa.types.is_list(kind):
        there = next((item for item in value if item is not None), None) if isinstance(value, list) else None
        if pa.types.is_string(kind.value_type) and type(there) is int:
            return pa.list_(pa.int64())
        return pa.list_(_type_there(there, kind.value_type))
    if isinstance(value, bool) and (pa.types.is_floating(kind) or pa.types.is_string(kind)):
        return pa.bool_()
    if isinstance(value, str) and (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        return pa.string()
    return kind


def _mended(text: bytes, columns: dict[str, pa.DataType], cells: Cells) -> bytes:
    """The lines with values as they are wanted, in one pass for all columns: see `JsonLines.cells`.

    A quotation mark within a JSON string has a backslash before it, so a quoted name with a colon behind it is a key.
    """
    kinds = {form: (name, kind) for name, kind in columns.items() for form in in_json(name)}

    def mend(found: re.Match[bytes]) -> bytes:
        if found["name"] not in kinds:
            return found[0]
        name, kind = kinds[found["name"]]
        of_kind = _mended_list if found["value"].startswith(b"[") else _mended_value
        return found["key"] + of_kind(found["value"], name, kind, cells)

    return _CELL.sub(mend, text)


def _mended_value(value: bytes, name: str, kind: pa.DataType, cells: Cells) -> bytes:
    """A text, a boolean or an integer, which may stand as 7.0, as it is wanted; as it stands, where it cannot be."""
    quoted = value.startswith(b'"')
    if pa.types.is_string(kind):
        return value if quoted or b"." in value else b'"' + value + b'"'
    if not quoted:
        if pa.types.is_integer(kind):
            return value.partition(b".")[0]
        return WORDS.get(value.decode(), "").encode() or value if pa.types.is_floating(kind) else value
    text = _python(value)
    if not isinstance(text, str) or pa.types.is_list(kind):
        return value
    text = cells.text(name, text)
    if not text:
        return b"null"
    text = text.strip(BLANKS)
    if pa.types.is_integer(kind):
        return (integer_text(text) or "").encode() or value
    if pa.types.is_floating(kind) and (text in WORDS or NUMBER.fullmatch(text)):
        number = float(WORDS.get(text, text))
        return repr(number).encode() if math.isfinite(number) else value
    return value


def _mended_list(value: bytes, name: str, kind: pa.DataType, cells: Cells) -> bytes:
    if not pa.types.is_list(kind):
        return value
    if (_TEXTS_ALONE if pa.types.is_string(kind.value_type) else _INTEGERS_ALONE).fullmatch(value):
        return value
    found = _python(value)
    if not isinstance(found, list):
        return value
    return json.dumps([json_item(item, name, kind.value_type, cells) for item in found]).encode()


def _python(value: bytes) -> Any:
    """A JSON value; None where it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value.decode())
    return None


def in_json(text: str) -> tuple[bytes, bytes]:
    """A text as it stands between the quotation marks of JSON: in UTF-8, and in ASCII, as Python writes it."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode(), json.dumps(text)[1:-1].encode()


def _schema(columns: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema([(name, pa.string() if isinstance(kind, pa.JsonType) else kind) for name, kind in columns.items()])


def _finite(values: pa.ChunkedArray) -> NDArray[np.bool_]:
    """[rows] whether no value of a row is nan or infinite; values are numbers or lists of numbers."""
    if not pa.types.is_list(values.type):
        return pc.is_finite(values).fill_null(True).to_numpy(zero_copy_only=False)
    good = np.ones(len(values), bool)
    finite = pc.is_finite(pc.list_flatten(values)).fill_null(True)
    good[pc.list_parent_indices(values).filter(pc.invert(finite)).to_numpy()] = False
    return good


def _parse(text: bytes, columns: dict[str, pa.DataType]) -> pa.Table:
    """Rows of lines each of which ends in a line end. Raises ArrowInvalid or UnicodeDecodeError when one of them is bad."""
    text.decode()  # Arrow takes any bytes for text
    content = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(content == ord("\n"))
    starts = np.append(0, ends + 1)
    # Without this, Arrow would take an object over two lines, and it crashes when a text begins with null.
    if not ((content[starts[:-1]] == ord("{")).all() and (content[ends - 1] == ord("}")).all()):
        raise pa.ArrowInvalid("a line is no object")
    nested = pa.struct([])  # for Arrow to see that there is an object, and to skip what is in it
    schema = pa.schema([(name, nested if isinstance(kind, pa.JsonType) else kind) for name, kind in columns.items()])
    table = pyarrow.json.read_json(
        pa.py_buffer(text),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    if len(table) != len(ends):
        raise pa.ArrowInvalid("a line with several objects")
    for index, (name, kind) in enumerate(columns.items()):
        if isinstance(kind, pa.JsonType):
            buffers = [None, pa.py_buffer(starts), pa.py_buffer(text)]
            lines = pa.Array.from_buffers(pa.large_string(), len(ends), buffers)
            objects = _objects(name, lines, table[name].is_valid().combine_chunks())
            table = table.set_column(index, pa.field(name, pa.string()), objects)
    return table.combine_chunks()


def _objects(name: str, lines: pa.LargeStringArray, present: pa.BooleanArray) -> pa.Array:
    """JSON text of a key's value, which is an object in the lines where it is `present`; [rows] strings, others null.

    A quotation mark within a JSON string has a backslash before it. So where the quoted name stands once in a line whose
    object has the key, it stands for the key. Other lines, and objects that are not flat, are left to Python.
    """
    key = json.dumps(name, ensure_ascii=False)
    once = pc.and_(present, pc.equal(pc.count_substring(lines, key), 1))
    pattern = rf"{re.escape(key)}\s*:\s*(?P<value>{_FLAT_OBJECT})"
    matched = pc.extract_regex(pc.if_else(once, lines, None), pattern)
    found = pc.struct_field(matched, "value").cast(pa.string())
    missed = np.flatnonzero(pc.and_(present, found.is_null()).to_numpy(zero_copy_only=False))
    if not len(missed):
        return found
    values = found.to_pylist()
    for row in missed:
        values[row] = json.dumps(json.loads(lines[int(row)].as_py())[name], ensure_ascii=False)
    return pa.array(values, pa.string())


def _good_runs(
    lines: Lines, columns: dict[str, pa.DataType], path: Path, remedy: str, bad_rows: list[BadRow]
) -> Iterator[tuple[list[int], pa.Table]]:
    """Numbers and rows of the good lines, in runs.

    Arrow alone decides what is good, so that no line's fate hangs on its neighbours. Python finds the words, and where it
    finds none, the lines are halved until the bad one stands alone.
    """
    if not lines:
        return
    try:
        yield [number for number, _ in lines], _parse(b"".join(line + b"\n" for _, line in lines), columns)
        return
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        wrong = [_complaint(line, columns) for _, line in lines]
        if len(lines) == 1:
            wrong = [wrong[0] or _Wrong(f"{error}.")]
    for (number, _), why in zip(lines, wrong, strict=True):
        if why:
            own = why.remedy if remedy == REMEDY else None
            bad_rows.append(BadRow(path, number, f"{why.words} {own or remedy}"))
    rest = [line for line, why in zip(lines, wrong, strict=True) if not why]
    middle = len(rest) // 2 if len(rest) == len(lines) else len(rest)
    yield from _good_runs(rest[:middle], columns, path, remedy, bad_rows)
    yield from _good_runs(rest[middle:], columns, path, remedy, bad_rows)


class _Wrong(NamedTuple):
    """What is wrong with a line or a value, and what to do about it in a table of one's own; None: as about any other."""

    words: str
    remedy: str | None = None


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, in which a key may stand twice."""


def _complaint(line: bytes, columns: dict[str, pa.DataType]) -> _Wrong | None:
    """What is wrong with a line; None when Python sees nothing that Arrow would refuse."""
    shown = repr(line[:80])
    try:
        found = json.loads(line.decode(), object_pairs_hook=_Object)
    except UnicodeDecodeError as error:
        return _Wrong(f"bytes that are not utf-8 ({error.reason}).")
    except RecursionError:
        return None
    except ValueError as error:
        return None if b"Inf" in line else _Wrong(f"no JSON ({error}): {shown}.")  # Arrow takes Inf for a number
    if not isinstance(found, _Object):
        return _Wrong(f"a JSON object is needed, found {shown}.")
    names = [name for name, _ in found]
    for name, kind in columns.items():
        if names.count(name) > 1:
            return _Wrong(f"the key {name} stands twice in the line.")
        if (value := dict(found).get(name)) is not None and (why := _mismatch(value, kind)):
            numbers = isinstance(value, list) and any(isinstance(item, float) for item in value)
            remedy = _remedy_of_text(name, value, kind) if isinstance(value, str) else why.remedy
            if isinstance(value, _Object) or (isinstance(value, list) and any(isinstance(item, _Object) for item in value)):
                remedy = NESTED
            elif isinstance(value, list) and pa.types.is_string(kind):
                remedy = SEVERAL
            return _Wrong(f"{name} {why.words}." + (f" {VECTORS}" if numbers else ""), remedy)
    return None


def _remedy_of_text(name: str, text: str, kind: pa.DataType) -> str | None:
    """What can be done about a text where a number, or a list, is wanted; None where neither is."""
    if pa.types.is_list(kind):
        return f"{REMEDY} Of several ids in a text, name what stands between them: separator."
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    if text.strip(BLANKS).lower() in TYPICAL_MARKS:
        return f"If it means a missing value, say so: missing: ['{text}']."
    if pa.types.is_integer(kind):
        return (
            f"A text is an id, a key or a scenario with type: string, or in quotes. Or mend the line.{how_numbers_stand(text)}"
        )
    if hint := how_numbers_stand(text):
        return f"{REMEDY}{hint}"
    return f'{REMEDY} A label of words is a condition, such as "`{name}` == {text[:20]!r}".'


def _mismatch(value: Any, kind: pa.DataType) -> _Wrong | None:
    """Why a JSON value is not of a type; None when it is."""
    shown = repr(dict(value) if isinstance(value, _Object) else value)[:80]
    if pa.types.is_list(kind):
        if type(value) is not list:
            return _Wrong(f"must be a list, found {shown}")
        wrong = (why for item in value if item is not None and (why := _mismatch(item, kind.value_type)))
        return next((_Wrong(f"holds a value that {why.words}", why.remedy) for why in wrong), None)
    wanted, what = _PYTHON_TYPES[kind]
    if type(value) not in wanted:
        return _Wrong(f"must be {what}, found {shown}")
    if pa.types.is_integer(kind) and not -(2**63) <= value < 2**63:
        return _Wrong(f"does not fit into 64 bits, found {shown}", UNSIGNED)
    return None


_PYTHON_TYPES: dict[pa.DataType, tuple[tuple[type, ...], str]] = {
    pa.int64(): ((int,), "an integer"),
    pa.float32(): ((int, float), "a number"),
    pa.float64(): ((int, float), "a number"),
    pa.string(): ((str,), "a string"),
    pa.bool_(): ((bool,), "true or false"),
    pa.json_(): ((_Object,), "an object"),
}
