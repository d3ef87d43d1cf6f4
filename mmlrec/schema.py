"""The data contract between preprocessing and training: what a dataset folder holds.

A dataset folder is `manifest.json`, `vocab/` and one folder of Parquet parts for each split. Columns of the parts:

* `<feature>`          sparse: int64, one id a row; multi: list<int64>; dense: float32
* `<feature>.weight`   list<float32>, beside a weighted multi-valued feature, of the same lengths
* `label.<task>`       float32; null = label missing
* `sample.scenario`    int64 in 0..S-1, when the dataset has scenarios
* `sample.weight`      float32, when rows are weighted
* `key.<name>`         int64 or string; identifies the row, never a feature

Ids are table rows: 0 = missing, rare or unseen; 1..V-1 = vocabulary entries or hash buckets. Those of a managed table are keys
(mmlrec.hashing), any int64: 0 = missing; which row a key has, if any, is what training finds.
The rows of a split are shuffled on disk already. This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from enum import StrEnum
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmlrec.errors import DataError, UserAdvice
from mmlrec.storage.places import Place, place

#: Versions that this release reads; it writes the lowest one that says all: docs/architecture.md. 2: tables may be managed.
READABLE_VERSIONS = (1, 2)
#: Of the facts in `Encoding`, and of how they become digests: docs/datasets/encoding.md.
ENCODING_FORM = 1
MANIFEST = "manifest.json"
SCENARIO_COLUMN = "sample.scenario"
WEIGHT_COLUMN = "sample.weight"
SPLITS = ("train", "valid", "test")
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")


def label_column(task: str) -> str:
    """Name of the Parquet column that holds a task's label."""
    return f"label.{task}"


def key_column(key: str) -> str:
    """Name of the Parquet column that holds a key."""
    return f"key.{key}"


class Setting(StrEnum):
    """What a model predicts: several tasks, one task in several scenarios, or both."""

    MTL = "mtl"
    MSL = "msl"
    MTMSL = "mtmsl"


class _Contract(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Model = TypeVar("_Model", bound=_Contract)


def _read(kind: type[_Model], content: Any, source: str) -> _Model:
    """A part of the contract as some release has written it: keys that this one does not know are told and passed over.

    Raises:
        ValidationError: anything else is wrong.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        unknown = [problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"]
        if len(unknown) < error.error_count():
            raise
    content = json.loads(json.dumps(content))
    for *path, last in unknown:
        place = content
        for key in path:
            place = place[key]
        del place[last]
    names = ", ".join(".".join(map(str, keys)) for keys in unknown)
    warnings.warn(
        f"{source} has keys that this release does not know: {names}. They are passed over: a later release has written them,"
        " or they are misspelt.",
        UserAdvice,
        stacklevel=3,
    )
    return kind.model_validate(content)


def facts_digest(facts: Any) -> str:
    """sha256, in hexadecimal, of the canonical JSON of facts.

    Canonical: keys sorted, no blanks, everything beyond ASCII escaped, floats as the shortest decimal that reads back as the
    same float64 (as Python writes them), no NaN.
    """
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Encoding(_Contract):
    """Identity of an encoding: all that turns a raw cell into an input, as facts, part by part.

    Equal facts give equal inputs. docs/datasets/encoding.md lists them. Made by `Encoding.of`.
    """

    form: int = ENCODING_FORM
    digest: str = Field(description="sha256 over form, features, tables and scenario; see `facts_digest`.")
    features: dict[str, dict[str, Any]] = Field(description="Feature -> what its cells mean, and how numbers are scaled.")
    tables: dict[str, dict[str, Any]] = Field(description="Table -> how raw values become its ids.")
    scenario: dict[str, Any] | None = Field(default=None, description="Scenarios in the order of their ids, and their rule.")
    labels: dict[str, dict[str, Any]] = Field(default={}, description="Task -> the rule of its label; not in the digest.")

    @model_validator(mode="after")
    def _own_digest(self) -> Encoding:
        if self.form == ENCODING_FORM and self.digest != self._digest(self.features, self.tables, self.scenario):
            raise ValueError("the encoding's digest is not that of its facts: it was changed by hand")
        return self

    @staticmethod
    def _digest(features: Any, tables: Any, scenario: Any) -> str:
        return facts_digest({"form": ENCODING_FORM, "features": features, "tables": tables, "scenario": scenario})

    @classmethod
    def of(
        cls,
        features: dict[str, dict[str, Any]],
        tables: dict[str, dict[str, Any]],
        scenario: dict[str, Any] | None,
        labels: dict[str, dict[str, Any]],
    ) -> Encoding:
        """The encoding of these facts, which JSON can hold."""
        digest = cls._digest(features, tables, scenario)
        return cls(digest=digest, features=features, tables=tables, scenario=scenario, labels=labels)

    @classmethod
    def read(cls, content: Any, source: str) -> Encoding | None:
        """As a file holds it; None for nothing.

        Raises:
            DataError: it is damaged.
        """
        if content is None:
            return None
        try:
            return _read(cls, content, source)
        except ValidationError as error:
            raise DataError(f"{source}: its encoding is damaged: {error}.") from error

    def comparable(self, other: Encoding | None) -> bool:
        """Whether both have the form that this release knows."""
        return other is not None and self.form == other.form == ENCODING_FORM


class Table(_Contract):
    """One embedding table. `num_rows` counts row 0 (missing, rare or unseen)."""

    name: str
    num_rows: int = Field(ge=1)
    vocabulary: str | None = Field(default=None, description="Parquet file of raw value, id and count, relative to the folder.")
    hash_seed: int | None = Field(
        default=None, description="Ids are hashes of raw values, see mmlrec.hashing; None = they are not."
    )
    num_hashes: int = Field(default=1, ge=1, description="Ids of one raw value, when hashed.")
    managed: bool = Field(
        default=False,
        exclude_if=lambda managed: not managed,  # the manifests of other tables stay what they were, to the byte
        description="Ids are keys of raw values, which earn and lose the rows 1..num_rows - 1 in training.",
    )

    @model_validator(mode="after")
    def _keyed(self) -> Table:
        if self.managed and (self.hash_seed is None or self.num_hashes > 1 or self.vocabulary is not None):
            raise ValueError(f"table {self.name!r} is managed: it needs a hash_seed, one hash, and no vocabulary")
        if self.managed and self.num_rows < 2:
            raise ValueError(f"table {self.name!r} is managed: it needs a row besides row 0")
        return self

    @model_validator(mode="after")
    def _named(self) -> Table:
        if not _NAME.match(self.name):
            raise ValueError(f"table name {self.name!r} may hold letters, digits, '_' and '-' only")
        return self


class Feature(_Contract):
    """One input column. Sparse and multi features name their table; several features may share one."""

    name: str
    kind: Literal["sparse", "multi", "dense"]
    table: str | None = None
    pooling: Literal["mean", "sum"] = "mean"
    weighted: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Feature:
        if not _NAME.match(self.name):
            raise ValueError(f"feature name {self.name!r} may hold letters, digits, '_' and '-' only")
        if (self.kind == "dense") != (self.table is None):
            raise ValueError(f"feature {self.name!r}: sparse and multi features need a table, dense ones have none")
        if self.weighted and (self.kind != "multi" or self.pooling != "sum"):
            raise ValueError(f"feature {self.name!r}: weights need kind 'multi' and pooling 'sum'")
        return self


class Task(_Contract):
    """One label. `implied_by_next` marks a funnel: the next task in order is positive only where this one is."""

    name: str
    kind: Literal["binary", "regression"] = "binary"
    role: str | None = Field(default=None, description="Role in a probability chain, such as ctr or ctcvr.")
    implied_by_next: bool = False


class Scenario(_Contract):
    """What divides the rows: the raw column, and its values in the order of their ids 0..S-1."""

    name: str
    values: list[str] = Field(min_length=2)

    @model_validator(mode="after")
    def _distinct(self) -> Scenario:
        if len(set(self.values)) < len(self.values) or "all" in self.values:
            raise ValueError(f"scenarios must differ, and none may be called 'all', which stands for all rows: {self.values}")
        return self


class Part(_Contract):
    """One Parquet file, its path relative to the dataset folder."""

    path: str
    num_rows: int
    num_bytes: int
    sha256: str


class Split(_Contract):
    """One of train, valid, test, or one of any name that holds all rows.

    `label_counts[task][scenario or 'all']` = [labelled rows, positive rows].
    """

    parts: list[Part]
    num_rows: int
    scenario_rows: dict[str, int] = {}
    label_counts: dict[str, dict[str, tuple[int, int]]]


class DatasetManifest(_Contract):
    """`manifest.json`: everything training and evaluation know about a dataset."""

    schema_version: int = Field(default=1, description="Set by the tables: 2 where one is managed.")
    name: str
    tables: list[Table]
    features: list[Feature]
    tasks: list[Task]
    scenario: Scenario | None = None
    keys: list[str] = []
    group_key: str | None = Field(default=None, description="The int64 key by which GAUC groups rows (the user).")
    num_lanes: int = Field(ge=1, description="Lanes of the reading order; see mmlrec.data.reader.")
    row_group_size: int = Field(ge=1)
    splits: dict[str, Split] = Field(
        description="train, valid and test; or one of any name. Of train alone anything was fitted."
    )
    raw_files: dict[str, str] = Field(default={}, description="Raw file name -> sha256.")
    terms: str = Field(default="", description="Terms of use of the raw data, shown to the user.")
    parity: bool = Field(default=False, description="Encoded as the reference benchmark does: vocabularies fitted on all rows.")
    statistics: dict[str, Any] = Field(default={}, description="What the preprocessing counted or knows, e.g. bayes_auc.")
    preprocessing: dict[str, Any] = Field(default={}, description="The resolved preprocessing options.")
    encoding: Encoding | None = Field(default=None, description="What turned raw cells into inputs; absent: not recorded.")

    @model_validator(mode="before")
    @classmethod
    def _lowest_version(cls, content: Any) -> Any:
        """Of a manifest that is made, not read: an earlier release must not take keys for rows."""
        if isinstance(content, dict) and "schema_version" not in content:
            managed = any(isinstance(table, Table) and table.managed for table in content.get("tables", ()))
            return {**content, "schema_version": 2 if managed else 1}
        return content

    @model_validator(mode="after")
    def _consistent(self) -> DatasetManifest:
        if self.schema_version < 2 and (managed := [table.name for table in self.tables if table.managed]):
            raise ValueError(f"schema version {self.schema_version} has no managed tables: {', '.join(managed)}")
        tables = {table.name for table in self.tables}
        for feature in self.features:
            if feature.table is not None and feature.table not in tables:
                raise ValueError(f"feature {feature.name!r} names table {feature.table!r}, which is not listed")
        for what, names in (
            ("feature", [f.name for f in self.features]),
            ("table", [t.name for t in self.tables]),
            ("task", [t.name for t in self.tasks]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{what} names are not unique: {names}")
        if self.group_key is not None and self.group_key not in self.keys:
            raise ValueError(f"group_key {self.group_key!r} is not among the keys {self.keys}")
        return self

    @property
    def sparse_features(self) -> list[Feature]:
        """Features with an embedding table, in order: the fields of the model."""
        return [f for f in self.features if f.kind != "dense"]

    @property
    def dense_features(self) -> list[Feature]:
        """Numeric features, in order."""
        return [f for f in self.features if f.kind == "dense"]

    @property
    def by_name(self) -> dict[str, Table]:
        """The tables by their names, made anew at each call: to be kept where there may be thousands."""
        return {table.name: table for table in self.tables}

    def table(self, name: str) -> Table:
        """The table of that name."""
        return next(t for t in self.tables if t.name == name)

    def train_moments(self, task: str) -> dict[str, tuple[float, float]]:
        """Scenario or "all" -> mean and deviation of a regression task's labels in train; empty where nothing is recorded.

        Scenarios without a label are left out.
        """
        values = self.statistics.get("label_values", {}).get(task, {}).get("train", {})
        return {name: (of["mean"], of["deviation"]) for name, of in values.items() if of["mean"] is not None}

    def mean_length(self, feature: Feature) -> float | None:
        """Mean number of ids of a train row; None where it is not recorded, and for numbers."""
        if feature.kind == "multi":
            found: float | None = self.statistics.get("mean_lengths", {}).get(feature.name)
            return found
        return 1.0 if feature.kind == "sparse" else None

    def text(self) -> str:
        """Content of `manifest.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    def save(self, folder: Place) -> None:
        """Write `manifest.json`. Preprocessing calls this last, inside the temporary folder that it then renames or uploads."""
        (folder / MANIFEST).write_text(self.text(), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Place) -> DatasetManifest:
        """Read and check a dataset folder's manifest. Keys that this release does not know are told and passed over.

        Raises:
            DataError: the folder or its manifest is missing, unreadable, or of a schema version that is not read.
        """
        path = place(folder) / MANIFEST
        if not path.is_file():
            if path.parent.is_file():
                raise DataError(
                    f"{folder} is not a dataset: it is a file. Raw rows are encoded first: python -m preprocessing NAME --raw"
                    " RAW_DIR --out DATASET; those that a run is to score or to be measured on with --like RUN beside."
                )
            hint = "the folder does not exist" if not path.parent.is_dir() else "it has no manifest.json"
            raise DataError(
                f"{folder} is not a dataset: {hint}. Make one with: python -m preprocessing NAME --raw RAW_DIR --out {folder}"
            )
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            if "\\u" in text:  # half a surrogate pair can be written so, but is no text and could not be written again
                json.dumps(content, ensure_ascii=False).encode()
            version = content.get("schema_version") if isinstance(content, dict) else None
            if version not in READABLE_VERSIONS:
                read = ", ".join(map(str, READABLE_VERSIONS))
                raise DataError(f"{path}: schema version {version}, this release reads {read}. Run the preprocessing again.")
            return _read(cls, content, str(path))
        except (ValidationError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error}. Run the preprocessing again.") from error
