"""Paths given from outside, on a command line or in a configuration: of this machine's file systems, or refused by name.

And where the shipped configurations lie. Standard library only: the doctor needs it in a broken environment.
"""

from __future__ import annotations

import re
from pathlib import Path

import mmlrec
from mmlrec.errors import UserError

PRESETS_FILE = "torchx.yaml"

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


def shipped_folder() -> Path:
    """Folder that holds `configs/` and `torchx.yaml`: the package when installed from a wheel, the clone otherwise."""
    package = Path(mmlrec.__file__).resolve().parent
    return package if (package / PRESETS_FILE).is_file() else package.parent


def shipped_configs() -> list[str]:
    """Names of the shipped configurations that can be trained, such as mtl/movielens."""
    folder = shipped_folder() / "configs"
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml"))
    return sorted(name for name in names if not name.startswith("base/"))


def config_file(text: str | Path) -> Path:
    """The file that `--config` means: the one at this path, else the shipped one of this name, wherever the package lies.

    configs/mtl/movielens.yaml, mtl/movielens.yaml and mtl/movielens are names of one.

    Raises:
        UserError: it is an address.
    """
    path = local_path(text)
    if path.exists():
        return path
    configs = shipped_folder() / "configs"
    places = (configs.parent / path, configs / path, configs / path.parent / f"{path.name}.yaml")
    return next((place for place in places if place.is_file()), path)
