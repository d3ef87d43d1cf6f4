"""Strategies for tests, without a network."""

from mmlrec.balancing.base import Balancing, BalancingSpec
from mmlrec.registry import strategy, strategy_names
from mmlrec.schema import Task

GRADIENT_LEVEL = tuple(name for name in strategy_names() if "scope" in strategy(name).Config.model_fields)


def make(name: str, count: int, *, kinds: str = "", seed: int = 0, steps_per_epoch: int = 5, **options) -> Balancing:
    """A strategy over `count` tasks; `kinds`: r for regression, else classification, a letter for each."""
    names = tuple(f"t{k}" for k in range(count))
    tasks = [
        Task(name=n, kind="regression" if kind == "r" else "binary")
        for n, kind in zip(names, kinds or "b" * count, strict=True)
    ]
    chosen = strategy(name)
    spec = BalancingSpec(name, names, tasks=tuple(tasks), seed=seed, steps_per_epoch=steps_per_epoch)
    return chosen(spec, chosen.Config(**options))
