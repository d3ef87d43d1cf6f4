"""Codes 0, 1, 2, ... for distinct raw values: a hash table that lives as long as the data is read.

Arrow's own hash tables are built anew at each call, so their cost is that of the whole vocabulary; this one costs what is new.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.hashing import UInt64Array, mix64

Codes = NDArray[np.int32]
Hashes = tuple[UInt64Array, NDArray[np.uint8]]
T = TypeVar("T", bound=np.generic)

_FREE = -1
_WORD_BYTES = 64  # of a string go through numpy, the rest one by one
_MERGED = 8  # parts become one


def hash_words(values: pa.Array) -> Hashes:
    """Hash of each value, 64 bits, and its length, at most 255; values are int64 or string, not null.

    Different integers have different hashes, and so have different strings of one length up to 8 bytes.
    """
    if pa.types.is_integer(values.type):
        return mix64(values.to_numpy().view(np.uint64)), np.zeros(len(values), np.uint8)
    _, offset_buffer, data_buffer = values.buffers()
    kind = np.int64 if pa.types.is_large_string(values.type) else np.int32
    offsets = np.frombuffer(offset_buffer, kind)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    lengths = np.diff(offsets)
    data = np.zeros(int(offsets[-1] - offsets[0]) + 8, np.uint8)  # the last word may reach beyond the last string
    if len(data) > 8:
        data[:-8] = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]]
    starts = offsets[:-1] - offsets[0]
    words_at = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))
    found = mix64(lengths.astype(np.uint64))
    for begin in range(0, min(int(lengths.max(initial=0)), _WORD_BYTES), 8):
        rows = np.flatnonzero(lengths > begin)
        beyond = np.maximum(8 - (lengths[rows] - begin), 0).astype(np.uint64) * np.uint64(8)
        found[rows] = mix64(found[rows] ^ (words_at[starts[rows] + begin] << beyond))
    for row in np.flatnonzero(lengths > _WORD_BYTES):
        tail = data[starts[row] + _WORD_BYTES : starts[row] + lengths[row]]
        found[row] ^= np.uint64(int.from_bytes(hashlib.blake2b(tail.tobytes(), digest_size=8).digest(), "little"))
    return found, np.minimum(lengths, 255).astype(np.uint8)


def spread(of_entries: NDArray[T], local: pa.DictionaryArray, missing: T) -> NDArray[T]:
    """From what belongs to the entries of a dictionary to what belongs to its values, [n]; `missing` for a null."""
    indices = local.indices.fill_null(len(of_entries)) if local.null_count else local.indices
    return np.append(of_entries, missing)[indices.to_numpy()]


class ValueIndex:
    """Gives each distinct value the next code when it first comes. Not for several threads at once.

    Open addressing with linear probing; whole arrays are probed at a time. A slot holds a code, an array beside it the hash of
    the value, so that strings are compared only where their hashes are equal, and only those that differ from their hash.
    """

    def __init__(self, raw_type: pa.DataType) -> None:
        self._integer = pa.types.is_integer(raw_type)
        self._stored = raw_type if self._integer else pa.large_string()  # plain strings end at 2 GiB
        self._slots = np.full(1 << 8, _FREE, np.int32)
        self._words = np.empty(1 << 7, np.uint64)
        self._lengths = np.empty(1 << 7, np.uint8)
        self._parts: list[pa.Array] = []  # the values, in the order of their codes
        self._ends: list[int] = []
        self._levels: list[int] = []  # how often a part was merged from parts
        self._collided: dict[str, int] = {}  # values whose hash another value has

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        arrays = [self._slots, self._words, self._lengths, *self._parts]
        return sum(array.nbytes for array in arrays)

    def codes(self, values: pa.Array, hashes: Hashes | None = None) -> Codes:
        """Codes of values, [n] int32. The values are distinct and not null; new ones get the next codes.

        Args:
            hashes: their `hash_words`, where they are at hand.
        """
        self._reserve(len(values))
        words, lengths = hashes or hash_words(values)
        found, newcomers = self._probe(words, len(self))
        if len(newcomers):
            self._lengths[found[newcomers]] = lengths[newcomers]
            self._append(values.take(pa.array(newcomers)))
        if not self._integer:
            doubtful = np.flatnonzero((self._lengths[found] != lengths) | (lengths > 8))
            if len(doubtful):
                self._tell_collisions_apart(values, words, found, doubtful)
        return found

    def finish(self) -> None:
        """Free what finds codes; the values stay."""
        self._slots, self._words, self._lengths = self._slots[:0].copy(), self._words[:0].copy(), self._lengths[:0].copy()

    def values(self) -> pa.ChunkedArray:
        """The values in the order of their codes; strings as large_string."""
        return pa.chunked_array(self._parts, self._stored)

    def _probe(self, words: UInt64Array, next_code: int) -> tuple[Codes, NDArray[np.int64]]:
        """Code of each word, and the rows that are new, in the order of their codes."""
        slots, mask = self._slots, np.uint64(len(self._slots) - 1)
        found = np.empty(len(words), np.int32)
        rows = np.arange(len(words))
        at = (words & mask).astype(np.int64)
        newcomers = []
        while len(rows):
            codes = slots[at]
            same = self._words[codes] == words[rows]
            free = np.flatnonzero(codes == _FREE)
            same[free] = False
            found[rows[same]] = codes[same]
            moving = ~same
            if len(free):
                # Several newcomers may want one slot: the last to write has it, the others look at it again.
                slots[at[free]] = rows[free]
                won = free[slots[at[free]] == rows[free]]
                new = np.arange(next_code, next_code + len(won), dtype=np.int32)
                next_code += len(won)
                slots[at[won]] = found[rows[won]] = new
                self._words[new] = words[rows[won]]
                newcomers.append(rows[won])
                at[free] -= 1
                moving[won] = False
            rows = rows[moving]
            at = (at[moving] + 1) & int(mask)
        return found, np.concatenate(newcomers) if newcomers else np.empty(0, np.int64)

    def _tell_collisions_apart(self, values: pa.Array, words: UInt64Array, found: Codes, rows: NDArray[np.int64]) -> None:
        """Compare the strings themselves of some rows with those that they were taken for. Mends `found`."""
        same = np.ones(len(rows), bool)
        for part, end in zip(self._parts, self._ends, strict=True):
            here = np.flatnonzero((found[rows] < end) & (found[rows] >= end - len(part)))
            stored = part.take(pa.array(found[rows[here]] - (end - len(part))))
            given = values.take(pa.array(rows[here])).cast(self._stored)
            same[here] = pc.equal(stored, given).to_numpy(zero_copy_only=False)
        for row in rows[~same]:
            value = values[row].as_py()
            if value not in self._collided:
                code = self._collided[value] = len(self)
                self._words[code] = words[row]
                self._lengths[code] = min(len(value.encode()), 255)
                self._append(pa.array([value], self._stored))
            found[row] = self._collided[value]

    def _append(self, values: pa.Array) -> None:
        self._parts.append(values.cast(self._stored))
        self._ends.append(len(self) + len(values))
        self._levels.append(0)
        while len(self._levels) >= _MERGED and self._levels[-_MERGED] == self._levels[-1]:
            self._parts[-_MERGED:] = [pa.concat_arrays(self._parts[-_MERGED:])]
            self._ends[-_MERGED:] = [self._ends[-1]]
            self._levels[-_MERGED:] = [self._levels[-1] + 1]

    def _reserve(self, num_new: int) -> None:
        """Room for so many new values with at most half of the slots taken."""
        needed = len(self) + num_new
        if needed > len(self._words):
            size = max(needed, len(self._words) * 3 // 2)
            self._words = _longer(self._words, size)
            self._lengths = _longer(self._lengths, size)
        if 2 * needed > len(self._slots):
            codes = self._slots[self._slots != _FREE]  # in the order of slots, which is nearly that of the new ones
            self._slots = np.full(1 << (2 * needed - 1).bit_length(), _FREE, np.int32)
            self._insert(codes)

    def _insert(self, codes: Codes) -> None:
        """Put codes with distinct hashes into free slots."""
        mask = len(self._slots) - 1
        at = (self._words[codes] & np.uint64(mask)).astype(np.int64)
        while len(codes):
            free = self._slots[at] == _FREE
            self._slots[at[free]] = codes[free]
            moving = self._slots[at] != codes
            codes, at = codes[moving], (at[moving] + 1) & mask


def _longer(array: NDArray[T], size: int) -> NDArray[T]:
    longer = np.empty(size, array.dtype)
    longer[: len(array)] = array
    return longer
