"""A seeded permutation of row numbers in constant memory and the exact split by fractions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmlrec.hashing import UInt64Array, mix64
from preprocessing.split_rules import EIGHT_ONE_ONE, Fractions, ends

_ROUNDS = 8  # even, so that the two halves end with the widths they began with


def split_ends(num_rows: int, fractions: Fractions = EIGHT_ONE_ONE) -> tuple[int, int]:
    """Positions where train and valid end: floor(.8 N) and floor(.9 N), or so by other fractions.

    1,000,209 rows give 800,167 / 100,021 / 100,021.
    """
    train, valid = ends(fractions)
    return int(train * num_rows), int(valid * num_rows)


class RowPermutation:
    """A bijection of 0..N-1: a Feistel network over the smallest power of two >= N, walked until it lands below N.

    Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 4 (generalised Feistel) and
    section 3 (cycle walking). Depends on (num_rows, seed) only, never on the content of the rows.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self._num_rows = num_rows
        bits = max((num_rows - 1).bit_length(), 2)
        self._left, self._right = bits // 2, bits - bits // 2
        self._keys = mix64(np.arange(_ROUNDS, dtype=np.uint64) + mix64(np.array([seed], dtype=np.uint64)))

    def positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Target positions of rows start..stop-1, [stop - start] int64."""
        out = self._network(np.arange(start, stop, dtype=np.uint64))
        outside = np.flatnonzero(out >= self._num_rows)
        while outside.size:
            out[outside] = self._network(out[outside])
            outside = outside[out[outside] >= self._num_rows]
        return out.astype(np.int64)

    def _network(self, values: UInt64Array) -> UInt64Array:
        left_bits, right_bits = self._left, self._right
        left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
        for key in self._keys:
            left, right = right, left ^ (mix64(right ^ key) >> np.uint64(64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right
