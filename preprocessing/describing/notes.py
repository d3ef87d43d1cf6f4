"""What should not pass unmentioned: inputs that no model can use, told at the end of preprocessing and of `describe`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmlrec.schema import SPLITS, DatasetManifest, Feature, Table, Task
from mmlrec.storage.places import Place
from preprocessing.describing.marks import suspicious_ids

_SQUEEZED = 0.99  # of the values at one end of the range
_FEW = 10  # values, of which nothing can be said
_COPIED = 0.01  # of a split's rows


def look_at_this(manifest: DatasetManifest, folder: Place) -> list[str]:
    """One sentence or two for each thing: what it is about, and what to do.

    Folders made before a fact was recorded get no line about it.

    Args:
        folder: where the dataset lies.
    """
    if "train" not in manifest.splits:  # new rows: nothing is trained on them
        return []
    found = [*_tasks(manifest), *_weights(manifest), *_scenarios(manifest)]
    tables = manifest.by_name
    for feature in manifest.features:
        found += _feature(manifest, feature, tables)
    return [*found, *suspicious_ids(folder, manifest), *_copies(manifest)]


def block(notes: list[str]) -> str:
    """The notes as they are printed; empty without any."""
    return "\n".join(["Look at this:", *(f"  * {note}" for note in notes)]) if notes else ""


def _tasks(manifest: DatasetManifest) -> Iterator[str]:
    for task in manifest.tasks:
        wrong: dict[str, list[str]] = {}
        for name, split in manifest.splits.items():
            labelled, positive = split.label_counts[task.name]["all"]
            if not labelled:
                wrong.setdefault("no label", []).append(f"{name} (0 of {split.num_rows:,} rows)")
            elif task.kind == "regression":
                values = _label_values(manifest, task, name)
                if values and values["least"] == values["greatest"]:
                    wrong.setdefault("one value only", []).append(f"{name} ({values['least']:g} in {labelled:,} labelled rows)")
            elif positive in (0, labelled):
                wrong.setdefault("labels of one class only", []).append(f"{name} ({positive:,} of {labelled:,} positive)")
        for what, where in wrong.items():
            yield (
                f"Task '{task.name}' has {what} in {', '.join(where)}: it cannot be trained, selected or measured there. Check"
                " how the label is made, use more rows, another --seed or another split, or leave the task away."
            )


def _weights(manifest: DatasetManifest) -> Iterator[str]:
    weights = manifest.statistics.get("weights", {})
    none = [split for split, values in weights.items() if values["greatest"] == 0]
    if none:
        yield f"All rows of {' and '.join(none)} have weight 0: nothing is trained or measured there. Check their column."


def _scenarios(manifest: DatasetManifest) -> Iterator[str]:
    if manifest.scenario is None:
        return
    for name in manifest.scenario.values:
        empty = [split for split, content in manifest.splits.items() if not content.scenario_rows[name]]
        if len(empty) == len(manifest.splits):
            yield (
                f"Scenario '{name}' is listed, but no row belongs to it. Check how its value is written in column"
                f" '{manifest.scenario.name}', or take it off the list."
            )
        elif empty:
            yield f"Scenario '{name}' has no row in {' and '.join(empty)}. Use more rows, or let it join another scenario."


def _feature(manifest: DatasetManifest, feature: Feature, tables: dict[str, Table]) -> Iterator[str]:
    name, num_rows = feature.name, manifest.splits["train"].num_rows
    missing = manifest.statistics.get("missing", {}).get(name, {}).get("train")
    if missing == num_rows:
        yield (
            f"Feature '{name}' has no value in any of the {num_rows:,} rows of train. Check the name of its column and what the"
            " files hold there, or leave the feature away."
        )
        return
    if feature.table is None:
        yield from _number(manifest, name)
        return
    table = tables[feature.table]
    counted = "managed_ids" if table.managed else "hash_collisions"
    found = manifest.statistics.get(counted, {}).get(table.name)
    num_values = table.num_rows - 1 if table.vocabulary is not None else found["values"] if found else None
    if num_values == 0:
        yield (
            f"Feature '{name}' has no id but 0: no value of table '{table.name}' occurs in train as often as its minimum count"
            " asks. Lower min_count, or leave the feature away."
        )
    elif num_values == 1:
        others = f", and none in {missing:,}" if missing else ""
        yield (
            f"Feature '{name}' has one value in train (one id, or one bucket of numbers){others}: nothing can be learnt from it"
            " but whether it is there. Leave it away, or check its column."
        )


def _number(manifest: DatasetManifest, name: str) -> Iterator[str]:
    ranges = manifest.preprocessing.get("dense_ranges") or {}
    bounds = ranges.get(name)
    if bounds is None:
        return
    if bounds[0] == bounds[1]:
        yield (
            f"Feature '{name}' has one value in train, {bounds[0]:g}: it is scaled to 0 everywhere. Leave it away, or check its"
            " column."
        )
        return
    squeeze = manifest.statistics.get("within_ranges", {}).get(name)
    if squeeze is None:
        return
    above, low, below, high = squeeze
    for end, inside, at_end in (("greatest", above, low), ("least", below, high)):
        if at_end >= _FEW and inside - at_end <= max((1 - _SQUEEZED) * inside, 1):
            yield (
                f"Feature '{name}' is squeezed by its {end} values: the range of train is {bounds[0]:g} to {bounds[1]:g}, and"
                f" {at_end:,} of {inside:,} values lie in a hundredth of it. Mend or leave out rows that are wrong, or take its"
                " logarithm or buckets (in a table, scale: log or buckets: 20)."
            )


def _copies(manifest: DatasetManifest) -> Iterator[str]:
    counts = manifest.statistics.get("duplicates", {})
    if not counts:
        return
    found = {
        split: (counts[f"{split}_in_train"], manifest.splits[split].num_rows)
        for split in SPLITS[1:]
        if split in manifest.splits
    }
    if any(copies >= _COPIED * num_rows > 0 for copies, num_rows in found.values()):
        told = " and ".join(f"{copies:,} of {num_rows:,} rows of {split}" for split, (copies, num_rows) in found.items())
        # Together, they are on two sides only where the raw files say the side.
        remedy = (
            "keep them on one side or leave them out: --duplicates keep_together or drop"
            if counts["policy"] == "keep"
            else "leave them out: --duplicates drop. The raw files say where a row goes, whatever keep_together says"
        )
        yield (
            f"Copies on both sides: {told} are equal to a row of train in all columns, labels and keys too. Where they are"
            f" copies of one event, {remedy}."
        )


def _label_values(manifest: DatasetManifest, task: Task, split: str) -> dict[str, Any] | None:
    """Mean, deviation, least and greatest label of a regression task; None in folders that do not tell."""
    values: dict[str, Any] | None = manifest.statistics.get("label_values", {}).get(task.name, {}).get(split, {}).get("all")
    return values
