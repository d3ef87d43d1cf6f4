"""Choices of the configuration that are known to be slow on the device at hand, one line for each, told once."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import torch

from mmlrec.distributed.world import World
from mmlrec.errors import UserAdvice

#: Rows per rank below which the fixed cost of a step is most of it, by device.
_FEW_ROWS = {"cpu": 256, "cuda": 1024}
#: Steps of an epoch from which that is worth a word.
_MANY_STEPS = 2000
#: Share of its time and seconds that a run may spend on checkpoints without a word.
_SAVING_SHARE, _SAVING_SECONDS = 0.2, 20.0


def advise_on_speed(precision: str, rows_per_rank: int, steps_per_epoch: int, world: World) -> None:
    """Warn (`UserAdvice`) of what makes a run slow on its device without need."""
    device = world.device.type
    notes = [
        _precision(precision, device),
        _threads(world.local_world_size, device),
        _batches(rows_per_rank, steps_per_epoch, device),
    ]
    for note in notes:
        if note is not None:
            warnings.warn(note, UserAdvice, stacklevel=2)


def advise_on_warmup(strategy: str, warmup_steps: int, steps: int, *, ended: bool) -> str | None:
    """What to say of a run that has no more steps than a strategy's warm-up; None where it has.

    Args:
        steps: that it took (`ended`), or will take at most.
    """
    if steps > warmup_steps or not warmup_steps:
        return None
    what = f"ended at step {steps}" if ended else f"has {steps} steps at most"
    return (
        f"balancing.name={strategy}: the run {what}, and the strategy's warm-up takes {warmup_steps}:"
        f" {'it never weighed' if ended else 'it will never weigh'} the objectives as it is meant to. Train longer, or set a"
        " smaller balancing.window_steps (steps; an epoch when absent)."
    )


def advise_on_slots(update_every: int, steps: int) -> str | None:
    """What to say of a run on managed tables that ends before ids can use the slots that they earn; None where it does not."""
    if steps > update_every:
        return None
    return (
        f"embeddings.managed.update_every={update_every}: the run has {steps} steps at most, so no id trains in a slot that"
        f" it earns here.{f' Set embeddings.managed.update_every={max(steps // 10, 1)}.' if steps > 1 else ''}"
    )


def _precision(precision: str, device: str) -> str | None:
    if precision != "bf16":
        return None
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return None
        lacking = f"{torch.cuda.get_device_name()} has"
    else:
        can = torch.cpu.get_capabilities()
        if any(can.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")):
            return None
        lacking = "this CPU has"
    return (
        f"training.precision=bf16: {lacking} no bf16 instructions (such as avx512_bf16 or amx_bf16), so that products of"
        " matrices are emulated, several times slower than in fp32. Set training.precision=fp32."
    )


def _threads(local_world_size: int, device: str) -> str | None:
    threads, cores = torch.get_num_threads(), available_cores()
    if device != "cpu" or local_world_size == 1 or 2 * threads * local_world_size > cores:
        return None
    return (
        f"{local_world_size} ranks on this node with {threads} thread(s) each use {threads * local_world_size} of {cores}"
        f" cores (torchrun sets OMP_NUM_THREADS=1 unless it is set). Set OMP_NUM_THREADS={cores // local_world_size}, or start"
        " more ranks."
    )


def _batches(rows_per_rank: int, steps_per_epoch: int, device: str) -> str | None:
    few = _FEW_ROWS.get(device, 0)
    if rows_per_rank >= few or steps_per_epoch < _MANY_STEPS:
        return None
    return (
        f"training.batch_size gives each rank {rows_per_rank} rows a step, {steps_per_epoch:,} steps an epoch: below about"
        f" {few} rows the fixed cost of a step is most of its time. A larger training.batch_size trains an epoch faster."
    )


def available_cores() -> int:
    """Cores that this process may use: of its affinity, and of the limit of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return cores if quota == "max" else min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


class SavingTime:
    """Time that training waits for checkpoints, against that of the run; says once when it is much.

    Args:
        background: they are written while training goes on.
    """

    def __init__(self, *, background: bool) -> None:
        self._background = background
        self._saving = 0.0
        self._told = False

    def add(self, seconds: float, total_seconds: float, num_bytes: int) -> None:
        """Take in one checkpoint.

        Args:
            seconds: that training waited for it.
            total_seconds: of the run so far, this checkpoint included.
            num_bytes: of this checkpoint.
        """
        self._saving += seconds
        if self._told or self._saving < max(_SAVING_SECONDS, _SAVING_SHARE * total_seconds):
            return
        self._told = True
        beside = "training.checkpoint_async=true (training goes on while they are written, from a copy in memory), "
        warnings.warn(
            f"checkpoints took {self._saving:.0f} of {total_seconds:.0f} s so far, {num_bytes / 2**30:.2f} GiB each, one at"
            " the end of each epoch, and by training.checkpoint_every_steps, checkpoint_every_minutes and keep_every_steps."
            f" What makes it less: {'' if self._background else beside}a run folder on a faster disk, rarer checkpoints inside"
            " an epoch, or embeddings.optimizer.name=rowwise_adagrad, whose state is small.",
            UserAdvice,
            stacklevel=2,
        )
