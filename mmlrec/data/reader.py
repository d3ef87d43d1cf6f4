"""From a dataset folder to batches: deterministic, resumable, and fast.

The order is that of `mmlrec.data.order`. A row group is decoded once for each lane that meets it, into matrices that
are permuted at once, so a batch is a few contiguous copies for each lane. Decoding of the next row groups and the
making of batches run in threads behind the consumer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mmlrec.data.batch import Batch
from mmlrec.data.order import EpochOrder, Order, SequentialOrder
from mmlrec.data.prefetch import prefetch
from mmlrec.data.row_groups import Ragged, RowGroupCache, RowGroups, Rows
from mmlrec.errors import ConfigError
from mmlrec.schema import DatasetManifest
from mmlrec.storage.places import Place, place

_BATCHES_AHEAD = 4  # finished batches that wait for the consumer
_ROW_GROUPS_AHEAD = 2  # row groups decoded before they are needed, at least; one for each thread that decodes
_MOST_THREADS = 4  # that decode, as a bound on the row groups ahead
_BATCHES_PLANNED = 256  # how far to look for the next row groups


def decode_threads() -> int:
    """Threads that decode row groups for a reader: as many as torch computes with, which share the cores; at most 4."""
    return min(torch.get_num_threads(), _MOST_THREADS)


class Reader:
    """Batches of one split for one rank.

    Row groups are decoded by as many threads as torch computes with (OMP_NUM_THREADS; ranks on a machine share its cores that
    way), at most 4; one more thread makes batches. What comes out does not depend on them.

    Memory: `cache_bytes` of decoded row groups, one permuted row group for each lane this rank reads, and those ahead: two, or
    one for each thread that decodes where there are more. A row takes 4 bytes for each id (8 in tables of more than 2^31 rows)
    and dense feature, 8 for each label, 8 for its number. A thread that decodes holds one column besides.

    Args:
        folder: the dataset folder of `manifest`.
        split: train, valid or test.
        tasks: names of the T tasks, in the order of the label columns of a batch.
        batch_size: global rows of a batch B; this rank's batches have ceil(B/W) rows, padding included.
        rank: r of world_size W.
        seed: of the training order.
        cache_bytes: decoded row groups kept for the next epoch.
        pinned: batches lie in page-locked memory, so that a copy to a GPU need not be waited for; made where they are decoded.
        known_rows: table -> rows that the model has for it, where the dataset's vocabulary has grown since; ids beyond are
            read as 0.

    Attributes:
        beyond: feature -> ids that this rank has read as 0 so far, because the model has no rows for them.

    Raises:
        ConfigError: an unknown task, or weighted features.
        DataError: the split is missing, empty, or not as the manifest says; the message names the file.
    """

    def __init__(
        self,
        folder: str | Place,
        manifest: DatasetManifest,
        split: str,
        *,
        tasks: Sequence[str],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        cache_bytes: int = 256 * 1024**2,
        pinned: bool = False,
        known_rows: Mapping[str, int] | None = None,
    ) -> None:
        self._groups = RowGroups(place(folder), manifest, split, tasks)
        self._cache = RowGroupCache(self._groups, cache_bytes)
        self._manifest = manifest
        self._batch_size, self._rank, self._world_size, self._seed = batch_size, rank, world_size, seed
        self._keys = [f.name for f in manifest.sparse_features]
        self.beyond: dict[str, int] = {}
        tables, known = manifest.by_name, known_rows or {}
        ids = {name: table for name, table in tables.items() if not table.managed}
        grown = {name for name, rows in known.items() if name in ids and ids[name].num_rows > rows}
        #: Feature -> first id that the model has no row for; of features whose table has grown.
        self._limits = {f.name: known[str(f.table)] for f in manifest.sparse_features if f.table in grown}
        self._padded_rows = -(-batch_size // world_size)
        self._pinned = pinned
        self._ones = torch.ones(len(self._keys) * self._padded_rows, dtype=torch.int32)

    @property
    def num_rows(self) -> int:
        """N: rows of the split, over all ranks."""
        return int(self._groups.num_rows.sum())

    @property
    def num_batches(self) -> int:
        """Batches of an epoch or of a sequential pass, the same on every rank."""
        return -(-self.num_rows // self._batch_size)

    def batch_rows(self, batch: int) -> int:
        """Global rows of a training batch, over all ranks, padding not counted."""
        return min(self._batch_size, self.num_rows - batch * self._batch_size)

    def epoch(self, epoch: int, start_row: int = 0) -> Generator[Batch, None, None]:
        """Batches of an epoch in training order, beginning after `start_row` global rows were trained.

        What precedes is skipped by arithmetic, not read. Close the iterator to stop its threads early.

        Raises:
            ConfigError: `start_row` is not where a batch of this size begins.
            DataError: while iterating, on bad content; the message names file, row and column.
        """
        if not 0 <= start_row <= self.num_rows or (start_row % self._batch_size and start_row != self.num_rows):
            raise ConfigError(
                f"training.batch_size={self._batch_size}: no batch begins at row {start_row} of {self.num_rows}."
                " Resume with the batch size and the dataset of the interrupted run."
            )
        order = EpochOrder(
            self._groups.num_rows,
            seed=self._seed,
            epoch=epoch,
            batch_size=self._batch_size,
            num_lanes=self._manifest.num_lanes,
            rank=self._rank,
            world_size=self._world_size,
        )
        return self._batches(order, -(-start_row // self._batch_size))

    def sequential(self) -> Generator[Batch, None, None]:
        """All rows once, as on disk: rank r reads the r-th W-th part of the split. The same steps on every rank.

        Raises:
            DataError: while iterating, on bad content; the message names file, row and column.
        """
        order = SequentialOrder(
            self._groups.num_rows, batch_size=self._batch_size, rank=self._rank, world_size=self._world_size
        )
        return self._batches(order, 0)

    def _batches(self, order: Order, first_batch: int) -> Generator[Batch, None, None]:
        threads = decode_threads()
        ahead = max(threads, _ROW_GROUPS_AHEAD)
        pool = ThreadPoolExecutor(ahead if self._groups.fetched else threads, thread_name_prefix="mmlrec-decode")
        loaded = _loaded(_plan(order, first_batch), order, self._cache, pool, ahead)
        gpu = torch.cuda.current_device() if self._pinned else None
        batches = prefetch(self._made(loaded, gpu), _BATCHES_AHEAD)
        try:
            # "yield from" would close them first, and wait for row groups that nobody wants any more.
            for batch in batches:  # noqa: UP028
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            batches.close()
            pool.shutdown()

    def _made(self, loaded: Iterator[list[_Span]], gpu: int | None) -> Generator[Batch, None, None]:
        if gpu is not None:
            # Each thread begins with the first GPU, and page-locked memory may take some of the GPU whose turn it is.
            torch.cuda.set_device(gpu)
        for spans in loaded:
            yield self._batch(spans)

    def _batch(self, spans: list[_Span]) -> Batch:
        groups = self._groups
        parts = [piece.rows.slice(start, stop) for piece, start, stop in spans] or [groups.no_rows()]
        narrow = np.concatenate([p.narrow for p in parts], axis=1, dtype=np.int64)
        wide = np.concatenate([p.wide for p in parts], axis=1)
        floats = np.concatenate([p.floats for p in parts], axis=1)
        ragged = [_join([p.ragged[i] for p in parts]) for i in range(len(groups.multi))]
        num_narrow, num_wide, num_rows = len(groups.narrow), len(groups.wide), wide.shape[1]
        ids = narrow[:num_narrow]
        if num_wide:
            ids = np.empty((num_narrow + num_wide, num_rows), np.int64)
            ids[groups.narrow], ids[groups.wide] = narrow[:num_narrow], wide[:num_wide]
        if self._limits:
            self._read_as_unseen(ids, ragged)
        dense, labels, mask, weight = np.split(floats, np.cumsum([len(groups.dense), *[len(groups.tasks)] * 2]))
        batch = Batch(
            sparse=self._sparse(ids, ragged),
            dense=self._padded(dense.T),
            labels=self._padded(labels.T),
            mask=self._padded(mask.T),
            scenario=self._padded(narrow[-1] if groups.has_scenario else np.zeros(num_rows, np.int64)),
            weight=self._padded(weight[0] if groups.has_weight else np.ones(num_rows, np.float32)),
            valid=self._padded(np.ones(num_rows, np.bool_)),
            row=self._padded(wide[num_wide], fill=-1),
            group=self._padded(wide[-1] if groups.has_group else np.zeros(num_rows, np.int64)),
        )
        return batch.pin_memory() if self._pinned else batch

    def _read_as_unseen(self, ids: npt.NDArray[np.int64], ragged: list[Ragged]) -> None:
        """Put 0 in place of ids that the model has no rows for. The arrays are the batch's own."""
        columns = dict(zip((f.name for f in self._groups.single), ids, strict=True))
        columns |= {f.name: bags.values for f, bags in zip(self._groups.multi, ragged, strict=True)}
        for name, limit in self._limits.items():
            beyond = columns[name] >= limit
            columns[name][beyond] = 0
            self.beyond[name] = self.beyond.get(name, 0) + int(np.count_nonzero(beyond))

    def _sparse(self, ids: npt.NDArray[np.int64], ragged: list[Ragged]) -> KeyedJaggedTensor:
        num_rows = ids.shape[1]
        if not ragged:
            values = torch.from_numpy(ids.reshape(-1))
            lengths = self._ones
            if num_rows < self._padded_rows:
                lengths = lengths.clone()
                lengths.view(len(self._keys), self._padded_rows)[:, num_rows:] = 0
            return KeyedJaggedTensor(self._keys, values, lengths=lengths, stride=self._padded_rows)
        single, multi = iter(ids), iter(ragged)
        columns = []
        matrix = np.zeros((len(self._keys), self._padded_rows), np.int32)
        for i, feature in enumerate(self._manifest.sparse_features):
            if feature.kind == "sparse":
                columns.append(next(single))
                matrix[i, :num_rows] = 1
            else:
                bags = next(multi)
                columns.append(bags.values)
                matrix[i, :num_rows] = np.diff(bags.offsets)
        values, lengths = torch.from_numpy(np.concatenate(columns)), torch.from_numpy(matrix.reshape(-1))
        return KeyedJaggedTensor(self._keys, values, lengths=lengths, stride=self._padded_rows)

    def _padded(self, values: npt.NDArray, fill: int = 0) -> Tensor:
        out = np.full((self._padded_rows, *values.shape[1:]), fill, values.dtype)
        out[: len(values)] = values
        return torch.from_numpy(out)


class _Piece:
    """Virtual positions [start, stop) of one row group, for one lane; decoded when submitted."""

    def __init__(self, group: int, offset: int, start: int, stop: int) -> None:
        self.group, self.offset, self.start, self.stop = group, offset, start, stop
        self.loading: Future[Rows] | None = None

    @property
    def rows(self) -> Rows:
        """Its rows in the order of training; waits for them."""
        assert self.loading is not None
        return self.loading.result()

    def load(self, order: Order, cache: RowGroupCache) -> Rows:
        """Decode (or take from the cache) and permute."""
        permutation, end = order.row_permutation(self.group), self.offset + self.stop - self.start
        if permutation is None:
            return cache.get(self.group).slice(self.offset, end)
        return cache.get(self.group, permutation[self.offset : end])


_Span = tuple[_Piece, int, int]


def _plan(order: Order, first_batch: int) -> Iterator[tuple[list[_Span], list[_Piece]]]:
    """For each batch: the ranges of pieces that make it, and the pieces it is the first to use, in order of use."""
    held: dict[int, _Piece] = {}
    for batch in range(first_batch, order.num_batches):
        spans: list[_Span] = []
        new: list[_Piece] = []
        for lane, start, stop in order.segments(batch):
            while start < stop:
                piece = held.get(lane)
                if piece is None or start >= piece.stop:
                    index = int(np.searchsorted(order.bounds, start, "right")) - 1
                    end = min(int(order.bounds[index + 1]), int(order.lane_stops[lane]))
                    piece = _Piece(int(order.group_order[index]), start - int(order.bounds[index]), start, end)
                    held[lane] = piece
                    new.append(piece)
                end = min(stop, piece.stop)
                spans.append((piece, start - piece.start, end - piece.start))
                start = end
        yield spans, new


def _loaded(
    plan: Iterator[tuple[list[_Span], list[_Piece]]],
    order: Order,
    cache: RowGroupCache,
    pool: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[list[_Span]]:
    """The spans of each batch, with the next `ahead` pieces of all lanes loading in `pool` before they are used."""
    planned: deque[list[_Span]] = deque()
    unused: deque[_Piece] = deque()

    def load_ahead() -> None:
        for piece in islice(unused, ahead):
            if piece.loading is None:
                piece.loading = pool.submit(piece.load, order, cache)

    while True:
        while len(planned) <= _BATCHES_PLANNED and len(unused) <= ahead:
            step = next(plan, None)
            if step is None:
                break
            planned.append(step[0])
            unused.extend(step[1])
        if not planned:
            return
        spans = planned.popleft()
        for piece, _, _ in spans:
            load_ahead()
            if unused and unused[0] is piece:
                unused.popleft()
                _ = piece.rows  # waiting here keeps the number of row groups in memory bounded
        load_ahead()
        yield spans


def _join(parts: list[Ragged]) -> Ragged:
    values = np.concatenate([p.values[p.offsets[0] : p.offsets[-1]] for p in parts])
    lengths = np.concatenate([np.diff(p.offsets) for p in parts])
    return Ragged(values, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
