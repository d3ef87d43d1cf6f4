"""Canonical values to numbers and ids, column by column: all that is applied once it is fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.errors import DataError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


def valid(values: pa.Array) -> NDArray[np.bool_]:
    """[n], where there is a value."""
    return values.is_valid().to_numpy(zero_copy_only=False)


def scaled(values: pa.Array, borders: Sequence[float] | None) -> FloatArray:
    """Min-max scaled and clipped to [0, 1], [n]; null becomes 0, and so does all where there are no borders.

    Args:
        borders: least and greatest train value; None where they are equal or there is none.
    """
    if borders is None:
        return np.zeros(len(values), np.float32)
    low, high = borders
    numbers = values.cast(pa.float64()).fill_null(low).to_numpy(zero_copy_only=False)
    return np.clip((numbers - low) / (high - low), 0, 1).astype(np.float32)


def filled(values: pa.Array, fill: float | None) -> pa.Array:
    """The numbers with what a missing one becomes."""
    return values.fill_null(pa.scalar(fill, values.type)) if fill is not None and values.null_count else values


def quantile_ids(values: pa.Array, borders: FloatArray) -> IntArray:
    """1 + the number of borders that are not above a number, float32; 0 for null."""
    ids = np.searchsorted(borders, values.fill_null(0).to_numpy(zero_copy_only=False), side="right") + 1
    return np.where(valid(values), ids, 0)


def given_ids(values: pa.Array, most: int, feature: str) -> IntArray:
    """Ids that come as such; 0 for null. Raises DataError where one is not among 0..most."""
    ids = values.fill_null(0)
    if len(ids) and not 0 <= pc.min(ids).as_py() <= pc.max(ids).as_py() <= most:
        raise DataError(f"feature '{feature}': ids must lie in 0..{most}; mend what gives them.")
    return ids.to_numpy()


def list_ids(values: pa.Array, ids_of: Callable[[pa.Array], IntArray], ids_a_value: int = 1) -> tuple[IntArray, IntArray]:
    """Ids of all elements of lists, [n], and where the rows begin, [rows + 1]; null is an empty list.

    Args:
        ids_of: gives the ids of some values, all of the first one before those of the next.
        ids_a_value: how many there are for each.
    """
    lists = values.fill_null([]) if values.null_count else values
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(lists.value_lengths().to_numpy(), out=offsets[1:])
    return ids_of(lists.flatten()), offsets * ids_a_value
