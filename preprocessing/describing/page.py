"""The page of `describe`: its tables and plots in one HTML file that needs nothing else."""

from __future__ import annotations

import html
import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmlrec.errors import ConfigError, DataError
from mmlrec.terminal import plain
from preprocessing.describing.description import Description
from preprocessing.describing.drift import Drift, drifts

if TYPE_CHECKING:  # imported where it is used: tables need no plots, and matplotlib starts slowly
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_SCENARIOS = 12  # bars and squares beyond that cannot be told apart
_LABELS = "Share of labelled rows that are positive; of a regression task the mean of its labels."
_MAX_DRIFTS = 20
_COLUMNS = 4  # plots beside each other
_STYLE = """
body { font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 0.85em; }
th, td { padding: 0.2em 0.7em; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
thead th { border-bottom: 2px solid #888; }
.wide { overflow-x: auto; }
.note { color: #666; font-size: 0.85em; }
svg { max-width: 100%; height: auto; }
"""


def require_matplotlib() -> None:
    """Raise ConfigError, with the remedy, when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--page draws with matplotlib, which is not installed. Run: pip install 'mmlrec[plots]'")


def write_page(
    path: Path, description: Description, lines: list[str], notes: list[str], tables: dict[str, tuple[str, str]]
) -> None:
    """Write the page, whole or not at all.

    Args:
        lines: what stands at its head. notes: what should be looked at.
        tables: title -> table as HTML, and the note below it.

    Raises:
        DataError: it cannot be written.
    """
    body = [f"<h1>{html.escape(lines[0])}</h1>", *(f"<p>{html.escape(line)}</p>" for line in lines[1:])]
    if notes:
        listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        body.append(f"<h2>Look at this</h2>\n<ul>{listed}</ul>")
    for title, (table, note) in tables.items():
        body.append(f'<h2>{html.escape(title)}</h2>\n<div class="wide">{table}</div>\n<p class="note">{html.escape(note)}</p>')
    for title, figure, note in _figures(description):
        body.append(f'<h2>{html.escape(title)}</h2>\n{_svg(figure)}\n<p class="note">{html.escape(note)}</p>')
    head = f'<meta charset="utf-8"><title>{html.escape(description.manifest.name)}</title><style>{_STYLE}</style>'
    page = f"<!DOCTYPE html>\n<html>\n<head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(plain(page), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: the page cannot be written: {error.strerror}. Choose another --page.") from error


def _svg(figure: Figure) -> str:
    """The figure as an element of the page. Equal data give equal bytes; texts take the reader's font."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmlrec"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in matplotlib's own font
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = content.getvalue()
    return text[text.index("<svg") :]


def _figures(description: Description) -> Iterator[tuple[str, Figure, str]]:
    """Title, plot and note of each figure."""
    import matplotlib

    manifest = description.manifest
    with matplotlib.rc_context({"font.size": 8}):
        scenarios = _largest_scenarios(description)
        fewer = ""
        if manifest.scenario and len(scenarios) < len(manifest.scenario.values):
            fewer = f"The {len(scenarios)} largest of {len(manifest.scenario.values)} scenarios. "
        if found := [each for each in drifts(manifest) if each.worst > 0]:
            note = (
                f"The {min(len(found), _MAX_DRIFTS)} features that differ most from the train rows of the data that these are"
            )
            yield "Against train", _drift(found[:_MAX_DRIFTS]), f"{note} encoded like."
        yield "Label rates", _label_rates(description, scenarios), f"{fewer}{_LABELS}"
        if description.ids:
            note = (
                "Occurrences in train by rank, id 0 left out. A straight line is a Zipf distribution. Of a table too large to"
                " count each id, a random sample of its ids is counted."
            )
            yield "Frequency of ids", _frequencies(description), note
        if description.ids and manifest.scenario:
            figure = _grid(list(description.ids), lambda axes, name: _overlap(axes, description, name, scenarios), 2.6)
            note = f"{fewer}Share of the ids of the row's scenario that occur in the column's scenario as well, in train."
            yield "Overlap of scenarios", figure, note
        lists = [feature.name for feature in manifest.features if feature.kind == "multi"]
        if lists:
            note = "Train rows by the length of the list; the last bar holds longer ones, too."
            yield "Lengths of lists", _grid(lists, lambda axes, name: _lengths(axes, description, name)), note
        if description.numbers:
            figure = _grid(list(description.numbers), lambda axes, name: _histogram(axes, description, name))
            yield "Dense features", figure, "Values as they are written, of up to 100,000 train rows."


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(names: list[str], draw: Callable[[Axes, str], None], height: float = 1.9) -> Figure:
    """One small plot for each name."""
    num_rows = -(-len(names) // _COLUMNS)
    figure = _new_figure(11, height * num_rows)
    plots = figure.subplots(num_rows, _COLUMNS, squeeze=False).ravel()
    for axes, name in zip(plots, names, strict=False):
        draw(axes, name)
        axes.set_title(name)
    for axes in plots[len(names) :]:
        axes.set_axis_off()
    return figure


def _largest_scenarios(description: Description) -> list[int]:
    """Ids of the scenarios to draw, in their own order."""
    scenario, splits = description.manifest.scenario, description.manifest.splits
    if scenario is None:
        return []
    rows = [splits[description.base].scenario_rows[name] for name in scenario.values]
    return sorted(sorted(range(len(rows)), key=lambda s: (-rows[s], s))[:_MAX_SCENARIOS])


def _label_rates(description: Description, scenarios: list[int]) -> Figure:
    """One plot a task: a group of bars for each scenario, a bar for each split."""
    manifest = description.manifest
    names = ["all", *(manifest.scenario.values[s] for s in scenarios)] if manifest.scenario else ["all"]
    figure = _new_figure(11, 2.2 * len(manifest.tasks))
    for axes, task in zip(figure.subplots(len(manifest.tasks), 1, squeeze=False).ravel(), manifest.tasks, strict=True):
        for number, (split_name, split) in enumerate(manifest.splits.items()):
            counts = [split.label_counts[task.name][name] for name in names]
            rates = [positive / labelled if labelled else 0 for labelled, positive in counts]
            if task.kind == "regression":
                values = manifest.statistics.get("label_values", {}).get(task.name, {}).get(split_name, {})
                rates = [values.get(name, {}).get("mean") or 0 for name in names]
            axes.bar(np.arange(len(names)) + 0.27 * (number - 1), rates, 0.25, label=split_name)
        axes.set_xticks(range(len(names)), [_plain(name) for name in names])
        axes.set_title(_plain(task.name))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _drift(found: list[Drift]) -> Figure:
    """Bars of what is unseen, outside of the range, and missing, with a mark where train was."""
    figure = _new_figure(11, 1.2 + 0.3 * len(found))
    axes, places = figure.subplots(), np.arange(len(found))
    shares = {
        "unseen ids": [each.unseen or 0 for each in found],
        "outside the range": [each.outside or 0 for each in found],
        "missing": [each.missing for each in found],
    }
    for number, (name, values) in enumerate(shares.items()):
        axes.barh(places + 0.27 * (number - 1), values, 0.25, label=name)
    known = [
        (place, each.missing_in_train) for place, each in zip(places, found, strict=True) if each.missing_in_train is not None
    ]
    if known:
        at, rates = zip(*known, strict=True)
        axes.plot(rates, np.array(at) + 0.27, "k|", label="missing in train")
    axes.set_yticks(places, [_plain(f"{each.feature}, {each.split}") for each in found])
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    figure.legend(loc="outside right upper")
    return figure


def _frequencies(description: Description) -> Figure:
    """All features in one plot: count by rank, both on log axes."""
    figure = _new_figure(11, 4.5)
    axes = figure.subplots()
    for number, (name, ids) in enumerate(description.ids.items()):
        ranks, counts = ids.by_rank()
        label = f"{name} (1 id in {ids.every})" if ids.every > 1 else name
        color, line = f"C{number % 10}", ["-", "--", ":", "-."][number // 10 % 4]
        axes.loglog(ranks, counts, label=label, color=color, linestyle=line, marker="." if len(ranks) < 10 else None)
    axes.set_xlabel("rank")
    axes.set_ylabel("occurrences")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", ncols=1 + len(description.ids) // 22)
    return figure


def _overlap(axes: Axes, description: Description, name: str, scenarios: list[int]) -> None:
    assert description.manifest.scenario is not None
    ids, names = description.ids[name], description.manifest.scenario.values
    shares = np.array([[ids.overlap(a, b) for b in scenarios] for a in scenarios], np.float64)  # None becomes nan
    edges = np.arange(len(scenarios) + 1) - 0.5
    axes.pcolormesh(edges, edges, shares, vmin=0, vmax=1, cmap="Blues")  # stays shapes in the SVG, unlike an image
    axes.invert_yaxis()
    axes.set_aspect("equal")
    for (a, b), share in np.ndenumerate(shares):
        if np.isfinite(share) and len(scenarios) <= 6:
            axes.text(b, a, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.6 else "black")
    ticks = range(len(scenarios)), [_plain(names[s]) for s in scenarios]
    axes.set_xticks(*ticks, rotation=90)
    axes.set_yticks(*ticks)


def _lengths(axes: Axes, description: Description, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    lengths = description.ids[name].lengths
    end = int(np.flatnonzero(lengths).max(initial=0)) + 1
    axes.bar(np.arange(end), lengths[:end], 0.9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("ids")


def _histogram(axes: Axes, description: Description, name: str) -> None:
    sample = description.numbers[name].sample
    axes.hist(np.concatenate(sample) if sample else [], bins=50)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)


def _plain(name: str) -> str:
    """A name from the data as matplotlib shows it: of bounded length, and no formula."""
    return (name if len(name) <= 20 else name[:17] + "...").replace("$", r"\$")
