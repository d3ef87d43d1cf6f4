"""How rows that were encoded like others differ from the train rows of these: unseen ids, numbers outside the range, rates.

All figures are in the manifest: `statistics.against_train`, counted while the rows were encoded, and what `preprocessing`
keeps of the train rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from mmlrec.schema import DatasetManifest


@dataclass(frozen=True)
class Drift:
    """One feature in one split. Shares; None where they cannot be told.

    Attributes:
        unseen: of the values, those that the vocabulary does not have: unseen, or rare in train.
        outside: of the numbers, those outside the range of train.
        missing, missing_in_train: of the rows, those without a value.
    """

    feature: str
    split: str
    unseen: float | None
    outside: float | None
    missing: float
    missing_in_train: float | None

    @property
    def worst(self) -> float:
        """The largest of the shares that are not as in train."""
        more = 0.0 if self.missing_in_train is None else abs(self.missing - self.missing_in_train)
        return max(self.unseen or 0.0, self.outside or 0.0, more)

    @property
    def cells(self) -> list[str]:
        """As a row of a table, under `HEADERS`."""
        shares = self.unseen, self.outside, self.missing, self.missing_in_train
        return [self.feature, self.split, *map(percent, shares)]


@dataclass(frozen=True)
class Share:
    """A share of the rows, or of the labels, of a split, and what it was in train; None of nothing."""

    what: str
    split: str
    here: float | None
    in_train: float | None

    @property
    def difference(self) -> float:
        """Between both."""
        return abs((self.here or 0.0) - (self.in_train or 0.0))

    @property
    def cells(self) -> list[str]:
        """As a row of a table, under `SHARE_HEADERS`."""
        return [self.what, self.split, percent(self.here), percent(self.in_train)]


HEADERS = ["feature", "split", "unseen ids", "outside range", "missing", "missing in train"]
NOTE = (
    "Against the train rows of the data that these are encoded like, worst first. unseen: share of the values that the"
    " vocabulary lacks, which are unseen or were rare; outside: share of the numbers below or above the range, which are cut to"
    " it."
)


def drifts(manifest: DatasetManifest) -> list[Drift]:
    """Every feature in every split, the one that differs most first; nothing for data that are encoded by themselves."""
    found = [
        _drift(feature, split, counts)
        for feature, of_splits in manifest.statistics.get("against_train", {}).items()
        for split, counts in of_splits.items()
    ]
    return sorted(found, key=lambda drift: -drift.worst)


def shares(manifest: DatasetManifest) -> Iterator[Share]:
    """Of scenarios the share of the rows, of tasks the rate of positive labels; nothing of data that are like no others."""
    train = manifest.preprocessing.get("new_rows", {}).get("train")
    if train is None:
        return
    for split, of_split in manifest.splits.items():
        for scenario, rows in of_split.scenario_rows.items():
            before = _share(train["scenario_rows"].get(scenario, 0), train["num_rows"])
            yield Share(f"rows in {scenario}", split, _share(rows, of_split.num_rows), before)
        for task in manifest.tasks:
            if task.kind == "binary":
                for scenario, (labelled, positive) in of_split.label_counts[task.name].items():
                    before = train["label_counts"].get(task.name, {}).get(scenario, (0, 0))
                    yield Share(f"{task.name} in {scenario}", split, _share(positive, labelled), _share(before[1], before[0]))


SHARE_HEADERS = ["share", "split", "here", "in train"]


def percent(share: float | None) -> str:
    """As it is shown."""
    return "-" if share is None else f"{100 * share:.2f} %"


def _drift(feature: str, split: str, counts: dict[str, Any]) -> Drift:
    return Drift(
        feature,
        split,
        _share(counts["unseen"], counts["values"]) if "unseen" in counts else None,
        _share(counts["outside"], counts["values"]) if "outside" in counts else None,
        counts["missing"] / max(counts["rows"], 1),
        counts["missing_rate_in_train"],
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


_SHOWN = 10  # features at the terminal


def drift_lines(manifest: DatasetManifest) -> list[str]:
    """What the terminal shows at the end of preprocessing: the features that differ most, and the shares; nothing otherwise."""
    found = drifts(manifest)
    if not found:
        return []
    differing = [each for each in found if each.worst > 0]
    lines = [] if differing else ["against train: no unseen id, no number outside its range, missing rates as in train"]
    if differing:
        lines += _table(HEADERS, [each.cells for each in differing[:_SHOWN]], "against train, worst first")
        rest = len(differing) - _SHOWN
        lines += [f"and {rest} more: python -m preprocessing describe shows all"] if rest > 0 else []
    told = sorted((share for share in shares(manifest) if share.here is not None), key=lambda share: -share.difference)
    return lines + (_table(SHARE_HEADERS, [share.cells for share in told[:_SHOWN]], "") if told else [])


def _table(headers: list[str], rows: list[list[str]], title: str) -> list[str]:
    text = tabulate(
        rows, headers, tablefmt="simple", disable_numparse=True, colalign=["left", "left", *["right"] * (len(headers) - 2)]
    )
    return [*([f"{title}:"] if title else []), *text.splitlines()]
