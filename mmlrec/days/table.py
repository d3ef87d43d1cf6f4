"""What became of the days: a table for the terminal, and curves."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from mmlrec.metrics.report import entries_of
from mmlrec.run_folder.folder import write_atomically
from mmlrec.storage.places import Place

#: Of a day in the table, for each task: those that its kind of task has.
_SHOWN = ("auc", "logloss", "rmse", "r2")
#: In the curves, one of them for each task.
_DRAWN = ("auc", "r2")
_WIDTH, _HEIGHT = 9.0, 3.0  # inches of a plot


def days_table(lines: Sequence[dict[str, Any]]) -> str:
    """A line for each day that was begun: its rows, its new ids, and how the model of the day before did on it.

    Args:
        lines: of a `Record`.
    """
    reports = [line["next_day"] for line in lines if line["next_day"] is not None]
    metrics = _metrics(reports[0], _SHOWN) if reports else []
    forgets = any(line["forgotten"] is not None for line in lines)
    headers = ["day", "rows", "new ids", *(["forgotten"] if forgets else []), *(f"{task} {name}" for task, name in metrics)]
    cells = []
    for line in lines:
        counts = [sum(line["rows"].values()), sum(line["new_ids"].values())]
        counts += [sum((line["forgotten"] or {}).values())] if forgets else []
        values = ["" if line["next_day"] is None else _shown(dict(entries_of(line["next_day"]))[t][m]) for t, m in metrics]
        cells.append([line["day"], *map(str, counts), *values])
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(cells, headers=headers, colalign=align, disable_numparse=True)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_days(lines: Sequence[dict[str, Any]], path: Place) -> None:
    """Write curves as PNG: the AUC, or R², of each task by day, and the new ids of each day below.

    Args:
        lines: of a `Record`, at least two of them measured.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    measured = [line for line in lines if line["next_day"] is not None]
    metrics = _metrics(measured[0]["next_day"], _DRAWN)
    drawn = [name for name in _DRAWN if name in {metric for _, metric in metrics}]
    figure = Figure(figsize=(_WIDTH, _HEIGHT * (len(drawn) + 1)), layout="constrained")
    *plots, below = figure.subplots(len(drawn) + 1, 1, squeeze=False, sharex=True).ravel()
    names = [line["day"] for line in measured]
    for axes, metric in zip(plots, drawn, strict=True):
        for task in [task for task, of_task in metrics if of_task == metric]:
            values = [dict(entries_of(line["next_day"]))[task][metric] for line in measured]
            axes.plot(names, [float("nan") if value is None else value for value in values], marker=".", label=_plain(task))
        axes.set_ylabel({"auc": "AUC", "r2": "R²"}[metric] + " on the next day")
        axes.grid(alpha=0.3)
        axes.legend()
    below.bar(names, [sum(line["new_ids"].values()) for line in measured])
    below.set_ylabel("new ids")
    below.tick_params(axis="x", rotation=45)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())


def _metrics(report: dict[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """Task and metric of each of these that a report has."""
    return [(task, name) for task, entry in entries_of(report) for name in names if name in entry]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _plain(name: str) -> str:
    """A name as matplotlib shows it: no formula."""
    return name.replace("$", r"\$")
