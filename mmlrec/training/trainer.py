"""The training loop. Knows no method: tables, network and loss come joined in the session.

Training runs in segments: from one validation or checkpoint to the next. A segment feeds the pipeline until it is drained, so
at its end rows read = rows trained, and the position that a checkpoint holds is exact. Where tables are managed it is drained
in between, too, at each boundary: the slots that rows are looked up by change with no row under way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist

from mmlrec.data.batch import Batch
from mmlrec.distributed.step_parts import CHECKPOINT, DATA, INPUT, OTHER, PARTS
from mmlrec.distributed.stopping import Asked, Interrupted, StopSignal
from mmlrec.distributed.world import World, logger
from mmlrec.evaluation.evaluation import evaluate_split
from mmlrec.run_folder import checkpoint
from mmlrec.run_folder.folder import RunFolder, data_state
from mmlrec.run_folder.saver import Saver
from mmlrec.session.optim import Schedule
from mmlrec.session.session import Session
from mmlrec.storage.places import Place
from mmlrec.training.advice import SavingTime
from mmlrec.training.best import save_best
from mmlrec.training.guard import check_finite, check_losses, remedy
from mmlrec.training.monitor import Monitor, build_monitor, metrics_of_cvr
from mmlrec.training.profiling import Profile
from mmlrec.training.reporting import Reporter
from mmlrec.training.selection import Selection
from mmlrec.training.slowest import RankTimes


@dataclass
class Progress:
    """How far a run is: `step` optimizer steps in all; in `epoch` (from 0) `rows` global samples are trained."""

    step: int = 0
    epoch: int = 0
    rows: int = 0


class Trainer:
    """Trains a session to early stopping, `epochs` or `max_steps`, with checkpoints in the run folder.

    Args:
        profiled: first and last step of a profile.
    """

    def __init__(self, session: Session, folder: RunFolder, profiled: tuple[int, int] | None = None) -> None:
        self.session = session
        self.folder = folder
        self.config = session.config.training
        self.world: World = session.world
        self.reader = session.reader("train")
        self.schedule = Schedule(session.config.schedule, session.optimizer)
        self.selection = Selection(self.config.patience)
        self.progress = Progress()
        self._profile = None if profiled is None else Profile(profiled, folder, session.world)
        self._reported = dict(session.world.parts.seconds)
        self.saver = Saver(
            self.world,
            folder.lost,
            before=folder.put_reports,
            background=self.config.checkpoint_async,
            most_failures=self.config.max_failed_checkpoints,
            longest_wait=self.config.timeout / 2,
        )
        #: When the newest checkpoint was begun.
        self._saved_at = time.monotonic()
        self._asked = Asked.NOTHING
        self._checked_step: int | None = None
        #: True from the end of a segment with a validation until that is done; a checkpoint is saved in between.
        self.validation_due = False
        self._went_back_to: int | None = None
        self._saving_time = SavingTime(background=self.config.checkpoint_async)
        self._started = time.perf_counter()
        self._first: torch.Tensor | None = None
        self._first_losses: dict[str, float] | None = None
        self._losses = torch.zeros(len(session.objectives), device=self.world.device)
        self._loss_steps = 0

    @cached_property
    def monitor(self) -> Monitor:
        """What validations go by.

        Raises:
            UserError: the configuration asks for what the report does not have, or the labels in valid do not allow.
        """
        session = self.session
        return build_monitor(
            self.config.monitor,
            session.manifest,
            session.spec.tasks,
            session.selected_apart(),
            cvr=metrics_of_cvr(session.network),
            knows_r2=session.knows_r2,
        )

    @property
    def total_steps(self) -> int:
        """The last step of the run, unless it stops early."""
        total = self.config.epochs * self.reader.num_batches
        return total if self.config.max_steps is None else min(total, self.config.max_steps)

    @property
    def finished(self) -> bool:
        """True when nothing is left to train."""
        return self.selection.stop or self.progress.step >= self.total_steps

    def resume(self, path: Place) -> None:
        """Continue from a checkpoint: weights, optimizer state, random state, position and selection."""
        state = checkpoint.read_state(path)
        checkpoint.load_training(path, self.session.model, self.session.optimizer, self.world)
        self.progress = Progress(**state["progress"])
        self.session.head.step = self.session.managed.step = self.progress.step
        self.session.managed.load(path, state, history=True)
        self.selection.load_state(state["selection"])
        self.saver.newest = path
        window = state["window"]  # of losses, which was open
        of_ranks = window.get("of_ranks", [])  # not of earlier versions
        if len(of_ranks) == self.world.world_size:
            self._losses.copy_(torch.tensor(of_ranks[self.world.rank]))
        elif self.world.is_main:  # the mean over ranks, kept on one
            self._losses.copy_(torch.tensor(window["losses"]) * self.world.world_size)
        self._loss_steps = window["steps"]
        # Keys that checkpoints of earlier versions lack. These were saved after the validation.
        self.validation_due = state.get("validation_due", False)
        self._first_losses = state.get("first_losses")
        self._went_back_to = state.get("went_back_to")

    @property
    def best_known_until(self) -> int | None:
        """The step up to which validations have chosen the best checkpoint; None where none has."""
        if not self.selection.best:
            return None
        return self.progress.step - self.validation_due

    def fit(self, stop: StopSignal) -> None:
        """Train until finished.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
            UserError: losses, weights or tables are no longer finite, or data or disk fail.
        """
        self.session.model.train()
        with Reporter(
            self.folder,
            self.world,
            first_step=self.progress.step,
            total_steps=self.total_steps,
            batch_size=self.config.batch_size,
        ) as reporter:
            if self.validation_due:
                self._validate(reporter, stop)
            while not self.finished:
                asked = self._train_segment(stop, reporter)
                reporter.stop_clock()
                if asked is Asked.STOP:
                    self.session.check_parts(wait=False)
                    self._save(final=True)
                    raise self._interrupted(stop)
                self.validation_due = self._due(self.config.validate_every_steps)
                if self.validation_due and self._loss_steps:
                    self._report(reporter)
                # Before the validation: what kills the process while that takes its time, kills no epoch.
                if self._checkpoint_due(asked):
                    self.session.check_parts(stop)
                    self._save()
                if self.validation_due:
                    self._validate(reporter, stop)
                reporter.restart_clock()
            # Here, also after a resume that had a validation to do, and nothing to train.
            self.session.check_parts(stop)
            self._save(final=True)

    def _interrupted(self, stop: StopSignal) -> Interrupted:
        return stop.interrupted(
            f"stopped at step {self.progress.step}; {self.folder.path} holds the checkpoint."
            " Run the same command again to continue."
        )

    def _due(self, *every: int | None) -> bool:
        step, end_of_epoch = self.progress.step, self.progress.rows >= self.reader.num_rows
        return end_of_epoch or step >= self.total_steps or any(n is not None and step % n == 0 for n in every)

    def _checkpoint_due(self, asked: Asked) -> bool:
        """Whether to save at the end of a segment: of `asked`, of this step, or of this time by the clock of rank 0."""
        if asked is Asked.PAUSE or self._due(self.config.checkpoint_every_steps, self.config.keep_every_steps):
            return True
        return self.config.checkpoint_every_minutes is not None and self.world.any(self._minutes_over())

    def _minutes_over(self) -> bool:
        """On rank 0, whether it is time for a checkpoint."""
        every = self.config.checkpoint_every_minutes
        return every is not None and self.world.is_main and time.monotonic() - self._saved_at >= 60 * every

    def _segment_end(self) -> int:
        """The step at which the next validation, checkpoint, end of epoch or end of training is."""
        step = self.progress.step
        left_in_epoch = -(-(self.reader.num_rows - self.progress.rows) // self.config.batch_size)
        ends = [step + left_in_epoch, self.total_steps]
        config = self.config
        for every in (config.validate_every_steps, config.checkpoint_every_steps, config.keep_every_steps):
            ends += [] if every is None else [(step // every + 1) * every]
        return min(ends)

    def _train_segment(self, stop: StopSignal, reporter: Reporter) -> Asked:
        """Train up to the segment's end, or to where it is ended by a signal, a damaged part of the data, or the clock."""
        if self.progress.rows >= self.reader.num_rows:
            self.progress.epoch, self.progress.rows = self.progress.epoch + 1, 0
        end, parts = self._segment_end(), self.world.parts
        source = self.reader.epoch(self.progress.epoch, start_row=self.progress.rows)
        batches = self.session.prepare(source, training=True)
        begin = self.progress.step
        self.session.count_steps(begin)
        while self.progress.step < end:
            boundary = self.session.managed.next_update(self.progress.step)
            until = end if boundary is None else min(end, boundary)
            self._train_steps(self._feed(batches, range(self.progress.step - begin, until - begin), stop), end, reporter)
            if self.progress.step == boundary:
                self.world.at("changing the slots of managed tables")
                with parts.of(INPUT, "changing the slots of managed tables"):
                    self.session.update_slots()
            if self._asked:
                break
        if self._profile is not None:
            self._profile.end(self.progress.step)
        source.close()
        self.session.average_replicas(0)
        return self._asked

    def _train_steps(self, feed: Iterator[Batch], end: int, reporter: Reporter) -> None:
        """Train what is fed, until the pipeline is drained.

        Args:
            end: of the segment.
        """
        pipeline, parts = self.session.pipeline, self.world.parts
        while True:
            if self._profile is not None and self.progress.step < end:
                self._profile.before(self.progress.step + 1)
            with parts.of(OTHER, f"step {self.progress.step + 1}"):
                self.schedule.apply(self.progress.step)
                try:
                    predictions = pipeline.progress(feed)
                except StopIteration:
                    break
                self.progress.step += 1
                self.session.average_replicas(self.progress.step)
                self.world.at("training", self.progress.step)
                if self._first is None:
                    self._first = predictions.objectives
                self.progress.rows = min(self.progress.rows + self.config.batch_size, self.reader.num_rows)
                self._losses += predictions.objectives
                self._loss_steps += 1
                reporter.advance()
            if self._profile is not None:
                self._profile.after(self.progress.step, last=self.progress.step == end)
            if self.progress.step % self.config.log_every_steps == 0:
                self._report(reporter)

    def _feed(self, batches: Iterator[Batch], steps: range, stop: StopSignal) -> Iterator[Batch]:
        """Batches of some steps of a segment, fewer where it is asked to end."""
        for index in steps:
            failed = self.session.verification.failure is not None
            self._asked = stop.before(index, also=failed, pause=index > 0 and self._minutes_over())
            if self._asked:
                return
            self.world.at("reading a batch")
            with self.world.parts.of(DATA):
                batch = next(batches)
            self.world.at("training")
            yield batch

    def _report(self, reporter: Reporter) -> None:
        values, times = self._mean_losses()
        self._reported = dict(self.world.parts.seconds)
        of_managed = self.session.managed.diagnostics()
        if of_managed and self.world.is_main:
            logger.debug("step %d | %s", self.progress.step, ", ".join(f"{key} {of_managed[key]:.6g}" for key in of_managed))
        reporter.train_metrics(
            self.progress.step,
            self.progress.epoch,
            values,
            self.schedule.factor(self.progress.step - 1),
            times,
            self.session.head.diagnostics() | of_managed,
        )
        self._losses.zero_()
        self._loss_steps = 0

    def _mean_losses(self) -> tuple[dict[str, float], RankTimes]:
        """Of the steps since the last report, over all ranks, checked; and where the time of each rank went."""
        mean = self._losses / (self._loss_steps * self.world.world_size)
        times = torch.zeros(self.world.world_size, len(PARTS))
        seconds = self.world.parts.seconds
        times[self.world.rank] = torch.tensor([seconds[part] - self._reported[part] for part in PARTS])
        if self.world.world_size > 1:
            # The times of each rank in a row of their own: one sum, together with that of the losses, gathers them.
            both = torch.cat([mean, times.flatten().to(mean)])
            dist.all_reduce(both)
            mean, times = both[: len(mean)], both[len(mean) :].view_as(times)
        values = self._by_name(mean)
        if self._first_losses is None:
            assert self._first is not None
            first = self._first / self.world.world_size
            if self.world.world_size > 1:
                dist.all_reduce(first)
            self._first_losses = self._by_name(first)
        check_losses(values, self._first_losses, self.progress.step, self._remedy())
        return values, RankTimes(times.tolist())

    def _remedy(self) -> str:
        newest = self.saver.newest
        return remedy(self.folder.path, None if newest is None else checkpoint.step_of(newest))

    def _by_name(self, losses: torch.Tensor) -> dict[str, float]:
        return dict(zip(self.session.objectives, losses.tolist(), strict=True))

    def _validate(self, reporter: Reporter, stop: StopSignal) -> None:
        self._check()
        try:
            with self.world.parts.left_out():
                report = evaluate_split(self.session, "valid", stop)
        except Interrupted:
            self.session.check_parts(wait=False)
            self._save(final=True)
            raise self._interrupted(stop) from None
        values = self.monitor.values(report)
        improved = self.selection.update(values, self.progress.step)
        self.folder.check_held(self.world)
        self.validation_due = False
        then = partial(self._note, checkpoint.step_folder(self.folder.checkpoints, self.progress.step), self._validated())
        if improved:
            state = {
                "step": self.progress.step,
                "selection": self.selection.state(),
                **self.session.state,
                **data_state(self.session.manifest),
            }
            # A branch that nothing can be said of goes along with the others.
            unknown = [name for name, _, _ in self.session.selected_apart() if name not in values]
            self.world.at("saving the best checkpoint")
            with self.world.parts.of(CHECKPOINT):
                save_best(self.session, self.saver, self.folder.best, [*improved, *unknown], state, then)
        note = (
            "best so far"
            if improved
            else f"no better for {min(self.selection.stale.values())} of {self.config.patience or '-'}"
        )
        reporter.validation(self.progress.step, self.progress.epoch, report, values, note)
        if not improved:
            self.saver.then(then)

    def _note(self, folder: Place, changes: dict[str, Any]) -> None:
        """Amend the checkpoint of a step by what its validation found, where there is one; on rank 0."""
        if self.saver.newest == folder:
            checkpoint.amend(folder, changes)
            self._prune(checkpoint.step_of(folder))

    def _prune(self, step: int) -> None:
        folder, config = self.folder.checkpoints, self.config
        checkpoint.prune(folder, config.keep_checkpoints, step=step, every=config.keep_every_steps, delete=self.saver.delete)

    def _validated(self) -> dict[str, Any]:
        """What a validation changes in the state."""
        return {
            "selection": self.selection.state(),
            "validation_due": self.validation_due,
            "finished": self.finished and not self.validation_due,
        }

    def _check(self) -> dict[str, Any]:
        """All tensors of the training state, once known to be finite at this step."""
        tensors = checkpoint.training_tensors(self.session.model, self.session.optimizer, self.world.rank)
        if self._checked_step != self.progress.step:
            if self._loss_steps:
                self._mean_losses()
            check_finite(tensors, self.progress.step, self._remedy(), self.world)
            self._checked_step = self.progress.step
        return tensors

    def _save(self, *, final: bool = False) -> None:
        """Save this step, unless that is done.

        Args:
            final: nothing is trained after it, so it has to be whole now.
        """
        with self.world.parts.of(CHECKPOINT):
            folder = checkpoint.step_folder(self.folder.checkpoints, self.progress.step)
            if final:
                self.saver.finish()
            if self.saver.has(folder):
                return
            before = time.perf_counter()
            self._saved_at = time.monotonic()
            self.folder.check_held(self.world)
            tensors = self._check()
            self.world.at("saving a checkpoint")
            if self.session.managed:
                self.session.managed.tell()
                tensors = tensors | self.session.managed.tensors(history=True)
            # The sums of each rank, since those of the next report are added up in the order of steps first, then of ranks.
            of_ranks = self._losses.new_zeros(self.world.world_size, len(self._losses))
            of_ranks[self.world.rank] = self._losses
            if self.world.world_size > 1:
                dist.all_reduce(of_ranks)
            state: dict[str, Any] = {
                "progress": asdict(self.progress),
                "window": {
                    "losses": of_ranks.mean(dim=0).tolist(),
                    "of_ranks": of_ranks.tolist(),
                    "steps": self._loss_steps,
                },
                "first_losses": self._first_losses,
                "went_back_to": self._went_back_to,
                **self._validated(),
                **self.session.state,
                "world_size": self.world.world_size,
                "config": self.session.config.model_dump(mode="json"),
                **data_state(self.session.manifest),
            }
            self.saver.save(folder, tensors, state, partial(self._prune, self.progress.step), must=final)
            if self.world.is_main:
                now = time.perf_counter()
                self._saving_time.add(now - before, now - self._started, self.saver.num_bytes)
