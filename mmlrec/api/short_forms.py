"""The short forms of `prepare`: what a column is, told by its type. The rule stands in docs/python.md.

Whatever is concluded is one of the lines that `prepare` prints; what cannot be told from the type is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.api.frames import Frame, arrow_table, values_of
from mmlrec.encoding.typed import is_list
from mmlrec.errors import ConfigError

#: Most scenarios that a column's values are taken for without being named.
_MOST_SCENARIOS = 100
_KINDS = ("id", "ids", "number")
_KEY_TYPES = ("int", "string", "datetime")


class ShortForms:
    """Turns short forms into the sections of a table's configuration.

    Args:
        frame: whose columns are looked at.

    Attributes:
        concluded: what was told by the type of a column, a line each.
    """

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self.concluded: list[str] = []

    def features(self, given: Any) -> dict[str, Any]:
        """A list of columns, or a mapping of names to a kind or to all options.

        Raises:
            ConfigError: naming the feature whose kind cannot be told, and what to write.
            DataError: as `arrow_table`.
        """
        found: dict[str, Any] = {}
        for name, options in _named(given, "features").items():
            where = f"features.{name}"
            if isinstance(options, Mapping):
                found[name] = dict(options)
                continue
            if options is not None and options not in _KINDS:
                raise ConfigError(f"{where}: {options!r} is no kind. Give {', '.join(_KINDS)}, or a mapping of options.")
            found[name] = section = self._feature(name, options, where)
            self._tell(where, section, name)
        return found

    def tasks(self, given: Any) -> list[Any]:
        """Names of label columns, whole tasks, or a mapping of names to a label or to a task's other options.

        Raises:
            ConfigError: it is neither.
        """
        if isinstance(given, Mapping):
            return [{"name": name, **(rest if isinstance(rest, Mapping) else {"label": rest})} for name, rest in given.items()]
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ConfigError(f"tasks: give a list such as ['click'], or name -> label; found {given!r}.")
        return [{"name": task, "label": f"`{task}`"} if isinstance(task, str) else task for task in given]

    def scenario(self, given: Any) -> Any:
        """The section as it is; of a column's name all its values, in their order.

        Raises:
            ConfigError: the values cannot be the names of scenarios.
            DataError: as `arrow_table`.
        """
        if not isinstance(given, str):
            return given
        column = self._column(given, "scenario")
        values = pc.drop_null(pc.unique(column)).sort().to_pylist() if _is_value(column.type) else []
        if not 2 <= len(values) <= _MOST_SCENARIOS:
            held = f"{len(values):,} values" if values or not len(column) else f"cells of type {column.type}"
            raise ConfigError(
                f"scenario: column '{given}' holds {held}; from 2 to {_MOST_SCENARIOS} integers or texts can be told for"
                " scenarios. Give {'column': ..., 'values': {value: scenario}}."
            )
        self.concluded.append(f"scenario.values: {', '.join(map(str, values))} (all values of column '{given}')")
        return {"column": given, "values": values}

    def keys(self, given: Any) -> dict[str, Any]:
        """A list of columns, or a mapping of names to a type or to all options.

        Raises:
            ConfigError: naming the key whose type cannot be told.
            DataError: as `arrow_table`.
        """
        found: dict[str, Any] = {}
        for name, options in _named(given, "keys").items():
            where = f"keys.{name}"
            if isinstance(options, Mapping):
                found[name] = dict(options)
                continue
            if options is not None and options not in _KEY_TYPES:
                raise ConfigError(f"{where}: {options!r} is no type. Give {', '.join(_KEY_TYPES)}, or a mapping of options.")
            kind = self._column(name, where).type
            if options is None and not (_is_value(kind) or pa.types.is_temporal(kind)):
                raise ConfigError(f"{where}: a key is int, string or datetime, and column '{name}' is of type {kind}.")
            told = "int" if pa.types.is_integer(kind) else "datetime" if pa.types.is_temporal(kind) else "string"
            found[name] = {"type": options or told}
            self._tell(where, found[name], name)
        return found

    def _feature(self, name: str, kind: str | None, where: str) -> dict[str, Any]:
        column = self._column(name, where)
        found = column.type
        several = is_list(found)
        cell = found.value_type if several else found
        if kind is None:
            if pa.types.is_floating(cell) and not several:
                _refuse_whole_numbers(column, name, where)
            kind = "number" if pa.types.is_floating(cell) or pa.types.is_decimal(cell) else "ids" if several else "id"
            if not (_is_value(cell) or pa.types.is_boolean(cell) or (kind == "number" and not several)):
                raise ConfigError(
                    f"{where}: what column '{name}' of type {found} is cannot be told. Integers, booleans and texts are ids,"
                    f" floats are numbers, and lists of integers or texts are several ids. Convert it, or say"
                    f" {{'{name}': {{'kind': ...}}}}."
                )
        if kind == "number":
            return {"kind": kind}
        integers = pa.types.is_integer(cell) or pa.types.is_floating(cell) or pa.types.is_decimal(cell)
        return {"kind": kind, "type": "int" if integers else "string"}

    def _column(self, name: str, where: str) -> pa.ChunkedArray:
        return values_of(arrow_table(self._frame, {name: where})[name])

    def _tell(self, where: str, section: dict[str, Any], column: str) -> None:
        told = ", ".join(f"{key}: {value}" for key, value in section.items())
        self.concluded.append(f"{where}: {{{told}}} (column of type {self._column(column, where).type})")


def _named(given: Any, argument: str) -> dict[str, Any]:
    """Name -> options; None where the name is all that is given."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"{argument}: give a list of columns, or a mapping of names to options; found {given!r}.")
    if len(set(given)) < len(given):
        raise ConfigError(f"{argument}: a name is given twice: {', '.join(given)}.")
    return dict.fromkeys(given)


def _is_value(kind: pa.DataType) -> bool:
    """Whether it is a type of ids: integers and texts."""
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(pa.types.is_integer(kind) or texts)


def _refuse_whole_numbers(column: pa.ChunkedArray, name: str, where: str) -> None:
    """Integers with missing cells become floats in pandas, so that such ids look like numbers."""
    there = pc.drop_null(column).cast(pa.float64())
    if not len(there):
        raise ConfigError(f"{where}: all cells of column '{name}' are missing. Leave it away, or say {{'{name}': 'number'}}.")
    if pc.all(pc.equal(pc.floor(there), there)).as_py():
        raise ConfigError(
            f"{where}: column '{name}' is of type {column.type}, but holds whole numbers only, as ids have them that pandas"
            f" turned into floats because some are missing. Say what it is: {{'{name}': 'id'}} or {{'{name}': 'number'}}."
        )
