"""Scores of raw rows with the tables and the network of a run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mmlrec.data.batch import Batch
from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.inputs import Inputs
from mmlrec.evaluation.evaluation import predict_split
from mmlrec.evaluation.prediction import score_columns
from mmlrec.schema import Setting
from mmlrec.session.session import Session


def score_rows(session: Session, encoder: Encoder, rows: pa.Table) -> dict[str, pa.Array]:
    """The columns `score.<task>` of `score_columns` for raw rows, in their order. Without scenarios none has to be there.

    Raises:
        DataError: cells or a scenario that cannot be used, naming column and row; or a score is not finite.
    """
    with_scenario = session.config.dataset.setting is not Setting.MTL
    inputs = Inputs.of(encoder.encode(encoder.canonical(rows, scenario=with_scenario)), encoder)
    logits = np.zeros((0, session.spec.num_tasks), np.float32)
    if inputs.num_rows:
        total = -(-inputs.num_rows // session.config.training.eval_batch_size)
        logits = predict_split(session, batches(inputs, session), total=total, title="scoring").logits
    return score_columns(session, logits, inputs.scenario)


def batches(inputs: Inputs, session: Session) -> Iterator[Batch]:
    """All rows in their order, `training.eval_batch_size` at a time; labels are missing."""
    size, tasks = session.config.training.eval_batch_size, session.spec.num_tasks
    for start in range(0, inputs.num_rows, size):
        stop = min(start + size, inputs.num_rows)
        count = stop - start
        bags = {name: (ids, offsets[start : stop + 1]) for name, (ids, offsets) in inputs.ids.items()}
        values = [ids[offsets[0] : offsets[-1]] for ids, offsets in bags.values()]
        lengths = [np.diff(offsets) for _, offsets in bags.values()]
        yield Batch(
            sparse=KeyedJaggedTensor(
                list(bags),
                torch.from_numpy(np.concatenate(values) if values else np.zeros(0, np.int64)),
                lengths=torch.from_numpy(np.concatenate(lengths).astype(np.int32) if lengths else np.zeros(0, np.int32)),
                stride=count,
            ),
            dense=torch.from_numpy(inputs.dense[start:stop]),
            labels=torch.zeros(count, tasks),
            mask=torch.zeros(count, tasks),
            scenario=torch.tensor(inputs.scenario[start:stop]),
            weight=torch.ones(count),
            valid=torch.ones(count, dtype=torch.bool),
            row=torch.arange(start, stop),
            group=torch.zeros(count, dtype=torch.int64),
        )
