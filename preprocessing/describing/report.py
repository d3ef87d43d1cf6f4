"""`python -m preprocessing describe DIR`: a dataset folder as tables at the terminal, and as a page with plots."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from mmlrec.paths import local_path
from mmlrec.schema import DatasetManifest
from mmlrec.storage.places import place
from preprocessing.describing import drift
from preprocessing.describing.description import Description, describe
from preprocessing.describing.notes import block, look_at_this
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
    parser.add_argument("folder", type=place, metavar="DIR", help="the dataset folder")
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
    notes = look_at_this(manifest, options.folder)
    if notes:
        print(f"\n{block(notes)}")
    if options.page is not None:
        tables = {
            section.title: (
                tabulate(section.rows, section.headers, tablefmt="html", disable_numparse=True, colalign=_align(section)),
                section.note,
            )
            for section in found
        }
        write_page(options.page, description, lines, notes, tables)
        print(f"\nThe page is {options.page}.")


def _align(section: Section) -> list[str]:
    """Columns of numbers to the right."""
    columns = zip(*section.rows, strict=True)
    return ["right" if all(_NUMBER.fullmatch(str(cell)) for cell in column) else "left" for column in columns]


def sections(description: Description) -> list[Section]:
    """The tables of the report."""
    found, statistics = [_rows(description), *_drift(description.manifest)], description.manifest.statistics
    found += [_values(description, task, of_splits) for task, of_splits in statistics.get("label_values", {}).items()]
    if weights := statistics.get("weights"):
        rows = [
            [split, *("-" if value is None else f"{value:.6g}" for value in weights[split].values())]
            for split in description.splits
        ]
        found.append(Section("Weights of rows", ["split", *weights[description.base]], rows))
    if duplicates := statistics.get("duplicates"):
        found.append(_duplicates(duplicates))
    if description.groups is not None:
        found.append(_groups(description))
    if description.ids:
        found.append(_features(description))
    if collisions := statistics.get("hash_collisions"):
        rows = [
            [table, *(f"{counts[name]:,}" for name in ("values", "collisions")), _percent(counts["rate"])]
            for table, counts in collisions.items()
        ]
        note = "collision: a value of train all of whose ids are those of another one, too."
        found.append(Section("Hashed ids", ["table", "values", "collisions", "share"], rows, note))
    if managed := statistics.get("managed_ids"):
        rows = []
        for table, counts in managed.items():
            slots = description.manifest.table(table).num_rows - 1
            about = "about " if "counted_one_in" in counts else ""
            rows.append([table, f"{about}{counts['values']:,}", f"{slots:,}", f"{counts['values'] / slots:.2f}"])
        note = "Values earn and lose the slots of their table while a model is trained: docs/managed_ids.md."
        found.append(Section("Managed ids", ["table", "values in train", "slots", "values a slot"], rows, note))
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
                if task.kind == "binary":
                    row.append(f"{positive / labelled:.6f}" if labelled else "-")
                row += [f"{labelled:,}"] if task.name in unlabelled else []
            rows.append(row)
    headers = ["split", manifest.scenario.name if manifest.scenario else "scenario", "rows", "share"]
    for task in manifest.tasks:
        headers += [f"rate of {task.name}"] if task.kind == "binary" else []
        headers += [f"labelled {task.name}"] if task.name in unlabelled else []
    return Section("Rows and label rates", headers, rows)


def _drift(manifest: DatasetManifest) -> list[Section]:
    """Of data that are encoded like others."""
    found = [Section("Against train", drift.HEADERS, [each.cells for each in drift.drifts(manifest)], drift.NOTE)]
    found.append(Section("Shares against train", drift.SHARE_HEADERS, [each.cells for each in drift.shares(manifest)]))
    return [section for section in found if section.rows]


def _values(description: Description, task: str, of_splits: dict[str, Any]) -> Section:
    """The labels of a regression task."""
    manifest = description.manifest
    rows = [
        [split, scenario, *("-" if value is None else f"{value:.6g}" for value in values.values())]
        for split in description.splits
        for scenario, values in of_splits[split].items()
    ]
    headers = ["split", manifest.scenario.name if manifest.scenario else "scenario", *of_splits["all"]["all"]]
    return Section(f"Values of {task}", headers, rows)


def _duplicates(counts: dict[str, Any]) -> Section:
    headers = ["policy", "copies", "most alike", "valid rows that train has", "test rows that train has"]
    names = ["rows", "most", "valid_in_train", "test_in_train"]
    note = "copies: rows that are equal to an earlier one in all features, labels and keys."
    if counts["policy"] == "drop":
        headers, names, note = [*headers, "left out"], [*names, "dropped"], f"{note} They were left out."
    return Section("Equal rows", headers, [[counts["policy"], *(f"{counts[name]:,}" for name in names)]], note)


def _groups(description: Description) -> Section:
    groups, manifest = description.groups or {}, description.manifest
    rows = []
    for split, values in groups.items():
        num_groups = values.count()
        per_group = f"{manifest.splits[split].num_rows / num_groups:.2f}" if num_groups else "-"
        rows.append([split, f"{num_groups:,}", per_group, _percent(values.share_in(groups[description.base]))])
    key = str(manifest.group_key)
    text = next((name for name in manifest.keys if f"{name}_hash" == key), None)
    note = f"A group is a value of key '{text or key}'" + (f", by its hash in key '{key}'." if text else ".")
    return Section("Groups", ["split", "groups", "rows of a group", f"share that {description.base} has"], rows, note)


def _features(description: Description) -> Section:
    manifest, rows = description.manifest, []
    tables, splits, base = manifest.by_name, description.splits, description.base
    unseen = [split for split in splits if split != "train"]
    for feature in manifest.sparse_features:
        ids, missing = description.ids[feature.name], manifest.statistics.get("missing", {}).get(feature.name)
        shares = _missing(description, feature.name)
        rare = ids.missing - missing[base] / max(manifest.splits[base].num_rows, 1) if missing else None
        with_id = {split: 0 if feature.kind == "multi" else missing[split] if missing else None for split in splits}
        rows.append(
            [
                *(feature.name, feature.kind, feature.table, f"{tables[str(feature.table)].num_rows:,}"),
                *(("about " if ids.every > 1 else "") + f"{ids.num_seen:,}", *shares, _percent(rare)),
                *(_percent(ids.unseen(split, with_id[split])) for split in unseen),
                f"{ids.mean_length:.2f}",
            ]
        )
    headers = ["feature", "kind", "table", "table rows", f"ids in {base}", *(f"missing in {split}" for split in splits)]
    headers += [f"rare in {base}" if base == "train" else f"without an id in {base}"]
    headers += [*(f"unseen in {split}" for split in unseen), "mean length"]
    note = (
        "missing: rows without a value. rare: train rows whose values are all rarer than the minimum count. unseen: share of"
        " the values there are which train does not know; - where the ids are no vocabulary of train and too many to count"
        " each, or where the folder was made before missing values were counted."
    )
    return Section("Sparse and multi-valued features", headers, rows, note)


def _numbers(description: Description) -> Section:
    ranges, splits, base = description.manifest.preprocessing.get("dense_ranges") or {}, description.splits, description.base
    rows = []
    for name, counts in description.numbers.items():
        bounds = ranges.get(name)
        raw = f"{bounds[0]:g} .. {bounds[1]:g}" if bounds else "-"
        means = [f"{counts.total[split] / max(counts.rows[split], 1):.4g}" for split in splits]
        zeros = "-" if name in ranges else _percent(counts.zeros[base] / max(counts.rows[base], 1))
        shares = _missing(description, name)
        rows.append([name, raw, f"{counts.low:g} .. {counts.high:g}", *means, *shares, zeros])
    headers = [
        "feature",
        "train range before scaling",
        "least, greatest",
        *(f"mean, {split}" for split in splits),
        *(f"missing in {split}" for split in splits),
        f"zero in {base}",
    ]
    fills = description.manifest.preprocessing.get("dense_fills", {})
    filled = ", ".join(f"{name} {value:g}" for name, value in fills.items())
    note = (
        "Least, greatest and mean are of what is written. Before scaling: after a logarithm, where there is one. zero: of"
        " numbers that are not scaled, the missing ones that are written as 0 among them; scaled, 0 is the least value."
    ) + (f" A missing value became, before scaling: {filled}." if filled else "")
    return Section("Dense features", headers, rows, note)


def _missing(description: Description, feature: str) -> list[str]:
    """Share of the rows of each split that have no value of a feature; - in folders that do not tell."""
    manifest = description.manifest
    counts = manifest.statistics.get("missing", {}).get(feature)
    return [
        _percent(counts[split] / max(manifest.splits[split].num_rows, 1) if counts else None) for split in description.splits
    ]


def _left_out(description: Description) -> Section:
    statistics = description.manifest.statistics
    rows = [[file, "bad", f"{count:,}"] for file, count in statistics.get("bad_rows", {}).items()]
    for file, reasons in statistics.get("passed_over", {}).items():
        rows += [[file, reason, f"{count:,}"] for reason, count in reasons.items()]
    return Section("Raw rows left out", ["file", "reason", "rows"], rows or [["none", "", "0"]])


def _examples(description: Description) -> Section:
    examples = description.examples
    rows = [[name, *(_shown(row[name]) for row in examples)] for name in examples[0]]
    headers = ["column", *(f"{description.base} row {number}" for number in range(1, len(examples) + 1))]
    note = "Ids are decoded through the vocabularies, numbers through the range of train; - is missing, rare or unseen."
    return Section("Examples", headers, rows, note)


_percent = drift.percent


def _shown(value: Any) -> str:
    """A cell's text, on one line and of bounded length."""
    if isinstance(value, list):
        more = [f"... ({len(value)})"] if len(value) > _LISTED else []
        return "[" + ", ".join([*map(_shown, value[:_LISTED]), *more]) + "]"
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _CELL else text[: _CELL - 3] + "..."
