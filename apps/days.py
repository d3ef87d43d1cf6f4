"""Measure each day's model on the next day, then train it on that day.

python -m apps.days --config FILE --days "data/day-*" --run-dir DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from apps.cli import Parser, add_import, all_imported, run
from mmlrec.extensions import import_modules
from mmlrec.storage.places import place

_EPILOG = """\
examples:
  python -m preprocessing table --config day-01.yaml --out data/day-01
  python -m preprocessing table --config day-02.yaml --extend data/day-01 --out data/day-02
  python -m apps.days --config mtl/movielens --days "data/day-*" --run-dir runs/days training.epochs=1
  torchrun --standalone --nproc-per-node 2 -m apps.days --config mtl/movielens --days "data/day-*" --run-dir runs/days

Days are dataset folders in the order of their names, each made with --extend of the one before. DIR/NAME is the run folder of a
day, DIR/days.jsonl has a line for each with all its metrics, DIR/days.png the curves (pip install 'mmlrec[plots]'). The same
command goes on where it was stopped or killed, and with days that were added since.
"""


def _number_of_days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of days, such as 30")
    return int(text)


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = Parser(
        prog="python -m apps.days", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, or the name of a shipped one, such as mtl/movielens")
    parser.add_argument("--days", required=True, metavar="PATTERN", help="dataset folders of the days, in quotes")
    parser.add_argument(
        "--run-dir", type=place, required=True, help="where to write: a run folder for each day, and the record"
    )
    parser.add_argument(
        "--forget-after",
        type=_number_of_days,
        metavar="N",
        help="rows of the tables whose values were not in train for N days start afresh, as new ones; none do unless given",
    )
    add_import(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override configuration keys, for each day")
    return parser.parse_intermixed_args()


def main() -> None:
    """Check the days, then go through them."""
    arguments = parse()
    import_modules(arguments.imports)
    from mmlrec.days.folders import find_days
    from mmlrec.errors import ConfigError
    from mmlrec.registry import load

    for override in arguments.overrides:
        if "=" not in override and Path(override).exists():
            raise ConfigError(f"{override}: the shell has spelt out --days. Put the pattern into quotes, so that it leaves it.")
        if override.startswith(("dataset.path=", "run_dir=")):
            raise ConfigError(f"{override}: is of each day; give --days and --run-dir.")
    days = find_days(arguments.days)
    config = load(arguments.config, [*arguments.overrides, f"dataset.path={json.dumps(str(days[0].folder))}", "run_dir=null"])
    from mmlrec.days.run import run_days
    from mmlrec.days.table import days_table
    from mmlrec.distributed.world import process_group

    all_imported()
    with process_group(config.training.timeout) as world:
        lines = run_days(config, days, arguments.run_dir, world, forget_after=arguments.forget_after, source=arguments.config)
        if world.is_main:
            print(f"\nEach day by the model of the day before ({arguments.run_dir}):\n{days_table(lines)}")


if __name__ == "__main__":
    run(main)
