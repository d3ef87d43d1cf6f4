"""Folders on an object store that are whole or absent, where nothing can be renamed: what `whole` does there.

The files of a folder lie one level below it, in a folder whose name nothing else has had; the marker, put last, names them:
`step_000000100/COMPLETE.json` lists `4fe1…-0c2b…/state.json` and so on. So what a start that was killed sends late never gets
between the files of another one. A folder that takes the place of another keeps the marker of that one as `REPLACED.json`, and
its files; `whole` calls that one `NAME.old`, as on a file system. What no marker names is left over.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mmlrec.errors import StorageError
from mmlrec.storage.places import Place, create, objects_below, read

if TYPE_CHECKING:
    from upath import UPath

MARKER, REPLACED_MARKER = "COMPLETE.json", "REPLACED.json"
REPLACED = ".old"


def marker_text(files: Mapping[str, Any]) -> bytes:
    """Content of a marker, wherever it lies: each file with its size and checksum."""
    return json.dumps({"files": dict(sorted(files.items()))}, indent=1).encode()


def base(folder: UPath) -> UPath:
    """Where the names that its marker lists begin: `NAME` of `NAME.old`."""
    return folder.with_name(folder.name.removesuffix(REPLACED))


def marker(folder: UPath) -> UPath:
    """Where its marker lies."""
    return base(folder) / (REPLACED_MARKER if folder.name.endswith(REPLACED) else MARKER)


def named(start: str) -> str:
    """Name of a folder, below the one that it is to become, for files to lie in."""
    return f"{start}-{uuid.uuid4().hex[:8]}"


def put(temporary: Place, folder: UPath) -> None:
    """Let the marker of a folder name the files of a sealed one below it. The former one becomes the one that was replaced.

    Raises:
        OSError: another run has put one there.
        StorageError: the store cannot be reached, or refuses.
    """
    listed = json.loads(read(temporary / MARKER))
    content = marker_text({f"{temporary.name}/{name}": sums for name, sums in listed["files"].items()})
    former = _read(folder / MARKER)
    if former is None:
        try:
            create(folder / MARKER, content)
        except FileExistsError:
            if _read(folder / MARKER) != content:  # its own, where the answer was lost and the put repeated
                raise
        return
    # The former one stays until `prune`: should this process die now, the newest step checkpoint knows that one.
    if _read(folder / REPLACED_MARKER) is None:
        (folder / REPLACED_MARKER).write_bytes(former)
    (folder / MARKER).write_bytes(content)


def retire(folder: UPath, delete: Callable[[Place], None]) -> None:
    """Take a folder away; `delete` may take its time with its files.

    Raises:
        StorageError: it stays.
    """
    files = {name.partition("/")[0] for name in _names(_read(marker(folder)))}
    _remove(base(folder), {marker(folder).name} & set(objects_below(base(folder))))
    # One by one: by the time they are deleted, there may be others beside them.
    for name in sorted(files):
        delete(base(folder) / name)


def bring_back(old: UPath, folder: UPath) -> None:
    """Let a folder be what it was before it was replaced."""
    (folder / MARKER).write_bytes(read(marker(old)))
    _remove(folder, {marker(old).name})


def delete(folder: UPath) -> None:
    """Delete what is left of a folder, as far as that can be done. Of a replaced one the files are left over."""
    with contextlib.suppress(OSError, StorageError):
        names = set(objects_below(base(folder)))
        # The marker goes first: a deletion that is cut short leaves nothing that passes for whole.
        first = names & {marker(folder).name}
        _remove(base(folder), first)
        if not folder.name.endswith(REPLACED):
            _remove(folder, names - first)


def folders(folder: UPath) -> list[UPath]:
    """The folders in this one that have a marker."""
    return [folder / name for name, files in _below(folder).items() if MARKER in files]


def is_there(folder: UPath) -> bool:
    """Whether a folder has a marker, or one that it was replacing."""
    return not {MARKER, REPLACED_MARKER}.isdisjoint(objects_below(folder))


def replaced(folder: UPath) -> list[UPath]:
    """Of the folders in this one, those that were replaced."""
    return [folder / f"{name}{REPLACED}" for name, files in _below(folder).items() if REPLACED_MARKER in files]


def leftovers(folder: UPath) -> list[UPath]:
    """In the folders in this one, files that no marker names, folder by folder."""
    found = []
    for name, files in _below(folder).items():
        there = folder / name
        markers = [there / kind for kind in (MARKER, REPLACED_MARKER) if kind in files]
        known = {listed.partition("/")[0] for path in markers for listed in _names(_read(path))}
        inner = {file.partition("/")[0] for file in files if "/" in file}
        found += [there / each for each in sorted(inner - known)]
    return found


def _below(folder: UPath) -> dict[str, list[str]]:
    """Name of each folder in this one -> names of the files below it."""
    found: dict[str, list[str]] = {}
    for name in objects_below(folder):
        first, _, rest = name.partition("/")
        if rest:
            found.setdefault(first, []).append(rest)
    return found


def _remove(folder: UPath, names: Iterable[str]) -> None:
    """Remove files; nothing asks before whether they are there."""
    if paths := [(folder / name).path for name in names]:
        folder.fs.rm(paths)


def _read(path: Place) -> bytes | None:
    try:
        return read(path)
    except FileNotFoundError:
        return None


def _names(content: bytes | None) -> list[str]:
    """What a marker lists; nothing where it is damaged or absent."""
    try:
        return list(json.loads(content or b"")["files"])
    except (ValueError, KeyError, TypeError):
        return []
