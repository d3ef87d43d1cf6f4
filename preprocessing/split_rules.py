"""Which rows are train, valid and test: the rules that a dataset may declare; `writing/splits.py` follows them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mmlrec.schema import key_column

#: Column of the canonical table that says a row's side under `FileSplit`.
SIDE_COLUMN = "split.side"
#: A key that the engines give to every row while they work: equal for rows that are equal. With a point, as no key's name has.
COPY_KEY = "row.hash"
COPY_COLUMN = key_column(COPY_KEY)
#: What becomes of rows that are equal to an earlier one: they go where the split puts them, nowhere, or to its side.
Duplicates = Literal["keep", "drop", "keep_together"]


@dataclass(frozen=True)
class RandomSplit:
    """Each row by itself, exactly 8:1:1, by a seeded permutation."""


@dataclass(frozen=True)
class InOrder:
    """Rows come shuffled and encoded: the first 80 % are train, the next 10 % valid. Needs the dataset's `num_rows`."""


@dataclass(frozen=True)
class FileSplit:
    """The raw files say the side: column `split.side` of the canonical table, int64, 0 train, 1 valid, 2 test.

    Attributes:
        valid_from: the side that gives a random part of its rows to valid; none of the rows then comes with side 1.
            None: the files hold all three sides.
        one_in: valid gets one row in this many, exactly.
        group: key whose rows stay on one side of that cut; valid then gets about one *group* in `one_in`.
    """

    valid_from: Literal["train", "test"] | None = None
    one_in: int = 10
    group: str | None = None


@dataclass(frozen=True)
class GroupSplit:
    """All rows with one value of a key on one side: 8:1:1 of the groups in expectation, by a seeded hash of the key."""

    key: str


@dataclass(frozen=True)
class TimeSplit:
    """Cut by an int64 key: train is before the first cut, test from the second on.

    Attributes:
        cuts: the two cuts. None: the values at 80 % and 90 % of the rows in order of time; rows of equal time stay together.
    """

    key: str
    cuts: tuple[int, int] | None = None


SplitRule = RandomSplit | InOrder | FileSplit | GroupSplit | TimeSplit


def together(rule: SplitRule) -> SplitRule:
    """A rule that has equal rows on one side: where `rule` draws lots for rows, it is drawn for all equal ones at once.

    A rule by a key does so by itself, as equal rows have one key. Where the files say the side, they still do.
    """
    if isinstance(rule, RandomSplit):
        return GroupSplit(COPY_KEY)
    if isinstance(rule, FileSplit) and rule.valid_from and rule.group is None:
        return replace(rule, group=COPY_KEY)
    return rule
