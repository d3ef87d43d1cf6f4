"""One hash for each canonical row, 64 bits, by which equal rows are found.

It is made of the columns of `Dataset.identity`, one after the other. With w the word of a value, M the finaliser `mix64`, K an
odd constant, and all arithmetic modulo 2^64:

    h_c = x xor (x >> 32), x = K (h_(c-1) xor w_c), h_0 = 0, and M of the last one
    w = M(n + sum_j K^j w_j)         of a list of n values, whose numbers are mixed before; null is an empty list

w is the bits of a number, `hash_words` of a text, MISSING of a null. A shift between the products carries high bits down: with
sums of products alone, numbers such as 2^62, or 1.0 as float64, whose low bits are zeros, would share their hashes.

A function of the values alone, so that engines, memory and workers agree. Rows that differ have equal hashes by chance only,
some 2^-64 for each pair, or 2^-62 when they are counted, where two bits tell the split: of datasets of 25 million rows one in
15,000 has such a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from mmlrec.hashing import UInt64Array, mix64
from preprocessing.encoding.value_index import hash_words, spread

#: Word of a missing value.
MISSING = np.uint64(0x6A09E667F3BCC909)
_NO_INTEGER = int(MISSING)  # below 2^63, so an int64, too
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 14  # rows at a time: what is computed of them stays in the cache


def row_hashes(rows: pa.RecordBatch, names: Sequence[str]) -> pa.Array:
    """Hashes of canonical rows, [rows] int64.

    Args:
        rows: in place of texts, which cost most, there may be their words, uint64, where these are at hand.
        names: of the columns that are hashed.
    """
    found = np.empty(rows.num_rows, np.uint64)
    for start in range(0, rows.num_rows, _CHUNK):
        found[start : start + _CHUNK] = _hashes(rows.slice(start, _CHUNK), names)
    return pa.array(found.view(np.int64))


def _hashes(rows: pa.RecordBatch, names: Sequence[str]) -> UInt64Array:
    found = np.zeros(rows.num_rows, np.uint64)
    for name in names:
        found ^= _words(rows.column(name))
        found *= _FACTOR
        found ^= found >> np.uint64(32)
    return mix64(found)


def _words(values: pa.Array) -> UInt64Array:
    """Word of each value, [n]."""
    if pa.types.is_list(values.type):
        return _words_of_lists(values)
    if pa.types.is_uint64(values.type):
        return values.to_numpy()
    if pa.types.is_integer(values.type):
        return values.fill_null(_NO_INTEGER).to_numpy().view(np.uint64)
    if pa.types.is_floating(values.type):
        numbers = values.fill_null(float("nan")).to_numpy()  # which stands for missing alone: nan is a bad row
        return numbers.view(f"u{numbers.itemsize}").astype(np.uint64)
    local = values.dictionary_encode()
    return spread(hash_words(local.dictionary)[0], local, MISSING)


def _words_of_lists(lists: pa.ListArray) -> UInt64Array:
    flat, lengths = lists.flatten(), lists.value_lengths().fill_null(0).to_numpy().astype(np.int64)
    words = _words(flat)
    if not (pa.types.is_string(flat.type) or pa.types.is_uint64(flat.type)):  # texts are mixed already
        words = mix64(words)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    powers, inverses = _powers(len(words).bit_length())
    sums = np.zeros(len(words) + 1, np.uint64)  # over all lists: K^(first + j) w_j
    np.cumsum(words * powers[: len(words)], out=sums[1:])
    return mix64((sums[ends] - sums[starts]) * inverses[starts] + lengths.view(np.uint64))


@lru_cache(maxsize=2)
def _powers(bits: int) -> tuple[UInt64Array, UInt64Array]:
    """K, K^2, ... and their inverses, 2^bits of each."""
    bases = int(_FACTOR), pow(int(_FACTOR), -1, 1 << 64)
    powers, inverses = (np.multiply.accumulate(np.full(1 << bits, base, np.uint64)) for base in bases)
    return powers, inverses
