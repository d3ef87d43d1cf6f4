"""Paths given from outside that must be of this machine's file systems: others are refused by name.

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


def scheme_of(text: str | Path) -> str | None:
    """`s3` of `s3://bucket/data`; None for a path of this machine."""
    scheme = _SCHEME.match(str(text))
    return scheme[1] if scheme else None


def local_path(text: str | Path) -> Path:
    """A path as it was given; the `type` of every option that takes one of this machine only.

    Raises:
        UserError: it is an address, such as s3://bucket/data, which would make a folder called `s3:`.
    """
    if scheme := scheme_of(text):
        raise UserError(
            f"{text}: addresses with {scheme}:// are neither read nor written here; copy the file to a disk of this machine, or"
            " mount what the address names and give the folder where it is mounted."
        )
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
    return path if path.exists() else shipped_config(path) or path


def shipped_config(name: str | Path) -> Path | None:
    """The shipped configuration of this name, as `config_file` takes it; None where there is none."""
    path, configs = Path(name), shipped_folder() / "configs"
    places = (configs.parent / path, configs / path, configs / path.parent / f"{path.name}.yaml")
    return next((place for place in places if place.is_file()), None)
