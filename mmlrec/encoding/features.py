"""The canonical column of a feature, and scenarios, from raw cells: for blocks of raw files and for rows to be scored alike."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmlrec.encoding.cells import Cells
from mmlrec.encoding.conversions import FOUND, Converted, Faults, listed, number, places, present, singles
from mmlrec.encoding.specs import FeatureSpec, ScenarioSpec
from mmlrec.encoding.typed import as_lists, as_type
from mmlrec.errors import DataError

_LONGEST_SHOWN = 80


def feature_values(spec: FeatureSpec, cells: pa.Array, rules: Cells, empty_is_missing: bool) -> Converted:
    """The canonical column of a feature, of `spec.canonical_type`.

    Args:
        cells: of its raw column, of any type.
        empty_is_missing: an empty text is, and elements of lists that are missing are left out.

    Raises:
        DataError: the type of the cells cannot be used.
    """
    column = spec.column
    if spec.listed:
        values, faults = as_lists(cells, spec.raw_type, spec.separator, column, rules)
        return listed(values, column, rules) if empty_is_missing else values, faults
    values, faults = as_type(cells, spec.cell_type, column, rules)
    if pa.types.is_floating(spec.cell_type):
        numbers, more = number(values, column, spec.raw_type, log=spec.log)
        return numbers.is_null().cast(pa.float32()) if spec.indicator else numbers, [*faults, *more]
    if empty_is_missing:
        values = present(values)
    return singles(values) if spec.kind == "multi" else values, faults


def scenario_ids(spec: ScenarioSpec, cells: pa.Array, rules: Cells) -> tuple[NDArray[np.int64], NDArray[np.bool_], Faults]:
    """Ids, [rows]; which are `known`, [rows] (else `spec.others`, or 0); and faults. Raises as `feature_values`."""
    values, faults = as_type(cells, spec.raw_type, spec.column, rules)
    at = places(values, pa.array(list(spec.known), spec.raw_type))
    ids = np.array(list(spec.known.values()), np.int64)
    return np.where(at >= 0, ids[at], spec.others or 0), at >= 0, faults


def refuse(faults: Faults, cells: pa.Array) -> None:
    """Raise DataError naming the first row in which something is wrong; `cells` are those of the raw column."""
    wrong = [(int(np.argmin(good)), complaint) for good, complaint, _ in faults if not good.all()]
    if wrong:
        row, complaint = min(wrong, key=lambda fault: fault[0])
        value = str(cells[row].as_py())
        shown = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}..."
        raise DataError(f"row {row} (counted from 0): {complaint.replace(FOUND, f', found {shown}')}")
