"""Evaluate the best checkpoint of a run.

python -m apps.evaluate --run-dir DIR
"""

from __future__ import annotations

import argparse
import errno

from apps.cli import Parser, add_import, all_imported, run
from mmlrec.errors import UserError
from mmlrec.extensions import import_modules
from mmlrec.storage.places import place


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = Parser(
        prog="python -m apps.evaluate",
        description="Evaluate the best checkpoint of a run: per task x scenario AUC, logloss, normalised entropy, calibration"
        " and GAUC, or errors and R² of regression tasks, as a table and in RUN/result.json. Works at any number of processes."
        " With --input, of other rows that are encoded alike (docs/new_rows.md), or with another training.precision, as a table"
        " alone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m apps.evaluate --run-dir runs/mtl-movielens-mmoe-seed0\n"
        "  python -m apps.evaluate --run-dir runs/mtl-movielens-mmoe-seed0 --input data/next-week",
    )
    parser.add_argument("--run-dir", type=place, required=True, help="run folder")
    parser.add_argument(
        "--input",
        type=place,
        help="dataset folder encoded like the run's, in place of its own; the same as dataset.path=FOLDER",
    )
    parser.add_argument("--split", metavar="NAME", help="default: test, or the only split of the input")
    add_import(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. embeddings.sharding=row_wise")
    return parser.parse_intermixed_args()


def main() -> None:
    """Load, evaluate, report."""
    arguments = parse()
    import_modules(arguments.imports)
    from mmlrec.distributed.stopping import StopSignal
    from mmlrec.distributed.world import process_group
    from mmlrec.evaluation.evaluation import check_labels, choose_split, evaluate_split, write_result
    from mmlrec.metrics.notes import report_text
    from mmlrec.run_folder.folder import RunFolder
    from mmlrec.schema import DatasetManifest
    from mmlrec.session.session import load_session

    folder = RunFolder(arguments.run_dir)
    timeout = folder.read_config(arguments.overrides).training.timeout
    all_imported()
    with process_group(timeout) as world:
        session, step, otherwise, rows = load_session(folder, world, arguments.overrides, arguments.input)
        manifest, there = (session.manifest, session.encoder) if rows is None else (DatasetManifest.load(rows), rows)
        split = choose_split(manifest, there, arguments.split)
        check_labels(session, manifest, there, split)
        with StopSignal(world) as stop:
            report = evaluate_split(session, split, stop, rows)
        if world.is_main:
            # First: the folder may be one that can only be read.
            print(report_text(report, split), flush=True)
            if otherwise:
                print(f"\nMeasured with {', '.join(otherwise)}, so {folder.result} is as it was.")
            else:
                try:
                    write_result(folder, split, report, step=step)
                except OSError as error:
                    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                        raise
                    raise UserError(
                        f"{folder.result}: the metrics above are whole, but not kept: {error.strerror}. Copy them from here,"
                        " or evaluate a copy of the run."
                    ) from error


if __name__ == "__main__":
    run(main)
