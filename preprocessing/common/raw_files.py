"""Raw files: where they lie, their fingerprints, and delimited text as Arrow tables with exact complaints."""

from __future__ import annotations

import gzip
import hashlib
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from mmlrec.errors import DataError

BLOCK_BYTES = 8 << 20
_LONGEST_LINE = 64 << 20
_REMEDY = "Mend the line or fetch the file again."
_SEPARATOR = "\x01"  # stands for a separator of several characters: Arrow's reader takes only one
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.IGNORECASE)
_REPORTED = 10  # bad rows that are told one by one


@dataclass(frozen=True)
class RawFile:
    """A raw file by its plain name; what the official copy looks like, where that is known."""

    name: str
    num_bytes: int | None = None
    sha256: str | None = None


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BadRows:
    """Rows passed over: told, counted by file, and no more than the user allowed (`--max-bad-rows`)."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.counts: dict[str, int] = {}

    def add(self, path: Path, line: int, complaint: str) -> None:
        """Count a row. Raises DataError naming it when it is one too many."""
        self.counts[path.name] = self.counts.get(path.name, 0) + 1
        total = sum(self.counts.values())
        if total > self._limit:
            more = f" It is bad row {total}; --max-bad-rows allows {self._limit}." if self._limit else ""
            raise DataError(f"{path}, line {line}: {complaint}{more}")
        if total <= _REPORTED:
            more = " (further ones are only counted)" if total == _REPORTED else ""
            print(f"skipped: {path}, line {line}: {complaint}{more}", file=sys.stderr)


@dataclass(frozen=True)
class Block:
    """Some rows of a file as a table, and the lines where they stand in it, [rows] int64 (the first line is 1)."""

    path: Path
    lines: NDArray[np.int64]
    table: pa.Table
    bad_rows: BadRows

    def require(self, good: NDArray[np.bool_], complaint: str) -> Block:
        """The rows that are `good`. The others are bad rows; `complaint` may hold {column} placeholders."""
        if good.all():
            return self
        for row in np.flatnonzero(~good):
            values = {name: self.table[name][row].as_py() for name in self.table.column_names}
            self.bad_rows.add(self.path, int(self.lines[row]), complaint.format(**values))
        return Block(self.path, self.lines[good], self.table.filter(pa.array(good)).combine_chunks(), self.bad_rows)

    def present(self, name: str) -> NDArray[np.bool_]:
        """[rows] whether a column has a value: neither null nor an empty string."""
        column = self.table[name]
        empty = pc.equal(column, "") if pa.types.is_string(column.type) else pc.is_null(column)
        return ~empty.fill_null(True).to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class _Format:
    """How lines are cut: `names` of all fields, and the type of those that are wanted."""

    separator: str
    names: list[str]
    columns: dict[str, pa.DataType]
    encoding: str


class RawFolder:
    """The folder given as --raw. A file may lie there plain, gzipped (NAME.gz) or zipped (NAME.zip, or .zip for its suffix).

    Attributes:
        bad_rows: rows passed over so far.
        scratch: a folder for large intermediate files, removed when the canonical table is complete; set by the engine.

    Raises:
        DataError: a file is missing; the message says where the data is had and under which terms.
    """

    scratch: Path

    def __init__(self, folder: Path, files: tuple[RawFile, ...], advice: str, max_bad_rows: int = 0) -> None:
        self._folder = folder
        self.bad_rows = BadRows(max_bad_rows)
        found = {file.name: _find(folder, file.name) for file in files}
        self.paths = {name: path for name, path in found.items() if path is not None}
        missing = [name for name in found if name not in self.paths]
        if missing:
            where = "lacks" if folder.is_dir() else "does not exist; it should hold"
            forms = "plain, gzipped as NAME.gz or zipped as NAME.zip"
            raise DataError(f"raw folder {folder} {where}: {', '.join(missing)} ({forms}).\n{advice}")

    def sha256(self) -> dict[str, str]:
        """Path of each file as it lies there, relative to the folder -> digest of its bytes."""
        try:
            return {path.relative_to(self._folder).as_posix(): file_sha256(path) for path in self.paths.values()}
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}.") from error

    def blocks(
        self,
        name: str,
        separator: str,
        columns: dict[str, pa.DataType],
        encoding: str = "utf-8",
        block_bytes: int = BLOCK_BYTES,
        *,
        header: bool = False,
        comment: str = "",
    ) -> Iterator[Block]:
        """Delimited text without quoting, in constant memory.

        Args:
            separator: one or more characters between fields.
            columns: name -> int64, float32 or string. Without a header, one for each field of a line; with one, those that are
                wanted. An empty number becomes null; a literal nan or inf is a bad row.
            header: the first line names the fields, in any order.
            comment: lines that are blank or start with it are passed over. Empty: there are none.

        Raises:
            DataError: the file is empty, no such text, or lacks a column; or a row is bad: it has the wrong number of fields,
                bytes that do not decode, or a field that is no number. The message names file and line.
        """
        path, first_line = self.paths[name], 1
        form = _Format(separator, list(columns), columns, encoding)
        empty = True
        for text in _whole_lines(path, name, block_bytes):
            num_lines = text.count(b"\n")
            if first_line == 1:
                _refuse_html(path, text)
                if header:
                    form = _with_header(path, text, form)
            block = self._block(path, first_line, text, form, header and first_line == 1, comment)
            first_line += num_lines
            if len(block.lines):
                empty = False
                yield block
        if empty:
            raise DataError(f"{path}: the file is empty, or has no good row. Fetch it again.")

    def table(self, name: str, separator: str, columns: dict[str, pa.DataType], encoding: str = "utf-8") -> Block:
        """A whole small file as one block. Raises as `blocks` does."""
        (block,) = self.blocks(name, separator, columns, encoding, block_bytes=1 << 30)
        return block

    def _block(self, path: Path, first_line: int, text: bytes, form: _Format, header: bool, comment: str) -> Block:
        lines = np.arange(first_line, first_line + text.count(b"\n"))
        if header or comment:
            start, passed = comment.encode(), header
            kept = []
            for index, line in enumerate(text.split(b"\n")[:-1]):
                if passed or (comment and (not line.strip() or line.startswith(start))):
                    passed = False
                else:
                    kept.append((index, line))
            lines = lines[[index for index, _ in kept]] if kept else lines[:0]
            text = b"".join(line + b"\n" for _, line in kept)
        try:
            table = _parse(text, form)
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raw_lines = [line.removesuffix(b"\r") for line in text.split(b"\n")[:-1]]
            complaints = {row: why for row, line in enumerate(raw_lines) if (why := _complaint(line, form))}
            if not complaints:
                raise DataError(f"{path}, lines from {first_line}: cannot be parsed: {error}") from error
            for row, why in complaints.items():
                self.bad_rows.add(path, int(lines[row]), why)
            good = np.array([row not in complaints for row in range(len(lines))], bool)
            lines = lines[good]
            table = _parse(b"".join(line + b"\n" for line, kept in zip(raw_lines, good, strict=True) if kept), form)
        block = Block(path, lines, table, self.bad_rows)
        for column, kind in form.columns.items():
            if pa.types.is_floating(kind):
                finite = pc.is_finite(block.table[column]).fill_null(True).to_numpy(zero_copy_only=False)
                block = block.require(
                    finite, f"{column} is nan or infinite, or too large. Leave the field empty, or mend the line."
                )
        return block


def _find(folder: Path, name: str) -> Path | None:
    plain = folder / name
    if not plain.parent.is_dir():
        return None
    others = {path.name.lower(): path for path in sorted(plain.parent.iterdir()) if path.is_file()}
    for candidate in (plain.name, f"{plain.name}.gz", f"{plain.name}.zip", plain.with_suffix(".zip").name):
        if (plain.parent / candidate).is_file():
            return plain.parent / candidate
        if candidate.lower() in others:
            return others[candidate.lower()]
    return None


def _open(path: Path, name: str) -> BinaryIO:
    """The bytes of a file, unpacked; `name` picks it out of a zip archive that holds several."""
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"\x1f\x8b":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if start != b"PK\x03\x04":
        return path.open("rb")
    archive = zipfile.ZipFile(path)
    members = [member for member in archive.namelist() if not member.endswith("/")]
    wanted = Path(name).name.lower()
    chosen = [member for member in members if member.rpartition("/")[2].lower() == wanted]
    if not chosen and len(members) == 1:
        chosen = members
    if not chosen:
        raise DataError(f"{path}: the archive holds no {Path(name).name}. Unpack the right one, or fetch it again.")
    return archive.open(chosen[0])  # type: ignore[return-value]


def _whole_lines(path: Path, name: str, block_bytes: int) -> Iterator[bytes]:
    rest = b""
    try:
        with _open(path, name) as file:
            while text := file.read(block_bytes):
                end = text.rfind(b"\n") + 1
                if end:
                    yield rest + text[:end]
                    rest = text[end:]
                elif len(rest := rest + text) > _LONGEST_LINE:
                    raise DataError(f"{path}: no line end within {_LONGEST_LINE >> 20} MiB, so no text table. Fetch it again.")
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        kind = "zip" if path.suffix == ".zip" else "gzip"
        raise DataError(f"{path}: the {kind} file is truncated or damaged ({error}). Fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    if rest:
        yield rest + b"\n"


def _refuse_html(path: Path, text: bytes) -> None:
    start = text[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise DataError(f"{path}: an HTML page, not data (a login or error page saved under this name?). Fetch the file again.")


def _with_header(path: Path, text: bytes, form: _Format) -> _Format:
    """The format with the names that the first line gives. Raises DataError when a wanted one is not among them."""
    first = text.partition(b"\n")[0].rstrip(b"\r").decode("utf-8-sig", errors="replace")
    names = first.split(form.separator)
    missing = [name for name in form.columns if name not in names]
    if missing:
        raise DataError(
            f"{path}, line 1: the header lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''};"
            f" it is {first[:80]!r}. Fetch the file again, or name its columns in the first line."
        )
    return _Format(form.separator, names, form.columns, form.encoding)


def _parse(text: bytes, form: _Format) -> pa.Table:
    if not text:
        return pa.schema(form.columns.items()).empty_table()
    if len(form.names) > 1 and (text.startswith((b"\n", b"\r\n")) or b"\n\n" in text or b"\n\r\n" in text):
        raise pa.ArrowInvalid("an empty line")  # which Arrow takes for a row of missing values
    plain = text if form.encoding == "utf-8" else text.decode(form.encoding).encode()
    separator = form.separator
    if len(separator) > 1:
        plain = plain.replace(separator.encode(), _SEPARATOR.encode())
        separator = _SEPARATOR
    table = pyarrow.csv.read_csv(
        pa.py_buffer(plain),
        read_options=pyarrow.csv.ReadOptions(column_names=form.names, block_size=len(plain) + 1),
        parse_options=pyarrow.csv.ParseOptions(delimiter=separator, quote_char=False, ignore_empty_lines=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=form.columns, include_columns=list(form.columns), null_values=[""]
        ),
    )
    if len(table) != text.count(b"\n"):
        raise pa.ArrowInvalid("a carriage return within a line")
    return table.combine_chunks()


def _complaint(raw: bytes, form: _Format) -> str:
    """What is wrong with a line; empty when nothing is. Only for blocks that did not parse."""
    if b"\r" in raw:
        return f"a carriage return stands within the line: {raw[:80]!r}. {_REMEDY}"
    try:
        fields = raw.decode(form.encoding).split(form.separator)
    except UnicodeDecodeError as error:
        return f"bytes that are not {form.encoding}: {error.reason}. Fetch the file again."
    if len(fields) != len(form.names):
        names = form.separator.join(form.names if len(form.names) <= 20 else [*form.names[:19], "..."])
        shape = f"{len(form.names)} fields ({names})".replace("\t", "<tab>")
        return f"{shape} expected, {len(fields)} found: {raw[:80]!r}. {_REMEDY}"
    for name, field in zip(form.names, fields, strict=True):
        kind, value = form.columns.get(name), field.strip(" \t")
        if kind is None or not value:
            continue
        if pa.types.is_integer(kind):
            if not (value.isascii() and value.removeprefix("-").isdigit()):
                return f"{name} must be an integer, found {value!r}. {_REMEDY}"
            if not -(2**63) <= int(value) < 2**63:
                return f"{name} = {value} does not fit into 64 bits. {_REMEDY}"
        if pa.types.is_floating(kind) and not _NUMBER.fullmatch(value):
            return f"{name} must be a number, found {value!r}. {_REMEDY}"
    return ""
