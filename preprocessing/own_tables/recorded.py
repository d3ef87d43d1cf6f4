"""The configuration of a table as its manifest keeps it, for rows that are encoded as that table was."""

from __future__ import annotations

from typing import Any

from mmlrec.errors import ConfigError
from mmlrec.schema import DatasetManifest
from mmlrec.yaml_config import validate_section
from preprocessing.own_tables.config import FileRule, RandomRule, TableConfig

#: Options that say how the files are written, or how large a managed table is, not what is made of them.
_NO_ENCODING: Any = {"column": True, "separator": True, "allow_label_feature": True, "managed": {"slots"}}


def recorded_table_config(manifest: DatasetManifest) -> TableConfig:
    """The configuration of the manifest of a table.

    Raises:
        ConfigError: this release cannot read it.
    """
    content = dict(manifest.preprocessing["config"])
    scenario, encoding = content.get("scenario"), manifest.encoding
    if scenario and encoding is not None and encoding.scenario is not None:
        # JSON has made texts of numbers, which the identity keeps.
        numbers = {str(value): value for value, _ in encoding.scenario["map"]}
        values = {numbers.get(value, value): name for value, name in scenario["values"].items()}
        content["scenario"] = {**scenario, "values": values}
    if "split" in content:  # without its rule, where that is the default
        content["split"] = {"rule": "random", **content["split"]}
    return validate_section(TableConfig, content, prefix="", source=f"the configuration of '{manifest.name}' in its manifest")


def with_files(config: TableConfig, patterns: list[str] | None, *, one_split: bool) -> TableConfig:
    """The configuration for other files, or for all that it divides into splits, where all rows get into one.

    Raises:
        ConfigError: its files say which rows are train, valid and test.
    """
    split = config.split
    if not isinstance(split, FileRule):
        return config.model_copy(update={"files": patterns}) if patterns else config
    if not one_split:
        if patterns:
            raise ConfigError("--files: the files of this table say the split. Name one for all rows, such as --split train.")
        return config
    return config.model_copy(update={"files": patterns or [*split.train, *split.valid, *split.test], "split": RandomRule()})


def encoded_parts(config: TableConfig) -> dict[str, Any]:
    """What the configuration makes of the cells, part by part: equal parts encode alike."""
    cells = config.cells
    parts: dict[str, Any] = {
        f"feature {name}": feature.model_dump(mode="json", exclude=_NO_ENCODING) | cells.facts(feature.column or name)
        for name, feature in config.features.items()
    }
    parts["order of features"] = list(config.features)
    parts["tasks"] = [task.model_dump(mode="json", exclude={"label"}) for task in config.tasks]
    if config.scenario is not None:
        scenario = config.scenario
        parts["scenario"] = [scenario.names, list(scenario.values.items()), scenario.others, cells.facts(scenario.column)]
    return parts
