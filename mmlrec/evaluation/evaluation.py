"""Predictions of a whole split, and the report made from them; each rank keeps the rows that it predicted."""

from __future__ import annotations

import json
import shlex
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmlrec.data.batch import Batch
from mmlrec.data.reader import Reader
from mmlrec.distributed.stopping import Interrupted, StopSignal
from mmlrec.distributed.world import World, logger
from mmlrec.errors import DataError, did_you_mean
from mmlrec.metrics.gather import Collected, PredictionRows, check_each_once, joined
from mmlrec.metrics.ranks import Ranks
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
    total: int,
    stop: StopSignal | None = None,
    title: str = "",
) -> PredictionRows:
    """Run the model over batches: rows and logits of this rank's batches.

    The train pipeline must be empty. Every rank must have the same number of batches.

    Args:
        total: how many batches there are, at least one.
        stop: read between batches.
        title: what is done, for the bar and for messages.

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

    collected: Collected | None = None
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
            collected = collected or Collected(total * batch.num_rows)
            collected.add(
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
    assert collected is not None
    rows = collected.rows()
    _check_finite(rows, ranks_of(world))
    return rows


def ranks_of(world: World) -> Ranks:
    """The ranks, as metrics know them."""
    return Ranks(world.rank, world.world_size, world.control)


def stopped(stop: StopSignal, title: str) -> Interrupted:
    """The error of an evaluation that a signal ends."""
    return stop.interrupted(
        f"{title}: stopped by a signal before the end; nothing of it is written. Run the same command again."
    )


def _check_finite(rows: PredictionRows, ranks: Ranks) -> None:
    bad = np.sort(rows.row[~np.isfinite(rows.logits).all(axis=1)])
    found = ranks.gather((len(rows.row), len(bad), bad[:1].tolist()))
    num_rows, num_bad = sum(of_rank for of_rank, _, _ in found), sum(of_rank for _, of_rank, _ in found)
    if num_bad:
        first = min(row for _, _, first_bad in found for row in first_bad)
        raise DataError(
            f"the model gives no finite score to {num_bad} of {num_rows} rows (the first: row {first}): weights or"
            " table rows that they use are not finite, or too large. The run has diverged: train again with lower learning"
            " rates, from the start or from an earlier checkpoint of the run (apps.train --run-dir --from-step)."
        )


def evaluate_split(
    session: Session, split: str, stop: StopSignal | None = None, dataset: Place | None = None
) -> dict[str, Any]:
    """The task x scenario report of a split, on every rank. Arguments and errors as of `evaluate_splits`."""
    return evaluate_splits(session, [split], stop, dataset)[0]


def evaluate_splits(
    session: Session, splits: Sequence[str], stop: StopSignal | None = None, dataset: Place | None = None
) -> tuple[dict[str, Any], dict[str, int]]:
    """The task x scenario report of the rows of some splits together; feature -> ids read as unseen. On every rank.

    Args:
        dataset: holds the rows, where they are not those that the run was trained on; encoded like these.

    Raises:
        DataError: a split is empty or damaged, or a score is not finite.
        Interrupted: a signal asked to stop.
    """
    found: list[PredictionRows] = []
    ranks = ranks_of(session.world)
    unseen: dict[str, int] = {}
    session.managed.begin_report()
    for split in splits:
        reader = session.reader(split, dataset)
        title = f"evaluating {split}"
        of_split = predict_split(session, reader.sequential(), stop=stop, total=reader.num_batches, title=title)
        check_each_once(of_split.row, ranks)
        found.append(replace(of_split, row=np.empty(0, np.int64)))  # which is an eighth of the memory
        del of_split  # the list alone has them, which `joined` empties
        for feature, count in unseen_ids(session, reader).items():
            unseen[feature] = unseen.get(feature, 0) + count
    named = " and ".join(splits)
    if not session.check_parts(stop) and stop is not None:
        raise stopped(stop, f"evaluating {named}")
    tell_unseen(unseen, dataset or session.encoder)
    session.world.at(f"computing the metrics of {named}")
    network = session.network
    report = build_report(
        joined(found),
        tasks=session.spec.tasks,
        scenario=session.manifest.scenario,
        chain=network.chain,
        conditional=not isinstance(network, ChainModel) or network.conditional,
        deviations=session.deviations,
        ranks=ranks,
    )
    if isinstance(network, ChainModel) and network.config.allow_non_chain:
        report["allow_non_chain"] = True
    if session.managed:
        report["managed"] = session.managed.report()
        tell_slots(report["managed"], named)
    return report, unseen


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


def unseen_ids(session: Session, reader: Reader) -> dict[str, int]:
    """On all ranks, after a pass: feature -> ids that were read as 0 because they are behind the vocabularies of the run."""
    totals: dict[str, int] = {}
    for of_rank in session.world.gather(reader.beyond):
        for feature, count in of_rank.items():
            totals[feature] = totals.get(feature, 0) + count
    return totals


def tell_unseen(unseen: Mapping[str, int], dataset: Place) -> None:
    """Log what `unseen_ids` found in a dataset."""
    if unseen:
        told = ", ".join(f"{feature} {count:,}" for feature, count in unseen.items())
        logger.info("%s: ids that the run has no rows for, read as 0 (unseen): %s", dataset, told)


def tell_slots(tables: Mapping[str, Mapping[str, int]], title: str) -> None:
    """Log how many ids of managed tables had no slot, as `ManagedTables.report` gives it, after a pass."""
    told = []
    for name, table in tables.items():
        share = table["without_slot"] / max(table["looked_up"], 1)
        told.append(f"{name} {share:.1%} ({table['occupied']:,} of {table['slots']:,} slots held)")
    if told:
        logger.info("%s: ids of managed tables without a slot: %s", title, ", ".join(told))


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
