"""The methods: what each is, in which settings it is defined, its options, its paper.

python -m apps.models [NAME ...] [--json]
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
from typing import Any

from apps.cli import run

_WIDTH = 120


def describe(name: str) -> dict[str, Any]:
    """All that a method's file says about it, as plain data.

    Returns:
        `name`, `alias_of` (the method that an alias stands for, else None), `balancing` (the strategy that comes with the
        alias, else None), `summary`, `paper` (the citation; empty where there is none) and `venue`, `settings` (setting ->
        whether it is defined there), `alternative` (what to use in the others), `options` and `example`, a command.

    Raises:
        ConfigError: no such method.
    """
    from mmlrec.config import ALIASES
    from mmlrec.models.base import NetworkConfig
    from mmlrec.registry import method
    from mmlrec.schema import Setting

    chosen = method(name)
    alias_of, balancing = ALIASES.get(name, (None, None))
    # The first paragraph of a method's file says in one sentence what it is, the second is its citation.
    first, second, *_ = [*inspect.cleandoc(sys.modules[chosen.__module__].__doc__ or "").split("\n\n"), "", ""]
    paper = "" if second.startswith("No paper") else " ".join(second.split())
    venue = re.search(r'" ?,? ?(?P<venue>[^"]*?\b(?:19|20)\d\d)[^"]*$', paper)
    schema = chosen.Config.model_json_schema()
    options = [
        {
            "name": option,
            "type": _type(content, schema.get("$defs", {})),
            "default": content.get("default"),
            "description": content.get("description", ""),
            "common": option in NetworkConfig.model_fields,
        }
        for option, content in schema["properties"].items()
    ]
    return {
        "name": name,
        "alias_of": alias_of,
        "balancing": balancing,
        "summary": " ".join(first.split()).partition(": ")[2],
        "paper": paper,
        "venue": venue["venue"] if venue else "",
        "settings": {str(setting): setting in chosen.settings for setting in Setting},
        "alternative": chosen.alternative,
        "options": sorted(options, key=lambda option: bool(option["common"])),
        "example": f"python -m apps.train --config configs/{chosen.settings[0]}/movielens.yaml model.name={name}",
    }


def _type(content: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "$ref" in content:
        return _type(definitions[content["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in content:
        return ", or ".join(_type(choice, definitions) for choice in content["anyOf"])
    if "enum" in content or "const" in content:
        return " | ".join(map(str, content.get("enum", [content.get("const")])))
    kind = content.get("type", "any")
    if kind == "array":
        least = f"{content['minItems']} or more " if content.get("minItems") else ""
        members = re.sub("^(integer|number|string)", r"\1s", _type(content.get("items", {}), definitions))
        return f"list of {least}{members}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {content[key]:g}" for key, sign in signs.items() if key in content]
    return " ".join([{"boolean": "true | false", "null": "null"}.get(kind, kind), ", ".join(bounds)]).rstrip()


def overview() -> str:
    """One line for each method."""
    from mmlrec.registry import aliases, method_names
    from mmlrec.schema import Setting

    methods = [describe(name) for name in [*method_names(), *aliases()]]
    name_width, venue_width = (max(len(m[key]) for m in methods) for key in ("name", "venue"))
    lines = [f"{'method':<{name_width}}  {'  '.join(Setting)}  {'paper':<{venue_width}}  what it is"]
    for found in methods:
        settings = "  ".join(f"{'yes' if has else '-':<{len(setting)}}" for setting, has in found["settings"].items())
        meaning = _stands_for(found) or found["summary"].partition(". ")[0].removesuffix(".")
        lines.append(f"{found['name']:<{name_width}}  {settings}  {found['venue'] or '-':<{venue_width}}  {meaning}")
    return "\n".join([*lines, "", "python -m apps.models NAME shows the options of a method; model.name=NAME trains it."])


def _stands_for(found: dict[str, Any]) -> str:
    """What an alias is short for; empty for a method."""
    return f"{found['alias_of']} with balancing.name={found['balancing']}" if found["alias_of"] else ""


def details(found: dict[str, Any]) -> str:
    """One method, from `describe`."""
    supported = [setting for setting, has in found["settings"].items() if has]
    missing = [setting for setting, has in found["settings"].items() if not has]
    lines = [f"{found['name']} is short for {_stands_for(found)}.", ""] if found["alias_of"] else []
    lines += textwrap.wrap(f"{found['alias_of'] or found['name']}: {found['summary']}", _WIDTH)
    lines += textwrap.wrap(found["paper"], _WIDTH)
    lines += ["", f"settings: {', '.join(supported)}"]
    if missing:
        lines += textwrap.wrap(f"not in {', '.join(missing)}: {found['alternative']}", _WIDTH)
    for common, title in ((False, "options, model.OPTION=VALUE:"), (True, "options of all methods:")):
        rows = [option for option in found["options"] if option["common"] is common]
        lines += ["", title] if rows else []
        for option in rows:
            lines.append(f"  {option['name']} = {json.dumps(option['default'])}    [{option['type']}]")
            lines += textwrap.wrap(option["description"], _WIDTH - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, "", "example:", f"  {found['example']}"])


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m apps.models",
        description="List all methods, or show the options, settings and paper of some.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m apps.models\n  python -m apps.models mmoe ple\n  python -m apps.models --json mmoe",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods to show; all, a line each, when absent")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args()


def main() -> None:
    """Print what was asked for."""
    arguments = parse()
    from mmlrec.registry import aliases, method_names

    if arguments.json:
        print(json.dumps([describe(name) for name in arguments.names or [*method_names(), *aliases()]], indent=2))
    elif arguments.names:
        print("\n\n\n".join(details(describe(name)) for name in arguments.names))
    else:
        print(overview())


if __name__ == "__main__":
    run(main)
