"""The task x scenario report: as a dict for `result.json`, and as a text table. Definitions: docs/metrics.md."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from mmlrec.errors import DataError, UserAdvice
from mmlrec.metrics.exact import (
    auc,
    calibration,
    conditional_logit,
    gauc,
    log_ratio,
    logloss,
    mae,
    mse,
    normalized_entropy,
    r2,
)
from mmlrec.metrics.gather import PredictionRows
from mmlrec.schema import Scenario, Task

#: Of a binary task, and of a regression task, in the order of the table.
BINARY_METRICS = ("auc", "gauc", "logloss", "normalized_entropy", "calibration")
REGRESSION_METRICS = ("mse", "rmse", "mae", "r2")
#: Of those of a binary task, what needs no probabilities.
RANKING_METRICS = ("auc", "gauc")
_METRICS = (*BINARY_METRICS, *REGRESSION_METRICS)
_COUNTS = ("rows", "positives")


def build_report(
    rows: PredictionRows,
    *,
    tasks: Sequence[Task],
    scenario: Scenario | None,
    chain: Sequence[int] = (),
    conditional: bool = True,
    deviations: Mapping[str, Mapping[str, float]] = {},
) -> dict[str, Any]:
    """All metrics of each task, over all rows and for each scenario.

    Undefined metrics are None; a warning names the slices, which are left out of means. GAUC is None when the dataset
    names no group (all rows in one).

    Args:
        tasks: the T tasks, in the order of the columns.
        chain: columns of a chain of tasks, first step first. Then there is also "cvr", an entry like a task's: the last step
            given the first, on rows that are positive in the first.
        conditional: no step's probability is above that of the one before, so that the last over the first is a probability.
            Otherwise cvr is ranked by that ratio, has no metrics of probabilities, and `above_one` counts the rows in which
            the ratio is none.
        deviations: regression task -> "all" or scenario -> standard deviation of its labels in train; R² is None without.

    Returns:
        `{"tasks": {TASK: {METRIC: ..., "rows": ..., "positives": ..., "scenarios": {VALUE: {METRIC: ...}},
        "scenario_mean": {METRIC: ...}, "scenario_weighted_mean": {METRIC: ...}}}, "mean": {METRIC: ...}}`; the three
        scenario keys are there when the dataset has scenarios. `mean` is over tasks.

    Raises:
        DataError: a logit is NaN, so nothing can be ranked.
    """
    undefined: list[str] = []
    entries = {
        task.name: _task_entry(rows, column, task, scenario, deviations.get(task.name, {}), undefined)
        for column, task in enumerate(tasks)
    }
    report: dict[str, Any] = {"tasks": entries, "mean": _mean_of(list(entries.values()), [1] * len(entries))}
    if chain:
        clicked = _clicked(rows, chain, conditional)
        report["cvr"] = _task_entry(clicked, 0, Task(name="cvr"), scenario, {}, undefined)
        if not conditional:
            _rank_only(report["cvr"])
            report["cvr"]["above_one"] = int((clicked.logits[clicked.mask] > 0).sum())
    if undefined:
        text = "Labels of one class only (or no rows): AUC is undefined and left out of means for"
        warnings.warn(f"{text} {', '.join(undefined)}.", UserAdvice, stacklevel=2)
    return report


def entries_of(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and entry of each task, and of cvr where the report has it."""
    return [*report["tasks"].items(), *([("cvr", report["cvr"])] if "cvr" in report else [])]


def report_table(report: dict[str, Any]) -> str:
    """A report as an aligned text table, one line for each task, scenario and mean."""
    lines = list(lines_of(report))
    columns = [name for name in (*_COUNTS, *_METRICS) if any(entry.get(name) is not None for _, _, entry in lines)]
    cells = [[task, scenario, *(_cell(entry, name) for name in columns)] for task, scenario, entry in lines]
    mark = "Trained on labels that are no chain (model.allow_non_chain).\n" if report.get("allow_non_chain") else ""
    return mark + _table(columns, cells)


def seeds_table(reports: Sequence[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over reports of the same tasks and scenarios, as an aligned text table.

    A metric that one of the reports lacks is left empty.
    """
    runs = [list(lines_of(report)) for report in reports]
    columns = [name for name in _METRICS if any(entry.get(name) is not None for _, _, entry in runs[0])]
    cells = []
    for lines in zip(*runs, strict=True):
        row = [lines[0][0], lines[0][1]]
        for name in columns:
            values = [entry.get(name) for _, _, entry in lines]
            known = [value for value in values if value is not None]
            spread = statistics.stdev(known) if len(known) > 1 else 0.0
            row.append(f"{statistics.mean(known):.4f} ± {spread:.4f}" if len(known) == len(values) else "")
        cells.append(row)
    return _table(columns, cells)


def _clicked(rows: PredictionRows, chain: Sequence[int], conditional: bool) -> PredictionRows:
    """The rows that are positive in the chain's first step, with one column: the last given the first, or their log ratio."""
    first, last = chain[0], chain[-1]
    chosen = rows.mask[:, first] & (rows.labels[:, first] > 0)
    own = {field.name: getattr(rows, field.name)[chosen] for field in fields(rows)}
    score = conditional_logit if conditional else log_ratio
    logits = score(own["logits"][:, first], own["logits"][:, last])
    return PredictionRows(
        **own | {"logits": logits[:, None], "labels": own["labels"][:, [last]], "mask": own["mask"][:, [last]]}
    )


def _rank_only(entry: dict[str, Any]) -> None:
    """Blank what needs probabilities, in an entry and its parts: its scores only rank."""
    parts = [entry, *entry.get("scenarios", {}).values(), entry.get("scenario_mean"), entry.get("scenario_weighted_mean")]
    for part in parts:
        for name in set(BINARY_METRICS) - set(RANKING_METRICS):
            if part and name in part:
                part[name] = None


def _task_entry(
    rows: PredictionRows,
    column: int,
    task: Task,
    scenario: Scenario | None,
    deviations: Mapping[str, float],
    undefined: list[str],
) -> dict[str, Any]:
    """One task's part of the report; adds slices without an AUC to `undefined`."""
    present = rows.mask[:, column]
    logit, label = rows.logits[present, column], rows.labels[present, column]
    num_nan = int(np.isnan(logit).sum())
    if num_nan:
        raise DataError(
            f"task '{task.name}': {num_nan} of {len(logit)} predictions are NaN. The model diverged: lower the learning"
            " rate or set dense.clip_norm, and start from an earlier checkpoint."
        )
    weight = None if (rows.weight == 1).all() else rows.weight[present]
    group = None if (rows.group == rows.group[:1]).all() else rows.group[present]
    entry = _slice(task, logit, label, weight, group, deviations.get("all"))
    if task.kind == "binary" and entry["auc"] is None:
        undefined.append(task.name)
    if scenario is None:
        return entry
    ids = rows.scenario[present]
    parts, totals = {}, []
    for index, value in enumerate(scenario.values):
        own = ids == index
        own_weight = _take(weight, own)
        parts[value] = _slice(task, logit[own], label[own], own_weight, _take(group, own), deviations.get(value))
        totals.append(parts[value]["rows"] if own_weight is None else float(own_weight.sum(dtype=np.float64)))
        if task.kind == "binary" and parts[value]["auc"] is None:
            undefined.append(f"{task.name} in {scenario.name}={value}")
    entry["scenarios"] = parts
    entry["scenario_mean"] = _mean_of(list(parts.values()), [1] * len(parts))
    entry["scenario_weighted_mean"] = _mean_of(list(parts.values()), totals)
    return entry


def _slice(
    task: Task,
    logit: npt.NDArray[np.float32],
    label: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32] | None,
    group: npt.NDArray[np.int64] | None,
    deviation: float | None,
) -> dict[str, Any]:
    if task.kind == "regression":
        error = mse(logit, label, weight)
        return {
            "mse": _json(error),
            "rmse": _json(math.sqrt(error)),
            "mae": _json(mae(logit, label, weight)),
            "r2": None if deviation is None else _json(r2(logit, label, deviation, weight)),
            "rows": len(label),
        }
    return {
        "auc": _json(auc(logit, label, weight)),
        "logloss": _json(logloss(logit, label, weight)),
        "normalized_entropy": _json(normalized_entropy(logit, label, weight)),
        "calibration": _json(calibration(logit, label, weight)),
        "gauc": None if group is None else _json(gauc(logit, label, group, weight)),
        "rows": len(label),
        "positives": int((label > 0).sum()),
    }


def _take(values: npt.NDArray[Any] | None, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[Any] | None:
    return None if values is None else values[chosen]


def _mean_of(entries: list[dict[str, Any]], weights: Sequence[float]) -> dict[str, float | None]:
    """Weighted mean of each metric over the entries that have it."""
    means: dict[str, float | None] = {}
    for name in _METRICS:
        if not any(name in entry for entry in entries):
            continue
        known = [(entry[name], weight) for entry, weight in zip(entries, weights, strict=True) if entry.get(name) is not None]
        total = sum(weight for _, weight in known)
        means[name] = sum(value * weight for value, weight in known) / total if total else None
    return means


def _json(value: float) -> float | None:
    # JSON has neither NaN nor infinity (the logloss of an infinite logit).
    return value if math.isfinite(value) else None


def lines_of(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Task, scenario and entry of each line of the report as a table; "all", "mean" and "weighted mean" are scenarios, too."""
    for task, entry in entries_of(report):
        yield task, "all", entry
        for value, part in entry.get("scenarios", {}).items():
            yield task, value, part
        if "scenarios" in entry:
            yield task, "mean", entry["scenario_mean"]
            yield task, "weighted mean", entry["scenario_weighted_mean"]
    yield "mean", "all", report["mean"]


def _cell(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if value is None:
        return "-" if name in entry else ""
    return str(value) if name in _COUNTS else f"{value:.4f}"


def _table(columns: list[str], cells: list[list[str]]) -> str:
    align = ["left", "left", *["right"] * len(columns)]
    return tabulate(cells, headers=["task", "scenario", *columns], colalign=align, disable_numparse=True)
