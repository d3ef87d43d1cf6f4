"""What is counted of numbers while a split is written. Summaries of pieces are joined in the order of rows.

A split is summed up row group by row group, so the last digit depends on its rows alone, not on how they were handed over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EDGE = 0.01  # of the range


@dataclass(frozen=True)
class Moments:
    """Of some numbers: how many, their mean, the sum of squares about it, the least and the greatest.

    Joined as in Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", The American Statistician 37, 1983.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    @classmethod
    def of(cls, values: NDArray[np.floating[Any]]) -> Moments:
        """Of numbers, [n], none missing."""
        if not len(values):
            return cls()
        numbers = values.astype(np.float64)
        mean = float(numbers.mean())
        squares = float(np.square(numbers - mean).sum())
        return cls(len(numbers), mean, squares, float(numbers.min()), float(numbers.max()))

    def __add__(self, other: Moments) -> Moments:
        """Of both together."""
        count = self.count + other.count
        if not count:
            return self
        share, distance = other.count / count, other.mean - self.mean
        squares = self.squares + other.squares + distance**2 * self.count * share
        mean = self.mean + distance * share
        return Moments(count, mean, squares, min(self.least, other.least), max(self.greatest, other.greatest))

    def statistics(self) -> dict[str, float | None]:
        """For the manifest: mean, deviation (of all these numbers, not of a sample), least, greatest; None of no numbers."""
        if not self.count:
            return dict.fromkeys(("mean", "deviation", "least", "greatest"))
        deviation = math.sqrt(self.squares / self.count)
        return {"mean": self.mean, "deviation": deviation, "least": self.least, "greatest": self.greatest}


@dataclass(frozen=True)
class Squeeze:
    """How numbers lie in [0, 1], the range of their least and greatest value: all at one end where one value is far off.

    Attributes:
        above: numbers above 0; of these, low: those in the lowest hundredth.
        below: numbers below 1; of these, high: those in the highest hundredth.
    """

    above: int = 0
    low: int = 0
    below: int = 0
    high: int = 0

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> Squeeze:
        """Of numbers in [0, 1], [n]."""
        above, below = values > 0, values < 1
        low, high = above & (values <= _EDGE), below & (values >= 1 - _EDGE)
        return cls(*(int(np.count_nonzero(chosen)) for chosen in (above, low, below, high)))

    def __add__(self, other: Squeeze) -> Squeeze:
        """Of both together."""
        return Squeeze(self.above + other.above, self.low + other.low, self.below + other.below, self.high + other.high)

    def statistics(self) -> list[int]:
        """For the manifest."""
        return [self.above, self.low, self.below, self.high]
