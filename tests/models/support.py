"""Methods by name: tiny networks of them, and the classes that run a contract of mmlrec.testing on each."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.integrate import quad

from mmlrec.models.base.model import ModelSpec, MultiTaskModel
from mmlrec.registry import method, method_names
from mmlrec.testing import networks
from mmlrec.testing.method_cases import MethodCases
from mmlrec.testing.networks import SHAPES, TINY, Data, losses, losses_of, make_data, make_spec, spec_of, step

# The networks' names, too, so that a test finds all that it needs of one here.
__all__ = [
    "SHAPES",
    "TINY",
    "Data",
    "assert_gradients_are_slopes",
    "build",
    "contracts",
    "losses",
    "losses_of",
    "make_data",
    "make_spec",
    "mean_gate",
    "spec_of",
    "step",
    "supports",
]

#: In what a method differs by design from what the contract asks; MethodCases says what each word means.
DIFFERENCES: dict[str, dict[str, Any]] = {
    # Its second step's transfer is trained by that step alone when it is the last and has one head.
    "aitm": {"trained_by_one": ("transfers", "maps")},
    "apg": {"mtl_options": {"condition_fields": ["f0"]}},  # It has no condition by default.
    "cross_stitch": {"pairwise": True},
    # A conversion counts only where the click is known; without click labels there is no loss at all.
    "escm2": {"needs_first_label": True},
    # Mixed logits have no bound: from some starts they diverge, and rounding decides from which. Probabilities cannot.
    "hmoe": {"overfit_options": {"mix_space": "prob"}},
    "mlp": {"ranks_tasks_alike": True},
    "pepnet": {"pairwise": True},
    # The gradient of a last-level expert passes through other heads' level below only in forward. One level, CGC, has no
    # weights for pairs: its shared experts read the input, and no gate reads the experts of all heads.
    "ple": {"exchanges_gradients": True, "pairwise": True, "tied_options": ({"num_levels": 1},)},
}


def contracts(kind: type[MethodCases]) -> dict[str, type[MethodCases]]:
    """Name -> class of tests of each method; `pytest -k NAME` finds it, as it has the method's name in its own."""
    return {
        f"Test_{name}": type(f"Test_{name}", (kind,), {"method": method(name), **DIFFERENCES.get(name, {})})
        for name in method_names()
    }


def supports(name: str, spec: ModelSpec) -> bool:
    return spec.setting in method(name).settings


def build(name: str, spec: ModelSpec, **options: Any) -> MultiTaskModel:
    return networks.build(method(name), spec, **options)


def assert_gradients_are_slopes(net: MultiTaskModel, data: Data) -> None:
    """The gradients of a step equal finite differences of the loss, along a random direction of each parameter; float64."""
    _, gradients = step(net, data)
    for key, parameter in net.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
                values.append(sum(losses(net, data).values()))
                parameter.sub_(sign * 1e-5 * direction)
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((gradients[key] * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=key)


def mean_gate(log_alpha: float, beta: float, gamma: float, zeta: float) -> float:
    """Mean of a hard-concrete gate: the integral, over the uniform number that it is drawn with, of its value."""

    def value(u: float) -> float:
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / beta))
        return s * (zeta - gamma) + gamma

    # It is 0 below the first of these numbers and 1 above the second.
    first, second = (1 / (1 + math.exp(log_alpha - beta * math.log((t - gamma) / (zeta - t)))) for t in (0.0, 1.0))
    return quad(value, first, second, epsabs=1e-12, epsrel=1e-12)[0] + 1 - second
