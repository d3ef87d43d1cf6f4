"""The files that a table's configuration names: patterns, files and folders below one folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from mmlrec.errors import ConfigError, DataError, did_you_mean
from preprocessing.own_tables.config import FORMATS

_PACKED = (".gz", ".zip")
_NOT_READ = (".zst", ".bz2", ".xz", ".lz4", ".7z", ".rar", ".snappy", ".tgz", ".tar")
_OTHER_FORMATS = (".xlsx", ".xls", ".ods", ".feather", ".arrow", ".ipc", ".orc", ".avro", ".pkl", ".pickle", ".h5", ".xml")


def matching_files(folder: Path, patterns: list[str], key: str, config: str, *, of_new_rows: bool = False) -> list[str]:
    """Names of the files relative to the folder, each once; those of one pattern, or in a named folder, in order of name.

    Hidden files and folders, and those whose names begin with '_', are passed over unless a pattern names them. What is not
    there may lie there packed, with .gz or .zip behind its name.

    Raises:
        ConfigError: a pattern leads out of the folder.
        DataError: a pattern matches nothing.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        if not pattern or PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
            raise ConfigError(
                f"{config}: {key}: '{pattern}' must lie below the folder that --raw gives; name it relative to that."
            )
        try:
            files = next((files for packed in ("", *_PACKED) if (files := _found(folder, pattern + packed))), [])
        except ValueError as error:
            raise ConfigError(f"{config}: {key}: '{pattern}' is no pattern: {error}.") from error
        if not files:
            if (folder / pattern).is_dir():
                raise DataError(
                    f"{folder / pattern}: the folder holds no files, which {config} names under {key}. Those in folders below"
                    f" it are {pattern.rstrip('/')}/**/*."
                )
            there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            holds = (
                f"It holds {', '.join(there[:10])}{' ...' if len(there) > 10 else ''}." if there else "There is no such folder."
            )
            hint = did_you_mean(pattern, there)
            raise DataError(
                f"{folder}: no file '{pattern}', which {config} names under {key}.{hint} {holds} Give its folder as --raw"
                f"{', or name the files of the new rows, --files PATTERN' if of_new_rows else ''}."
            )
        names |= dict.fromkeys(path.relative_to(folder).as_posix() for path in files)
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{folder}: the name of a file, {name!r}, is no UTF-8. Rename it.") from None
    return list(names)


def _found(folder: Path, pattern: str) -> list[Path]:
    named, literal = folder / pattern, PurePosixPath(pattern).parts

    def hidden(path: Path) -> bool:
        return any(part[0] in "._" and part not in literal for part in path.relative_to(folder).parts)

    # A name may hold what means something else in a pattern, such as brackets.
    found = named.iterdir() if named.is_dir() else [named] if named.is_file() else folder.glob(pattern)
    return [path for path in sorted(found) if path.is_file() and not hidden(path)]


def suffix_of(name: str) -> str:
    """What the name of a file ends with, in small letters, whether it is packed or not."""
    path = PurePosixPath(name)
    return (path.with_suffix("") if path.suffix.lower() in _PACKED else path).suffix.lower()


def separator_of(name: str) -> str:
    """What stands between the fields of delimited text, by the file's name."""
    return "\t" if suffix_of(name) == ".tsv" else ","


def file_format(names: list[str], config: str) -> str:
    """csv, json or parquet, by the names' suffixes.

    Raises:
        ConfigError: the suffixes say nothing, or not all the same.
        DataError: a file is packed in a way, or of a format, that is not read.
    """
    for name in names:
        if {PurePosixPath(name).suffix.lower(), suffix_of(name)} & {*_NOT_READ}:
            raise DataError(f"{config}: {name} is packed in a way that is not read. Unpack it, or pack it by gzip.")
        if suffix_of(name) in _OTHER_FORMATS:
            raise DataError(f"{config}: {name} is of a format that is not read. Save it as CSV, JSON lines or Parquet.")
    formats: dict[str | None, str] = {}
    for name in names:
        suffix = suffix_of(name)
        formats.setdefault(next((kind for kind, suffixes in FORMATS.items() if suffix in suffixes), None), name)
    if len(formats) == 1 and None not in formats:
        (found,) = formats
        return str(found)
    examples = ", ".join(formats.values())
    raise ConfigError(f"{config}: format: cannot be told from the names ({examples}); give format: csv, json or parquet.")
