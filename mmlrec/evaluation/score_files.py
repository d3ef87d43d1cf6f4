"""Files of scores: Parquet, CSV or JSON lines, by the name of the file."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mmlrec.errors import StorageError, UserError
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place

#: Endings of names that say how scores are written.
ENDINGS = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
#: Bytes of a line that are looked at.
_LONGEST_LINE = 1 << 20
#: A name of a score, among those of columns or in the first row of JSON; other tools write CSV again without quotes.
_SCORE = re.compile(rb'(?:^|[,"])score\.')


def ending(output: Place) -> str:
    """The one of `ENDINGS` that the name has.

    Raises:
        UserError: it has none of them.
    """
    name = output.name.lower()
    for known in ENDINGS:
        if name.endswith(known) and name != known:
            return known
    listed = ", ".join(ENDINGS[:-1])
    raise UserError(
        f"{output}: how scores are written is told by the name: give --output one that ends in {listed} or {ENDINGS[-1]}."
    )


def check_replaced(output: Place) -> None:
    """Refuse to replace a file that holds anything but scores.

    Raises:
        UserError: it does, or its name has none of `ENDINGS`.
        StorageError: the store cannot be reached, or refuses.
    """
    kind = ending(output)
    if output.is_file() and output.stat().st_size and not _holds_scores(output, kind):
        raise UserError(
            f"{output} is there, and holds no scores: it is not replaced. Choose another --output, or move it away."
        )


def _holds_scores(there: Place, kind: str) -> bool:
    try:
        if kind == ".parquet":
            with open_parquet(there) as file:
                return any(name.startswith("score.") for name in file.schema_arrow.names)
        with there.open("rb") as file, gzip.open(file) if kind.endswith(".gz") else contextlib.nullcontext(file) as lines:
            first = lines.readline(_LONGEST_LINE)
            return not first or _SCORE.search(first) is not None
    except (OSError, EOFError, zlib.error, pa.ArrowException, UserError) as error:
        if isinstance(error, StorageError):
            raise
        return False


class ScoreFile:
    """Writes tables of one schema, one behind the other. In CSV a missing value is an empty field, in JSON null.

    Args:
        path: the file to write, whatever its name.
        kind: one of `ENDINGS`.
    """

    def __init__(self, path: Path, kind: str, schema: pa.Schema) -> None:
        self._json = kind.startswith(".jsonl")
        self._stream = pa.output_stream(str(path), compression="gzip" if kind.endswith(".gz") else None)
        self._writer: Any = None
        if kind == ".parquet":
            self._writer = pq.ParquetWriter(self._stream, schema)
        elif not self._json:
            self._writer = pyarrow.csv.CSVWriter(self._stream, schema)

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        if not self._json:
            self._writer.write_table(table)
            return
        # By way of text a float32 becomes the float64 of the same few digits.
        short = [pa.float32() == field.type for field in table.schema]
        columns = [c.cast(pa.string()).cast(pa.float64()) if s else c for c, s in zip(table.columns, short, strict=True)]
        rows = pa.table(columns, names=table.column_names).to_pylist()
        self._stream.write("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())

    def close(self) -> None:
        """Write what is left. May be called again."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._stream.close()
