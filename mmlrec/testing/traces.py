"""Rows of a dataset followed from the line of the raw file to the split that they end in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmlrec.schema import SPLITS, DatasetManifest
from preprocessing.dataset import Dataset
from preprocessing.reading.raw_files import Block

_TRACE = "key.trace"
_LINE_BITS = 40


@contextmanager
def traced() -> Iterator[list[str]]:
    """Add a key that tells file and line to each row; yields the files in the order of their numbers."""
    files: list[str] = []
    schema, identity, only = Dataset.canonical_schema, vars(Dataset)["identity"].fget, Block.only
    last: list[Any] = [None]

    def followed(self: Block, *arguments: Any) -> Block:
        result = only(self, *arguments)
        last[0] = result.lines
        return result

    def lines_of(dataset: Dataset, block: Block, num_rows: int) -> Any:
        if len(last[0]) == num_rows:
            return last[0]
        lines: list[np.int64] = []  # several rows of a line: see what each gives
        for k in range(len(block.lines)):
            table = block.table.slice(k, 1).combine_chunks()
            one = replace(block, lines=block.lines[k : k + 1], table=table, bad_rows=[], passed_over={})
            lines += [block.lines[k]] * len(dataset.rows(one)[dataset.features[0].name])
        assert len(lines) == num_rows
        return lines

    def canonical(self: Dataset, block: Block) -> list[pa.RecordBatch]:
        last[0] = block.lines
        columns = self.rows(block)
        if block.source.name not in files:
            files.append(block.source.name)
        lines = lines_of(self, block, len(columns[self.features[0].name]))
        number = files.index(block.source.name) << _LINE_BITS
        columns[_TRACE] = pa.array([number + int(line) for line in lines], pa.int64())
        names = self.canonical_schema()
        return pa.table({name: columns[name] for name in names.names}, schema=names).combine_chunks().to_batches()

    with (
        mock.patch.object(Dataset, "canonical_schema", lambda self: schema(self).append(pa.field(_TRACE, pa.int64()))),
        mock.patch.object(Dataset, "identity", property(lambda self: [name for name in identity(self) if name != _TRACE])),
        mock.patch.object(Dataset, "canonical", canonical),
        mock.patch.object(Block, "only", followed),
    ):
        yield files


def sides_of_lines(out: Path, files: list[str]) -> dict[str, dict[int, set[str]]]:
    """File -> line -> the splits that its rows are in, of a dataset that was made while `traced`."""
    found: dict[str, dict[int, set[str]]] = {file: {} for file in files}
    manifest = DatasetManifest.load(out)
    for split in SPLITS:
        for part in manifest.splits[split].parts:
            for trace in set(pq.read_table(out / part.path, columns=[_TRACE])[_TRACE].to_pylist()):
                file, line = files[trace >> _LINE_BITS], trace & (1 << _LINE_BITS) - 1
                found[file].setdefault(line, set()).add(split)
    return found
