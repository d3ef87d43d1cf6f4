"""What a table of one's own makes of raw cells, in plain Python: dictionaries and formulas, without a line of the encoder.

`Reference` is fitted on train rows, each a dictionary of cells, and gives what a row becomes: ids, numbers, scenario.
"""

import json
import math
import re
from collections import Counter
from fractions import Fraction

import numpy as np

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mixed(value):
    z = (value + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def hash_of(value, seed):
    if isinstance(value, int):
        first = mixed((value & MASK) ^ mixed(seed))
    else:
        text, first = value.encode(), mixed(seed)
        for at in range(0, len(text), 8):
            first = mixed(first ^ int.from_bytes(text[at : at + 8], "little"))
        first = mixed(first ^ len(text))
    return first


def key(value, seed=0):
    """Of a managed table: the hash as an integer with sign, but not 0."""
    found = hash_of(value, seed) or 1
    return found if found < 2**63 else found - 2**64


def buckets(value, num_buckets, num_hashes=1, seed=0):
    """Ids of a value by hash: a list of them."""
    first = hash_of(value, seed)
    hashes = [first, *(mixed((first + j * GOLDEN) & MASK) for j in range(1, num_hashes))]
    return [each % num_buckets + 1 for each in hashes]


class Reference:
    def __init__(self, config, train):
        self.config = config
        self.names = config["features"]
        self.vocabularies, self.means, self.ranges, self.borders = {}, {}, {}, {}
        for name, feature in self.names.items():
            if feature["kind"] == "number":
                self._fit_number(name, feature, train)
        for name, feature in self.names.items():
            if feature["kind"] != "number" and "table" not in feature and not {"hash", "managed"} & feature.keys():
                sharing = [name, *(other for other, of in self.names.items() if of.get("table") == name)]
                counts = Counter(value for row in train for other in sharing for value in self.ids(other, row))
                kept = [value for value, count in counts.items() if count >= feature.get("min_count", 1)]
                ordered = sorted(kept, key=lambda value: (-counts[value], value.encode() if isinstance(value, str) else value))
                self.vocabularies[name] = {value: place for place, value in enumerate(ordered, 1)}

    def _fit_number(self, name, feature, train):
        numbers = [number for row in train if (number := self.number(name, row)) is not None]
        self.means[name] = float(sum(map(Fraction, numbers), Fraction(0)) / len(numbers))
        self.ranges[name] = min(numbers), max(numbers)
        if "buckets" in feature:
            ordered = sorted(numbers)
            places = [j * len(ordered) // feature["buckets"] for j in range(1, feature["buckets"])]
            self.borders[name] = sorted({ordered[place] for place in places} - {ordered[0]})

    def cell(self, column, row):
        """A cell as text, number, boolean or list; None where it is missing."""
        return self.taken(column, row.get(column))

    def taken(self, column, value):
        missing = self.config.get("missing", [])
        marks = missing.get(column, []) if isinstance(missing, dict) else missing
        if isinstance(value, str):
            value = value.strip(" \t") if self.config.get("strip") else value
            return None if value == "" or value in marks else value
        if isinstance(value, float) and math.isnan(value):
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            for mark in marks:
                try:
                    if float(mark) == value:
                        return None
                except ValueError:
                    pass
        return value

    def as_id(self, kind, value):
        if kind == "string":
            return ("true" if value else "false") if isinstance(value, bool) else str(value)
        if isinstance(value, str):
            value = re.sub(r"\.0*$", "", value.strip())
        return int(value)

    def ids(self, name, row):
        """The raw ids of a feature in a row: none, one, or several."""
        feature, column = self.names[name], self.names[name].get("column", name)
        kind, value = feature.get("type", "string"), self.cell(column, row)
        if value is None:
            return []
        if feature["kind"] == "id":
            return [self.as_id(kind, value)]
        if isinstance(value, str):
            value = value.split(feature["separator"]) if "separator" in feature else json.loads(value)
            value = [each.strip() if isinstance(each, str) and "separator" in feature else each for each in value]
        taken = (self.taken(column, each) for each in value)
        return [self.as_id(kind, each) for each in taken if each is not None]

    def number(self, name, row):
        feature = self.names[name]
        value = self.cell(feature.get("column", name), row)
        if isinstance(value, str):
            value = {"true": 1, "True": 1, "false": 0, "False": 0}.get(value, value)
        if value is None or self.taken(feature.get("column", name), float(value)) is None:
            return None
        value = float(value)
        if feature.get("scale") == "log":
            value = math.copysign(math.log1p(abs(value)), value)
        return float(np.float32(value)) if feature.get("scale") == "none" or "buckets" in feature else value

    def encoded(self, row):
        """Feature -> id, list of ids, or number; and the scenario's id."""
        found = {}
        for name, feature in self.names.items():
            if feature["kind"] != "number":
                owner = feature.get("table", name)
                hashing = self.names[owner].get("hash")
                if hashing:
                    ids = [each for value in self.ids(name, row) for each in buckets(value, **hashing)]
                    missing = [0] * hashing.get("num_hashes", 1)
                elif managed := self.names[owner].get("managed"):
                    ids, missing = [key(value, managed.get("seed", 0)) for value in self.ids(name, row)], [0]
                else:
                    ids = [self.vocabularies[owner].get(value, 0) for value in self.ids(name, row)]
                    missing = [0]
                if feature["kind"] == "ids" or len(missing) > 1:
                    found[name] = ids if feature["kind"] == "ids" else ids or missing
                else:
                    found[name] = (ids or missing)[0]
                continue
            number = self.number(name, row)
            if "buckets" in feature:
                found[name] = 0 if number is None else 1 + sum(border <= number for border in self.borders[name])
                continue
            if feature.get("indicator"):
                found[f"{name}_missing"] = float(number is None)
            found[name] = self.scaled(name, feature, number)
        if scenario := self.config.get("scenario"):
            found["sample.scenario"] = self.scenario(scenario, row)
        return found

    def scaled(self, name, feature, number):
        if number is None:
            fill = feature.get("fill", "mean")
            number = self.means[name] if fill == "mean" else float(fill)
            if fill != "mean" and feature.get("scale") == "log":
                number = math.copysign(math.log1p(abs(number)), number)
        if feature.get("scale") == "none":
            return float(np.float32(number))
        low, high = self.ranges[name]
        return float(np.float32(min(max((number - low) / (high - low), 0.0), 1.0))) if high > low else 0.0

    def scenario(self, scenario, row):
        values = scenario["values"]
        known = values if isinstance(values, dict) else {value: str(value) for value in values}
        others = scenario.get("others", "error")
        names = list(dict.fromkeys([*known.values(), *([others] if others not in ("error", "drop") else [])]))
        value = self.cell(scenario["column"], row)
        if value is not None:
            value = self.as_id("int" if isinstance(next(iter(known)), int) else "string", value)
        return names.index(known.get(value, others))
