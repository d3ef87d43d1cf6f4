"""A dataset made of its fake raw files, with where they lie and how they are read; raw folders with some files changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from preprocessing import command_line
from preprocessing.dataset import Dataset
from preprocessing.reading.raw_files import RawFolder, Source


@dataclass(frozen=True)
class Fake:
    """How to make a dataset from fake raw files.

    Attributes:
        write: puts raw files of some thousand rows into a folder that does not exist yet, and returns it.
        options: of the command line, beyond --raw and --out; {raw} in them is the folder.
        own: columns of the raw files that identify a row: of two with the same values, one is left out.
        labels: keys of JSON lines that only labels need.
    """

    write: Callable[[Path], Path]
    options: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def arguments(self, raw: Path) -> list[str]:
        """The options for files that lie in `raw`, and --raw."""
        return ["--raw", str(raw), *(option.format(raw=raw) for option in self.options)]


@dataclass(frozen=True)
class Made:
    """A fake and the dataset made of it.

    Attributes:
        dataset: as the run that made it left it.
        paths: plain name of each raw file -> where it lies. sources: plain name -> how it is read.
    """

    raw: Path
    out: Path
    dataset: Dataset
    paths: dict[str, Path]
    sources: dict[str, Source]

    def with_files(self, contents: Mapping[str, bytes | None], folder: Path, suffix: str = "") -> Path:
        """A raw folder that shares all files but these; one whose content is None is missing."""
        changed = {self.paths[name] for name in contents}
        for path in self.raw.rglob("*"):
            if path.is_file() and path not in changed:
                place = folder / path.relative_to(self.raw)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(path)
        for name, content in contents.items():
            place = folder / self.paths[name].relative_to(self.raw).parent / (Path(name).name + suffix)
            place.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                place.write_bytes(content)
        return folder

    def of_one_form(self) -> list[str]:
        """Names of the files without those that are read just like an earlier one."""
        found: dict[str, str] = {}
        for name, source in self.sources.items():
            found.setdefault(str(replace(source, name="")), name)
        return list(found.values())


def make(kind: type[Dataset], fake: Fake, folder: Path) -> Made:
    """The dataset of a fake, in `folder`."""
    return made_of(kind, fake, fake.write(folder / "raw"), folder / "out")


def made_of(kind: type[Dataset], fake: Fake, raw: Path, out: Path, *more: str) -> Made:
    """The dataset of raw files that are there."""
    with _watched() as (made, paths, sources):
        assert run(kind, fake, raw, out, "--workers", "1", *more) == 0
    return Made(raw, out, made[-1], paths, sources)


def run(kind: type[Dataset], fake: Fake, raw: Path, out: Path, *more: str) -> int:
    """`python -m preprocessing NAME` in this process, whether or not the dataset lies in this repository; its exit code."""
    with mock.patch.object(command_line, "dataset_class", return_value=kind):
        return command_line.main(command(kind, fake, raw, out, *more))


def command(kind: type[Dataset], fake: Fake, raw: Path, out: Path, *more: str) -> list[str]:
    """The arguments of such a run."""
    return [kind.name, "--out", str(out), *fake.arguments(raw), *more]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of each file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def _watched() -> Iterator[tuple[list[Dataset], dict[str, Path], dict[str, Source]]]:
    """The dataset of a run, where its raw files lie and how they are read."""
    made: list[Dataset] = []
    paths: dict[str, Path] = {}
    sources: dict[str, Source] = {}
    original, schema = RawFolder.map, Dataset.canonical_schema

    def recorded(self: RawFolder, function: Any, source: Source, *more: Any, **named: Any) -> Any:
        paths.update(self.paths)
        names = [name for name, _ in getattr(source, "files", ())] or [source.name]
        sources.update(dict.fromkeys(names, source))
        return original(self, function, source, *more, **named)

    def kept(self: Dataset) -> Any:
        made.append(self)
        return schema(self)

    with mock.patch.object(RawFolder, "map", recorded), mock.patch.object(Dataset, "canonical_schema", kept):
        yield made, paths, sources
