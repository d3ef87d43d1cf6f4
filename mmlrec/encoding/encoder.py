"""The frozen encoder of a dataset: raw rows to canonical values, canonical values to ids and numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmlrec.encoding import columns as to
from mmlrec.encoding import conversions
from mmlrec.encoding.features import feature_values, refuse, scenario_ids
from mmlrec.encoding.folders import encoder_folder
from mmlrec.encoding.inputs import Inputs, joined
from mmlrec.encoding.mapped import RESTORE, read_arrays, write_arrays
from mmlrec.encoding.specs import FACTS_FORM, SCENARIO_COLUMN, FeatureSpec, RawColumn, ScenarioSpec, Specs
from mmlrec.encoding.together import Doubtful, IdFeatures, Numbers
from mmlrec.encoding.typed import plain
from mmlrec.encoding.vocabularies import Vocabularies
from mmlrec.errors import DataError
from mmlrec.hashing import UInt64Array, bucket_ids, key_ids
from mmlrec.storage.places import Place, place

IntArray = NDArray[np.int64]

ENCODER_FILE = "encoder.json"
#: Key of its file, whose value is over all the others.
_CHECKSUM = "checksum"
_ROWS = 4096  # that go through together: what is made of them on the way stays in the caches


class Encoder:
    """All that was fitted on train rows or declared, as it is applied to any rows. Immutable, for several threads.

    *Raw* rows have the columns of `columns`: of a table of one's own those that its configuration names, of another dataset its
    features by their names, and its scenario by value (docs/datasets/encoding.md). Values come typed or as text.
    *Canonical* rows have one column a feature: int64 or string, lists of these, float32 or float64; null is missing.
    *Encoded* rows hold ids; of a managed table keys, or, `with_slots`, the rows of those that hold a slot.

    Made by `load`.

    Attributes:
        facts: all of it that is no vocabulary, as JSON can hold it.
        features: in the manifest's order.
        columns: raw columns, in the order of the features; with that of the scenario.
        scenario: None where there is none.
    """

    def __init__(self, facts: dict[str, Any], vocabularies: Vocabularies) -> None:
        specs = Specs.of(facts)
        self.facts = facts
        self.features: tuple[FeatureSpec, ...] = specs.features
        self.columns: dict[str, RawColumn] = specs.columns
        self.scenario: ScenarioSpec | None = specs.scenario
        self._specs, self._vocabularies = specs, vocabularies
        self._by_name = {spec.name: spec for spec in specs.features}
        self._numbers, self._id_features = Numbers(specs), IdFeatures(specs, vocabularies)
        self._id_names = [spec.name for spec in specs.features if spec.kind != "dense"]
        self._borders = {name: np.array(table.borders, np.float32) for name, table in specs.tables.items()}

    @classmethod
    def load(cls, folder: str | Place) -> Encoder:
        """From the folder of a dataset or a run, or from one that `save` has written, whose vocabularies stay on disk.

        Raises:
            UserError: it is none of them.
            DataError: it is damaged; the message names the file.
        """
        there = place(folder)
        if isinstance(there, Path) and (there / ENCODER_FILE).is_file():
            facts = _read_facts(there / ENCODER_FILE)
            try:
                arrays = read_arrays(there, facts.pop("arrays"))
                tables = {name: (first, shift) for name, (first, shift) in facts.pop("directories").items()}
                return cls(facts, Vocabularies.from_arrays(tables, arrays))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{there / ENCODER_FILE} is damaged: {error!r}. Export the model again.") from error
        there = encoder_folder(there)
        from mmlrec.encoding.manifest import read_folder  # with pydantic, which what serves a model lacks

        return cls(*read_folder(there))

    def save(self, folder: Path) -> None:
        """Write `encoder.json` and the vocabularies, as files that `load` maps: no more is read of them than is looked up."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = write_arrays(folder, self._vocabularies.arrays())
        facts = self.facts | {"directories": self._vocabularies.tables, "arrays": arrays}
        facts = {_CHECKSUM: _checksum(facts)} | facts
        (folder / ENCODER_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def with_slots(self, slots: Mapping[str, tuple[UInt64Array, IntArray]]) -> Encoder:
        """The same, with rows in place of the keys of managed tables: 0 for a key that holds no slot.

        Args:
            slots: each managed table -> keys that hold slots, ascending, and their slots; [n] each.
        """
        return Encoder(self.facts, self._vocabularies.with_slots(slots))

    def rows_of_keys(self, table: str, keys: IntArray) -> IntArray:
        """Rows of a managed table that keys stand for, [n], in an encoder `with_slots`."""
        return self._vocabularies.slots(table, keys)

    def canonical(self, rows: pa.Table, *, scenario: bool = True) -> pa.RecordBatch:
        """Raw rows to canonical ones: a column for each feature, and `sample.scenario`, int64, where there are scenarios.

        Args:
            scenario: False: its column is neither needed nor given.

        Raises:
            DataError: a column is missing or of a type that cannot be used; a cell is of another kind, or no scenario's. The
                message names the column, and the row, counted from 0.
        """
        return pa.RecordBatch.from_pydict(self._canonical(rows, scenario))

    def encode(self, canonical: pa.RecordBatch) -> pa.RecordBatch:
        """The same rows with ids int64, lists of ids list<int64>, numbers float32; other columns untouched.

        Raises:
            DataError: ids that come as such are none of the table's.
        """
        names = canonical.schema.names
        encoded = {spec.name: self.encode_column(spec.name, canonical.column(spec.name)) for spec in self.features}
        return pa.RecordBatch.from_pydict(encoded | {name: canonical.column(name) for name in names if name not in encoded})

    def encode_column(self, feature: str, values: pa.Array) -> pa.Array:
        """A canonical column encoded, as `encode` does."""
        spec = self._by_name[feature]
        if spec.kind == "dense":
            return pa.array(self._number(spec, values))
        ids, offsets = self._ids(spec, values)
        if spec.kind == "multi":
            return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids))
        return pa.array(ids)

    def needed(self, *, scenario: bool = True) -> dict[str, RawColumn]:
        """Of `columns` those that rows must have; without `scenario` not the one that nothing else is made of."""
        return {name: column for name, column in self.columns.items() if scenario or column.uses != ("scenario",)}

    def inputs(self, rows: pa.Table | pa.RecordBatch, *, scenario: bool = True) -> Inputs:
        """Raw rows to what a network reads.

        Args:
            scenario: False: its column is not needed, and all are 0.

        Raises as `canonical` and `encode`.
        """
        cells = self._cells(rows, scenario)
        starts = range(0, max(rows.num_rows, 1), _ROWS)
        try:
            return joined([self._some(cells, start, min(_ROWS, rows.num_rows - start), scenario) for start in starts])
        except Doubtful:
            return Inputs.of(self.encode(self.canonical(rows, scenario=scenario)), self)

    def _some(self, cells: dict[str, pa.Array], start: int, num_rows: int, with_scenario: bool) -> Inputs:
        if num_rows < len(next(iter(cells.values()))):
            cells = {name: column.slice(start, num_rows) for name, column in cells.items()}
        cells = {name: plain(column) for name, column in cells.items()}
        dense, ids = self._numbers.inputs(cells, num_rows)
        found = self._id_features.inputs(cells, num_rows)
        found |= {name: (of, np.arange(num_rows + 1)) for name, of in ids.items()}
        scenario = np.zeros(num_rows, np.int64)
        if with_scenario and self.scenario is not None:
            scenario, known, faults = scenario_ids(self.scenario, cells[self.scenario.column], self._specs.cells)
            if not (known.all() or self.scenario.others is not None) or not all(good.all() for good, _, _ in faults):
                raise Doubtful
        return Inputs({name: found[name] for name in self._id_names}, dense, scenario, num_rows)

    def _canonical(self, rows: pa.Table | pa.RecordBatch, scenario: bool) -> dict[str, pa.Array]:
        cells = self._cells(rows, scenario)
        found = {spec.name: self._feature(spec, cells[spec.column]) for spec in self.features}
        if scenario and self.scenario is not None:
            found[SCENARIO_COLUMN] = self._scenario(self.scenario, cells[self.scenario.column])
        return found

    def _cells(self, rows: pa.Table | pa.RecordBatch, scenario: bool) -> dict[str, pa.Array]:
        """The columns that are read."""
        names = rows.schema.names
        places = {name: index for index, name in enumerate(names)}
        cells: dict[str, pa.Array] = {}
        for name, column in self.needed(scenario=scenario).items():
            if name not in places:
                raise DataError(column.missing_among(names))
            values = rows.column(places[name])
            if isinstance(values, pa.ChunkedArray):
                values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
            cells[name] = values
        if len(places) < len(names) and (twice := [name for name in cells if names.count(name) > 1]):
            raise DataError(f"two columns have the name '{twice[0]}'. Rename one.")
        return cells

    def _feature(self, spec: FeatureSpec, cells: pa.Array) -> pa.Array:
        values, faults = feature_values(spec, cells, self._specs.cells, self._specs.empty_is_missing)
        refuse(faults, cells)
        return values

    def _scenario(self, spec: ScenarioSpec, cells: pa.Array) -> pa.Array:
        ids, known, faults = scenario_ids(spec, cells, self._specs.cells)
        if spec.others is None:
            shown = ", ".join(str(value) for value in list(spec.known)[:20])
            complaint = f"{spec.column} holds no value of the scenarios{conversions.FOUND}. Known are: {shown}."
            faults = [*faults, (known, complaint, spec.column)]
        refuse(faults, cells)
        return pa.array(ids)

    def _number(self, spec: FeatureSpec, values: pa.Array) -> NDArray[np.float32]:
        values = to.filled(values, spec.fill)
        if spec.scaled:
            return to.scaled(values, spec.range)
        return values.fill_null(0.0).to_numpy(zero_copy_only=False)

    def _ids(self, spec: FeatureSpec, values: pa.Array) -> tuple[IntArray, IntArray]:
        """Ids of all rows, and where each row's begin, [rows + 1]."""
        table = self._specs.tables[str(spec.table)]
        ids_of: Callable[[pa.Array], IntArray]
        if table.ids == "hash":

            def ids_of(values: pa.Array) -> IntArray:
                return bucket_ids(values, table.seed, table.buckets, table.hashes).ravel()

        elif table.ids == "managed":

            def ids_of(values: pa.Array) -> IntArray:
                keys = key_ids(values, table.seed)
                return self.rows_of_keys(table.name, keys) if table.name in self._vocabularies.tables else keys

        elif table.ids == "quantiles":

            def ids_of(values: pa.Array) -> IntArray:
                return to.quantile_ids(values, self._borders[table.name])

        elif table.ids == "given":

            def ids_of(values: pa.Array) -> IntArray:
                return to.given_ids(values, table.num_rows - 1, spec.name)

        else:

            def ids_of(values: pa.Array) -> IntArray:
                return self._vocabularies.look_up(table.name, values)

        if spec.kind == "multi":
            return to.list_ids(values, ids_of, table.hashes)
        return ids_of(values), np.arange(len(values) + 1)


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        form = facts["form"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}. Export the model again.") from error
    if form != FACTS_FORM:
        raise DataError(f"{path}: an encoder of form {form}; this release reads {FACTS_FORM}. Export the model again.")
    recorded = facts.pop(_CHECKSUM, None)  # folders from before there was one have none
    if recorded not in (None, _checksum(facts)):
        raise DataError(f"{path} is damaged: its checksum is not that of what was written. {RESTORE}")
    return dict(facts)


def _checksum(facts: dict[str, Any]) -> str:
    """sha256 of the facts as compact JSON, in the order in which the file has them."""
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()
