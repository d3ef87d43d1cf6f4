"""What a report should not pass over in silence: scores like those of chance, and scores too good to be true."""

from __future__ import annotations

import math
from typing import Any

from mmlrec.metrics.report import report_table

#: An AUC above this is seldom earned.
TOO_GOOD = 0.999
_ERRORS = 2  # standard errors within which an AUC cannot be told from that of chance


def chance_error(positives: int, negatives: int) -> float:
    """Standard error of the AUC of scores that know nothing of the labels: sqrt((n1 + n0 + 1) / (12 n1 n0)).

    Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic (ROC) curve", Radiology 143,
    1982, equation 1, at an area of 1/2, where both Q are 1/3: the variance of the Mann-Whitney statistic. One row or more each.
    """
    return math.sqrt((positives + negatives + 1) / (12 * positives * negatives))


def too_good(report: dict[str, Any], split: str) -> dict[str, str]:
    """Task -> what to say of an AUC that is seldom earned."""
    return {
        name: f"Task '{name}': AUC {entry['auc']:.4f} on {split} is seldom earned. Look for a feature that is made from the"
        " label, or known only after it, and for rows that are in train, too."
        for name, entry in report["tasks"].items()
        if (entry.get("auc") or 0) > TOO_GOOD
    }


def look_at(report: dict[str, Any], split: str) -> list[str]:
    """One sentence or two for each thing that a finished run should be asked about.

    Args:
        report: as `build_report` makes it; overall figures of its tasks are looked at.
        split: that it is of.
    """
    notes, earned = [], too_good(report, split)
    for name, entry in report["tasks"].items():
        if name in earned:
            notes.append(earned[name])
        elif entry.get("auc") is not None:
            notes += _like_chance(name, entry, split)
        if "logloss" in entry and entry["rows"]:
            notes += _worse_than_the_rate(name, entry, split)
    return notes


def report_text(report: dict[str, Any], split: str) -> str:
    """The report as a table, and below it what to look at."""
    notes = look_at(report, split)
    return "\n".join([report_table(report), *(["", "Look at this:"] if notes else []), *(f"  * {note}" for note in notes)])


def _like_chance(name: str, entry: dict[str, Any], split: str) -> list[str]:
    auc, positives, negatives = entry["auc"], entry["positives"], entry["rows"] - entry["positives"]
    noise = _ERRORS * chance_error(positives, negatives)
    counts = f"of {entry['rows']:,} rows with {positives:,} positives"
    if abs(auc - 0.5) <= noise:
        return [
            f"Task '{name}': AUC {auc:.4f} on {split}, {counts}, cannot be told from chance (.5 ± {noise:.4f}, {_ERRORS}"
            " standard errors). Train longer or with other learning rates, look for features that tell of it, or use more rows."
        ]
    if auc < 0.5:
        return [
            f"Task '{name}': AUC {auc:.4f} on {split}, {counts}, is below chance: rows are ranked the wrong way round. Check"
            " that labels mean the same in train."
        ]
    return []


def _worse_than_the_rate(name: str, entry: dict[str, Any], split: str) -> list[str]:
    logloss, relative = entry["logloss"], entry["normalized_entropy"]
    if logloss is None and all(entry[name] is None for name in ("auc", "calibration")):
        return []  # of rows that all weigh 0 there is none; that metrics are undefined is told
    if logloss is None:  # as infinity is written in JSON
        found = "is infinite: a row was held to be impossible"
    elif relative is not None and relative > 1:
        found = f"{logloss:.4f} is above {logloss / relative:.4f}, which the rate of positives has as the score of every row"
    else:
        return []
    return [
        f"Task '{name}': logloss on {split} {found}. Its probabilities mislead: train"
        " longer where the loss on train is like it, else less long, or with lower learning rates."
    ]
