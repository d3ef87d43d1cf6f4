"""Plan a training on machines that need not be at hand: which rank holds which rows, memory, time of a step, alternatives.

python -m apps.plan --config FILE --hosts 8 --gpus-per-host 8 --hbm 80GiB [key.path=value ...]
python -m apps.plan --compare A B
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from apps.cli import Parser, add_import, add_overrides, all_imported, check_replaced, run
from mmlrec.errors import ConfigError, UserError
from mmlrec.extensions import import_modules
from mmlrec.paths import local_path
from mmlrec.storage.places import place

if TYPE_CHECKING:
    from mmlrec.config import RunConfig
    from mmlrec.schema import DatasetManifest
    from mmlrec.session.alternatives import Alternative
    from mmlrec.session.planning import TrainingPlan

_EPILOG = """\
examples:
  python -m apps.plan --config scaling/dlrm-v2 --tables configs/scaling/tables/dlrm-v2.yaml \\
      --hosts 8 --gpus-per-host 8 --hbm 80GiB --json plan.json
  torchrun ... -m apps.train --config ... embeddings.plan=plan.json
  python -m apps.plan --compare plan.json runs/NAME

Sizes are numbers with a unit, such as 80GiB or 25GB. Times are predictions of such rates, to compare plans by. The rates of
GPUs given here in brackets are usual ones, which nobody has measured for this package; those of CPUs are of one AMD EPYC.
"""
_UNITS = {
    "B": 1,
    **{f"{letter}{kind}": base**power for power, letter in enumerate("KMGT", 1) for kind, base in (("B", 1000), ("iB", 1024))},
}
_GIB = 2**30
_MOST_RANKS = 16  # that are printed one by one
#: Options and what `Bandwidths` calls them.
_RATES = {
    "--bandwidth": "between_hosts",
    "--bandwidth-in-host": "in_host",
    "--memory-bandwidth": "memory",
    "--round": "round",
    "--launch": "launch",
}
_PARTS = ("rank", "weights", "state", "network", "activations", "buffers", "sum", "tables in its host")


def size(text: str) -> int:
    """Bytes of a size such as 80GiB.

    Raises:
        argparse.ArgumentTypeError: it is nothing of the kind.
    """
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?) ?((?:[KMGT]i?)?B)", text)
    number = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not number:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no size: a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 80GiB"
        )
    return number


def count(text: str) -> int:
    """A number of hosts or ranks.

    Raises:
        argparse.ArgumentTypeError: it is no whole number above 0, or more than a million.
    """
    if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 to 1000000")
    return int(text)


def microseconds(text: str) -> float:
    """Seconds of a time such as 25us.

    Raises:
        argparse.ArgumentTypeError: it is nothing of the kind.
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?) ?us", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is no time: microseconds such as 25us")
    return float(found[1]) / 1e6


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = Parser(
        prog="python -m apps.plan", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="YAML file, or the name of a shipped one, such as scaling/dlrm-v2")
    what.add_argument(
        "--compare",
        nargs=2,
        type=place,
        metavar=("A", "B"),
        help="two plans: files of --json, plan.json of a run, or run folders",
    )
    parser.add_argument("--tables", type=place, help="a description of tables, or a dataset folder; default: dataset.path")
    parser.add_argument("--hosts", type=count, help="machines (1)")
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--gpus-per-host", type=count, metavar="N", help="GPUs of each, one rank each (8)")
    ranks.add_argument("--processes-per-host", type=count, metavar="N", help="instead of GPUs: processes on CPUs")
    parser.add_argument("--hbm", type=size, help="memory of each GPU (80GiB)")
    parser.add_argument("--ram", type=size, help="memory of each host (64GiB; with GPUs, for embeddings.host_cache, 1TiB)")
    parser.add_argument("--bandwidth", type=size, help="between hosts, bytes a second of each rank (GPU 12.5GiB, CPU 1.25GiB)")
    parser.add_argument("--bandwidth-in-host", type=size, help="between ranks of a host, likewise (GPU 600GiB, CPU 3GiB)")
    parser.add_argument("--memory-bandwidth", type=size, help="of a rank's memory, likewise (GPU 897GiB, CPU 51GiB)")
    parser.add_argument("--tflops", type=float, help="1e12 operations a second of a rank in wide products (GPU 20, CPU 0.19)")
    parser.add_argument(
        "--round", type=microseconds, help="of a message that carries nothing, such as 30us (GPU 25us, CPU 100us)"
    )
    parser.add_argument("--launch", type=microseconds, help="that a host takes to start an operator (GPU 5us, CPU 4.5us)")
    parser.add_argument("--no-alternatives", action="store_true", help="plan what is given only")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="write the plan, for embeddings.plan and --compare")
    add_import(parser)
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    beside = {name: value for name, value in vars(arguments).items() if name not in ("compare", "imports", "overrides")}
    given = [f"--{name.replace('_', '-')}" for name, value in beside.items() if value is not parser.get_default(name)]
    if arguments.compare and (given or arguments.overrides):
        first = (given + arguments.overrides)[0]
        parser.error(f"--compare shows two plans that are there, and nothing else: leave out {first}")
    if arguments.hbm and arguments.processes_per_host:
        parser.error("--hbm is the memory of a GPU; that of a host, which its processes share, is --ram")
    return arguments


def main() -> None:
    """Plan, print, and write what was asked for."""
    arguments = parse()
    import_modules(arguments.imports)
    if arguments.compare:
        from mmlrec.embeddings.plan_file import compare_plans

        print(compare_plans(*arguments.compare))
        return
    from mmlrec.distributed.world import quiet_libraries
    from mmlrec.embeddings.hardware import CPU, GPU, OPERATIONS, Hardware
    from mmlrec.registry import load
    from mmlrec.run_folder.folder import write_atomically
    from mmlrec.session.alternatives import alternatives, recommendations, remedies
    from mmlrec.session.planning import Request, plan_training

    if arguments.json:
        check_replaced(arguments.json, lambda found: isinstance(found, dict) and {"hardware", "tables"} <= found.keys())
    quiet_libraries()
    config = load(arguments.config, arguments.overrides)
    config, manifest = _data(config, arguments)
    on_cpu = arguments.processes_per_host is not None
    each = arguments.processes_per_host if on_cpu else arguments.gpus_per_host or 8
    known = CPU if on_cpu else GPU
    bandwidths = replace(
        known,
        between_hosts=arguments.bandwidth or known.between_hosts,
        in_host=arguments.bandwidth_in_host or known.in_host,
        memory=arguments.memory_bandwidth or known.memory,
        round=known.round if arguments.round is None else arguments.round,
        launch=known.launch if arguments.launch is None else arguments.launch,
    )
    of_host = (arguments.ram or (2**36 if on_cpu else 2**40)) // each
    ranks = (arguments.hosts or 1) * each
    if on_cpu:
        hardware = Hardware(ranks, each, "cpu", of_host, bandwidths)
    else:
        hardware = Hardware(ranks, each, "cuda", arguments.hbm or size("80GiB"), bandwidths, host_memory=of_host)
    tflops = arguments.tflops if arguments.tflops is not None else OPERATIONS["cpu" if on_cpu else "cuda"] / 1e12
    if not 0 < tflops < 1e9:
        raise ConfigError(f"--tflops: {tflops} is no rate of a rank.")
    all_imported()
    plan = plan_training(Request(config, manifest, hardware, 1e12 * tflops, arguments.config))
    others = [] if arguments.no_alternatives else alternatives(plan)
    helps = remedies(plan, others) if plan.missing else []
    advice = recommendations(plan, others)
    if arguments.json:
        beside = {"alternatives": [other.as_dict() for other in others], "recommendations": advice, "would_fit": helps}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(plan.as_dict() | beside, indent=1) + "\n"
        if arguments.json.is_file() or not arguments.json.exists():
            write_atomically(arguments.json.resolve(), content)  # of a link what it names
        else:
            arguments.json.write_text(content, encoding="utf-8")  # a pipe or a device, which stays what it is
    print(text(plan, others, advice, helps))
    if short := plan.short:
        raise UserError(f"this does not fit: {short.missing / _GIB:.2f} GiB too many on {short.where}. See above.")


def _data(config: RunConfig, arguments: argparse.Namespace) -> tuple[RunConfig, DatasetManifest]:
    """Configuration and manifest to plan with; of a described table with a `dim`, the configuration has it as `table_dim`."""
    from mmlrec.schema import MANIFEST, DatasetManifest, Setting
    from mmlrec.session.table_list import read_table_list

    there = arguments.tables or place(config.dataset.path)
    if arguments.tables is None and not (there / MANIFEST).is_file():
        raise ConfigError(
            f"there is no dataset {there}: make it first, or describe its tables in a file and give --tables FILE"
            " (docs/scaling.md)."
        )
    if there.is_dir():
        return config, DatasetManifest.load(there)
    described = read_table_list(there)
    setting = Setting.MTL if described.scenarios == 1 else Setting.MSL if described.tasks == 1 else Setting.MTMSL
    dataset = config.dataset.model_copy(update={"path": str(there), "tasks": None, "setting": setting})
    embeddings = config.embeddings.model_copy(update={"table_dim": described.dims | config.embeddings.table_dim})
    return config.model_copy(update={"dataset": dataset, "embeddings": embeddings}), described.manifest()


def text(plan: TrainingPlan, others: list[Alternative], advice: list[str], helps: list[str]) -> str:
    """The plan as tables."""
    from tabulate import tabulate

    from mmlrec.session.planning import STEP

    hardware, config = plan.request.hardware, plan.request.config
    unit = "GPU" if hardware.device == "cuda" else "process"
    rates = hardware.bandwidths
    lines = [
        f"{hardware.num_hosts} host(s) x {hardware.ranks_per_host} = {hardware.world_size} rank(s),"
        f" {_gib(hardware.memory)} GiB a {unit}, of which {_gib(hardware.usable)} are planned with"
        f" | GiB/s a rank: {_gib(rates.in_host)} in a host, {_gib(rates.between_hosts)} between hosts,"
        f" {_gib(rates.memory)} memory | {plan.request.operations / 1e12:g} TFLOP/s"
        f" | us: {1e6 * rates.round:g} a message, {1e6 * rates.launch:g} an operator",
        f"global batch {config.training.batch_size:,}, tables in {config.embeddings.dtype} with"
        f" {config.embeddings.optimizer.name},"
        f" network {config.model['name']} with {config.dense.optimizer.name},"
        f" {sum(p.numel() for p in plan.network.parameters()):,} parameters",
        "",
        _table(
            ["table", "rows", "dim", "ids a row", "GiB", "placed", "ranks", "why"],
            [
                [
                    *(table.name, f"{table.rows:,}", table.dim, "+".join(f"{length:g}" for length in table.lengths)),
                    *(_gib(table.weight_bytes), table.sharding, _spans(table.ranks), table.why),
                ]
                for table in plan.tables
            ],
        ),
        "",
        f"Memory of each rank, GiB (tables: largest / mean = {plan.imbalance['table_memory']:.2f})",
        _table([*_PARTS, "table work, ms"], _rank_rows(plan)),
        "",
        f"A step, predicted (time of the tables: largest / mean of the ranks = {plan.imbalance['table_time']:.2f})",
        _table(["phase", "ms, slowest rank"], [[STEP[phase], f"{ms:.3f}"] for phase, ms in plan.step.items()]),
        f"sum {plan.step_ms:.3f} ms, {1000 * config.training.batch_size / plan.step_ms:,.0f} samples/s",
    ]
    if usual := _usual(plan):
        lines.append(f"Not measured, but usual figures of GPUs: {', '.join(usual)}. Give those of yours.")
    if others:
        base: list[Any] = ["as given", *_figures(plan)]
        rows = [base, *([other.change, *_figures(other.plan)] for other in others)]
        lines += [
            "",
            "Alternatives",
            tabulate(
                rows,
                headers=["change", "ranks", "fits", "fullest rank, GiB", "in its host, GiB", "step, ms", "samples/s"],
                disable_numparse=True,
            ),
        ]
    if warnings := plan.warnings():
        lines += ["", "Warnings", *(f"* {warning}." for warning in warnings)]
    if advice:
        lines += ["", "Recommended", *(f"* {line}." for line in advice)]
    if plan.missing:
        lines += [
            "",
            "What would make it fit",
            *(f"* {remedy}" for remedy in helps or ["nothing of what was tried: more hosts, another optimizer, a smaller dim"]),
        ]
    return "\n".join(lines)


def _usual(plan: TrainingPlan) -> list[str]:
    """Options whose rates are those that GPUs are said to have."""
    from mmlrec.embeddings.hardware import GPU, OPERATIONS

    if plan.request.hardware.device != "cuda":
        return []
    rates = plan.request.hardware.bandwidths
    found = [option for option, rate in _RATES.items() if getattr(rates, rate) == getattr(GPU, rate)]
    return [*found, *(["--tflops"] if plan.request.operations == OPERATIONS["cuda"] else [])]


def _figures(plan: TrainingPlan) -> list[str]:
    fits = f"no, {_gib(plan.missing)} GiB too many" if plan.missing else "yes"
    rate = f"{1000 * plan.request.config.training.batch_size / plan.step_ms:,.0f}"
    memory = [_gib(plan.fullest.total), _gib(plan.fullest_on_host.on_host)]
    return [str(plan.request.hardware.world_size), fits, *memory, f"{plan.step_ms:.3f}", rate]


def _rank_rows(plan: TrainingPlan) -> list[list[str]]:
    """All ranks where they are few; otherwise the fullest, the emptiest and the one with most to do."""
    ranks = plan.ranks
    if len(ranks) > _MOST_RANKS:
        chosen = {
            "fullest": plan.fullest,
            "emptiest": min(ranks, key=lambda rank: rank.total),
            "most to do": max(ranks, key=lambda rank: rank.table_ms),
        }
        named = [(f"{rank.rank} ({what})", rank) for what, rank in chosen.items()]
    else:
        named = [(str(rank.rank), rank) for rank in ranks]
    rows = [
        [
            name,
            *(_gib(part) for part in (r.weights, r.state, r.network, r.activations, r.buffers, r.total, r.on_host)),
            f"{r.table_ms:.3f}",
        ]
        for name, r in named
    ]
    sums = [
        sum(getattr(rank, part) for rank in ranks)
        for part in ("weights", "state", "network", "activations", "buffers", "total", "on_host")
    ]
    return [*rows, ["all together", *map(_gib, sums), ""]]


def _table(headers: list[str], rows: list[list[Any]]) -> str:
    from tabulate import tabulate

    return tabulate(rows, headers=headers, disable_numparse=True)


def _gib(value: float) -> str:
    return f"{value / _GIB:.2f}"


def _spans(ranks: list[int]) -> str:
    """`3`, or `0-7`."""
    consecutive = len(ranks) > 1 and ranks == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if consecutive else ",".join(map(str, ranks))


if __name__ == "__main__":
    run(main)
