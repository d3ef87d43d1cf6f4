"""The training loop. Knows no method: tables, network and loss come joined in the session.

Training runs in segments: from one validation or checkpoint to the next. A segment feeds the pipeline until it is drained, so
at its end rows read = rows trained, and the position that a checkpoint holds is exact.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mmlrec.data.batch import Batch
from mmlrec.distributed import World, logger
from mmlrec.errors import UserError
from mmlrec.evaluation.evaluation import evaluate_split
from mmlrec.run_folder import checkpoint
from mmlrec.run_folder.folder import RunFolder, data_state
from mmlrec.session.optim import Schedule
from mmlrec.session.session import Session
from mmlrec.training.best import save_best
from mmlrec.training.reporting import Reporter
from mmlrec.training.selection import Selection, branch_metrics, joint_metric

#: Steps between agreements of all ranks whether one of them was asked to stop.
_AGREE_EVERY = 10


class Interrupted(UserError):
    """The run was asked to stop by a signal; its state is saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Progress:
    """How far a run is: `step` optimizer steps in all; in `epoch` (from 0) `rows` global samples are trained."""

    step: int = 0
    epoch: int = 0
    rows: int = 0


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a flag that the loop reads between steps. A second SIGINT kills."""

    #: Exit code for a run that a scheduler stopped and should start again.
    PREEMPTED = 85

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.received = number

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, as shells do; PREEMPTED otherwise."""
        return 130 if self.received in (signal.SIGINT, None) else self.PREEMPTED


class Trainer:
    """Trains a session to early stopping, `epochs` or `max_steps`, with checkpoints in the run folder."""

    def __init__(self, session: Session, folder: RunFolder) -> None:
        self.session = session
        self.folder = folder
        self.config = session.config.training
        self.world: World = session.world
        self.reader = session.reader("train")
        self.schedule = Schedule(session.config.schedule, session.optimizer)
        self.selection = Selection(self.config.patience)
        self.progress = Progress()
        self.waited = 0.0
        self._saved_step = -1
        self._losses = torch.zeros(len(session.objectives), device=self.world.device)
        self._loss_steps = 0

    @property
    def total_steps(self) -> int:
        """The last step of the run, unless it stops early."""
        total = self.config.epochs * self.reader.num_batches
        return total if self.config.max_steps is None else min(total, self.config.max_steps)

    @property
    def finished(self) -> bool:
        """True when nothing is left to train."""
        return self.selection.stop or self.progress.step >= self.total_steps

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint: weights, optimizer state, random state, position and selection."""
        state = checkpoint.read_state(path)
        checkpoint.load_training(path, self.session.model, self.session.optimizer, self.world)
        self.progress = Progress(**state["progress"])
        self.session.head.step = self.progress.step
        self.selection.load_state(state["selection"])
        self._saved_step = self.progress.step
        if self.world.is_main:  # the window of losses that was open: the mean over ranks, kept on one
            self._losses.copy_(torch.tensor(state["window"]["losses"]) * self.world.world_size)
        self._loss_steps = state["window"]["steps"]
        if self.progress.rows >= self.reader.num_rows:
            self.progress.epoch, self.progress.rows = self.progress.epoch + 1, 0

    def fit(self) -> None:
        """Train until finished.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
            UserError: the loss is no longer finite, or data or disk fail.
        """
        self.session.model.train()
        with (
            StopSignal() as stop,
            Reporter(
                self.folder,
                self.world,
                first_step=self.progress.step,
                total_steps=self.total_steps,
                batch_size=self.config.batch_size,
            ) as reporter,
        ):
            while not self.finished:
                stopped = self._train_segment(stop, reporter)
                reporter.stop_clock()
                if stopped:
                    self.session.check_parts(wait=False)
                    self._save()
                    raise Interrupted(
                        f"stopped at step {self.progress.step}; {self.folder.path} holds the checkpoint."
                        " Run the same command again to continue.",
                        stop.exit_code,
                    )
                if self._due(self.config.validate_every_steps):
                    self._validate(reporter)
                if self._due(self.config.checkpoint_every_steps) or self.finished:
                    self.session.check_parts()
                    self._save()
                reporter.restart_clock()

    def _due(self, every: int | None) -> bool:
        step, end_of_epoch = self.progress.step, self.progress.rows >= self.reader.num_rows
        return end_of_epoch or step >= self.total_steps or (every is not None and step % every == 0)

    def _segment_end(self) -> int:
        """The step at which the next validation, checkpoint, end of epoch or end of training is."""
        step = self.progress.step
        left_in_epoch = -(-(self.reader.num_rows - self.progress.rows) // self.config.batch_size)
        ends = [step + left_in_epoch, self.total_steps]
        for every in (self.config.validate_every_steps, self.config.checkpoint_every_steps):
            ends += [] if every is None else [(step // every + 1) * every]
        return min(ends)

    def _train_segment(self, stop: StopSignal, reporter: Reporter) -> bool:
        """Train up to the segment's end; True when a signal, or a damaged part of the data, ended it before."""
        if self.progress.rows >= self.reader.num_rows:
            self.progress.epoch, self.progress.rows = self.progress.epoch + 1, 0
        end = self._segment_end()
        source = self.reader.epoch(self.progress.epoch, start_row=self.progress.rows)
        feed = self._feed(self.session.prepare(source, training=True), end - self.progress.step, stop)
        pipeline = self.session.pipeline
        while True:
            self.schedule.apply(self.progress.step)
            try:
                predictions = pipeline.progress(feed)
            except StopIteration:
                break
            self.progress.step += 1
            self.progress.rows = min(self.progress.rows + self.config.batch_size, self.reader.num_rows)
            self._losses += predictions.objectives
            self._loss_steps += 1
            reporter.advance()
            if self.progress.step % self.config.log_every_steps == 0:
                self._report(reporter)
        source.close()
        return self.progress.step < end

    def _feed(self, batches: Iterator[Batch], count: int, stop: StopSignal) -> Iterator[Batch]:
        for index in range(count):
            end = stop.received is not None or self.session.verification.failure is not None
            if (self.world.world_size == 1 or index % _AGREE_EVERY == 0) and self.world.any(end):
                return
            before = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - before
            yield batch

    def _report(self, reporter: Reporter) -> None:
        mean = self._losses / (self._loss_steps * self.world.world_size)
        if self.world.world_size > 1:
            dist.all_reduce(mean)
        values = dict(zip(self.session.objectives, mean.tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"loss '{name}' is not finite ({value}) near step {self.progress.step}."
                    " Lower dense.optimizer.lr or embeddings.optimizer.lr, or set dense.clip_norm."
                )
        reporter.train_metrics(
            self.progress.step,
            self.progress.epoch,
            values,
            self.schedule.factor(self.progress.step - 1),
            self.waited,
            self.session.head.diagnostics(),
        )
        self._losses.zero_()
        self._loss_steps, self.waited = 0, 0.0

    def _validate(self, reporter: Reporter) -> None:
        if self._loss_steps:
            self._report(reporter)
        report = evaluate_split(self.session, "valid")
        branches = self.session.branches()
        values = branch_metrics(report, branches) if branches else joint_metric(report)
        improved = self.selection.update(values, self.progress.step)
        if improved:
            state = {
                "step": self.progress.step,
                "selection": self.selection.state(),
                **data_state(self.session.manifest),
            }
            save_best(self.session, self.folder.best, improved, state)
        note = (
            "best so far"
            if improved
            else f"no better for {min(self.selection.stale.values())} of {self.config.patience or '-'}"
        )
        reporter.validation(self.progress.step, self.progress.epoch, report, note)

    def _save(self) -> None:
        if self._saved_step == self.progress.step:
            return
        window = self._losses.clone()
        if self.world.world_size > 1:
            dist.all_reduce(window)
        parameters = [p.detach() for p in self.session.network.parameters()]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in [window, *parameters]):
            raise UserError(
                f"loss or weights are not finite at step {self.progress.step}; not saved. Lower dense.optimizer.lr or"
                " embeddings.optimizer.lr, or set dense.clip_norm, and resume from the checkpoint before."
            )
        state: dict[str, Any] = {
            "progress": asdict(self.progress),
            "window": {"losses": (window / self.world.world_size).tolist(), "steps": self._loss_steps},
            "selection": self.selection.state(),
            "finished": self.finished,
            "world_size": self.world.world_size,
            "config": self.session.config.model_dump(mode="json"),
            **data_state(self.session.manifest),
        }
        tensors = checkpoint.training_tensors(self.session.model, self.session.optimizer, self.world.rank)
        checkpoint.save(checkpoint.step_folder(self.folder.checkpoints, self.progress.step), tensors, state, self.world)
        checkpoint.prune(self.folder.checkpoints, self.config.keep_checkpoints, self.world, step=self.progress.step)
        self._saved_step = self.progress.step
        logger.debug("saved step %d", self.progress.step)
