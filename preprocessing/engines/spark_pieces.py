"""Pieces of raw files that Spark's executors read by themselves: how they are found, and what becomes of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa

from mmlrec.errors import DataError, UserError
from preprocessing.dataset import Dataset
from preprocessing.encoding.encoder import check_canonical
from preprocessing.encoding.row_hashes import row_hashes
from preprocessing.reading.packed import open_unpacked, readable
from preprocessing.reading.raw_files import LONGEST_LINE, Piece, RawFolder, Source, Work, work
from preprocessing.reading.raw_files import PIECE_BYTES as RAW_PIECE_BYTES
from preprocessing.split_rules import COPY_COLUMN, TimeSplit
from preprocessing.writing.splits import IntArray, Placement, times

PIECE_BYTES = 16 << 20
#: What the driver is to raise in its turn: an executor that raises makes Spark try again, and tell it in Java.
Failure = UserError | OSError


@dataclass(frozen=True)
class Cut:
    """Where a piece of a raw file lies.

    Attributes:
        path: the raw file, as complaints name it.
        file, start, stop: these bytes of this file, the raw one or a copy of it.
        first_line: number of the first line.
    """

    source: Source
    path: Path
    file: Path
    start: int
    stop: int
    first_line: int

    def piece(self) -> Piece:
        """With its text."""
        with readable(self.path), self.file.open("rb") as file:
            file.seek(self.start)
            text = file.read(self.stop - self.start)
        if self.file == self.path and not text.endswith(b"\n"):
            text += b"\n"  # the end of a raw file, which may lack the line end
        return Piece(self.path, self.first_line, text)


@dataclass(frozen=True)
class Stretch:
    """A part of a raw file that is to be cut into pieces, by one task.

    Attributes:
        file: number of the file.
        start: of a plain text file, the lines that begin in the `piece_bytes` from here; None: all of a file that must be
            unpacked, or that the source cuts itself.
        piece_bytes: of each piece.
    """

    file: int
    source: Source
    start: int | None
    piece_bytes: int

    def cut(self, raw: RawFolder, folder: Path) -> tuple[list[Cut], int, Failure | None]:
        """The pieces, up to what cannot be read; and the number of lines. Copies go into `folder`.

        Pieces of a plain text are numbered as if the stretch were the beginning of the file.
        """
        try:
            if self.start is None:
                return self._copied(raw, folder)
            cut, num_lines = self._lines(raw.paths[self.source.name], self.start)
        except (UserError, OSError) as error:
            return [], 0, error
        return [cut] if num_lines else [], num_lines, None

    def _copied(self, raw: RawFolder, folder: Path) -> tuple[list[Cut], int, Failure | None]:
        cuts: list[Cut] = []
        path = folder / uuid4().hex  # a task may be tried twice at a time
        with path.open("wb") as file:
            try:
                for piece in self.source.pieces(raw, self.piece_bytes):
                    start = file.tell()
                    file.write(piece.text)
                    cuts.append(Cut(self.source, piece.path, path, start, file.tell(), piece.first_line))
            except DataError as error:
                return cuts, 0, error
        return cuts, 0, None

    def _lines(self, path: Path, start: int) -> tuple[Cut, int]:
        stop = start + self.piece_bytes
        with readable(path), path.open("rb") as file:
            if start:
                file.seek(start - 1)
                file.readline(LONGEST_LINE)  # the end of the line before; one that is too long is told where it begins
            start = file.tell()
            text = file.read(max(stop - start, 0))
            if text and not text.endswith(b"\n"):
                rest = file.readline(LONGEST_LINE)
                if len(rest) == LONGEST_LINE:
                    raise DataError(f"{path}: no line end within {LONGEST_LINE >> 20} MiB, so no text table. Fetch it again.")
                text += rest
        num_lines = text.count(b"\n") + (text[-1:] not in (b"", b"\n"))
        return Cut(self.source, path, path, start, start + len(text), 1), num_lines


def stretches(file: int, source: Source, raw: RawFolder) -> list[Stretch]:
    """How tasks share the reading of a file. Raises DataError when its beginning is not what the source reads."""
    path = raw.paths[source.name]
    source, _ = raw.opened(source, RAW_PIECE_BYTES)
    with readable(path), open_unpacked(path, source.name) as text:
        plain = isinstance(text, io.BufferedReader) and type(source).pieces is Source.pieces
    starts = range(0, path.stat().st_size, PIECE_BYTES) if plain else [None]
    return [Stretch(file, source, start, PIECE_BYTES) for start in starts]


@dataclass(frozen=True)
class PieceRows:
    """The canonical rows of a piece, with their hashes, or why there are none.

    Attributes:
        index: of the piece, in the order of the files.
        work: its result is the rows as an Arrow stream; None when the piece could not be read.
        num_rows: how many canonical rows there are.
        sizes: how many of them belong to each block of the split, [3]; zeros while its cuts are unknown.
        failure: what is wrong, beyond bad rows.
    """

    index: int
    work: Work[bytes] | None
    num_rows: int
    sizes: IntArray
    failure: Failure | None = None

    def batches(self) -> list[pa.RecordBatch]:
        """The rows."""
        assert self.work is not None
        return from_stream(self.work.result)

    def account(self) -> PieceRows:
        """Without the rows."""
        return self if self.work is None else replace(self, work=replace(self.work, result=b""))

    def positions(self, placement: Placement, before: IntArray) -> Iterator[tuple[pa.RecordBatch, IntArray]]:
        """The rows with their positions; `before`: sizes of all that precedes the piece."""
        here = placement.after(before)
        for batch in self.batches():
            yield batch, here.positions(batch)


def canonical_rows(index: int, cut: Cut, dataset: Dataset, placement: Placement | None, limit: int) -> PieceRows:
    """Read a piece.

    Args:
        placement: None while the cuts of a `TimeSplit` are unknown.
        limit: bad rows that are allowed: no more need to be told.
    """
    done, num_rows, sizes = None, 0, np.zeros(3, np.int64)
    try:
        found = work(dataset.canonical, cut.source, cut.piece())
        done = Work(found.num_rows, found.bad_rows[: limit + 1], found.passed_over, b"")
        batches = []
        for batch in found.result:
            check_canonical(dataset, batch)
            batch = batch.append_column(COPY_COLUMN, row_hashes(batch, dataset.identity))
            batches.append(batch)
            num_rows += batch.num_rows
            if placement is not None:
                sizes += placement.sizes(batch)
            elif isinstance(dataset.split, TimeSplit):
                times(batch, dataset.split)
        schema = dataset.canonical_schema().append(pa.field(COPY_COLUMN, pa.int64()))
        done = replace(done, result=to_stream(batches, schema))
    except (UserError, OSError) as error:
        return PieceRows(index, done, num_rows, sizes, error)
    return PieceRows(index, done, num_rows, sizes)


def to_stream(batches: list[pa.RecordBatch], schema: pa.Schema) -> bytes:
    """Batches as bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def from_stream(content: bytes) -> list[pa.RecordBatch]:
    """The batches again."""
    return list(pa.ipc.open_stream(content))
