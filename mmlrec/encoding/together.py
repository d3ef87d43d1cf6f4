"""Raw rows to inputs with all features of a kind at a time.

A call of numpy or Arrow costs the same for one row as for a hundred; so for few rows it is the number of calls that counts, and
that hardly grows here with the number of features. What comes out is what `Encoder.canonical` and `encode` give one by one.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.encoding.cells import Cells
from mmlrec.encoding.columns import quantile_ids, valid
from mmlrec.encoding.features import feature_values
from mmlrec.encoding.specs import FeatureSpec, Specs
from mmlrec.encoding.typed import as_type
from mmlrec.encoding.vocabularies import Text, Vocabularies
from mmlrec.hashing import buckets_of, hashes_from, keys_of, mix64

IntArray = NDArray[np.int64]
Ids = dict[str, tuple[IntArray, IntArray]]


class Doubtful(Exception):
    """Something may be wrong with the rows: to be looked at column by column, which finds the words for it."""


_FLOATS = (pa.DoubleArray, pa.FloatArray)
_INTEGERS = (pa.Int64Array, pa.Int32Array, pa.Int16Array, pa.Int8Array)


#: No column's name: rules that hold for all columns hold for it, too.
_ANY = "\0"


class _Rules:
    """What is done to cells of the columns of some features before they are values: to numbers, and to text.

    Attributes:
        numbers: feature by feature, whether nothing is done to a number.
        texts: whether the same is done to a text as to one of the column `_ANY`.
    """

    def __init__(self, cells: Cells, features: list[FeatureSpec]) -> None:
        self.cells = cells
        marks = [cells.marks(spec.column) for spec in features]
        for_all = not isinstance(cells.missing, dict)
        self.numbers = [not (spec.listed or any(map(_is_number, some))) for spec, some in zip(features, marks, strict=True)]
        self.texts = [not spec.listed and (for_all or not some) for spec, some in zip(features, marks, strict=True)]

    def converted(self, columns: list[pa.Array], found: type[pa.Array], kind: pa.DataType) -> list[pa.Array]:
        """The columns with int64 or float64 in place of those of a type, where `texts`. Raises Doubtful."""
        places = [index for index, column in enumerate(columns) if self.texts[index] and isinstance(column, found)]
        if not places:
            return columns
        values, faults = as_type(pa.concat_arrays([columns[index] for index in places]), kind, _ANY, self.cells)
        if not all(good.all() for good, _, _ in faults):
            raise Doubtful
        changed, start = list(columns), 0
        for index in places:
            changed[index] = values.slice(start, len(columns[index]))
            start += len(columns[index])
        return changed


def _is_number(mark: str) -> bool:
    """Whether it names a number, NaN excepted, which is missing in any case."""
    try:
        return float(mark) == float(mark)
    except ValueError:
        return False


class Numbers:
    """All features that are made of numbers.

    Raw numbers are the rows of a matrix [N, B]; NaN is missing.
    """

    def __init__(self, specs: Specs) -> None:
        self._specs = specs
        self._features = [spec for spec in specs.features if pa.types.is_floating(spec.raw_type)]
        self._rules = _Rules(specs.cells, self._features)
        self._dense = [index for index, spec in enumerate(self._features) if spec.kind == "dense"]
        dense = [self._features[index] for index in self._dense]
        self._log = [index for index, spec in enumerate(self._features) if spec.log]
        self._rounded = [index for index, spec in enumerate(self._features) if pa.types.is_float32(spec.raw_type)]
        self._indicators = [column for column, spec in enumerate(dense) if spec.indicator]
        self._flat = [column for column, spec in enumerate(dense) if spec.scaled and spec.range is None]
        self._scaled = [column for column, spec in enumerate(dense) if spec.scaled]
        ranges = [spec.range or (0.0, 1.0) for spec in dense if spec.scaled]
        self._low = np.array([low for low, _ in ranges])[:, None]
        self._width = np.array([high - low for low, high in ranges])[:, None]
        # What a missing number becomes; without a fill value that which ends as 0.
        fills = [spec.fill if spec.fill is not None else (spec.range or (0.0,))[0] for spec in dense]
        rounded = [
            np.float32(fill) if pa.types.is_float32(spec.raw_type) else fill for fill, spec in zip(fills, dense, strict=True)
        ]
        self._fill = np.array(rounded, np.float64)[:, None]
        self._buckets = [
            (index, spec.name, np.array(specs.tables[str(spec.table)].borders, np.float32))
            for index, spec in enumerate(self._features)
            if spec.kind != "dense"
        ]

    def inputs(self, cells: dict[str, pa.Array], num_rows: int) -> tuple[NDArray[np.float32], dict[str, IntArray]]:
        """Dense features [B, N], and ids by quantiles. Raises Doubtful."""
        numbers = np.empty((len(self._features), num_rows))
        columns = self._rules.converted([cells[spec.column] for spec in self._features], pa.StringArray, pa.float64())
        for index, spec in enumerate(self._features):
            taken = self._rules.numbers[index] or columns[index] is not cells[spec.column]
            numbers[index] = self._raw(spec, columns[index], taken)
        if self._log:
            raw = pa.array(numbers[self._log].ravel())
            logs = pc.multiply(pc.sign(raw), pc.log1p(pc.abs(raw)))
            numbers[self._log] = logs.to_numpy(zero_copy_only=False).reshape(len(self._log), num_rows)
        with np.errstate(over="ignore"):
            small = numbers.astype(np.float32)
        if np.isinf(small).any():
            raise Doubtful
        if self._rounded:
            numbers[self._rounded] = small[self._rounded]
        ids = {name: quantile_ids(pa.array(small[index], from_pandas=True), borders) for index, name, borders in self._buckets}
        numbers = numbers[self._dense] if self._buckets else numbers
        missing = np.isnan(numbers)
        np.copyto(numbers, self._fill, where=missing)
        dense = np.empty((num_rows, len(numbers)), np.float32)
        if len(self._scaled) == len(numbers):
            dense[:] = np.clip((numbers - self._low) / self._width, 0, 1).T
        else:
            dense[:] = numbers.T
            dense[:, self._scaled] = np.clip((numbers[self._scaled] - self._low) / self._width, 0, 1).T
        dense[:, self._flat] = 0
        if self._indicators:
            dense[:, self._indicators] = missing[self._indicators].T
        return dense, ids

    def _raw(self, spec: FeatureSpec, cells: pa.Array, taken: bool) -> NDArray[np.number]:
        """As they are, without logarithm; NaN where there is none."""
        if taken and (isinstance(cells, _FLOATS) or (isinstance(cells, _INTEGERS) and not cells.null_count)):
            return cells.to_numpy(zero_copy_only=False)
        values, faults = as_type(cells, pa.float64(), spec.column, self._specs.cells)
        if not all(good.all() for good, _, _ in faults):
            raise Doubtful
        return values.to_numpy(zero_copy_only=False)


class IdFeatures:
    """All features of ids, but for those by quantiles; their values are integers or text."""

    def __init__(self, specs: Specs, vocabularies: Vocabularies) -> None:
        features = [spec for spec in specs.features if spec.kind != "dense" and not pa.types.is_floating(spec.raw_type)]
        kinds = {False: pa.int64(), True: pa.string()}
        self._groups = [
            _Group(specs, vocabularies, [spec for spec in features if spec.raw_type == kind], text)
            for text, kind in kinds.items()
        ]

    def inputs(self, cells: dict[str, pa.Array], num_rows: int) -> Ids:
        """Feature -> ids [n], and where each row's begin [B + 1]. Raises Doubtful."""
        singles = np.arange(num_rows + 1)
        return {name: of for group in self._groups for name, of in group.inputs(cells, singles).items()}


class _Group:
    """Features with values of one type: those with vocabularies, then by hash, then by key, then with ids as they come."""

    def __init__(self, specs: Specs, vocabularies: Vocabularies, features: list[FeatureSpec], text: bool) -> None:
        tables = specs.tables
        kinds = ("vocabulary", "hash", "managed", "given")
        of_kind = {ids: [spec for spec in features if tables[str(spec.table)].ids == ids] for ids in kinds}
        self._specs, self._vocabularies, self._text = specs, vocabularies, text
        self._features = [spec for some in of_kind.values() for spec in some]
        self._tables = [tables[str(spec.table)] for spec in self._features]
        self._num_known, self._num_hashed, self._num_keyed = (len(of_kind[ids]) for ids in kinds[:3])
        places = [vocabularies.tables[str(spec.table)] for spec in of_kind["vocabulary"]]
        self._first_places = np.array([first for first, _ in places], np.int64)
        self._shifts = np.array([shift for _, shift in places], np.uint64)
        self._keyed_tables = [str(spec.table) for spec in of_kind["managed"]]
        self._starts = mix64(np.array([table.seed for table in self._tables], np.uint64))
        self._buckets = np.array([table.buckets for table in self._tables[self._num_known :][: self._num_hashed]], np.uint64)
        self._rules = _Rules(specs.cells, self._features)

    def inputs(self, cells: dict[str, pa.Array], singles: IntArray) -> Ids:
        """As of `IdFeatures`; `singles`: where rows begin that have a value each."""
        if not self._features:
            return {}
        columns = [cells[spec.column] for spec in self._features]
        if self._text:
            plain = [
                taken and isinstance(column, pa.StringArray) for taken, column in zip(self._rules.texts, columns, strict=True)
            ]
        else:
            given = columns
            for kind in (pa.StringArray, pa.DoubleArray):
                columns = self._rules.converted(columns, kind, pa.int64())
            plain = [
                column is not before or (taken and isinstance(column, pa.Int64Array))
                for column, before, taken in zip(columns, given, self._rules.numbers, strict=True)
            ]
        found = [self._values(*each) for each in zip(self._features, columns, plain, strict=True)]
        ends = np.cumsum([0, *(len(values) for values, _ in found)])
        values = pa.concat_arrays([values for values, _ in found])
        ids = self._ids(self._rules.cells.take(_ANY, values) if self._text else values, ends)
        inputs = {}
        for index, (spec, (_, offsets)) in enumerate(zip(self._features, found, strict=True)):
            many = self._tables[index].hashes
            begins = singles if offsets is None else offsets
            inputs[spec.name] = ids[index], begins * many if many > 1 else begins
        return inputs

    def _values(self, spec: FeatureSpec, cells: pa.Array, plain: bool) -> tuple[pa.Array, IntArray | None]:
        """The values in all rows, and where the rows begin; None: each has one. `plain`: the cells are the values."""
        if plain:
            return cells, None
        values, faults = feature_values(spec, cells, self._specs.cells, self._specs.empty_is_missing)
        if not all(good.all() for good, _, _ in faults):
            raise Doubtful
        if spec.kind != "multi":
            return values, None
        lengths = values.value_lengths()
        offsets = np.append(0, np.cumsum(lengths.fill_null(0) if lengths.null_count else lengths))
        return values.flatten(), offsets if spec.listed else None

    def _of_keys(self, keys: IntArray, ends: IntArray) -> IntArray:
        """Of managed tables, of one feature after the other: rows in place of the keys, where the maps are there."""
        for table, start, end in zip(self._keyed_tables, ends - ends[0], ends[1:] - ends[0], strict=False):
            if table in self._vocabularies.tables:
                keys[start:end] = self._vocabularies.slots(table, keys[start:end])
        return keys

    def _ids(self, values: pa.Array, ends: IntArray) -> list[IntArray]:
        """Ids of each feature, [n]: several for each value where there are several hashes."""
        absent = None
        if values.null_count:
            absent, values = ~valid(values), values.fill_null("" if self._text else 0)
        text = Text.of(values) if self._text else None
        if text is not None and self._specs.empty_is_missing:
            empty = text.starts[1:] == text.starts[:-1]
            absent = empty if absent is None else absent | empty
        counts = np.diff(ends)
        known, hashed, keyed = ends[np.cumsum([self._num_known, self._num_hashed, self._num_keyed])]
        hashes = hashes_from(values.slice(0, keyed), np.repeat(self._starts, counts)[:keyed])
        ids = np.empty(len(values), np.int64)
        if known:
            of_known = counts[: self._num_known]
            first_places, shifts = np.repeat(self._first_places, of_known), np.repeat(self._shifts, of_known)
            ids[:known] = self._vocabularies.find(first_places, shifts, hashes[:known], text)
        if hashed > known:
            buckets = np.repeat(self._buckets, counts[self._num_known :][: self._num_hashed])
            ids[known:hashed] = (hashes[known:hashed] % buckets).view(np.int64) + 1
        if keyed > hashed:
            ids[hashed:keyed] = self._of_keys(keys_of(hashes[hashed:]), ends[self._num_known + self._num_hashed :])
        if keyed < len(values):
            ids[keyed:] = values.to_numpy()[keyed:]
        if absent is not None:
            ids[absent] = 0
        found = []
        for table, start, end in zip(self._tables, ends[:-1], ends[1:], strict=True):
            of_feature = ids[start:end]
            if table.hashes > 1:
                of_feature = buckets_of(hashes[start:end], table.buckets, table.hashes)
                if absent is not None:
                    of_feature[absent[start:end]] = 0
                of_feature = of_feature.ravel()
            if table.ids == "given" and len(of_feature) and not 0 <= of_feature.min() <= of_feature.max() < table.num_rows:
                raise Doubtful
            found.append(of_feature)
        return found
