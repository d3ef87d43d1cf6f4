"""Export the best checkpoint of a run: a folder that scores raw rows with torch and pyarrow, without torchrec.

python -m apps.export --run-dir DIR --out MODEL
"""

from __future__ import annotations

import argparse

from apps.cli import add_import, all_imported, run
from mmlrec.extensions import import_modules
from mmlrec.paths import local_path
from mmlrec.storage.places import place


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m apps.export",
        description="Write network, tables, encoder and a card of the best checkpoint of a run into one folder, which"
        " mmlrec.serving loads, and compare its scores with those of the run's own model on the test rows: the largest"
        " difference, and AUC by task and scenario before and after. Where tables in fp32 score otherwise, nothing is written."
        " Works at any number of processes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m apps.export --run-dir runs/NAME --out models/NAME\n"
        "  python -m apps.export --run-dir runs/NAME --out models/NAME-small --tables int8 --format onnx",
    )
    parser.add_argument("--run-dir", type=place, required=True, help="run folder")
    parser.add_argument("--out", type=local_path, required=True, help="folder to write, on a disk of this machine")
    parser.add_argument(
        "--tables",
        default="fp32",
        choices=["fp32", "fp16", "int8"],
        help="numbers of the tables; int8: with a scale for each row",
    )
    parser.add_argument("--format", default="pt2", choices=["pt2", "onnx"], help="of the network: torch.export, or ONNX")
    parser.add_argument(
        "--input", type=place, help="dataset folder whose test rows are compared, encoded as the run's; default: the run's own"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace MODEL, if it is there")
    add_import(parser)
    return parser.parse_args()


def main() -> None:
    """Load, write, compare."""
    arguments = parse()
    import_modules(arguments.imports)
    from mmlrec.distributed.stopping import StopSignal
    from mmlrec.distributed.world import process_group
    from mmlrec.export.model import Exported, export_model
    from mmlrec.run_folder.folder import RunFolder

    folder = RunFolder(arguments.run_dir)
    timeout = folder.read_config().training.timeout
    all_imported()
    with process_group(timeout) as world, StopSignal(world) as stop:
        export_model(
            Exported(folder, arguments.out, arguments.tables, arguments.format, arguments.input, arguments.overwrite),
            world,
            stop,
        )


if __name__ == "__main__":
    run(main)
