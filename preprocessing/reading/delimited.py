"""Delimited text as Arrow tables, with exact complaints."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mmlrec.errors import ConfigError, DataError
from preprocessing.reading.raw_files import BadRow, Block, Piece, Source

_REMEDY = "Mend the line or fetch the file again."
_SEPARATOR = "\x01"  # stands for a separator of several characters: Arrow's reader takes only one
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.IGNORECASE | re.ASCII)
_BOOLEANS = ("1", "true", "TRUE", "True", "0", "false", "FALSE", "False")  # those that Arrow reads
_HEXADECIMAL = r"^[ \t]*[+-]?0[xX]"  # which Arrow takes for integers


@dataclass(frozen=True)
class DelimitedText(Source):
    """Delimited text, one row a line.

    Bad rows are those with the wrong number of fields, bytes that do not decode, or a field that is no number. An empty number
    becomes null; a literal nan or inf is a bad row, and so is a quoted field with a line end in it: files are cut at line ends.

    Attributes:
        separator: one or more characters between fields.
        columns: name -> int64, float32 or string. Without a header, one for each field of a line; with one, those that are
            wanted.
        header: the first line names the fields, in any order.
        quoted: a field may stand in double quotes, with separators in it and quotes doubled (RFC 4180). As with Python's csv,
            what follows the closing quote belongs to the field, and a quote that does not begin a field is a quote.
        comment: lines that are blank or start with it are passed over. Empty: there are none.
        fields: names of all fields in their order; from the header, where there is one, and else `columns` when absent.
    """

    separator: str
    columns: dict[str, pa.DataType]
    encoding: str = "utf-8"
    header: bool = False
    quoted: bool = False
    comment: str = ""
    fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.quoted and len(self.separator.encode()) > 1:
            raise ConfigError(f"quoted fields need a separator of one ASCII character, not {self.separator!r}.")

    def opened(self, path: Path, text: bytes) -> DelimitedText:
        """With `fields`. Raises DataError when the header lacks a wanted column."""
        return replace(self, fields=_header(path, text, self) if self.header else self.fields or tuple(self.columns))

    def parse(self, piece: Piece) -> Block:
        """The rows of a piece; see `Source`."""
        path, text = piece.path, piece.text.removeprefix(codecs.BOM_UTF8) if piece.first_line == 1 else piece.text
        lines = np.arange(piece.first_line, piece.first_line + text.count(b"\n"))
        header = self.header and piece.first_line == 1
        if header or self.comment:
            start, passed = self.comment.encode(), header
            kept = []
            for index, line in enumerate(text.split(b"\n")[:-1]):
                if passed or (self.comment and (not line.strip() or line.startswith(start))):
                    passed = False
                else:
                    kept.append((index, line))
            lines = lines[[index for index, _ in kept]] if kept else lines[:0]
            text = b"".join(line + b"\n" for _, line in kept)
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
        block = Block(self, path, lines, table, bad_rows)
        for column, kind in self.columns.items():
            if pa.types.is_floating(kind):
                finite = pc.is_finite(block.table[column]).fill_null(True).to_numpy(zero_copy_only=False)
                block = block.require(
                    finite, f"{column} is nan or infinite, or too large. Leave the field empty, or mend the line."
                )
        return block


def _header(path: Path, text: bytes, form: DelimitedText) -> tuple[str, ...]:
    """The names that the first line gives. Raises DataError when a wanted one is not among them."""
    first = text.partition(b"\n")[0].removeprefix(codecs.BOM_UTF8).rstrip(b"\r").decode(form.encoding, errors="replace")
    try:
        names = tuple(_fields(first, form))
    except ValueError as error:
        raise DataError(f"{path}, line 1: {error}. {_REMEDY}") from error
    twice = [name for name in form.columns if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}, line 1: the header names {', '.join(twice[:5])} twice. Fetch the file again, or rename one.")
    missing = [name for name in form.columns if name not in names]
    if missing:
        raise DataError(
            f"{path}, line 1: the header lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''};"
            f" it is {first[:80]!r}. Fetch the file again, or name its columns in the first line."
        )
    return names


def _parse(text: bytes, form: DelimitedText) -> pa.Table:
    if not text:
        return pa.schema(form.columns.items()).empty_table()
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

    table = read(form.columns)
    if len(table) != text.count(b"\n"):
        raise pa.ArrowInvalid("a carriage return within a line, or a line end within quotes")
    # A quote that is open on the last line takes in its line end only, and the number of rows stays right.
    if quote and (why := _complaint(text[:-1].rpartition(b"\n")[2].removesuffix(b"\r"), form)):
        raise pa.ArrowInvalid(why)
    if b"0x" in text or b"0X" in text:
        integers = [name for name, kind in form.columns.items() if pa.types.is_integer(kind)]
        texts = read(dict.fromkeys(integers, pa.string())) if integers else table
        if any(pc.any(pc.match_substring_regex(texts[name], _HEXADECIMAL)).as_py() for name in integers):
            raise pa.ArrowInvalid("a hexadecimal number")
    return table.combine_chunks()


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


def _complaint(raw: bytes, form: DelimitedText) -> str:
    """What is wrong with a line; empty when nothing is. Only for blocks that did not parse."""
    if b"\r" in raw:
        return f"a carriage return stands within the line: {raw[:80]!r}. {_REMEDY}"
    try:
        fields = _fields(raw.decode(form.encoding), form)
    except UnicodeDecodeError as error:
        return f"bytes that are not {form.encoding}: {error.reason}. Fetch the file again."
    except ValueError as error:
        return f"{error}. {_REMEDY}"
    if len(form.separator.encode()) > 1 and _SEPARATOR.encode() in raw:
        return f"the byte 0x01 stands in the line: {raw[:80]!r}. {_REMEDY}"
    if len(fields) != len(form.fields):
        names = form.separator.join(form.fields if len(form.fields) <= 20 else [*form.fields[:19], "..."])
        shape = f"{len(form.fields)} fields ({names})".replace("\t", "<tab>")
        return f"{shape} expected, {len(fields)} found: {raw[:80]!r}. {_REMEDY}"
    for name, field in zip(form.fields, fields, strict=True):
        kind, value = form.columns.get(name), field.strip(" \t")
        if kind is None or not field or pa.types.is_string(kind):
            continue
        if pa.types.is_integer(kind):
            if not (value.isascii() and value.removeprefix("-").isdigit()):
                return f"{name} must be an integer, found {value[:80]!r}. {_REMEDY}"
            if len(value.lstrip("-0")) > 19 or not -(2**63) <= int(value) < 2**63:
                return f"{name} = {value[:80]} does not fit into 64 bits. {_REMEDY}"
        if pa.types.is_boolean(kind) and field not in _BOOLEANS:
            return f"{name} must be true or false, or 1 or 0, found {field[:80]!r}. {_REMEDY}"
        if pa.types.is_floating(kind) and not _NUMBER.fullmatch(value):
            return f"{name} must be a number, found {value[:80]!r}. {_REMEDY}"
    return ""
