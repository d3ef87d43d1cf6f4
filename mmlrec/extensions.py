"""Methods, strategies and datasets by name: those of this package, of installed packages, and of modules given by `--import`.

A name is looked up among what is declared, and is never itself imported: a configuration, or the `config.yaml` of a run folder,
runs no code but that which somebody installed as a package or named on the command line.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from types import ModuleType
from typing import Any

from mmlrec.errors import ConfigError, UserError


@dataclass(frozen=True)
class Kind:
    """What can come from outside.

    Attributes:
        word: for messages.
        group: group of the entry points by which a package declares some; the name of an entry point is the name here.
        base: dotted name of the class that all inherit from. A name, because some bases need torch.
        listed: attribute of a module that lists its classes, each with a `name`; empty: one class, named like its file.
    """

    word: str
    group: str
    base: str
    listed: str = ""


METHOD = Kind("method", "mmlrec.methods", "mmlrec.models.base.model.MultiTaskModel")
STRATEGY = Kind("strategy", "mmlrec.strategies", "mmlrec.balancing.base.Balancing")
DATASET = Kind("dataset", "mmlrec.datasets", "preprocessing.dataset.Dataset", listed="DATASETS")

#: For messages about an unknown name.
REMEDY = "One that is not part of mmlrec needs its package installed, or --import package.module."

#: What `--import` gave this process.
_imported: list[ModuleType] = []


@dataclass(frozen=True)
class Source:
    """Where a class is from.

    Attributes:
        place: for messages.
        load: gives the class, or raises a UserError.
        target: `module:Class` where it is known, so that a class which is declared twice counts once.
    """

    place: str
    load: Callable[[], type[Any]]
    target: str = ""

    @classmethod
    def of(cls, place: str, found: type[Any]) -> Source:
        """That of a class that is here already."""
        return cls(place, lambda: found, f"{found.__module__}:{found.__qualname__}")


class Finder:
    """All of one kind, by name.

    Args:
        own: those of this package, by name.
    """

    def __init__(self, kind: Kind, own: Callable[[], Mapping[str, Source]]) -> None:
        self.kind = kind
        self.own = own

    def names(self) -> list[str]:
        """All names, sorted; loads none of them."""
        return sorted(self._sources())

    def at_hand(self) -> dict[str, type[Any]]:
        """The classes of this package and of modules given by `--import`: all but those of installed packages."""
        given = {name: found for module in _imported for name, found in classes_of(module, self.kind).items()}
        return {name: source.load() for name, source in self.own().items()} | given

    def find(self, name: str) -> type[Any]:
        """The class of one of `names()`.

        Raises:
            ConfigError: two places give the name.
            UserError: a package of somebody else gives it and cannot be used.
        """
        sources = self._sources()[name]
        if len(sources) > 1:
            places = " and ".join(source.place for source in sources)
            raise ConfigError(f"{self.kind.word} '{name}' is there more than once: {places}. Rename one, or leave one out.")
        return sources[0].load()

    def _sources(self) -> dict[str, list[Source]]:
        found = {name: [source] for name, source in self.own().items()}
        for name, source in [*_of_imports(self.kind), *_of_packages(self.kind)]:
            others = found.setdefault(name, [])
            if not any(source.target == other.target for other in others):
                others.append(source)
        return found


def import_modules(names: Iterable[str]) -> None:
    """Import what `--import` names, so that finders know the methods, strategies and datasets in it.

    Raises:
        UserError: a module cannot be imported, or has nothing of the kind.
    """
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"--import {name}: give the name of a module, such as package.module.")
        try:
            module = importlib.import_module(name)
        except Exception as error:
            where = " A module is looked for in the current folder and in PYTHONPATH."
            hint = where if isinstance(error, ModuleNotFoundError) and name.startswith(str(error.name)) else ""
            raise UserError(f"--import {name}: cannot be imported: {_cause(error)}.{hint}") from error
        if not any(classes_of(module, kind) for kind in (METHOD, STRATEGY, DATASET)):
            raise ConfigError(
                f"--import {name}: there is no method or strategy in it (a class named like the file,"
                f" '{_wanted(module)}' in CamelCase, that inherits from {METHOD.base} or {STRATEGY.base}),"
                f" and no {DATASET.listed}."
            )
        if module not in _imported:
            _imported.append(module)


def classes_of(module: ModuleType, kind: Kind) -> dict[str, type[Any]]:
    """Name -> class of one kind, of those that a module defines."""
    if not kind.listed:
        named = named_like_its_file(module)
        return {module.__name__.rpartition(".")[2]: named} if named is not None and _inherits(named, kind) else {}
    listed = getattr(module, kind.listed, ())
    return {value.name: value for value in listed if _inherits(value, kind)} if isinstance(listed, tuple | list) else {}


def named_like_its_file(module: ModuleType) -> type[Any] | None:
    """The class that a module defines under the name of its file, in CamelCase."""
    for attribute, value in vars(module).items():
        if isinstance(value, type) and attribute.lower() == _wanted(module) and value.__module__ == module.__name__:
            return value
    return None


def _wanted(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2].replace("_", "")


def _inherits(value: object, kind: Kind) -> bool:
    return isinstance(value, type) and any(f"{base.__module__}.{base.__qualname__}" == kind.base for base in value.__mro__[1:])


def _of_imports(kind: Kind) -> Iterator[tuple[str, Source]]:
    for module in _imported:
        for name, found in classes_of(module, kind).items():
            yield name, Source.of(f"--import {module.__name__}", found)


@cache
def _declared(group: str) -> metadata.EntryPoints:
    return metadata.entry_points(group=group)


def _of_packages(kind: Kind) -> Iterator[tuple[str, Source]]:
    for point in _declared(kind.group):
        package = point.dist.name if point.dist is not None else "unknown"
        place = f"{point.value} of the installed package {package}"
        yield point.name, Source(place, partial(_load, kind, point, place), point.value.replace(" ", ""))


def _load(kind: Kind, point: metadata.EntryPoint, place: str) -> type[Any]:
    try:
        found: type[Any] = point.load()
    except Exception as error:
        raise UserError(
            f"{kind.word} '{point.name}': {place} cannot be loaded: {_cause(error)}. Mend that package, or uninstall it."
        ) from error
    if not _inherits(found, kind):
        raise UserError(f"{kind.word} '{point.name}': {place} is no class that inherits from {kind.base}.")
    if kind.listed and found.name != point.name:
        raise UserError(f"{kind.word} '{point.name}': {place} calls itself '{found.name}'. Its entry point must do so, too.")
    return found


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(". ")
