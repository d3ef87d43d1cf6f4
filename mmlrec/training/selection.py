"""Early stopping and the choice of the best checkpoint, by validation only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmlrec.errors import DataError
from mmlrec.schema import DatasetManifest, Task


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


def joint_metric(report: dict[str, Any]) -> dict[str, float]:
    """The metric of a model trained as a whole: mean over tasks of the overall AUC (minus the MSE of regression tasks).

    Raises:
        DataError: the validation split has one class only in every task, so nothing can be selected.
    """
    return {"all": _mean([_score(task) for task in report["tasks"].values()], "every task")}


def branch_metrics(report: dict[str, Any], branches: list[tuple[str, str, str | None]]) -> dict[str, float]:
    """The metric of each independent branch.

    Args:
        branches: (branch name, task, scenario value or None) of each.
    """
    values = {}
    for name, task, scenario in branches:
        slice_ = report["tasks"][task] if scenario is None else report["tasks"][task]["scenarios"][scenario]
        values[name] = _mean([_score(slice_)], f"branch '{name}'")
    return values


def check_selectable(manifest: DatasetManifest, tasks: Sequence[Task], branches: list[tuple[str, str, str | None]]) -> None:
    """Refuse data by which no checkpoint could be chosen, before a step is taken: the manifest has the counts.

    Args:
        branches: as for `branch_metrics`; empty when the model is trained as a whole.

    Raises:
        DataError: no task, or none of a branch, has the labels in valid that its metric needs.
    """
    kinds, counts = {task.name: task.kind for task in tasks}, manifest.splits["valid"].label_counts

    def scored(task: str, scenario: str) -> bool:
        labelled, positive = counts[task][scenario]
        return labelled > 0 if kinds[task] == "regression" else 0 < positive < labelled

    heads = [(task, scenario or "all") for _, task, scenario in branches] or [(task.name, "all") for task in tasks]
    wrong = [head for head in heads if not scored(*head)]
    if not wrong or (not branches and len(wrong) < len(heads)):
        return
    told = []
    for task, scenario in wrong:
        labelled, positive = counts[task][scenario]
        name = f"task '{task}'" + (f" in scenario {scenario}" if scenario != "all" else "")
        told.append(f"{name} has {labelled:,} labelled rows" + (f", {positive:,} of them positive" if labelled else ""))
    choice = "model.branches" if branches else "dataset.tasks"
    raise DataError(
        f"dataset '{manifest.name}', split valid: {'; '.join(told)}. Without labels, or with one class only, there is no metric"
        " to choose the best checkpoint by. Preprocess again with more rows, another --seed or another split, or choose others"
        f" with {choice}."
    )


def _score(metrics: dict[str, Any]) -> float | None:
    return -metrics["mse"] if metrics.get("mse") is not None else metrics.get("auc")


def _mean(scores: list[float | None], what: str) -> float:
    known = [score for score in scores if score is not None]
    if not known:
        raise DataError(
            f"the valid split has labels of one class only for {what}, so there is no AUC to select by. Use more rows."
        )
    return sum(known) / len(known)
