"""That a training step behind the lookup never makes the host wait for the device: looked at on a device without numbers."""

import contextlib

import pytest
import torch

from mmlrec.distributed.world import process_group
from mmlrec.registry import method_names
from tests.models.support import spec_of, supports
from tests.training.head_steps import training_step
from tests.waits import Waits

SHAPES = ["mtl", "msl", "mtmsl"]
EVERYWHERE = [(name, shape) for name in method_names() for shape in SHAPES if supports(name, spec_of(shape))]


@pytest.fixture(scope="module", autouse=True)
def world():
    """A process group."""
    with process_group():
        yield


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """Which there is not on `meta`."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)


def waits_of(*arguments, **options):
    """What waits in the second step, by name; the first one may prepare what the others need."""
    step = training_step(*arguments, "meta", **options)
    step()
    with Waits() as found:
        assert step().logits.is_meta
    return found.found


@pytest.mark.parametrize(("name", "shape"), EVERYWHERE)
def test_no_method_waits_in_a_training_step(name, shape):
    assert waits_of(name, shape) == []


@pytest.mark.parametrize("name", [name for name, shape in EVERYWHERE if shape == "mtmsl"])
def test_normalised_layers_do_not_wait(name):
    assert waits_of(name, "mtmsl", use_bn=True) == []


@pytest.mark.parametrize("use_bn", [False, True])
def test_some_branches_of_single_task_do_not_wait(use_bn):
    assert waits_of("single_task", "mtmsl", branches=[4, 1], use_bn=use_bn) == []


@pytest.mark.parametrize("balancing", ["static", "pcgrad"])
@pytest.mark.parametrize("unit", ["scenario", "head"])
def test_objectives_penalties_and_scales_do_not_wait(unit, balancing):
    assert waits_of("ple", "mtmsl", balancing=balancing, unit=unit, l2=0.1, regression=True) == []
