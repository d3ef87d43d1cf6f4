"""What is on record of the days in their folder: the configuration, and a line for each day.

`days.yaml` says how the days are trained, and is written once, with the first line. `days.jsonl` has one line for each day that
was measured or trained, and is replaced as a whole. It holds nothing of the clock, so that days that were interrupted leave the
same bytes. Before the first line there is nothing to keep to: a mistake in the configuration can be mended.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from mmlrec.config import RunConfig
from mmlrec.days.folders import Day
from mmlrec.distributed.world import World
from mmlrec.errors import ConfigError, UserError
from mmlrec.run_folder.folder import (
    RunFolder,
    check_no_others,
    data_state,
    delete_leftovers,
    differences,
    names_of,
    write_atomically,
)
from mmlrec.run_folder.lock import unwritable
from mmlrec.schema import facts_digest
from mmlrec.storage.places import Place, read

CURVES = "days.png"
#: What the line of a day has, see `Record`.
KEYS = ("day", "dataset", "data", "rows", "new_ids", "next_day", "unseen", "forgotten", "step")
#: Of training: a run may go on for longer, but not a day, as the next one has begun with what came of it.
_LENGTH = ("epochs", "max_steps")


class Record:
    """The record in a folder of days; all ranks hold the same, rank 0 alone writes.

    Attributes:
        lines: of the days, in their order. `day`, its name; `dataset`, its folder; `data`, a digest of what that holds; `rows`
            of each split; `new_ids` of each vocabulary; `next_day`, the report of the model of the day before on all rows of
            this one, and `unseen`, how many ids it did not know, null where there is no such model; `forgotten` rows of each
            table, null where none are forgotten; `step` of the best checkpoint, null until the day is trained.
    """

    def __init__(self, folder: Place, world: World) -> None:
        self.folder = folder
        self._world = world
        self._settings, self._lines = folder / "days.yaml", folder / "days.jsonl"
        self.lines: list[dict[str, Any]] = []
        self._text = ""

    def check_place(self, days: Sequence[Day]) -> None:
        """Refuse a folder of other things; see `RunFolder.check_place`.

        Raises:
            ConfigError: it holds a run.
            UserError: it holds things of other kinds under the names of what is written there.
        """
        names = names_of(self.folder)
        if "config.yaml" in names:
            raise ConfigError(f"{self.folder} holds a run; days have a folder of their own. Choose another --run-dir.")
        if not names & {self._settings.name, self._lines.name}:
            begun = [self._settings.name, *(day.name for day in days)]
            check_no_others(self.folder, names, [*begun, CURVES], begun)

    def begin(self, config: RunConfig, forget_after: int | None, days: Sequence[Day]) -> None:
        """Read what is there, and refuse other days and another configuration.

        Args:
            config: of any of the days.

        Raises:
            ConfigError: naming each key, or the day, that differs.
            UserError: what is there is damaged.
        """
        content = {"forget_after": forget_after, "config": config.model_dump(mode="json")}
        self._text = yaml.safe_dump(content, sort_keys=False)
        self._world.on_main(self._take_up, config, forget_after, days)
        lines = self._world.from_main(self.lines)
        assert isinstance(lines, list)
        self.lines = lines

    def _take_up(self, config: RunConfig, forget_after: int | None, days: Sequence[Day]) -> None:
        self._clear()
        self.lines = self._read()
        if self.lines:
            self._check_settings(config, forget_after)
            self._check_days(days)

    def line(self, day: Day) -> dict[str, Any] | None:
        """That of a day; None where it was not begun."""
        return next((line for line in self.lines if line["day"] == day.name), None)

    def put(self, line: dict[str, Any]) -> None:
        """Add the line of a day, or replace it.

        Raises:
            UserError: the folder cannot be written.
        """
        first = not self.lines
        self.lines = [other for other in self.lines if other["day"] != line["day"]] + [line]
        self._world.on_main(self._write_all, first)

    def _write_all(self, first: bool) -> None:
        if first:
            self._write(self._settings, self._text)
        self._write(self._lines, "".join(json.dumps(of_day) + "\n" for of_day in self.lines))

    def _clear(self) -> None:
        try:
            for path in (self._settings, self._lines):
                delete_leftovers(path)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def _read(self) -> list[dict[str, Any]]:
        if not self._lines.is_file():
            return []
        try:
            lines = [dict(json.loads(line)) for line in read(self._lines).splitlines()]
            for number, line in enumerate(lines, start=1):
                if missing := [key for key in KEYS if key not in line]:
                    raise ValueError(f"line {number} has no '{missing[0]}'")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self._lines} is damaged: {error}. Bring it back, or choose another --run-dir.") from error
        return lines

    def _check_settings(self, config: RunConfig, forget_after: int | None) -> None:
        try:
            before = yaml.safe_load(read(self._settings))
            config_before, forgotten_before = RunConfig.model_validate(before["config"]), before["forget_after"]
        except (FileNotFoundError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise UserError(f"{self._settings} is damaged: {error}. Bring it back, or choose another --run-dir.") from error
        different = differences(config_before, config)
        for key in _LENGTH:
            before_and_now = getattr(config_before.training, key), getattr(config.training, key)
            if before_and_now[0] != before_and_now[1]:
                different[f"training.{key}"] = before_and_now
        if forgotten_before != forget_after:
            different["--forget-after"] = forgotten_before, forget_after
        if different:
            listed = "".join(f"  {key}: {old!r} in the folder, {new!r} now\n" for key, (old, new) in different.items())
            raise ConfigError(
                f"{self.folder} holds days with another configuration:\n{listed}Undo the change, or choose another --run-dir."
            )

    def _check_days(self, days: Sequence[Day]) -> None:
        for number, line in enumerate(self.lines):
            if number >= len(days) or days[number].name != line["day"]:
                found = f"'{days[number].name}'" if number < len(days) else "no further day"
                raise ConfigError(
                    f"{self.folder} holds other days: its day {number + 1} is '{line['day']}', and --days gives {found}"
                    " there. Days can be added behind those that are on record. Undo the change, or choose another --run-dir."
                )
            if data_digest(days[number]) != line["data"]:
                self._refuse_changed(days[number], line)

    def _refuse_changed(self, day: Day, line: dict[str, Any]) -> None:
        of_day = RunFolder(self.folder / day.name)
        listed = ""
        if of_day.dataset.is_file() and line["step"] is not None:
            try:
                of_day.check_same_data(json.loads(read(of_day.dataset)), day.folder)
            except ConfigError as error:
                listed = "\n" + "\n".join(text for text in str(error).split("\n") if text.startswith("  "))
        done = "measured" if line["step"] is None else "trained"
        raise ConfigError(
            f"{day.folder} was changed since day '{day.name}' was {done} in {self.folder}.{listed}\n"
            "Bring the data back, or choose another --run-dir."
        )

    def _write(self, path: Place, text: str) -> None:
        try:
            write_atomically(path, text)
        except OSError as error:
            raise unwritable(self.folder, error) from error


def data_digest(day: Day) -> str:
    """What a day's dataset holds, rows and encoding, as a digest."""
    return facts_digest(data_state(day.manifest))
