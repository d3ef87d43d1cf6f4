"""Rows without a value of a feature. In the folder they cannot be told from rare or unseen values, which are id 0, too."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from preprocessing.dataset import Column

IntArray = NDArray[np.int64]


class MissingCounter:
    """How many rows of each split have no value of each feature."""

    def __init__(self, features: tuple[Column, ...], splits: tuple[str, ...]) -> None:
        self._names, self._splits = [feature.name for feature in features], splits
        self._counts = np.zeros((len(features), len(splits)), np.int64)

    def counts(self, rows: pa.RecordBatch, splits: IntArray) -> IntArray:
        """Of some rows, canonical or with codes, [features, splits]; `splits` are [rows], the place of each row's."""
        counts = np.zeros_like(self._counts)
        for index, name in enumerate(self._names):
            without = _without(rows.column(name))
            if without.any():
                counts[index] = np.bincount(splits[without], minlength=len(self._splits))
        return counts

    def add(self, counts: IntArray) -> None:
        """Take note of what `counts` gave."""
        self._counts += counts

    def merge(self, other: MissingCounter) -> None:
        """Add what another one has counted."""
        self.add(other._counts)

    def statistics(self) -> dict[str, dict[str, dict[str, int]]]:
        """For the manifest: feature -> split -> rows."""
        rows = [dict(zip(self._splits, counts, strict=True)) for counts in self._counts.tolist()]
        return {"missing": dict(zip(self._names, rows, strict=True))}


def _without(values: pa.Array) -> NDArray[np.bool_]:
    """[rows], where there is no value: null, code -1, or a list in which there is none."""
    if pa.types.is_list(values.type):
        lengths, absent = values.value_lengths().fill_null(0).to_numpy(), _without(values.flatten())
        if absent.any():
            present = np.repeat(np.arange(len(lengths)), lengths)[~absent]
            lengths = np.bincount(present, minlength=len(lengths))
        return lengths == 0
    if pa.types.is_int32(values.type):  # codes; raw integers are int64
        return values.to_numpy() < 0
    return values.is_null().to_numpy(zero_copy_only=False)
