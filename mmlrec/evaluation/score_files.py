"""Files of scores: Parquet, CSV or JSON lines, by the name of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mmlrec.errors import UserError
from mmlrec.storage.places import Place

#: Endings of names that say how scores are written.
ENDINGS = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")


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
