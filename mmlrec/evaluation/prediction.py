"""Scores of a dataset, as a file, beside the keys and labels of its rows."""

from __future__ import annotations

import contextlib

import numpy as np
import pyarrow as pa

from mmlrec.distributed.stopping import Interrupted, StopSignal
from mmlrec.distributed.world import logger
from mmlrec.errors import DataError, StorageError, UserError
from mmlrec.evaluation.evaluation import predict_split, stopped, tell_slots, tell_unseen, unseen_ids
from mmlrec.evaluation.score_files import ScoreFile, check_replaced, ending
from mmlrec.identity import encoding_differences, grown_tables
from mmlrec.metrics.exact import conditional_logit, log_ratio
from mmlrec.metrics.gather import gather_rows
from mmlrec.models.base.chain import ChainModel
from mmlrec.schema import SCENARIO_COLUMN, WEIGHT_COLUMN, DatasetManifest, Setting, Table, key_column, label_column
from mmlrec.session.session import Session
from mmlrec.storage.new_file import new_file
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place

_OTHER_IDS = "the ids mean something else. Encode the input with the vocabularies of the training data."


def write_predictions(session: Session, dataset: Place, split: str, output: Place, stop: StopSignal | None = None) -> None:
    """Score a split of a dataset folder and write keys, scenario, labels and `score.<task>` in row order; on rank 0.

    The name of the output says how: see `score_files.ENDINGS`. Of labels those of tasks that have some in the split. Last
    come the scenario by name, `scenario.<what divides the rows>`, and `sample.weight`, where there are such: with them the
    metrics of a report can be worked out.

    A method on a chain of tasks adds `score.cvr`, the probability of the last step given the first; of one whose steps are not
    `conditional` it is the ratio of their probabilities, which may be above 1. Where branches have
    been left out (`model.branches`), a task without any has no column, and rows of a scenario without one have no score.

    Raises:
        DataError: the dataset does not have the features and tables the run was trained on.
        UserError: the output has the name of another format, is there and holds no scores, or cannot be written; no part of it
            is left.
        Interrupted: a signal asked to stop; no part of the output is left.
    """
    session.world.on_main(check_replaced, output)
    manifest = DatasetManifest.load(dataset)
    check_same_inputs(session, manifest, dataset)
    reader = session.reader(split, dataset)
    title = f"scoring {split}"
    session.managed.begin_report()
    own = predict_split(session, reader.sequential(), stop=stop, total=reader.num_batches, title=title)
    world = session.world
    world.at(f"{title}: gathering the scores")
    rows = gather_rows(own, rank=world.rank, world_size=world.world_size, group=world.control)
    if not session.check_parts(stop) and stop is not None:
        raise stopped(stop, title)
    tell_unseen(unseen_ids(session, reader), dataset)
    tell_slots(session.managed.report(), title)
    error: UserError | None = None
    if rows is not None:
        try:
            _write(session, manifest, dataset, split, rows.logits, output, stop)
            logger.info("%s: %d rows", output, len(rows.logits))
        except (Interrupted, StorageError) as cause:
            error = cause
        except OSError as cause:
            error = UserError(f"{output}: cannot be written: {cause}. Free space or choose another --output.")
    session.world.raise_together(error)


def check_same_inputs(session: Session, given: DatasetManifest, folder: Place) -> None:
    """Refuse a dataset whose features, or their encoding, are not those that the run was trained on.

    Raises:
        DataError: naming what differs.
    """
    trained = session.manifest
    if trained.features != given.features:
        missing = sorted({f.name for f in trained.features} - {f.name for f in given.features})
        extra = sorted({f.name for f in given.features} - {f.name for f in trained.features})
        detail = f"it lacks {missing}, and has {extra} beyond them" if missing or extra else "in kind or table"
        raise DataError(f"{folder}: its features differ from those the run was trained on: {detail}.")
    with_scenarios = session.config.dataset.setting is not Setting.MTL
    values = [manifest.scenario.values if manifest.scenario else None for manifest in (trained, given)]
    if with_scenarios and values[0] != values[1]:
        raise DataError(f"{folder}: its scenarios are {values[1]}, the run was trained with {values[0]}, in this order.")
    before = trained.encoding if trained.encoding is not None and trained.encoding.comparable(given.encoding) else None
    if before is not None:
        lines = encoding_differences(before, given, folder, scenario=with_scenarios, labels=False, extended=True)
    else:
        lines = _recorded_ranges_differ(session, given, folder)
    if lines:
        raise DataError(
            f"{folder} is encoded otherwise than what the run was trained on:\n" + "\n".join(lines) + "\n"
            "Equal cells would be other inputs to the model. Encode the input as the training data were: with their ranges,"
            " vocabularies and options, as one side of a split by files."
        )
    grown, others = grown_tables(before, given, folder), given.by_name
    for table in trained.tables:
        other = others[table.name]
        # Of a managed table a dataset says how many slots a new run has: its ids are keys, and the rows are the run's own.
        managed = table.managed and other.managed
        if table.num_rows != other.num_rows and table.name not in grown and not managed:
            raise DataError(
                f"{folder}: table '{table.name}' has {other.num_rows} rows, the run was trained with {table.num_rows}:"
                f" {_OTHER_IDS}"
            )
        if _hashing(table) != _hashing(other):
            raise DataError(
                f"{folder}: ids of table '{table.name}' are {_hashing(other)}, the run was trained with {_hashing(table)}:"
                f" {_OTHER_IDS}"
            )
        if table.vocabulary is not None and before is None:
            _check_same_vocabulary(session.encoder / table.vocabulary, folder / table.vocabulary, table.name)


def _recorded_ranges_differ(session: Session, given: DatasetManifest, folder: Place) -> list[str]:
    """Of datasets that do not record their encoding, or in a form that this release does not know: ranges, a line each."""
    own = session.encoder
    if own.resolve() == folder.resolve():
        return []
    without = [str(place) for place, m in ((own, session.manifest), (folder, given)) if m.encoding is None]
    logger.info(
        "%s: whether it is encoded as what the run was trained on cannot be told in full: %s. Features, tables, vocabularies"
        " and ranges are compared.",
        folder,
        f"no record of the encoding of {' and '.join(without)}" if without else "its record is of another release",
    )
    before, now = (manifest.preprocessing.get("dense_ranges") or {} for manifest in (session.manifest, given))
    return [
        f"  feature '{name}', range: {now[name]} here, {seen} in the run"
        for name, seen in before.items()
        if name in now and now[name] != seen
    ]


def _hashing(table: Table) -> str:
    if table.managed:
        return f"keys with seed {table.hash_seed}"
    return "not hashed" if table.hash_seed is None else f"{table.num_hashes} hash(es) with seed {table.hash_seed}"


def _check_same_vocabulary(trained: Place, given: Place, table: str) -> None:
    if trained.resolve() == given.resolve():
        return
    try:
        before, now = (_vocabulary(path) for path in (trained, given))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"vocabulary of table '{table}': training data and input cannot be compared: {error}.") from error
    if not before.equals(now):
        raise DataError(f"{given}: not the vocabulary the run was trained with ({trained}): {_OTHER_IDS}")


def _vocabulary(path: Place) -> pa.Table:
    with open_parquet(path) as file:
        return file.read(columns=["value", "id"])


def _write(
    session: Session,
    manifest: DatasetManifest,
    dataset: Place,
    split: str,
    logits: np.ndarray,
    output: Place,
    stop: StopSignal | None,
) -> None:
    columns = [key_column(key) for key in manifest.keys] + ([SCENARIO_COLUMN] if manifest.scenario else [])
    columns += [label_column(task) for task, counts in manifest.splits[split].label_counts.items() if counts["all"][0]]
    start = 0
    with new_file(output, session.world.start) as temporary, contextlib.ExitStack() as stack:
        writer: ScoreFile | None = None
        for part in manifest.splits[split].parts:
            with open_parquet(dataset / part.path, part.num_bytes, part.sha256) as file:
                weights = [WEIGHT_COLUMN] if WEIGHT_COLUMN in file.schema_arrow.names else []
                for batch in file.iter_batches(batch_size=1 << 18, columns=columns + weights):
                    if stop is not None and stop.received:  # of this rank, which alone writes
                        raise stop.interrupted(f"{output}: not written: stopped by a signal. Run the same command again.")
                    scores = logits[start : start + batch.num_rows]
                    arrays, names = [batch.column(name) for name in columns], list(columns)
                    scenario = np.zeros(len(scores), np.int64)
                    if session.spec.num_scenarios > 1:
                        scenario = batch.column(SCENARIO_COLUMN).to_numpy()
                    for name, column in score_columns(session, scores, scenario).items():
                        arrays.append(column)
                        names.append(name)
                    if manifest.scenario is not None:
                        arrays.append(pa.array(manifest.scenario.values).take(batch.column(SCENARIO_COLUMN)))
                        names.append(f"scenario.{manifest.scenario.name}")
                    arrays += [batch.column(name) for name in weights]
                    names += weights
                    table = pa.table(arrays, names=names)
                    if writer is None:
                        writer = ScoreFile(temporary, ending(output), table.schema)
                        stack.callback(writer.close)
                    writer.write(table)
                    start += len(scores)


def score_columns(session: Session, logits: np.ndarray, scenario: np.ndarray) -> dict[str, pa.Array]:
    """What `write_predictions` writes of some rows beside their keys, by the name of the column, float32.

    Args:
        logits: [N, T]; of a regression task the value.
        scenario: [N] int64; 0 without scenarios.
    """
    network = session.network
    branches = list(network.branches) or range(session.spec.num_heads)
    trained = np.isin(np.arange(session.spec.num_heads), branches).reshape(session.spec.num_tasks, -1)
    columns = {}
    for index, task in enumerate(session.spec.tasks):
        if trained[index].any():
            values = _probability(logits[:, index]) if task.kind == "binary" else logits[:, index]
            columns[f"score.{task.name}"] = pa.array(values, mask=~trained[index][scenario])
    if isinstance(network, ChainModel) and "score.cvr" not in columns:
        steps = logits[:, network.chain[0]], logits[:, network.chain[-1]]
        rate = _probability(conditional_logit(*steps)) if network.conditional else np.exp(log_ratio(*steps))
        columns["score.cvr"] = pa.array(rate.astype(np.float32))
    return columns


def _probability(logits: np.ndarray) -> np.ndarray:
    return (1.0 / (1.0 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
