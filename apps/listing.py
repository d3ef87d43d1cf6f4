"""What the listings of methods and of strategies share: the first docstring of a file, and options as data and as text."""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

WIDTH = 120


def docstring(chosen: type) -> tuple[str, dict[str, str]]:
    """The first docstring of the file that defines a class, and what its first two paragraphs say.

    Returns:
        The docstring; and `title` and `summary`, the first paragraph before and after its colon, `paper`, the second one (the
        citation; empty where there is none), and `venue`, its end.
    """
    text = inspect.cleandoc(sys.modules[chosen.__module__].__doc__ or "")
    first, second, *_ = [*text.split("\n\n"), "", ""]
    paper = "" if second.startswith("No paper") else " ".join(second.split())
    venue = re.search(r'" ?,? ?(?P<venue>[^"]*?\b(?:19|20)\d\d)[^"]*$', paper)
    title, _, summary = " ".join(first.split()).partition(": ")
    return text, {"title": title, "summary": summary, "paper": paper, "venue": venue["venue"] if venue else ""}


def options_of(config: type[BaseModel], common: type[BaseModel]) -> list[dict[str, Any]]:
    """Options of a section, those of `common` last."""
    schema = config.model_json_schema()
    options = [
        {
            "name": option,
            "type": _words(content, schema.get("$defs", {})),
            "default": content.get("default"),
            "description": content.get("description", ""),
            "common": option in common.model_fields,
        }
        for option, content in schema["properties"].items()
    ]
    return sorted(options, key=lambda option: bool(option["common"]))


def _words(content: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "$ref" in content:
        return _words(definitions[content["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in content:
        return ", or ".join(_words(choice, definitions) for choice in content["anyOf"])
    if "enum" in content or "const" in content:
        return " | ".join(map(str, content.get("enum", [content.get("const")])))
    kind = content.get("type", "any")
    if kind == "array":
        least = f"{content['minItems']} or more " if content.get("minItems") else ""
        members = re.sub("^(integer|number|string)", r"\1s", _words(content.get("items", {}), definitions))
        return f"list of {least}{members}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {content[key]:g}" for key, sign in signs.items() if key in content]
    return " ".join([{"boolean": "true | false", "null": "null"}.get(kind, kind), ", ".join(bounds)]).rstrip()


def option_lines(options: list[dict[str, Any]], own: str, shared: str) -> list[str]:
    """Options from `options_of` as text, those of `common` last; `own` and `shared` are the titles of the two lists."""
    lines = []
    for common, title in ((False, own), (True, shared)):
        rows = [option for option in options if option["common"] is common]
        lines += ["", title] if rows else []
        for option in rows:
            lines.append(f"  {option['name']} = {json.dumps(option['default'])}    [{option['type']}]")
            lines += textwrap.wrap(option["description"], WIDTH - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines
