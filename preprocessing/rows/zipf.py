"""Zipf-distributed ids out of any number, in constant memory and without rejection."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmlrec.errors import ConfigError

_HEAD = 4096
_GUIDE = 1 << 16


class Zipf:
    """P(k) ~ k^-s for k = 1..n.

    The first 4,096 ids have their exact probability. The tail is drawn by inversion of the integral of x^-s from k - 1/2 to
    k + 1/2, which differs from k^-s by s(s+1)/(24 k^2) of it: less than 1e-8 for s = 1.
    """

    def __init__(self, num_ids: int, exponent: float) -> None:
        if not 0 <= exponent <= 10:
            raise ConfigError(f"--zipf must lie in 0..10, found {exponent}.")
        if num_ids >= 2**53:
            raise ConfigError(f"--num-ids must stay below 2^53, found {num_ids}.")
        self._n, self._s = num_ids, exponent
        self._num_head = min(num_ids, _HEAD)
        head = np.cumsum(np.arange(1, self._num_head + 1, dtype=np.float64) ** -exponent)
        self._edge = self._num_head + 0.5
        self._mass = head[-1] + self._integral(num_ids + 0.5)
        self._ends = head / self._mass
        # first id to try for each of 65,536 equal steps of u: spares most of the binary search
        self._guide = np.searchsorted(self._ends, np.arange(_GUIDE) / _GUIDE, side="right").astype(np.int64)
        self._sure = np.append(self._guide[1:], self._num_head) == self._guide

    def draw(self, random: np.random.Generator, size: int) -> NDArray[np.int64]:
        """[size] int64 in 1..n."""
        u = random.random(size)
        step = (u * _GUIDE).astype(np.int64)
        ids = self._guide[step]
        unsure = np.flatnonzero(~self._sure[step])
        ids[unsure] = np.searchsorted(self._ends, u[unsure], side="right")
        tail = np.flatnonzero(ids == self._num_head)
        if tail.size:
            x = self._inverse((u[tail] - self._ends[-1]) * self._mass)
            ids[tail] = np.clip(np.rint(x).astype(np.int64), min(self._num_head + 1, self._n), self._n) - 1
        return ids + 1

    def _integral(self, x: float) -> float:
        """Of t^-s from the head's edge to x."""
        power, ratio = 1 - self._s, np.log(x / self._edge)
        return float(ratio if power == 0 else self._edge**power * np.expm1(power * ratio) / power)

    def _inverse(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        power = 1 - self._s
        return self._edge * np.exp(y if power == 0 else np.log1p(power * y / self._edge**power) / power)
