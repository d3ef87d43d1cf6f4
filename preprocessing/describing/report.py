"""`python -m preprocessing describe DIR`: a dataset folder as tables at the terminal, and as a page with plots."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from mmlrec.paths import local_path
from mmlrec.schema import SPLITS
from preprocessing.describing.description import Description, describe
from preprocessing.describing.page import require_matplotlib, write_page

_CELL = 40  # longest text of a cell
_LISTED = 4  # values shown of a list
_NUMBER = re.compile(r"(about )?[-\d][-\d.,e+]*( %)?")


@dataclass(frozen=True)
class Section:
    """One table of the report; `note` stands below it."""

    title: str
    headers: list[str]
    rows: list[list[Any]]
    note: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `describe`."""
    parser.add_argument("folder", type=local_path, metavar="DIR", help="the dataset folder")
    parser.add_argument("--page", type=local_path, metavar="PAGE.html", help="write the tables and plots as one page, too")
    parser.add_argument(
        "--rows", type=_num_examples, default=3, metavar="N", help="train rows to show as examples (default: 3)"
    )


def _num_examples(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 1000 is needed, found '{text}'")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Print the tables, and write the page where one is asked for.

    Raises:
        DataError: the folder is no dataset, incomplete or damaged, or the page cannot be written.
        ConfigError: a page is asked for without matplotlib.
    """
    if options.page is not None:
        require_matplotlib()
    description = describe(options.folder, options.rows)
    found = sections(description)
    manifest = description.manifest
    lines = [f"{manifest.name} in {options.folder}"]
    if manifest.parity:
        lines.append("Encoded as the reference benchmark does: its vocabularies and ranges have seen valid and test.")
    if manifest.terms:
        lines.append(f"Terms: {manifest.terms}")
    print("\n".join(lines))
    for section in found:
        table = tabulate(section.rows, section.headers, tablefmt="simple", disable_numparse=True, colalign=_align(section))
        print(f"\n{section.title}\n\n{table}" + (f"\n\n{section.note}" if section.note else ""))
    if options.page is not None:
        tables = {
            section.title: (
                tabulate(section.rows, section.headers, tablefmt="html", disable_numparse=True, colalign=_align(section)),
                section.note,
            )
            for section in found
        }
        write_page(options.page, description, lines, tables)
        print(f"\nThe page is {options.page}.")


def _align(section: Section) -> list[str]:
    """Columns of numbers to the right."""
    columns = zip(*section.rows, strict=True)
    return ["right" if all(_NUMBER.fullmatch(str(cell)) for cell in column) else "left" for column in columns]


def sections(description: Description) -> list[Section]:
    """The tables of the report."""
    found = [_rows(description)]
    if description.groups is not None:
        found.append(_groups(description))
    if description.ids:
        found.append(_features(description))
    if collisions := description.manifest.statistics.get("hash_collisions"):
        rows = [
            [table, *(f"{counts[name]:,}" for name in ("values", "collisions")), _percent(counts["rate"])]
            for table, counts in collisions.items()
        ]
        note = "collision: a value of train all of whose ids are those of another one, too."
        found.append(Section("Hashed ids", ["table", "values", "collisions", "share"], rows, note))
    if description.numbers:
        found.append(_numbers(description))
    found.append(_left_out(description))
    if description.examples:
        found.append(_examples(description))
    return found


def _rows(description: Description) -> Section:
    manifest = description.manifest
    total = sum(split.num_rows for split in manifest.splits.values())
    rows = []
    unlabelled = {
        task.name
        for task in manifest.tasks
        if sum(split.label_counts[task.name]["all"][0] for split in manifest.splits.values()) < total
    }
    for name, split in manifest.splits.items():
        for scenario, num_rows in {"all": split.num_rows, **split.scenario_rows}.items():
            row = [name, scenario, f"{num_rows:,}", _percent(num_rows / total)]
            for task in manifest.tasks:
                labelled, positive = split.label_counts[task.name][scenario]
                row.append(f"{positive / labelled:.6f}" if labelled else "-")
                row += [f"{labelled:,}"] if task.name in unlabelled else []
            rows.append(row)
    headers = ["split", manifest.scenario.name if manifest.scenario else "scenario", "rows", "share"]
    for task in manifest.tasks:
        headers += [f"rate of {task.name}"] + ([f"labelled {task.name}"] if task.name in unlabelled else [])
    return Section("Rows and label rates", headers, rows)


def _groups(description: Description) -> Section:
    groups, manifest = description.groups or {}, description.manifest
    rows = []
    for split, values in groups.items():
        num_groups = values.count()
        per_group = f"{manifest.splits[split].num_rows / num_groups:.2f}" if num_groups else "-"
        rows.append([split, f"{num_groups:,}", per_group, _percent(values.share_in(groups["train"]))])
    note = f"A group is a value of key '{manifest.group_key}'."
    return Section("Groups", ["split", "groups", "rows of a group", "share that train has"], rows, note)


def _features(description: Description) -> Section:
    manifest, rows = description.manifest, []
    for feature in manifest.sparse_features:
        ids = description.ids[feature.name]
        rows.append(
            [
                *(feature.name, feature.kind, feature.table, f"{manifest.table(str(feature.table)).num_rows:,}"),
                *(("about " if ids.every > 1 else "") + f"{ids.num_seen:,}", _percent(ids.missing)),
                *(_percent(ids.coverage(split)) for split in SPLITS[1:]),
                f"{ids.mean_length:.2f}",
            ]
        )
    headers = ["feature", "kind", "table", "table rows", "ids in train", "missing", "known in valid", "known in test"]
    note = (
        "missing: train rows with id 0 (missing or rare) or an empty list. known: share of id occurrences that train has, id 0"
        " not among them; - where the ids are no vocabulary of train and too many to count each."
    )
    return Section("Sparse and multi-valued features", [*headers, "mean length"], rows, note)


def _numbers(description: Description) -> Section:
    ranges = description.manifest.preprocessing.get("dense_ranges") or {}
    rows = []
    for name, counts in description.numbers.items():
        bounds = ranges.get(name)
        raw = f"{bounds[0]:g} .. {bounds[1]:g}" if bounds else "-"
        means = [f"{counts.total[split] / max(counts.rows[split], 1):.4g}" for split in SPLITS]
        zeros = _percent(counts.zeros["train"] / max(counts.rows["train"], 1))
        rows.append([name, raw, f"{counts.low:g} .. {counts.high:g}", *means, zeros])
    headers = [
        "feature",
        "train range before scaling",
        "least, greatest",
        *(f"mean, {split}" for split in SPLITS),
        "zero in train",
    ]
    fills = description.manifest.preprocessing.get("dense_fills", {})
    filled = ", ".join(f"{name} {value:g}" for name, value in fills.items())
    note = f"Values as they are written; a missing one is 0{f', or before scaling: {filled}' if filled else ''}."
    note += " Before scaling: after a logarithm, where there is one."
    return Section("Dense features", headers, rows, note)


def _left_out(description: Description) -> Section:
    statistics = description.manifest.statistics
    rows = [[file, "bad", f"{count:,}"] for file, count in statistics.get("bad_rows", {}).items()]
    for file, reasons in statistics.get("passed_over", {}).items():
        rows += [[file, reason, f"{count:,}"] for reason, count in reasons.items()]
    return Section("Raw rows left out", ["file", "reason", "rows"], rows or [["none", "", "0"]])


def _examples(description: Description) -> Section:
    examples = description.examples
    rows = [[name, *(_shown(row[name]) for row in examples)] for name in examples[0]]
    headers = ["column", *(f"train row {number}" for number in range(1, len(examples) + 1))]
    note = "Ids are decoded through the vocabularies, numbers through the range of train; - is missing, rare or unseen."
    return Section("Examples", headers, rows, note)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _shown(value: Any) -> str:
    """A cell's text, on one line and of bounded length."""
    if isinstance(value, list):
        more = [f"... ({len(value)})"] if len(value) > _LISTED else []
        return "[" + ", ".join([*map(_shown, value[:_LISTED]), *more]) + "]"
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _CELL else text[: _CELL - 3] + "..."
