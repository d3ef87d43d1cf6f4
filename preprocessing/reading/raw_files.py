"""Raw files: where they lie, their fingerprints, and their lines in pieces that are cut into blocks of rows."""

from __future__ import annotations

import codecs
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.encoding.cells import NESTED
from mmlrec.encoding.conversions import FOUND
from mmlrec.errors import DataError, did_you_mean
from mmlrec.identity import file_sha256
from preprocessing.reading.packed import open_unpacked, readable
from preprocessing.workers import in_order, num_cores

PIECE_BYTES = 8 << 20
LONGEST_LINE = 64 << 20
_LONGEST_SHOWN = 80
_REPORTED = 10  # bad rows that are told one by one

T = TypeVar("T")


@dataclass(frozen=True)
class RawFile:
    """A raw file by its plain name; what the official copy looks like, where that is known; where its gzipped form is had."""

    name: str
    num_bytes: int | None = None
    sha256: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands, and why."""

    path: Path
    line: int
    complaint: str


class BadRows:
    """Rows passed over: told, counted by file, and no more than the user allowed (`--max-bad-rows`)."""

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self._folder = limit, folder
        #: Path of a file, relative to the folder -> its bad rows.
        self.counts: dict[str, int] = {}

    def add(self, row: BadRow) -> None:
        """Count a row. Raises DataError naming it when it is one too many."""
        name = row.path.relative_to(self._folder).as_posix()
        self.counts[name] = self.counts.get(name, 0) + 1
        total = sum(self.counts.values())
        if total > self.limit:
            more = f" It is bad row {total}; --max-bad-rows allows {self.limit}." if self.limit else ""
            raise DataError(f"{row.path}, line {row.line}: {row.complaint}{more}")
        if total <= _REPORTED:
            more = " (further ones are only counted)" if total == _REPORTED else ""
            print(f"skipped: {row.path}, line {row.line}: {row.complaint}{more}", file=sys.stderr)


@dataclass(frozen=True)
class Piece:
    """Some whole lines of a file, each with its line end; the first of them is line `first_line` (from 1)."""

    path: Path
    first_line: int
    text: bytes


@dataclass(frozen=True)
class Block:
    """Some rows of a file as a table.

    Attributes:
        source: what they were read with.
        lines: where they stand in the file, [rows] int64 (the first line is 1).
        bad_rows: the bad rows found so far among those that the block began with.
        passed_over: reason -> how many of those rows `only` has left out so far.
    """

    source: Source
    path: Path
    lines: NDArray[np.int64]
    table: pa.Table
    bad_rows: list[BadRow] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)

    def require(self, good: NDArray[np.bool_], complaint: str, shown: str | None = None) -> Block:
        """The rows that are `good`. The others are bad rows.

        Args:
            complaint: may hold {column} placeholders. With `shown`, a column whose name may be anything, it is taken as it
                stands, but for FOUND, which becomes the value of that column.
        """
        if good.all():
            return self
        for row in np.flatnonzero(~good):
            if shown is None:
                text = complaint.format(**{name: self._value(name, row) for name in self.table.column_names})
            else:
                text = complaint.replace(FOUND, f", found {self._seen(shown, row)}") if FOUND in complaint else complaint
            self.bad_rows.append(BadRow(self.path, int(self.lines[row]), text))
        return self.only(good)

    def _value(self, name: str, row: np.int64) -> Any:
        """A cell as a complaint shows it."""
        try:
            value = self.table[name][row].as_py()
        except UnicodeDecodeError:
            return "bytes that are no text"
        text = value if isinstance(value, str) else str(value)
        return value if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."

    def _seen(self, name: str, row: np.int64) -> str:
        """A cell as a complaint shows it, in quotes where blanks around it would not be seen."""
        text = str(self._value(name, row))
        return repr(text) if text != text.strip() else text

    def only(self, wanted: NDArray[np.bool_], reason: str = "") -> Block:
        """The rows that are `wanted`. The others are not bad, only no part of the dataset; a `reason` counts them."""
        if reason:
            self.passed_over[reason] = self.passed_over.get(reason, 0) + int(np.count_nonzero(~wanted))
        return replace(self, lines=self.lines[wanted], table=self.table.filter(pa.array(wanted)).combine_chunks())

    def present(self, name: str) -> NDArray[np.bool_]:
        """[rows] whether a column has a value: neither null nor an empty string."""
        column = self.table[name]
        empty = pc.equal(column, "") if pa.types.is_string(column.type) else pc.is_null(column)
        return ~empty.fill_null(True).to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Source(ABC):
    """How the rows of one raw file are read; a function of the piece alone, so that pieces may be read anywhere."""

    name: str

    def pieces(self, raw: RawFolder, piece_bytes: int) -> Iterator[Piece]:
        """The file in order, about `piece_bytes` at a time: whole lines, where a source says nothing else."""
        return raw.pieces(self.name, piece_bytes)

    def begins(self, text: bytes) -> bool:
        """Whether these first lines of a file are all that `opened` has to see."""
        return True

    def opened(self, path: Path, text: bytes) -> Source:
        """The source for this very file, whose first lines are `text`: the place to look at a header."""
        return self

    def may_be_empty(self, raw: RawFolder) -> bool:
        """Whether a file without rows, and without bad ones, is in order."""
        return False

    @abstractmethod
    def parse(self, piece: Piece) -> Block:
        """The rows of a piece. What cannot be a row is in `bad_rows` of the block. Raises DataError when nothing can be."""


@dataclass(frozen=True)
class Work(Generic[T]):
    """What a function made of a piece of a file.

    Attributes:
        num_rows: rows that the source parsed.
        bad_rows, passed_over: those left out, by the source or by the function, in the order of lines; see `Block`.
    """

    num_rows: int
    bad_rows: list[BadRow]
    passed_over: dict[str, int]
    result: T


def work(function: Callable[[Block], T], source: Source, piece: Piece) -> Work[T]:
    """Parse a piece and apply the function."""
    block = source.parse(piece)
    num_rows = len(block.lines)
    result = function(block)
    return Work(num_rows, sorted(block.bad_rows, key=lambda row: row.line), block.passed_over, result)


@dataclass(frozen=True)
class RowFiles:
    """Raw files that give rows together: all `needed` ones are there, or none; `labels` may be missing alone."""

    needed: frozenset[str]
    labels: frozenset[str] = frozenset()


class RawFolder:
    """The folder given as --raw.

    A file may lie there plain, gzipped (NAME.gz) or zipped (NAME.zip, or .zip for its suffix), or so in a folder below.

    Attributes:
        paths: plain name -> where the file lies.
        bad_rows: the bad rows so far.
        passed_over: plain name of a file -> reason -> how many rows were left out for it (see `Block.only`).
        workers: how many pieces are worked on at a time.
        piece_bytes: how much of a file is parsed at a time.
        scratch: a folder for large intermediate files, removed when the canonical table is complete; set by the engine.

    Raises:
        DataError: a file is missing; the message says where the data is had and under which terms.
    """

    scratch: Path

    def __init__(
        self,
        folder: Path,
        files: tuple[RawFile, ...],
        advice: str,
        max_bad_rows: int = 0,
        workers: int | None = None,
        absent: tuple[RowFiles, ...] = (),
    ) -> None:
        """`absent`: of these, all but one may be missing."""
        self._folder = folder
        self.bad_rows = BadRows(max_bad_rows, folder)
        self.passed_over: dict[str, dict[str, int]] = {}
        self.workers = workers or num_cores()
        self.piece_bytes = PIECE_BYTES
        found = {file.name: find_raw(folder, file.name) for file in files}
        self.paths = {name: path for name, path in found.items() if path is not None}
        missing = [name for name in found if name not in self.paths]
        passed_over = [files for files in absent if not files.needed & self.paths.keys()]
        if len(passed_over) < len(absent):
            without = {name for files in passed_over for name in files.needed}
            missing = [name for name in missing if name not in without.union(*(files.labels for files in absent))]
        if missing:
            where = "lacks" if folder.is_dir() else f"{'is no folder' if folder.exists() else 'does not exist'}; it should hold"
            forms = "plain, gzipped as NAME.gz or zipped as NAME.zip"
            raise DataError(f"raw folder {folder} {where}: {', '.join(missing)} ({forms}).\n{advice}")

    def sha256(self) -> dict[str, str]:
        """Path of each file as it lies there, relative to the folder -> digest of its bytes."""
        try:
            return {path.relative_to(self._folder).as_posix(): file_sha256(path) for path in self.paths.values()}
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}.") from error

    def map(
        self, function: Callable[[Block], T], source: Source, piece_bytes: int | None = None, *, count_bad_rows: bool = True
    ) -> Iterator[T]:
        """`function` of each block of a file, in the order of the file. Blocks are parsed and worked on in threads.

        Args:
            count_bad_rows: False when the file will be read once more, so that its bad rows count once, as do those passed
                over.

        Raises:
            DataError: the file is empty, or is not what `source` reads; or it has more bad rows than are allowed. The message
                names file and line. Bad rows that `function` finds with `Block.require` count as well.
        """
        opened, pieces = self.opened(source, piece_bytes or self.piece_bytes)
        empty, example = True, None
        for done in in_order(lambda piece: work(function, opened, piece), pieces, self.workers):
            if count_bad_rows:
                self.account(source.name, done)
            example = example or next(iter(done.bad_rows), None)
            if done.num_rows:
                empty = False
                yield done.result
        if empty and (example or not source.may_be_empty(self)):
            raise self.no_rows(source.name, example)

    def opened(self, source: Source, piece_bytes: int) -> tuple[Source, Iterator[Piece]]:
        """The source for its file, and the pieces of that. Raises DataError when the file's beginning is not what it reads."""
        pieces = source.pieces(self, piece_bytes)
        first: list[Piece] = []
        text = b""
        for piece in pieces:  # one, but for a header that stands after very long comments
            first.append(piece)
            text += piece.text
            if source.begins(text) or len(text) > LONGEST_LINE:
                break
        opened = source.opened(self.paths[source.name], text) if first else source
        return opened, itertools.chain(first, pieces)

    def account(self, name: str, done: Work[Any]) -> None:
        """Count what was left out of a piece of a file. Raises DataError when it has more bad rows than are allowed."""
        for row in done.bad_rows:
            self.bad_rows.add(row)
        for reason, count in done.passed_over.items():
            counts = self.passed_over.setdefault(name, {})
            counts[reason] = counts.get(reason, 0) + count

    def no_rows(self, name: str, example: BadRow | None = None) -> DataError:
        """The complaint about a file of which no row could be parsed; `example`: the first bad one."""
        if example is not None:
            return DataError(f"{example.path}, line {example.line}: {example.complaint} No row of the file is good.")
        return DataError(f"{self.paths[name]}: the file is empty, or has no good row. Fetch it again, or leave it out.")

    def nothing(self) -> DataError:
        """The complaint where no file has a row, or none that is kept."""
        shown = ", ".join(map(str, [*self.paths.values()][:3])) + (" ..." if len(self.paths) > 3 else "")
        reasons: dict[str, int] = {}
        for counts in self.passed_over.values():
            for reason, count in counts.items():
                reasons[reason] = reasons.get(reason, 0) + count
        if not reasons:
            return DataError(f"{shown}: no rows, at most a header. Name files that have rows.")
        counted = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
        return DataError(f"{shown}: no row is kept; all are passed over ({counted}). Name files with others.")

    def blocks(self, source: Source, piece_bytes: int | None = None) -> Iterator[Block]:
        """The blocks of a file that have rows. Raises as `map` does; a caller that finds bad rows in them adds them itself."""
        return self.map(lambda block: block, source, piece_bytes)

    def table(self, source: Source, check: Callable[[Block], Block] = lambda block: block) -> Block:
        """A whole small file as one block, as `check` leaves it. Raises as `map` does."""
        (block,) = self.map(check, source, piece_bytes=1 << 30)
        return block

    def pieces(self, name: str, piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
        """The whole lines of a file, unpacked, about `piece_bytes` at a time."""
        path, first_line = self.paths[name], 1
        for text in _whole_lines(path, name, piece_bytes):
            if first_line == 1:
                _refuse_others(path, text)
            yield Piece(path, first_line, text)
            first_line += text.count(b"\n")


def where_else(path: Path, name: str, names: Iterable[str]) -> str:
    """What may be meant by a column that a file lacks, as a sentence with a leading space; empty where nothing is like it."""
    names = [*names]
    if partition := next((part for part in path.parts if part.startswith(f"{name}=")), None):
        return f" It stands in the name of a folder, {partition}, which is not read: write it into the files."
    outer = name.partition(".")[0]
    return f" {NESTED}" if outer != name and outer in names else did_you_mean(name, names)


def find_raw(folder: Path, name: str) -> Path | None:
    """Where a raw file lies, in whatever form. Raises DataError when several folders below hold one."""
    if found := _find_in(folder, name):
        return found
    below = sorted(path for path in folder.rglob("*") if path.is_dir() and not path.name.startswith("."))
    places = [path for place in below if (path := _find_in(place, name)) is not None]
    if len(places) > 1:
        raise DataError(f"{folder} holds {name} in several folders: {', '.join(map(str, places))}. Name one as --raw.")
    return places[0] if places else None


def _find_in(folder: Path, name: str) -> Path | None:
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


def _whole_lines(path: Path, name: str, block_bytes: int) -> Iterator[bytes]:
    rest = b""
    with readable(path), open_unpacked(path, name) as file:
        following = file.read(block_bytes)
        while text := following:
            following = file.read(block_bytes)
            if not following and not text.endswith(b"\n"):
                text += b"\n"  # the last line of a file may lack its end
            end = text.rfind(b"\n") + 1
            if end:
                yield rest + text[:end]
                rest = text[end:]
            elif len(rest := rest + text) > LONGEST_LINE:
                limit = f"no line end within {LONGEST_LINE >> 20} MiB, so neither a text table nor JSON lines"
                raise DataError(f"{path}: {limit}. Fetch it again; of a JSON array, put each object on a line of its own.")


def _refuse_others(path: Path, text: bytes) -> None:
    """Raise DataError where a file is no text that can be read as a table."""
    # In Latin-1 the two bytes are letters; but in UTF-16 every line end, at least, has a zero byte.
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in text:
        raise DataError(f"{path}: text in UTF-16, which is not read. Convert it: iconv -f UTF-16 -t UTF-8 {path.name}.")
    if text.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: packed by gzip twice. Unpack it once: gunzip {path.name}.")
    start = text[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise DataError(f"{path}: an HTML page, not data (a login or error page saved under this name?). Fetch the file again.")
