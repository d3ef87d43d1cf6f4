"""The task x scenario report: as a dict for `result.json`, and as a text table. Definitions: docs/metrics.md."""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from mmlrec.errors import DataError, UserAdvice
from mmlrec.metrics.exact import (
    CHUNK_ROWS,
    Mean,
    Slices,
    aucs,
    by_scenario,
    conditional_logit,
    entropy,
    gaucs,
    log_ratio,
    losses,
    probabilities,
)
from mmlrec.metrics.gather import PredictionRows
from mmlrec.metrics.ranks import ALONE, Ranks
from mmlrec.schema import Scenario, Task

#: Of a binary task, and of a regression task, in the order of the table.
BINARY_METRICS = ("auc", "gauc", "logloss", "normalized_entropy", "calibration")
REGRESSION_METRICS = ("mse", "rmse", "mae", "r2")
#: Of those of a binary task, what needs no probabilities.
RANKING_METRICS = ("auc", "gauc")
_METRICS = (*BINARY_METRICS, *REGRESSION_METRICS)
_COUNTS = ("rows", "positives")
#: What tables and tags of curves call means, beside tasks and beside scenarios.
_BESIDE_TASKS = {"mean", "mean_over_tasks"}
_BESIDE_SCENARIOS = {"mean", "weighted mean", "scenario_mean", "scenario_weighted_mean"}
#: Why metrics are undefined.
_ONE_CLASS = "Labels of one class only (or no rows, or weights of 0): AUC is"
_NO_MIXED_GROUP = "No group with labels of both classes: GAUC is"
_NO_ROW = "No rows (or weights of 0): errors are"
_NO_VARIANCE = "Labels of one value in train, or none recorded: R² is"


def build_report(
    rows: PredictionRows,
    *,
    tasks: Sequence[Task],
    scenario: Scenario | None,
    chain: Sequence[int] = (),
    conditional: bool = True,
    deviations: Mapping[str, Mapping[str, float]] = {},
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """All metrics of each task, over all rows and for each scenario; the same on every rank, each of which gives its own rows.

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
        ranks: those that have rows; rank 0 warns.

    Returns:
        `{"tasks": {TASK: {METRIC: ..., "rows": ..., "positives": ..., "scenarios": {VALUE: {METRIC: ...}},
        "scenario_mean": {METRIC: ...}, "scenario_weighted_mean": {METRIC: ...}}}, "mean": {METRIC: ...}}`; the three
        scenario keys are there when the dataset has scenarios. `mean` is over tasks.

    Raises:
        DataError: a logit is NaN, so nothing can be ranked.
    """
    undefined: dict[str, list[str]] = {}
    alike = _alike(rows, ranks)
    entries = {
        task.name: _task_entry(rows, column, task, scenario, deviations.get(task.name, {}), alike, undefined, ranks)
        for column, task in enumerate(tasks)
    }
    report: dict[str, Any] = {"tasks": entries, "mean": _mean_of(list(entries.values()), [1] * len(entries))}
    if chain:
        clicked = _clicked(rows, chain, conditional)
        report["cvr"] = _task_entry(clicked, 0, Task(name="cvr"), scenario, {}, alike, undefined, ranks)
        if not conditional:
            _rank_only(report["cvr"])
            report["cvr"]["above_one"] = sum(ranks.gather(int((clicked.logits[clicked.mask] > 0).sum())))
    for why, slices in undefined.items() if ranks.rank == 0 else ():
        warnings.warn(f"{why} undefined and left out of means for {', '.join(slices)}.", UserAdvice, stacklevel=2)
    return report


def shown_name(name: str, taken: Collection[str] = _BESIDE_SCENARIOS) -> str:
    """A scenario as tables and tags of curves have it: in double quotes where it is empty or called like what is beside it.

    Args:
        taken: names of what is beside it; for tasks others.
    """
    quoted = len(name) > 1 and name[0] == name[-1] == '"'
    return json.dumps(name, ensure_ascii=False) if not name or quoted or name in taken else name


def entries_of(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name, as it is shown, and entry of each task, and of cvr where the report has it."""
    of_chain = [("cvr", report["cvr"])] if "cvr" in report else []
    taken = _BESIDE_TASKS | {name for name, _ in of_chain}
    return [*((shown_name(name, taken), entry) for name, entry in report["tasks"].items()), *of_chain]


def report_table(report: dict[str, Any]) -> str:
    """A report as an aligned text table, one line for each task, scenario and mean."""
    lines = list(lines_of(report))
    columns = [name for name in _COUNTS if any(name in entry for _, _, entry in lines)] + _columns([lines])
    cells = [[task, scenario, *(_cell(entry, name) for name in columns)] for task, scenario, entry in lines]
    return _mark(report) + _table(columns, cells)


def seeds_table(reports: Sequence[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over reports of the same tasks and scenarios, as an aligned text table.

    A metric that is undefined in one of the reports is in all. One report has no deviation: its values stand alone.
    """
    runs = [list(lines_of(report)) for report in reports]
    columns = _columns(runs)
    cells = []
    for lines in zip(*runs, strict=True):
        row = [lines[0][0], lines[0][1]]
        for name in columns:
            values = [entry.get(name) for _, _, entry in lines]
            known = [value for value in values if value is not None]
            spread = f" ± {statistics.stdev(known):.4f}" if len(known) > 1 else ""
            undefined = "-" if name in lines[0][2] else ""
            row.append(f"{statistics.mean(known):.4f}{spread}" if len(known) == len(values) else undefined)
        cells.append(row)
    return _mark(reports[0]) + _table(columns, cells)


def _columns(runs: Sequence[Sequence[tuple[str, str, dict[str, Any]]]]) -> list[str]:
    """Metrics that the lines of some reports have, also where none is defined; but GAUC, which needs groups."""
    entries = [entry for lines in runs for _, _, entry in lines]
    return [
        name for name in _METRICS if any(name in entry and (name != "gauc" or entry[name] is not None) for entry in entries)
    ]


def _clicked(rows: PredictionRows, chain: Sequence[int], conditional: bool) -> PredictionRows:
    """The rows that are positive in the chain's first step, with one column: the last given the first, or their log ratio."""
    first, last = chain[0], chain[-1]
    chosen = rows.mask[:, first] & (rows.labels[:, first] > 0)
    own = {name: values if name == "row" else values[chosen] for name, values in vars(rows).items()}
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


class _Alike(NamedTuple):
    """What all rows of all ranks have in common: every weight is 1; they are one group."""

    weight: bool
    group: bool


def _alike(rows: PredictionRows, ranks: Ranks) -> _Alike:
    found = ranks.gather((bool((rows.weight == 1).all()), rows.group[:1].tolist(), bool((rows.group == rows.group[:1]).all())))
    groups = {group for _, first, _ in found for group in first}
    return _Alike(all(ones for ones, _, _ in found), len(groups) <= 1 and all(one for _, _, one in found))


def _task_entry(
    rows: PredictionRows,
    column: int,
    task: Task,
    scenario: Scenario | None,
    deviations: Mapping[str, float],
    alike: _Alike,
    undefined: dict[str, list[str]],
    ranks: Ranks,
) -> dict[str, Any]:
    """One task's part of the report; adds slices of which something is undefined to `undefined`, by why it is."""
    present = rows.mask[:, column]
    found_here = int((np.isnan(rows.logits[:, column]) & present).sum()), int(present.sum())
    num_nan, num_rows = (sum(counts) for counts in zip(*ranks.gather(found_here), strict=True))
    if num_nan:
        raise DataError(
            f"task '{task.name}': {num_nan} of {num_rows} predictions are NaN. The model diverged: lower the learning"
            " rate or set dense.clip_norm, and start from an earlier checkpoint."
        )
    slices = Slices(
        present,
        rows.logits[:, column],
        rows.labels[:, column],
        rows.scenario,
        0 if scenario is None else len(scenario.values),
        None if alike.weight else rows.weight,
        None if alike.group else rows.group,
    )
    names = ["all", *(scenario.values if scenario is not None else [])]
    if task.kind == "regression":
        found = _regression(slices, [deviations.get(name) for name in names], ranks)
    else:
        found = _binary(slices, ranks)
    for name, part in zip(names, found, strict=True):
        if (why := _undefined(part, grouped=not alike.group)) is not None:
            of_scenario = "" if part is found[0] or scenario is None else f" in {scenario.name}={shown_name(name)}"
            undefined.setdefault(why, []).append(task.name + of_scenario)
    totals = [part.pop("weight") for part in found]
    entry = found[0]
    if scenario is None:
        return entry
    parts = dict(zip(scenario.values, found[1:], strict=True))
    entry["scenarios"] = parts
    entry["scenario_mean"] = _mean_of(list(parts.values()), [1] * len(parts))
    entry["scenario_weighted_mean"] = _mean_of(list(parts.values()), totals[1:])
    return entry


def _undefined(part: dict[str, Any], *, grouped: bool) -> str | None:
    """Why metrics of a slice are undefined; None where they are not."""
    if "auc" in part:
        return _ONE_CLASS if part["auc"] is None else _NO_MIXED_GROUP if grouped and part["gauc"] is None else None
    return _NO_ROW if part["mse"] is None else _NO_VARIANCE if part["r2"] is None else None


def _binary(rows: Slices, ranks: Ranks) -> list[dict[str, Any]]:
    """Metrics of all rows, then of each scenario; with `weight`, that of their rows together."""

    def values(score: npt.NDArray[Any], label: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        return [losses(score, label > 0), label > 0, probabilities(score)]

    means = _means(rows, values, ranks)
    counts = _counts(rows, ranks)
    without = [None] * len(counts)
    ranked = zip(aucs(rows, ranks), without if rows.group is None else gaucs(rows, ranks), strict=True)
    found = []
    for (auc, gauc), (loss, rate, probability), (num_rows, positives) in zip(ranked, means, counts.tolist(), strict=True):
        found.append(
            {
                "auc": _json(auc),
                "logloss": _json(loss.value()),
                "normalized_entropy": _json(loss.value() / entropy(rate)),
                "calibration": _json(float(probability.total / rate.total) if rate.total else float("nan")),
                "gauc": None if gauc is None else _json(gauc),
                "rows": num_rows,
                "positives": positives,
                "weight": float(rate.weight),
            }
        )
    return found


def _regression(rows: Slices, deviations: Sequence[float | None], ranks: Ranks) -> list[dict[str, Any]]:
    """As `_binary`, R² by the deviations of the labels in train."""

    def values(score: npt.NDArray[Any], label: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        error = score.astype(np.float64) - label
        return [error**2, np.abs(error)]

    means = _means(rows, values, ranks)
    found: list[dict[str, Any]] = []
    for (square, absolute), (num_rows, _), deviation in zip(means, _counts(rows, ranks).tolist(), deviations, strict=True):
        mse = square.value()
        r2 = 1 - mse / deviation**2 if deviation is not None and deviation > 0 else float("nan")
        found.append({"mse": _json(mse), "rmse": _json(math.sqrt(mse)), "mae": _json(absolute.value()), "r2": _json(r2)})
        found[-1] |= {"rows": num_rows, "weight": float(square.weight)}
    return found


def _means(
    rows: Slices, values: Callable[[npt.NDArray[Any], npt.NDArray[Any]], list[npt.NDArray[Any]]], ranks: Ranks
) -> list[list[Mean]]:
    """The means of some values of each row, of all rows and of each scenario, [1 + S][values].

    Args:
        values: of scores and labels, each [rows].
    """
    found: list[list[Mean]] = [[] for _ in range(max(rows.num_scenarios, 1))]
    for start in range(0, max(rows.num_rows, 1), CHUNK_ROWS):
        some = start + np.flatnonzero(rows.present[start : start + CHUNK_ROWS])
        borders = np.array([0, len(some)])
        if rows.num_scenarios:
            some = some[by_scenario(rows.scenario[some], rows.num_scenarios)]
            borders = np.searchsorted(rows.scenario[some], np.arange(rows.num_scenarios + 1))
        every = values(rows.score[some], rows.label[some])
        weight = None if rows.weight is None else rows.weight[some]
        for index, (first, stop) in enumerate(itertools.pairwise(borders)):
            own = None if weight is None else weight[first:stop]
            found[index] = _plus(found[index], [Mean.of(each[first:stop], own) for each in every])
    if rows.num_scenarios:  # sums without rounding: those of all rows are those of all scenarios
        found.insert(0, functools.reduce(_plus, found))
    together: list[list[Mean]] = [[] for _ in found]
    for of_rank in ranks.gather(found):
        together = [_plus(before, means) for before, means in zip(together, of_rank, strict=True)]
    return together


def _plus(before: list[Mean], means: list[Mean]) -> list[Mean]:
    return [mean.plus(other) for mean, other in zip(before, means, strict=True)] if before else means


def _counts(rows: Slices, ranks: Ranks) -> npt.NDArray[np.int64]:
    """Rows and positive ones, of all and of each scenario, [1 + S, 2]."""
    counts = np.zeros((rows.num_scenarios + 1, 2), np.int64)
    for start in range(0, rows.num_rows, CHUNK_ROWS):
        some = start + np.flatnonzero(rows.present[start : start + CHUNK_ROWS])
        for column, chosen in enumerate((some, some[rows.label[some] > 0])):
            counts[0, column] += len(chosen)
            if rows.num_scenarios:
                counts[1:, column] += np.bincount(rows.scenario[chosen], minlength=rows.num_scenarios)
    return np.sum(ranks.gather(counts), axis=0)


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
    """Task, scenario and entry of each line of the report as a table; "all", "mean" and "weighted mean" are scenarios, too.

    A task or scenario that is called like such a line is in double quotes, so that no two lines have the same names.
    """
    for task, entry in entries_of(report):
        yield task, "all", entry
        for value, part in entry.get("scenarios", {}).items():
            yield task, shown_name(value), part
        if "scenarios" in entry:
            yield task, "mean", entry["scenario_mean"]
            yield task, "weighted mean", entry["scenario_weighted_mean"]
    yield "mean", "all", report["mean"]


def _cell(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if value is None:
        return "-" if name in entry else ""
    return str(value) if name in _COUNTS else f"{value:.4f}"


def _mark(report: dict[str, Any]) -> str:
    """A line above the table of a report that means something else than it seems to."""
    return "Trained on labels that are no chain (model.allow_non_chain).\n" if report.get("allow_non_chain") else ""


def _table(columns: list[str], cells: list[list[str]]) -> str:
    align = ["left", "left", *["right"] * len(columns)]
    return tabulate(cells, headers=["task", "scenario", *columns], colalign=align, disable_numparse=True)
