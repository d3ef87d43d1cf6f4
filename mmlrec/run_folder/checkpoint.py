"""Checkpoints: whole or absent, one flat key for each tensor, loadable at another world size and under another plan.

A checkpoint is a folder `step_NNNNNNNNN` of the files of torch.distributed.checkpoint, `state.json` (progress, selection,
configuration) and, written last inside a temporary folder that is then renamed, `COMPLETE.json` with size and checksum of
every file. What has no such marker, or does not match it, is no checkpoint. Each rank takes the checksum of its files while it
writes them; where they are checked, the ranks share them out.

`amended.json` holds what became known after the checkpoint was sealed: the validation of its step, or that the run went back
to it. It is no part of the whole: without it that is found out again.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from mmlrec.distributed.world import World, logger
from mmlrec.errors import CheckpointError, UserError
from mmlrec.run_folder.folder import write_atomically
from mmlrec.run_folder.index import Reader
from mmlrec.run_folder.summed_files import Writer

MARKER = "COMPLETE.json"
STATE = "state.json"
AMENDED = "amended.json"
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
        writer = Writer(temporary)
        dcp.save(dict(tensors), storage_writer=writer, process_group=world.control, no_dist=False)
        files = {name: sums for written in world.gather(writer.written) for name, sums in written.items()}
        if world.is_main:
            text = json.dumps(state, indent=1).encode()
            (temporary / STATE).write_bytes(text)
            _seal(temporary, {**files, STATE: _sums(text)})
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


def _seal(folder: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    for name, sums in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != sums["bytes"]:
            raise OSError(f"{path} was written by another rank and is not here, or not whole: all ranks must see one folder")
    marker = folder / MARKER
    marker.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1), encoding="utf-8")
    for path in (folder / STATE, marker, folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sums(content: bytes) -> dict[str, int]:
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def damage(folder: Path, world: World | None = None) -> str | None:
    """Why a folder is no usable checkpoint, naming the file, or None when it is whole.

    Args:
        world: of the ranks that share the checksums out; all call it, and get one answer. Without it this process does all.
    """
    main = world is None or world.is_main
    found = _listed(folder) if main else None
    if world is not None:
        world.at(f"checking {folder.name}")
        found = cast("str | dict[str, tuple[int, int]]", world.from_main(found))
    assert found is not None
    if isinstance(found, str):
        return found
    # The largest first, so that the shares are about equal.
    names = sorted(found, key=lambda name: (-found[name][0], name))
    own = names if world is None else names[world.rank :: world.world_size]
    reasons = {name: reason for name in own if (reason := _file_damage(folder / name, *found[name])) is not None}
    if world is not None:
        reasons = {name: reason for some in world.gather(reasons) for name, reason in some.items()}
    return next((reasons[name] for name in found if name in reasons), None)


def _listed(folder: Path) -> str | dict[str, tuple[int, int]]:
    """Bytes and checksum of each file by its name, or why there are none."""
    marker = folder / MARKER
    if not marker.is_file():
        return f"{folder} has no {MARKER}: it was not written to the end"
    try:
        listed = json.loads(marker.read_text(encoding="utf-8"))["files"].items()
        files = {name: (expected["bytes"], expected["crc32"]) for name, expected in listed}
        if not all(type(number) is int for sums in files.values() for number in sums):
            raise ValueError("sizes and checksums are integers")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{marker} cannot be read: {error}"
    return files


def _file_damage(path: Path, num_bytes: int, crc32: int) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != num_bytes:
        return f"{path} has {path.stat().st_size} bytes instead of {num_bytes}: it is truncated or was changed"
    if _crc32(path) != crc32:
        return f"{path} does not match its checksum: it is corrupt"
    return None


def verify(folder: Path, world: World) -> None:
    """Check every file of a checkpoint once, the ranks together.

    Raises:
        CheckpointError: it is damaged.
    """
    reason = damage(folder, world)
    if reason is not None:
        raise CheckpointError(f"{reason}. Choose another checkpoint or train again.")


def latest(folder: Path, world: World) -> Path | None:
    """The newest whole checkpoint of a run, the same on every rank; damaged ones are named in a warning and passed over."""
    names = [p.name for p in sorted(folder.glob("step_*"), reverse=True) if not p.suffix] if world.is_main else []
    for name in cast("list[str]", world.from_main(names)):
        reason = damage(folder / name, world)
        if reason is None:
            return folder / name
        if world.is_main:
            logger.warning("passing over a damaged checkpoint: %s", reason)
    return None


def step_damage(folder: Path) -> list[str]:
    """Why the step checkpoints of a run are not usable, one reason for each that is not, the newest first."""
    reasons = [damage(path) for path in sorted(folder.glob("step_*"), reverse=True) if not path.suffix]
    return [reason for reason in reasons if reason is not None]


def best_damage(best: Path, world: World) -> str | None:
    """Why neither `best` nor the one that it was replacing is usable; None where `settle_best` finds one. All ranks call it."""
    reason = damage(best, world)
    return None if reason is None or damage(best.with_name(best.name + _REPLACED), world) is None else reason


def discard(folder: Path, world: World) -> None:
    """Delete all checkpoints of a run."""
    if world.is_main:
        for path in folder.glob("step_*"):
            shutil.rmtree(path, ignore_errors=True)
    world.barrier()


def settle_best(best: Path, step: int | None, world: World) -> None:
    """Make `best` the one that the step checkpoint to resume from knows, after a death during or since its replacement.

    Args:
        step: of that checkpoint; None where no validation has chosen one yet.
    """
    chosen = None if step is None else _settled(best, step, world)
    if world.is_main:
        old = best.with_name(best.name + _REPLACED)
        if step is None:
            shutil.rmtree(best, ignore_errors=True)
        elif chosen == old:
            shutil.rmtree(best, ignore_errors=True)
            old.rename(best)
        shutil.rmtree(old, ignore_errors=True)
    world.barrier()


def _settled(best: Path, step: int, world: World) -> Path:
    """Which of best and the one it replaced a checkpoint of `step` knows."""
    old = best.with_name(best.name + _REPLACED)
    if damage(old, world) is None and (damage(best, world) is not None or read_state(best)["step"] > step):
        return old
    return best


def go_back(folder: Path, step: int, best: Path, world: World) -> Path:
    """Make the checkpoint of `step` the newest of a run; those after it are deleted.

    Where no best checkpoint of that time is left, the choice begins anew, with a validation of this step. A death on the way
    leaves the run as it was, or gone back; in between, some of the later checkpoints are deleted.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    path = step_folder(folder, step)
    reason = damage(path, world)
    if reason is not None:
        left = ", ".join(str(int(p.name.removeprefix("step_"))) for p in _marked(folder))
        raise CheckpointError(f"--from-step {step}: {reason}. There are checkpoints of steps {left or 'none'}.")
    state = read_state(path)
    changes: dict[str, Any] = {"went_back_to": step, "finished": False}
    chosen = _settled(best, step, world)
    if state["selection"]["best"] and (damage(chosen, world) is not None or read_state(chosen)["step"] > step):
        changes |= {"selection": {"best": {}, "stale": {}, "best_step": {}}, "validation_due": True}
    amend(path, changes, world)
    if world.is_main:
        for later in reversed([p for p in _marked(folder) if p > path]):
            _delete(later)
        _sync(folder)
    world.barrier()
    return path


def prune(folder: Path, keep: int, world: World, *, step: int) -> None:
    """Delete what the checkpoint of `step`, just saved, makes superfluous.

    That is: all but the newest `keep` up to `step`, those beyond it (damaged ones, passed over by the resume), and what
    interrupted or replaced saves left.
    """
    if not world.is_main:
        return
    for leftover in [*folder.glob(f"*{_TEMPORARY}"), *folder.glob(f"*{_REPLACED}")]:
        shutil.rmtree(leftover, ignore_errors=True)
    marked = _marked(folder)
    kept = [p for p in marked if p <= step_folder(folder, step)][-keep:]
    for path in set(marked) - set(kept):
        _delete(path)


def _marked(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if not p.suffix and (p / MARKER).is_file())


def _delete(path: Path) -> None:
    # The marker goes first: a deletion that is cut short leaves no folder that passes for a checkpoint.
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; names sort as steps do."""
    return folder / f"step_{step:09d}"


def amend(folder: Path, changes: dict[str, Any], world: World) -> None:
    """Note what became known of a checkpoint after it was written: keys that take the place of those of its state.

    Raises:
        CheckpointError: it cannot be written.
    """
    error: UserError | None = None
    if world.is_main:
        try:
            text = json.dumps(_amendments(folder) | changes)
            write_atomically(folder / AMENDED, json.dumps({**_sums(text.encode()), "state": text}, indent=1))
        except OSError as cause:
            error = _unwritable(folder, cause)
    world.raise_together(error)


def _amendments(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / AMENDED).read_text(encoding="utf-8"))
        text = content["state"]
        return dict(json.loads(text)) if _sums(text.encode())["crc32"] == content["crc32"] else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint, with its amendments. The other files are not looked at: see `verify`.

    Raises:
        CheckpointError: it is damaged.
    """
    listed = _listed(folder)
    path = folder / STATE
    if isinstance(listed, str):
        reason: str | None = listed
    else:
        reason = _file_damage(path, *listed[STATE]) if STATE in listed else f"{path} is missing"
    if reason is not None:
        raise CheckpointError(f"{reason}. Choose another checkpoint or train again.")
    return dict(json.loads(path.read_text(encoding="utf-8"))) | _amendments(folder)


def load(folder: Path, tensors: dict[str, Any], world: World) -> None:
    """Fill `tensors` in place from a whole checkpoint, whatever world size and plan it was written with.

    Keys under `random.` that the checkpoint lacks (it had fewer ranks) are left alone. A counter of batches that it lacks, as
    it was written before that counter was, becomes so large that running statistics move at their least weight.

    Raises:
        CheckpointError: it lacks a tensor or holds one of another shape, so it belongs to another model.
    """
    reader = Reader(folder)
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
    world.raise_together(error)
    try:
        dcp.load(tensors, storage_reader=reader, process_group=world.control)
    except CheckpointException as cause:
        raise CheckpointError(f"{folder}: cannot be loaded: {cause}") from cause
    for counter in uncounted:
        counter.fill_(torch.iinfo(torch.int32).max)


def load_training(folder: Path, model: DistributedModelParallel, optimizer: CombinedOptimizer, world: World) -> None:
    """Restore weights, optimizer state and random state of this rank."""
    tensors = training_tensors(model, optimizer, world.rank)
    load(folder, tensors, world)
    # Sharded and fused state was filled in place; the optimizers also want to be told.
    torch.set_rng_state(tensors[f"random.{world.rank}.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"random.{world.rank}.cuda"])
