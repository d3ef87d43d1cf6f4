"""Strategies for tests, without a network."""

from collections.abc import Sequence

import numpy as np
import torch

from mmlrec.balancing.base import Balancing, BalancingSpec
from mmlrec.balancing.strategies.pcgrad import pcgrad
from mmlrec.registry import strategy, strategy_names
from mmlrec.schema import Task

GRADIENT_LEVEL = tuple(name for name in strategy_names() if "scope" in strategy(name).Config.model_fields)
#: Those that wait for the device once in each step with new coefficients, as their pages say with the reason; no other does.
WAITING_ONCE = ("mgda", "cagrad", "imtl_g", "nash", "aligned")


def make(
    name: str, count: int, *, kinds: str = "", seed: int = 0, steps_per_epoch: int = 5, num_looked_up: int = 0, **options
) -> Balancing:
    """A strategy over `count` tasks; `kinds`: r for regression, else classification, a letter for each."""
    names = tuple(f"t{k}" for k in range(count))
    tasks = [
        Task(name=n, kind="regression" if kind == "r" else "binary")
        for n, kind in zip(names, kinds or "b" * count, strict=True)
    ]
    chosen = strategy(name)
    spec = BalancingSpec(
        name, names, tasks=tuple(tasks), seed=seed, steps_per_epoch=steps_per_epoch, num_looked_up=num_looked_up
    )
    return chosen(spec, chosen.Config(**options))


def pcgrad_of(gram: np.ndarray, orders: Sequence[Sequence[int]]) -> np.ndarray:
    """PCGrad's coefficients; `orders`: for each objective, that in which it meets all others."""
    whole = torch.tensor([[j for j in order if j != i] + [i] for i, order in enumerate(orders)])
    return pcgrad(torch.from_numpy(gram), whole, whole.argsort(1)).numpy()
