"""How rows that came later differ from the train rows whose fitted parts were given: unseen ids, numbers outside the range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from preprocessing.dataset import Column
from preprocessing.encoding.fitted import Fitted

IntArray = NDArray[np.int64]
_COUNTS = ("rows", "missing", "values", "unseen", "rows_with_unseen", "below", "above")


class AgainstTrain:
    """Counts the values of each feature in each split: all, those that the given parts do not know, the least and greatest."""

    def __init__(self, features: tuple[Column, ...], splits: tuple[str, ...], given: Fitted) -> None:
        self._features, self._splits, self._given = features, splits, given
        self._known = {table.name: table.num_rows for table in given.manifest.tables}
        self._counts = {what: np.zeros((len(features), len(splits)), np.int64) for what in _COUNTS}
        self._least = np.full((len(features), len(splits)), np.inf)
        self._greatest = -self._least

    def add(self, rows: pa.RecordBatch, encoded: pa.RecordBatch, splits: IntArray) -> None:
        """Take note of some rows.

        Args:
            rows: canonical, or with codes in place of what has a vocabulary.
            encoded: the same rows. Ids that the given vocabularies lack may be 0, or beyond them.
            splits: the place of each row's split, [rows].
        """
        for index, feature in enumerate(self._features):
            column = rows.column(feature.name)
            values, row_of = column, np.arange(rows.num_rows)
            if feature.kind == "multi":
                values, row_of = column.flatten(), np.repeat(row_of, column.value_lengths().fill_null(0).to_numpy())
            valid = _valid(values)
            filled = np.zeros(rows.num_rows, bool)
            filled[row_of[valid]] = True
            found = {"rows": splits, "missing": splits[~filled], "values": splits[row_of[valid]]}
            if feature.has_vocabulary:
                column = encoded.column(feature.name)
                ids = (column.flatten() if feature.kind == "multi" else column).to_numpy()
                unseen = row_of[valid & ((ids == 0) | (ids >= self._known[str(feature.table)]))]
                found |= {"unseen": splits[unseen], "rows_with_unseen": splits[np.unique(unseen)]}
            elif pa.types.is_floating(feature.raw_type):
                numbers = values.drop_null().cast(pa.float64()).to_numpy()
                np.minimum.at(self._least[index], splits[filled], numbers)
                np.maximum.at(self._greatest[index], splits[filled], numbers)
                if feature.scaled and (seen := self._given.ranges[feature.name]) is not None:
                    low, high = seen
                    found |= {"below": splits[filled][numbers < low], "above": splits[filled][numbers > high]}
            for what, of_split in found.items():
                self._counts[what][index] += np.bincount(of_split, minlength=len(self._splits))

    def blank(self) -> AgainstTrain:
        """One that has counted nothing yet, for some of the rows."""
        return AgainstTrain(self._features, self._splits, self._given)

    def merge(self, other: AgainstTrain) -> None:
        """Add what another one has counted."""
        for what, counts in self._counts.items():
            counts += other._counts[what]
        self._least = np.minimum(self._least, other._least)
        self._greatest = np.maximum(self._greatest, other._greatest)

    def statistics(self) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        """For the manifest: feature -> split -> what was counted, and what the train rows were like."""
        return {
            "against_train": {
                feature.name: {split: self._of(index, feature, place) for place, split in enumerate(self._splits)}
                for index, feature in enumerate(self._features)
            }
        }

    def _of(self, index: int, feature: Column, split: int) -> dict[str, Any]:
        counts = {what: int(of_features[index, split]) for what, of_features in self._counts.items()}
        found: dict[str, Any] = {what: counts[what] for what in ("rows", "missing", "values")}
        found["missing_rate_in_train"] = self._given.missing_rate(feature.name)
        if pa.types.is_floating(feature.raw_type):
            numbers = {"least": float(self._least[index, split]), "greatest": float(self._greatest[index, split])}
            found |= numbers if counts["values"] else dict.fromkeys(numbers)
            if feature.scaled:
                outside = {"outside": counts["below"] + counts["above"], "below": counts["below"], "above": counts["above"]}
                found |= outside | {"range": self._given.ranges[feature.name]}
        elif feature.has_vocabulary:
            found |= {what: counts[what] for what in ("unseen", "rows_with_unseen")}
        return found


def _valid(values: pa.Array) -> NDArray[np.bool_]:
    """[n], where there is a value: no null, no code -1."""
    if pa.types.is_int32(values.type):  # codes; raw integers are int64
        return values.to_numpy() >= 0
    return pc.is_valid(values).to_numpy(zero_copy_only=False)
