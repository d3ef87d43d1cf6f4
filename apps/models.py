"""The methods: what each is, in which settings it is defined, its options, its paper. Balancing strategies by name, too.

python -m apps.models [NAME ...] [--json]
"""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from apps import strategies
from apps.cli import add_import, run
from apps.listing import WIDTH, docstring, option_lines, options_of
from mmlrec.errors import UserError
from mmlrec.extensions import import_modules


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
    _, said = docstring(chosen)
    return {
        "name": name,
        "alias_of": alias_of,
        "balancing": balancing,
        "summary": said["summary"],
        "paper": said["paper"],
        "venue": said["venue"],
        "settings": {str(setting): setting in chosen.settings for setting in Setting},
        "alternative": chosen.alternative,
        "options": options_of(chosen.Config, NetworkConfig),
        "example": f"python -m apps.train --config configs/{chosen.settings[0]}/movielens.yaml model.name={name}",
    }


def overview() -> str:
    """One line for each method."""
    from mmlrec.registry import aliases, method_names, strategy_names
    from mmlrec.schema import Setting

    methods, broken = [], []
    for name in [*method_names(), *aliases()]:
        try:
            methods.append(describe(name))
        except UserError as error:  # A package of somebody else: the others are listed all the same.
            broken.append(str(error))
    name_width, venue_width = (max(len(m[key]) for m in methods) for key in ("name", "venue"))
    lines = [f"{'method':<{name_width}}  {'  '.join(Setting)}  {'paper':<{venue_width}}  what it is"]
    for found in methods:
        settings = "  ".join(f"{'yes' if has else '-':<{len(setting)}}" for setting, has in found["settings"].items())
        meaning = _stands_for(found) or found["summary"].partition(". ")[0].removesuffix(".")
        lines.append(f"{found['name']:<{name_width}}  {settings}  {found['venue'] or '-':<{venue_width}}  {meaning}")
    lines += broken
    lines += ["", "python -m apps.models NAME shows the options of a method; model.name=NAME trains it."]
    lines += ["The same with a balancing strategy, balancing.name=NAME:"]
    return "\n".join([*lines, *textwrap.wrap(", ".join(strategy_names()), WIDTH, initial_indent="  ", subsequent_indent="  ")])


def _stands_for(found: dict[str, Any]) -> str:
    """What an alias is short for; empty for a method."""
    return f"{found['alias_of']} with balancing.name={found['balancing']}" if found["alias_of"] else ""


def details(found: dict[str, Any]) -> str:
    """One method, from `describe`."""
    supported = [setting for setting, has in found["settings"].items() if has]
    missing = [setting for setting, has in found["settings"].items() if not has]
    lines = [f"{found['name']} is short for {_stands_for(found)}.", ""] if found["alias_of"] else []
    lines += textwrap.wrap(f"{found['alias_of'] or found['name']}: {found['summary']}", WIDTH)
    lines += textwrap.wrap(found["paper"], WIDTH)
    lines += ["", f"settings: {', '.join(supported)}"]
    if missing:
        lines += textwrap.wrap(f"not in {', '.join(missing)}: {found['alternative']}", WIDTH)
    lines += option_lines(found["options"], "options, model.OPTION=VALUE:", "options of all methods:")
    return "\n".join([*lines, "", "example:", f"  {found['example']}"])


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m apps.models",
        description="List all methods, or show the options, settings and paper of some.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m apps.models\n  python -m apps.models mmoe pcgrad\n  python -m apps.models --json mmoe",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods or strategies; all methods, a line each, when absent")
    add_import(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args()


def main() -> None:
    """Print what was asked for."""
    arguments = parse()
    import_modules(arguments.imports)
    from mmlrec.registry import aliases, method_names, strategy_names

    names = arguments.names or ([*method_names(), *aliases()] if arguments.json else [])
    balancing = strategy_names()
    pairs = [(name in balancing, strategies.describe(name) if name in balancing else describe(name)) for name in names]
    if arguments.json:
        print(json.dumps([found for _, found in pairs], indent=2))
    elif arguments.names:
        print("\n\n\n".join(strategies.details(found) if of_strategy else details(found) for of_strategy, found in pairs))
    else:
        print(overview())


if __name__ == "__main__":
    run(main)
