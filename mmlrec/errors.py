"""The exceptions and warnings that carry a message for the user. Entry points print them without a traceback."""

import difflib
import os
import sys
from collections.abc import Iterable

#: Exit codes of what has to be mended first, configuration or data and installation: starting again would end the same way.
MISTAKES = (2, 3)


class UserError(Exception):
    """Something the user can mend: the message names the file, key or row, and the remedy."""

    exit_code = 2
    #: Whether something is wrong: an end that was asked for is none, and its message is printed as it is.
    is_error = True
    #: Of several ranks: True when another one prints it, None when it was raised before the ranks met.
    told: bool | None = None


class ConfigError(UserError):
    """A configuration that cannot be used."""


class DataError(UserError):
    """Raw data, a dataset folder or a batch that does not hold what it should."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete, damaged, or belongs to another run."""


class StorageError(UserError):
    """An object store that refuses a request, or could not be reached: the message names address and server.

    Args:
        lost: it could not be reached for as long as it was tried. The exit code says that a later start may do better.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost
        if lost:
            self.exit_code = 1


class RankError(UserError):
    """One rank of several failed in a way that nobody foresaw, or is lost: which one, when and why.

    `__cause__` is its exception, where there is one.
    """

    exit_code = 1


class UserAdvice(UserWarning):
    """Something that works but that the user may not want. Rank 0 of a run logs its message as one line."""


def discard_output() -> None:
    """After a BrokenPipeError: the reader of our output, such as head, has seen enough.

    What is still buffered must not fail at exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A suggestion for a mistyped name, as a sentence with a leading space, or the empty string."""
    spelling = {choice.lower(): choice for choice in allowed}
    close = difflib.get_close_matches(name.lower(), spelling, n=1)
    if not close:
        return ""
    found = spelling[close[0]]
    return f" Did you mean '{found}'?" if found.isprintable() else f" Did you mean {found!r}, with what is not seen in it?"


def kind_of(rows: object) -> str:
    """What these are that are no rows, for a message; of frames of other libraries, such as polars, how they become some."""
    name = type(rows).__name__
    if not hasattr(rows, "__arrow_c_stream__"):
        return name
    return f"{type(rows).__module__.partition('.')[0]}.{name}; give pyarrow.table(frame), which takes it as it is"
