"""The card of an exported model, `model.json`: read, and checked as far as serving reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmlrec.encoding.mapped import check_mark
from mmlrec.errors import DataError

CARD = "model.json"
#: Forms of the folder that this release reads; it writes the lowest one whose readers read it right. 2: tables are managed.
READABLE_FORMS = (1, 2)
AGAIN = "Export the model again: python -m apps.export --run-dir RUN --out MODEL."

#: What serving reads of a card: key -> what it is; of the objects in a list the same again.
_WANTED: dict[str, Any] = {
    "network": {"file": str, "format": str, "outputs": list},
    "tables": [{"name": str, "file": str, "rows": int, "dim": int, "dtype": str}],
    "lookups": [[{"feature": str, "table": str, "pooling": str}]],
    "dense": [str],
    "features": [{"name": str, "examples": list}],
    "multi_scenario": bool,
}


def read_card(folder: Path) -> dict[str, Any]:
    """The card of an exported model.

    Raises:
        DataError: the folder is no exported model, or one that this release does not read; its card is damaged, or files are
            not those that were written with it.
    """
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"it has no {CARD}" if folder.is_dir() else "the folder does not exist"
        if path.exists():
            hint = f"{path} cannot be read: {error.strerror}"
        raise DataError(
            f"{folder} is not an exported model: {hint}. Make one with: python -m apps.export --run-dir RUN --out {folder}"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: no JSON ({error}). {AGAIN}") from error
    form = card.get("form") if isinstance(card, dict) else None
    if form not in READABLE_FORMS:
        read = ", ".join(map(str, READABLE_FORMS))
        raise DataError(f"{path}: an exported model of form {form!r}, this release reads {read}. {AGAIN}")
    if wrong := _mismatch(card, _WANTED, ""):
        raise DataError(f"{path} is damaged: {wrong}. {AGAIN}")
    if not card["lookups"]:
        raise DataError(f"{path} is damaged: lookups is empty. {AGAIN}")
    tables = {table["name"] for table in card["tables"]}
    for name, of in card.get("files", {}).items():  # so that parts of two exports are no model
        try:
            check_mark(folder / name, of)
        except (OSError, KeyError, TypeError) as error:
            raise DataError(f"{folder / name} cannot be read, which {path} names: {error}. {AGAIN}") from error
    for branch in card["lookups"]:
        for lookup in branch:
            if lookup["table"] not in tables:
                raise DataError(
                    f"{path} is damaged: feature '{lookup['feature']}' is looked up in table '{lookup['table']}',"
                    f" which is not listed. {AGAIN}"
                )
    return card


def _mismatch(found: Any, wanted: Any, key: str) -> str:
    """The first place that is not as wanted, in words; empty where all are."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return f"{key} is no object"
        for name, of in wanted.items():
            inner = f"{key}.{name}" if key else name
            if name not in found:
                return f"{inner} is missing"
            if wrong := _mismatch(found[name], of, inner):
                return wrong
        return ""
    if isinstance(wanted, list):
        if not isinstance(found, list):
            return f"{key} is no list"
        return next((wrong for i, item in enumerate(found) if (wrong := _mismatch(item, wanted[0], f"{key}[{i}]"))), "")
    return "" if isinstance(found, wanted) else f"{key} is {found!r}, not of type {wanted.__name__}"
