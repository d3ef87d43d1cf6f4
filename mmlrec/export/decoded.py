"""Encoded rows decoded: raw cells that the encoder of an exported model must give the same ids again."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.inputs import Inputs
from mmlrec.encoding.specs import FeatureSpec
from mmlrec.errors import DataError
from mmlrec.schema import DatasetManifest
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place

IntArray = NDArray[np.int64]


def inputs_of(encoded: pa.RecordBatch, encoder: Encoder) -> Inputs:
    """Encoded rows as a network reads them. Ids of values that joined the vocabulary after the run are 0, as unseen ones.

    Args:
        encoder: of the exported model, with the maps of managed tables.
    """
    inputs = Inputs.of(encoded, encoder)
    tables = {spec.name: str(spec.table) for spec in encoder.features if spec.table is not None}
    ids = {name: (_rows(of, tables[name], encoder), offsets) for name, (of, offsets) in inputs.ids.items()}
    return replace(inputs, ids=ids)


def _rows(ids: IntArray, table: str, encoder: Encoder) -> IntArray:
    facts = encoder.facts["tables"][table]
    if facts["ids"] == "managed":
        return encoder.rows_of_keys(table, ids)
    return np.where(ids < facts["rows"], ids, 0)


def check_encoder(encoder: Encoder, folder: Place, manifest: DatasetManifest, encoded: pa.RecordBatch) -> list[str]:
    """Decode rows, encode the raw cells again, and compare the ids.

    Ids of a vocabulary are decoded, by the run's own files, and ids that came as such. Cells of hashes, keys, buckets and
    numbers are left empty. Id 0 becomes an empty cell, and bags with a 0 are passed over.

    Args:
        encoder: of the exported model.
        folder: with the manifest and its vocabularies, that the run was trained with.

    Returns:
        The features that were compared, and `scenario NAME`.

    Raises:
        DataError: an id is another one; naming feature and row.
    """
    inputs = inputs_of(encoded, encoder)
    vocabularies = {table.name: table.vocabulary for table in manifest.tables if table.vocabulary is not None}
    raw: dict[str, list[Any]] = {}
    compared: list[tuple[FeatureSpec, NDArray[np.bool_]]] = []
    for spec in encoder.features:
        if spec.kind == "dense" or pa.types.is_floating(spec.raw_type) or spec.column in raw:
            continue
        if spec.table not in vocabularies and encoder.facts["tables"][spec.table]["ids"] != "given":
            continue
        ids, offsets = inputs.ids[spec.name]
        path = vocabularies.get(str(spec.table))
        values = dict(_values(folder / path, np.unique(ids))) if path is not None else {int(i): int(i) for i in ids if i}
        bags = [[values.get(int(i)) for i in ids[start:end]] for start, end in pairwise(offsets)]
        usable = np.array([spec.kind != "multi" or None not in bag for bag in bags], np.bool_)
        raw[spec.column] = [_cell(spec, bag) if fits else None for bag, fits in zip(bags, usable, strict=True)]
        compared.append((spec, usable))
    names = [spec.name for spec, _ in compared]
    if encoder.scenario is not None:
        of = {id: value for value, id in reversed(encoder.scenario.known.items())}
        own = [of.get(int(id)) for id in inputs.scenario]
        before = raw.get(encoder.scenario.column, own)
        raw[encoder.scenario.column] = [value if value is not None else other for value, other in zip(before, own, strict=True)]
        names.append(f"scenario {encoder.scenario.name}")
    nothing = [None] * encoded.num_rows
    again = encoder.inputs(pa.table({name: pa.array(raw.get(name, nothing)) for name in encoder.columns}))
    for spec, usable in compared:
        _compare(spec.name, inputs.ids[spec.name], again.ids[spec.name], usable)
    singles = np.arange(encoded.num_rows + 1)
    if encoder.scenario is not None:
        _compare("scenario", (inputs.scenario, singles), (again.scenario, singles), np.ones(encoded.num_rows, np.bool_))
    return names


def _values(path: Place, wanted: IntArray) -> list[tuple[int, Any]]:
    """Raw values of some ids, read from a vocabulary without holding all of it."""
    found: list[tuple[int, Any]] = []
    with open_parquet(path) as file:
        for batch in file.iter_batches(1 << 16, columns=["value", "id"]):
            own = batch.filter(pc.is_in(batch.column("id"), value_set=pa.array(wanted)))
            found += zip(own.column("id").to_pylist(), own.column("value").to_pylist(), strict=True)
    return found


def _cell(spec: FeatureSpec, bag: list[Any]) -> Any:
    if not spec.listed:
        return bag[0] if bag else None
    return bag if spec.separator is None else spec.separator.join(map(str, bag))


def _compare(name: str, before: tuple[IntArray, IntArray], after: tuple[IntArray, IntArray], usable: NDArray[np.bool_]) -> None:
    for row in np.flatnonzero(usable):
        expected, found = (ids[offsets[row] : offsets[row + 1]].tolist() for ids, offsets in (before, after))
        if expected != found:
            raise DataError(
                f"the encoder of the exported model gives '{name}' of row {row} the ids {found} instead of {expected}: a fault"
                " of the export, or vocabularies of the run that have been changed."
            )
