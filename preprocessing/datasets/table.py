"""Any table of your own: CSV, JSON lines or Parquet files, whose columns a configuration explains.

The configuration's sections stand in preprocessing/own_tables/config.py, with examples in docs/datasets/table.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.encoding import conversions as to
from mmlrec.encoding.cells import BLANKS, NESTED, Cells
from mmlrec.encoding.conversions import FOUND
from mmlrec.encoding.features import feature_values, scenario_ids
from mmlrec.encoding.specs import FeatureSpec, ScenarioSpec
from mmlrec.errors import ConfigError, DataError, did_you_mean
from mmlrec.paths import local_path
from mmlrec.schema import DatasetManifest, Scenario, Task
from mmlrec.storage.places import place
from preprocessing.dataset import (
    PLACE_KEYS,
    Column,
    Dataset,
    EncodingRules,
    Hashing,
    Managed,
    bucketed,
    dense,
    multi,
    place_columns,
    sparse,
)
from preprocessing.own_tables.config import (
    FileRule,
    GroupRule,
    IdFeature,
    IdsFeature,
    KeyConfig,
    NumberFeature,
    ScenarioConfig,
    TableConfig,
    TimeRule,
    indicator_name,
    read_table_config,
)
from preprocessing.own_tables.files import file_format, matching_files, separator_of
from preprocessing.own_tables.recorded import encoded_parts, recorded_table_config, with_files
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.json_lines import JsonLines, in_json
from preprocessing.reading.parquet_rows import ParquetRows
from preprocessing.reading.raw_files import Block, RawFile, RawFolder, Source, where_else
from preprocessing.rows import own_columns
from preprocessing.split_rules import FileSplit, GroupSplit, RandomSplit, SplitRule, TimeSplit

_TYPES = {"int": pa.int64(), "string": pa.string()}
#: Types of numbers: where a column is read as two of them, the later one serves both.
_NUMBERS = (pa.bool_(), pa.float64(), pa.int64())
#: Options of a feature that its column, its table, or the form of the files tells, or that encode nothing.
_TOLD = {
    "kind",
    "column",
    "type",
    "table",
    "min_count",
    "hash",
    "managed",
    "separator",
    "buckets",
    "fill",
    "indicator",
    "allow_label_feature",
}
EXAMPLE = """\
# python -m preprocessing table --config my_table.yaml --out data/my-table
files: [views/*.csv.gz]             # patterns, files or folders, below --raw DIR (default: where this file is)
csv: {separator: ","}               # absent: a tab in .tsv, else a comma; also quoted, header, columns, encoding, comment
missing: ["NULL", "NA", "?"]        # texts that mean a missing value, besides an empty cell; strip: true drops blanks around
features:
  user: {kind: id, type: int}       # one id a row; a vocabulary of the train rows
  item: {kind: id, min_count: 2}    # ids seen less often in train become 0: missing, rare or unseen
  bought: {kind: ids, separator: "|", table: item}  # several ids a row, in the table of item
  page: {kind: id, column: url, hash: {num_buckets: 100000, num_hashes: 2, seed: 7}}
  price: {kind: number, scale: log, indicator: true} # or min_max, none; a feature price_missing beside it
  age: {kind: number, buckets: 8}   # quantiles, as ids
tasks:                              # in order; the next one is positive only where this one is
  - {name: click, label: clicked, role: ctr, implied_by_next: true}
  - {name: buy, label: "orders >= 1", role: ctcvr}
scenario:
  column: device
  values: {phone: mobile, tablet: mobile, desktop: desktop}
  others: drop                      # or error, or the name of a scenario
keys:
  user: {type: int}
  time: {type: datetime}            # ISO 8601; for others a format: seconds, milliseconds, or "%d.%m.%Y %H:%M"
group_key: user                     # whose rows GAUC ranks among themselves; int or string
split: {rule: time, key: time}      # or random, group (key), with fractions: [0.9, 0.05, 0.05]; file (train, valid, test)
"""


class Table(Dataset):
    """What the configuration says."""

    name = "table"
    summary = "any table of your own: CSV, JSON lines or Parquet, explained by a configuration"
    examples = (
        f"A configuration (`python -m preprocessing table --example > my_table.yaml` writes it):\n\n{EXAMPLE}\n"
        "All keys: docs/datasets/table.md"
    )

    def __init__(self, options: argparse.Namespace) -> None:
        config, self._where = _chosen(options)
        self._config, self._may_lack = config, getattr(options, "labels_optional", False)
        self._is_like_another = getattr(options, "like", None) is not None
        self._needed = {feature.column or name for name, feature in config.features.items()}
        self._needed |= {config.scenario.column} if config.scenario else set()
        if options.raw is None:
            if not isinstance(options.config, Path):
                raise ConfigError("--raw is missing: the folder of the new files.")
            options.raw = options.config.parent
        options.config = json.loads(config.model_dump_json(exclude_defaults=True))
        self.terms = config.terms  # type: ignore[misc]
        self._sides = self._find_files(options.raw)
        self._format = config.format or file_format(list(self._sides), self._where)
        self.raw_files = tuple(map(RawFile, self._sides))
        self._reads = self._columns_to_read()
        self._cells = config.cells
        self._declared = {name: self._feature(name) for name in config.features}
        columns = [(name, column) for name in config.features for column in self._with_indicator(name)]
        self.features = tuple(column for _, column in columns)
        self._specs = [self._spec(name, column) for name, column in columns]
        self.tasks = tuple(
            Task(name=task.name, kind=task.kind, role=task.role, implied_by_next=task.implied_by_next) for task in config.tasks
        )
        scenario = config.scenario
        if scenario is not None:
            self.scenario = Scenario(name=scenario.name or scenario.column, values=scenario.names)
        self.keys = {name: _TYPES.get(key.type, pa.int64()) for name, key in config.keys.items()} | PLACE_KEYS
        self.numbering, self.weighted = tuple(PLACE_KEYS), config.weight is not None
        self.group_key = config.group_key
        self.split, self.duplicates = _split_rule(config), config.duplicates
        if scenario is not None:
            setting = "mtmsl" if len(self.tasks) > 1 else "msl"
            self.next_config = f"{Dataset.next_config} dataset.setting={setting}"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--config`, `--raw`, `--files`, `--example`."""
        parser.add_argument("--config", type=local_path, required=True, metavar="YAML", help="what the columns mean; see below")
        parser.add_argument(
            "--raw",
            type=place,
            default=None,
            help="folder of the files that the configuration names; or s3://bucket/name (default: where the configuration is)",
        )
        parser.add_argument(
            "--files",
            dest="new_files",
            nargs="+",
            metavar="PATTERN",
            help="of new rows (--like, --extend): the files below --raw, in place of those that the configuration names",
        )
        parser.add_argument("--example", action=_Example, help="print a configuration to start from, and stop")

    @classmethod
    def encodes(cls, options: argparse.Namespace) -> dict[str, Any]:
        """By the configuration: how the files are written, and what their columns are called there, is none of it."""
        return encoded_parts(_chosen(options)[0])

    def prepare(self, raw: RawFolder) -> None:
        """A key that no JSON line has would be all missing, in silence: looked for in some lines, and if need be in all."""
        if self._format != "json":
            return
        wanted = {*self._reads} - {*self._optional()}
        seen: dict[str, None] = {}
        for name in self._sides:
            for piece in itertools.islice(raw.pieces(name), 1):
                for line in piece.text.split(b"\n")[:1000]:
                    seen |= dict.fromkeys(_json_object(line))
            if not wanted - seen.keys():
                return
        if not seen:
            return  # no JSON lines at all, as the reader will say
        unseen = sorted(wanted - seen.keys())
        absent = (key for key in unseen if not any(key in _json_object(line) for line in self._lines_with(raw, key)))
        lacking = next(absent, None)
        if lacking is None:
            return
        path = raw.paths[next(iter(self._sides))]
        hint = where_else(path, lacking, seen)
        if not hint and any(True for _ in self._lines_with(raw, lacking)):
            hint = f" {NESTED}"
        raise DataError(f"{path}: no line has the key '{lacking}'.{hint} Keys: {', '.join(list(seen)[:20])}.")

    def _lines_with(self, raw: RawFolder, key: str) -> Iterator[bytes]:
        """The lines in which a key of this name stands, be it within another object."""
        wanted = re.compile(b"|".join(b'"%s"[ \t]*:' % re.escape(form) for form in in_json(key)))
        for name in self._sides:
            for piece in raw.pieces(name):
                if wanted.search(piece.text):
                    yield from (line for line in piece.text.split(b"\n") if wanted.search(line))

    def sources(self) -> Iterator[Source]:
        """The files in the order in which they are named, those of a pattern by name."""
        optional = self._optional()
        for name in self._sides:
            if self._format == "json":
                yield JsonLines(name, self._reads, self._cells)
            elif self._format == "parquet":
                yield ParquetRows(name, self._reads, self._cells, optional)
            else:
                csv = self._config.csv
                separator = csv.separator or separator_of(name)
                yield DelimitedText(
                    name,
                    separator,
                    self._reads,
                    csv.encoding,
                    csv.header,
                    quoted=csv.quoted and len(separator.encode()) == 1,
                    comment=csv.comment,
                    skip_blank=True,
                    cells=self._cells,
                    fields=tuple(csv.columns),
                    optional=optional,
                )

    def _optional(self) -> tuple[str, ...]:
        """Columns that new rows may lack: those that neither a feature nor the scenario is made of."""
        return self.may_lack(*(name for name in self._reads if name not in self._needed))

    def rows(self, block: Block) -> dict[str, Any]:
        """Columns of the canonical table; faulty rows are bad rows."""
        columns: dict[str, pa.Array] = {}
        faults: to.Faults = []
        for make in (self._make_features, self._make_labels, self._make_weights, self._make_keys):
            make(block.table, columns, faults)
        columns |= place_columns(block)
        wanted = self._make_scenario(block.table, columns, faults)
        if isinstance(self.split, FileSplit):
            columns["split.side"] = pa.array(np.full(len(block.lines), self._sides[block.source.name]))
        kept = np.arange(len(block.lines))
        for good, complaint, column in faults:
            block = block.require(good[kept], complaint, shown=column)
            kept = kept[good[kept]]
        if not wanted[kept].all():
            block.only(wanted[kept], "other scenarios")
            kept = kept[wanted[kept]]
        if len(kept) < len(wanted):
            columns = {name: column.take(pa.array(kept)) for name, column in columns.items()}
        return columns

    def encoding_rules(self) -> EncodingRules:
        """Options of features, rules of labels, and which values are which scenario; how files are written is none of it."""
        features: dict[str, dict[str, Any]] = {}
        for name, feature in self._config.features.items():
            missing = self._cells.facts(feature.column or name)
            options = feature.model_dump(mode="json", exclude_defaults=True, exclude=_TOLD)
            if options.get("scale") == "none":  # as the range tells that is not there
                del options["scale"]
            features[name] = options | missing
            if isinstance(feature, NumberFeature) and feature.indicator:
                features[indicator_name(name)] = {"indicator": name} | missing
        labels: dict[str, dict[str, Any]] = {}
        for task in self._config.tasks:
            label: dict[str, Any] = {"rule": task.condition.facts()} if task.condition else {"column": task.column}
            labels[task.name] = label | self._cells.facts(*task.columns)
        rule: dict[str, Any] = {}
        if scenario := self._config.scenario:
            rule = {"map": sorted(map(list, scenario.values.items()))} | self._cells.facts(scenario.column)
            if scenario.others not in ("error", "drop"):
                rule["others"] = scenario.others
        return EncodingRules(features, labels, rule)

    def _find_files(self, folder: Path) -> dict[str, int]:
        """File -> its side under a split by files, 0 otherwise; in order."""
        config, split = self._config, self._config.split
        if not isinstance(split, FileRule):
            return dict.fromkeys(
                matching_files(folder, config.files, "files", self._where, of_new_rows=self._is_like_another), 0
            )
        sides: dict[str, int] = {}
        for side, patterns in enumerate((split.train, split.valid, split.test)):
            key = f"split.{('train', 'valid', 'test')[side]}"
            for name in matching_files(folder, patterns, key, self._where) if patterns else ():
                if name in sides:
                    raise ConfigError(f"{self._where}: {key}: {name} is also among split.{('train', 'valid')[sides[name]]}.")
                sides[name] = side
        return sides

    def _columns_to_read(self) -> dict[str, pa.DataType]:
        """Column -> type in which the source gives it. Raises ConfigError when two uses of it do not go together."""
        uses: list[tuple[str, pa.DataType, str]] = []
        for name, feature in self._config.features.items():
            kind = pa.float64() if isinstance(feature, NumberFeature) else _TYPES[feature.type]
            if isinstance(feature, IdsFeature):
                as_text = feature.separator is not None or self._format == "csv"
                kind = pa.string() if as_text else pa.list_(kind)
            uses.append((feature.column or name, kind, f"features.{name}"))
        for task in self._config.tasks:
            where = f"the label of task {task.name}"
            read = task.condition.columns if task.condition else {task.column: pa.float64()}
            uses += [(column, kind, where) for column, kind in read.items()]
        if self._config.weight is not None:
            uses.append((self._config.weight, pa.float64(), "weight"))
        for name, key in self._config.keys.items():
            uses.append((key.column or name, _key_type(key), f"keys.{name}"))
        scenario = self._config.scenario
        if scenario is not None:
            uses.append((scenario.column, _scenario_type(scenario), "scenario.values"))
        reads: dict[str, tuple[pa.DataType, str]] = {}
        names = self._config.csv.columns
        for column, kind, where in uses:
            if names and column not in names and not (self._may_lack and column not in self._needed):
                raise ConfigError(f"{self._where}: {where}: csv.columns has no '{column}'.{did_you_mean(column, names)}")
            before, other = reads.get(column, (kind, where))
            if before != kind and not {before, kind} <= {*_NUMBERS}:
                raise ConfigError(
                    f"{self._where}: column '{column}' is read as {before} by {other}, but as {kind} by {where}."
                    " Declare both alike, e.g. by type: int, or by text in quotes."
                )
            reads[column] = (before if before == kind else max(before, kind, key=_NUMBERS.index), other)
        for column in self._config.missing if isinstance(self._config.missing, dict) else ():
            if column not in reads:
                raise ConfigError(
                    f"{self._where}: missing: no feature, label, key or scenario reads a column '{column}'."
                    f"{did_you_mean(column, reads)}"
                )
        return {column: kind for column, (kind, _) in reads.items()}

    def _feature(self, name: str) -> Column:
        feature = self._config.features[name]
        if isinstance(feature, NumberFeature):
            if feature.buckets:
                return bucketed(name, feature.buckets)
            scaled = feature.scale != "none"
            fill = feature.fill
            if not isinstance(fill, str) and feature.scale == "log":
                fill = math.copysign(math.log1p(abs(fill)), fill)
            return replace(dense(name, scaled=scaled), raw_type=pa.float64() if scaled else pa.float32(), fill=fill)
        owner = feature if feature.table is None else self._config.features[feature.table]
        assert isinstance(owner, IdFeature)
        hashing = None
        if owner.hash is not None:
            hashing = Hashing(owner.hash.num_buckets, owner.hash.num_hashes, owner.hash.seed)
        managed = None if owner.managed is None else Managed(owner.managed.slots, owner.managed.seed)
        several = isinstance(feature, IdsFeature) or (hashing is not None and hashing.num_hashes > 1)
        make = multi if several else sparse
        table, kind, least = feature.table or name, _TYPES[feature.type], owner.min_count or 1
        return make(name, kind, table=table, min_count=least, hashing=hashing, managed=managed)

    def _with_indicator(self, name: str) -> tuple[Column, ...]:
        feature, declared = self._config.features[name], self._declared[name]
        if isinstance(feature, NumberFeature) and feature.indicator:
            return declared, dense(indicator_name(name), scaled=False)
        return (declared,)

    def _spec(self, name: str, declared: Column) -> FeatureSpec:
        """How the cells of a configured feature become canonical values, or those of its indicator."""
        feature = self._config.features[name]
        return FeatureSpec(
            declared.name,
            declared.kind,
            declared.raw_type,
            column=feature.column or name,
            listed=isinstance(feature, IdsFeature),
            separator=feature.separator if isinstance(feature, IdsFeature) else None,
            log=isinstance(feature, NumberFeature) and feature.scale == "log",
            indicator=declared.name != name,
        )

    def _make_features(self, table: pa.Table, columns: dict[str, pa.Array], faults: to.Faults) -> None:
        for spec in self._specs:
            # A cell has been taken as `cells` say when it was read, an element of a list has not.
            rules = self._cells if spec.listed else Cells()
            columns[spec.name], more = feature_values(spec, table[spec.column].combine_chunks(), rules, empty_is_missing=True)
            faults += more

    def _make_labels(self, table: pa.Table, columns: dict[str, pa.Array], faults: to.Faults) -> None:
        for task in self._config.tasks:
            if task.condition is not None:
                values = task.condition.evaluate(table).cast(pa.float32())
            elif task.kind == "regression":
                values, more = to.number(table[task.column].combine_chunks(), task.column, pa.float32())
                faults += more
            else:
                values, more = own_columns.label(table[task.column].combine_chunks(), task.column)
                faults += more
            columns[f"label.{task.name}"] = values
        for task, following in zip(self._config.tasks[:-1], self._config.tasks[1:], strict=True):
            if task.implied_by_next:
                before, after = columns[f"label.{task.name}"], columns[f"label.{following.name}"]
                wrong = pc.and_(pc.equal(before, 0), pc.greater(after, 0)).fill_null(False)
                complaint = f"task {following.name} is positive where {task.name} is not, which implied_by_next rules out."
                complaint = f"{complaint} Mend the line, or leave that away."
                faults.append((~wrong.to_numpy(zero_copy_only=False), complaint, following.name))

    def _make_weights(self, table: pa.Table, columns: dict[str, pa.Array], faults: to.Faults) -> None:
        if self._config.weight is not None:
            values = table[self._config.weight].combine_chunks()
            if self.labels_optional:
                values = values.fill_null(1)
            columns["sample.weight"], more = own_columns.weight(values, self._config.weight)
            faults += more

    def _make_keys(self, table: pa.Table, columns: dict[str, pa.Array], faults: to.Faults) -> None:
        needed = set() if self.labels_optional else {self.group_key, getattr(self._config.split, "key", None)}
        for name, key in self._config.keys.items():
            source = key.column or name
            values = to.present(table[source].combine_chunks())
            if key.type == "datetime":
                values, more = own_columns.seconds(values, source, key.format)
                faults += more
            if name in needed:
                good = values.is_valid().to_numpy(zero_copy_only=False)
                complaint = f"{source}, by which rows are divided or grouped, is missing. Mend the line."
                faults.append((good, complaint, source))
            columns[f"key.{name}"] = values

    def _make_scenario(self, table: pa.Table, columns: dict[str, pa.Array], faults: to.Faults) -> np.ndarray:
        """Adds the scenario; returns which rows belong to one."""
        scenario = self._config.scenario
        wanted = np.ones(len(table), bool)
        if scenario is None:
            return wanted
        known = {value: scenario.names.index(name) for value, name in scenario.values.items()}
        others = None if scenario.others in ("error", "drop") else scenario.names.index(scenario.others)
        spec = ScenarioSpec(scenario.column, tuple(scenario.names), scenario.column, _scenario_type(scenario), known, others)
        found, there, more = scenario_ids(spec, table[scenario.column].combine_chunks(), Cells())
        faults += more
        if scenario.others == "error":
            complaint = f"{scenario.column} holds no value of the scenarios{FOUND}."
            remedy = "Add it to scenario.values, or say with scenario.others what to do."
            if not self._cells.strip and _in_blanks(table[scenario.column].filter(pa.array(~there)), known):
                remedy = "Blanks stand around it: strip: true drops them."
            if self._is_like_another:  # whose scenarios are those of a model
                remedy = f"Known are: {', '.join(map(str, known))}. Leave the line out, or pass over it by --max-bad-rows."
            faults.append((there, f"{complaint} {remedy}", scenario.column))
        elif scenario.others == "drop":
            wanted = there
        columns["sample.scenario"] = pa.array(found)
        return wanted


class _Example(argparse.Action):
    """Prints the example and stops, whatever else is required."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(EXAMPLE, end="")
        parser.exit()


def _chosen(options: argparse.Namespace) -> tuple[TableConfig, str]:
    """The configuration, of a file or of the manifest of the dataset that new rows are encoded like; and where it stands."""
    like: DatasetManifest | None = getattr(options, "like", None)
    if isinstance(options.config, Path):
        config, where = read_table_config(options.config), str(options.config)
    else:
        assert like is not None
        config, where = recorded_table_config(like), f"the configuration of {like.name}"
    if like is not None:
        config = with_files(config, options.new_files, one_split=options.one_split)
    return config, where


def _in_blanks(values: pa.ChunkedArray, known: dict[int | str, int]) -> bool:
    """Whether all texts are known without the blanks around them."""
    texts = [value for value in values.unique().to_pylist() if isinstance(value, str)]
    return bool(texts) and all(text.strip(BLANKS) in known for text in texts)


def _scenario_type(scenario: ScenarioConfig) -> pa.DataType:
    """The type in which the source gives what tells the scenario."""
    return pa.int64() if isinstance(next(iter(scenario.values)), int) else pa.string()


def _key_type(key: KeyConfig) -> pa.DataType:
    """The type in which the source gives a key."""
    if key.format in own_columns.TIME_UNITS:  # as float64 a nanosecond of today is wrong by a hundred
        return pa.int64() if key.format == "nanoseconds" else pa.float64()
    return _TYPES.get(key.type, pa.string())


def _split_rule(config: TableConfig) -> SplitRule:
    split = config.split
    if isinstance(split, GroupRule):
        return GroupSplit(split.key, split.fractions)
    if isinstance(split, TimeRule):
        return TimeSplit(split.key, split.seconds, split.fractions)
    if isinstance(split, FileRule):
        return FileSplit() if split.valid else FileSplit(split.valid_from or "train", split.one_in or 10)
    return RandomSplit(split.fractions)


def _json_object(line: bytes) -> dict[str, Any]:
    """The object; empty where the line holds none, which is a bad row when it is read."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


DATASETS = (Table,)
