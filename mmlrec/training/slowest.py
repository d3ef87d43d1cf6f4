"""Which rank the others wait for, and in what part of the step: what each rank did itself, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from mmlrec.distributed.step_parts import (
    BACKWARD,
    CHECKPOINT,
    DATA,
    INPUT,
    LOOKUP,
    LOSS,
    NETWORK,
    OPTIMIZER,
    OTHER,
    PARTS,
    WAITING,
)

#: What reports tell apart: name -> parts.
REPORTED = {
    "data wait": (DATA,),
    "forward": (INPUT, LOOKUP, NETWORK, LOSS),
    "backward with update": (BACKWARD,),
    "optimizer": (OPTIMIZER,),
    "other": (OTHER,),
    "checkpoint": (CHECKPOINT,),
    "waiting": (WAITING,),
}
#: Part of the time that the other ranks lose by the slowest one, from which it is named.
_MATTERS = 0.1


@dataclass(frozen=True)
class RankTimes:
    """Seconds of each rank in each of `PARTS`, of the same time: since the last report.

    Attributes:
        seconds: a row for each rank, in the order of `PARTS`.
    """

    seconds: list[list[float]]

    def of(self, name: str) -> list[float]:
        """Seconds of each rank in one of `REPORTED`."""
        columns = [PARTS.index(part) for part in REPORTED[name]]
        return [sum(row[column] for column in columns) for row in self.seconds]

    def record(self) -> dict[str, dict[str, float]]:
        """Mean and maximum over ranks of each of `REPORTED`, in seconds, and the rank of the maximum."""
        found = {}
        for name in REPORTED:
            values = self.of(name)
            most = max(values)
            found[name] = {"mean": round(sum(values) / len(values), 6), "max": round(most, 6), "rank": values.index(most)}
        return found

    def slowest(self) -> str | None:
        """The rank that the others lose most time by, with the part; None where that is less than a tenth of their time."""
        if len(self.seconds) == 1:
            return None
        total = sum(map(sum, self.seconds)) / len(self.seconds)
        lost, told = 0.0, None
        for name in REPORTED:
            if name == "waiting":
                continue
            values = self.of(name)
            rank = values.index(max(values))
            others = (sum(values) - values[rank]) / (len(values) - 1)
            if values[rank] - others > max(lost, _MATTERS * total):
                lost = values[rank] - others
                told = f"slowest rank {rank}: {name} {values[rank] / total:.0%}, others {others / total:.0%}"
        return told
