"""What a network reads: ids with the places where rows begin, numbers, scenarios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmlrec.encoding.columns import list_ids
from mmlrec.encoding.specs import SCENARIO_COLUMN, FeatureSpec

IntArray = NDArray[np.int64]


class _WithFeatures(Protocol):
    @property
    def features(self) -> tuple[FeatureSpec, ...]: ...


@dataclass(frozen=True)
class Inputs:
    """Inputs of B rows.

    Attributes:
        ids: sparse or multi feature, in manifest order -> ids of all rows [n], and where each row's begin [B + 1]; both int64.
        dense: [B, N] float32, in manifest order.
        scenario: [B] int64; 0 without scenarios.
    """

    ids: dict[str, tuple[IntArray, IntArray]]
    dense: NDArray[np.float32]
    scenario: IntArray
    num_rows: int

    @classmethod
    def of(cls, encoded: pa.RecordBatch | pa.Table, encoder: _WithFeatures) -> Inputs:
        """From encoded rows, such as a dataset's parts: a column for each feature, and `sample.scenario` where there is one."""
        ids: dict[str, tuple[IntArray, IntArray]] = {}
        dense: list[NDArray[np.float32]] = []
        singles = np.arange(encoded.num_rows + 1)

        def column(name: str) -> pa.Array:
            found = encoded.column(name)
            return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found

        for spec in encoder.features:
            values = column(spec.name)
            if spec.kind == "dense":
                dense.append(values.to_numpy(zero_copy_only=False))
            elif spec.kind == "multi":
                ids[spec.name] = list_ids(values, lambda elements: elements.to_numpy())
            else:
                ids[spec.name] = values.to_numpy(), singles
        scenario = np.zeros(encoded.num_rows, np.int64)
        if SCENARIO_COLUMN in encoded.schema.names:
            scenario = column(SCENARIO_COLUMN).to_numpy()
        columns = np.stack(dense, axis=1) if dense else np.empty((encoded.num_rows, 0), np.float32)
        return cls(ids, np.ascontiguousarray(columns), scenario, encoded.num_rows)


def joined(parts: list[Inputs]) -> Inputs:
    """The inputs of some rows, and of the rows behind them, and so on, as one."""
    if len(parts) == 1:
        return parts[0]
    ids = {}
    for name in parts[0].ids:
        found = [part.ids[name] for part in parts]
        before = np.cumsum([0, *(offsets[-1] for _, offsets in found)])
        offsets = [offsets[:-1] + start for (_, offsets), start in zip(found, before, strict=False)]
        ids[name] = np.concatenate([values for values, _ in found]), np.concatenate([*offsets, before[-1:]])
    dense, scenario = np.concatenate([part.dense for part in parts]), np.concatenate([part.scenario for part in parts])
    return Inputs(ids, dense, scenario, len(scenario))
