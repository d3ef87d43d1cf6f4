"""The methods: what each is, in which settings it is defined, its options, its paper. Options of balancing strategies, too.

python -m apps.models [NAME ...] [--json]
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from apps.cli import run

if TYPE_CHECKING:
    from pydantic import BaseModel

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
    from mmlrec.models.base.model import NetworkConfig
    from mmlrec.registry import method
    from mmlrec.schema import Setting

    chosen = method(name)
    alias_of, balancing = ALIASES.get(name, (None, None))
    # The first paragraph of a method's file says in one sentence what it is, the second is its citation.
    first, second, *_ = [*inspect.cleandoc(sys.modules[chosen.__module__].__doc__ or "").split("\n\n"), "", ""]
    paper = "" if second.startswith("No paper") else " ".join(second.split())
    venue = re.search(r'" ?,? ?(?P<venue>[^"]*?\b(?:19|20)\d\d)[^"]*$', paper)
    return {
        "name": name,
        "alias_of": alias_of,
        "balancing": balancing,
        "summary": " ".join(first.split()).partition(": ")[2],
        "paper": paper,
        "venue": venue["venue"] if venue else "",
        "settings": {str(setting): setting in chosen.settings for setting in Setting},
        "alternative": chosen.alternative,
        "options": _options(chosen.Config, NetworkConfig),
        "example": f"python -m apps.train --config configs/{chosen.settings[0]}/movielens.yaml model.name={name}",
    }


def describe_strategy(name: str) -> dict[str, Any]:
    """A balancing strategy as plain data: `name`, `summary`, `options` and `example`, as `describe` has them."""
    from mmlrec.config import STRATEGIES, BalancingConfig, GradientBalancingConfig

    chosen = STRATEGIES[name]
    base = GradientBalancingConfig if issubclass(chosen, GradientBalancingConfig) else BalancingConfig
    return {
        "name": name,
        "summary": inspect.cleandoc(chosen.__doc__ or ""),
        "options": [option for option in _options(chosen, base) if option["name"] != "name"],
        "example": f"python -m apps.train --config configs/mtl/movielens.yaml balancing.name={name}",
    }


def _options(config: type[BaseModel], common: type[BaseModel]) -> list[dict[str, Any]]:
    """Options of a section, those of `common` last."""
    schema = config.model_json_schema()
    options = [
        {
            "name": option,
            "type": _type(content, schema.get("$defs", {})),
            "default": content.get("default"),
            "description": content.get("description", ""),
            "common": option in common.model_fields,
        }
        for option, content in schema["properties"].items()
    ]
    return sorted(options, key=lambda option: bool(option["common"]))


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
    from mmlrec.config import STRATEGIES

    lines += ["", "python -m apps.models NAME shows the options of a method; model.name=NAME trains it."]
    lines += ["The same with a balancing strategy, balancing.name=NAME:"]
    return "\n".join([*lines, *textwrap.wrap(", ".join(STRATEGIES), _WIDTH, initial_indent="  ", subsequent_indent="  ")])


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
    lines += _option_lines(found["options"], "options, model.OPTION=VALUE:", "options of all methods:")
    return "\n".join([*lines, "", "example:", f"  {found['example']}"])


def strategy_details(found: dict[str, Any]) -> str:
    """One strategy, from `describe_strategy`."""
    lines = textwrap.wrap(f"{found['name']}: {found['summary']}", _WIDTH)
    lines += _option_lines(found["options"], "options, balancing.OPTION=VALUE:", "options it shares with others of its kind:")
    return "\n".join(
        [*lines, "", "example:", f"  {found['example']}", "", "What it computes, and its paper: docs/balancing/README.md"]
    )


def _option_lines(options: list[dict[str, Any]], own: str, shared: str) -> list[str]:
    lines = []
    for common, title in ((False, own), (True, shared)):
        rows = [option for option in options if option["common"] is common]
        lines += ["", title] if rows else []
        for option in rows:
            lines.append(f"  {option['name']} = {json.dumps(option['default'])}    [{option['type']}]")
            lines += textwrap.wrap(option["description"], _WIDTH - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m apps.models",
        description="List all methods, or show the options, settings and paper of some.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m apps.models\n  python -m apps.models mmoe pcgrad\n  python -m apps.models --json mmoe",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods or strategies; all methods, a line each, when absent")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args()


def main() -> None:
    """Print what was asked for."""
    arguments = parse()
    from mmlrec.config import STRATEGIES
    from mmlrec.registry import aliases, method_names

    names = arguments.names or ([*method_names(), *aliases()] if arguments.json else [])
    pairs = [(name, describe_strategy(name) if name in STRATEGIES else describe(name)) for name in names]
    if arguments.json:
        print(json.dumps([found for _, found in pairs], indent=2))
    elif arguments.names:
        shown = [strategy_details(found) if name in STRATEGIES else details(found) for name, found in pairs]
        print("\n\n\n".join(shown))
    else:
        print(overview())


if __name__ == "__main__":
    run(main)
