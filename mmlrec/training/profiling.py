"""`--profile START:END`: a trace of each rank, and a table of the step's parts."""

from __future__ import annotations

import contextlib
import gzip
import shutil
from pathlib import Path

from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from mmlrec.distributed.step_parts import PARTS, WAITING
from mmlrec.distributed.world import World, logger
from mmlrec.run_folder.folder import RunFolder, write_atomically


class Profile:
    """Records steps `first` to `last`, counted from 1, of one segment: it ends with the segment that it begins in.

    Args:
        steps: first and last step.
    """

    def __init__(self, steps: tuple[int, int], folder: RunFolder, world: World) -> None:
        self._first, self._last = steps
        self._folder, self._world = folder, world
        self._profiler: profile | None = None
        self._begun_at = 0
        self._done = False

    def before(self, step: int) -> None:
        """Step number `step` is about to be taken."""
        if self._profiler is not None or self._done or not self._first <= step <= self._last:
            return
        self._world.at("starting the profiler")
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._begun_at, self._before = step, dict(self._world.parts.seconds)
        self._world.parts.annotated = True

    def after(self, step: int, *, last: bool) -> None:
        """Step number `step` has been taken, the last one of its segment perhaps."""
        if last or step == self._last:
            self.end(step)

    def end(self, step: int) -> None:
        """Stop behind step number `step`, where it runs: write the trace of this rank, and on rank 0 the table. All ranks."""
        if self._profiler is None:
            return
        profiler, self._profiler, self._done = self._profiler, None, True
        parts = self._world.parts
        parts.annotated = False
        self._world.at("writing the profile")
        profiler.stop()
        steps = step - self._begun_at + 1
        own = [1000 * (parts.seconds[part] - self._before[part]) / steps for part in PARTS]
        text = parts_table(self._world.gather(own))
        folder = self._folder.profile
        trace = folder / f"rank-{self._world.rank:05d}.json.gz"
        try:
            folder.mkdir(exist_ok=True)
            _export(profiler, trace)
            if self._world.is_main:
                write_atomically(folder / "parts.txt", f"steps {self._begun_at} to {step}\n{text}\n")
        except (OSError, RuntimeError) as error:  # the latter from torch, which writes the trace
            logger.warning("note: %s: %s; the run goes on without it.", folder, error)
        if self._world.is_main:
            shorter = "" if step == self._last else f" (not {self._last}: a validation or checkpoint came)"
            shown = self._folder.path / folder.name
            logger.info("profile of steps %d to %d%s in %s\n%s", self._begun_at, step, shorter, shown, text)


def parts_table(milliseconds: list[list[float]]) -> str:
    """The table of a step's parts.

    Args:
        milliseconds: of a step, a row for each rank, in the order of `PARTS`.
    """
    rows = []
    columns = list(zip(*milliseconds, strict=True))
    for part, values in zip(PARTS, columns, strict=True):
        if any(values) and (part != WAITING or len(values) > 1):
            rows.append([part, f"{_mean(values):.3f}", f"{max(values):.3f}", values.index(max(values))])
    totals = [sum(values) for values in milliseconds]
    rows.append(["step", f"{_mean(totals):.3f}", f"{max(totals):.3f}", totals.index(max(totals))])
    return tabulate(rows, headers=["part", "mean ms", "max ms", "of rank"], disable_numparse=True, stralign="right")


def _mean(values: list[float] | tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _export(profiler: profile, trace: Path) -> None:
    """Write the trace, packed, under its name only when it is whole."""
    plain, packed = trace.with_suffix(".part"), trace.with_suffix(".gz.part")
    try:
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=4) as target:
            shutil.copyfileobj(source, target)
        packed.replace(trace)
    finally:
        for path in (plain, packed):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
