"""One whole run: start or resume, train, evaluate the best checkpoint on test once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmlrec.config import ALIASES, RunConfig
from mmlrec.distributed import World, log_file, logger
from mmlrec.embeddings.sharding import plan_table
from mmlrec.errors import CheckpointError, ConfigError, UserError
from mmlrec.evaluation.evaluation import evaluate_split, write_result
from mmlrec.registry import resolve
from mmlrec.run_folder import checkpoint
from mmlrec.run_folder.folder import REMEDIES, RunFolder
from mmlrec.session.session import Session, build_session
from mmlrec.stopping import StopSignal
from mmlrec.training.advice import advise_on_speed
from mmlrec.training.chain import check_chain
from mmlrec.training.trainer import Trainer


def default_run_dir(config: RunConfig, source: Path) -> Path:
    """`run_dir` of the configuration, else a name made of config file, method, strategy (if not static) and seed."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    name, strategy = config.model["name"], config.balancing["name"]
    balanced = "" if strategy == "static" or name in ALIASES else f"-{strategy}"
    stem = f"{config.dataset.setting}-{source.stem}-{name}{balanced}-seed{config.training.seed}"
    return Path("runs") / stem


def train(
    config: RunConfig,
    run_dir: Path,
    world: World,
    *,
    resume: bool = False,
    from_step: int | None = None,
    source: str = "config",
) -> dict[str, Any]:
    """Train a configuration in a run folder, resuming when the folder holds a whole checkpoint, and evaluate it on test.

    Args:
        resume: insist on a checkpoint to resume from.
        from_step: go back to the checkpoint of this step, with other learning rates perhaps; later ones are deleted. Given
            again, with the same configuration, the run goes on from its newest checkpoint.
        source: config file, for messages.

    Returns:
        The test report, on every rank.

    Raises:
        UserError: configuration, data, checkpoint or folder are unusable, or a signal stopped the run.
    """
    config = resolve(config, source)
    folder = RunFolder(run_dir)
    found = checkpoint.latest(folder.checkpoints, world)
    if found is None and resume:
        raise CheckpointError(f"{run_dir}: no whole checkpoint to resume from. Leave out --resume to start the run.")
    if from_step is not None and found is None:
        raise CheckpointError(f"{run_dir}: no whole checkpoint to go back to. Leave out --from-step to start the run.")
    if found is not None and from_step is not None and not _went_back(folder, found, from_step, config):
        folder.check_same_run(config, REMEDIES)
        folder.check_same_data(checkpoint.read_state(found)["dataset"], config)
        found = checkpoint.go_back(folder.checkpoints, from_step, folder.best, world)
    elif found is not None:
        folder.check_same_run(config)
        folder.check_same_data(checkpoint.read_state(found)["dataset"], config)
        if _complete(folder, found, config):
            report: dict[str, Any] = folder.read_result()["test"]
            logger.info(
                "%s is complete; nothing left to train. Delete it, or choose another --run-dir, to train again.", run_dir
            )
            return report

    session = build_session(config, world, for_training=True, source=source)
    trainer = Trainer(session, folder)
    for split in ("valid", "test"):
        session.reader(split)  # What is missing there is told now, not when the split is needed.
    # A run that resumes has been checked, on the same data.
    doubt = check_chain(session) if found is None else None
    _create(folder, world)
    with log_file(folder.log, world):
        if found is not None:
            trainer.resume(found)
        checkpoint.settle_best(folder.best, trainer.best_known_until, world)
        if world.is_main:
            folder.result.unlink(missing_ok=True)  # a result belongs to a finished run; this one trains on
            folder.write_description(config, world, session.plan)
            folder.keep_metrics_until(trainer.progress.step, validated=not trainer.validation_due)
        _announce(session, trainer, run_dir, found)
        advise_on_speed(
            config.training.precision, -(-config.training.batch_size // world.world_size), trainer.reader.num_batches, world
        )
        if doubt and world.is_main:
            logger.warning(doubt)
        with StopSignal(world) as stop:
            trainer.fit(stop)
            checkpoint.verify(folder.best, world)
            best = checkpoint.read_state(folder.best)
            checkpoint.load(folder.best, checkpoint.model_tensors(session.model), world)
            report = evaluate_split(session, "test", stop)
        if world.is_main:
            logger.debug("test, best checkpoint by validation:\n%s", write_result(folder, "test", report, step=best["step"]))
    return report


def _create(folder: RunFolder, world: World) -> None:
    error: UserError | None = None
    if world.is_main:
        try:
            folder.create()
        except UserError as cause:
            error = cause
    world.raise_together(error)


def _went_back(folder: RunFolder, found: Path, step: int, config: RunConfig) -> bool:
    """Whether the run went back to this step under this configuration already: a scheduler that repeats the command goes on."""
    try:
        folder.check_same_run(config)
    except ConfigError:
        return False
    return checkpoint.read_state(found).get("went_back_to") == step


def _complete(folder: RunFolder, found: Path, config: RunConfig) -> bool:
    """True when the run has its test result and this configuration asks for no more steps than it took."""
    if "test" not in folder.read_result():
        return False
    state = checkpoint.read_state(found)
    before = state["config"]["training"]
    same_length = all(before[key] == getattr(config.training, key) for key in ("max_steps", "epochs"))
    return bool(state["finished"]) and same_length


def _announce(session: Session, trainer: Trainer, run_dir: Path, found: Path | None) -> None:
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
    logger.info("sharding plan:\n%s", plan_table(session.plan))
    if session.manifest.terms:
        logger.info("terms of the data: %s", session.manifest.terms)
    start = f"resumed from {found}" if found else "new run"
    logger.info("%s: %s at step %d of at most %d", run_dir, start, trainer.progress.step, trainer.total_steps)
