"""`mmlrec.prepare`: a DataFrame or an Arrow table becomes a dataset folder, as `python -m preprocessing table` makes one."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pyarrow as pa
import yaml

from mmlrec.api.frames import Frame, arrow_table, columns_of, write_frame
from mmlrec.api.short_forms import ShortForms
from mmlrec.api.temporary import TemporaryFolder
from mmlrec.encoding.folders import encoder_folder
from mmlrec.errors import ConfigError, DataError, UserError
from mmlrec.schema import DatasetManifest, Setting
from mmlrec.storage.places import Place, place
from mmlrec.storage.scratch import ScratchFolder
from mmlrec.yaml_config import validate_section
from preprocessing.command_line import make
from preprocessing.describing.notes import block, look_at_this
from preprocessing.own_tables.config import FileRule, RandomRule, TableConfig
from preprocessing.own_tables.recorded import recorded_table_config
from preprocessing.split_rules import Duplicates

_SOURCE = "mmlrec.prepare"
#: The name of the file that a frame is written to, and so of all rows' key `source_file`.
_FILE = "frame.parquet"
#: Options of the command that messages name, and that are arguments here.
_OPTIONS = re.compile(r"--(out|overwrite|like|extend|split|seed|duplicates)\b")


class Dataset:
    """A dataset folder: Parquet parts of its splits, vocabularies, and `manifest.json`.

    Args:
        path: the folder, or s3://bucket/name.

    Attributes:
        path: the same. manifest: what the folder holds, with counts and statistics.

    Raises:
        DataError: it is no dataset folder.
    """

    path: Place
    manifest: DatasetManifest

    def __init__(self, path: str | Place, *, _held: object = None) -> None:
        self.path = place(path)
        self.manifest = DatasetManifest.load(self.path)
        self._held = _held  # a temporary folder, which goes with this object

    @property
    def setting(self) -> Setting:
        """What it can train: msl with scenarios and one task, mtmsl with scenarios and several, mtl without."""
        if self.manifest.scenario is None:
            return Setting.MTL
        return Setting.MTMSL if len(self.manifest.tasks) > 1 else Setting.MSL

    @property
    def section(self) -> dict[str, Any]:
        """The section `dataset` of a training configuration for all that it holds."""
        tasks = [task.name for task in self.manifest.tasks]
        return {"path": str(self.path), "setting": str(self.setting), "tasks": tasks}

    def __repr__(self) -> str:
        manifest = self.manifest
        rows = ", ".join(f"{name} {split.num_rows:,}" for name, split in manifest.splits.items())
        kinds = {"sparse": "id", "multi": "ids", "dense": "number"}
        lines = [
            f"Dataset('{self.path}'){' (temporary)' if self._held is not None else ''}",
            f"  rows: {rows}",
            f"  features: {', '.join(f'{feature.name} ({kinds[feature.kind]})' for feature in manifest.features)}",
            f"  tasks: {', '.join(task.name for task in manifest.tasks)}",
        ]
        if manifest.scenario is not None:
            lines.append(f"  scenario {manifest.scenario.name}: {', '.join(manifest.scenario.values)}")
        return "\n".join(lines)


def prepare(
    frame: Frame,
    *,
    features: Sequence[str] | Mapping[str, Any] | None = None,
    tasks: Sequence[Any] | Mapping[str, Any] | None = None,
    scenario: str | Mapping[str, Any] | None = None,
    keys: Sequence[str] | Mapping[str, Any] | None = None,
    group_key: str | None = None,
    weight: str | None = None,
    split: str | Mapping[str, Any] | None = None,
    missing: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    strip: bool | None = None,
    duplicates: str | None = None,
    terms: str | None = None,
    like: Dataset | str | Place | Any = None,
    extend: Dataset | str | Place | Any = None,
    out: str | Place | None = None,
    overwrite: bool = False,
    seed: int = 2024,
) -> Dataset:
    """Encode raw rows, so that a model can be trained on them: vocabularies, scales and splits, in a dataset folder.

    Sections mean what they mean in the YAML of `python -m preprocessing table` (docs/datasets/table.md). Their short forms
    are told by the types of columns (docs/python.md); what was concluded is printed, and nothing else is guessed.

    Args:
        frame: raw rows. In a DataFrame None, NaN, NaT and NA are missing cells; its index is not read.
        features: columns, or name -> "id", "ids", "number" or all options.
        tasks: label columns of 0 and 1, in order; or name -> a label such as "rating > 3" or all options of the task.
        scenario: a column, whose values are the scenarios in sorted order; or the section with `column` and `values`.
        keys: columns that name, group or date rows and are no features; or name -> "int", "string", "datetime" or all options.
        group_key: the key by which GAUC groups rows: the user.
        weight: a column of numbers: what each row counts.
        split: "random"; or the section, such as {"rule": "time", "key": "time"}. With `like` and `extend` the name of the one
            split that gets all rows ("test" with `like` unless told), or "train,valid,test" for the rule of the other dataset.
        missing: texts that mean a missing cell; or column -> its own.
        strip: drop blanks and tabs around texts.
        duplicates: "keep", "drop" or "keep_together": what becomes of rows that are equal to an earlier one.
        terms: terms of use of the data, kept in the manifest.
        like: a dataset or a run, or the folder of one: encode as its rows were encoded, with its sections. Labels and keys may
            be absent.
        extend: the same, with vocabularies that grow: values that are new in train get ids behind the known ones.
        out: the folder to make, or s3://bucket/name. One that holds the dataset of the same rows and arguments is taken as it
            is. None: a temporary folder, deleted with the last object that uses it (this dataset, a run trained on it), or when
            Python ends.
        overwrite: replace the dataset in `out`.
        seed: of the split.

    Returns:
        The dataset. Row i of the frame (from 0) has the keys `source_file` "frame.parquet" and `source_line` i + 1.

    Raises:
        ConfigError: an argument cannot be used; the message begins with its name.
        DataError: cells cannot be used; the message names column and row. Or `out` holds something else, or cannot be written.
    """
    sections = {
        "features": features,
        "tasks": tasks,
        "scenario": scenario,
        "keys": keys,
        "group_key": group_key,
        "weight": weight,
        "missing": missing,
        "strip": strip,
        "terms": terms,
    }
    columns_of(frame)
    if not len(frame):
        raise DataError("frame: it has no rows.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed: a whole number from 0 to 2^63 - 1 is needed, found {seed!r}.")
    if duplicates not in (None, *get_args(Duplicates)):
        raise ConfigError(f"duplicates: {duplicates!r} is none of {', '.join(get_args(Duplicates))}.")
    arguments = ["--seed", str(seed), *(["--overwrite"] if overwrite else [])]
    arguments += [] if duplicates is None else ["--duplicates", duplicates]
    if like is None and extend is None:
        content, table = _own(frame, sections, split)
    else:
        content, table, more = _as_others(frame, sections, split, like, extend)
        arguments += more
    held = None if out is not None else TemporaryFolder("dataset")
    there = held.path / "data" if held is not None else place(str(out))
    with ScratchFolder("frame") as scratch:
        raw = scratch.path
        write_frame(table, raw / _FILE)
        (raw / "table.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        try:
            made = make(["table", "--config", str(raw / "table.yaml"), "--raw", str(raw), "--out", str(there), *arguments])
        except UserError as error:
            told = str(error).replace(f"{raw / _FILE}", "frame").replace(f"{raw / 'table.yaml'}", _SOURCE)
            raise type(error)(_OPTIONS.sub(r"\1", told)) from error
    if notes := block(look_at_this(made.manifest, there)):
        sys.stderr.write(_OPTIONS.sub(r"\1", notes) + "\n")
    return Dataset(there, _held=held)


def _own(frame: Frame, sections: dict[str, Any], split: Any) -> tuple[dict[str, Any], pa.Table]:
    """The configuration of the sections, and the columns that it needs."""
    short = ShortForms(frame)
    for name in ("features", "tasks"):
        if sections[name] is None:
            raise ConfigError(f"{name}: needed, unless `like` or `extend` names a dataset that is encoded already.")
    given = {name: value for name, value in sections.items() if value is not None}
    given |= {"files": [_FILE], "features": short.features(given["features"]), "tasks": short.tasks(given["tasks"])}
    given |= {name: getattr(short, name)(given[name]) for name in ("scenario", "keys") if name in given}
    if split is not None:
        given["split"] = {"rule": split} if isinstance(split, str) else split
        if isinstance(given["split"], Mapping) and given["split"].get("rule") == "file":
            raise ConfigError("split: rule 'file' is for several files. Of a frame give random, group or time.")
    config = validate_section(TableConfig, given, prefix="", source=_SOURCE)
    table = arrow_table(frame, _columns(config))
    for line in short.concluded:
        sys.stderr.write(f"{_SOURCE}: {line}\n")
    return _content(config), table


def _as_others(
    frame: Frame, sections: dict[str, Any], split: Any, like: Any, extend: Any
) -> tuple[dict[str, Any], pa.Table, list[str]]:
    """The configuration of another dataset for this frame, the columns that there are of it, and options of the command."""
    option, other = ("like", like) if extend is None else ("extend", extend)
    if like is not None and extend is not None:
        raise ConfigError("like and extend exclude each other: vocabularies stay as they are, or grow.")
    if given := [name for name, value in sections.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)}: with `{option}` these are as in the other dataset; leave them away.")
    if split is not None and not isinstance(split, str):
        raise ConfigError(f"split: with `{option}` give the name of one split, or 'train,valid,test'; found {split!r}.")
    folder = place(str(getattr(other, "path", other)))
    manifest = DatasetManifest.load(encoder_folder(folder))
    if "config" not in manifest.preprocessing:
        raise ConfigError(
            f"{option}: {folder} is of the dataset '{manifest.name}', whose raw files no frame stands for. Encode new ones with"
            f" python -m preprocessing {manifest.name} --{option} {folder}; run.predict(frame) takes a frame of its features."
        )
    config = recorded_table_config(manifest)
    if isinstance(config.split, FileRule):
        if (split or ("test" if option == "like" else ",")).count(","):
            raise ConfigError(f"split: in {folder} the files say the split, and a frame is one. Name a split, such as 'train'.")
        config = config.model_copy(update={"split": RandomRule()})
    columns, present = _columns(config), set(columns_of(frame))
    needed = {name: where for name, where in columns.items() if where.startswith(("features.", "scenario")) or name in present}
    content = {name: section for name, section in _content(config).items() if name not in ("csv", "format")}
    arguments = [f"--{option}", str(folder), *([] if split is None else ["--split", split])]
    return content | {"files": [_FILE]}, arrow_table(frame, needed), arguments


def _content(config: TableConfig) -> dict[str, Any]:
    """The configuration as YAML can hold it."""
    content: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    if config.scenario is not None:  # of JSON all keys are texts
        content["scenario"]["values"] = config.scenario.values
    return content


def _columns(config: TableConfig) -> dict[str, str]:
    """The columns that a configuration reads -> the first argument that names each."""
    found: dict[str, str] = {}
    for name, feature in config.features.items():
        found.setdefault(feature.column or name, f"features.{name}")
    for task in config.tasks:
        for column in task.columns:
            found.setdefault(column, f"tasks.{task.name}")
    if config.scenario is not None:
        found.setdefault(config.scenario.column, "scenario")
    for name, key in config.keys.items():
        found.setdefault(key.column or name, f"keys.{name}")
    if config.weight is not None:
        found.setdefault(config.weight, "weight")
    return found
