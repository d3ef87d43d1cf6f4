"""Distinct groups (users) of each scenario, for the manifest.

The two differ in where the values are kept. On one machine that is a dictionary which goes to disk beyond a bound of memory;
Spark's tasks count in processes of their own, and what they send must add up: counters of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.schema import SCENARIO_COLUMN, key_column
from preprocessing.dataset import Dataset
from preprocessing.encoding.dictionaries import Dictionaries
from preprocessing.encoding.encoder import ValueCounter
from preprocessing.encoding.ranking import num_distinct
from preprocessing.encoding.value_index import hash_words

_LEAST_SORTED_BYTES = 1 << 16


class _Groups:
    """What both share: which scenarios there are, whose groups a row is of, and the name of the statistic."""

    def __init__(self, dataset: Dataset) -> None:
        self._key = str(dataset.group_key)
        self.scenarios = list(dataset.scenario.values) if dataset.scenario and dataset.group_key else []
        self.raw_type = dataset.keys[self._key] if self.scenarios else pa.int64()

    def of(self, rows: pa.RecordBatch) -> Iterator[pa.Array]:
        """The groups of the canonical rows of each scenario."""
        for index in range(len(self.scenarios)):
            yield rows.column(key_column(self._key)).filter(pc.equal(rows.column(SCENARIO_COLUMN), index))

    def named(self, counts: dict[str, int]) -> dict[str, dict[str, int]]:
        """For the manifest: `scenario_users` or the like; nothing without scenarios or groups."""
        return {f"scenario_{self._key}s": counts} if self.scenarios else {}


class BoundedGroups:
    """In bounded memory, on one machine; `add` is for several threads."""

    def __init__(self, dataset: Dataset, folder: Path, limit_bytes: int) -> None:
        self._groups, self._folder, self._limit = _Groups(dataset), folder, limit_bytes
        kinds = dict.fromkeys(self._groups.scenarios, self._groups.raw_type)
        self._dictionaries = Dictionaries(kinds, folder / "groups", limit_bytes)

    def add(self, rows: pa.RecordBatch) -> None:
        """Take note of the groups of these canonical rows."""
        for dictionary, values in zip(self._dictionaries.tables.values(), self._groups.of(rows), strict=True):
            local = values.dictionary_encode()
            dictionary.code(local, hash_words(local.dictionary))

    def statistics(self) -> dict[str, dict[str, int]]:
        """For the manifest."""
        limit = max(self._limit // 8, _LEAST_SORTED_BYTES)
        return self._groups.named(
            {
                scenario: num_distinct(dictionary, self._folder / f"groups-{index}", limit)
                for index, (scenario, dictionary) in enumerate(self._dictionaries.tables.items())
            }
        )


class MergedGroups:
    """As counters that can be sent and added up."""

    def __init__(self, dataset: Dataset) -> None:
        self._groups = _Groups(dataset)
        self.counters = {scenario: ValueCounter(self._groups.raw_type) for scenario in self._groups.scenarios}

    def add(self, rows: pa.RecordBatch) -> None:
        """Count the groups of these canonical rows."""
        for counter, values in zip(self.counters.values(), self._groups.of(rows), strict=True):
            counter.add(values)

    def statistics(self) -> dict[str, dict[str, int]]:
        """For the manifest."""
        return self._groups.named({scenario: len(counter.counts()) for scenario, counter in self.counters.items()})
