"""What a run tells while it trains: progress bar, log file, metrics.jsonl and TensorBoard. Rank 0; the others log their times.

A disk that is full stops reports, never the run: it is told when it happens and again at the end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mmlrec.distributed.world import World, logger
from mmlrec.metrics.notes import too_good
from mmlrec.metrics.report import entries_of, shown_name
from mmlrec.run_folder.folder import RunFolder
from mmlrec.training.slowest import REPORTED, RankTimes

#: Scenarios of a task that have curves in TensorBoard; a page of more than these cannot be read.
_MOST_SCENARIOS = 32


class Reporter:
    """Context manager that owns the progress bar and the open files of one run.

    Args:
        total_steps: last step of the run, for the bar's estimate.
        first_step: step at which this process starts.
    """

    def __init__(self, folder: RunFolder, world: World, *, first_step: int, total_steps: int, batch_size: int) -> None:
        self._main, self._rank = world.is_main, world.rank
        self._folder = folder
        self._batch_size = batch_size
        self._first_step, self._total_steps = first_step, total_steps
        self._stack = contextlib.ExitStack()
        self._tensorboard: SummaryWriter | None = None
        #: What could not be written: file or folder -> why.
        self._lost: dict[Path, str] = {}
        self._warned: set[str] = set()  # tasks
        self._told_of_scenarios = False

    def __enter__(self) -> Self:
        self._trained, self._resumed, self._window_step = 0.0, time.perf_counter(), self._first_step
        if not self._main:
            return self
        self._metrics = self._stack.enter_context(self._folder.metrics.open("ab", buffering=0))
        self._stack.enter_context(_quiet_writer_threads())
        with self._told(self._folder.tensorboard):
            self._tensorboard = SummaryWriter(str(self._folder.tensorboard), purge_step=self._first_step)
        self._bar = self._stack.enter_context(
            tqdm(
                total=self._total_steps,
                initial=self._first_step,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
                smoothing=0.1,
            )
        )
        if not self._bar.disable:
            self._stack.enter_context(logging_redirect_tqdm([logger]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tensorboard is not None:
            with self._told(self._folder.tensorboard):
                self._tensorboard.close()
        self._stack.close()
        for path, reason in self._lost.items():
            logger.warning("note: %s lacks reports of this run: %s.", path, reason)

    def advance(self) -> None:
        """One step done."""
        if self._main:
            self._bar.update()

    def train_metrics(
        self, step: int, epoch: int, losses: dict[str, float], rate: float, times: RankTimes, diagnostics: dict[str, float]
    ) -> None:
        """Report the losses since the last report.

        Args:
            rate: factor of the learning-rate schedule.
            times: of all ranks since the last report.
            diagnostics: of the newest step, by key.
        """
        self.stop_clock()
        seconds, steps = self._trained, step - self._window_step
        self._trained, self._window_step = 0.0, step
        if steps == 0:
            return
        if not self._main:
            own = ", ".join(f"{name} {times.of(name)[self._rank]:.3f}" for name in REPORTED)
            logger.debug("epoch %d step %d/%d | %d steps, seconds: %s", epoch, step, self._total_steps, steps, own)
            return
        speed = steps * self._batch_size / seconds
        share = min(1.0, times.of("data wait")[0] / seconds)
        slowest = times.slowest()
        behind = f" | {slowest}" if slowest else ""
        shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self._bar.set_postfix_str(f"{speed:,.0f} samples/s | loss {shown} | data wait {share:.0%}{behind}", refresh=False)
        logger.log(
            logging.INFO if self._bar.disable else logging.DEBUG,
            "epoch %d step %d/%d | loss %s | %s samples/s | data wait %.0f%%%s",
            epoch,
            step,
            self._total_steps,
            shown,
            f"{speed:,.0f}",
            100 * share,
            behind,
        )
        record: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "split": "train",
            "loss": losses,
            "samples_per_second": round(speed, 1),
            "data_wait_share": round(share, 4),
            "learning_rate_factor": rate,
            "seconds": times.record(),
        }
        if diagnostics:
            record["diagnostics"] = diagnostics
        self._write(record)
        for name, value in diagnostics.items():
            self._plot(f"train/{name}", value, step)
        for name, value in losses.items():
            self._plot(f"train/loss/{name}", value, step)
        self._plot("train/samples_per_second", speed, step)
        self._plot("train/data_wait_share", share, step)

    def validation(self, step: int, epoch: int, report: dict[str, Any], monitor: dict[str, float], note: str) -> None:
        """Report a validation.

        Args:
            monitor: name -> value that the choice of weights goes by; "all", or each branch.
            note: what became of it.
        """
        if not self._main:
            return
        shown = []
        for name, task in report["tasks"].items():
            metric = next((name for name in ("r2", "mse") if task.get(name) is not None), "auc" if "auc" in task else "r2")
            value = task.get(metric)
            shown.append(f"{metric} {name} {'-' if value is None else format(value, '.4f')}")
        followed = ", ".join(f"{value:.4f}" if name == "all" else f"{name} {value:.4f}" for name, value in monitor.items())
        logger.info("epoch %d step %d | valid %s | monitor %s, %s", epoch, step, " ".join(shown), followed, note)
        for task_name, warning in too_good(report, "valid").items():
            if task_name not in self._warned:
                self._warned.add(task_name)
                logger.warning(warning)
        self._write({"step": step, "epoch": epoch, "split": "valid", "monitor": monitor, "report": report})
        for name, value in monitor.items():
            self._plot(f"valid/monitor/{name}", value, step)
        for name, task in entries_of(report):
            self._plot_metrics("valid", name, task, step)
            self._plot_scenarios(name, task, step)
        self._plot_metrics("valid", "mean_over_tasks", report.get("mean", {}), step)

    def _plot_scenarios(self, name: str, task: dict[str, Any], step: int) -> None:
        """Curves of a task in each of its scenarios, those with most rows where there are many, and their means."""
        scenarios = task.get("scenarios", {})
        shown = sorted(scenarios, key=lambda value: -scenarios[value]["rows"])[:_MOST_SCENARIOS]
        if len(shown) < len(scenarios) and not self._told_of_scenarios:
            self._told_of_scenarios = True
            told = "TensorBoard has curves of the %d scenarios with most rows; %s has those of all %d."
            logger.info(told, len(shown), self._folder.path / self._folder.metrics.name, len(scenarios))
        for value in shown:
            self._plot_metrics("valid_scenarios", f"{name}/{shown_name(value)}", scenarios[value], step)
        if scenarios:
            for mean in ("scenario_mean", "scenario_weighted_mean"):
                self._plot_metrics("valid_scenarios", f"{name}/{mean}", task[mean], step)

    def _plot_metrics(self, group: str, name: str, entry: dict[str, Any], step: int) -> None:
        for metric, value in entry.items():
            if isinstance(value, float):
                self._plot(f"{group}/{metric}/{name}", value, step)

    def stop_clock(self) -> None:
        """Count the time since the last restart (or stop) as training."""
        now = time.perf_counter()
        self._trained, self._resumed = self._trained + now - self._resumed, now

    def restart_clock(self) -> None:
        """Leave what happened since the clock was stopped (a validation, a checkpoint) out of the speed."""
        self._resumed = time.perf_counter()

    def _write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        with self._told(self._folder.metrics):
            written = self._metrics.write(line)
            try:
                while written < len(line):
                    written += self._metrics.write(line[written:])
            except OSError:
                # Room for a part of it only: no line at all is better than a broken one.
                self._metrics.truncate(self._metrics.tell() - written)
                raise

    def _plot(self, name: str, value: float, step: int) -> None:
        if self._tensorboard is not None:
            with self._told(self._folder.tensorboard):
                self._tensorboard.add_scalar(name, value, step)
            if self._folder.tensorboard in self._lost:
                self._tensorboard = None  # its thread has ended: it takes nothing more

    @contextlib.contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        """What cannot be written is told once."""
        try:
            yield
        except OSError as error:
            if path not in self._lost:
                self._lost[path] = error.strerror or str(error)
                logger.warning("note: %s: %s; the run goes on without it.", path, self._lost[path])


@contextlib.contextmanager
def _quiet_writer_threads() -> Iterator[None]:
    """Keep the traceback of TensorBoard's thread off the screen when its disk is full: its next call raises the same."""
    shown = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not (isinstance(arguments.exc_value, OSError) and type(arguments.thread).__module__.startswith("tensorboard.")):
            shown(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = shown
