"""The encoder of a dataset folder: its manifest as facts, its vocabulary files as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.encoding.specs import FACTS_FORM, SCENARIO_COLUMN
from mmlrec.encoding.vocabularies import Vocabularies
from mmlrec.errors import DataError
from mmlrec.identity import check_vocabulary
from mmlrec.schema import DatasetManifest, Encoding
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place


def read_folder(folder: Place) -> tuple[dict[str, Any], Vocabularies]:
    """Facts and vocabularies of a folder with `manifest.json` and `vocab/*.parquet`.

    Raises:
        DataError: it is none, is damaged, or was written by a release that recorded no encoding.
    """
    manifest = DatasetManifest.load(folder)
    encoding = manifest.encoding
    if encoding is None or not encoding.comparable(encoding):
        what = "records no encoding" if encoding is None else f"records an encoding of form {encoding.form}"
        raise DataError(
            f"{folder}: its manifest {what}, which this release cannot apply to other rows. Run the preprocessing again."
        )
    weighted = next((feature.name for feature in manifest.features if feature.weighted), None)
    if weighted is not None:
        raise DataError(f"{folder}: feature '{weighted}' has weights, which no raw column tells.")
    values: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for table in manifest.tables:
        facts = tables[table.name] = {"rows": table.num_rows} | encoding.tables[table.name]
        if table.vocabulary is None:
            continue
        path = folder / table.vocabulary
        check_vocabulary(path, facts)
        if facts["ids"] == "quantiles":
            facts["borders"] = [number for part in _values(path) for number in part.to_pylist()][1:]
        else:
            values[table.name] = _values(path)
    vocabularies = Vocabularies.of(values)
    config = manifest.preprocessing.get("config")
    facts = {"form": FACTS_FORM, "dataset": manifest.name, "digest": encoding.digest}
    facts |= _own(manifest, encoding, config) if isinstance(config, dict) else _declared(manifest, encoding, vocabularies)
    return facts | {"tables": tables}, vocabularies


def _values(path: Place) -> Iterator[pa.Array]:
    """The values of a vocabulary file in the order of their ids, some at a time."""
    with open_parquet(path) as file:
        for batch in file.iter_batches(1 << 16, columns=["value"]):
            yield batch.column(0)


def _features(manifest: DatasetManifest, encoding: Encoding) -> dict[str, dict[str, Any]]:
    """What holds for the features of every dataset."""
    features = {}
    for feature in manifest.features:
        told = encoding.features[feature.name]
        facts = {key: told[key] for key in ("kind", "type", "table", "range", "fill") if key in told}
        features[feature.name] = facts | ({"pooling": feature.pooling} if feature.pooling != "mean" else {})
    return features


def _declared(manifest: DatasetManifest, encoding: Encoding, vocabularies: Vocabularies) -> dict[str, Any]:
    """Of a dataset with a file of its own: the raw columns are the canonical ones, and the scenario by its value."""
    features = _features(manifest, encoding)
    for facts in features.values():
        if facts["kind"] == "multi":
            facts["listed"] = True
    scenario = None
    if manifest.scenario is not None:
        name, values = manifest.scenario.name, manifest.scenario.values
        shared = name not in features or _tells(name, features[name], values, manifest, encoding, vocabularies)
        scenario = {
            "name": name,
            "values": values,
            "column": name if shared else SCENARIO_COLUMN,
            "type": "string",
            "map": [[value, value] for value in values],
        }
    return {"features": features, "scenario": scenario}


def _tells(
    name: str,
    facts: Mapping[str, Any],
    scenarios: list[str],
    manifest: DatasetManifest,
    encoding: Encoding,
    vocabularies: Vocabularies,
) -> bool:
    """Whether the feature with the name of the scenario holds the scenarios: all values that it has in train are such."""
    table = encoding.tables.get(facts.get("table", ""), {})
    if facts["kind"] != "sparse" or table.get("ids") != "vocabulary" or table["entries"] > len(scenarios):
        return False
    values = pa.array(scenarios)
    if facts["type"] == "int64":
        whole = pc.match_substring_regex(values, "^-?[0-9]{1,18}$")
        values = values.filter(whole).cast(pa.int64())
    known = vocabularies.look_up(str(facts["table"]), values)
    return int(np.count_nonzero(np.unique(known))) == table["entries"]


def _own(manifest: DatasetManifest, encoding: Encoding, config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a table of one's own: what its configuration, in which defaults are left out, says of its columns."""
    features = _features(manifest, encoding)
    for name, of in config["features"].items():
        facts = {"column": of["column"]} if "column" in of else {}
        if of["kind"] == "ids":
            facts["listed"] = True
            if of.get("separator") is not None:
                facts["separator"] = of["separator"]
        if of.get("scale") == "log":
            facts["log"] = True
        features[name] |= facts
    for name, facts in features.items():
        number = encoding.features[name].get("indicator")
        if isinstance(number, str):
            facts |= {"column": config["features"][number].get("column", number), "indicator": True}
    found: dict[str, Any] = {"features": features, "scenario": None, "empty_is_missing": True}
    if config.get("missing"):
        found["missing"] = config["missing"]
    if config.get("strip"):
        found["strip"] = True
    if manifest.scenario is not None:
        told, of = encoding.scenario or {}, config["scenario"]
        found["scenario"] = {
            "name": manifest.scenario.name,
            "values": manifest.scenario.values,
            "column": of["column"],
            "type": "int64" if isinstance(told["map"][0][0], int) else "string",
            "map": told["map"],
        }
        if "others" in told:
            found["scenario"]["others"] = told["others"]
    return found
