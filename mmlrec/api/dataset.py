"""`mmlrec.prepare`: a DataFrame or an Arrow table becomes a dataset folder, as `python -m preprocessing table` makes one."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

import mmlrec
from mmlrec.api.frames import Frame, arrow_table
from mmlrec.api.short_forms import ShortForms
from mmlrec.api.temporary import TemporaryFolder
from mmlrec.errors import ConfigError, DataError
from mmlrec.schema import DatasetManifest, Setting
from mmlrec.storage.places import Place, place
from mmlrec.yaml_config import validate_section
from preprocessing.datasets.table import Table
from preprocessing.describing.notes import block, look_at_this
from preprocessing.engines.local import build
from preprocessing.own_tables.config import TableConfig
from preprocessing.reading.raw_files import RawFolder

_SOURCE = "mmlrec.prepare"
#: The name of the file that a frame is written to, and so of all rows' key `source_file`.
_FILE = "frame.parquet"


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
    features: Sequence[str] | Mapping[str, Any],
    tasks: Sequence[Any] | Mapping[str, Any],
    scenario: str | Mapping[str, Any] | None = None,
    keys: Sequence[str] | Mapping[str, Any] = (),
    group_key: str | None = None,
    weight: str | None = None,
    split: str | Mapping[str, Any] = "random",
    missing: Sequence[str] | Mapping[str, Sequence[str]] = (),
    strip: bool = False,
    duplicates: str = "keep",
    terms: str = "",
    out: str | Place | None = None,
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
        split: "random"; or the section, such as {"rule": "time", "key": "time"}.
        missing: texts that mean a missing cell; or column -> its own.
        strip: drop blanks and tabs around texts.
        duplicates: "keep", "drop" or "keep_together": what becomes of rows that are equal to an earlier one.
        terms: terms of use of the data, kept in the manifest.
        out: the folder to make, or s3://bucket/name; it must not exist. None: a temporary one, deleted with the last object
            that uses it (this dataset, a run trained on it), or when Python ends.
        seed: of the split.

    Returns:
        The dataset. Row i of the frame (from 0) has the keys `source_file` "frame.parquet" and `source_line` i + 1.

    Raises:
        ConfigError: an argument cannot be used; the message begins with its name.
        DataError: cells cannot be used; the message names column and row. Or `out` is there already, or cannot be written.
    """
    short = ShortForms(frame)
    given = {
        "files": [_FILE],
        "features": short.features(features),
        "tasks": short.tasks(tasks),
        "scenario": short.scenario(scenario),
        "keys": short.keys(keys),
        "group_key": group_key,
        "weight": weight,
        "split": {"rule": split} if isinstance(split, str) else split,
        "missing": dict(missing) if isinstance(missing, Mapping) else list(missing),
        "strip": strip,
        "duplicates": duplicates,
        "terms": terms,
    }
    if isinstance(given["split"], Mapping) and given["split"].get("rule") == "file":
        raise ConfigError("split: rule 'file' is for several files. Of a frame give random, group or time.")
    config = validate_section(TableConfig, given, prefix="", source=_SOURCE)
    table = arrow_table(frame, _columns(config))
    held = TemporaryFolder("dataset") if out is None else None
    there = place(out) if held is None else held.path / "data"
    if held is None and there.exists():
        raise DataError(
            f"out: {there} exists. Give another folder, or delete it; mmlrec.Dataset({str(there)!r}) loads a dataset."
        )
    for line in short.concluded:
        sys.stderr.write(f"{_SOURCE}: {line}\n")
    with tempfile.TemporaryDirectory(prefix="mmlrec-frame-") as folder:
        raw = Path(folder)
        pq.write_table(table, raw / _FILE)
        content = config.model_dump(mode="json", exclude_defaults=True)
        if config.scenario is not None:  # of JSON all keys are texts
            content["scenario"]["values"] = config.scenario.values
        (raw / "table.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        options = argparse.Namespace(config=raw / "table.yaml", raw=raw, seed=seed, max_bad_rows=0, parity=False)
        try:
            dataset = Table(options)
            recorded = {name: value for name, value in sorted(vars(options).items()) if name != "raw"}
            recorded["mmlrec"] = mmlrec.__version__
            files = RawFolder(raw, dataset.raw_files, "")
            manifest = build(dataset, files, there, seed=seed, parity=False, options=recorded)
        except DataError as error:
            raise DataError(str(error).replace(f"{raw / _FILE}", "frame")) from error
    if notes := block(look_at_this(manifest, there)):
        sys.stderr.write(f"{notes}\n")
    return Dataset(there, _held=held)


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
