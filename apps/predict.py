"""Score a dataset with the best checkpoint of a run.

python -m apps.predict --run-dir DIR --input DATASET --output FILE
"""

from __future__ import annotations

import argparse

from apps.cli import add_import, all_imported, run
from mmlrec.evaluation.score_files import ENDINGS, ending
from mmlrec.extensions import import_modules
from mmlrec.storage.places import place


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m apps.predict",
        description="Score the rows of a dataset folder and write one file: the keys, the scenario's number, the labels, and"
        " score.<task>, the probability (or value) that the best checkpoint gives; then the scenario's name and the row's"
        " weight. In row order.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m apps.predict --run-dir runs/NAME --input data/movielens-1m --output scores.parquet",
    )
    parser.add_argument("--run-dir", type=place, required=True, help="run folder")
    parser.add_argument(
        "--input",
        type=place,
        required=True,
        help="dataset folder, encoded like the data of the run: python -m preprocessing NAME --like RUN; without labels, too",
    )
    parser.add_argument("--output", type=place, required=True, help=f"file to write; its name says how: {', '.join(ENDINGS)}")
    parser.add_argument("--split", metavar="NAME", help="default: test, or the only split of the input")
    add_import(parser)
    return parser.parse_args()


def main() -> None:
    """Load, score, write."""
    arguments = parse()
    ending(arguments.output)
    import_modules(arguments.imports)
    from mmlrec.distributed.stopping import StopSignal
    from mmlrec.distributed.world import process_group
    from mmlrec.evaluation.evaluation import choose_split
    from mmlrec.evaluation.prediction import write_predictions
    from mmlrec.run_folder.folder import RunFolder
    from mmlrec.schema import DatasetManifest
    from mmlrec.session.session import load_session

    folder = RunFolder(arguments.run_dir)
    all_imported()
    with process_group(folder.read_config().training.timeout) as world:
        session, *_ = load_session(folder, world, [], arguments.input, measured=False)
        split = choose_split(DatasetManifest.load(arguments.input), arguments.input, arguments.split)
        with StopSignal(world) as stop:
            write_predictions(session, arguments.input, split, arguments.output, stop)


if __name__ == "__main__":
    run(main)
