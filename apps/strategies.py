"""The balancing strategies: what each is, its options, its paper; and their pages in docs/balancing.

python -m apps.strategies [NAME ...] [--pages DIR]
"""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from apps.cli import add_import, run
from apps.listing import WIDTH, docstring, option_lines, options_of
from mmlrec.errors import UserError
from mmlrec.extensions import import_modules
from mmlrec.paths import local_path


def describe(name: str) -> dict[str, Any]:
    """All that a strategy's file says about it, as plain data.

    Returns:
        `name`, `summary`, `paper` (the citation; empty where there is none) and `venue`, `options` and `example`, a command.

    Raises:
        ConfigError: no such strategy.
    """
    from mmlrec.balancing.base import BalancingConfig
    from mmlrec.balancing.gradients import GradientBalancingConfig
    from mmlrec.registry import strategy

    chosen = strategy(name)
    common = GradientBalancingConfig if issubclass(chosen.Config, GradientBalancingConfig) else BalancingConfig
    _, said = docstring(chosen)
    return {
        "name": name,
        "summary": said["summary"],
        "paper": said["paper"],
        "venue": said["venue"],
        "options": options_of(chosen.Config, common),
        "example": f"python -m apps.train --config configs/mtl/movielens.yaml balancing.name={name}",
    }


def overview() -> str:
    """One line for each strategy."""
    from mmlrec.registry import strategy_names

    found, broken = [], []
    for name in strategy_names():
        try:
            found.append(describe(name))
        except UserError as error:  # A package of somebody else: the others are listed all the same.
            broken.append(str(error))
    name_width, venue_width = (max(len(s[key]) for s in found) for key in ("name", "venue"))
    lines = [f"{'strategy':<{name_width}}  {'paper':<{venue_width}}  what it is"]
    for each in found:
        meaning = each["summary"].partition(". ")[0].removesuffix(".")
        lines.append(f"{each['name']:<{name_width}}  {each['venue'] or '-':<{venue_width}}  {meaning}")
    more = "python -m apps.strategies NAME shows the options of a strategy; balancing.name=NAME trains with it."
    return "\n".join([*lines, *broken, "", more])


def details(found: dict[str, Any]) -> str:
    """One strategy, from `describe`."""
    lines = textwrap.wrap(f"{found['name']}: {found['summary']}", WIDTH) + textwrap.wrap(found["paper"], WIDTH)
    lines += option_lines(found["options"], "options, balancing.OPTION=VALUE:", "options it shares with others of its kind:")
    return "\n".join([*lines, "", "example:", f"  {found['example']}"])


def page(name: str) -> str:
    """The page of a strategy of this package, in Markdown: its docstring and its options."""
    from mmlrec.registry import strategy

    text, said = docstring(strategy(name))
    rest = text.partition("\n\n")[2]
    file = f"mmlrec/balancing/strategies/{name}.py"
    own = [option for option in describe(name)["options"] if not option["common"]]
    rows = [f"| `{o['name']}` | {json.dumps(o['default'])} | {_cell(o['type'])} | {_cell(o['description'])} |" for o in own]
    table = (
        ["| option | default | values | meaning |", "| --- | --- | --- | --- |", *rows, ""] if own else ["None of its own.", ""]
    )
    summary = said["summary"]
    lines = [
        *(f"# {said['title']}", ""),
        *(f"`balancing.name: {name}` · [{file}](../../{file})", ""),
        *(summary[0].upper() + summary[1:], "", rest, ""),
        *("## Options", "", *table),
        "Signs, and the options of all strategies: [Balancing](README.md). This page is made from the docstring and the",
        "options of the file, by `python -m apps.strategies --pages docs/balancing`.",
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def own_names() -> list[str]:
    """The strategies that are part of this package."""
    from mmlrec.registry import strategy, strategy_names

    return [name for name in strategy_names() if strategy(name).__module__.startswith("mmlrec.")]


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m apps.strategies",
        description="List all balancing strategies, or show the options and paper of some.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m apps.strategies\n  python -m apps.strategies pcgrad cagrad",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="strategies; all, a line each, when absent")
    add_import(parser)
    parser.add_argument(
        "--pages", type=local_path, metavar="DIR", help="write a page for each of this package's into DIR and stop"
    )
    return parser.parse_args()


def main() -> None:
    """Print what was asked for, or write the pages."""
    arguments = parse()
    import_modules(arguments.imports)
    if arguments.pages is not None:
        for name in own_names():
            (arguments.pages / f"{name}.md").write_text(page(name), encoding="utf-8")
    elif arguments.names:
        print("\n\n\n".join(details(describe(name)) for name in arguments.names))
    else:
        print(overview())


if __name__ == "__main__":
    run(main)
