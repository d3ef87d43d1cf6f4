"""Spoils raw files: what goes wrong with files on their way, and changed rows. By the form of the file, not by dataset."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from preprocessing.reading.arrays import Arrays
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.json_lines import JsonLines
from preprocessing.reading.parquet_rows import ParquetRows
from preprocessing.reading.raw_files import Source

HTML = b"<!DOCTYPE html>\n<html><body>Please log in.</body></html>\n"
BEYOND = 2**63


@dataclass(frozen=True)
class Spoiled:
    """Content of a file with a fault, and the line that a message must name (None: the file as a whole)."""

    content: bytes
    line: int | None = None
    suffix: str = ""


def unpacked(path: Path) -> bytes:
    """Bytes of a raw file, which may be gzipped or zipped."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        return gzip.decompress(content)
    if content[:4] == b"PK\x03\x04" and path.suffix != ".npz":
        with zipfile.ZipFile(path) as archive:
            (member,) = archive.namelist()
            return archive.read(member)
    return content


def faults(source: Source, name: str, content: bytes) -> dict[str, Spoiled]:
    """Fault -> file `name`, which `source` reads, with that fault."""
    found = {"empty": Spoiled(b""), "HTML page": Spoiled(HTML)}
    if not name.endswith((".npz", ".parquet")):
        packed = gzip.compress(content)
        found["truncated gzip"] = Spoiled(packed[: len(packed) // 2], suffix=".gz")
    if isinstance(source, DelimitedText):
        return found | _text_faults(source, content)
    if isinstance(source, JsonLines):
        return found | _json_faults(source, content)
    if isinstance(source, Arrays):
        return found | _array_faults(content)
    if isinstance(source, ParquetRows):
        return found | _parquet_faults(source, content)
    return found


def bad_row(source: Source, content: bytes) -> Spoiled | None:
    """The file with one row that cannot be read, for `--max-bad-rows`; None where the form of the file has no such thing."""
    if isinstance(source, DelimitedText):
        return _text_faults(source, content).get("column count")
    if isinstance(source, ParquetRows):
        return _parquet_faults(source, content).get("nan")
    return _json_faults(source, content)["cut line"] if isinstance(source, JsonLines) else None


class Table:
    """A delimited text, its header and comments kept apart."""

    def __init__(self, form: DelimitedText, content: bytes) -> None:
        self.form = form
        self.lines = content.split(b"\n")
        self.separator = form.separator.encode()
        names: Sequence[str] = list(form.columns)
        if form.header:
            names = [field.decode("utf-8-sig") for field in self._split(self.lines[0])]
        self.names = list(names)
        comment = form.comment.encode()
        self.rows = [
            index
            for index, line in enumerate(self.lines)
            if line.strip() and not (form.header and index == 0) and not (comment and line.startswith(comment))
        ]

    @property
    def content(self) -> bytes:
        """The whole text."""
        return b"\n".join(self.lines)

    def fields(self, index: int) -> list[bytes]:
        """Of a line (from 0)."""
        return self._split(self.lines[index])

    def put(self, index: int, fields: list[bytes]) -> None:
        """Replace a line (from 0)."""
        if self.form.quoted:
            text = io.StringIO()
            texts = [field.decode("utf-8", "surrogateescape") for field in fields]
            csv.writer(text, delimiter=self.form.separator, lineterminator="").writerow(texts)
            self.lines[index] = text.getvalue().encode("utf-8", "surrogateescape")
        else:
            self.lines[index] = self.separator.join(fields)

    def _split(self, line: bytes) -> list[bytes]:
        line = line.removesuffix(b"\r")
        if self.form.quoted:
            text = line.decode("utf-8", "surrogateescape")
            (fields,) = csv.reader([text], delimiter=self.form.separator)
            return [field.encode("utf-8", "surrogateescape") for field in fields]
        return line.split(self.separator)


def _text_faults(form: DelimitedText, content: bytes) -> dict[str, Spoiled]:
    table = Table(form, content)
    middle = table.rows[len(table.rows) // 2]

    def spoiled(change: Callable[[list[bytes]], list[bytes]]) -> Spoiled:
        spoilt = Table(form, content)
        spoilt.put(middle, change(spoilt.fields(middle)))
        return Spoiled(spoilt.content, middle + 1)

    def in_column(number: int, value: bytes) -> Spoiled:
        return spoiled(lambda fields: [*fields[:number], value, *fields[number + 1 :]])

    found = {}
    if len(table.names) > 1:
        other = next(mark for mark in (b";", b"|") if mark != table.separator)
        first = 0 if form.header else table.rows[0]
        found["wrong delimiter"] = Spoiled(content.replace(table.separator, other), first + 1)
        found["column count"] = spoiled(lambda fields: fields[:-1])
    columns = {kind: [n for n, name in enumerate(table.names) if form.columns.get(name) == kind] for kind in _KINDS}
    for number in columns[pa.string()][:1] if form.encoding == "utf-8" else []:
        found["undecodable bytes"] = in_column(number, b"\xff\xfe\xfd")
    for number in columns[pa.int64()][:1]:
        found["id beyond 2^63"] = in_column(number, str(BEYOND).encode())
    for number in columns[pa.float32()][:1]:
        found |= {word: in_column(number, word.encode()) for word in ("nan", "inf", "-inf")}
    return found


_KINDS = (pa.string(), pa.int64(), pa.float32())


def _json_faults(form: JsonLines, content: bytes) -> dict[str, Spoiled]:
    lines = content.split(b"\n")
    rows = [index for index, line in enumerate(lines) if line.strip()]
    middle = rows[len(rows) // 2]

    def spoiled(line: bytes) -> Spoiled:
        return Spoiled(b"\n".join([*lines[:middle], line, *lines[middle + 1 :]]), middle + 1)

    def with_value(kind: pa.DataType, value: Any) -> Spoiled | None:
        for name in (name for name, found in form.columns.items() if found == kind):
            return spoiled(json.dumps(json.loads(lines[middle]) | {name: value}).encode())
        return None

    found = {
        "array instead of lines": Spoiled(b"[" + b",\n".join(lines[row] for row in rows) + b"]", 1),
        "cut line": spoiled(lines[middle][: len(lines[middle]) // 2]),
        "undecodable bytes": spoiled(lines[middle].replace(b'": "', b'": "\xff\xfe', 1)),
        "id beyond 2^63": with_value(pa.int64(), BEYOND),
    }
    found |= {str(number): with_value(pa.float32(), number) for number in (float("nan"), float("inf"), float("-inf"))}
    return {name: fault for name, fault in found.items() if fault is not None}


def _array_faults(content: bytes) -> dict[str, Spoiled]:
    found = {"cut": Spoiled(content[: len(content) // 2])}
    if content[:6] != b"\x93NUMPY":
        return found
    array = np.load(io.BytesIO(content))
    middle = len(array) // 2

    def spoiled(value: Any) -> Spoiled:
        changed = array.copy()
        changed[middle] = value
        return Spoiled(_saved(changed), middle + 1)

    if array.dtype.kind == "f":
        found |= {str(number): spoiled(number) for number in (np.nan, np.inf, -np.inf)}
    found["id beyond 2^63"] = Spoiled(_saved(np.full(array.shape, BEYOND, np.uint64)))
    return found


def _parquet_faults(form: ParquetRows, content: bytes) -> dict[str, Spoiled]:
    table = pq.read_table(io.BytesIO(content))
    middle = len(table) // 2

    def spoiled(name: str, values: NDArray[Any], value: Any) -> Spoiled:
        values[middle] = value
        changed = table.set_column(table.column_names.index(name), name, pa.array(values))
        return Spoiled(_written(changed), middle + 1)

    found = {"cut": Spoiled(content[: len(content) // 2])}
    for name in [name for name, kind in form.columns.items() if kind == pa.int64()][:1]:
        found["id beyond 2^63"] = spoiled(name, np.zeros(len(table), np.uint64), BEYOND)
    for name in [name for name, kind in form.columns.items() if pa.types.is_floating(kind)][:1]:
        found |= {str(number): spoiled(name, np.zeros(len(table)), number) for number in (np.nan, np.inf, -np.inf)}
    return found


def _written(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _saved(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def copied_rows(source: Source, content: bytes, rows: dict[int, int], own: Sequence[str]) -> bytes:
    """The file with the content of a row in place of others.

    Args:
        rows: line -> line (from 1) whose content it gets.
        own: columns in which lines keep their own values.
    """
    if content[:6] == b"\x93NUMPY":
        array = np.load(io.BytesIO(content))
        copied = array.copy()
        for line, origin in rows.items():
            copied[line - 1] = array[origin - 1]
        return _saved(copied)
    if isinstance(source, ParquetRows):
        table = pq.read_table(io.BytesIO(content))
        order = np.arange(len(table))
        for line, origin in rows.items():
            order[line - 1] = origin - 1
        copied = table.take(order)
        for name in own:
            copied = copied.set_column(copied.column_names.index(name), name, table[name])
        return _written(copied)
    if isinstance(source, JsonLines):
        lines = content.split(b"\n")
        objects = {line: json.loads(lines[line - 1]) for line in {*rows, *rows.values()}}
        for line, origin in rows.items():
            kept = {name: objects[line][name] for name in own if name in objects[line]}
            lines[line - 1] = json.dumps(objects[origin] | kept).encode()
        return b"\n".join(lines)
    assert isinstance(source, DelimitedText), source
    table, old = Table(source, content), Table(source, content)
    places = [table.names.index(name) for name in own if name in table.names]
    for line, origin in rows.items():
        fields, mine = old.fields(origin - 1), old.fields(line - 1)
        table.put(line - 1, [mine[k] if k in places else field for k, field in enumerate(fields)])
    return table.content
