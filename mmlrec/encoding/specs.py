"""What an encoder knows of features, tables and scenarios, from plain facts that JSON can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mmlrec.encoding.cells import Cells
from mmlrec.errors import did_you_mean

#: Of the facts of an encoder. Another form is not guessed at.
FACTS_FORM = 1
#: Column of the scenario in canonical and encoded rows; and of raw rows where a feature has the scenario's name (`columns`).
SCENARIO_COLUMN = "sample.scenario"
_TYPES = {"int64": pa.int64(), "string": pa.string(), "float32": pa.float32(), "float64": pa.float64()}


@dataclass(frozen=True)
class FeatureSpec:
    """One feature: what is read, and what becomes of it.

    Attributes:
        kind: sparse (an id), multi (a list of ids), dense (a number).
        raw_type: Arrow type of one canonical value: int64 or string of ids, float32 or float64 of numbers.
        table: of ids. Features with one table share its rows.
        pooling: mean or sum, of a list of ids.
        column: the raw column that it is made of.
        listed: a raw cell holds a list, or text that stands for one.
        separator: between the ids of such a text; None: it is a JSON list.
        log: numbers are taken as sign(x) log(1 + |x|).
        indicator: it is 1 where a raw cell holds no number, else 0.
        scaled: numbers are scaled to `range`, and clipped to [0, 1].
        range: least and greatest train value; None: all of a scaled feature is 0.
        fill: what a missing number becomes before it is scaled; None: it becomes 0 after that.
    """

    name: str
    kind: str
    raw_type: pa.DataType
    table: str | None = None
    pooling: str = "mean"
    column: str = ""
    listed: bool = False
    separator: str | None = None
    log: bool = False
    indicator: bool = False
    scaled: bool = False
    range: tuple[float, float] | None = None
    fill: float | None = None

    @classmethod
    def of(cls, name: str, facts: Mapping[str, Any]) -> FeatureSpec:
        """From the facts of a feature; the keys are those of `attributes`, in which defaults are left out."""
        others = dict(facts)
        others["raw_type"] = _TYPES[others.pop("type")]
        others["column"] = others.get("column", name)
        if "range" in others:
            others["scaled"] = True
            others["range"] = tuple(others["range"]) if others["range"] is not None else None
        return cls(name, **others)

    @property
    def canonical_type(self) -> pa.DataType:
        """Arrow type of its canonical column."""
        return pa.list_(self.raw_type) if self.kind == "multi" else self.raw_type

    @property
    def cell_type(self) -> pa.DataType:
        """Arrow type in which its raw column is wanted: int64, string or float64, or a list; with a separator string."""
        if self.kind == "dense" or pa.types.is_floating(self.raw_type):
            return pa.float64()
        if self.listed:
            return pa.string() if self.separator is not None else pa.list_(self.raw_type)
        return self.raw_type


@dataclass(frozen=True)
class TableSpec:
    """How values become rows of a table.

    Attributes:
        ids: vocabulary, quantiles, hash, managed or given.
        num_rows: row 0, for what is missing, rare or unseen, included.
        buckets, hashes, seed: of ids by hash, see mmlrec.hashing; of keys, ids of a managed table, the seed.
        borders: of quantiles, ascending: the least number of each bucket but the first.
    """

    name: str
    ids: str
    num_rows: int
    buckets: int = 0
    hashes: int = 1
    seed: int = 0
    borders: tuple[float, ...] = ()


@dataclass(frozen=True)
class ScenarioSpec:
    """What divides the rows.

    Attributes:
        name, values: of the scenarios, in the order of their ids.
        column: the raw column that tells them.
        raw_type: int64 or string.
        known: raw value -> id.
        others: id of the scenario that rows with other values join; None: these are errors.
    """

    name: str
    values: tuple[str, ...]
    column: str
    raw_type: pa.DataType
    known: dict[int | str, int]
    others: int | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> ScenarioSpec:
        """From the facts of the scenario."""
        values = tuple(facts["values"])
        known = {value: values.index(scenario) for value, scenario in facts["map"]}
        others = values.index(facts["others"]) if facts.get("others") is not None else None
        return cls(facts["name"], values, facts["column"], _TYPES[facts["type"]], known, others)


@dataclass(frozen=True)
class RawColumn:
    """A raw column that is read.

    Attributes:
        type: int64, string or float64, or a list of int64 or string. Other types, and text, are converted.
        uses: what it is for: `feature NAME`, `scenario`.
    """

    name: str
    type: pa.DataType
    uses: tuple[str, ...] = ()

    @property
    def is_list(self) -> bool:
        """Whether a cell holds several values."""
        return bool(pa.types.is_list(self.type))

    def missing_among(self, names: Iterable[object]) -> str:
        """The complaint about rows that have these columns, and not this one."""
        found = [str(name) for name in names]
        shown = f"{', '.join(found[:20])}{' ...' if len(found) > 20 else ''}" or "none"
        hint = did_you_mean(self.name, found)
        return f"there is no column '{self.name}', which {' and '.join(self.uses)} is made of.{hint} Columns: {shown}."


@dataclass(frozen=True)
class Specs:
    """All of an encoder but its vocabularies.

    Attributes:
        cells: what is done to a raw cell first.
        empty_is_missing: an empty text is a missing value, as in a table of one's own.
    """

    features: tuple[FeatureSpec, ...]
    tables: dict[str, TableSpec]
    scenario: ScenarioSpec | None
    cells: Cells
    empty_is_missing: bool
    columns: dict[str, RawColumn] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Specs:
        """From the facts of an encoder."""
        features = tuple(FeatureSpec.of(name, of) for name, of in facts["features"].items())
        tables = {}
        for name, of in facts["tables"].items():
            wanted = ("buckets", "hashes", "seed")
            numbers = {key: of[key] for key in wanted if key in of}
            tables[name] = TableSpec(name, of["ids"], of["rows"], **numbers, borders=tuple(of.get("borders", ())))
        scenario = ScenarioSpec.of(facts["scenario"]) if facts.get("scenario") else None
        marks = facts.get("missing", [])
        if isinstance(marks, dict):
            cells = Cells({column: tuple(texts) for column, texts in marks.items()}, facts.get("strip", False))
        else:
            cells = Cells(tuple(marks), facts.get("strip", False))
        columns = _columns(features, scenario)
        return cls(features, tables, scenario, cells, facts.get("empty_is_missing", False), columns)


def _columns(features: tuple[FeatureSpec, ...], scenario: ScenarioSpec | None) -> dict[str, RawColumn]:
    columns: dict[str, RawColumn] = {}
    uses = [(spec.column, spec.cell_type, f"feature {spec.name}") for spec in features]
    if scenario is not None:
        uses.append((scenario.column, scenario.raw_type, "scenario"))
    for name, kind, use in uses:
        before = columns.get(name, RawColumn(name, kind))
        # An integer is a number, too; other uses of one column agree, or its configuration would have been refused.
        kind = kind if pa.types.is_floating(before.type) else before.type
        columns[name] = RawColumn(name, kind, (*before.uses, use))
    return columns
