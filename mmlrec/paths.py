"""Paths given from outside, on a command line or in a configuration: of this machine's file systems, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

from mmlrec.errors import UserError

# One slash: a Path has dropped the second. Two letters at least.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def refusal(text: str | Path) -> str | None:
    """Why something is no path of this machine (`s3://…` would make a folder called `s3:`); None where it is one."""
    scheme = _SCHEME.match(str(text))
    if scheme is None:
        return None
    return (
        f"{text}: addresses with {scheme[1]}:// are neither read nor written; copy the files to a disk of this machine, or"
        " mount what the address names and give the folder where it is mounted"
    )


def local_path(text: str | Path) -> Path:
    """A path as it was given; the `type` of every option that takes one.

    Raises:
        UserError: it is an address, such as s3://bucket/data.
    """
    if message := refusal(text):
        raise UserError(f"{message}.")
    return Path(text)
