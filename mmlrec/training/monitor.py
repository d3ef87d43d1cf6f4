"""What early stopping and the best checkpoint go by: metrics of the validation report, joined into one value.

Higher is better. `Selection` follows the values; the names are those of `training.monitor` (docs/training.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmlrec.errors import ConfigError, DataError, UserAdvice, did_you_mean
from mmlrec.metrics.report import BINARY_METRICS, RANKING_METRICS, REGRESSION_METRICS
from mmlrec.models.base.chain import ChainModel
from mmlrec.models.base.model import MultiTaskModel
from mmlrec.schema import DatasetManifest, Task

#: (name, task, scenario value or None) of a part of the model that trains by itself.
Branch = tuple[str, str, str | None]

#: Metrics of which more is better, and less. The best calibration is 1.
HIGHER, LOWER = ("auc", "gauc", "r2"), ("logloss", "normalized_entropy", "mse", "rmse", "mae")
_SCENARIO_MEANS = ("scenario_mean", "scenario_weighted_mean")


@dataclass(frozen=True)
class Term:
    """One metric of the report.

    Attributes:
        name: as `training.monitor` calls it.
        path: keys of the report that lead to its entry.
        heads: (task, scenario or "all") of the slices it is made of: it has a value when one of them has.
        weight: factor in a sum.
    """

    name: str
    path: tuple[str, ...]
    metric: str
    heads: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0

    def value(self, report: dict[str, Any]) -> float | None:
        """The metric in a report, turned so that higher is better; None where it is undefined."""
        entry = report
        for key in self.path:
            entry = entry[key]
        value = entry[self.metric]
        if value is None:
            return None
        if self.metric == "calibration":
            return -abs(math.log(max(value, 1e-300)))  # twice too much is as bad as half of it
        return float(value if self.metric in HIGHER else -value)

    def __str__(self) -> str:
        """As it stands in a sum, with its sign."""
        factor = "" if self.weight == 1 else f"{self.weight:g} "
        shown = f"|ln {self.name}|" if self.metric == "calibration" else self.name
        return f"{'+' if self.metric in HIGHER else '-'} {factor}{shown}"


@dataclass(frozen=True)
class Target:
    """What one value is made of: a weighted sum of terms, or the mean of those that have a value."""

    terms: tuple[Term, ...]
    mean: bool

    def value(self, report: dict[str, Any]) -> float | None:
        """None where no term of a mean, or one of a sum, has no value."""
        values = [term.value(report) for term in self.terms]
        known = [value for value in values if value is not None]
        if self.mean:
            return sum(known) / len(known) if known else None
        if len(known) < len(values):
            return None
        return sum(term.weight * value for term, value in zip(self.terms, known, strict=True))

    def __str__(self) -> str:
        """As a formula."""
        if self.mean and len(self.terms) > 1:
            return f"mean of {', '.join(str(term).removeprefix('+ ') for term in self.terms)}"
        return " ".join(map(str, self.terms)).removeprefix("+ ")


@dataclass
class Monitor:
    """The values of a validation.

    Attributes:
        targets: "all", or the name of each branch that trains by itself -> what its value is made of.
        notes: of branches that are left out, because their rows of valid cannot tell.
    """

    targets: dict[str, Target]
    notes: list[str] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)

    def values(self, report: dict[str, Any]) -> dict[str, float]:
        """Name -> value. Branches without one are left out; the first time `UserAdvice` names them.

        Raises:
            DataError: nothing has a value.
        """
        found = {name: target.value(report) for name, target in self.targets.items()}
        values = {name: value for name, value in found.items() if value is not None}
        lacking = {name: str(self.targets[name]) for name in found if name not in values and name not in self._told}
        if not values:
            raise DataError(
                f"the valid split gives no value to {'; '.join(lacking.values())}, by which the best checkpoint is chosen: its"
                " labels are of one class, in every group for GAUC, or its rows weigh 0. Use more rows, or choose another"
                " training.monitor."
            )
        if lacking:
            self._told |= lacking.keys()
            warnings.warn(f"not selected by validation: {_left_out(lacking)}", UserAdvice, stacklevel=2)
        return values

    def __str__(self) -> str:
        """What is monitored, as a formula for each target."""
        if list(self.targets) == ["all"]:
            return str(self.targets["all"])
        return ", ".join(f"{name}: {target}" for name, target in self.targets.items())


def build_monitor(
    chosen: Mapping[str, float] | None,
    manifest: DatasetManifest,
    tasks: Sequence[Task],
    branches: Sequence[Branch] = (),
    *,
    cvr: Sequence[str] = (),
    knows_r2: bool = True,
) -> Monitor:
    """What a run goes by, checked against what the manifest counts in valid, before a step is taken.

    Without a choice: the mean over tasks of AUC and, for regression tasks, of R²; of minus the mean squared error where train
    has no deviation. Of each branch, its own. A chosen metric of a task counts for the branches of that task, each by its own
    rows; other branches go by what they would go by without a choice.

    Args:
        chosen: `training.monitor`, name -> weight.
        branches: empty when the model is trained as a whole.
        cvr: metrics of the report's entry of that name; empty where it has none.
        knows_r2: False for runs of earlier releases, whose best values so far know mean squared errors only.

    Raises:
        ConfigError: a name that the report does not have; with the nearest one.
        DataError: no value can be had from the labels in valid.
    """
    known = {term.name: term for term in _terms(manifest, tasks, cvr)}
    for name in chosen or {}:
        _check_name(name, known, manifest, tasks)
    terms = [replace(known[name], weight=weight) for name, weight in (chosen or {}).items()]
    default = [_default(task, None, manifest, knows_r2) for task in tasks]
    if not branches:
        targets = {"all": Target(tuple(terms), mean=False) if terms else Target(tuple(default), mean=True)}
    else:
        targets = {}
        kinds = {task.name: task for task in tasks}
        for name, task, scenario in branches:
            own = [narrow for term in terms if (narrow := _of_branch(term, kinds[task], scenario)) is not None]
            targets[name] = Target(tuple(own or [_default(kinds[task], scenario, manifest, knows_r2)]), mean=not own)
    counts = _Counts(manifest, tasks)
    lacking = {name: counts.lacking(target) for name, target in targets.items()}
    left = {name: target for name, target in targets.items() if not lacking[name]}
    if not left:
        remedy = "training.monitor" if chosen else "model.branches" if branches else "dataset.tasks"
        told = dict.fromkeys(text for texts in lacking.values() for text in texts)
        raise DataError(
            f"dataset '{manifest.name}', split valid: {'; '.join(told)}. Without labels, or with one class only, there is no"
            " metric to choose the best checkpoint by. Preprocess again with more rows, another --seed or another split, or"
            f" choose others with {remedy}."
        )
    wrong = {name: "; ".join(texts) for name, texts in lacking.items() if texts}
    return Monitor(left, [f"not selected by validation: {_left_out(wrong)}"] if wrong else [])


def _left_out(wrong: dict[str, str]) -> str:
    listed = "; ".join(f"branch '{name}' ({reason})" for name, reason in wrong.items())
    return (
        f"{listed}. Its rows of valid give no metric, so its weights in the best checkpoint are of the newest step at which"
        " another branch was better than before."
    )


def metrics_of(task: Task) -> tuple[str, ...]:
    """Names of the metrics that a task's entry of the report has."""
    return REGRESSION_METRICS if task.kind == "regression" else BINARY_METRICS


def metrics_of_cvr(network: MultiTaskModel) -> tuple[str, ...]:
    """Metrics of the entry `cvr` that the report of a network has."""
    if not isinstance(network, ChainModel):
        return ()
    return BINARY_METRICS if network.conditional else RANKING_METRICS


def _terms(manifest: DatasetManifest, tasks: Sequence[Task], cvr: Sequence[str]) -> Iterator[Term]:
    """All metrics of the report. Of names that two have, as of a task called "mean", the task's is the last."""
    scenarios = manifest.scenario.values if manifest.scenario else []
    entries: list[tuple[str, Sequence[str], bool]] = [("cvr", cvr, False)] if cvr else []
    entries += [(task.name, metrics_of(task), True) for task in tasks]
    for metric in _offered((*BINARY_METRICS, *REGRESSION_METRICS), manifest):
        of_tasks = tuple((task.name, "all") for task in tasks if metric in metrics_of(task))
        if of_tasks:
            yield Term(f"mean.{metric}", ("mean",), metric, of_tasks)
    for name, metrics, counted in entries:
        path = ("tasks", name) if counted else (name,)
        for metric in _offered(metrics, manifest):
            # What a conditional rate is measured on, the manifest does not count.
            heads = {value: ((name, value),) if counted else () for value in ("all", *scenarios)}
            for mean in _SCENARIO_MEANS if scenarios else ():
                of_scenarios = tuple(head for value in scenarios for head in heads[value])
                yield Term(f"{name}.{mean}.{metric}", (*path, mean), metric, of_scenarios)
            for value in scenarios:
                yield Term(f"{name}.{value}.{metric}", (*path, "scenarios", value), metric, heads[value])
            yield Term(f"{name}.{metric}", path, metric, heads["all"])


def _offered(metrics: Sequence[str], manifest: DatasetManifest) -> list[str]:
    return [metric for metric in metrics if metric != "gauc" or manifest.group_key is not None]


def _check_name(name: str, known: Mapping[str, Term], manifest: DatasetManifest, tasks: Sequence[Task]) -> None:
    if name in known:
        return
    why = ""
    if name.rpartition(".")[2] == "gauc" and manifest.group_key is None:
        why = " The dataset names no group_key, so there is no GAUC."
    of_tasks = "; ".join(f"{task.name}: {', '.join(_offered(metrics_of(task), manifest))}" for task in tasks)
    forms = "TASK.METRIC, mean.METRIC" + (
        "".join(f", TASK.{part}.METRIC" for part in ("SCENARIO", *_SCENARIO_MEANS)) if manifest.scenario else ""
    )
    raise ConfigError(
        f"training.monitor: '{name}' is no metric of the report.{did_you_mean(name, known)}{why} Names are {forms}."
        f" Metrics of {of_tasks}."
    )


def _default(task: Task, scenario: str | None, manifest: DatasetManifest, knows_r2: bool) -> Term:
    """What a task, or a branch of it, goes by without a choice."""
    metric = "auc"
    if task.kind == "regression":
        _, deviation = manifest.train_moments(task.name).get(scenario or "all", (0.0, 0.0))
        metric = "r2" if knows_r2 and deviation else "mse"
    return _own_term(task.name, scenario, metric)


def _own_term(task: str, scenario: str | None, metric: str) -> Term:
    path = ("tasks", task) if scenario is None else ("tasks", task, "scenarios", scenario)
    name = f"{task}.{metric}" if scenario is None else f"{task}.{scenario}.{metric}"
    return Term(name, path, metric, ((task, scenario or "all"),))


def _of_branch(term: Term, task: Task, scenario: str | None) -> Term | None:
    """A term by the rows of one branch; None where it says nothing of it."""
    of_task = term.path[0] == "mean" or term.path[:2] == ("tasks", task.name)
    of_other_scenario = len(term.path) == 4 and scenario is not None and term.path[3] != scenario
    if not of_task or of_other_scenario or term.metric not in metrics_of(task):
        return None
    if scenario is None and term.path[0] == "tasks":
        return term
    return replace(_own_term(task.name, scenario, term.metric), weight=term.weight)


class _Counts:
    """What the manifest tells of the labels in valid, and of those of regression tasks in train."""

    def __init__(self, manifest: DatasetManifest, tasks: Sequence[Task]) -> None:
        self._counts = manifest.splits["valid"].label_counts
        self._moments = {task.name: manifest.train_moments(task.name) for task in tasks}

    def lacking(self, target: Target) -> list[str]:
        """What keeps a target from having a value, a sentence each; empty when it has one."""
        wrong = [term for term in target.terms if term.heads and not any(self._defined(term.metric, h) for h in term.heads)]
        if not wrong or (target.mean and len(wrong) < len(target.terms)):
            return []
        return [self._told(head) for term in wrong for head in term.heads]

    def _defined(self, metric: str, head: tuple[str, str]) -> bool:
        task, scenario = head
        labelled, positive = self._counts[task][scenario]
        if metric in ("auc", "gauc", "normalized_entropy"):
            return 0 < positive < labelled
        if metric == "calibration":
            return positive > 0
        if metric == "r2":
            return labelled > 0 and self._moments[task].get(scenario, (0.0, 0.0))[1] > 0
        return labelled > 0

    def _told(self, head: tuple[str, str]) -> str:
        task, scenario = head
        labelled, positive = self._counts[task][scenario]
        name = f"task '{task}'" + (f" in scenario {scenario}" if scenario != "all" else "")
        text = f"{name} has {labelled:,} labelled rows" + (f", {positive:,} of them positive" if labelled else "")
        moments = self._moments[task]
        if moments and not moments.get(scenario, (0.0, 0.0))[1]:
            text += ", and labels of one value only in train"
        return text
