"""Checkpoints: whole or absent, one flat key for each tensor, loadable at another world size and under another plan.

A checkpoint is a folder `step_NNNNNNNNN` of the files of torch.distributed.checkpoint, `state.json` (progress, selection,
configuration) and, written last inside a temporary folder that is then renamed, `COMPLETE.json` with size and checksum of
every file. What has no such marker, or does not match it, is no checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from mmlrec.distributed import World, logger
from mmlrec.errors import CheckpointError, UserError
from mmlrec.run_folder.index import Reader

MARKER = "COMPLETE.json"
STATE = "state.json"
_TEMPORARY = ".tmp"
_REPLACED = ".old"


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


def save(folder: Path, tensors: Mapping[str, Any], state: dict[str, Any], world: World) -> None:
    """Write a checkpoint so that `folder` is either complete or as it was before.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    # Of this start alone: what ranks of another one may still write is never taken for a part of this checkpoint.
    temporary = folder.with_name(f"{folder.name}.{world.start}{_TEMPORARY}")
    error: UserError | None = None
    if world.is_main:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as cause:
            error = _unwritable(folder, cause)
    world.raise_together(error)
    try:
        dcp.save(dict(tensors), storage_writer=FileSystemWriter(temporary), process_group=world.control, no_dist=False)
        if world.is_main:
            (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            _seal(temporary)
    except (CheckpointException, OSError) as cause:
        error = _unwritable(folder, cause)
    try:
        world.raise_together(error)
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if world.is_main:
        if folder.exists():
            old = folder.with_name(folder.name + _REPLACED)
            # The former one stays until `prune`: should this process die now, the newest step checkpoint knows that one.
            if old.exists():
                shutil.rmtree(folder)
            else:
                folder.rename(old)
        temporary.rename(folder)
        _sync(folder.parent)
    world.barrier()


def _unwritable(folder: Path, cause: CheckpointException | OSError) -> CheckpointError:
    reasons = [str(e[0]) for e in cause.failures.values()] if isinstance(cause, CheckpointException) else [str(cause)]
    return CheckpointError(f"{folder}: cannot write a checkpoint: {'; '.join(reasons)}. Free space or choose another run_dir.")


def _seal(folder: Path) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in sorted(folder.iterdir()) if p.is_file()}
    marker = folder / MARKER
    marker.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    for path in (folder / STATE, marker, folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def damage(folder: Path) -> str | None:
    """Why a folder is no usable checkpoint, naming the file, or None when it is whole."""
    marker = folder / MARKER
    if not marker.is_file():
        return f"{folder} has no {MARKER}: it was not written to the end"
    try:
        listed = json.loads(marker.read_text(encoding="utf-8"))["files"].items()
        files = {name: (expected["bytes"], expected["crc32"]) for name, expected in listed}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{marker} cannot be read: {error}"
    for name, (num_bytes, crc32) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != num_bytes:
            return f"{path} has {path.stat().st_size} bytes instead of {num_bytes}: it is truncated or was changed"
        if _crc32(path) != crc32:
            return f"{path} does not match its checksum: it is corrupt"
    return None


def latest(folder: Path, world: World) -> Path | None:
    """The newest whole checkpoint of a run, the same on every rank; damaged ones are named in a warning and passed over."""
    chosen = None
    if world.is_main and folder.is_dir():
        for candidate in sorted(folder.glob("step_*"), reverse=True):
            if candidate.suffix:
                continue
            reason = damage(candidate)
            if reason is None:
                chosen = candidate
                break
            logger.warning("passing over a damaged checkpoint: %s", reason)
    found = world.from_main(str(chosen) if chosen else None)
    return Path(str(found)) if found else None


def step_damage(folder: Path) -> list[str]:
    """Why the step checkpoints of a run are not usable, one reason for each that is not, the newest first."""
    reasons = [damage(path) for path in sorted(folder.glob("step_*"), reverse=True) if not path.suffix]
    return [reason for reason in reasons if reason is not None]


def best_damage(best: Path) -> str | None:
    """Why neither `best` nor the one that it was replacing is usable; None where `settle_best` finds one."""
    reason = damage(best)
    return None if reason is None or damage(best.with_name(best.name + _REPLACED)) is None else reason


def discard(folder: Path, world: World) -> None:
    """Delete all checkpoints of a run."""
    if world.is_main:
        for path in folder.glob("step_*"):
            shutil.rmtree(path, ignore_errors=True)
    world.barrier()


def settle_best(best: Path, step: int | None, world: World) -> None:
    """Make `best` the one that the step checkpoint to resume from knows, after a death during or since its replacement.

    Args:
        step: of that checkpoint; None for a new run.
    """
    if world.is_main:
        old = best.with_name(best.name + _REPLACED)
        if step is None:
            shutil.rmtree(best, ignore_errors=True)
        elif damage(old) is None and (damage(best) is not None or read_state(best)["step"] > step):
            shutil.rmtree(best, ignore_errors=True)
            old.rename(best)
        shutil.rmtree(old, ignore_errors=True)
    world.barrier()


def prune(folder: Path, keep: int, world: World, *, step: int) -> None:
    """Delete what the checkpoint of `step`, just saved, makes superfluous.

    That is: all but the newest `keep` up to `step`, those beyond it (damaged ones, passed over by the resume), and what
    interrupted or replaced saves left.
    """
    if not world.is_main:
        return
    for leftover in [*folder.glob(f"*{_TEMPORARY}"), *folder.glob(f"*{_REPLACED}")]:
        shutil.rmtree(leftover, ignore_errors=True)
    marked = sorted(p for p in folder.glob("step_*") if (p / MARKER).is_file())
    kept = [p for p in marked if p <= step_folder(folder, step)][-keep:]
    for path in set(marked) - set(kept):
        # The marker goes first: a deletion that is cut short leaves no folder that passes for a checkpoint.
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; names sort as steps do."""
    return folder / f"step_{step:09d}"


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """
    reason = damage(folder)
    if reason is not None:
        raise CheckpointError(f"{reason}. Choose another checkpoint or train again.")
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def load(folder: Path, tensors: dict[str, Any], world: World) -> None:
    """Fill `tensors` in place from a whole checkpoint, whatever world size and plan it was written with.

    Keys under `random.` that the checkpoint lacks (it had fewer ranks) are left alone.

    Raises:
        CheckpointError: it lacks a tensor or holds one of another shape, so it belongs to another model.
    """
    reader = Reader(folder)
    saved = reader.read_metadata().state_dict_metadata
    tensors = {key: value for key, value in tensors.items() if key in saved or not key.startswith("random.")}
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
    world.raise_together(error)
    try:
        dcp.load(tensors, storage_reader=reader, process_group=world.control)
    except CheckpointException as cause:
        raise CheckpointError(f"{folder}: cannot be loaded: {cause}") from cause


def load_training(folder: Path, model: DistributedModelParallel, optimizer: CombinedOptimizer, world: World) -> None:
    """Restore weights, optimizer state and random state of this rank."""
    tensors = training_tensors(model, optimizer, world.rank)
    load(folder, tensors, world)
    # Sharded and fused state was filled in place; the optimizers also want to be told.
    torch.set_rng_state(tensors[f"random.{world.rank}.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"random.{world.rank}.cuda"])
