"""Checkpoints: whole or absent, one flat key for each tensor, loadable at another world size and under another plan.

A checkpoint is a folder `step_NNNNNNNNN` of the files of torch.distributed.checkpoint, `state.json` (progress, selection,
configuration) and, written last inside a temporary folder that is then renamed, `COMPLETE.json` with size and checksum of
every file (see whole.py). Each rank takes the checksum of its files while it writes them; where they are checked, the ranks
share the bytes out.

`amended.json` holds what became known after the checkpoint was sealed: the validation of its step, or that the run went back
to it. It is no part of the whole: without it that is found out again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from mmlrec.distributed.world import World, logger
from mmlrec.errors import CheckpointError, StorageError, UserError
from mmlrec.run_folder import whole
from mmlrec.run_folder.folder import write_atomically
from mmlrec.run_folder.index import Reader
from mmlrec.run_folder.parts import Parts
from mmlrec.run_folder.stored import MARKER, REPLACED
from mmlrec.run_folder.whole import damage
from mmlrec.storage.places import Place, read

STATE = "state.json"
AMENDED = "amended.json"


def model_tensors(model: DistributedModelParallel) -> dict[str, Any]:
    """Weights and buffers by flat key; live references, plain or sharded."""
    return {f"model.{key}": value for key, value in model.state_dict().items()}


def training_tensors(model: DistributedModelParallel, optimizer: CombinedOptimizer, rank: int) -> dict[str, Any]:
    """All that a resumed run needs as tensors: weights, optimizer state, this rank's random state."""
    tensors = model_tensors(model)
    for parameter, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{parameter}.{name}": value for name, value in state.items()}
    tensors[f"random.{rank}.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"random.{rank}.cuda"] = torch.cuda.get_rng_state()
    return tensors


def save(folder: Place, tensors: Mapping[str, Any], state: dict[str, Any], world: World) -> None:
    """Write a checkpoint so that `folder` is either complete or as it was before.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    write(folder, Parts(tensors, world), state, world)


def write(
    folder: Place,
    parts: Parts,
    state: dict[str, Any],
    world: World,
    *,
    lost: Callable[[], UserError | None] = lambda: None,
    before: Callable[[], None] = lambda: None,
    delete: Callable[[Place], None] = whole.delete,
) -> None:
    """Write a checkpoint, as `save`, of tensors that were looked at before. All ranks call it; they meet for files only.

    Args:
        lost: why this run may not write there any more, if so; rank 0 asks at the begin, and before the checkpoint takes its
            place.
        before: what is to happen on rank 0 before it takes its place.
        delete: takes what a former checkpoint of this name leaves.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; nothing is left behind.
        UserError: what `lost` returns.
    """
    world = world.without_limit()
    temporary = folder
    error: UserError | None = None
    if world.is_main and (error := lost()) is None:
        try:
            temporary = whole.make(folder, world.start)
        except whole.FAILURES as cause:
            error = unwritable(folder, cause)
    world.raise_together(error)
    temporary = whole.made(folder, cast(str, world.from_main(temporary.name)))
    results: list[WriteResult] = []
    files: dict[str, whole.Sums] = {}
    try:
        results, files = parts.write(temporary)
    except whole.FAILURES as cause:
        error = unwritable(folder, cause)
    written = world.gather((error, results, files))
    error = next((error for error, _, _ in written if error is not None), None)
    if error is None and world.is_main:
        try:
            sums = {name: of_file for _, _, files in written for name, of_file in files.items()}
            sums |= parts.write_index(temporary, [results for _, results, _ in written])
            sums[STATE] = whole.write_synced(temporary / STATE, json.dumps(state, indent=1).encode())
            whole.seal(temporary, sums)
            before()
            if (error := lost()) is None:
                whole.put(temporary, folder, delete)
        except whole.FAILURES as cause:
            error = unwritable(folder, cause)
    if error is not None and world.is_main and isinstance(temporary, Path):
        # On a store, which may be out of reach, `prune` does it.
        whole.delete(temporary)
    world.raise_together(error)


def unwritable(folder: Place, cause: OSError | StorageError) -> CheckpointError:
    """What to say of a checkpoint that cannot be written."""
    if isinstance(cause, StorageError):
        error = CheckpointError(f"cannot write a checkpoint: {cause}")
        error.exit_code = cause.exit_code
        return error
    return CheckpointError(f"{folder}: cannot write a checkpoint: {cause}. Free space or choose another run_dir.")


def verify(folder: Place, world: World) -> None:
    """Check every file of a checkpoint once, the ranks together.

    Raises:
        CheckpointError: it is damaged.
    """
    reason = damage(folder, world)
    if reason is not None:
        raise CheckpointError(f"{reason}. Choose another checkpoint or train again.")


@contextlib.contextmanager
def unchanged(folder: Place, world: World) -> Iterator[None]:
    """While a checkpoint of a run is read that may be alive, and replace it; all ranks enter it.

    Raises:
        CheckpointError: it was replaced meanwhile: what was read may be of both.
    """
    before = _marker(folder)
    replaced = CheckpointError(f"{folder} was replaced by its run while it was read. Give the command again.")
    try:
        yield
    except CheckpointError as error:
        raise (error if _marker(folder) == before else replaced) from error.__cause__
    world.raise_together(None if _marker(folder) == before else replaced)


def _marker(folder: Place) -> bytes | None:
    try:
        return read(folder / MARKER)
    except whole.FAILURES:
        return None


def latest(folder: Place, world: World) -> Place | None:
    """The newest whole checkpoint of a run, the same on every rank; damaged ones are named in a warning and passed over."""
    names = [path.name for path in reversed(_steps(folder))] if world.is_main else []
    for name in cast("list[str]", world.from_main(names)):
        reason = damage(folder / name, world)
        if reason is None:
            return folder / name
        if world.is_main:
            logger.warning("passing over a damaged checkpoint: %s", reason)
    return None


def step_damage(folder: Place, world: World) -> list[str]:
    """Why the step checkpoints of a run are not usable, one reason for each that is not, the newest first."""
    names = [path.name for path in reversed(_steps(folder))] if world.is_main else []
    reasons = [damage(folder / name, world) for name in cast("list[str]", world.from_main(names))]
    return [reason for reason in reasons if reason is not None]


def best_damage(best: Place, known: int, world: World) -> str | None:
    """Why neither `best` nor the one that it was replacing is usable; None where `settle_best` finds one. All ranks call it.

    Args:
        known: step of the best that the checkpoint to resume from knows.
    """
    reason = _best_damage(best, known, world)
    return None if reason is None or _best_damage(best.with_name(best.name + REPLACED), known, world) is None else reason


def _best_damage(best: Place, known: int, world: World) -> str | None:
    reason = damage(best, world)
    if reason is None and (step := read_state(best)["step"]) < known:
        # As in a copy that was made, file by file, while the run was alive.
        reason = f"{best} is of step {step}, and not the one that the run has chosen, of step {known}"
    return reason


def discard(folder: Place, world: World, delete: Callable[[Place], None] = whole.delete) -> None:
    """Take all checkpoints of a run away.

    Args:
        delete: takes what is left of each.
    """
    if world.is_main:
        for path in _steps(folder):
            whole.retire(path, delete)
    world.without_limit().barrier()


def settle_best(best: Place, step: int | None, world: World) -> None:
    """Make `best` the one that the step checkpoint to resume from knows, after a death during or since its replacement.

    Args:
        step: of that checkpoint; None where no validation has chosen one yet.
    """
    chosen = None if step is None else _settled(best, step, world)
    world.barrier()  # Another rank may still be reading what is deleted now.
    if world.is_main:
        old = best.with_name(best.name + REPLACED)
        if step is None:
            whole.delete(best)
        elif chosen == old:
            whole.bring_back(old, best)
        whole.delete(old)
    world.without_limit().barrier()


def _settled(best: Place, step: int, world: World) -> Place:
    """Which of best and the one it replaced a checkpoint of `step` knows."""
    old = best.with_name(best.name + REPLACED)
    if damage(old, world) is None and (damage(best, world) is not None or read_state(best)["step"] > step):
        return old
    return best


def go_back(folder: Place, step: int, best: Place, world: World) -> Place:
    """Make the checkpoint of `step` the newest of a run; those after it are deleted.

    Where no best checkpoint of that time is left, the choice begins anew, with a validation of this step. A death on the way
    leaves the run as it was, or gone back; in between, some of the later checkpoints are deleted.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    path = step_folder(folder, step)
    reason = damage(path, world)
    if reason is not None:
        left = ", ".join(str(step_of(p)) for p in _marked(folder))
        raise CheckpointError(f"--from-step {step}: {reason}. There are checkpoints of steps {left or 'none'}.")
    state = read_state(path)
    changes: dict[str, Any] = {"went_back_to": step, "finished": False}
    chosen = _settled(best, step, world)
    known = max(state["selection"]["best_step"].values(), default=0)
    if known and (_best_damage(chosen, known, world) is not None or read_state(chosen)["step"] > step):
        changes |= {"selection": {"best": {}, "stale": {}, "best_step": {}}, "validation_due": True}
    error: UserError | None = None
    if world.is_main:
        try:
            amend(path, changes)
        except whole.FAILURES as cause:
            error = unwritable(path, cause)
    world.raise_together(error)
    if world.is_main:
        for later in reversed([p for p in _marked(folder) if step_of(p) > step]):
            whole.retire(later, whole.delete)
        whole.sync(folder)
    world.without_limit().barrier()
    return path


def prune(
    folder: Place,
    keep: int,
    *,
    step: int,
    every: int | None = None,
    delete: Callable[[Place], None] = whole.delete,
) -> None:
    """Take away what the checkpoint of `step`, just saved, makes superfluous; on rank 0.

    That is: all but the newest `keep` up to `step`, those beyond it (damaged ones, passed over by the resume), and what
    interrupted or replaced saves left.

    Args:
        every: those of steps that are multiples of this are kept, too.
        delete: takes what is left of each.
    """
    for leftover in whole.leftovers(folder):
        delete(leftover)
    for replaced in whole.replaced(folder):
        whole.retire(replaced, delete)
    marked = _marked(folder)
    until = [p for p in marked if step_of(p) <= step]
    kept = until[-keep:] + [p for p in until if every is not None and step_of(p) % every == 0]
    for path in marked:
        if path not in kept:
            whole.retire(path, delete)


def _marked(folder: Place) -> list[Place]:
    return [path for path in _steps(folder) if (path / MARKER).is_file()]


def _steps(folder: Place) -> list[Place]:
    """What is there by the names of step checkpoints, the oldest first."""
    return sorted((path for path in whole.folders(folder) if path.name.startswith("step_")), key=lambda path: path.name)


def with_state(folder: Place) -> list[Place]:
    """Step checkpoints whose state can be read, the oldest first. Their other files are not looked at."""
    return [path for path in _marked(folder) if whole.file_damage(path, STATE) is None]


def step_folder(folder: Place, step: int) -> Place:
    """Where the checkpoint of a step lies; names sort as steps do."""
    return folder / f"step_{step:09d}"


def step_of(path: Place) -> int:
    """The step of the checkpoint that lies there."""
    return int(path.name.removeprefix("step_"))


def amend(folder: Place, changes: dict[str, Any]) -> None:
    """Note what became known of a checkpoint after it was written: keys that take the place of those of its state; on rank 0.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(_amendments(folder) | changes)
    write_atomically(whole.inside(folder) / AMENDED, json.dumps({**whole.sums(text.encode()), "state": text}, indent=1))


def _amendments(folder: Place) -> dict[str, Any]:
    try:
        content = json.loads(read(whole.inside(folder) / AMENDED))
        text = content["state"]
        return dict(json.loads(text)) if whole.sums(text.encode())["crc32"] == content["crc32"] else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def read_state(folder: Place) -> dict[str, Any]:
    """The `state.json` of a checkpoint, with its amendments. The other files are not looked at: see `verify`.

    Raises:
        CheckpointError: it is damaged.
    """
    reason = whole.file_damage(folder, STATE)
    if reason is not None:
        raise CheckpointError(f"{reason}. Choose another checkpoint or train again.")
    return dict(json.loads(read(whole.inside(folder) / STATE))) | _amendments(folder)


def load(folder: Place, tensors: dict[str, Any], world: World) -> None:
    """Fill `tensors` in place from a whole checkpoint, whatever world size and plan it was written with.

    Keys under `random.` that the checkpoint lacks (it had fewer ranks) are left alone. A counter of batches that it lacks, as
    it was written before that counter was, becomes so large that running statistics move at their least weight.

    A tensor may be of a number format that holds all numbers of the saved one, as fp32 those of fp16.

    Raises:
        CheckpointError: it lacks a tensor or holds one of another shape, so it belongs to another model; or one of a number
            format that this model would have to round.
    """
    reader = Reader(whole.inside(folder))
    saved = reader.read_metadata().state_dict_metadata
    tensors = {key: value for key, value in tensors.items() if key in saved or not key.startswith("random.")}
    uncounted = [tensors.pop(key) for key in list(tensors) if key.endswith("num_batches_tracked") and key not in saved]
    own = set(tensors)
    model_saved = {key for key in saved if key.startswith("model.")}
    missing = sorted(own - set(saved))
    surplus = sorted(model_saved - own) if any(key.startswith("model.") for key in own) else []
    error: UserError | None = None
    if missing or surplus:
        error = CheckpointError(
            f"{folder}: this checkpoint is of another model: it lacks {missing[:3] or 'nothing'} and has"
            f" {surplus[:3] or 'nothing'} beyond this one. Use its own configuration, or another run_dir."
        )
    for key, value in tensors.items():
        size = getattr(saved.get(key), "size", None)
        if error is None and size is not None and tuple(size) != tuple(value.size()):
            error = CheckpointError(
                f"{folder}: tensor '{key}' has shape {tuple(size)}, this model wants {tuple(value.size())}:"
                " the checkpoint is of another model or dataset. Use its own configuration, or another run_dir."
            )
        stored = getattr(getattr(saved.get(key), "properties", None), "dtype", value.dtype)
        if error is None and torch.promote_types(stored, value.dtype) != value.dtype:
            error = CheckpointError(
                f"{folder}: tensor '{key}' is {dtype_name(stored)}, this model holds {dtype_name(value.dtype)}, which would"
                " round it: the checkpoint is of another embeddings.dtype. Use its own configuration, or another run_dir."
            )
    world.raise_together(error)
    try:
        dcp.load(tensors, storage_reader=reader, process_group=world.without_limit().control)
    except CheckpointException as cause:
        lost = next((error for error, _ in cause.failures.values() if isinstance(error, StorageError)), None)
        raise lost or CheckpointError(f"{folder}: cannot be loaded: {cause}") from cause
    for counter in uncounted:
        counter.fill_(torch.iinfo(torch.int32).max)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, without the library's name."""
    return str(dtype).removeprefix("torch.")


def load_training(folder: Place, model: DistributedModelParallel, optimizer: CombinedOptimizer, world: World) -> None:
    """Restore weights, optimizer state and random state of this rank."""
    tensors = training_tensors(model, optimizer, world.rank)
    load(folder, tensors, world)
    # Sharded and fused state was filled in place; the optimizers also want to be told.
    torch.set_rng_state(tensors[f"random.{world.rank}.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"random.{world.rank}.cuda"])
