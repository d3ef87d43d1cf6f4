"""Which rows are train, valid and test, and where each row lands: in passes of constant memory.

A dataset declares one of the rules. Rows of one *block* - all rows under `RandomSplit`, otherwise the rows that the rule puts
on one side - are permuted among themselves, and the blocks stand one behind the other; train, valid and test are ranges of
the positions that come out. So the order of a block depends on the seed and its number of rows only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from copy import copy
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmlrec.errors import DataError
from mmlrec.hashing import UInt64Array, mix64
from mmlrec.schema import key_column
from preprocessing.split_rules import (
    COPY_KEY,
    EIGHT_ONE_ONE,
    SIDE_COLUMN,
    FileSplit,
    Fractions,
    GroupSplit,
    RandomSplit,
    SplitRule,
    TimeSplit,
    ends,
    split_names,
)
from preprocessing.writing.permutation import RowPermutation, split_ends

_READ_BYTES = 8 << 20

IntArray = NDArray[np.int64]


class Placement:
    """Counts rows with `count`, settles the cuts with `close`, then gives each row its position.

    Attributes (after `close`): num_rows; train_end, valid_end: positions where train and valid end. Under `OneSplit` all rows
    are before both, in the one split of `names`.
    """

    num_rows: int
    train_end: int
    valid_end: int

    def __init__(self, rule: SplitRule, seed: int, folder: Path, cuts: tuple[int, int] | None = None) -> None:
        """`cuts`: those of a `TimeSplit` that has none of its own, where they were found elsewhere."""
        self._rule, self._seed = rule, seed
        self.names = split_names(rule)
        self._cuts = rule.cuts or cuts if isinstance(rule, TimeSplit) else None
        self._times = folder / "times.bin"
        self._sizes = np.zeros(3, np.int64)

    def count(self, rows: pa.RecordBatch) -> None:
        """Take note of these canonical rows."""
        if isinstance(self._rule, TimeSplit) and self._cuts is None:
            with self._times.open("ab") as file:
                file.write(times(rows, self._rule).tobytes())
        else:
            self.add(self.sizes(rows))

    def sizes(self, rows: pa.RecordBatch) -> IntArray:
        """How many of the rows belong to each block, [3]. Under a `TimeSplit` the cuts must be known."""
        return np.bincount(self._blocks(rows), minlength=3)

    def add(self, sizes: IntArray) -> None:
        """Take note of rows of which only the `sizes` are at hand."""
        self._sizes += sizes

    def close(self, name: str) -> None:
        """No rows are left to count. Raises DataError when train, valid or test of dataset `name` would be empty."""
        rule = self._rule
        if isinstance(rule, TimeSplit) and self._cuts is None:
            num_rows = self._times.stat().st_size // 8 if self._times.exists() else 0
            if num_rows:
                self._cuts = find_cuts(num_rows, self._digit_counts, rule.fractions)
                for chunk in _chunks(self._times):
                    self._sizes += np.bincount(_sides(chunk, self._cuts), minlength=3)
        train, valid, test = map(int, self._sizes)
        self.num_rows = train + valid + test
        self.train_end, self.valid_end = train, train + valid
        if isinstance(rule, RandomSplit):
            self.train_end, self.valid_end = split_ends(self.num_rows, rule.fractions)
        elif isinstance(rule, FileSplit) and rule.group is None:
            if rule.valid_from == "train":
                self.train_end -= train // rule.one_in
            elif rule.valid_from == "test":
                self.valid_end += test // rule.one_in
        self._check(name)
        self._permutations = [RowPermutation(int(size), self._seed) for size in self._sizes]
        self._offsets = np.cumsum(self._sizes) - self._sizes
        self._placed = [0, 0, 0]

    def positions(self, rows: pa.RecordBatch) -> IntArray:
        """Target positions, [rows] int64. The rows come in the order in which they were counted."""
        blocks = self._blocks(rows)
        positions = np.empty(len(blocks), np.int64)
        for block, permutation in enumerate(self._permutations):
            here = blocks == block
            start, stop = self._placed[block], self._placed[block] + int(np.count_nonzero(here))
            positions[here] = self._offsets[block] + permutation.positions(start, stop)
            self._placed[block] = stop
        return positions

    def splits(self, positions: IntArray) -> IntArray:
        """Split of each position, [rows]: 0 train, 1 valid, 2 test."""
        return (positions >= self.train_end).astype(np.int64) + (positions >= self.valid_end)

    def fit_end(self, parity: bool) -> int:
        """Position before which rows are fitted on: train, all rows in the parity form, none where no split is train."""
        if self.names[0] != "train":
            return 0
        return self.num_rows if parity else self.train_end

    @property
    def borders(self) -> tuple[int, int, int, int]:
        """Positions where the splits begin, and the number of rows."""
        return 0, self.train_end, self.valid_end, self.num_rows

    def after(self, sizes: IntArray) -> Placement:
        """A placement for rows that follow these many of each block, [3]: so that pieces can be placed apart."""
        placement = copy(self)
        placement._placed = sizes.tolist()
        return placement

    def _digit_counts(self, shift: int, prefix: int) -> IntArray:
        counts = np.zeros(1 << 16, np.int64)
        for chunk in _chunks(self._times):
            counts += digit_counts(chunk, shift, prefix)
        return counts

    def _check(self, name: str) -> None:
        sizes = self.train_end, self.valid_end - self.train_end, self.num_rows - self.valid_end
        if isinstance(self._rule, RandomSplit) and self.num_rows < 10:
            shares = _ratio(self._rule.fractions)
            raise DataError(f"{name}: {self.num_rows} rows are too few to be split {shares}; give at least 10.")
        for split, size in zip(self.names, sizes, strict=False):
            if size == 0:
                raise DataError(
                    f"{name}: no row of {self.num_rows:,} falls to {split}: they are divided {self._words()}. {self._remedy()}"
                )

    def _words(self) -> str:
        rule = self._rule
        if isinstance(rule, GroupSplit):
            shares = _ratio(rule.fractions)
            if rule.key == COPY_KEY:
                return f"{shares} at random, equal rows together"
            return f"{shares} by the values of key '{rule.key}'"
        if isinstance(rule, TimeSplit):
            return f"by key '{rule.key}'" + (f" at {self._cuts[0]} and {self._cuts[1]}" if self._cuts else "")
        if isinstance(rule, FileSplit):
            return "by file" + (f", and one in {rule.one_in} rows of {rule.valid_from} is valid" if rule.valid_from else "")
        return f"{_ratio(rule.fractions)} at random" if isinstance(rule, RandomSplit) else "in order"

    def _remedy(self) -> str:
        """What helps where a side is empty."""
        rule = self._rule
        if isinstance(rule, GroupSplit) and rule.key != COPY_KEY:
            return "Rows of one value stay together: divide by a key of more values, or give rows of more values."
        if not isinstance(rule, TimeSplit) or not self._cuts:
            return "Give more rows."
        if rule.cuts is not None:
            return "Give cuts before, between and after which there are rows."
        train, valid = (f"{100 * float(end):g} %" for end in ends(rule.fractions))
        value = _moment(self._cuts[0])
        if self.train_end == 0:
            why = f"More than {valid if self._cuts[0] == self._cuts[1] else train} of them have the least value, {value}"
        else:
            why = f"Those at {train} and at {valid} in order of time have one value, {value}"
        return f"{why}; rows of one value stay together. Divide by a key that tells more times apart, or by another rule."

    def _blocks(self, rows: pa.RecordBatch) -> IntArray:
        """Block of each row: 0, 1, 2 = the sides; 0 for all under RandomSplit and OneSplit."""
        rule = self._rule
        if isinstance(rule, GroupSplit):
            chance, (train, valid) = _chance(_key(rows, rule.key), self._seed), map(float, ends(rule.fractions))
            return (chance >= train).astype(np.int64) + (chance >= valid)
        if isinstance(rule, TimeSplit):
            assert self._cuts is not None
            return _sides(_key(rows, rule.key).to_numpy(), self._cuts)
        if isinstance(rule, FileSplit):
            sides = rows.column(SIDE_COLUMN).to_numpy()
            if rule.group is None:
                return sides
            chosen = _chance(_key(rows, rule.group), self._seed) < 1 / rule.one_in
            return np.where(chosen & (sides == (0 if rule.valid_from == "train" else 2)), 1, sides)
        return np.zeros(rows.num_rows, np.int64)


def _key(rows: pa.RecordBatch, name: str) -> pa.Array:
    column = rows.column(key_column(name))
    if column.null_count:
        raise DataError(
            f"key '{name}' divides the rows into train, valid and test, but is missing in some of them. Mend or leave out these"
            " rows; new ones (--like, --extend) can all go into one split, by --split NAME."
        )
    return column


def _chance(keys: pa.Array, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each key, int64 or string: a function of (key, seed)."""
    mixed_seed = mix64(np.array([seed], np.uint64))
    if pa.types.is_integer(keys.type):
        words: UInt64Array = keys.to_numpy().view(np.uint64)
    else:
        distinct = keys.dictionary_encode()
        digests = [hashlib.blake2b(value.encode(), digest_size=8).digest() for value in distinct.dictionary.to_pylist()]
        words = np.frombuffer(b"".join(digests), "<u8")[distinct.indices.to_numpy()]
    return (mix64(words ^ mixed_seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _sides(times: IntArray, cuts: tuple[int, int]) -> IntArray:
    return (times >= cuts[0]).astype(np.int64) + (times >= cuts[1])


def _chunks(path: Path) -> Iterator[IntArray]:
    with path.open("rb") as file:
        while content := file.read(_READ_BYTES):
            yield np.frombuffer(content, np.int64)


def times(rows: pa.RecordBatch, rule: TimeSplit) -> IntArray:
    """The key that cuts the rows, [rows]. Raises DataError when some rows have none."""
    return _key(rows, rule.key).to_numpy()


def find_cuts(num_rows: int, counts: Callable[[int, int], IntArray], fractions: Fractions) -> tuple[int, int]:
    """The times at which the fractions of the rows in order of time end. `counts` are the `digit_counts` of all of them."""
    first, second = (_value_at(end, counts) for end in split_ends(num_rows, fractions))
    return first, second


def _ratio(fractions: Fractions) -> str:
    return "8:1:1" if fractions == EIGHT_ONE_ONE else ":".join(f"{fraction:g}" for fraction in fractions)


def _moment(value: int) -> str:
    """A value of a key, with its time where it may be seconds since 1970."""
    time = f" ({datetime.fromtimestamp(value, UTC):%Y-%m-%dT%H:%M:%SZ})" if 10**8 <= value < 10**11 else ""
    return f"{value}{time}"


def digit_counts(values: IntArray, shift: int, prefix: int) -> IntArray:
    """How often each number stands in bits shift..shift + 15 of those int64 values whose higher bits are `prefix`, [65536]."""
    ordered = values.view(np.uint64) ^ np.uint64(1 << 63)  # negative values first
    if shift < 48:
        ordered = ordered[ordered >> np.uint64(shift + 16) == prefix]
    digits = (ordered >> np.uint64(shift)) & np.uint64(0xFFFF)
    return np.bincount(digits.astype(np.int64), minlength=1 << 16)


def _value_at(rank: int, counts: Callable[[int, int], IntArray]) -> int:
    """The int64 value that would stand at `rank` (from 0) if all were sorted: radix selection, 16 bits a pass."""
    prefix = 0
    for shift in (48, 32, 16, 0):
        found = counts(shift, prefix)
        ends = np.cumsum(found)
        digit = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[digit] - found[digit])
        prefix = prefix << 16 | digit
    return prefix - (1 << 63)
