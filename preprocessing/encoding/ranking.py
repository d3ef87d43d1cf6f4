"""From the counts of coded values to a vocabulary: in memory, or, for a dictionary of several generations, through the disk.

Both give the same vocabulary and the same ids, which go by (descending count, value); by value alone in the parity form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from preprocessing.encoding.dictionaries import Dictionary
from preprocessing.encoding.value_index import hash_words
from preprocessing.rows.batch_file import BatchFile

IntArray = NDArray[np.int64]
_BATCH_ROWS = 1 << 16
_LEAST_ROWS = 32
_MERGED_BYTES = 256  # of a row while runs are merged, all copies together

#: Generation -> count of each code, [codes] int64.
Counts = Callable[[int], IntArray]
#: Takes generation and ids of its codes, [codes + 1] int32 or int64; 0 = not in the vocabulary. The last one is for code -1.
Ids = Callable[[int, NDArray[np.signedinteger]], None]


class VocabularyFile:
    """A vocabulary on disk: columns `value`, `id` (int64) and `count` (int64), in the order of ids 1, 2, ...

    Its bytes do not depend on how the entries are handed over.
    """

    def __init__(self, path: Path, raw_type: pa.DataType) -> None:
        self._schema = pa.schema([("value", raw_type), ("id", pa.int64()), ("count", pa.int64())])
        encodings = {"value": "PLAIN", "id": "DELTA_BINARY_PACKED", "count": "DELTA_BINARY_PACKED"}
        self._writer = pq.ParquetWriter(path, self._schema, use_dictionary=False, column_encoding=encodings)
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self.num_rows = 1  # of the table: row 0 included

    def add(self, entries: pa.Table) -> None:
        """Append columns `value` and `count` in the order of ids."""
        ids = pa.array(np.arange(self.num_rows, self.num_rows + len(entries)))
        for start in range(0, len(entries), _BATCH_ROWS):  # a plain string column cannot be longer than 2 GiB
            part = {"value": entries["value"], "id": ids, "count": entries["count"]}
            self._waiting.append(pa.table(part).slice(start, _BATCH_ROWS).cast(self._schema))
        self.num_rows += len(entries)
        self._num_waiting += len(entries)
        if self._num_waiting >= _BATCH_ROWS:
            self._write(self._num_waiting // _BATCH_ROWS * _BATCH_ROWS)

    def close(self) -> int:
        """Finish the file; gives `num_rows`."""
        self._write(self._num_waiting)
        self._writer.close()
        return self.num_rows

    def _write(self, num_rows: int) -> None:
        every = pa.concat_tables(self._waiting or [self._schema.empty_table()])
        for start in range(0, num_rows, _BATCH_ROWS):
            rows = every.slice(start, min(_BATCH_ROWS, num_rows - start))
            self._writer.write_table(rows.combine_chunks(), row_group_size=_BATCH_ROWS)
        self._waiting = [every.slice(num_rows)]
        self._num_waiting -= num_rows


def rank(
    dictionary: Dictionary,
    counts: Counts,
    min_count: int,
    parity: bool,
    file: VocabularyFile,
    ids: Ids,
    folder: Path,
    limit: int,
) -> int:
    """Write the vocabulary of a dictionary, and tell the ids of its codes. Values that are never counted are left out.

    Args:
        folder: for files in between.
        limit: bytes of values and counts that may be sorted at a time.

    Returns:
        Rows of the table, row 0 included.
    """
    order = _order(parity)
    sizes = dictionary.sizes
    if len(sizes) == 1:
        count = counts(0)
        chosen = np.flatnonzero(count >= max(min_count, 1))
        entries = pa.table({"value": dictionary.values(0).take(pa.array(chosen)), "count": count[chosen]})
        ranks = pc.sort_indices(entries, sort_keys=order).to_numpy()
        for start in range(0, len(ranks), _BATCH_ROWS):
            file.add(entries.take(pa.array(ranks[start : start + _BATCH_ROWS])))
        of_code = np.zeros(sizes[0] + 1, np.int32)
        of_code[chosen[ranks]] = np.arange(1, len(ranks) + 1)
        ids(0, of_code)
        return file.close()
    folder.mkdir()
    entry_files = _partition(dictionary, counts, folder, limit)
    rows_at_hand = min(max(limit // (_MERGED_BYTES * len(entry_files)), _LEAST_ROWS), _BATCH_ROWS)
    runs = [_sort(entry_file, folder, run, min_count, order, rows_at_hand) for run, entry_file in enumerate(entry_files)]
    run_ids = _merge([run for run, _ in runs], order, rows_at_hand, file, folder)
    ids_of_generations = _spread(run_ids, [codes for _, codes in runs], sizes, folder)
    num_rows = file.close()
    for generation, found in enumerate(ids_of_generations):
        ids(generation, found.astype(np.int32) if num_rows < 1 << 31 else found)
    return num_rows


def num_distinct(dictionary: Dictionary, folder: Path, limit: int) -> int:
    """Distinct values over all generations."""
    sizes = dictionary.sizes
    if len(sizes) == 1:
        return sizes[0]
    folder.mkdir()
    files = _partition(dictionary, lambda generation: np.ones(sizes[generation], np.int64), folder, limit)
    return sum(len(pc.unique(file.table()["value"])) for file in files)


def _order(parity: bool) -> list[tuple[str, str]]:
    return [("value", "ascending")] if parity else [("count", "descending"), ("value", "ascending")]


def _partition(dictionary: Dictionary, counts: Counts, folder: Path, limit: int) -> list[BatchFile]:
    """Entries (value, count, generation, code) of all generations in files by the hash of the value."""
    sizes = dictionary.sizes
    num_bytes = 0
    for generation, size in enumerate(sizes):
        num_bytes += dictionary.values(generation).nbytes + 24 * size
    num_files = max(-(-num_bytes // limit), 2)
    columns = {"value": dictionary.values(0).type, "count": pa.int64(), "generation": pa.int32(), "code": pa.int32()}
    schema = pa.schema(columns.items())
    files = [BatchFile(folder / f"entries-{index}.arrow", schema) for index in range(num_files)]
    for generation in range(len(sizes)):
        count, start = counts(generation), 0
        for values in pa.table({"value": dictionary.values(generation)}).to_batches(max_chunksize=_BATCH_ROWS):
            values = values.column(0)
            places = (hash_words(values)[0] >> np.uint64(32)) % np.uint64(num_files)
            order = np.argsort(places, kind="stable")
            ends = np.cumsum(np.bincount(places.astype(np.int64), minlength=num_files))
            for file, first, end in zip(files, [0, *ends[:-1]], ends, strict=True):
                if first < end:
                    rows = order[first:end]
                    codes, where = (start + rows).astype(np.int32), np.full(len(rows), generation, np.int32)
                    arrays = [values.take(pa.array(rows)), pa.array(count[codes]), pa.array(where), pa.array(codes)]
                    file.add(pa.RecordBatch.from_arrays(arrays, schema=schema))
            start += len(values)
    return files


def _sort(
    entry_file: BatchFile, folder: Path, run: int, min_count: int, order: list[tuple[str, str]], batch_rows: int
) -> tuple[BatchFile, BatchFile]:
    """Add up the counts of the values of one file.

    Returns:
        (value, count), sorted, and (generation, code, rank) for each entry; rank -1: seen too rarely.
    """
    entries = entry_file.table()
    local = entries["value"].combine_chunks().dictionary_encode()
    group = local.indices.to_numpy()
    total = np.zeros(len(local.dictionary), np.int64)
    np.add.at(total, group, entries["count"].to_numpy())
    chosen = np.flatnonzero(total >= max(min_count, 1))
    kept = pa.table({"value": local.dictionary.take(pa.array(chosen)), "count": total[chosen]})
    ranks = pc.sort_indices(kept, sort_keys=order).to_numpy()
    values = BatchFile(folder / f"run-{run}.arrow", kept.schema)
    for start in range(0, len(ranks), batch_rows):
        values.add(_batch(kept.take(pa.array(ranks[start : start + batch_rows]))))
    rank_of_group = np.full(len(total), -1, np.int64)
    rank_of_group[chosen[ranks]] = np.arange(len(ranks))
    ranked = entries.select(["generation", "code"]).append_column("rank", pa.array(rank_of_group[group]))
    codes = BatchFile(folder / f"codes-{run}.arrow", ranked.schema)
    codes.add(_batch(ranked))
    return values, codes


def _merge(
    runs: list[BatchFile], order: list[tuple[str, str]], batch_rows: int, file: VocabularyFile, folder: Path
) -> list[BatchFile]:
    """Merge sorted runs into the vocabulary, `batch_rows` of each at a time; gives the ids of each run, by its ranks."""
    schema = pa.schema([("id", pa.int64())])
    ids = [BatchFile(folder / f"ids-{run}.arrow", schema) for run in range(len(runs))]
    readers = dict(enumerate(run.batches() for run in runs))  # of the runs that go on
    waiting: dict[int, pa.Table] = {}
    while True:
        for run, reader in list(readers.items()):
            if run not in waiting or len(waiting[run]) < batch_rows:
                batch = next(reader, None)
                if batch is None:
                    del readers[run]
                    continue
                more = pa.Table.from_batches([batch]).append_column("run", pa.array(np.full(batch.num_rows, run)))
                waiting[run] = pa.concat_tables([waiting[run], more]) if run in waiting else more
        if not waiting:
            return ids
        at_hand = pa.concat_tables(waiting.values())
        ordered = pc.sort_indices(at_hand, sort_keys=order).to_numpy()
        place = np.empty(len(ordered), np.int64)
        place[ordered] = np.arange(len(ordered))
        # What stands behind the last entry at hand of a run that goes on may have to wait for the next ones of that run.
        lasts = dict(zip(waiting, np.cumsum([len(part) for part in waiting.values()]) - 1, strict=True))
        sure = min((int(place[last]) + 1 for run, last in lasts.items() if run in readers), default=len(place))
        at_hand = at_hand.take(pa.array(ordered))
        of_run = at_hand["run"].to_numpy()
        for run in np.unique(of_run[:sure]):
            found = file.num_rows + np.flatnonzero(of_run[:sure] == run)
            ids[run].add(pa.RecordBatch.from_arrays([pa.array(found)], schema=schema))
        file.add(at_hand.slice(0, sure))
        rest, run_of_rest = at_hand.slice(sure), of_run[sure:]
        waiting = {int(run): rest.filter(pa.array(run_of_rest == run)) for run in np.unique(run_of_rest)}


def _spread(run_ids: list[BatchFile], run_codes: list[BatchFile], sizes: list[int], folder: Path) -> Iterator[IntArray]:
    """From the ids of each run to the ids of each generation's codes, [codes + 1]."""
    schema = pa.schema([("code", pa.int32()), ("id", pa.int64())])
    files = [BatchFile(folder / f"generation-{generation}.arrow", schema) for generation in range(len(sizes))]
    for of_run, codes_of_run in zip(run_ids, run_codes, strict=True):
        id_of_rank = np.append(of_run.table()["id"].to_numpy(), 0)  # rank -1: id 0
        entries = codes_of_run.table()
        generations, codes = entries["generation"].to_numpy(), entries["code"].to_numpy()
        found = id_of_rank[entries["rank"].to_numpy()]
        for generation in np.unique(generations):
            here = generations == generation
            arrays = [pa.array(codes[here]), pa.array(found[here])]
            files[generation].add(pa.RecordBatch.from_arrays(arrays, schema=schema))
    for file, size in zip(files, sizes, strict=True):
        table, ids = file.table(), np.zeros(size + 1, np.int64)
        ids[table["code"].to_numpy()] = table["id"].to_numpy()
        yield ids


def _batch(table: pa.Table) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=table.schema)
