"""Raw files: where they lie, their fingerprints, and delimited text as Arrow tables with exact complaints."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from mmlrec.errors import DataError

BLOCK_BYTES = 8 << 20
_LONGEST_LINE = 64 << 20
_REMEDY = "Mend the line or fetch the file again."
_SEPARATOR = "\x01"  # stands for a separator of several characters: Arrow's reader takes only one


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


@dataclass(frozen=True)
class Block:
    """Some whole lines of a file as a table, and where they stand in it (lines count from 1)."""

    path: Path
    first_line: int
    table: pa.Table

    def require(self, good: NDArray[np.bool_], complaint: str) -> None:
        """Raise DataError naming the first row that is not `good`; `complaint` may hold {column} placeholders."""
        if not good.all():
            row = int(np.argmin(good))
            values = {name: self.table[name][row].as_py() for name in self.table.column_names}
            raise DataError(f"{self.path}, line {self.first_line + row}: {complaint.format(**values)}")


class RawFolder:
    """The folder given as --raw. A file may lie there plain, or gzipped with `.gz` behind its name.

    Raises:
        DataError: a file is missing; the message says where the data is had and under which terms.
    """

    def __init__(self, folder: Path, files: tuple[RawFile, ...], advice: str) -> None:
        self.paths: dict[str, Path] = {}
        for file in files:
            found = [path for path in (folder / file.name, folder / f"{file.name}.gz") if path.is_file()]
            if found:
                self.paths[file.name] = found[0]
        missing = [file.name for file in files if file.name not in self.paths]
        if missing:
            where = "lacks" if folder.is_dir() else "does not exist; it should hold"
            raise DataError(f"raw folder {folder} {where}: {', '.join(missing)} (plain, or gzipped as NAME.gz).\n{advice}")

    def sha256(self) -> dict[str, str]:
        """Name of each file as it lies there -> digest of its bytes."""
        try:
            return {path.name: file_sha256(path) for path in self.paths.values()}
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}.") from error

    def blocks(
        self,
        name: str,
        separator: str,
        columns: dict[str, pa.DataType],
        encoding: str = "utf-8",
        block_bytes: int = BLOCK_BYTES,
    ) -> Iterator[Block]:
        """Delimited text without header or quoting, in constant memory.

        Args:
            separator: one or more characters between fields.
            columns: name -> int64 or string, one for each field of a line. An empty integer field becomes null.

        Raises:
            DataError: the file is empty, no such text, or a line has the wrong number of fields, bytes that do not decode,
                or a field that is no integer; the message names file and line.
        """
        path, first_line = self.paths[name], 1
        for text in _whole_lines(path, block_bytes):
            if first_line == 1:
                _refuse_html(path, text)
            yield Block(path, first_line, _parse(path, first_line, text, separator, columns, encoding))
            first_line += text.count(b"\n")
        if first_line == 1:
            raise DataError(f"{path}: the file is empty. Fetch it again.")

    def table(self, name: str, separator: str, columns: dict[str, pa.DataType], encoding: str = "utf-8") -> Block:
        """A whole small file as one block. Raises as `blocks` does."""
        (block,) = self.blocks(name, separator, columns, encoding, block_bytes=1 << 30)
        return block


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if gzipped else path.open("rb")  # type: ignore[return-value]


def _whole_lines(path: Path, block_bytes: int) -> Iterator[bytes]:
    rest = b""
    try:
        with _open(path) as file:
            while text := file.read(block_bytes):
                end = text.rfind(b"\n") + 1
                if end:
                    yield rest + text[:end]
                    rest = text[end:]
                elif len(rest := rest + text) > _LONGEST_LINE:
                    raise DataError(f"{path}: no line end within {_LONGEST_LINE >> 20} MiB, so no text table. Fetch it again.")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is truncated or damaged ({error}). Fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    if rest:
        yield rest + b"\n"


def _refuse_html(path: Path, text: bytes) -> None:
    start = text[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise DataError(f"{path}: an HTML page, not data (a login or error page saved under this name?). Fetch the file again.")


def _parse(path: Path, line: int, text: bytes, separator: str, columns: dict[str, pa.DataType], encoding: str) -> pa.Table:
    try:
        plain = text if encoding == "utf-8" else text.decode(encoding).encode()
        if len(separator) > 1:
            plain = plain.replace(separator.encode(), _SEPARATOR.encode())
        return pyarrow.csv.read_csv(
            pa.py_buffer(plain),
            read_options=pyarrow.csv.ReadOptions(column_names=list(columns), block_size=len(plain) + 1),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=separator if len(separator) == 1 else _SEPARATOR,
                quote_char=False,
                ignore_empty_lines=False,
            ),
            convert_options=pyarrow.csv.ConvertOptions(column_types=columns, null_values=[""]),
        ).combine_chunks()
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise _diagnosis(path, line, text, separator, columns, encoding) or DataError(
            f"{path}, lines from {line}: cannot be parsed: {error}"
        ) from error


def _diagnosis(
    path: Path, line: int, text: bytes, separator: str, columns: dict[str, pa.DataType], encoding: str
) -> DataError | None:
    """The first bad line, found one by one: only on the way to an error."""
    shape = f"{len(columns)} fields ({separator.join(columns)})".replace("\t", "<tab>")
    for number, raw in enumerate(text.splitlines(), line):
        where = f"{path}, line {number}"
        try:
            fields = raw.decode(encoding).split(separator)
        except UnicodeDecodeError as error:
            return DataError(f"{where}: bytes that are not {encoding}: {error.reason}. Fetch the file again.")
        if len(fields) != len(columns):
            return DataError(f"{where}: {shape} expected, {len(fields)} found: {raw[:80]!r}. {_REMEDY}")
        for (name, kind), value in zip(columns.items(), fields, strict=True):
            if pa.types.is_integer(kind) and value:
                if not (value.isascii() and value.removeprefix("-").isdigit()):
                    return DataError(f"{where}: {name} must be an integer, found {value!r}. {_REMEDY}")
                if not -(2**63) <= int(value) < 2**63:
                    return DataError(f"{where}: {name} = {value} does not fit into 64 bits. {_REMEDY}")
    return None
