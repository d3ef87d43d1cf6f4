"""The days, one after the other: measure the model of the day before, then train on from it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmlrec.config import RunConfig
from mmlrec.days.folders import Day, check_extended, new_ids
from mmlrec.days.forgetting import LAST_SEEN, LastSeen, forgotten_rows, load_seen, note_seen, save_seen, seen_before
from mmlrec.days.record import CURVES, Record, data_digest
from mmlrec.days.table import can_draw, draw_days
from mmlrec.distributed.stopping import StopSignal
from mmlrec.distributed.world import World, logger
from mmlrec.encoding.folders import encoder_folder
from mmlrec.errors import StorageError
from mmlrec.evaluation.evaluation import evaluate_splits
from mmlrec.run_folder.folder import RunFolder, delete_leftovers
from mmlrec.run_folder.one_writer import hold
from mmlrec.schema import SPLITS, DatasetManifest
from mmlrec.session.session import load_session
from mmlrec.storage.places import Place, place
from mmlrec.training.guard import Diverged
from mmlrec.training.run import train


def run_days(
    config: RunConfig,
    days: Sequence[Day],
    run_dir: Place,
    world: World,
    *,
    forget_after: int | None = None,
    source: str = "config",
) -> list[dict[str, Any]]:
    """Go through the days, from where they were left, each in a run folder of its own below `run_dir`.

    The model of the day before is measured on all rows of a day, none of which it has seen; then it is trained on the rows of
    train, chosen by those of valid and measured on those of test, as every run.

    Args:
        config: of each day; its dataset is replaced by that of the day. `init_from` is the run that the first day begins with.
        forget_after: rows that were not in train for so many days start afresh; None: none do.
        source: config file, for messages.

    Returns:
        The lines of the record, see `Record`.

    Raises:
        UserError: a day or the configuration is unusable, or other than those on record; another run writes there; or a signal
            stopped it.
    """
    record = Record(run_dir, world)
    world.on_main(record.check_place, days)
    with hold(run_dir, world):
        record.begin(config, forget_after, days)
        begun = sum(line["step"] is not None for line in record.lines)
        world.at("comparing the vocabularies of the days")
        world.without_limit().on_main(check_extended, days[max(begun - 1, 0) :])
        for number in range(begun, len(days)):
            if number > begun:
                _end_if_late(record, days[number - 1], "trained", world)
            _one_day(config, days, number, record, world, forget_after, source)
            gc.collect()  # tables of the models of this day
        if world.is_main:
            _draw(record)
        return record.lines


@dataclass(frozen=True)
class _Before:
    """The run that a day begins with: that of the day before, or for the first day what the configuration names, if any."""

    run: Place | None
    manifest: DatasetManifest | None

    @classmethod
    def of(cls, config: RunConfig, days: Sequence[Day], number: int, folder: Place) -> _Before:
        if number:
            return cls(folder / days[number - 1].name, days[number - 1].manifest)
        if config.init_from is None:
            return cls(None, None)
        run = place(config.init_from)
        return cls(run, DatasetManifest.load(encoder_folder(run)))

    def seen(self, number: int) -> LastSeen:
        """When rows were last seen before the day."""
        if number:
            assert self.run is not None
            return load_seen(self.run)
        return {} if self.manifest is None else seen_before(self.manifest)


def _one_day(
    config: RunConfig,
    days: Sequence[Day],
    number: int,
    record: Record,
    world: World,
    forget_after: int | None,
    source: str,
) -> None:
    day, before = days[number], _Before.of(config, days, number, record.folder)
    line = record.line(day)
    if line is None:
        line = {
            "day": day.name,
            "dataset": str(day.folder),
            "data": data_digest(day),
            "rows": day.rows,
            "new_ids": new_ids(before.manifest, day.manifest),
            "forgotten": None,
            "next_day": None,
            "unseen": None,
            "step": None,
        }
        if before.run is not None:
            line["next_day"], line["unseen"] = measure(before.run, day, world)
            record.put(line)
            _end_if_late(record, day, "measured", world)
    forgotten: dict[str, NDArray[np.int64]] = {}
    if forget_after is not None:
        forgotten = forgotten_rows(before.seen(number), number, forget_after)
        line["forgotten"] = {table: len(rows) for table, rows in forgotten.items()}
    changes: dict[str, Any] = {"dataset": config.dataset.model_copy(update={"path": str(day.folder)})}
    changes["init_from"] = None if before.run is None else str(before.run)
    of_day = record.folder / day.name
    # The folder of all days may be elsewhere by now, or be spelt otherwise: the day before is the one in it all the same.
    moved = ("init_from",) if number else ()
    try:
        train(config.model_copy(update=changes), of_day, world, source=source, forgotten=forgotten, may_differ=moved)
    except Diverged as error:
        raise error.of_several(f"day {day.name}", f"{record.folder} keeps {number} day(s) that are trained.") from None
    if forget_after is not None:
        world.at("noting which rows were seen")
        world.without_limit().on_main(_note_seen, of_day, before, day, number)
    # Rank 0 has written it; another one may be here before that.
    step = world.from_main(RunFolder(of_day).read_result()["step"] if world.is_main else None)
    record.put(line | {"step": step})


def _end_if_late(record: Record, day: Day, done: str, world: World) -> None:
    message = (
        f"stopped when day {day.name} was {done}; {record.folder} holds what was found. Run the same command again to continue."
    )
    StopSignal.end_if_late(world, message)


def measure(run_dir: Place, day: Day, world: World) -> tuple[dict[str, Any], dict[str, int]]:
    """The report of a run on all rows of a day, and how many of its ids the run does not know."""
    logger.info("%s: measuring the model of %s on all its rows", day.name, run_dir.name)
    session, *_ = load_session(RunFolder(run_dir), world, [], day.folder)
    with StopSignal(world) as stop:
        found = evaluate_splits(session, SPLITS, stop, day.folder)
    del session
    gc.collect()  # its tables, before those of the next model are made
    return found


def _draw(record: Record) -> None:
    if sum(line["next_day"] is not None for line in record.lines) < 2:
        return  # which is no curve
    if not can_draw():
        logger.info("curves need matplotlib, which is not installed: pip install 'mmlrec[plots]', and the same command again")
        return
    try:
        delete_leftovers(record.folder / CURVES)
        draw_days(record.lines, record.folder / CURVES)
    except (OSError, StorageError) as error:
        logger.warning("%s could not be written: %s", record.folder / CURVES, error)


def _note_seen(of_day: Place, before: _Before, day: Day, number: int) -> None:
    """On rank 0: write into the run folder of a day on which days rows were last seen."""
    if not (of_day / LAST_SEEN).is_file():
        save_seen(of_day, note_seen(before.seen(number), day.folder, day.manifest, number))
