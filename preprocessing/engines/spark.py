"""The passes of the engine (engine.py) on Spark: the same functions of a block, run by Spark's executors. The same dataset.

1. Raw files are cut into pieces at line ends; what is packed, or is no text, is first copied, a task each file.
2. Each piece becomes canonical rows, kept on the executors' disks. How many there are tells every piece which rows precede
   its own, so that it finds their positions by itself.
3. Train rows are counted for vocabularies and scalers: within the pieces, then a task for each table sums up.
4. Rows are encoded and sent to the task that writes the part in which their positions lie.

Executors see the raw folder and `--out` under the paths that the driver knows, and have this package installed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import numpy as np
import pyarrow as pa

from mmlrec.errors import ConfigError, DataError
from mmlrec.schema import DatasetManifest
from preprocessing.dataset import Dataset, datasets
from preprocessing.encoding.against_train import AgainstTrain
from preprocessing.encoding.encoder import Encoder, encoded_schema
from preprocessing.encoding.fitted import Fitted
from preprocessing.encoding.groups import MergedGroups
from preprocessing.encoding.identity import check_given
from preprocessing.encoding.missing import MissingCounter
from preprocessing.engines.local import complete
from preprocessing.engines.spark_pieces import (
    Cut,
    Failure,
    PieceRows,
    Stretch,
    canonical_rows,
    from_stream,
    stretches,
    to_stream,
)
from preprocessing.progress import progress
from preprocessing.reading.raw_files import RawFolder
from preprocessing.split_rules import COPY_COLUMN, TimeSplit, split_names
from preprocessing.writing import shuffle
from preprocessing.writing.copies import Copies, count_copies, marked
from preprocessing.writing.output import new_folder
from preprocessing.writing.parts import NUM_LANES, SplitWriter, Written, join_splits, part_size, row_group_size
from preprocessing.writing.shuffle import BucketPlan, ordered, scatter
from preprocessing.writing.splits import IntArray, Placement, digit_counts, find_cuts, times

if TYPE_CHECKING:
    from pyspark import RDD, SparkContext

_LOGGING = """rootLogger.level = error
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = error
logger.executor.name = org.apache.spark.executor.Executor
logger.executor.level = off
logger.tasks.name = org.apache.spark.scheduler.TaskSetManager
logger.tasks.level = off
logger.jobs.name = org.apache.spark.scheduler.DAGScheduler
logger.jobs.level = off
"""

T = TypeVar("T")

_HASHES = 1 << 22


def build(
    dataset: Dataset,
    raw: RawFolder,
    out: Path,
    *,
    seed: int,
    parity: bool,
    options: dict[str, Any],
    fitted: Fitted | None = None,
) -> DatasetManifest:
    """Make the dataset folder `out` as `engine.build` does, to the byte.

    An active SparkContext is used, and left running; else one is started, with Spark's own configuration. Vocabularies, those
    that are given, too, are in the memory of the driver and of each task.

    Raises:
        ConfigError: the dataset does not come in blocks, or does not fit to `fitted`; or Spark cannot be started.
        DataError: bad raw data, a place that cannot be written, or a failure of Spark.
    """
    if not _in_blocks(type(dataset)):
        able = ", ".join(name for name, kind in datasets().items() if _in_blocks(kind))
        raise ConfigError(f"--engine spark: {dataset.name} is read in one go, not in pieces. The option works for: {able}.")
    if dataset.duplicates == "drop":
        raise ConfigError(
            "--engine spark: copies of rows are dropped on one machine only. Leave --engine away, or keep them on one side with"
            " duplicates: keep_together."
        )
    if fitted is not None:
        check_given(dataset, fitted, parity, split_names(dataset.split), raw.workers)
    with new_folder(out) as folder, _spark(f"mmlrec {dataset.name}", folder) as context:
        raw.scratch = folder / "scratch"
        raw.scratch.mkdir()
        dataset.prepare(raw)
        job = _Job(context, dataset, raw, seed, parity, fitted)
        rows = job.read()
        placed = job.place(rows)
        encoder, statistics, against_train = job.fit(rows, placed)
        statistics |= {"duplicates": job.copies(rows, placed).statistics(dataset.duplicates)} | against_train
        written = job.write(rows, placed, encoder, folder)
        shutil.rmtree(raw.scratch)
        return complete(dataset, raw, folder, encoder, written, statistics, parity, options)


def _in_blocks(kind: type[Dataset]) -> bool:
    return kind.batches is Dataset.batches and kind.sources is not Dataset.sources


@dataclass
class _File:
    """A raw file that gives rows: its pieces, as far as they could be had."""

    name: str
    cuts: list[Cut] = field(default_factory=list)
    num_lines: int = 0
    failure: Failure | None = None


@dataclass(frozen=True)
class _Placed:
    """Where rows go: `before` tells, for each piece, the sizes of all that precedes it, [3]."""

    placement: Placement
    before: list[IntArray]


class _Job:
    """The steps of a run."""

    def __init__(
        self, context: SparkContext, dataset: Dataset, raw: RawFolder, seed: int, parity: bool, fitted: Fitted | None
    ) -> None:
        self._context, self._dataset, self._raw, self._parity, self._fitted = context, dataset, raw, parity, fitted
        self._shared = context.broadcast(dataset)
        self._placement = Placement(dataset.placing, seed, raw.scratch)
        self._seed = seed
        self._sizes: list[IntArray] = []

    def read(self) -> RDD[PieceRows]:
        """The canonical rows. Raises DataError with the first complaint in the order of files and lines."""
        from pyspark import StorageLevel

        files, sources = self._cut(), {source.name: source for source in self._dataset.present_sources(self._raw)}
        numbered = list(enumerate(cut for file in files for cut in file.cuts))
        shared, limit = self._shared, self._raw.bad_rows.limit
        placement = None if self._cuts_unknown() else self._placement

        def rows_of(item: tuple[int, Cut]) -> PieceRows:
            return canonical_rows(item[0], item[1], shared.value, placement, limit)

        rows = self._spread(numbered).map(rows_of).persist(StorageLevel.DISK_ONLY)
        kept = 0
        with progress(f"{self._dataset.name}: read") as done:
            found = iter(sorted(rows.map(PieceRows.account).collect(), key=lambda piece: piece.index))
            for file in files:
                num_rows, example = 0, None
                for _ in file.cuts:
                    piece = next(found)
                    if piece.work is not None:
                        example = example or next(iter(piece.work.bad_rows), None)
                        self._raw.account(file.name, piece.work)
                        num_rows += piece.work.num_rows
                    if piece.failure is not None:
                        raise piece.failure
                    self._sizes.append(piece.sizes)
                    done.update(piece.num_rows)
                    kept += piece.num_rows
                if file.failure is not None:
                    raise file.failure
                if not num_rows and (example or not sources[file.name].may_be_empty(self._raw)):
                    raise self._raw.no_rows(file.name, example)
        if not kept:
            raise self._raw.nothing()
        return rows

    def place(self, rows: RDD[PieceRows]) -> _Placed:
        """Count the rows of the splits. Raises DataError when one would be empty."""
        if self._cuts_unknown():
            self._find_cuts(rows)
        before = np.cumsum([np.zeros(3, np.int64), *self._sizes], axis=0)
        self._placement.add(before[-1])
        self._placement.close(self._dataset.name)
        return _Placed(self._placement, list(before[:-1]))

    def fit(self, rows: RDD[PieceRows], placed: _Placed) -> tuple[Encoder, dict[str, Any], dict[str, Any]]:
        """The encoder, fitted on the train rows; counts of groups and missing values; and of what is given and does not fit."""
        fit_end, known = placed.placement.fit_end(self._parity), self._known()
        encoder, groups, missing, against = blank = self._counters(placed.placement.names)
        shared = self._context.broadcast(blank)

        def count(pieces: Iterable[PieceRows]) -> Iterator[tuple[int, Any]]:
            encoder, groups, missing, against = deepcopy(shared.value)
            for piece in pieces:
                for batch, positions in piece.positions(placed.placement, placed.before[piece.index]):
                    splits = placed.placement.splits(positions)
                    encoder.fit(batch.filter(pa.array(positions < fit_end)))
                    groups.add(batch)
                    missing.add(missing.counts(batch, splits))
                    for each in against:
                        each.add(batch, known.value.encode(batch), splits)
            yield from enumerate([*encoder.counters(), *groups.counters.values(), missing, *against])

        counters = [*encoder.counters(), *groups.counters.values(), missing, *against]
        with progress(f"{self._dataset.name}: count values", placed.placement.num_rows) as done:
            num_tasks = min(len(counters), 4 * self._context.defaultParallelism)
            counted = rows.mapPartitions(count).reduceByKey(_merged, num_tasks, _same)
            for index, counter in counted.collect():
                counters[index].merge(counter)
            done.update(placed.placement.num_rows)
        encoder.freeze()
        return encoder, groups.statistics() | missing.statistics(), against[0].statistics() if against else {}

    def _counters(self, splits: tuple[str, ...]) -> tuple[Encoder, MergedGroups, MissingCounter, list[AgainstTrain]]:
        """What counts, of a task or of all; the last one where there is something given."""
        dataset, fitted = self._dataset, self._fitted
        encoder, missing = Encoder(dataset.features, self._parity, fitted), MissingCounter(dataset.features, splits)
        return encoder, MergedGroups(dataset), missing, [AgainstTrain(dataset.features, splits, fitted)] if fitted else []

    def _known(self) -> Any:
        """The encoder of what is given, before anything grows, as the tasks have it; None where nothing is given."""
        if self._fitted is None:
            return None
        known = Encoder(self._dataset.features, self._parity, replace(self._fitted, grows=False, refit_ranges=False))
        known.freeze()
        return self._context.broadcast(known)

    def copies(self, rows: RDD[PieceRows], placed: _Placed) -> Copies:
        """Count the rows that are equal to others. A task holds the hashes of some `_HASHES` rows."""
        placement = placed.placement
        num_tasks = max(4 * self._context.defaultParallelism, placement.num_rows // _HASHES)

        def by_hash(piece: PieceRows) -> Iterator[tuple[int, bytes]]:
            for batch, positions in piece.positions(placement, placed.before[piece.index]):
                marks = marked(batch.column(COPY_COLUMN).to_numpy(), placement.splits(positions))
                task = (marks >> np.uint64(32)) % np.uint64(num_tasks)
                for each in np.unique(task):
                    yield int(each), marks[task == each].tobytes()

        def count(grouped: tuple[int, Iterable[bytes]]) -> Copies:
            return count_copies(np.frombuffer(b"".join(grouped[1]), np.uint64).copy())

        return sum(rows.flatMap(by_hash).groupByKey(num_tasks, _same).map(count).collect(), Copies())

    def write(self, rows: RDD[PieceRows], placed: _Placed, encoder: Encoder, folder: Path) -> dict[str, Written]:
        """Parts of train, valid and test."""
        placement, dataset = placed.placement, self._dataset
        group_rows = row_group_size(placement.train_end, NUM_LANES)
        part_rows = part_size(group_rows)
        plan = BucketPlan(placement.borders, part_rows, min(shuffle.BUCKET_ROWS, part_rows))
        part_of_bucket = [part for part, (_, _, buckets) in enumerate(plan.parts) for _ in buckets]
        shared_encoder, schema, scratch = self._context.broadcast(encoder), encoded_schema(dataset), self._raw.scratch
        tasks, scenario, names = dataset.tasks, dataset.scenario, placement.names

        def encode(piece: PieceRows) -> Iterator[tuple[int, bytes]]:
            for batch, positions in piece.positions(placement, placed.before[piece.index]):
                rows = shared_encoder.value.encode(batch).select(schema.names).cast(schema)
                for bucket, own in scatter(rows, positions, plan):
                    yield bucket, to_stream([own], own.schema)

        scaled = dataset.scaled

        def write(part: int, content: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, Path, Written] | OSError]:
            split, number, _ = plan.parts[part]
            place = scratch / uuid4().hex  # a task may be tried twice at a time
            try:
                place.mkdir()
                writer = SplitWriter(place, names[split], group_rows, tasks, scenario, number, scaled)
                for _, streams in groupby(content, itemgetter(0)):
                    writer.write(ordered(batch for _, stream in streams for batch in from_stream(stream)))
                yield part, place, writer.close()
            except OSError as error:
                yield error

        with progress(f"{dataset.name}: encode, write", placement.num_rows) as done:
            by_part = rows.flatMap(encode).repartitionAndSortWithinPartitions(len(plan.parts), part_of_bucket.__getitem__)
            results = by_part.mapPartitionsWithIndex(write).collect()
            done.update(placement.num_rows)
        found: list[list[Written]] = [[] for _ in names]
        for result in sorted(_or_raise(results), key=itemgetter(0)):
            part, place, written = result
            (folder / names[plan.parts[part][0]]).mkdir(exist_ok=True)
            for file in written.split.parts:
                (place / file.path).rename(folder / file.path)
            found[plan.parts[part][0]].append(written)
        return {name: join_splits(parts) for name, parts in zip(names, found, strict=True)}

    def _cut(self) -> list[_File]:
        """The pieces of the files, up to the first file that cannot be read to its end."""
        files: list[_File] = []
        orders: list[Stretch] = []
        for source in self._dataset.present_sources(self._raw):
            files.append(_File(source.name))
            try:
                orders += stretches(len(files) - 1, source, self._raw)
            except DataError as error:
                files[-1].failure = error
                break
        raw, scratch = self._raw, self._raw.scratch
        found = self._spread(orders).map(lambda order: order.cut(raw, scratch)).collect()
        for order, (cuts, num_lines, failure) in zip(orders, found, strict=True):
            file = files[order.file]
            if file.failure is None:
                file.cuts += [replace(cut, first_line=cut.first_line + file.num_lines) for cut in cuts]
                file.num_lines += num_lines
                file.failure = failure
        broken = next((index for index, file in enumerate(files) if file.failure is not None), len(files))
        return files[: broken + 1]

    def _cuts_unknown(self) -> bool:
        rule = self._dataset.split
        return isinstance(rule, TimeSplit) and rule.cuts is None

    def _find_cuts(self, rows: RDD[PieceRows]) -> None:
        from pyspark import StorageLevel

        rule = self._dataset.split
        assert isinstance(rule, TimeSplit)

        def moments(piece: PieceRows) -> IntArray:
            return np.concatenate([np.empty(0, np.int64), *(times(batch, rule) for batch in piece.batches())])

        every = rows.map(moments).persist(StorageLevel.DISK_ONLY)
        num_rows = every.map(len).sum()
        if num_rows:

            def counts(shift: int, prefix: int) -> IntArray:
                return every.map(lambda t: digit_counts(t, shift, prefix)).reduce(np.add)

            cuts = find_cuts(num_rows, counts, rule.fractions)
            placement = self._placement = Placement(rule, self._seed, self._raw.scratch, cuts)
            self._sizes = rows.map(lambda piece: sum(map(placement.sizes, piece.batches()), np.zeros(3, np.int64))).collect()
        every.unpersist()

    def _spread(self, items: list[T]) -> RDD[T]:
        """Items in tasks: one each, or several where there are very many."""
        num_tasks = max(4 * self._context.defaultParallelism, len(items) // 8)
        return self._context.parallelize(items, max(min(num_tasks, len(items)), 1))


def _merged(counter: Any, other: Any) -> Any:
    counter.merge(other)
    return counter


def _same(index: int) -> int:
    return index


def _or_raise(results: list[T | OSError]) -> list[T]:
    for result in results:
        if isinstance(result, OSError):
            raise result
    return results  # type: ignore[return-value]


@contextmanager
def _spark(name: str, folder: Path) -> Iterator[SparkContext]:
    """Spark, and its failures in words. What is started here is stopped at the end, before `folder` may be removed."""
    try:
        from py4j.protocol import Py4JError
        from pyspark import SparkConf, SparkContext
        from pyspark.errors import PySparkException
    except ImportError as error:
        raise ConfigError(f"--engine spark needs PySpark 4 or later ({error}): pip install 'mmlrec[spark]'.") from error
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas")  # which is not used here
    # py4j logs an interrupt before it passes it on, partly under its own name.
    logging.getLogger().addFilter(lambda record: "while sending command" not in record.getMessage())
    logging.getLogger("py4j").setLevel(logging.CRITICAL)
    log_settings = folder / "log4j2.properties"
    log_settings.write_text(_LOGGING, encoding="utf-8")
    defaults = {"PYSPARK_PYTHON": sys.executable, "SPARK_SUBMIT_OPTS": f"-Dlog4j2.configurationFile={log_settings}"}
    added = {variable: value for variable, value in defaults.items() if variable not in os.environ}
    os.environ.update(added)
    try:
        context = SparkContext.getOrCreate(SparkConf().setAppName(name).set("spark.ui.showConsoleProgress", "false"))
    except (PySparkException, Py4JError, OSError) as error:
        raise ConfigError(
            f"--engine spark: Spark cannot be started: {_reason(error)}. It needs Java 17 or later: set JAVA_HOME."
        ) from error
    finally:
        log_settings.unlink()
        for variable in added:
            del os.environ[variable]
    try:
        yield context
    except (PySparkException, Py4JError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise DataError(f"--engine spark: a job failed: {_reason(error)}") from error
    finally:
        if context.appName == name:
            context.stop()


def _reason(error: Exception) -> str:
    """The line that tells: the last of a Python traceback on an executor, or the one that names Java's exception."""
    lines = str(error).partition("\n\tat ")[0].strip().splitlines()
    python = [found[1] for line in lines if (found := re.match(r"(?:\w+\.)*(\w+(?:Error|Exception): .*)", line))]
    java = [line.removeprefix(": ") for line in lines if line.startswith(": ")]
    return [*lines[:1], *java, *python][-1].rstrip(".")
