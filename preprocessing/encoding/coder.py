"""Canonical rows with codes in place of raw values, so that each value is looked up once; codes become ids when counted.

The local engine's way to a vocabulary. Spark counts values themselves (`ValueCounter`): its tasks run in processes of their
own, in which a code would mean something else, and counts of values can be added up. That way a value is looked up twice, when
it is counted and when it is encoded, and all distinct values are in memory at once; here neither is so, hence two ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from preprocessing.dataset import Column, Dataset
from preprocessing.encoding.dictionaries import ArrayStore, Dictionaries
from preprocessing.encoding.encoder import Encoder
from preprocessing.encoding.ranking import VocabularyFile, rank
from preprocessing.encoding.row_hashes import MISSING, row_hashes
from preprocessing.encoding.value_index import hash_words, spread
from preprocessing.progress import progress
from preprocessing.split_rules import COPY_COLUMN, SIDE_COLUMN
from preprocessing.workers import in_order

_LEAST_SORTED_BYTES = 1 << 16


@dataclass(frozen=True)
class Coded:
    """Canonical rows with codes, and which generation of its table's dictionary the codes of each feature belong to."""

    rows: pa.RecordBatch
    generations: tuple[int, ...]


class Coder:
    """What `Encoder` does row by row of raw values, for rows that are read once, in bounded memory.

    `code` and `encode` are for several threads.

    Args:
        encoder: does all that needs no vocabulary, and holds the vocabularies in the end.
        folder: for dictionaries and counts that do not fit.
        limit_bytes: of all dictionaries together; counts and ids take less than half of it.
    """

    def __init__(self, dataset: Dataset, encoder: Encoder, folder: Path, limit_bytes: int) -> None:
        self._features, self._encoder, self._identity = dataset.features, encoder, dataset.identity
        self._folder, self._limit = folder, limit_bytes
        self._name, self._with_vocabulary = dataset.name, encoder.fitted
        raw_types = {str(f.table): f.raw_type for f in self._with_vocabulary}
        self._dictionaries = Dictionaries(raw_types, folder / "dictionaries", limit_bytes)
        self._counts = ArrayStore(folder / "counts", limit_bytes // 4)
        self._ids = ArrayStore(folder / "ids", limit_bytes // 4)
        coded = {f.name: pa.list_(pa.int32()) if f.kind == "multi" else pa.int32() for f in self._with_vocabulary}
        fields = [(field.name, coded.get(field.name, field.type)) for field in dataset.canonical_schema()]
        #: Of the rows that `code` gives.
        self.schema = pa.schema([*fields, (COPY_COLUMN, pa.int64())])

    def code(self, rows: pa.RecordBatch) -> Coded:
        """Canonical rows with codes, -1 for null; and with their hashes."""
        columns, generations = dict(zip(rows.schema.names, rows.columns, strict=True)), []
        to_hash = dict(columns)
        for feature in self._with_vocabulary:
            values = columns[feature.name]
            local = (values.flatten() if feature.kind == "multi" else values).dictionary_encode()
            hashes = hash_words(local.dictionary)
            generation, codes = self._dictionaries.tables[str(feature.table)].code(local, hashes)
            columns[feature.name] = _like(values, codes) if feature.kind == "multi" else pa.array(codes)
            generations.append(generation)
            if pa.types.is_string(feature.raw_type):
                words = spread(hashes[0], local, MISSING)
                to_hash[feature.name] = _like(values, words) if feature.kind == "multi" else pa.array(words)
        columns[COPY_COLUMN] = row_hashes(pa.RecordBatch.from_pydict(to_hash), self._identity)
        return Coded(pa.RecordBatch.from_pydict(columns, schema=self.schema), tuple(generations))

    def begin(self) -> None:
        """All rows are coded; those to be counted follow."""
        for name, dictionary in self._dictionaries.tables.items():
            dictionary.finish()
            for generation, size in enumerate(dictionary.sizes):
                self._counts.put((name, generation), np.zeros(size, np.int64))

    def count(self, coded: Coded, chosen: NDArray[np.bool_]) -> None:
        """Count the values of the chosen rows, [rows]."""
        rows = coded.rows if chosen.all() else coded.rows.filter(pa.array(chosen))
        self._encoder.fit_numbers(rows)
        for feature, generation in zip(self._with_vocabulary, coded.generations, strict=True):
            column = rows.column(feature.name)
            codes = (column.flatten() if feature.kind == "multi" else column).to_numpy()
            counts = self._counts.get((feature.table, generation))
            if len(counts) < len(codes):
                counts += np.bincount(codes + 1, minlength=len(counts) + 1)[1:]
            else:
                np.add.at(counts, codes[codes >= 0], 1)

    def freeze(self, vocabularies: Path, workers: int) -> None:
        """Turn the counts into vocabularies, written to this folder."""
        vocabularies.mkdir()
        tables = self._dictionaries.tables
        limit = max(self._limit // (8 * workers), _LEAST_SORTED_BYTES)
        features = {f.table: f for f in reversed(self._with_vocabulary)}  # the first of those that share a table
        jobs = ((index, features[table]) for index, table in enumerate(tables))
        ranked = in_order(partial(self._rank, vocabularies, limit), jobs, workers)
        with progress(f"{self._name}: vocabularies", len(tables), "tables") as done:
            for table, num_rows in zip(tables, ranked, strict=True):
                self._encoder.num_rows[table] = num_rows
                done.update(1)
        tables.clear()
        for buckets in self._encoder.buckets.values():
            buckets.freeze()

    def _rank(self, vocabularies: Path, limit: int, job: tuple[int, Column]) -> int:
        index, feature = job
        table, encoder = str(feature.table), self._encoder
        path, given = vocabularies / f"{table}.parquet", encoder.given.vocabulary(table) if encoder.given else None
        if given and not encoder.grows:
            given.copy(path)
        return rank(
            self._dictionaries.tables[table],
            lambda generation: self._counts.get((table, generation)),
            encoder.min_count(feature),
            encoder.parity,
            VocabularyFile(path, feature.raw_type) if encoder.grows else None,
            lambda generation, ids: self._ids.put((table, generation), ids),
            self._folder / f"ranking-{index}",
            limit,
            given,
        )

    def encode(self, coded: Coded) -> pa.RecordBatch:
        """The rows with ids, as small as they go; `cast` to the schema of the parts makes all of them int64."""
        generations = dict(zip([f.name for f in self._with_vocabulary], coded.generations, strict=True))
        columns = {}
        for feature in self._features:
            values = coded.rows.column(feature.name)
            if feature.name not in generations:
                columns[feature.name] = self._encoder.encode_column(feature, values)
                continue
            ids = self._ids.get((feature.table, generations[feature.name]))
            if feature.kind == "multi":
                columns[feature.name] = _like(values, ids[values.flatten().to_numpy()])
            else:
                columns[feature.name] = pa.array(ids[values.to_numpy()])
        others = {name: coded.rows.column(name) for name in coded.rows.schema.names if name not in columns}
        for name in (SIDE_COLUMN, COPY_COLUMN):
            others.pop(name, None)
        return pa.RecordBatch.from_pydict(columns | others)


def _like(lists: pa.ListArray, values: NDArray[np.integer]) -> pa.ListArray:
    """The same lists of other values; null becomes an empty list."""
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
