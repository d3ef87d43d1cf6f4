"""The passes over the rows, each on all cores and in bounded memory.

1. `read`: raw files -> canonical rows, coded (coder.py), spilled to disk;
2. `count`: each row gets its position by the split rule and a seeded permutation; train rows are counted for vocabularies;
3. `distribute`: codes become ids; rows go into buckets by position;
4. `write`: part by part, bucket by bucket, in the order of positions.

What is written depends neither on the number of workers nor on the memory: codes, which do, are gone when ids are given.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from mmlrec.hashing import UInt64Array
from preprocessing.dataset import Dataset
from preprocessing.encoding.against_train import AgainstTrain
from preprocessing.encoding.coder import Coded, Coder
from preprocessing.encoding.encoder import Encoder, check_canonical, encoded_schema
from preprocessing.encoding.groups import BoundedGroups
from preprocessing.encoding.missing import MissingCounter
from preprocessing.progress import progress
from preprocessing.reading import raw_files
from preprocessing.reading.raw_files import RawFolder
from preprocessing.rows.batch_file import BatchFile
from preprocessing.split_rules import COPY_COLUMN
from preprocessing.workers import in_order
from preprocessing.writing import shuffle
from preprocessing.writing.copies import CopyCounter, later_copies, marked
from preprocessing.writing.parts import NUM_LANES, SplitWriter, Written, join_splits, part_size, row_group_size
from preprocessing.writing.shuffle import BucketPlan, BucketSort
from preprocessing.writing.splits import IntArray, Placement


@dataclass(frozen=True)
class Memory:
    """Shares of the memory that a run may take; what is left over is Python's, Arrow's and numpy's.

    Attributes:
        num_bytes: of the whole process.
        workers: threads.
    """

    num_bytes: int
    workers: int

    @property
    def dictionary_bytes(self) -> int:
        """Of all dictionaries of raw values."""
        return self.num_bytes // 4

    @property
    def unit_bytes(self) -> int:
        """Of the rows that one thread works on: about four copies of them, and as many units waiting as there are workers."""
        return self.num_bytes // 4 // (4 * (self.workers + 2))

    @property
    def piece_bytes(self) -> int:
        """Of the text that one thread parses; rows take up to eight times as much on their way."""
        return min(raw_files.PIECE_BYTES, max(self.num_bytes // 4 // (8 * 2 * (self.workers + 2)), 1 << 16))

    @property
    def copy_bytes(self) -> int:
        """Of the hashes of rows that are sorted at a time, of which there are about three copies."""
        return max(self.num_bytes // 64, 1 << 16)


@dataclass(frozen=True)
class _Block:
    """Where coded rows lie in the spill."""

    offset: int
    num_rows: int
    generations: tuple[int, ...]


@dataclass(frozen=True)
class _Unit:
    """Blocks that are worked on together, and the number of rows before them."""

    blocks: list[_Block]
    start: int


@dataclass(frozen=True)
class _PlacedBlock:
    """Coded rows and where they go: `positions`, `marks` of their hashes, [rows]; and their missing values, [features, 3]."""

    coded: Coded
    positions: IntArray
    marks: UInt64Array
    missing: IntArray


class Passes:
    """The passes over one dataset's rows. Call them in their order."""

    def __init__(
        self, dataset: Dataset, raw: RawFolder, folder: Path, encoder: Encoder, seed: int, parity: bool, memory: Memory
    ) -> None:
        self._dataset, self._raw, self._folder, self._parity, self._memory = dataset, raw, folder, parity, memory
        self._given = encoder.given
        self._scratch = folder / "scratch"
        self._scratch.mkdir()
        self._placement = Placement(dataset.placing, seed, self._scratch)
        self._coder = Coder(dataset, encoder, self._scratch / "coder", memory.dictionary_bytes)
        self._groups = BoundedGroups(dataset, self._scratch, memory.dictionary_bytes // 8)
        self._spill = BatchFile(self._scratch / "coded.arrow", self._coder.schema)
        self._blocks: list[_Block] = []
        self._positions = self._scratch / "positions.bin"
        self._schema = encoded_schema(dataset)
        self._num_dropped = 0

    def read(self) -> None:
        """Raw files to coded rows on disk."""
        raw = self._raw
        raw.scratch = self._scratch / "raw"
        raw.scratch.mkdir()
        raw.piece_bytes = self._memory.piece_bytes

        def code(batch: pa.RecordBatch) -> tuple[Coded, pa.Buffer]:
            check_canonical(self._dataset, batch)
            coded = self._coder.code(batch)
            self._groups.add(batch)
            return coded, coded.rows.serialize()

        drop = self._dataset.duplicates == "drop"
        with progress(f"{self._dataset.name}: read") as done:
            for coded, serialised in in_order(code, self._dataset.batches(raw), raw.workers):
                if not drop:
                    self._placement.count(coded.rows)
                self._blocks.append(_Block(self._spill.append(serialised), coded.rows.num_rows, coded.generations))
                done.update(coded.rows.num_rows)
        shutil.rmtree(raw.scratch)
        if drop and self._blocks:
            self._drop_copies()
        if not any(block.num_rows for block in self._blocks):
            raise raw.nothing()
        self._placement.close(self._dataset.name)

    def _drop_copies(self) -> None:
        """Leave out the rows that are equal to an earlier one; count the others."""
        spill, blocks = self._spill, self._blocks
        num_rows = sum(block.num_rows for block in blocks)
        hashes = (spill.at(block.offset).column(COPY_COLUMN).to_numpy() for block in blocks)
        later = later_copies(hashes, num_rows, self._scratch / "later", self._memory.copy_bytes)
        self._num_dropped = int(np.count_nonzero(later))
        self._spill, self._blocks = BatchFile(self._scratch / "kept.arrow", self._coder.schema), []
        ends = np.cumsum([block.num_rows for block in blocks])
        for block, end in zip(blocks, ends, strict=True):
            rows = spill.at(block.offset).filter(pa.array(~later[end - block.num_rows : end]))
            if rows.num_rows:
                self._placement.count(rows)
                self._blocks.append(_Block(self._spill.add(rows), rows.num_rows, block.generations))
        spill.remove()

    def count(self) -> dict[str, Any]:
        """Positions, and the vocabularies of the train rows; gives further statistics."""
        placement = self._placement
        fit_end = placement.fit_end(self._parity)
        copies = CopyCounter(self._scratch / "copies", placement.num_rows, self._memory.copy_bytes)
        missing = MissingCounter(self._dataset.features, placement.names)

        def load(unit: _Unit) -> tuple[list[Coded], IntArray]:
            coded = self._load(unit)
            return coded, sum((placement.sizes(block.rows) for block in coded), np.zeros(3, np.int64))

        def with_places() -> Iterator[tuple[list[Coded], Placement]]:
            before = np.zeros(3, np.int64)
            for coded, sizes in in_order(load, self._units(), self._raw.workers):
                yield coded, placement.after(before)
                before = before + sizes

        def place(item: tuple[list[Coded], Placement]) -> list[_PlacedBlock]:
            coded, here = item
            found = []
            for block in coded:
                positions = here.positions(block.rows)
                splits = placement.splits(positions)
                marks = marked(block.rows.column(COPY_COLUMN).to_numpy(), splits)
                found.append(_PlacedBlock(block, positions, marks, missing.counts(block.rows, splits)))
            return found

        self._coder.begin()
        with progress(f"{self._dataset.name}: count values", placement.num_rows) as done, self._positions.open("wb") as file:
            for blocks in in_order(place, with_places(), self._raw.workers):
                for block in blocks:
                    self._coder.count(block.coded, block.positions < fit_end)
                    file.write(block.positions.data)
                    copies.add(block.marks)
                    missing.add(block.missing)
                    done.update(block.coded.rows.num_rows)
            with ThreadPoolExecutor(1) as beside:  # both leave cores idle
                counted = beside.submit(copies.count)
                self._coder.freeze(self._folder / "vocab", self._raw.workers)
        duplicates = counted.result().statistics(self._dataset.duplicates, self._num_dropped)
        return self._groups.statistics() | missing.statistics() | {"duplicates": duplicates}

    def write(self) -> tuple[dict[str, Written], dict[str, Any]]:
        """Rows to the parts of the splits; and statistics of how they differ from the rows whose fitted parts were given."""
        group_rows, names = row_group_size(self._placement.train_end, NUM_LANES), self._placement.names
        sorter, plan, statistics = self._distribute(group_rows)
        dataset, lock = self._dataset, Lock()

        scaled = dataset.scaled

        def write_part(part: tuple[int, int, range]) -> tuple[int, Written]:
            split, number, buckets = part
            writer = SplitWriter(self._folder, names[split], group_rows, dataset.tasks, dataset.scenario, number, scaled)
            for bucket in buckets:
                rows = sorter.read(bucket)
                writer.write(rows.cast(self._schema))
                with lock:
                    done.update(rows.num_rows)
            return split, writer.close()

        found: list[list[Written]] = [[] for _ in names]
        with progress(f"{dataset.name}: write", self._placement.num_rows) as done:
            for split, part in in_order(write_part, plan.parts, self._raw.workers):
                found[split].append(part)
        shutil.rmtree(self._scratch)
        return {name: join_splits(parts) for name, parts in zip(names, found, strict=True)}, statistics

    def _distribute(self, group_rows: int) -> tuple[BucketSort, BucketPlan, dict[str, Any]]:
        placement, part_rows = self._placement, part_size(group_rows)
        bucket_rows = min(max(shuffle.BUCKET_ROWS, placement.num_rows // 64), self._unit_rows(), part_rows)
        plan = BucketPlan(placement.borders, part_rows, bucket_rows)
        sorter: BucketSort | None = None
        lock = Lock()
        against = AgainstTrain(self._dataset.features, placement.names, self._given) if self._given else None

        def scatter(unit: _Unit) -> tuple[int, list[tuple[int, pa.Buffer]]]:
            nonlocal sorter
            blocks = self._load(unit)
            batches = [self._coder.encode(block) for block in blocks]
            encoded = pa.concat_batches(batches)
            with lock:
                sorter = sorter or BucketSort(self._scratch, encoded.schema, plan)
            positions = np.fromfile(self._positions, np.int64, encoded.num_rows, offset=8 * unit.start)
            if against is not None:
                counted, start = against.blank(), 0
                for block, batch in zip(blocks, batches, strict=True):
                    splits = placement.splits(positions[start : start + batch.num_rows])
                    counted.add(block.rows, batch, splits)
                    start += batch.num_rows
                with lock:
                    against.merge(counted)
            return encoded.num_rows, sorter.scatter(encoded, positions)

        with progress(f"{self._dataset.name}: shuffle", placement.num_rows) as done:
            for num_rows, scattered in in_order(scatter, self._units(), self._raw.workers):
                assert sorter is not None
                sorter.append(scattered)
                done.update(num_rows)
        assert sorter is not None
        self._spill.remove()
        return sorter, plan, against.statistics() if against else {}

    def _unit_rows(self) -> int:
        row_bytes = max(self._spill.num_bytes // self._placement.num_rows, 8 * len(self._schema))
        return max(self._memory.unit_bytes // row_bytes, 1 << 10)

    def _units(self) -> Iterator[_Unit]:
        limit, waiting, start, num_rows = self._unit_rows(), [], 0, 0
        for block in self._blocks:
            waiting.append(block)
            num_rows += block.num_rows
            if num_rows >= limit:
                yield _Unit(waiting, start)
                waiting, start, num_rows = [], start + num_rows, 0
        if waiting:
            yield _Unit(waiting, start)

    def _load(self, unit: _Unit) -> list[Coded]:
        return [Coded(self._spill.at(block.offset), block.generations) for block in unit.blocks]
