"""Train one configuration with several seeds.

python -m apps.seeds --config FILE --seeds 0,2,4
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

from apps.cli import Parser, add_import, add_overrides, all_imported, run
from mmlrec.extensions import import_modules
from mmlrec.storage.places import place


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError("give whole numbers separated by commas, such as 0,2,4") from None
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError("a seed is named twice, which would count its result twice")
    return seeds


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = Parser(
        prog="python -m apps.seeds",
        description="Train one configuration once for each seed and print mean and sample standard deviation (divided by the"
        " number of seeds minus 1) of the test metrics. Seeds that are complete already are not trained again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m apps.seeds --config configs/mtl/movielens.yaml --seeds 0,2,4 model.name=shared_bottom",
    )
    parser.add_argument("--config", required=True, help="YAML file, or the name of a shipped one, such as mtl/movielens")
    parser.add_argument("--seeds", type=_seeds, default=[0, 2, 4, 8], help="comma-separated; default 0,2,4,8")
    parser.add_argument("--run-dir", type=place, help="folder for one run folder per seed; default: as apps.train names them")
    add_import(parser)
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    if any(override.startswith("training.seed=") for override in arguments.overrides):
        parser.error("training.seed: the seeds are those of --seeds; leave it out")
    return arguments


def main() -> None:
    """Train each seed, then summarise."""
    arguments = parse()
    import_modules(arguments.imports)
    from mmlrec.registry import load

    configs = [load(arguments.config, [*arguments.overrides, f"training.seed={seed}"]) for seed in arguments.seeds]
    from mmlrec.distributed.stopping import StopSignal
    from mmlrec.distributed.world import process_group
    from mmlrec.metrics.notes import look_at
    from mmlrec.metrics.report import seeds_table
    from mmlrec.run_folder.folder import RunFolder
    from mmlrec.training.guard import Diverged
    from mmlrec.training.run import default_run_dir, train

    all_imported()
    with process_group(configs[0].training.timeout) as world:
        reports: list[dict[str, Any]] = []
        base = arguments.run_dir or configs[0].run_dir
        run_dirs = [
            place(base) / f"seed{config.training.seed}" if base else default_run_dir(config, Path(arguments.config))
            for config in configs
        ]
        for run_dir in run_dirs:  # before hours are spent on the seeds before it
            world.on_main(RunFolder(run_dir).check_place)
        for config, run_dir in zip(configs, run_dirs, strict=True):
            done = f"{len(reports)} of {len(configs)} seeds are trained"
            StopSignal.end_if_late(world, f"stopped when {done}. Run the same command again to continue.")
            try:
                reports.append(train(config, run_dir, world, source=arguments.config))
            except Diverged as error:
                others = ",".join(str(seed) for seed in arguments.seeds if seed != config.training.seed)
                without = f" Without this seed: --seeds {others}." if others else ""
                raise error.of_several(f"seed {config.training.seed}", f"{done}, and kept.{without}") from None
            gc.collect()  # its tables, which circles of references hold
        if world.is_main:
            print(
                f"\nTest over seeds {', '.join(map(str, arguments.seeds))} (mean ± standard deviation):\n{seeds_table(reports)}"
            )
            for seed, report in zip(arguments.seeds, reports, strict=True):
                for note in look_at(report, "test"):
                    print(f"seed {seed}: {note}")


if __name__ == "__main__":
    run(main)
