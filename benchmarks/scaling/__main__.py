"""Weak and strong scaling of training: one axis varied at a time around a base point, measured where it fits, planned beyond.

python -m benchmarks.scaling --out runs/scaling                                       # on this machine, 1 and 2 ranks
python -m benchmarks.scaling --out runs/scaling --preset slurm-2n --ranks 8,16        # a job for each number of ranks
torchrun ... -m benchmarks.scaling --out runs/scaling                                 # the ranks that there are
python -m benchmarks.scaling --out runs/scaling --page                                # tables and curves of what is there

Each point trains in fresh processes on a few generated batches that stay on the device: no reader takes part. OUT gets a CSV
file for each number of ranks; a point that is measured there is not measured again. See docs/scaling.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from apps.cli import Parser, add_overrides, run
from benchmarks.scaling.points import AXES, FEATURES, Point
from mmlrec.errors import ConfigError, UserError
from mmlrec.launch.presets import load_preset
from mmlrec.paths import local_path


def numbers(text: str) -> list[int]:
    """Whole numbers above 0, such as 1e5,1e6; none of an empty text.

    Raises:
        argparse.ArgumentTypeError: it is nothing of the kind.
    """
    try:
        found = [int(float(word)) for word in text.split(",") if word]
    except (ValueError, OverflowError):
        found = [0]
    if any(number < 1 for number in found):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of whole numbers above 0, such as 1e5,1e6")
    return found


def point(text: str) -> Point:
    """The base point from what of it is told, such as batch=65536,tasks=4.

    Raises:
        argparse.ArgumentTypeError: it is nothing of the kind.
    """
    pairs = [word.partition("=") for word in text.split(",") if word]
    if unknown := {name for name, _, _ in pairs} - {*AXES}:
        raise argparse.ArgumentTypeError(f"no axis '{min(unknown)}': {', '.join(AXES)}")
    if without := [name for name, _, value in pairs if not value]:
        raise argparse.ArgumentTypeError(f"'{without[0]}' needs a number, such as {without[0]}={getattr(Point(), without[0])}")
    return Point(**{name: numbers(value)[0] for name, _, value in pairs})


def number(text: str) -> int:
    """One whole number above 0.

    Raises:
        argparse.ArgumentTypeError: it is nothing of the kind.
    """
    if not re.fullmatch("[0-9]{1,7}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def positive(text: str) -> float:
    """A number above 0.

    Raises:
        argparse.ArgumentTypeError: it is nothing of the kind.
    """
    if (found := _finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
    return found


def not_negative(text: str) -> float:
    """A number of 0 or more.

    Raises:
        argparse.ArgumentTypeError: it is nothing of the kind.
    """
    if (found := _finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of 0 or more")
    return found


def _finite(text: str) -> float:
    """A number; -1 where it is none, or has no end."""
    try:
        return found if math.isfinite(found := float(text)) else -1.0
    except ValueError:
        return -1.0


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = Parser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=local_path, default=Path("runs/scaling"), help="folder of the results (runs/scaling)")
    add("--ranks", type=numbers, help="numbers of ranks (1,2); with --preset those of the preset")
    add("--preset", help="send jobs of a preset of torchx.yaml instead of measuring here")
    add("--base", type=point, default=Point(), help="the point that the axes vary, such as batch=65536,ids=1e7")
    for axis, values in AXES.items():
        add(f"--{axis}", type=numbers, default=[*values], help=f"values; '' for none ({','.join(f'{v:g}' for v in values)})")
    add("--planned-ranks", type=numbers, default=[4, 8, 16, 32, 64], help="numbers of ranks to plan, too (4,8,16,32,64)")
    add("--ranks-per-host", type=number, help="of the plans; those of the job, here the largest of --ranks")
    add("--device", choices=["cpu", "cuda"], help="cuda where there is one")
    add("--threads", type=number, default=1, help="CPU threads of each rank (1)")
    add("--config", default="scaling/synthetic", help="configuration that all points share (scaling/synthetic)")
    add("--zipf", type=not_negative, default=0.0, help="exponent of the distribution of ids; 0: uniform, the worst for caches")
    add("--seconds", type=positive, default=4.0, help="to train for at each point (4)")
    add("--limit", type=positive, default=600.0, help="seconds after which a point is given up (600)")
    add("--again", action="store_true", help="measure again what is there")
    add("--page", action="store_true", help="measure nothing: make the page of what is there")
    add_overrides(parser)
    options = parser.parse_intermixed_args(given)
    if (fewest := min([options.base.ids, *options.ids])) < 2 * FEATURES:
        parser.error(f"{fewest} ids are too few: {FEATURES} tables share them, and each has one for missing values")
    return options


def words(options: argparse.Namespace) -> list[str]:
    """The command line of a job with these options, but --out, --ranks and --preset."""
    base = asdict(options.base)
    found = ["--base", ",".join(f"{axis}={base[axis]}" for axis in AXES)]
    for name in (*AXES, "planned_ranks"):
        found += [f"--{name.replace('_', '-')}={','.join(map(str, getattr(options, name)))}"]
    for name in ("ranks_per_host", "device", "threads", "config", "zipf", "seconds", "limit"):
        if getattr(options, name) is not None:
            found += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return [*found, *(["--again"] if options.again else []), *options.overrides]


def here(options: argparse.Namespace) -> None:
    """Measure on this machine, one number of ranks after the other."""
    from benchmarks.scaling.page import check_page

    check_page(options.out)
    ranks = options.ranks or [1, 2]
    options.ranks_per_host = options.ranks_per_host or max(ranks)
    failed = 0
    for number in ranks:
        launcher = ["-m", "mmlrec.launch.agent", "--standalone", "--nproc-per-node", str(number)]
        command = [sys.executable, *launcher, "-m", "benchmarks.scaling", "--out", str(options.out), *words(options)]
        code = subprocess.run(command, check=False).returncode
        if code in (2, 130):
            sys.exit(code)
        failed = failed or code
    page(options.out)
    if failed:
        raise UserError("not all points could be measured; see above. The same command tries those again.")


def submit(options: argparse.Namespace) -> None:
    """Send a job for each number of ranks to the scheduler of the preset.

    Raises:
        ConfigError: the preset cannot be cut to a number of ranks.
    """
    preset = load_preset(options.preset)
    for number in options.ranks or [preset.most_nodes * preset.nproc]:
        nodes, nproc = (number // preset.nproc, preset.nproc) if number > preset.nproc else (1, number)
        if nodes * nproc != number:
            raise ConfigError(f"--ranks {number}: no multiple of the {preset.nproc} processes of a node of {options.preset}.")
        told = words(argparse.Namespace(**{**vars(options), "ranks_per_host": options.ranks_per_host or preset.nproc}))
        shape = ["--preset", options.preset, "--nodes", str(nodes), "--nproc", str(nproc), "--out", str(options.out)]
        code = subprocess.run([sys.executable, "-m", "apps.launch", "scaling", *shape, "--", *told], check=False).returncode
        if code:
            sys.exit(code)


def page(folder: Path) -> None:
    """Write tables and curves of the results in a folder."""
    from benchmarks.scaling.page import write_page

    if importlib.util.find_spec("matplotlib") is None:
        print("No curves: matplotlib is not installed (pip install 'mmlrec[plots]'); --page makes them later.")
        return
    print(write_page(folder))


def main() -> None:
    """Measure, submit, or show."""
    options = parse()
    if options.page:
        page(options.out)
    elif "RANK" in os.environ:
        from benchmarks.scaling.job import work

        work(options)
    elif options.preset:
        submit(options)
    else:
        here(options)


if __name__ == "__main__":
    run(main)
