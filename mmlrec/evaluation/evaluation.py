"""Predictions of a whole split, exact over ranks, and the report made from them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from mmlrec.data.batch import Batch
from mmlrec.errors import UserError
from mmlrec.metrics.gather import PredictionRows, gather_rows
from mmlrec.metrics.notes import report_text
from mmlrec.metrics.report import build_report
from mmlrec.models.base.chain import ChainModel
from mmlrec.run_folder.folder import RunFolder, write_atomically
from mmlrec.session.session import Session


def predict_split(
    session: Session, batches: Iterator[Batch], *, total: int | None = None, title: str = ""
) -> PredictionRows | None:
    """Run the model over batches and gather rows and logits on rank 0, in the order of the rows on disk.

    The train pipeline must be empty. Every rank must have the same number of batches.

    Returns:
        The rows on rank 0, None elsewhere.
    """
    waiting: deque[Batch] = deque()

    def remember() -> Iterator[Batch]:
        # The pipeline returns predictions without their batch, in the order in which it took the batches.
        for batch in session.prepare(batches, training=False):
            waiting.append(batch)
            yield batch

    collected: list[PredictionRows] = []
    iterator = remember()
    was_training = session.model.training
    session.model.eval()
    bar = tqdm(total=total, desc=title, unit="step", leave=False, disable=None if session.world.is_main else True)
    with torch.no_grad(), bar:
        while True:
            try:
                predictions = session.pipeline.progress(iterator)
            except StopIteration:
                break
            batch = waiting.popleft()
            collected.append(
                PredictionRows.from_batch(
                    predictions.logits.cpu(),
                    labels=batch.labels,
                    mask=batch.mask,
                    scenario=batch.scenario,
                    weight=batch.weight,
                    group=batch.group,
                    row=batch.row,
                    valid=batch.valid,
                )
            )
            bar.update()
    session.model.train(was_training)
    return gather_rows(collected, rank=session.world.rank, world_size=session.world.world_size, group=session.world.control)


def evaluate_split(session: Session, split: str) -> dict[str, Any]:
    """The task x scenario report of a split, on every rank.

    Raises:
        DataError: the split is empty or damaged.
    """
    reader = session.reader(split)
    rows = predict_split(session, reader.sequential(), total=reader.num_batches, title=split)
    session.check_parts()
    report, error = None, None
    if rows is not None:
        try:
            network, scenario = session.network, session.manifest.scenario
            report = build_report(rows, tasks=session.spec.tasks, scenario=scenario, chain=network.chain)
            if isinstance(network, ChainModel) and network.config.allow_non_chain:
                report["allow_non_chain"] = True
        except UserError as cause:
            error = cause
    session.world.raise_together(error)
    result = session.world.from_main(report)
    assert isinstance(result, dict)
    return result


def write_result(folder: RunFolder, split: str, report: dict[str, Any], *, step: int) -> str:
    """Put a split's report into `result.json` and return it as a table, with what to look at."""
    result = folder.read_result()
    result[split] = report
    result["step"] = step
    write_atomically(folder.result, json.dumps(result, indent=1))
    return report_text(report, split)
