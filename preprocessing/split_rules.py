"""Which rows are train, valid and test: the rules that a dataset may declare; `writing/splits.py` follows them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from mmlrec.errors import ConfigError
from mmlrec.schema import SPLITS, key_column

#: Column of the canonical table that says a row's side under `FileSplit`.
SIDE_COLUMN = "split.side"
#: A key that the engines give to every row while they work: equal for rows that are equal. With a point, as no key's name has.
COPY_KEY = "row.hash"
COPY_COLUMN = key_column(COPY_KEY)
#: What becomes of rows that are equal to an earlier one: they go where the split puts them, nowhere, or to its side.
Duplicates = Literal["keep", "drop", "keep_together"]


_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FOLDERS = ("vocab", "scratch")
#: Shares of train, valid and test, unless a rule has others.
EIGHT_ONE_ONE = (0.8, 0.1, 0.1)
Fractions = tuple[float, float, float]


@dataclass(frozen=True)
class RandomSplit:
    """Each row by itself, exactly by the fractions, by a seeded permutation."""

    fractions: Fractions = EIGHT_ONE_ONE


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
    """All rows with one value of a key on one side: the fractions of the groups in expectation, by a seeded hash of the key."""

    key: str
    fractions: Fractions = EIGHT_ONE_ONE


@dataclass(frozen=True)
class TimeSplit:
    """Cut by an int64 key: train is before the first cut, test from the second on.

    Attributes:
        cuts: the two cuts. None: by the fractions of the rows in order of time, the values at 80 % and 90 % of them; rows of
            equal time stay together.
    """

    key: str
    cuts: tuple[int, int] | None = None
    fractions: Fractions = EIGHT_ONE_ONE


@dataclass(frozen=True)
class OneSplit:
    """All rows in one split, `train` or any other: rows that came later, for a dataset with fitted parts given.

    Raises:
        ConfigError: the name cannot be that of a split's folder.
    """

    name: str

    def __post_init__(self) -> None:
        if not _SPLIT_NAME.fullmatch(self.name) or self.name in _FOLDERS:
            raise ConfigError(
                f"'{self.name}' is no name of a split: letters, digits, '_' and '-', the first a letter or digit, and none of"
                f" {', '.join(_FOLDERS)}, which are folders beside it."
            )


SplitRule = RandomSplit | InOrder | FileSplit | GroupSplit | TimeSplit | OneSplit


def split_names(rule: SplitRule) -> tuple[str, ...]:
    """The splits that a rule makes, in their order. Of `train` alone anything is fitted."""
    return (rule.name,) if isinstance(rule, OneSplit) else SPLITS


def ends(fractions: Fractions) -> tuple[Fraction, Fraction]:
    """The shares of rows at which train and valid end, exact for fractions as they are written: .29 of 100 rows are 29."""
    train, valid, _ = (Fraction(str(fraction)) for fraction in fractions)
    return train, train + valid


def together(rule: SplitRule) -> SplitRule:
    """A rule that has equal rows on one side: where `rule` draws lots for rows, it is drawn for all equal ones at once.

    A rule by a key does so by itself, as equal rows have one key. Where the files say the side, they still do.
    """
    if isinstance(rule, RandomSplit):
        return GroupSplit(COPY_KEY, rule.fractions)
    if isinstance(rule, FileSplit) and rule.valid_from and rule.group is None:
        return replace(rule, group=COPY_KEY)
    return rule
