"""The configuration of `python -m preprocessing table`: what the columns of any table of your own mean."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, date, datetime
from fractions import Fraction
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from mmlrec.encoding.cells import Cells
from mmlrec.errors import did_you_mean
from mmlrec.yaml_config import StrictModel, read_yaml, validate_section
from preprocessing.dataset import PLACE_KEYS, hashed_key
from preprocessing.rows.expressions import Condition, has_operator, parse_condition, quoted_column
from preprocessing.rows.own_columns import TIME_UNITS
from preprocessing.split_rules import EIGHT_ONE_ONE, Duplicates

FORMATS = {
    "csv": (".csv", ".tsv", ".txt", ".dat", ".log"),
    "json": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
}


def _plain_name(name: str) -> str:
    """Raises ValueError where a name cannot be one of a column, and says what can be done: columns may have any name."""
    if re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        return name
    near = re.sub("[^A-Za-z0-9_]+", "_", name).strip("_")
    raise ValueError(
        f"{name!r} cannot be a name: these have letters from A to Z, digits, _ and - only{f', such as {near}' if near else ''}."
        f" What it is made of may be called anything: say column: {name!r}, or of a task label: '`{name}`'"
    )


Name = Annotated[str, AfterValidator(_plain_name)]
Files = Annotated[list[str], Field(min_length=1)]
_LARGEST = 3.4e38


class CsvConfig(StrictModel):
    """How delimited text is written."""

    separator: str | None = Field(
        default=None, min_length=1, description="One or more characters between fields; a tab in .tsv and a comma elsewhere."
    )
    quoted: bool = Field(default=True, description="A field may stand in double quotes (RFC 4180).")
    header: bool = Field(default=True, description="The first line names the columns.")
    columns: list[str] = Field(default=[], description="Names of all columns in order, where no header names them.")
    encoding: str = "utf-8"
    comment: str = Field(default="", description="Lines that begin with it are passed over and counted, as blank ones are.")

    @model_validator(mode="after")
    def _names_once(self) -> CsvConfig:
        if self.header == bool(self.columns):
            raise ValueError("give either a header or columns: names of all columns, for `header: false`")
        separator = self.separator or ","
        if any(mark in separator for mark in '\0\n\r"'):
            raise ValueError("a separator has neither a quote nor a line end nor a zero byte")
        if self.comment and (not self.comment.strip() or len(self.comment.splitlines()) > 1):
            raise ValueError("comment: give what begins a line of comment, such as '#'")
        if self.quoted and len(separator.encode()) > 1 and "quoted" in self.model_fields_set:
            raise ValueError("quoted fields need a separator of one ASCII character")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"two columns have one name: {', '.join(self.columns)}")
        try:
            lines_end_as_in_ascii = "\n".encode(self.encoding) == b"\n"
        except LookupError:
            raise ValueError(f"encoding: there is no encoding '{self.encoding}'") from None
        if not lines_end_as_in_ascii:
            raise ValueError(f"encoding: {self.encoding} does not end lines as ASCII does; convert the file to utf-8")
        return self


#: Given at a feature, tells that it may read a label's column.
AllowLabel = Annotated[bool, Field(description="The feature may be made of a column that a label is made of.")]


class HashConfig(StrictModel):
    """Ids by hash: no vocabulary, a table of fixed size."""

    num_buckets: int = Field(ge=1, le=2**40, description="Rows of the table, without row 0.")
    num_hashes: int = Field(default=1, ge=1, le=8, description="Ids of one value; with several the feature has a list of them.")
    seed: int = Field(default=0, ge=0, lt=2**63)


class ManagedConfig(StrictModel):
    """Ids by key: values earn and lose the slots of a table in training."""

    slots: int = Field(ge=1, lt=2**31, description="Rows of the table, without row 0.")
    seed: int = Field(default=0, ge=0, lt=2**63)


class IdFeature(StrictModel):
    """A feature with one id a row."""

    kind: Literal["id"]
    column: str | None = Field(default=None, description="The feature's name, when absent.")
    type: Literal["int", "string"] = "string"
    table: str | None = Field(default=None, description="Another feature, whose embedding table this one shares.")
    min_count: int | None = Field(default=None, ge=1, description="Values seen less often in train get id 0; 1 when absent.")
    hash: HashConfig | None = None
    managed: ManagedConfig | None = None
    allow_label_feature: AllowLabel = False

    @model_validator(mode="after")
    def _one_mapping(self) -> IdFeature:
        given = [name for name in ("table", "min_count", "hash", "managed") if getattr(self, name) is not None]
        if len(given) > 1:
            why = "a shared table has the mapping of the feature that it is named after" if given[0] == "table" else ""
            if not why:
                why = "ids of a managed table are counted in training" if "managed" in given else "hashed ids are not counted"
            raise ValueError(f"{' and '.join(given)} exclude each other: {why}")
        return self


class IdsFeature(IdFeature):
    """A feature with several ids a row: text with a separator, a list column, or a JSON list."""

    kind: Literal["ids"]  # type: ignore[assignment]
    separator: str | None = Field(default=None, min_length=1, description="Between the ids; without one, a list is there.")


class NumberFeature(StrictModel):
    """A number: dense, or a sparse feature of quantile buckets."""

    kind: Literal["number"]
    column: str | None = None
    scale: Literal["min_max", "log", "none"] = Field(
        default="min_max", description="log: sign(x) log(1 + |x|), then min-max; both by the train rows."
    )
    buckets: int | None = Field(default=None, ge=2, le=1 << 16, description="Quantiles of the train rows, as ids.")
    allow_label_feature: AllowLabel = False
    fill: float | Literal["mean"] = Field(
        default="mean", description="What a missing value becomes: the mean of the train rows, or a number before it is scaled."
    )
    indicator: bool = Field(default=False, description="One more feature, NAME_missing: 1 where the value is missing, else 0.")

    @field_validator("fill", mode="before")
    @classmethod
    def _number_or_mean(cls, fill: Any) -> Any:
        number = isinstance(fill, int | float) and not isinstance(fill, bool) and abs(fill) < _LARGEST
        if not number and fill != "mean":
            raise ValueError(f"give mean, or a number that float32 can hold; found {fill!r}")
        return fill

    @model_validator(mode="after")
    def _scaled_or_in_buckets(self) -> NumberFeature:
        if self.buckets is not None and "scale" in self.model_fields_set:
            raise ValueError("scale and buckets exclude each other: quantiles are the same on any scale")
        if self.buckets is not None and (self.indicator or "fill" in self.model_fields_set):
            raise ValueError("buckets have id 0 for a missing value: leave fill and indicator away")
        return self


def indicator_name(feature: str) -> str:
    """The feature that tells where a number is missing."""
    return f"{feature}_missing"


FeatureConfig = Annotated[IdFeature | IdsFeature | NumberFeature, Field(discriminator="kind")]


class TaskConfig(StrictModel):
    """A label: a column, or a condition on columns."""

    name: Name
    label: str = Field(min_length=1, description="A column of 0 and 1 or booleans, or a condition such as rating > 3.")
    kind: Literal["binary", "regression"] = "binary"
    role: str | None = None
    implied_by_next: bool = False

    @model_validator(mode="after")
    def _readable(self) -> TaskConfig:
        if self.condition is not None and self.kind == "regression":
            raise ValueError("a condition is a binary label; a regression task names a column")
        return self

    @property
    def condition(self) -> Condition | None:
        """The condition, where the label is one."""
        return parse_condition(self.label.strip()) if has_operator(self.label) else None

    @property
    def column(self) -> str:
        """The column, where the label is one; in backquotes it may have any name."""
        return quoted_column(self.label) or self.label

    @property
    def columns(self) -> list[str]:
        """The columns that the label is made of."""
        return list(self.condition.columns) if self.condition else [self.column]


class ScenarioConfig(StrictModel):
    """What divides the rows: a column, and which of its values are which scenario, in the order of their first mention."""

    column: str
    name: str | None = Field(default=None, description="The column, when absent.")
    values: dict[int | str, str] = Field(description="Value -> scenario, or a list of values that are scenarios themselves.")
    others: str = Field(default="error", description="Rows with other values: `error`, `drop`, or the scenario that they join.")

    @field_validator("values", mode="before")
    @classmethod
    def _mapping(cls, values: Any) -> Any:
        mapping = {value: str(value) for value in values} if isinstance(values, list) else values
        if isinstance(mapping, dict) and any(isinstance(value, bool) for value in (*mapping, *mapping.values())):
            raise ValueError("true or false among the values: YAML reads NO, yes, on and off so; write them in quotes")
        if isinstance(mapping, dict) and (other := [value for value in mapping if not isinstance(value, int | str)]):
            raise ValueError(f"{other[0]} among the values: integers and texts tell scenarios; write it in quotes")
        return mapping

    @model_validator(mode="after")
    def _several(self) -> ScenarioConfig:
        if len({type(value) for value in self.values}) > 1:
            raise ValueError("values must be all numbers or all text; write numbers that are text in quotes")
        if "all" in self.names:
            raise ValueError("'all' is the word for all scenarios together; give that scenario another name")
        if len(self.names) < 2:
            raise ValueError("two or more scenarios are needed; leave the section away where there is one")
        return self

    @property
    def names(self) -> list[str]:
        """The scenarios in the order of their ids."""
        joined = [] if self.others in ("error", "drop") else [self.others]
        return list(dict.fromkeys([*self.values.values(), *joined]))


class KeyConfig(StrictModel):
    """A column that names, groups or dates rows; no feature."""

    type: Literal["int", "string", "datetime"] = Field(description="datetime: kept as seconds since 1970, UTC.")
    column: str | None = None
    format: str | None = Field(
        default=None, description="Of a datetime: ISO 8601 when absent; a unit since 1970, such as milliseconds, or %d.%m.%Y."
    )

    @model_validator(mode="after")
    def _format_of_times(self) -> KeyConfig:
        if self.format is None:
            return self
        if self.type != "datetime":
            raise ValueError(f"format is for type: datetime, not for {self.type}")
        if self.format not in TIME_UNITS and not _dates_rows(self.format):
            raise ValueError(
                f"format: {self.format!r} is no form of a time.{did_you_mean(self.format, TIME_UNITS)} Give seconds,"
                " milliseconds, microseconds or nanoseconds since 1970, or a pattern of strptime with year, month and day, as"
                " '%d.%m.%Y %H:%M:%S'; ISO 8601 needs none"
            )
        return self


class _Shares(StrictModel):
    """Rules that give each side a share."""

    fractions: tuple[float, float, float] = Field(
        default=EIGHT_ONE_ONE, strict=False, description="Shares of train, valid and test; together 1."
    )

    @field_validator("fractions", mode="before")
    @classmethod
    def _whole(cls, given: Any) -> Any:
        numbers = isinstance(given, list | tuple) and all(type(each) in (int, float) and abs(each) <= 1 for each in given)
        whole = sum(Fraction(str(each)) for each in given) if numbers else 0  # as they are written, in decimals
        if not numbers or len(given) != 3 or whole != 1 or min(given) <= 0:
            found = f"{given!r}" + (f", together {float(whole):g}" if numbers else "")
            raise ValueError(f"give shares of train, valid and test, together 1, such as [0.9, 0.05, 0.05]; found {found}")
        return given


class RandomRule(_Shares):
    """Shares of the rows."""

    rule: Literal["random"] = "random"


class GroupRule(_Shares):
    """Shares of the values of a key; all rows with one value on one side."""

    rule: Literal["group"]
    key: str


class TimeRule(_Shares):
    """Train before the first cut, test from the second on; without cuts by shares of the rows in order of time."""

    rule: Literal["time"]
    key: str
    cuts: tuple[int | date | datetime, int | date | datetime] | None = Field(default=None, strict=False)

    @field_validator("cuts", mode="before")
    @classmethod
    def _times(cls, given: Any) -> Any:
        return [_time(each) for each in given] if isinstance(given, list | tuple) else given

    @property
    def seconds(self) -> tuple[int, int] | None:
        """The cuts as integers."""
        if self.cuts is None:
            return None
        first, second = (cut if isinstance(cut, int) else _seconds(cut) for cut in self.cuts)
        return first, second

    @model_validator(mode="after")
    def _ascending(self) -> TimeRule:
        if self.cuts is not None and "fractions" in self.model_fields_set:
            raise ValueError("cuts and fractions exclude each other: both say where train and valid end")
        if self.seconds is not None and self.seconds[0] >= self.seconds[1]:
            raise ValueError("the second cut must be after the first")
        return self


class FileRule(StrictModel):
    """The files say the side; without files for valid, one in `one_in` rows of train or test is valid."""

    rule: Literal["file"]
    train: Files
    valid: list[str] = []
    test: Files
    valid_from: Literal["train", "test"] | None = Field(default=None, description="When `valid` is absent; train by default.")
    one_in: int | None = Field(default=None, ge=2, description="When `valid` is absent; 10 by default.")

    @model_validator(mode="after")
    def _one_way_to_valid(self) -> FileRule:
        if self.valid and (self.valid_from or self.one_in):
            raise ValueError("valid has files of its own: leave valid_from and one_in away")
        return self


SplitConfig = Annotated[RandomRule | GroupRule | TimeRule | FileRule, Field(discriminator="rule")]


class TableConfig(StrictModel):
    """The whole file."""

    files: list[str] = Field(default=[], description="Files, patterns such as logs/*.csv.gz, or folders, below --raw.")
    format: Literal["csv", "json", "parquet"] | None = Field(default=None, description="By the files' names, when absent.")
    csv: CsvConfig = CsvConfig()
    missing: list[str] | dict[str, list[str]] = Field(
        default=[], description="Texts that mean a missing value, besides an empty cell: of all columns, or column -> its own."
    )
    strip: bool = Field(default=False, description="Blanks and tabs around a text are dropped.")
    features: dict[Name, FeatureConfig] = Field(min_length=1)
    tasks: list[TaskConfig] = Field(min_length=1)
    scenario: ScenarioConfig | None = None
    keys: dict[Name, KeyConfig] = {}
    group_key: str | None = Field(default=None, description="The key, int or string, by which GAUC groups rows: the user.")
    weight: str | None = Field(default=None, description="A column of numbers, finite and not negative: what each row counts.")
    split: SplitConfig = RandomRule()
    duplicates: Duplicates = Field(
        default="keep", description="Rows that are equal to an earlier one go where the split says, nowhere, or to its side."
    )
    terms: str = Field(default="", description="Terms of use of the data, shown with results.")

    @field_validator("missing", mode="before")
    @classmethod
    def _in_quotes(cls, missing: Any) -> Any:
        for marks in missing.values() if isinstance(missing, dict) else [missing]:
            if not isinstance(marks, list):
                raise ValueError(f"give a list of texts, such as ['NULL', '?'], or COLUMN: [...]; found {marks!r}")
            wrong = [mark for mark in marks if not isinstance(mark, str)]
            if wrong:
                raise ValueError(
                    f"{wrong[0]!r} is no text: write the marks in quotes, as YAML reads NULL and ~ as nothing, no as false and"
                    " -1 as a number"
                )
        return missing

    @property
    def cells(self) -> Cells:
        """What is done to a cell first."""
        if isinstance(self.missing, dict):
            return Cells({column: tuple(marks) for column, marks in self.missing.items()}, self.strip)
        return Cells(tuple(self.missing), self.strip)

    @model_validator(mode="after")
    def _consistent(self) -> TableConfig:
        if isinstance(self.split, FileRule) == bool(self.files):
            raise ValueError(
                "split.train and split.test name the files: leave `files` away"
                if self.files
                else "`files` is missing: name the files that hold the rows"
            )
        if self.format not in (None, "csv") and "csv" in self.model_fields_set:
            raise ValueError(f"the section csv does not go with format: {self.format}")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have one name: {', '.join(names)}")
        if self.tasks[-1].implied_by_next:
            raise ValueError(f"tasks.{names[-1]}.implied_by_next: no task follows")
        for name, feature in self.features.items():
            if isinstance(feature, IdFeature) and feature.table is not None:
                self._check_shared(name, feature)
            if isinstance(feature, NumberFeature) and feature.indicator and indicator_name(name) in self.features:
                raise ValueError(f"features.{name}.indicator: there is a feature '{indicator_name(name)}'; rename that")
            if not feature.allow_label_feature:
                self._check_no_label(name, feature.column or name)
        if self.scenario is not None:
            marks = self.cells.marks(self.scenario.column)
            both = [value for value in self.scenario.values if str(value) in marks]
            if both:
                raise ValueError(
                    f"scenario.values: {both[0]!r} means a missing value there, too: leave it out of one of them, or give"
                    " missing for single columns, {COLUMN: [...]}"
                )
        if self.group_key is not None:
            self._check_key("group_key", self.group_key, ("int", "string"))
        own = [*PLACE_KEYS, *([hashed_key(self.group_key)] if self.group_key is not None else [])]
        if taken := next((name for name in own if name in self.keys), None):
            raise ValueError(f"keys.{taken}: rows get a key of this name by themselves; rename yours")
        if isinstance(self.split, GroupRule):
            self._check_key("split.key", self.split.key, ("int", "string", "datetime"))
        if isinstance(self.split, TimeRule):
            self._check_key("split.key", self.split.key, ("int", "datetime"))
            dates = any(isinstance(cut, date) for cut in self.split.cuts or ())
            if dates and self.keys[self.split.key].type == "int":
                raise ValueError(f"split.cuts are dates, but key '{self.split.key}' is int: give integers, or type: datetime")
        return self

    def _check_no_label(self, name: str, column: str) -> None:
        for task in self.tasks:
            if column in task.columns:
                raise ValueError(
                    f"features.{name} is made of column '{column}', and so is the label of task '{task.name}' ({task.label}): a"
                    " model would read the answer. Leave the feature away; or, where the column is known before the label is,"
                    f" say so: features.{name}.allow_label_feature: true"
                )

    def _check_shared(self, name: str, feature: IdFeature) -> None:
        other = self.features.get(str(feature.table))
        if not isinstance(other, IdFeature) or other is feature or other.table is not None:
            owners = [n for n, f in self.features.items() if isinstance(f, IdFeature) and f.table is None]
            raise ValueError(
                f"features.{name}.table: '{feature.table}' is no feature of ids with a table of its own."
                f"{did_you_mean(str(feature.table), owners)} Such are: {', '.join(owners) or 'none'}"
            )
        if feature.type != other.type:
            raise ValueError(f"features.{name} is {feature.type}, but '{feature.table}', whose table it shares, {other.type}")

    def _check_key(self, where: str, key: str, types: tuple[str, ...]) -> None:
        if key not in self.keys:
            raise ValueError(f"{where}: '{key}' is not among the keys.{did_you_mean(key, self.keys)} Declare it under `keys:`")
        if self.keys[key].type not in types:
            raise ValueError(f"{where}: key '{key}' is of type {self.keys[key].type}; {' or '.join(types)} is needed")


def read_table_config(path: Path) -> TableConfig:
    """Raises ConfigError naming file, key, what is allowed, and the nearest valid key."""
    return validate_section(TableConfig, read_yaml(path), prefix="", source=str(path))


def _dates_rows(pattern: str) -> bool:
    """Whether strptime can read by the pattern, and finds a whole date."""
    some_day = datetime(2023, 11, 30, 13, 45, 7, tzinfo=UTC)
    try:
        return datetime.strptime(some_day.strftime(pattern), pattern).date() == some_day.date()
    except ValueError:
        return False


def _time(cut: Any) -> Any:
    """A date or a time that is given as text, as quotes, JSON and Python do; what is no text as it is. Raises ValueError."""
    if isinstance(cut, int | date):
        return cut
    if isinstance(cut, Integral):  # of NumPy or pandas
        return int(cut)
    if isinstance(cut, str):
        with contextlib.suppress(ValueError):
            return date.fromisoformat(cut) if len(cut) == len("2024-05-31") else datetime.fromisoformat(cut)
    raise ValueError(
        f"{cut!r} is no time: give dates or times in ISO 8601, such as 2024-05-31 or 2024-05-31T12:00:00Z, or integers"
    )


def _seconds(cut: date) -> int:
    moment = cut if isinstance(cut, datetime) else datetime(cut.year, cut.month, cut.day)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
