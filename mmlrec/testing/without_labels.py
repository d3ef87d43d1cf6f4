"""Raw files without what only labels, weights, the split and groups need: as rows are that wait for a score."""

from __future__ import annotations

import csv
import io
import json

import pyarrow.parquet as pq

from mmlrec.testing.raw_faults import unpacked
from mmlrec.testing.raw_folders import Made
from preprocessing.reading.arrays import Arrays
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.json_lines import JsonLines
from preprocessing.reading.parquet_rows import ParquetRows


def without_labels(made: Made, keys: tuple[str, ...]) -> dict[str, bytes | None]:
    """Raw file -> its content without the columns that it may lack; None where the whole file may be absent.

    Args:
        made: of a run with --like, whose sources say what may be absent.
        keys: of JSON lines, where sources need not say it.
    """
    found: dict[str, bytes | None] = {}
    for file, source in made.sources.items():
        content = unpacked(made.paths[file])
        if isinstance(source, JsonLines):
            found[file] = _json(content, keys)
        elif isinstance(source, DelimitedText) and source.optional:
            found[file] = _text(content, source)
        elif isinstance(source, ParquetRows) and source.optional:
            table = pq.read_table(io.BytesIO(content))
            sink = io.BytesIO()
            pq.write_table(table.drop_columns([name for name in source.optional if name in table.column_names]), sink)
            found[file] = sink.getvalue()
        elif isinstance(source, Arrays) and {*dict(source.files)[file]} <= {*source.optional}:
            found[file] = None
    return found


def _json(content: bytes, keys: tuple[str, ...]) -> bytes:
    rows = [json.loads(line) if line.strip() else None for line in content.decode().split("\n")]
    kept = [row and {key: value for key, value in row.items() if key not in keys} for row in rows]
    return "\n".join("" if row is None else json.dumps(row, ensure_ascii=False) for row in kept).encode()


def _text(content: bytes, source: DelimitedText) -> bytes:
    lines = content.decode(source.encoding).split("\n")
    fields = list(source.fields or source.columns)
    written = []
    for line in lines:
        plain = line.removesuffix("\r")
        if not plain.strip() or (source.comment and plain.startswith(source.comment)):
            written.append(line)
            continue
        cells = next(csv.reader([plain], delimiter=source.separator)) if source.quoted else plain.split(source.separator)
        if source.header and not any(map(str.strip, written)):
            fields = [cell.removeprefix("\ufeff") for cell in cells]
        kept = [cell for name, cell in zip(fields, cells, strict=True) if name not in source.optional]
        written.append(_joined(kept, source) + line[len(plain) :])
    return "\n".join(written).encode(source.encoding)


def _joined(cells: list[str], source: DelimitedText) -> str:
    if not source.quoted:
        return source.separator.join(cells)
    sink = io.StringIO()
    csv.writer(sink, delimiter=source.separator, lineterminator="").writerow(cells)
    return sink.getvalue()
