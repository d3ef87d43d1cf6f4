"""Sums of float64 numbers without rounding: they hang neither on the order of the numbers nor on who adds up which."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def exact_sum(numbers: NDArray[np.float64]) -> Fraction:
    """The sum of finite float64 numbers, [n], without any rounding.

    Rump, Ogita and Oishi, "Accurate floating-point summation part I", 2008: beside a power of two that is larger than all
    numbers together the leading bits of each are rounded off. Such bits add up without error; the rest is summed likewise.
    """
    total = Fraction(0)
    while len(numbers):
        _, exponent = np.frexp(np.abs(numbers).max())
        large = np.ldexp(1.0, int(exponent) + len(numbers).bit_length() + 1)
        leading = (numbers + large) - large
        total += Fraction(float(leading.sum()))
        numbers = numbers - leading
        numbers = numbers[numbers != 0]
    return total
