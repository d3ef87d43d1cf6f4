"""One whole run: start or resume, train, evaluate the best checkpoint on test once."""

from __future__ import annotations

import hashlib
import json
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmlrec.config import ALIASES, RunConfig, load_config
from mmlrec.distributed.stopping import SIGNALS, StopSignal
from mmlrec.distributed.world import World, log_file, logger
from mmlrec.embeddings.sharding import plan_table
from mmlrec.errors import CheckpointError, ConfigError, UserError
from mmlrec.evaluation.evaluation import evaluate_split, write_result
from mmlrec.metrics.notes import report_text
from mmlrec.registry import resolve
from mmlrec.run_folder import checkpoint
from mmlrec.run_folder.encoder import write_encoder
from mmlrec.run_folder.folder import REMEDIES, RunFolder, differences
from mmlrec.run_folder.one_writer import hold
from mmlrec.run_folder.reports import reports
from mmlrec.session.session import Session, build_session
from mmlrec.storage.places import Place, place
from mmlrec.training.advice import advise_on_slots, advise_on_speed, advise_on_warmup
from mmlrec.training.chain import check_chain
from mmlrec.training.trainer import Trainer
from mmlrec.warm_start.source import open_source
from mmlrec.warm_start.take import take

#: Most differences that a name spells out, and most characters of them together.
_SPELT_OUT, _SPELT_LENGTH = 3, 80


def default_run_dir(config: RunConfig, source: Path) -> Place:
    """`run_dir` of the configuration, else a name: config file, method, strategy (if not static), seed, and what differs.

    That is what the configuration has beyond the file with this method, strategy and seed: `key=value` where such pieces are
    few and short, else a digest of them. Configurations between which no run may be resumed have different names.
    """
    if config.run_dir is not None:
        return place(config.run_dir)
    name, strategy = config.model["name"], config.balancing["name"]
    balanced = "" if strategy == "static" or name in ALIASES else f"-{strategy}"
    stem = f"{config.dataset.setting}-{source.stem}-{name}{balanced}-seed{config.training.seed}"
    return Path("runs") / (stem + _what_differs(config, source))


def _what_differs(config: RunConfig, source: Path) -> str:
    config = resolve(config, str(source))
    named = {
        "dataset.path": config.dataset.path,  # of no weight: a dataset may be moved
        "dataset.setting": str(config.dataset.setting),
        "model.name": config.model["name"],
        "balancing.name": config.balancing["name"],
        "training.seed": config.training.seed,
    }
    try:
        plain = resolve(load_config(source, [f"{key}={json.dumps(value)}" for key, value in named.items()]), str(source))
    except ConfigError:  # the file alone is none, without what the command line adds
        plain = RunConfig(dataset=config.dataset)
    different = {key: now for key, (_, now) in differences(plain, config).items()}
    if not different:
        return ""
    spelt = "".join(f"-{key}={_short(value)}" for key, value in different.items())
    readable = len(different) <= _SPELT_OUT and len(spelt) <= _SPELT_LENGTH and None not in map(_short, different.values())
    return spelt if readable else "-" + hashlib.sha256(json.dumps(different, sort_keys=True).encode()).hexdigest()[:10]


def _short(value: Any) -> str | None:
    """A value as a part of a name, which no other value of its key has; None where it is no number, word or list of numbers."""
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        return "_".join(map(json.dumps, value)) + ("_" if len(value) == 1 else "")
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return value if isinstance(value, str) and re.fullmatch(r"(?!(?:true|false|null)$)[A-Za-z][A-Za-z0-9_.]*", value) else None


def train(
    config: RunConfig,
    run_dir: Place,
    world: World,
    *,
    resume: bool = False,
    restart: bool = False,
    from_step: int | None = None,
    source: str = "config",
    profiled: tuple[int, int] | None = None,
    forgotten: Mapping[str, NDArray[np.int64]] | None = None,
    may_differ: tuple[str, ...] = (),
    signals: Sequence[signal.Signals] = SIGNALS,
) -> dict[str, Any]:
    """Train a configuration in a run folder, resuming when the folder holds a whole checkpoint, and evaluate it on test.

    Args:
        resume: insist on a checkpoint to resume from.
        restart: begin at step 0 where all checkpoints, or the best one, are damaged.
        from_step: go back to the checkpoint of this step, with other learning rates perhaps; later ones are deleted. Given
            again, with the same configuration, the run goes on from its newest checkpoint.
        source: config file, for messages.
        profiled: first and last step of a profile, see `Profile`.
        forgotten: table -> rows that a run with `init_from` begins with as new ones, though the other run has them.
        may_differ: keys that may differ from those that the run was begun with, besides those of any run that goes on.
        signals: that end the run between two steps, see `StopSignal`.

    Returns:
        The test report, on every rank.

    Raises:
        UserError: configuration, data, checkpoint or folder are unusable, the folder holds other things, another run writes
            there, or a signal stopped the run.
    """
    config = resolve(config, source)
    world.on_main(RunFolder(run_dir).check_place)
    with hold(run_dir, world) as holder, reports(run_dir, world, holder.lost) as written:
        folder = RunFolder(run_dir, holder, written)
        return _train(
            config,
            folder,
            world,
            resume=resume,
            restart=restart,
            from_step=from_step,
            source=source,
            profiled=profiled,
            forgotten=forgotten,
            may_differ=may_differ,
            signals=signals,
        )


def _train(
    config: RunConfig,
    folder: RunFolder,
    world: World,
    *,
    resume: bool,
    restart: bool,
    from_step: int | None,
    source: str,
    profiled: tuple[int, int] | None,
    forgotten: Mapping[str, NDArray[np.int64]] | None,
    may_differ: tuple[str, ...],
    signals: Sequence[signal.Signals],
) -> dict[str, Any]:
    run_dir = folder.path
    found = checkpoint.latest(folder.checkpoints, world)
    if from_step is not None and found is None:
        raise CheckpointError(
            f"{run_dir}: no whole checkpoint to go back to. Give the folder of the run with --run-dir, as its default"
            " name changes with the rates, or leave out --from-step to start a new one."
        )
    goes_back = from_step is not None and found is not None and not _went_back(folder, found, from_step, config)
    if found is not None or folder.config.is_file():  # from the first second of a run on, whatever became of its checkpoints
        folder.check_same_run(config, (*may_differ, *(REMEDIES if goes_back else ())))
    if found is not None:
        folder.check_same_data(checkpoint.read_state(found), place(config.dataset.path))
        if goes_back and from_step is not None:
            found = checkpoint.go_back(folder.checkpoints, from_step, folder.best, world)
        elif _complete(folder, found, config) and not restart:
            report: dict[str, Any] = folder.read_result()["test"]
            logger.info(
                "%s is complete; nothing left to train. Delete it, or choose another --run-dir, to train again.", run_dir
            )
            return report
    _check_usable(folder, found, world, restart=restart)
    if restart:
        found = None
    if found is None and resume:
        raise CheckpointError(f"{run_dir}: no whole checkpoint to resume from. Leave out --resume to start the run.")

    begun = None if found is None else checkpoint.read_state(found)
    world.at("building the model")
    first = None if found is not None or config.init_from is None else open_source(config, run_dir, world)
    same_method = first is not None and first.config.model["name"] == config.model["name"]
    known_scales = first.scales if first is not None and same_method else None
    session = build_session(config, world, for_training=True, source=source, begun=begun, known_scales=known_scales)
    trainer = Trainer(session, folder, profiled)
    if profiled is not None and profiled[0] > trainer.total_steps:
        raise ConfigError(f"--profile {profiled[0]}:{profiled[1]}: the run ends at step {trainer.total_steps} at the latest.")
    for split in ("valid", "test"):
        session.reader(split)  # What is missing there is told now, not when the split is needed.
    monitor = trainer.monitor  # That it can be had, too.
    # A run that resumes has been checked, on the same data.
    doubt = check_chain(session) if found is None else None
    world.on_main(folder.create)
    with log_file(folder.log_of(world.rank), world):
        if first is not None:
            take(session, first, folder, forgotten)
        if restart:
            checkpoint.discard(folder.checkpoints, world, trainer.saver.delete)
        if found is not None:
            world.at("loading the checkpoint")
            trainer.resume(found)
        checkpoint.settle_best(folder.best, trainer.best_known_until, world)
        _write_encoder(session, folder)
        if world.is_main:
            folder.result.unlink(missing_ok=True)  # a result belongs to a finished run; this one trains on
            folder.write_description(config, world, session.plan, session.manifest)
            folder.keep_metrics_until(trainer.progress.step, validated=not trainer.validation_due)
        _announce(session, trainer, run_dir, found)
        advise_on_speed(
            config.training.precision, -(-config.training.batch_size // world.world_size), trainer.reader.num_batches, world
        )
        balancing = (config.balancing["name"], session.head.balancing.warmup_steps)
        short = advise_on_warmup(*balancing, trainer.total_steps, ended=False)
        if world.is_main:
            logger.info("best checkpoint and early stopping by valid, higher is better: %s", monitor)
            late = None
            if profiled is not None and profiled[1] <= trainer.progress.step:
                late = f"--profile {profiled[0]}:{profiled[1]}: these steps are behind this run, so there is nothing to record."
            idle = advise_on_slots(config.embeddings.managed.update_every, trainer.total_steps) if session.managed else None
            for warning in [doubt, short, idle, late, *monitor.notes]:
                if warning:
                    logger.warning(warning)
        with StopSignal(world, signals) as stop, trainer.saver:
            try:
                trainer.fit(stop)
            except Exception as error:
                error.add_note(f"at step {trainer.progress.step}")
                raise
            if not short and (short := advise_on_warmup(*balancing, trainer.progress.step, ended=True)):
                logger.warning(short)
            checkpoint.verify(folder.best, world)
            best = session.load_best(folder.best)
            report = evaluate_split(session, "test", stop)
            folder.check_held(world)
            # Before a signal ends this process again: it would end a run that is all but done, or some ranks and not others.
            world.without_limit().on_main(_write_result, folder, report, best["step"])
    return report


def _write_result(folder: RunFolder, report: dict[str, Any], step: int) -> None:
    logger.debug("test, best checkpoint by validation:\n%s", report_text(report, "test"))
    write_result(folder, "test", report, step=step)


def _write_encoder(session: Session, folder: RunFolder) -> None:
    """All ranks wait for it, however long copies of vocabularies take."""
    world = session.world.without_limit()
    world.at("writing the encoder into the run folder")
    world.on_main(write_encoder, folder.encoder, session.encoder, session.manifest, world.start)


def _check_usable(folder: RunFolder, found: Place | None, world: World, *, restart: bool) -> None:
    """Refuse to begin again, in silence, where a run has been trained but cannot be resumed, or not be finished."""
    reasons: list[str] = []
    if found is None:
        reasons = checkpoint.step_damage(folder.checkpoints, world)
    elif known := checkpoint.read_state(found)["selection"]["best_step"]:
        reason = checkpoint.best_damage(folder.best, max(known.values()), world)
        reasons = [reason] if reason else []
    if reasons and not restart:
        listed = "\n".join(f"  {reason}" for reason in reasons)
        step = None if found is None else checkpoint.read_state(found)["progress"]["step"]
        choice = (
            ""
            if step is None
            else f" With apps.train --from-step {step} it goes on from there, and only chooses its best anew."
        )
        raise CheckpointError(
            f"{folder.path} holds a run that cannot be {'resumed' if found is None else 'finished'}:\n{listed}\n"
            f"Bring these files back from a copy, or choose another folder with --run-dir.{choice} With"
            " apps.train --restart the run begins again at step 0, and its checkpoints are deleted."
        )
    if restart and found is not None and not reasons:
        raise UserError(
            f"{found} is whole, so there is nothing to begin again for: leave out --restart to continue from there, choose"
            " another folder with --run-dir, or delete this one."
        )


def _went_back(folder: RunFolder, found: Place, step: int, config: RunConfig) -> bool:
    """Whether the run went back to this step under this configuration already: a scheduler that repeats the command goes on."""
    try:
        folder.check_same_run(config)
    except ConfigError:
        return False
    return checkpoint.read_state(found).get("went_back_to") == step


def _complete(folder: RunFolder, found: Place, config: RunConfig) -> bool:
    """True when the run has its test result and this configuration asks for no more steps than it took."""
    result, state = folder.read_result(), checkpoint.read_state(found)
    # While a run is alive, `apps.evaluate` may put there what the best checkpoint of then gives.
    if "test" not in result or result.get("step") != max(state["selection"]["best_step"].values(), default=None):
        return False
    before = state["config"]["training"]
    same_length = all(before[key] == getattr(config.training, key) for key in ("max_steps", "epochs"))
    return bool(state["finished"]) and same_length


def _announce(session: Session, trainer: Trainer, run_dir: Place, found: Place | None) -> None:
    world, config = session.world, session.config
    dense = sum(p.numel() for p in session.network.parameters())
    tables = sum(row["rows"] * row["dim"] for row in session.plan)
    logger.info(
        "%s, setting %s, tasks %s, %d scenario(s), balancing %s | %d rank(s) on %s, %s | %s dense and %s table parameters",
        config.model["name"],
        config.dataset.setting,
        ", ".join(task.name for task in session.spec.tasks),
        len(session.manifest.scenario.values) if session.manifest.scenario else 1,
        config.balancing["name"],
        world.world_size,
        world.device.type,
        config.training.precision,
        f"{dense:,}",
        f"{tables:,}",
    )
    logger.info("sharding plan:\n%s", plan_table(session.plan) if session.plan else "no tables: all features are numbers")
    if session.manifest.terms:
        logger.info("terms of the data: %s", session.manifest.terms)
    start = f"resumed from {found}" if found else "new run"
    logger.info("%s: %s at step %d of at most %d", run_dir, start, trainer.progress.step, trainer.total_steps)
