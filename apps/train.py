"""Train one configuration.

python -m apps.train --config FILE [key.path=value ...]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from apps.cli import Parser, add_import, add_overrides, all_imported, run
from mmlrec.extensions import import_modules
from mmlrec.storage.places import place

_EPILOG = """\
examples:
  python -m apps.train --config configs/mtl/movielens.yaml
  python -m apps.train --config configs/mtl/movielens.yaml model.name=shared_bottom training.max_steps=200
  torchrun --standalone --nproc-per-node 2 -m apps.train --config configs/mtl/movielens.yaml

A run folder that holds a complete checkpoint is resumed, also with another number of processes. The test split is
evaluated once, at the end, with the checkpoint that was best in validation.
"""


#: Most steps of a profile: each takes megabytes of memory, and a trace must not be too large for its viewer.
_MOST_STEPS = 200


class _ListMethods(argparse.Action):
    """Prints all methods, those of an --import before it, too, and ends, as --help does: nothing else has to be given."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        from apps.models import overview

        import_modules(namespace.imports)
        print(overview())
        parser.exit()


def steps_to_profile(text: str) -> tuple[int, int]:
    """First and last step of `START:END`.

    Raises:
        argparse.ArgumentTypeError: it is nothing of the kind.
    """
    found = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last < first + _MOST_STEPS:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not START:END, the first and the last step to record, counted from 1, such as 100:110;"
            f" at most {_MOST_STEPS} steps"
        )
    return first, last


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = Parser(
        prog="python -m apps.train", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, or the name of a shipped one, such as mtl/movielens")
    parser.add_argument(
        "--run-dir",
        type=place,
        help="where to write, a folder or s3://bucket/name; default: run_dir of the config, else a name made from it",
    )
    parser.add_argument("--resume", action="store_true", help="fail unless the run folder holds a checkpoint to resume from")
    backwards = parser.add_mutually_exclusive_group()
    backwards.add_argument(
        "--restart", action="store_true", help="begin again at step 0 where all checkpoints, or the best one, are damaged"
    )
    backwards.add_argument(
        "--from-step",
        type=int,
        metavar="N",
        help="go back to the checkpoint of step N of the run in --run-dir, for one that diverged: learning rates,"
        " dense.clip_norm and schedule may differ; later checkpoints are deleted",
    )
    parser.add_argument(
        "--profile",
        type=steps_to_profile,
        metavar="START:END",
        help="record these steps: a trace of each rank (for https://ui.perfetto.dev) and a table of the step's parts, in"
        " RUN/profile",
    )
    parser.add_argument("--show", action="store_true", help="check the configuration, print it in full and stop")
    parser.add_argument("--list", nargs=0, action=_ListMethods, help="print the methods (model.name) and stop")
    add_import(parser)
    add_overrides(parser)
    return parser.parse_intermixed_args()


def main() -> None:
    """Check the configuration, then train."""
    arguments = parse()
    import_modules(arguments.imports)
    from mmlrec.registry import load

    config = load(arguments.config, arguments.overrides)
    if arguments.show:
        if place(config.dataset.path).is_dir():
            from mmlrec.session.parts import branches_of, build_parts
            from mmlrec.training.monitor import build_monitor, metrics_of_cvr

            manifest, network, *_ = build_parts(config, arguments.config)
            branches, cvr = branches_of(network, manifest), metrics_of_cvr(network)
            monitor = build_monitor(config.training.monitor, manifest, network.spec.tasks, branches, cvr=cvr)
            for note in monitor.notes:
                print(f"note: {note}", file=sys.stderr)
        else:
            print(
                f"note: there is no dataset folder {config.dataset.path}: training would be refused. Tasks, scenarios, fields"
                " and objectives have not been checked. Make it first, python -m preprocessing; or give dataset.path=FOLDER.",
                file=sys.stderr,
            )
        print(config.to_yaml(), end="")
        return
    from mmlrec.distributed.world import process_group
    from mmlrec.metrics.notes import report_text
    from mmlrec.training.run import default_run_dir, train

    run_dir = arguments.run_dir or default_run_dir(config, Path(arguments.config))
    all_imported()
    with process_group(config.training.timeout) as world:
        report = train(
            config,
            run_dir,
            world,
            resume=arguments.resume,
            restart=arguments.restart,
            from_step=arguments.from_step,
            source=arguments.config,
            profiled=arguments.profile,
        )
        if world.is_main:
            print(f"\nTest, best checkpoint by validation ({run_dir}):\n{report_text(report, 'test')}")


if __name__ == "__main__":
    run(main)
