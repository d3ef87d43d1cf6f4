"""Speed of the dense part (network and loss, forward and backward) of every method, relative to SharedBottom in the same run.

python -m benchmarks.methods [--methods mmoe,ple] [--quick] [--threads 2] [--out runs/methods.json]
python -m benchmarks.methods --exported --methods mmoe,star [--threads 1]

Three tables: time beside operations (benchmarks.flops), in MTL and MSL; the cost of 32 scenarios over that of 2; and whole
training steps of MMoE with PCGrad over those with fixed weights. Every figure is a median over rounds in which all take their
turn, so that whatever else the machine does hits all alike. `--exported` prints one other table: scores of exported graphs
with rows grouped by scenario, as in network.pt2, and with all scenarios computed, as in network.onnx; both run by torch.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from tabulate import tabulate

from apps.cli import all_imported, check_replaced, run
from benchmarks import throughput
from benchmarks.flops import FORWARD, Case
from mmlrec.distributed.world import keep_freed_memory
from mmlrec.export.network import Format, Scorer, export_network
from mmlrec.losses import LossOptions
from mmlrec.models.base.model import ModelSpec
from mmlrec.paths import local_path
from mmlrec.registry import method, method_names
from mmlrec.schema import Setting, Task

BASELINE = "shared_bottom"
#: Name -> fields, width of each, dense features.
SHAPES = {"movielens": (7, 8, 0), "wide": (26, 16, 13)}
#: Time over operations, both relative to SharedBottom: what is above has overhead worth a look.
MOST_OVERHEAD = 1.5
#: Cost of 32 scenarios over that of 2, for methods that compute a row's own scenario only.
MOST_GROWTH = 1.3
DISPATCHED = ("shared_bottom", "mmoe", "snr", "snr aver", "mssm", "star", "apg")
VARIANTS: dict[str, dict[str, Any]] = {"snr aver": {"variant": "aver"}, "escm2 dr": {"variant": "dr"}}
#: Largest share of a round's time that one method may take, before it is run once only.
SECONDS_PER_TURN = 0.1

Step = Callable[[], None]


def options(label: str, setting: Setting) -> dict[str, Any]:
    """What a method needs besides its defaults."""
    chosen = dict(VARIANTS.get(label, {}))
    if label == "pepnet":
        chosen["prior_fields"] = ["f0", "f1"]
    if label == "apg" and setting is Setting.MTL:
        chosen |= {"condition": "mix", "condition_fields": ["f0"]}
    return chosen


def labels_in(setting: Setting, wanted: list[str]) -> list[str]:
    """Methods and variants that are defined in a setting; the baseline first."""
    every = [*method_names(), *VARIANTS]
    chosen = [label for label in every if label in wanted or not wanted or label == BASELINE]
    known = [label for label in chosen if label.split()[0] in method_names()]
    return sorted((k for k in known if setting in method(k.split()[0]).settings), key=lambda k: (k != BASELINE, k))


def build_step(label: str, case: Case, rows: int) -> Step:
    """One forward and backward pass of a method on random input, whose gradient is computed as the tables need it."""
    setting = Setting.MTL if case.scenarios == 1 else Setting.MSL if case.tasks == 1 else Setting.MTMSL
    if case.tasks == 2:
        tasks: tuple[Task, ...] = (Task(name="t0", role="ctr", implied_by_next=True), Task(name="t1", role="ctcvr"))
    else:
        tasks = tuple(Task(name=f"t{t}") for t in range(case.tasks))
    spec = ModelSpec(setting, tasks, case.scenarios, {f"f{i}": case.dim for i in range(case.num_fields)}, case.num_dense)
    chosen = method(label.split()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = chosen(spec, chosen.Config(**options(label, setting)))
    loss = net.make_loss(LossOptions())
    generator = torch.Generator().manual_seed(0)
    lead = (rows, spec.num_heads) if net.tables_per_branch else (rows,)
    x = torch.randn(*lead, spec.input_width, generator=generator).requires_grad_()
    scenario = torch.randint(case.scenarios, (rows,), generator=generator)
    labels = (torch.rand(rows, case.tasks, generator=generator) < 0.3).float().cummin(dim=1).values
    mask, weight = torch.ones_like(labels), torch.ones(rows)
    valid = torch.ones(rows, dtype=torch.bool)
    noise = torch.rand(net.num_noise, generator=generator) if net.num_noise else None
    leaves = [x, *net.parameters()]

    def step() -> None:
        parts = x.split([*spec.fields.values(), spec.num_dense], dim=-1)
        fields = dict(zip(spec.fields, parts, strict=False))
        output = net(x, fields, scenario, valid=valid, noise=noise)
        denominators = loss.denominators(labels, mask, scenario, weight)
        torch.stack(list(loss(output, labels, mask, scenario, weight, denominators).values())).sum().backward()
        for leaf in leaves:
            leaf.grad = None

    return step


def measure(steps: dict[Any, Step], rounds: int) -> dict[Any, list[float]]:
    """Seconds a step, for each round; all take their turn in every round."""
    turns = {}
    for key, step in steps.items():
        for _ in range(2):
            step()
        turns[key] = max(1, int(SECONDS_PER_TURN / _seconds(step)))
    found: dict[Any, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            found[key].append(median(_seconds(step) for _ in range(turns[key])))
    return found


def _seconds(work: Step) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(times: list[float], others: list[float]) -> float:
    """Median over rounds of one time over another of the same round."""
    return median(a / b for a, b in zip(times, others, strict=True))


def cost(shape: str, setting: Setting, wanted: list[str], rows: int, rounds: int) -> list[dict[str, Any]]:
    """Time of each method over SharedBottom's, beside the same of operations."""
    case = Case(*SHAPES[shape], *((2, 1) if setting is Setting.MTL else (1, 2)))
    labels = labels_in(setting, wanted)
    times = measure({label: build_step(label, case, rows) for label in labels}, rounds)
    found = []
    for label in labels:
        relative = ratio(times[label], times[BASELINE])
        row = {"shape": shape, "setting": str(setting), "method": label, "ms": 1e3 * median(times[label]), "time": relative}
        if label in FORWARD:
            operations = FORWARD[label](case) / FORWARD[BASELINE](case)
            row |= {"operations": operations, "overhead": relative / operations}
            row["flag"] = f"> {MOST_OVERHEAD}" if relative / operations > MOST_OVERHEAD else ""
        found.append(row)
    return found


def growth(shape: str, wanted: list[str], rows: int, rounds: int) -> list[dict[str, Any]]:
    """Time with 32 scenarios over that with 2, one task."""
    labels = labels_in(Setting.MSL, wanted)
    cases = {scenarios: Case(*SHAPES[shape], 1, scenarios) for scenarios in (2, 32)}
    steps = {(label, s): build_step(label, case, rows) for label in labels for s, case in cases.items()}
    times = measure(steps, rounds)
    found = []
    for label in labels:
        grown = ratio(times[label, 32], times[label, 2])
        flag = f"> {MOST_GROWTH}" if label in DISPATCHED and grown > MOST_GROWTH else ""
        milliseconds = {f"ms_{s}": 1e3 * median(times[label, s]) for s in cases}
        found.append({"shape": shape, "method": label, **milliseconds, "growth": grown, "flag": flag})
    return found


def balancing(folder: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time of a whole training step of MMoE (apps.train) with PCGrad over that with fixed weights, for 2 and 8 tasks."""
    shape = replace(throughput.SHAPES["a"], steps=10)
    found = []
    for tasks in (2, 8):
        dataset = folder / f"tasks{tasks}"
        throughput.generate(dataset, shape, 100_000, tasks, threads)
        times: dict[str, list[float]] = {"static": [], "pcgrad": []}
        for _ in range(rounds):
            for name, seconds in times.items():
                speed = throughput.ours(folder, dataset, shape, "fp32", threads, f"balancing.name={name}")
                seconds.append(throughput.BATCH / speed.samples_per_second)
        relative, most = ratio(times["pcgrad"], times["static"]), 1 + 0.5 * tasks
        milliseconds = {f"ms_{name}": 1e3 * median(seconds) for name, seconds in times.items()}
        flag = f"> {most:g}" if relative > most else ""
        found.append({"tasks": tasks, **milliseconds, "time": relative, "most": most, "flag": flag})
    return found


def exported(wanted: list[str], rounds: int) -> list[dict[str, Any]]:
    """Time of exported graphs with 4 and 64 scenarios and two tasks: grouped, and all scenarios."""
    steps: dict[Any, Step] = {}
    for label, scenarios in product(wanted, (4, 64)):
        tasks = (Task(name="t0"), Task(name="t1"))
        spec = ModelSpec(Setting.MTMSL, tasks, scenarios, {f"f{i}": 16 for i in range(20)}, 13)
        scorer = Scorer(method(label)(spec, method(label).Config()), {})
        graphs = {kind: export_network(scorer, kind).module() for kind in get_args(Format)}
        for rows, (kind, graph) in product((1, 100, 1000), graphs.items()):
            steps[label, scenarios, rows, kind] = partial(graph, *scorer.example(rows))
    with torch.inference_mode():
        times = measure(steps, rounds)
    return [
        {"method": label, "scenarios": scenarios, "rows": rows}
        | {f"ms_{kind}": 1e3 * median(times[label, scenarios, rows, kind]) for kind in get_args(Format)}
        for label, scenarios, rows in dict.fromkeys(key[:3] for key in steps)
    ]


def main() -> None:
    """Measure, print the tables, write the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="", help="comma-separated methods or variants; all when absent")
    parser.add_argument("--quick", action="store_true", help="MovieLens shape and 3 rounds: to see that it runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4096, help="batch size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=local_path, default=Path("runs/methods.json"))
    parser.add_argument("--exported", action="store_true", help="exported graphs of --methods in place of all other tables")
    arguments = parser.parse_args()
    all_imported()
    check_replaced(arguments.out, lambda found: isinstance(found, dict) and {"cost", "growth"} <= found.keys())
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # As in training.
    wanted = [name for name in arguments.methods.split(",") if name]
    for name in wanted:
        method(name.split()[0])
    rounds = 3 if arguments.quick else arguments.rounds
    if arguments.exported:
        print(tabulate(exported(wanted, rounds), headers="keys", floatfmt=".1f"))
        return
    shapes = ["movielens"] if arguments.quick else list(SHAPES)
    show = partial(tabulate, headers="keys", floatfmt=".2f")
    result: dict[str, Any] = {"threads": arguments.threads, "rows": arguments.rows, "rounds": rounds, "cost": [], "growth": []}
    for shape in shapes:
        for setting in (Setting.MTL, Setting.MSL):
            found = cost(shape, setting, wanted, arguments.rows, rounds)
            result["cost"] += found
            print(show(found), end="\n\n", flush=True)
        found = growth(shape, wanted, arguments.rows, rounds)
        result["growth"] += found
        print(show(found), end="\n\n", flush=True)
    if not wanted or "mmoe" in wanted:
        with TemporaryDirectory() as folder:
            result["balancing"] = balancing(Path(folder), arguments.threads, 1 if arguments.quick else 3)
        print(show(result["balancing"]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main)
