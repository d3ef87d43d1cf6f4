"""What fitted parts make of canonical values, in plain Python: dictionaries and formulas. Nothing of the encoder is used."""

import bisect
from collections import Counter
from fractions import Fraction

import numpy as np

from tests.test_hashing import plain_buckets, plain_key


def several(column, value):
    """The values of a cell of ids."""
    if column.kind == "multi":
        return [each for each in value or [] if each is not None]
    return [] if value is None else [value]


def in_order(counts, min_count=1, before=()):
    """Values as their ids go: those that are there before, then by descending count and value."""
    new = [value for value, count in counts.items() if count >= min_count and value not in set(before)]
    return [*before, *sorted(new, key=lambda value: (-counts[value], value))]


class Reference:
    """The parts that are fitted on some rows, and what they make of others.

    Args:
        columns: the features of a dataset.
        rows: feature -> values, of the train rows.
        before: table -> values that have ids already, in the order of these.
    """

    def __init__(self, columns, rows, before=None):
        self.columns = {column.name: column for column in columns}
        self.vocabularies, self.ranges, self.fills, self.borders, self.counts = {}, {}, {}, {}, {}
        for column in columns:
            known = [value for value in rows[column.name] if value is not None]
            if column.has_vocabulary:
                counts = self.counts.setdefault(column.table, Counter())
                counts.update(value for cell in known for value in several(column, cell))
            if column.scaled:
                self.ranges[column.name] = (min(known), max(known)) if known else None
            if column.fill is not None:
                mean = float(sum(map(Fraction, known)) / len(known)) if known else 0.0
                self.fills[column.name] = mean if column.fill == "mean" else column.fill
            if column.num_buckets:
                ordered = sorted(known)
                ranks = [j * len(ordered) // column.num_buckets for j in range(1, column.num_buckets)]
                self.borders[column.name] = sorted({ordered[rank] for rank in ranks} - {ordered[0]}) if known else []
        for column in columns:
            if column.has_vocabulary:
                ordered = in_order(self.counts[column.table], column.min_count, (before or {}).get(column.table, ()))
                self.vocabularies[column.table] = {value: id for id, value in enumerate(ordered, 1)}

    def cell(self, name, value):
        """What a canonical value becomes: a number, an id, or a list of ids."""
        column = self.columns[name]
        if column.kind == "dense":
            value = self.fills.get(name) if value is None else value
            if not column.scaled:
                return float(np.float32(0 if value is None else value))
            low, high = self.ranges[name] or (0, 0)
            if not low < high or value is None:
                return 0.0
            return float(np.float32(min(max((value - low) / (high - low), 0.0), 1.0)))
        if column.num_buckets:
            return 0 if value is None else 1 + bisect.bisect_right(self.borders[name], value)
        if column.kind == "multi":
            return [id for each in value or [] for id in self.ids(column, each)]
        return self.ids(column, value)[0]

    def ids(self, column, value):
        """Of one value."""
        if column.hashing:
            hashing = column.hashing
            if value is None:
                return [0] * hashing.num_hashes
            return plain_buckets(value, hashing.seed, hashing.num_buckets, hashing.num_hashes)
        if column.managed:
            return [plain_key(value, column.managed.seed)]
        if column.num_ids is not None:
            return [value or 0]
        return [self.vocabularies[column.table].get(value, 0)]

    def against_train(self, name, values):
        """What the statistics must say of the cells of a split, the rate of missing ones in train apart."""
        column, found = self.columns[name], {"rows": len(values), "missing": 0, "values": 0}
        numbers, seen = [], self.ranges.get(name)
        if column.has_vocabulary:
            found |= {"unseen": 0, "rows_with_unseen": 0}
        if column.kind == "dense" or column.num_buckets:
            numbers = [value for value in values if value is not None]
            found |= {"least": min(numbers, default=None), "greatest": max(numbers, default=None)}
        if column.scaled:
            below, above = (sum(seen is not None and (value - seen[k]) * (1 - 2 * k) < 0 for value in numbers) for k in (0, 1))
            found |= {"below": below, "above": above, "outside": below + above, "range": seen and list(seen)}
        for value in values:
            cells = several(column, value)
            found["missing"] += not cells
            found["values"] += len(cells)
            if column.has_vocabulary:
                unseen = sum(each not in self.vocabularies[column.table] for each in cells)
                found["unseen"] += unseen
                found["rows_with_unseen"] += unseen > 0
        return found
