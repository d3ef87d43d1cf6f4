"""From the counts of coded values to a vocabulary: in memory, or, for a dictionary of several generations, through the disk.

Both give the same vocabulary and the same ids, which go by (descending count, value); by value alone in the parity form.
Where a vocabulary is given, its entries come first, with the ids that they have.
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
from preprocessing.encoding.fitted import GivenVocabulary
from preprocessing.encoding.value_index import hash_words
from preprocessing.rows.batch_file import BatchFile

IntArray = NDArray[np.int64]
_BATCH_ROWS = 1 << 16
_LEAST_ROWS = 32
_MERGED_BYTES = 256  # of a row while runs are merged, all copies together
_GIVEN = -1  # in place of a generation
_IDS = pa.schema([("id", pa.int64())])

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
    file: VocabularyFile | None,
    ids: Ids,
    folder: Path,
    limit: int,
    given: GivenVocabulary | None = None,
) -> int:
    """Write the vocabulary of a dictionary, and tell the ids of its codes. Values that are never counted are left out.

    Args:
        file: None where nothing is to be written, because the given vocabulary does not grow.
        folder: for files in between.
        limit: bytes of values and counts that may be sorted at a time.
        given: its entries are written first, what is counted of them added to their counts.
            Beyond the limit its values go through the disk, too; a count of each, 8 bytes, is in a file that is mapped.

    Returns:
        Rows of the table, row 0 included.
    """
    order = _order(parity)
    sizes = dictionary.sizes
    if len(sizes) == 1 and (given is None or given.num_bytes() <= limit):
        of_code, num_rows = _in_memory(dictionary.values(0), counts(0), min_count, order, file, given)
        ids(0, of_code)
        return num_rows
    folder.mkdir()
    entry_files = _partition(dictionary, counts, folder, limit, given)
    rows_at_hand = min(max(limit // (_MERGED_BYTES * len(entry_files)), _LEAST_ROWS), _BATCH_ROWS)
    more = np.memmap(folder / "more.bin", np.int64, "w+", shape=((given.num_entries if given else 0) + 1,))
    grows = file is not None
    runs = [_sort(each, folder, run, min_count, order, rows_at_hand, more, grows) for run, each in enumerate(entry_files)]
    if file is None:
        run_ids, num_rows = [BatchFile(folder / "no-ids.arrow", _IDS)] * len(runs), _rows_of(given)
    else:
        if given is not None:
            _add_given(given, more, file)
        run_ids = _merge([run for run, _ in runs], order, rows_at_hand, file, folder)
        num_rows = file.close()
    for generation, found in enumerate(_spread(run_ids, [codes for _, codes in runs], sizes, folder)):
        ids(generation, found.astype(np.int32) if num_rows < 1 << 31 else found)
    return num_rows


def _in_memory(
    values: pa.ChunkedArray,
    counts: IntArray,
    min_count: int,
    order: list[tuple[str, str]],
    file: VocabularyFile | None,
    given: GivenVocabulary | None,
) -> tuple[NDArray[np.int32], int]:
    """Of a dictionary of one generation, what `rank` says: the ids of the codes, and the rows of the table."""
    of_code, new = np.zeros(len(values) + 1, np.int32), counts >= max(min_count, 1)
    if given is not None:
        at = pc.index_in(values, value_set=given.table()["value"].combine_chunks().cast(values.type))
        of_code[:-1] = known = at.cast(pa.int64()).fill_null(-1).to_numpy() + 1
        new &= known == 0
    if file is None:
        return of_code, _rows_of(given)
    if given is not None:
        more = np.zeros(given.num_entries + 1, np.int64)
        more[known] = counts
        _add_given(given, more, file)
    chosen = np.flatnonzero(new)
    entries = pa.table({"value": values.take(pa.array(chosen)), "count": counts[chosen]})
    ranks = pc.sort_indices(entries, sort_keys=order).to_numpy()
    of_code[chosen[ranks]] = np.arange(file.num_rows, file.num_rows + len(ranks))
    for start in range(0, len(ranks), _BATCH_ROWS):
        file.add(entries.take(pa.array(ranks[start : start + _BATCH_ROWS])))
    return of_code, file.close()


def _rows_of(given: GivenVocabulary | None) -> int:
    assert given is not None, "a vocabulary that is not given is written"
    return given.num_entries + 1


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


def _add_given(given: GivenVocabulary, more: IntArray, file: VocabularyFile) -> None:
    """The given entries, with the counts of their ids, [entries + 1], added to their own."""
    for batch in given.batches():
        counts = batch.column("count").to_numpy() + more[file.num_rows : file.num_rows + batch.num_rows]
        file.add(pa.table({"value": batch.column("value"), "count": counts}))


def _partition(
    dictionary: Dictionary, counts: Counts, folder: Path, limit: int, given: GivenVocabulary | None = None
) -> list[BatchFile]:
    """Entries (value, count, generation, code) of all generations in files by the hash of the value.

    A given value is of generation `_GIVEN`, never counted, its code its id.
    """
    sizes = dictionary.sizes
    num_bytes = given.num_bytes() + 24 * given.num_entries if given else 0
    for generation, size in enumerate(sizes):
        num_bytes += dictionary.values(generation).nbytes + 24 * size
    num_files = max(-(-num_bytes // limit), 2)
    kind = dictionary.values(0).type
    columns = {"value": kind, "count": pa.int64(), "generation": pa.int32(), "code": pa.int64()}
    schema = pa.schema(columns.items())
    files = [BatchFile(folder / f"entries-{index}.arrow", schema) for index in range(num_files)]

    def parts() -> Iterator[tuple[pa.Array, IntArray, int, int]]:
        """Some values, their counts, their generation, and the code of the first of them."""
        for generation in range(len(sizes)):
            count, start = counts(generation), 0
            for values in pa.table({"value": dictionary.values(generation)}).to_batches(max_chunksize=_BATCH_ROWS):
                yield values.column(0), count[start : start + values.num_rows], generation, start
                start += values.num_rows
        first = 1
        for batch in given.batches() if given else ():
            yield batch.column("value").cast(kind), np.zeros(batch.num_rows, np.int64), _GIVEN, first
            first += batch.num_rows

    for values, count, generation, start in parts():
        places = (hash_words(values)[0] >> np.uint64(32)) % np.uint64(num_files)
        order = np.argsort(places, kind="stable")
        ends = np.cumsum(np.bincount(places.astype(np.int64), minlength=num_files))
        for file, first, end in zip(files, [0, *ends[:-1]], ends, strict=True):
            if first < end:
                rows = order[first:end]
                where = np.full(len(rows), generation, np.int32)
                arrays = [values.take(pa.array(rows)), pa.array(count[rows]), pa.array(where), pa.array(start + rows)]
                file.add(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return files


def _sort(
    entry_file: BatchFile,
    folder: Path,
    run: int,
    min_count: int,
    order: list[tuple[str, str]],
    batch_rows: int,
    more: IntArray,
    grows: bool,
) -> tuple[BatchFile, BatchFile]:
    """Add up the counts of the values of one file.

    Args:
        more: of given values, [entries + 1], where their counts go, by their ids.
        grows: whether values that are not given are wanted.

    Returns:
        (value, count), sorted, of values that are not given; and (generation, code, rank, known) for each entry: rank -1: seen
        too rarely; known: the id of a given value, or 0.
    """
    entries = entry_file.table()
    local = entries["value"].combine_chunks().dictionary_encode()
    group = local.indices.to_numpy()
    total = np.zeros(len(local.dictionary), np.int64)
    np.add.at(total, group, entries["count"].to_numpy())
    generations, codes_of_entries = entries["generation"].to_numpy(), entries["code"].to_numpy()
    given, known = generations == _GIVEN, np.zeros(len(total), np.int64)
    known[group[given]] = codes_of_entries[given]
    more[known[known > 0]] = total[known > 0]
    chosen = np.flatnonzero((total >= max(min_count, 1)) & (known == 0) & grows)
    kept = pa.table({"value": local.dictionary.take(pa.array(chosen)), "count": total[chosen]})
    ranks = pc.sort_indices(kept, sort_keys=order).to_numpy()
    values = BatchFile(folder / f"run-{run}.arrow", kept.schema)
    for start in range(0, len(ranks), batch_rows):
        values.add(_batch(kept.take(pa.array(ranks[start : start + batch_rows]))))
    rank_of_group = np.full(len(total), -1, np.int64)
    rank_of_group[chosen[ranks]] = np.arange(len(ranks))
    ranked = entries.select(["generation", "code"]).append_column("rank", pa.array(rank_of_group[group]))
    ranked = ranked.append_column("known", pa.array(known[group])).filter(pa.array(~given))
    codes = BatchFile(folder / f"codes-{run}.arrow", ranked.schema)
    codes.add(_batch(ranked))
    return values, codes


def _merge(
    runs: list[BatchFile], order: list[tuple[str, str]], batch_rows: int, file: VocabularyFile, folder: Path
) -> list[BatchFile]:
    """Merge sorted runs into the vocabulary, `batch_rows` of each at a time; gives the ids of each run, by its ranks."""
    ids = [BatchFile(folder / f"ids-{run}.arrow", _IDS) for run in range(len(runs))]
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
            ids[run].add(pa.RecordBatch.from_arrays([pa.array(found)], schema=_IDS))
        file.add(at_hand.slice(0, sure))
        rest, run_of_rest = at_hand.slice(sure), of_run[sure:]
        waiting = {int(run): rest.filter(pa.array(run_of_rest == run)) for run in np.unique(run_of_rest)}


def _spread(run_ids: list[BatchFile], run_codes: list[BatchFile], sizes: list[int], folder: Path) -> Iterator[IntArray]:
    """From the ids of each run to the ids of each generation's codes, [codes + 1]."""
    schema = pa.schema([("code", pa.int64()), ("id", pa.int64())])
    files = [BatchFile(folder / f"generation-{generation}.arrow", schema) for generation in range(len(sizes))]
    for of_run, codes_of_run in zip(run_ids, run_codes, strict=True):
        id_of_rank = np.append(of_run.table()["id"].to_numpy(), 0)  # rank -1: id 0
        entries = codes_of_run.table()
        generations, codes = entries["generation"].to_numpy(), entries["code"].to_numpy()
        known = entries["known"].to_numpy()
        found = np.where(known > 0, known, id_of_rank[entries["rank"].to_numpy()])
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
