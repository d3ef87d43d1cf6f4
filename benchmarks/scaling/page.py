"""The results of a folder as a page in Markdown, and its curves as PNG beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from benchmarks.scaling.points import AXES, FEATURES, NUMBERS, Point
from benchmarks.scaling.results import GIB, MEASURED, Row, Rows, Study, all_rows
from mmlrec.errors import ConfigError

if TYPE_CHECKING:  # imported where it is used: tables need no plots
    from matplotlib.axes import Axes

PAGE = "README.md"
_MADE_BY = "Made by `python -m benchmarks.scaling`"
_MIB = 2**20


class Results:
    """Rows, and the slices of them that are tables and curves."""

    def __init__(self, study: Study, rows: Rows) -> None:
        self.study, self.rows = study, rows
        self.base = Point(**{axis: int(value) for axis, value in (word.split("=") for word in study.base.split())})
        self.ranks = sorted({point.ranks for point, row in rows.items() if row.kind == MEASURED})

    def along(self, axis: str, ranks: int) -> list[tuple[int, Row]]:
        """(value, row) of the points of some ranks that differ from the base in one axis only."""
        base = replace(self.base, ranks=ranks)
        found = [(getattr(point, axis), row) for point, row in self.rows.items() if _same_but(point, base, axis)]
        return sorted(found, key=lambda pair: pair[0])

    def over_ranks(self, *, weak: bool) -> list[tuple[int, Row]]:
        """(ranks, row) of the base: with its batch, or with its batch on each rank."""
        wanted = [
            replace(self.base, ranks=ranks, batch=self.base.batch * (ranks if weak else 1))
            for ranks in sorted({point.ranks for point in self.rows})
        ]
        return [(point.ranks, self.rows[point]) for point in wanted if point in self.rows]


def _same_but(point: Point, base: Point, axis: str) -> bool:
    return replace(point, **{axis: getattr(base, axis)}) == base


def explained(rows: Sequence[tuple[int, Row]]) -> dict[int, float]:
    """Milliseconds of lookup and update by the kernels that memory explains, by ids.

    Those on the smallest tables, which lie in caches, and what the bare gather and scatter takes more than there.
    """
    timed = [(ids, row.kernel_ms, row.bare_ms) for ids, row in rows]
    known = [(ids, ours, bare) for ids, ours, bare in timed if ours is not None and bare is not None]
    return {ids: known[0][1] + bare - known[0][2] for ids, _, bare in known}


def check_page(folder: Path) -> None:
    """Refuse a folder with a page that this command has not written.

    Raises:
        ConfigError: there is one.
    """
    page = folder / PAGE
    if page.is_file() and _MADE_BY not in page.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{page} is there, and of something else: it would be replaced. Give another --out.")


def write_page(folder: Path) -> Path:
    """Write the page and its curves into the folder of the results.

    Returns:
        The page.

    Raises:
        ConfigError: there are no results, or they do not belong together.
    """
    check_page(folder)
    results = Results(*all_rows(folder))
    sections = [_head(results), _ranks(results), _ids(results), _axes(results), _parts(results), _wire(results), _all(results)]
    _draw(folder / "ranks.png", results, _draw_ranks, 2)
    _draw(folder / "ids.png", results, _draw_ids, 3)
    _draw(folder / "memory.png", results, _draw_memory, max(1, min(len(results.ranks), 3)))
    _draw(folder / "axes.png", results, _draw_axes, 3)
    page = folder / PAGE
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def _head(results: Results) -> str:
    study, base = results.study, results.base
    releases = sorted({row.torch for row in results.rows.values() if row.torch})
    return f"""# Scaling on {study.machine}

{_MADE_BY}; how to repeat it: docs/scaling.md. Raw results: the CSV files beside this page.

* device {study.device}, {study.threads} CPU thread(s) a rank, torch {", ".join(releases) or "-"}
* configuration `{study.config}`: {FEATURES} features with one id a row, a table of equal size each, and {NUMBERS} numbers
* base point: {base.ids:,} ids in all tables, batch {base.batch:,}, {base.scenarios} scenarios, {base.tasks} tasks
* ids drawn {"uniformly" if not study.zipf else f"by Zipf's law with exponent {study.zipf:g}"}; batches generated, resident
* planned: by the functions of `apps.plan`, {study.ranks_per_host} rank(s) on a host like this one; predictions to compare by,
  no measurements"""


def _ranks(results: Results) -> str:
    lines = ["## Over ranks", "![samples a second over ranks](ranks.png)"]
    for weak in (False, True):
        rows = results.over_ranks(weak=weak)
        measured = [(ranks, row) for ranks, row in rows if row.samples_per_second]
        first = measured[0] if measured else None
        table = []
        for ranks, row in rows:
            gain = row.samples_per_second / first[1].samples_per_second if row.samples_per_second and first else None  # type: ignore[operator]
            share = None if gain is None or first is None else gain * first[0] / ranks
            table.append(
                [
                    row.kind,
                    ranks,
                    _count(row.samples_per_second),
                    _ms(row.step_ms),
                    _ms(row.planned_step_ms),
                    _times(gain),
                    _percent(share),
                ]
            )
        title = "Weak scaling: a batch of {:,} on each rank" if weak else "Strong scaling: a batch of {:,} over all ranks"
        headers = ["", "ranks", "samples/s", "step, ms", "step by the plan, ms", "speed-up", "efficiency"]
        lines += [title.format(results.base.batch), _table(headers, table)]
    return "\n\n".join(lines)


def _ids(results: Results) -> str:
    lines = ["## Over ids", "![time of a step over ids](ids.png)", "![memory of a rank over ids](memory.png)"]
    rows = results.along("ids", 1)
    memory = explained(rows)
    table = []
    for ids, row in rows:
        ours, bare, told = row.kernel_ms, row.bare_ms, memory.get(ids)
        if ours is None or bare is None or told is None or row.bare_bytes is None:
            continue
        rate = row.bare_bytes / bare / 1e6
        table.append(
            [
                f"{ids:.0e}",
                _ms(row.step_ms),
                _ms(row.lookup_update_ms),
                _ms(ours),
                _ms(bare),
                f"{rate:.1f}",
                _times(ours / bare),
                _ms(told),
                _times(ours / told),
            ]
        )
    lines += [
        "One rank: lookup and update of the tables alone, as a step does it and by the *kernels* without what torchrec does"
        " around them, in turn with a *bare* gather and scatter of rows and state by torch's `index_select` and `index_copy_`,"
        " which neither sorts ids nor adds gradients of equal ones. *Of bare*, *of explained*: the time of the kernels over"
        " these. *Explained*: the kernels' time on the smallest tables, which is what they compute, and what the bare accesses"
        " take more than there.",
        _table(
            [
                "ids",
                "step, ms",
                "lookup + update, ms",
                "kernels, ms",
                "bare, ms",
                "bare, GB/s",
                "of bare",
                "explained, ms",
                "of explained",
            ],
            table,
        ),
    ]
    return "\n\n".join(lines)


def _axes(results: Results) -> str:
    lines = ["## Over batch, scenarios and tasks", "![samples a second over batch, scenarios and tasks](axes.png)"]
    for axis in ("batch", "scenarios", "tasks"):
        table = [
            [row.kind, ranks, f"{value:,}", _count(row.samples_per_second), _ms(row.step_ms), _ms(row.planned_step_ms)]
            for ranks in results.ranks
            for value, row in results.along(axis, ranks)
        ]
        lines.append(_table(["", "ranks", axis, "samples/s", "step, ms", "step by the plan, ms"], table))
    return "\n\n".join(lines)


def _measured(results: Results) -> list[tuple[Point, Row]]:
    found = [(point, row) for point, row in results.rows.items() if row.kind == MEASURED]
    return sorted(found, key=lambda pair: [getattr(pair[0], name) for name in ("ranks", *AXES)])


def _parts(results: Results) -> str:
    rows = [(point, row.parts_ms) for point, row in _measured(results) if row.parts_ms]
    names = list(rows[0][1]) if rows else []
    table = [[*_of(point), *(f"{parts[name]:.1f}" for name in names)] for point, parts in rows]
    text = (
        "Milliseconds of a rank in each part of a step, mean over ranks and steps; a wait in a collective is a part by itself."
    )
    return "\n\n".join(["## Where a step goes", text, _table([*_POINT, *names], table)])


def _wire(results: Results) -> str:
    table = []
    for point, row in _measured(results):
        if point.ranks > 1 and row.sent and row.formula:
            off = [sent / told - 1 for sent, told in zip(row.sent, row.formula, strict=True)]
            worst = max(off, key=abs)
            table.append(
                [*_of(point), row.placed, f"{max(row.sent) / _MIB:.3f}", f"{max(row.formula) / _MIB:.3f}", f"{worst:+.2%}"]
            )
    text = (
        "What a rank sends in a step. Counted: by the kernel, at the sockets of the process. The formula is in"
        " benchmarks/scaling/wire.py. The rank that sends most, and the largest difference of any."
    )
    headers = [*_POINT, "tables", "MiB, counted", "MiB, formula", "difference"]
    return "\n\n".join(["## On the wire", text, _table(headers, table) if table else "Not counted here."])


def _all(results: Results) -> str:
    table = []
    for point, row in sorted(results.rows.items(), key=lambda pair: [getattr(pair[0], name) for name in ("ranks", *AXES)]):
        fits = f"no, {row.missing / GIB:.1f} GiB too many" if row.missing else "yes"
        table.append(
            [
                *(row.kind, *_of(point), _count(row.samples_per_second), _ms(row.step_ms)),
                *(_each(row.resident), _each(row.grown), f"{row.planned / GIB:.2f}", fits, _ms(row.planned_step_ms)),
                *(row.placed, row.note),
            ]
        )
    text = (
        "Memory in GiB. Resident: of each rank, all of its process. Grown: what of it came with the model and its steps, to"
        " compare with the plan's fullest rank, which counts tables, state, network, activations and buffers."
    )
    headers = [
        "",
        *_POINT,
        "samples/s",
        "step, ms",
        "resident",
        "grown",
        "plan",
        "fits",
        "step by the plan, ms",
        "tables",
        "note",
    ]
    return "\n\n".join(["## All points", text, _table(headers, table)])


_POINT = ["ranks", "ids", "batch", "scenarios", "tasks"]


def _of(point: Point) -> list[str]:
    return [str(point.ranks), f"{point.ids:.0e}", f"{point.batch:,}", str(point.scenarios), str(point.tasks)]


def _table(headers: list[str], rows: list[list[Any]]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _each(values: list[float] | None) -> str:
    return "" if values is None else " ".join(f"{value / GIB:.2f}" for value in values)


def _draw(path: Path, results: Results, draw: Callable[[list[Axes], Results], None], plots: int) -> None:
    """Draw a figure of some plots beside each other."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(4 * plots, 4), layout="constrained")
        axes = list(figure.subplots(1, plots, squeeze=False)[0])
        draw(axes, results)
        for axis in axes:
            if axis.lines:
                axis.legend(fontsize=8)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _curve(axis: Axes, rows: Sequence[tuple[int, Row]], of: Callable[[Row], float | None], label: str, style: str) -> None:
    found = [(value, of(row)) for value, row in rows]
    known = [(value, y) for value, y in found if y]
    if known:
        axis.plot(*zip(*known, strict=True), style, label=label, markersize=4)


def _speed(row: Row) -> float | None:
    return row.samples_per_second


def _set(axis: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")


def _draw_ranks(axes: list[Axes], results: Results) -> None:
    base = results.base.batch
    for axis, weak in zip(axes, (False, True), strict=True):
        rows = results.over_ranks(weak=weak)
        _curve(axis, rows, _speed, "measured", "o-")
        speeds = [(n, 1000 * base * (n if weak else 1) / row.planned_step_ms) for n, row in rows if row.planned_step_ms]
        if speeds:
            axis.plot(*zip(*speeds, strict=True), "s--", label="planned", markersize=4, markerfacecolor="none")
        _set(axis, f"{'weak' if weak else 'strong'} scaling", "ranks", "samples/s")


def _draw_ids(axes: list[Axes], results: Results) -> None:
    steps, alone, parts = axes
    for ranks in results.ranks:
        rows = results.along("ids", ranks)
        _curve(steps, rows, lambda row: row.step_ms, f"{ranks} rank(s), measured", "o-")
        _curve(steps, rows, lambda row: row.planned_step_ms, f"{ranks} rank(s), planned", "s--")
    _set(steps, "a step", "ids", "ms")
    rows = results.along("ids", 1)
    _curve(alone, rows, lambda row: row.lookup_update_ms, "lookup + update", "o-")
    _curve(alone, rows, lambda row: row.kernel_ms, "by the kernels alone", "v-")
    _curve(alone, rows, lambda row: row.bare_ms, "bare gather + scatter", "s--")
    told = explained(rows)
    if told:
        alone.plot(list(told), list(told.values()), "^:", label="explained", markersize=4)
    _set(alone, "tables alone, 1 rank", "ids", "ms")
    names = next((list(row.parts_ms) for _, row in rows if row.parts_ms), [])
    for name in names:
        _curve(parts, rows, lambda row, name=name: (row.parts_ms or {}).get(name), name, "o-")  # type: ignore[misc]
    _set(parts, "parts of a step, 1 rank", "ids", "ms")


def _draw_memory(axes: list[Axes], results: Results) -> None:
    for axis, ranks in zip(axes, results.ranks, strict=False):
        rows = results.along("ids", ranks)
        _curve(axis, rows, lambda row: max(row.resident) / GIB if row.resident else None, "resident, fullest rank", "o-")
        _curve(axis, rows, lambda row: max(row.grown) / GIB if row.grown else None, "grown by model and steps", "^-")
        _curve(axis, rows, lambda row: row.planned / GIB, "planned", "s--")
        _set(axis, f"memory of a rank, {ranks} rank(s)", "ids", "GiB")


def _draw_axes(axes: list[Axes], results: Results) -> None:
    for axis, name in zip(axes, ("batch", "scenarios", "tasks"), strict=True):
        for ranks in results.ranks:
            rows = results.along(name, ranks)
            _curve(axis, rows, _speed, f"{ranks} rank(s)", "o-")
        _set(axis, f"over {name}", name, "samples/s")
