"""An exported model in memory: raw rows, or encoded inputs, to scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmlrec.encoding.encoder import ENCODER_FILE, Encoder
from mmlrec.encoding.inputs import Inputs
from mmlrec.encoding.specs import RawColumn
from mmlrec.errors import DataError
from mmlrec.paths import local_path
from mmlrec.serving.card import AGAIN, CARD, read_card
from mmlrec.serving.networks import Network, open_network
from mmlrec.serving.rows import raw_table, scores_like
from mmlrec.serving.tables import Table

ENCODER = "encoder"
#: Rows that go through the network at a time: what is in between stays in the processor's caches.
_CHUNK_ROWS = 2048


def load(folder: str | Path, *, threads: int | None = None) -> Model:
    """Open an exported model. Tables and vocabularies are mapped, not read.

    Args:
        folder: that `python -m apps.export` has written, on a disk of this machine.
        threads: cores that one call may use; None: as torch or ONNX Runtime has it, all. For torch a setting of the process.

    Raises:
        DataError: the folder is no exported model, or is damaged.
        UserError: it is an address, or needs a package that is not installed.
    """
    path = local_path(folder)
    card = read_card(path)
    if not (path / ENCODER / ENCODER_FILE).is_file():
        raise DataError(f"{path / ENCODER / ENCODER_FILE}: the encoder is not there. {AGAIN}")
    tables = {entry["name"]: Table.open(path, entry) for entry in card["tables"]}
    model = Model(card, Encoder.load(path / ENCODER), tables, open_network(path, card, threads))
    try:
        scores = model._network(*model._nothing())
    except Exception as error:  # of any class: torch's and ONNX Runtime's
        raise DataError(f"{path}: {card['network']['file']} does not take what {CARD} says: {error}. {AGAIN}") from error
    if scores.shape != (2, len(model.outputs)):
        raise DataError(
            f"{path}: {card['network']['file']} gives {list(scores.shape)[1:]} scores a row,"
            f" {CARD} names {len(model.outputs)}. {AGAIN}"
        )
    return model


class Model:
    """An exported model; `load` makes it. All methods may be called from several threads at once.

    Attributes:
        card: `model.json`.
        encoder: raw rows to what the network reads.
        columns: raw columns that rows must have: those of the encoder, without the scenario's where the network has none.
        outputs: names of the scores, in order: tasks, and what else the method says, such as cvr.
    """

    def __init__(self, card: dict[str, Any], encoder: Encoder, tables: dict[str, Table], network: Network) -> None:
        self.card = card
        self.encoder = encoder
        self._with_scenario: bool = card["multi_scenario"]
        self.columns: dict[str, RawColumn] = encoder.needed(scenario=self._with_scenario)
        self.outputs: tuple[str, ...] = tuple(card["network"]["outputs"])
        self._tables = tables
        self._network = network
        self._width = sum(tables[lookup["table"]].weight.shape[1] for lookup in card["lookups"][0]) + len(card["dense"])

    def score(self, rows: Any) -> Any:
        """Scores of raw rows: probabilities, or values in the unit of the labels.

        Args:
            rows: a pandas DataFrame, an Arrow table or a list of dicts, with the columns of the raw data (`columns`); others
                are passed over. Unseen ids and missing cells are taken as in training.

        Returns:
            The same kind of thing with the same rows in the same order, and a column `score.<output>` for each output; a
            DataFrame with the index of `rows`. A task that has no head for a row's scenario gives NaN.

        Raises:
            DataError: a column is missing, a cell is of another kind, or a scenario is one that training did not know and has
                no rule for. The message names column and row.
        """
        return scores_like(rows, self.outputs, self.score_table(raw_table(rows, self.columns)))

    def score_table(self, rows: pa.Table) -> NDArray[np.float32]:
        """Scores of raw rows with the columns of `columns`, [B, num_outputs]. Raises as `score`."""
        return self.score_inputs(self.encoder.inputs(rows, scenario=self._with_scenario))

    def score_inputs(self, inputs: Inputs) -> NDArray[np.float32]:
        """Scores of encoded rows, [B, num_outputs]: probabilities, or values in the unit of the labels.

        A task that has no head for a row's scenario gives NaN.
        """
        scores = np.empty((inputs.num_rows, len(self.outputs)), np.float32)
        for start in range(0, inputs.num_rows, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, inputs.num_rows)
            scenario = np.zeros(stop - start, np.int64)
            if self._with_scenario:
                scenario[:] = inputs.scenario[start:stop]
            scores[start:stop] = self._network(self._looked_up(inputs, start, stop), scenario)
        return scores

    def example(self) -> dict[str, Any]:
        """A raw row, of the examples in the card; what has none there is missing."""
        examples = {feature["name"]: feature["examples"] for feature in self.card["features"]}
        row: dict[str, Any] = dict.fromkeys(self.columns)
        for spec in self.encoder.features:
            if row[spec.column] is None and examples.get(spec.name):
                row[spec.column] = examples[spec.name][0]
        if self.encoder.scenario is not None and self._with_scenario:
            row[self.encoder.scenario.column] = next(iter(self.encoder.scenario.known))
        return row

    def _looked_up(self, inputs: Inputs, start: int, stop: int) -> NDArray[np.float32]:
        """What the network reads of some rows: [B, d_in], or [B, U, d_in] with tables for each of U branches."""
        branches = self.card["lookups"]
        x = np.empty((stop - start, len(branches), self._width), np.float32)
        bags = {}
        for name, (ids, offsets) in inputs.ids.items():
            of_rows = offsets[start : stop + 1]
            bags[name] = ids[of_rows[0] : of_rows[-1]], of_rows - of_rows[0]
        for branch, lookups in enumerate(branches):
            at = 0
            for lookup in lookups:
                pooled = self._tables[lookup["table"]].pooled(*bags[lookup["feature"]], lookup["pooling"])
                x[:, branch, at : (at := at + pooled.shape[1])] = pooled
            x[:, branch, at:] = inputs.dense[start:stop]
        return x if len(branches) > 1 else x[:, 0]

    def _nothing(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Two rows of zeros."""
        branches = len(self.card["lookups"])
        x = np.zeros((2, branches, self._width) if branches > 1 else (2, self._width), np.float32)
        return x, np.zeros(2, np.int64)
