"""Early stopping and the choice of the best checkpoint, by validation only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Selection:
    """Follows one metric, or one for each branch when branches train independently.

    Attributes:
        patience: validations without improvement after which a metric is settled; None = never.
        best: name -> best value so far (higher is better).
        stale: name -> validations since then.
        best_step: name -> step of the best value.
    """

    patience: int | None
    best: dict[str, float] = field(default_factory=dict)
    stale: dict[str, int] = field(default_factory=dict)
    best_step: dict[str, int] = field(default_factory=dict)

    def update(self, values: dict[str, float], step: int) -> list[str]:
        """Take a validation's metrics in; returns the names that improved. Settled ones no longer do."""
        improved = []
        for name, value in values.items():
            if self.settled(name):
                continue
            if value > self.best.get(name, -math.inf):
                self.best[name], self.stale[name], self.best_step[name] = value, 0, step
                improved.append(name)
            else:
                self.stale[name] += 1
        return improved

    def settled(self, name: str) -> bool:
        """True when this metric has run out of patience."""
        return self.patience is not None and self.stale.get(name, 0) >= self.patience

    @property
    def stop(self) -> bool:
        """True when every metric is settled."""
        return bool(self.best) and all(self.settled(name) for name in self.best)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {key: value for key, value in asdict(self).items() if key != "patience"}

    def load_state(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.best, self.stale, self.best_step = state["best"], state["stale"], state["best_step"]
