"""From the text of a command line or a configuration to a place: a path of this machine, or an address on an object store.

A place has pathlib's methods, whatever it is. What object stores lack: a rename, and folders (one is there while something lies
below it). What they have: an object is whole or absent, and `create` lets one writer win.

Local paths import nothing but the standard library; fsspec comes with the first address.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias

from mmlrec.errors import UserError
from mmlrec.paths import scheme_of

if TYPE_CHECKING:
    from upath import UPath

#: Annotations only: at run time UPath is not imported for local paths.
Place: TypeAlias = "Path | UPath"

#: s3:// is what is offered. memory:// ends with the process: the contract of all that uses places is tested on it.
SCHEMES = ("s3", "memory")
_PIECE_BYTES = 16 << 20
EXTRA = "pip install 'mmlrec[s3]'"


def refusal(text: str) -> str | None:
    """Why a text names no place that can be used; None where it does. Imports nothing."""
    scheme = scheme_of(text)
    if scheme is None:
        return None
    if scheme.lower() not in SCHEMES:
        return (
            f"{text}: addresses with {scheme}:// are neither read nor written, those with s3:// are; else copy the files to a"
            " disk of this machine, or mount what the address names and give the folder where it is mounted"
        )
    bucket, *names = text[len(scheme) + len("://") :].rstrip("/").split("/")
    if not text.startswith(f"{scheme.lower()}://") or not bucket or any(name in ("", ".", "..") for name in names):
        return f"{text}: is no address; one looks like {scheme.lower()}://bucket/some/name"
    if "@" in bucket:
        bucket = bucket.rpartition("@")[2]
        return f"{scheme}://...@{bucket}: keys have no place in an address, but in AWS_* variables or ~/.aws"
    if found := [letter for letter in "?*[]" if letter in text]:
        return f"{text}: '{found[0]}' cannot stand in an address: file systems take it for a pattern"
    return None


def place(text: str | Place) -> Place:
    """A path of this machine or an address; the `type` of every option that takes both.

    Raises:
        UserError: an address of a scheme that is not supported, or of none that can be, or the package for it is not installed.
    """
    if not isinstance(text, str):
        return text
    if message := refusal(text):
        raise UserError(f"{message}.")
    scheme = scheme_of(text)
    if scheme is None:
        return Path(text)
    try:
        from upath import UPath

        if scheme == "s3":
            from mmlrec.storage import s3

            s3.register()
    except ImportError as error:
        raise UserError(f"{text}: addresses need packages that are not installed ({error}): {EXTRA}") from error
    found = UPath(text.rstrip("/"))
    _ = found.fs  # made here, and shared by all places that are derived from this one, in all threads
    return found


def is_local(there: Place) -> bool:
    """Whether it is a path of this machine."""
    return isinstance(there, Path)


def read(there: Place) -> bytes:
    """The whole of a file, as it is at one moment, in one request.

    To open an object and to read from it are two, between which it may be replaced.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: the store cannot be reached, or refuses.
    """
    return there.read_bytes() if isinstance(there, Path) else bytes(there.fs.cat_file(there.path, max_concurrency=1))


def names_in(folder: Place) -> set[str]:
    """Names of what lies directly in a folder, now: nothing that was listed before is used. None where there is no folder.

    Raises:
        OSError: it cannot be read.
        StorageError: the store cannot be reached, or refuses.
    """
    try:
        if isinstance(folder, Path):
            return {path.name for path in folder.iterdir()}
        paths = {str(path).rstrip("/") for path in folder.fs.ls(folder.path, detail=False, refresh=True)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {path.rpartition("/")[2] for path in paths - {folder.path.rstrip("/")}}  # itself, where a console has made it


def create(there: Place, data: bytes) -> None:
    """Write a file or an object that is not there yet. Of several writers one wins, also on an object store (If-None-Match: *).

    An answer that is lost is asked for again: then the writer that has won may be told that there is one already, so what it
    writes should say whose it is.

    Raises:
        FileExistsError: it is there.
        StorageError: the store cannot be reached, or refuses.
    """
    if isinstance(there, Path):
        with there.open("xb") as file:
            file.write(data)
    else:
        there.fs.pipe_file(there.path, data, mode="create")


def objects_below(there: UPath) -> dict[str, int]:
    """Name of each object below an address, relative to it -> its bytes."""
    found = there.fs.find(there.path, detail=True)
    return {
        PurePosixPath(name).relative_to(there.path).as_posix(): int(of["size"]) for name, of in found.items() if name[-1] != "/"
    }


def put_file(path: Path, there: Place) -> None:
    """Copy a file of this machine to a place; large ones in pieces, a few of them in memory.

    Raises:
        StorageError: the store cannot be reached, or refuses.
    """
    if isinstance(there, Path):
        shutil.copyfile(path, there)
        return
    pieces = {"chunksize": _PIECE_BYTES, "max_concurrency": 2} if there.protocol == "s3" else {}
    there.fs.put_file(str(path), there.path, **pieces)


def get_file(there: UPath, path: Path) -> None:
    """Copy an object to a file of this machine; large ones in pieces, a few of them in memory.

    Raises:
        StorageError: the store cannot be reached, or refuses.
    """
    pieces = {"chunksize": _PIECE_BYTES, "max_concurrency": 4} if there.protocol == "s3" else {}
    there.fs.get_file(there.path, str(path), **pieces)


def remove_tree(there: Place) -> None:
    """Remove a folder with all that lies below it; nothing happens where there is none."""
    if isinstance(there, Path):
        if there.exists():
            shutil.rmtree(there)
    elif there.exists():
        there.fs.rm(there.path, recursive=True)
