"""How often a step with a strategy makes the host wait for the device: looked at on a device without numbers."""

import contextlib

import pytest
import torch

from mmlrec.balancing import gradients
from mmlrec.registry import strategy_names
from tests.balancing.support import WAITING_ONCE, make
from tests.waits import Waits

COUNT = 3


@pytest.fixture
def waits(monkeypatch):
    """What waits, by name, of one step of a strategy: a network of one shared, one partly and one wholly owned layer."""

    def call(name: str, steps: int = 2, **options) -> list[str]:
        strategy = make(name, COUNT, num_looked_up=4, **options).to("meta")
        strategy.spec.owned.update({"heads": (True,) * COUNT, "mixed": (False, True, False)})
        parameters = {
            key: torch.nn.Parameter(torch.zeros(shape, device="meta"))
            for key, shape in {"shared": (8, 6), "mixed": (COUNT, 6), "heads": (COUNT, 6)}.items()
        }
        x = torch.zeros(20, 8, device="meta", requires_grad=True)
        labels = torch.zeros(20, COUNT, device="meta")
        with Waits() as found:

            def asked(values):
                found.found.append("to_host")
                assert values.shape == (COUNT * COUNT + COUNT,)
                return torch.cat([torch.eye(COUNT, dtype=values.dtype).flatten(), torch.ones(COUNT, dtype=values.dtype)])

            monkeypatch.setattr(gradients, "to_host", asked)
            for step in range(1, steps + 1):
                if step == steps:
                    found.found.clear()  # the first one may prepare what the others need
                hidden = (x @ parameters["shared"]).unsqueeze(1) * (parameters["mixed"] + parameters["heads"])
                objectives = (hidden.sum(2) - labels).square().mean(0)
                strategy(objectives, x, parameters, step).backward()
        return found.found

    return call


@pytest.mark.parametrize("name", strategy_names())
def test_a_step_waits_once_for_a_solver_and_else_never(waits, name):
    assert waits(name) == ["to_host"] * (name in WAITING_ONCE)


@pytest.mark.parametrize("name", ["pcgrad", "cagrad"])
@pytest.mark.parametrize("scope", ["embedding", "both"])
def test_whatever_is_compared(waits, name, scope):
    assert waits(name, scope=scope) == ["to_host"] * (name in WAITING_ONCE)


def test_kept_coefficients_are_not_waited_for(waits):
    assert waits("cagrad", refresh_every=2) == []
    assert waits("cagrad", steps=3, refresh_every=2) == ["to_host"]


def test_what_reads_a_number_is_seen():
    """Each of these, on CUDA, is a wait; some raise an error here besides."""
    x, places = torch.zeros(3, 3, device="meta"), torch.tensor([0, 2])

    for reads in (
        lambda: torch.tensor([1.0, 2.0], device="meta"),
        lambda: x.new_tensor([1.0]),
        lambda: places.to("meta"),
        lambda: places.sum().to("meta"),
        lambda: x.copy_(torch.ones(3, 3)),
        lambda: x[places],
        lambda: x[[0, 2]],
        lambda: x[x[:, 0] > 0],
        lambda: bool(x.sum()),
        lambda: x.sum().item(),
        lambda: x.sum(0).tolist(),
        lambda: x.cpu(),
        lambda: x.nonzero(),
        lambda: torch.linalg.eigh(x),
        lambda: torch.linalg.svd(x),
        lambda: torch.linalg.solve(x, x),
        lambda: torch.linalg.lstsq(x, x),
        lambda: torch.linalg.matrix_exp(x),
        lambda: torch.linalg.pinv(x),
    ):
        with Waits() as found, contextlib.suppress(RuntimeError):
            reads()
        assert found.found, reads.__code__.co_firstlineno
    with Waits() as found:
        places.to("meta", non_blocking=True)
        torch.where(x > 0, x, 0.0) * torch.tensor(2.0)
        torch.linalg.solve_ex(x, x)
    assert found.found == []
