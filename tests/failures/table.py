"""The table of many trials."""

import json
import re
from collections import Counter
from pathlib import Path
from statistics import median

_COLUMNS = ("failure", "times", "went on", "exit codes", "ended within, s", "starts", "seconds", "steps again", "what is said")


def table(files: list[Path]) -> str:
    """A table in Markdown, a row for each kind: how often, outcome, exit codes of the hosts, starts, seconds, messages."""
    kinds: dict[str, list[dict]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            trial = json.loads(line)
            kinds.setdefault(trial["kind"], []).append(trial)
    rows = [list(_COLUMNS), ["---"] * len(_COLUMNS), *(_row(kind, trials) for kind, trials in sorted(kinds.items()))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _row(kind: str, trials: list[dict]) -> list[object]:
    seconds = [trial["seconds"] for trial in trials if trial["seconds"] is not None]
    lost = [trial["lost_steps"] for trial in trials if trial["lost_steps"] is not None]
    codes = Counter(code for trial in trials for _, code, _ in trial["ended"])
    messages = Counter(_general(line) for trial in trials for line in trial["errors"])
    return [
        kind,
        len(trials),
        sum(trial["fault"] is None for trial in trials),
        ", ".join(f"{code}" for code, _ in codes.most_common()) or "-",
        f"{max((seconds for trial in trials for _, _, seconds in trial['ended']), default=0):.0f}" if codes else "-",
        _range([trial["starts"] for trial in trials]),
        f"{median(seconds):.0f}, at most {max(seconds):.0f}" if seconds else "-",
        _range(lost) if lost else "-",
        "; ".join(f"`{line}`" for line, _ in messages.most_common()) or "nothing",
    ]


def _range(numbers: list[int]) -> str:
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def _general(line: str) -> str:
    """The beginning of a message, without numbers, processes and folders."""
    line = re.sub(r"\d+(\.\d+)?", "N", line.removeprefix("error: ")).replace(" (process N on hN)", "")
    return re.split(r"[.:;] | \(training| \(any", line)[0]
