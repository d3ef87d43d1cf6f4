"""Choices that are slow on the device at hand are told, once, with what to set."""

import warnings

import pytest
import torch

from mmlrec.distributed.world import World
from mmlrec.errors import UserAdvice
from mmlrec.training import advice
from mmlrec.training.advice import SavingTime, advise_on_speed


def world(local_world_size: int = 1) -> World:
    return World(0, local_world_size, local_world_size, torch.device("cpu"), None)


def notes(*arguments) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        advise_on_speed(*arguments)
    assert all(issubclass(warning.category, UserAdvice) for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("capabilities", "slow"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, True),
        ({}, True),
        ({"avx512_bf16": True}, False),
        ({"amx_bf16": True}, False),
        ({"architecture": "aarch64", "bf16": True}, False),
    ],
)
def test_bf16_on_a_cpu_without_its_instructions(monkeypatch, capabilities, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert notes("fp32", 4096, 10, world()) == []
    found = notes("bf16", 4096, 10, world())
    assert len(found) == slow
    assert all("training.precision=bf16: this CPU has no bf16 instructions" in note for note in found)
    assert all("Set training.precision=fp32" in note for note in found)


@pytest.mark.parametrize(("threads", "ranks", "cores", "slow"), [(1, 2, 64, 32), (1, 4, 4, 0), (8, 8, 64, 0), (1, 1, 64, 0)])
def test_ranks_that_leave_cores_idle(monkeypatch, threads, ranks, cores, slow):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(advice, "available_cores", lambda: cores)
    found = notes("fp32", 4096, 10, world(ranks))
    assert len(found) == bool(slow)
    assert all(f"use {threads * ranks} of {cores} cores" in note and f"OMP_NUM_THREADS={slow}," in note for note in found)


@pytest.mark.parametrize(("rows", "steps", "slow"), [(16, 60_000, True), (16, 100, False), (4096, 60_000, False)])
def test_thousands_of_tiny_batches(rows, steps, slow):
    found = notes("fp32", rows, steps, world())
    assert len(found) == slow
    assert all("16 rows a step, 60,000 steps an epoch" in note and "training.batch_size" in note for note in found)


@pytest.mark.parametrize("background", [False, True])
def test_checkpoints_that_take_much_of_the_time_are_told_once(background):
    """A third of the time, of which 20 seconds may pass without a word. Nobody is told to set what is set."""
    saving = SavingTime(background=background)
    saving.add(10, 30, 3 << 30)
    with pytest.warns(UserAdvice, match=r"checkpoints took 20 of 60 s so far, 3\.00 GiB each") as told:
        saving.add(10, 60, 3 << 30)
    assert ("checkpoint_async=true" in str(told[0].message)) == (not background)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saving.add(10, 90, 3 << 30)
        rare = SavingTime(background=background)
        for total in (500, 1000, 1500):
            rare.add(60, total, 3 << 30)
