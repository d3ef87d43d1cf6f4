"""Predictions of a whole split, exact over ranks, and the report made from them."""

from __future__ import annotations

import json
import shlex
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmlrec.data.batch import Batch
from mmlrec.data.reader import Reader
from mmlrec.distributed.stopping import Interrupted, StopSignal
from mmlrec.distributed.world import logger
from mmlrec.errors import DataError, UserError, did_you_mean
from mmlrec.metrics.gather import PredictionRows, gather_rows
from mmlrec.metrics.report import build_report
from mmlrec.models.base.chain import ChainModel
from mmlrec.run_folder.folder import RunFolder, write_atomically
from mmlrec.schema import DatasetManifest
from mmlrec.session.session import Session
from mmlrec.storage.places import Place


def predict_split(
    session: Session,
    batches: Iterator[Batch],
    *,
    stop: StopSignal | None = None,
    total: int | None = None,
    title: str = "",
) -> PredictionRows | None:
    """Run the model over batches and gather rows and logits on rank 0, in the order of the rows on disk.

    The train pipeline must be empty. Every rank must have the same number of batches.

    Args:
        stop: read between batches.
        title: what is done, for the bar and for messages.

    Returns:
        The rows on rank 0, None elsewhere.

    Raises:
        Interrupted: a signal asked to stop.
        DataError: a logit is not finite.
    """
    waiting: deque[Batch] = deque()

    def remember() -> Iterator[Batch]:
        # The pipeline returns predictions without their batch, in the order in which it took the batches.
        for index, batch in enumerate(session.prepare(batches, training=False)):
            if stop is not None and stop.before(index):
                return
            session.world.at(title)
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
    world = session.world
    if stop is not None and stop.agreed():
        raise stopped(stop, title)
    world.at(f"{title}: gathering the scores")
    rows = gather_rows(collected, rank=world.rank, world_size=world.world_size, group=world.control)
    world.raise_together(None if rows is None else _not_finite(rows))
    return rows


def stopped(stop: StopSignal, title: str) -> Interrupted:
    """The error of an evaluation that a signal ends."""
    return stop.interrupted(
        f"{title}: stopped by a signal before the end; nothing of it is written. Run the same command again."
    )


def _not_finite(rows: PredictionRows) -> DataError | None:
    bad = np.flatnonzero(~np.isfinite(rows.logits).all(axis=1))
    if not len(bad):
        return None
    return DataError(
        f"the model gives no finite score to {len(bad)} of {len(rows.row)} rows (the first: row {rows.row[bad[0]]}): weights or"
        " table rows that they use are not finite, or too large. The run has diverged: train again with lower learning rates,"
        " from the start or from an earlier checkpoint of the run (apps.train --run-dir --from-step)."
    )


def evaluate_split(
    session: Session, split: str, stop: StopSignal | None = None, dataset: Place | None = None
) -> dict[str, Any]:
    """The task x scenario report of a split, on every rank.

    Args:
        dataset: holds the rows, where they are not those that the run was trained on; encoded like these.

    Raises:
        DataError: the split is empty or damaged, or a score is not finite.
        Interrupted: a signal asked to stop.
    """
    reader = session.reader(split, dataset)
    title = f"evaluating {split}"
    rows = predict_split(session, reader.sequential(), stop=stop, total=reader.num_batches, title=title)
    if not session.check_parts(stop) and stop is not None:
        raise stopped(stop, title)
    tell_unseen(session, reader, dataset or session.encoder)
    report, error = None, None
    session.world.at(f"computing the metrics of {split}")
    if rows is not None:
        try:
            network = session.network
            report = build_report(
                rows,
                tasks=session.spec.tasks,
                scenario=session.manifest.scenario,
                chain=network.chain,
                conditional=not isinstance(network, ChainModel) or network.conditional,
                deviations=session.deviations,
            )
            if isinstance(network, ChainModel) and network.config.allow_non_chain:
                report["allow_non_chain"] = True
        except UserError as cause:
            error = cause
    session.world.raise_together(error)
    result = session.world.from_main(report)
    assert isinstance(result, dict)
    return result


def choose_split(manifest: DatasetManifest, folder: Place, asked: str | None) -> str:
    """The split that is asked for; else test, or the only one.

    Raises:
        DataError: it is not there, or none is asked for and several are.
    """
    names = ", ".join(manifest.splits)
    if asked is not None:
        if asked not in manifest.splits:
            raise DataError(f"{folder}: there is no split '{asked}'.{did_you_mean(asked, manifest.splits)} Splits: {names}.")
        return asked
    if "test" in manifest.splits:
        return "test"
    if len(manifest.splits) > 1:
        raise DataError(f"{folder}: which of its splits? Name one with --split: {names}.")
    return next(iter(manifest.splits))


def tell_unseen(session: Session, reader: Reader, dataset: Place) -> None:
    """On all ranks, after a pass: how many ids were read as 0 because they are behind the vocabularies of the run."""
    totals: dict[str, int] = {}
    for of_rank in session.world.gather(reader.beyond):
        for feature, count in of_rank.items():
            totals[feature] = totals.get(feature, 0) + count
    if totals:
        told = ", ".join(f"{feature} {count:,}" for feature, count in totals.items())
        logger.info("%s: ids that the run has no rows for, read as 0 (unseen): %s", dataset, told)


def check_labels(session: Session, manifest: DatasetManifest, dataset: Place, split: str) -> None:
    """Raise DataError when no row of a split has a label of any task of the run."""
    counts, names = manifest.splits[split].label_counts, [task.name for task in session.spec.tasks]
    if not any(counts[name]["all"][0] for name in names if name in counts):
        raise DataError(
            f"{dataset}: no row of {split} has a label of {', '.join(names)}, so there is nothing to measure. Scores need no"
            f" labels: python -m apps.predict --run-dir RUN --input {shlex.quote(str(dataset))} --output scores.parquet"
        )


def write_result(folder: RunFolder, split: str, report: dict[str, Any], *, step: int) -> None:
    """Put a split's report into `result.json`, in place of all that are of another step."""
    result = folder.read_result()
    if result.get("step") != step:
        result = {}
    result[split] = report
    result["step"] = step
    write_atomically(folder.result, json.dumps(result, indent=1))
