"""Delimited text as Arrow tables, with exact complaints."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mmlrec.encoding.cells import BLANKS, INTEGER, NUMBER, TYPICAL_MARKS, VECTORS, WHOLE, Cells, how_numbers_stand
from mmlrec.encoding.conversions import UNSIGNED
from mmlrec.encoding.typed import WORDS, words_as_numbers
from mmlrec.errors import ConfigError, DataError
from preprocessing.reading.raw_files import BadRow, Block, Piece, RawFolder, Source, where_else

_REMEDY = "Mend the line or fetch the file again."
_OWN_REMEDY = "Mend the line."
_SEPARATORS = ("\t", ";", "|", ",", "::", " ", "\x01")  # those that are usual
_SEPARATOR = "\x01"  # stands for a separator of several characters: Arrow's reader takes only one
_BOOLEANS = ("1", "true", "TRUE", "True", "0", "false", "FALSE", "False")  # those that Arrow reads
_HEXADECIMAL = r"^[ \t]*[+-]?0[xX]"  # which Arrow takes for integers
_BLANK_LINE = re.compile(rb"(?:\A|\n)[ \t]*\r?\n")


@dataclass(frozen=True)
class DelimitedText(Source):
    """Delimited text, one row a line.

    Bad rows are those with the wrong number of fields, bytes that do not decode, or a field that is no number. An empty number
    becomes null; a literal nan or inf is a bad row, and so is a quoted field with a line end in it: files are cut at line ends.

    Attributes:
        separator: one or more characters between fields.
        columns: name -> int64, float32 or string. Without a header, one for each field of a line; with one, those that are
            wanted.
        header: the first line that is not passed over names the fields, in any order.
        quoted: a field may stand in double quotes, with separators in it and quotes doubled (RFC 4180). As with Python's csv,
            what follows the closing quote belongs to the field, and a quote that does not begin a field is a quote.
        comment: lines that are blank or start with it are passed over and counted. Empty: there are none.
        skip_blank: blank lines are passed over and counted; in a file of one field they hold a missing value.
        cells: what is done to a cell first; integers may then stand as 7.0, numbers as true and false, which are 1 and 0, and
            the header's names lose blanks as cells do. None: cells are taken as they stand.
        fields: names of all fields in their order; from the header, where there is one, and else `columns` when absent.
        optional: columns that the file may lack; they are then null. Where no header names the fields, a file lacks all of them
            or none: that its first line has so many fields less tells it.
        header_line: number of the line that is the header.
    """

    separator: str
    columns: dict[str, pa.DataType]
    encoding: str = "utf-8"
    header: bool = False
    quoted: bool = False
    comment: str = ""
    skip_blank: bool = False
    cells: Cells | None = None
    fields: tuple[str, ...] = ()
    header_line: int = 1
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.quoted and len(self.separator.encode()) > 1:
            raise ConfigError(f"quoted fields need a separator of one ASCII character, not {self.separator!r}.")

    def begins(self, text: bytes) -> bool:
        """Whether the header is among these first lines."""
        return not self.header or self._first_row(text) is not None

    def opened(self, path: Path, text: bytes) -> DelimitedText:
        """With `fields`. Raises DataError when the header lacks a wanted column, or there is none."""
        found = self._first_row(text)
        if not self.header:
            return replace(self, fields=self._fields_of(found[1] if found else b""))
        if found is None:
            remedy = "Fetch it again." if self.cells is None else "Name the columns in its first line, or in csv.columns."
            raise DataError(f"{path}: there is no header: its lines are blank or begin with {self.comment!r}. {remedy}")
        number, line = found
        return replace(self, fields=_header(path, number, line, self), header_line=number)

    def may_be_empty(self, raw: RawFolder) -> bool:
        """A header alone is what an hour without events leaves; not of a file whose rows are known to be there."""
        return self.header and self.cells is not None and any(self.pieces(raw, 1 << 16))

    @property
    def there(self) -> dict[str, pa.DataType]:
        """Those of `columns` that the file has; asked for once `fields` are known."""
        return {name: kind for name, kind in self.columns.items() if name not in self.optional or name in self.fields}

    def _fields_of(self, first: bytes) -> tuple[str, ...]:
        """Of a file without a header, by the number of fields of its first line."""
        fields = self.fields or tuple(self.columns)
        lacking = tuple(name for name in fields if name not in self.optional)
        with contextlib.suppress(UnicodeDecodeError, ValueError):
            if len(lacking) < len(fields) and len(_fields(first.rstrip(b"\r").decode(self.encoding), self)) == len(lacking):
                return lacking
        return fields

    def parse(self, piece: Piece) -> Block:
        """The rows of a piece; see `Source`."""
        path, text = piece.path, piece.text.removeprefix(codecs.BOM_UTF8) if piece.first_line == 1 else piece.text
        lines = np.arange(piece.first_line, piece.first_line + text.count(b"\n"))
        header_at = self.header_line - piece.first_line if self.header else -1
        passed_over: dict[str, int] = {}
        if self._may_pass_over(text):
            kept = []
            for index, line in enumerate(text.split(b"\n")[:-1]):
                if reason := self._reason(line):
                    passed_over[reason] = passed_over.get(reason, 0) + 1
                elif index != header_at:
                    kept.append((index, line))
            lines = lines[[index for index, _ in kept]] if kept else lines[:0]
            text = b"".join(line + b"\n" for _, line in kept)
        elif header_at == 0:
            lines, text = lines[1:], text.partition(b"\n")[2]
        bad_rows: list[BadRow] = []
        try:
            table = _parse(text, self)
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raw_lines = [line.removesuffix(b"\r") for line in text.split(b"\n")[:-1]]
            complaints = {row: why for row, line in enumerate(raw_lines) if (why := _complaint(line, self))}
            if not complaints:
                raise DataError(f"{path}, lines from {piece.first_line}: cannot be parsed: {error}") from error
            bad_rows += [BadRow(path, int(lines[row]), why) for row, why in complaints.items()]
            good = np.array([row not in complaints for row in range(len(lines))], bool)
            lines = lines[good]
            table = _parse(b"".join(line + b"\n" for line, kept in zip(raw_lines, good, strict=True) if kept), self)
        block = Block(self, path, lines, table, bad_rows, passed_over)
        remedy = "Leave the field empty, or mend the line."
        if self.cells is not None:
            remedy += " If nan means a missing value, say so: missing: ['nan']."
        for column, kind in self.columns.items():
            if pa.types.is_floating(kind):
                finite = pc.is_finite(block.table[column]).fill_null(True).to_numpy(zero_copy_only=False)
                block = block.require(finite, f"{column} is nan or infinite, or too large. {remedy}")
        return block

    def _first_row(self, text: bytes) -> tuple[int, bytes] | None:
        """Number and content of the first line of a file that is not passed over; None where there is none."""
        number, start = 1, len(codecs.BOM_UTF8) if text.startswith(codecs.BOM_UTF8) else 0
        while (end := text.find(b"\n", start)) >= 0:
            if not self._reason(text[start:end]):
                return number, text[start:end]
            number, start = number + 1, end + 1
        return None

    def _may_pass_over(self, text: bytes) -> bool:
        """Whether any of these lines may be passed over. The search for a pattern costs ten times that for some bytes."""
        start = self.comment.encode(self.encoding)
        if start and (text.startswith(start) or b"\n" + start in text):
            return True
        if not (start or self.skip_blank):
            return False
        if text.startswith((b"\n", b"\r\n")) or b"\n\n" in text or b"\n\r\n" in text:
            return True
        blank = text.startswith((b" ", b"\t")) or b"\n " in text or b"\n\t" in text
        return blank and _BLANK_LINE.search(text) is not None

    def _reason(self, line: bytes) -> str:
        """Why a line is passed over; empty where it holds a row."""
        start = self.comment.encode(self.encoding)
        if start and line.startswith(start):
            return "comments"
        blank = (start or self.skip_blank) and not line.removesuffix(b"\r").strip(BLANKS.encode())
        if blank and self.separator.encode(self.encoding) not in line and len(self.fields) != 1:
            return "blank lines"
        return ""


def _header(path: Path, number: int, line: bytes, form: DelimitedText) -> tuple[str, ...]:
    """The names that the header gives. Raises DataError when a wanted one is not among them."""
    first = line.rstrip(b"\r").decode(form.encoding, errors="replace")
    try:
        names = tuple(_fields(first, form))
    except ValueError as error:
        raise DataError(f"{path}, line {number}: {error}. {_remedy(form)}") from error
    if form.cells is not None and form.cells.strip:
        names = tuple(name.strip(BLANKS) for name in names)
    counts = Counter(names)
    twice = [name for name in form.columns if counts[name] > 1]
    if twice:
        remedy = "Fetch the file again, or rename one." if form.cells is None else "Rename one."
        raise DataError(f"{path}, line {number}: the header names {', '.join(twice[:5])} twice. {remedy}")
    missing = [name for name in form.columns if name not in counts and name not in form.optional]
    if missing:
        lacks = f"lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; it is {first[:80]!r}"
        remedy = "Fetch the file again, or name its columns in the first line."
        if form.cells is not None:
            remedy = _header_remedy(path, first, names, missing, form)
        raise DataError(f"{path}, line {number}: the header {lacks}. {remedy}")
    return names


def _header_remedy(path: Path, first: str, names: tuple[str, ...], missing: list[str], form: DelimitedText) -> str:
    """What to set so that the header of a table of one's own has the names that it lacks."""
    if first.startswith("#"):
        return "With csv: {comment: '#'} such lines are passed over."
    if first.startswith("sep="):
        return "With csv: {comment: 'sep='} this line of spreadsheets is passed over."
    if "\r" in first:
        return "Its lines end in carriage returns alone: write line feeds in their place, tr '\\r' '\\n'."
    if "\0" in first:
        return "It holds zero bytes, as text in UTF-16 does, which is not read: convert it to UTF-8 by iconv."
    if "\ufffd" in first:
        return f"It holds bytes that are not {form.encoding}. Set its encoding, such as csv: {{encoding: cp1252}}."
    read = f"The separator {form.separator!r} makes {len(names)} column{'s' if len(names) > 1 else ''} of it."
    wanted = {*form.columns}
    found = {other: {name.strip(f'{BLANKS}"') for name in first.split(other)} & wanted for other in _SEPARATORS}
    best = max(found, key=lambda other: len(found[other]))
    if best != form.separator and len(found[best]) > len({*names} & wanted):
        return f"{read} Set another: csv: {{separator: {json.dumps(best)}}}."
    if any(name.strip(BLANKS) in missing for name in names):
        return "Blanks stand around its names: strip: true drops them."
    return (
        f"{read}{where_else(path, missing[0], names)} Name the columns as the header does; or set the separator, csv:"
        " {separator: ...}; or, where this line is a row, name the columns, csv: {header: false, columns: [...]}."
    )


def _parse(text: bytes, form: DelimitedText) -> pa.Table:
    table, there = _parsed(text, form), form.there
    if len(there) == len(form.columns):
        return table
    absent = {name: pa.nulls(len(table), kind) for name, kind in form.columns.items() if name not in there}
    return pa.table({name: absent[name] if name in absent else table[name] for name in form.columns})


def _parsed(text: bytes, form: DelimitedText) -> pa.Table:
    wanted = form.there
    if not text:
        return pa.schema(wanted.items()).empty_table()
    if len(form.fields) > 1 and (text.startswith((b"\n", b"\r\n")) or b"\n\n" in text or b"\n\r\n" in text):
        raise pa.ArrowInvalid("an empty line")  # which Arrow takes for a row of missing values
    if form.quoted and text.count(b"\r") != text.count(b"\r\n"):
        raise pa.ArrowInvalid("a carriage return within a line")  # its extra row would make up for a line end within quotes
    plain = text if form.encoding == "utf-8" else text.decode(form.encoding).encode()
    separator = form.separator
    if len(separator.encode()) > 1:
        if _SEPARATOR.encode() in plain:
            raise pa.ArrowInvalid("the byte 0x01")
        plain = plain.replace(separator.encode(), _SEPARATOR.encode())
        separator = _SEPARATOR

    quote = '"' if form.quoted and b'"' in text else False  # to look for quotes costs a third of the time

    def read(columns: dict[str, pa.DataType]) -> pa.Table:
        return pyarrow.csv.read_csv(
            pa.py_buffer(plain),
            read_options=pyarrow.csv.ReadOptions(column_names=list(form.fields), block_size=len(plain) + 1),
            parse_options=pyarrow.csv.ParseOptions(delimiter=separator, quote_char=quote, ignore_empty_lines=False),
            convert_options=pyarrow.csv.ConvertOptions(column_types=columns, include_columns=list(columns), null_values=[""]),
        )

    as_text = form.cells is not None and not form.cells.as_they_stand
    if not as_text:
        try:
            table = read(wanted)
        except pa.ArrowInvalid:
            if form.cells is None:
                raise
            as_text = True  # an integer may stand as 7.0, a number as true
    if as_text:
        table = read(dict.fromkeys(wanted, pa.string()))
    if len(table) != text.count(b"\n"):
        raise pa.ArrowInvalid("a carriage return within a line, or a line end within quotes")
    # A quote that is open on the last line takes in its line end only, and the number of rows stays right.
    if quote and (why := _complaint(text[:-1].rpartition(b"\n")[2].removesuffix(b"\r"), form)):
        raise pa.ArrowInvalid(why)
    if not as_text and (b"0x" in text or b"0X" in text):
        integers = [name for name, kind in wanted.items() if pa.types.is_integer(kind)]
        texts = read(dict.fromkeys(integers, pa.string())) if integers else table
        if any(pc.any(pc.match_substring_regex(texts[name], _HEXADECIMAL)).as_py() for name in integers):
            raise pa.ArrowInvalid("a hexadecimal number")
    table = table.combine_chunks()
    if not as_text:
        return table
    assert form.cells is not None
    return pa.table({name: _taken(table[name].combine_chunks(), name, kind, form.cells) for name, kind in wanted.items()})


def _taken(texts: pa.Array, name: str, kind: pa.DataType, cells: Cells) -> pa.Array:
    """Cells as text in their type, as Arrow's reader would take them. Raises ArrowInvalid where one is not of it."""
    values = cells.take(name, texts)
    if pa.types.is_string(kind):
        return values
    values = pc.if_else(pc.equal(values, ""), None, values)
    if pa.types.is_boolean(kind):
        at = pc.index_in(values, value_set=pa.array(_BOOLEANS))
        if at.null_count > values.null_count:
            raise pa.ArrowInvalid("no boolean")
        return pc.less(at, _BOOLEANS.index("0"))
    values = pc.utf8_trim(values, characters=" \t")
    if pa.types.is_integer(kind):
        values = pc.replace_substring_regex(values, pattern=WHOLE, replacement=r"\1")
        if pc.all(pc.match_substring_regex(values, INTEGER)).as_py() is False:
            raise pa.ArrowInvalid("no integer")
    elif pa.types.is_floating(kind):
        values = words_as_numbers(values)
    return cells.take(name, values.cast(kind))


def _fields(line: str, form: DelimitedText) -> list[str]:
    """The fields of a line, as Arrow takes them apart. Raises ValueError when a quote is not closed."""
    if not form.quoted:
        return line.split(form.separator)
    separator = re.escape(form.separator)
    fields = []
    for field in re.finditer(rf'("(?:[^"]|"")*+")?([^{separator}]*)({separator}|\Z)', line):
        quoted, plain, end = field.groups(default="")
        if not quoted and plain.startswith('"'):
            raise ValueError(f"a quote is not closed on the line: {line[field.start() :][:80]!r}")
        fields.append(quoted[1:-1].replace('""', '"') + plain)
        if not end:
            break
    return fields


def _remedy(form: DelimitedText) -> str:
    return _REMEDY if form.cells is None else _OWN_REMEDY


def _complaint(raw: bytes, form: DelimitedText) -> str:
    """What is wrong with a line; empty when nothing is. Only for blocks that did not parse."""
    if b"\r" in raw:
        return f"a carriage return stands within the line: {raw[:80]!r}. {_remedy(form)}"
    try:
        fields = _fields(raw.decode(form.encoding), form)
    except UnicodeDecodeError as error:
        remedy = "Fetch the file again." if form.cells is None else "Set its encoding, such as csv: {encoding: cp1252}."
        return f"bytes that are not {form.encoding}: {error.reason}. {remedy}"
    except ValueError as error:
        return f"{error}. {_remedy(form)}"
    if len(form.separator.encode()) > 1 and _SEPARATOR.encode() in raw:
        return f"the byte 0x01 stands in the line: {raw[:80]!r}. {_remedy(form)}"
    if len(fields) != len(form.fields):
        names = form.separator.join(form.fields if len(form.fields) <= 20 else [*form.fields[:19], "..."])
        shape = f"{len(form.fields)} fields ({names})".replace("\t", "<tab>")
        remedy = _remedy(form)
        if form.cells is not None and len(fields) == 1:
            remedy = f"Fields are divided by {form.separator!r}; if these are not, set csv: {{separator: ...}}."
        return f"{shape} expected, {len(fields)} found: {raw[:80]!r}. {remedy}"
    for name, field in zip(form.fields, fields, strict=True):
        kind = form.columns.get(name)
        if kind is not None and (why := _mismatch(name, field, kind, form.cells)):
            return f"{why}. {_cell_remedy(name, field.strip(BLANKS), kind, form)}"
    return ""


def _cell_remedy(name: str, cell: str, kind: pa.DataType, form: DelimitedText) -> str:
    if form.cells is not None and not cell:
        return "Where blanks alone mean a missing value, say strip: true."
    if form.cells is not None and cell.lower() in TYPICAL_MARKS:
        return f"If it means a missing value, say so: missing: ['{cell}']."
    if form.cells is not None and pa.types.is_floating(kind) and cell.startswith("["):
        return VECTORS
    if form.cells is not None and pa.types.is_floating(kind) and cell.isalpha():
        return f"{_OWN_REMEDY} A label of words is a condition, such as {name} == '{cell[:20]}'."
    if pa.types.is_integer(kind) and form.cells is not None and re.match(INTEGER, cell):
        return UNSIGNED
    return _remedy(form) + ("" if form.cells is None else how_numbers_stand(cell))


def _mismatch(name: str, field: str, kind: pa.DataType, cells: Cells | None) -> str:
    """Why a field is not of a type; empty when it is."""
    field = field if cells is None else cells.text(name, field)
    value = field.strip(" \t")
    if not field or pa.types.is_string(kind):
        return ""
    if pa.types.is_integer(kind):
        if cells is not None and (whole := re.match(WHOLE, value)):
            value = whole[1]
        if not (value.isascii() and value.removeprefix("-").isdigit()):
            return f"{name} must be an integer, found {(value or field)[:80]!r}"
        if len(value.lstrip("-0")) > 19 or not -(2**63) <= int(value) < 2**63:
            return f"{name} = {value[:80]} does not fit into 64 bits"
    if pa.types.is_boolean(kind) and field not in _BOOLEANS:
        return f"{name} must be true or false, or 1 or 0, found {field[:80]!r}"
    if pa.types.is_floating(kind) and not (NUMBER.fullmatch(value) or (cells is not None and value in WORDS)):
        return f"{name} must be a number, found {(value or field)[:80]!r}"
    return ""
