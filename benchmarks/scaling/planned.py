"""What a point would take, by the functions of `apps.plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.scaling.data import config_of, manifest_of
from benchmarks.scaling.points import Point
from mmlrec.embeddings.hardware import CPU, GPU, OPERATIONS, Hardware, host_memory
from mmlrec.session.planning import Request, TrainingPlan, plan_training

_MOST_RANKS = 1 << 16


class Planner:
    """Plans points for ranks of one kind.

    Args:
        config: name of the configuration that all points share, and its overrides.
        memory: bytes of a host, or of a GPU.
        per_host: ranks of a host, where there are so many.
    """

    def __init__(self, config: str, overrides: list[str], device: str, memory: int, per_host: int) -> None:
        self._config, self._overrides = config, overrides
        self._device, self._memory, self._per_host = device, memory, per_host
        self._known: dict[tuple[int, int], TrainingPlan] = {}

    def hardware(self, ranks: int) -> Hardware:
        """The ranks."""
        on_host = min(ranks, self._per_host)
        on_gpu = self._device == "cuda"
        if not on_gpu:
            return Hardware(ranks, on_host, "cpu", self._memory // on_host, CPU)
        return Hardware(ranks, on_host, "cuda", self._memory, GPU, host_memory=host_memory("MemTotal") // on_host)

    def plan(self, point: Point) -> TrainingPlan:
        """The plan of a point on its ranks."""
        config = config_of(point, self._config, self._overrides, Path("data/none"))
        request = Request(config, manifest_of(point), self.hardware(point.ranks), OPERATIONS[self._device], {}, self._config)
        network = (point.scenarios, point.tasks)
        self._known[network] = plan_training(request, self._known.get(network))
        return self._known[network]

    def least_ranks(self, point: Point) -> int | None:
        """The ranks that a point needs, found by doubling its own; None where no number helps."""
        tables = sum(rank.weights + rank.state for rank in self.plan(point).ranks)
        ranks = point.ranks
        while ranks <= _MOST_RANKS:
            split_evenly = tables / ranks <= self.hardware(ranks).usable  # without it there is nothing to plan
            if split_evenly and not self.plan(replace(point, ranks=ranks)).missing:
                return ranks
            ranks *= 2
        return None
