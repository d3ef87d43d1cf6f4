"""What a machine with a GPU shows: the installation, tests, a user's run, speed; one command, within ten minutes.

python -m benchmarks.gpu [--out runs/gpu] [--device cuda] [--seconds 540] [--skip tests,scaling]

Each stage is a process with a time limit and a log; what one that fails has said is shown at once. The first trains two steps
of a small run, validates and saves it. Where it fails, tests alone follow: they tell how far each method and optimizer comes,
and the time of the machine is left for another try. Otherwise one that fails stops no other. Tests, a user's run (data,
training in bf16, a second command that resumes it, evaluation, export compared with the run's model, scores of raw rows) and
the making of data go side by side; then one after the other what is measured:

    speed        training steps on resident batches, and lookup with update alone, for each shape, batch and precision of
                 `benchmarks.throughput`, with floors, profiles and the places where the host waits (`benchmarks.resident`)
    end_to_end   the same from Parquet, as apps.train reports it
    scaling      `benchmarks.scaling` on one rank

A summary comes last. FOLDER gets results.json, tables.md for docs/benchmarks.md, and logs.tar.gz with logs and profiles. The
exit code is not 0 when a stage has failed. --device cpu does all that in small, to try the command where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tabulate import tabulate

from apps.cli import check_replaced, run
from benchmarks.throughput import RESIDENT, SHAPES, generation, resident_row, write_config
from mmlrec.errors import UserError
from mmlrec.paths import local_path

ROOT = Path(__file__).parents[1]
_GRACE = 5.0  # seconds between asking a process to end and ending it
_USER = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: mmoe}}
embeddings: {{dim: 16, optimizer: {{name: adagrad, lr: 0.05}}}}
training: {{batch_size: {batch}, epochs: 2, precision: bf16}}
"""
#: Scores by a process that knows the exported model only, printed.
_SCORE = "from mmlrec.serving import load; m = load({model!r}); print(*m.score([m.example()] * 3), sep='\\n')"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    shapes: str
    batches: tuple[int, ...]
    rows: int
    user_rows: int
    scaling: tuple[str, ...]


#: By device. On a GPU an epoch of the largest batch has some twenty steps, so that what a window holds is not its beginning.
SIZES = {
    "cuda": Sizes(
        "abc", (4096, 65536), 2_000_000, 400_000, ("--base=batch=65536,ids=1e6", "--ids=1e5,1e7", "--batch=4096", "--seconds=2")
    ),
    "cpu": Sizes("ab", (256, 1024), 20_000, 20_000, ("--base=batch=256,ids=1e4", "--ids=1e5", "--batch=", "--seconds=0.1")),
}


@dataclass(frozen=True)
class Stage:
    """A command and how long it may take.

    Attributes:
        command: arguments of Python.
        limit: seconds.
    """

    name: str
    command: Sequence[str]
    limit: float


@dataclass(frozen=True)
class Ended:
    """What became of a stage.

    Attributes:
        code: its exit code; None where its time was up.
        line: the last line that it wrote.
    """

    name: str
    code: int | None
    seconds: float
    line: str


class Stages:
    """Runs stages, each with a log in a folder."""

    def __init__(self, logs: Path, device: str) -> None:
        self._logs = logs
        self.ended: list[Ended] = []
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        # All that the processes of a stage have to tell each other stays on this machine, which may have no other network.
        alone = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        threads = str(max(1, min(4, (os.cpu_count() or 1) // 2)))
        self._environment = (
            {"OMP_NUM_THREADS": threads}
            | alone
            | os.environ
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "PYTHONUNBUFFERED": "1",
            }
        )
        if device == "cpu":
            self._environment["CUDA_VISIBLE_DEVICES"] = ""

    def run(self, stages: Sequence[Stage], until: float) -> None:
        """One after the other; `until` that time, of `time.monotonic`, none goes on."""
        for stage in stages:
            started = time.monotonic()
            code = self._run(stage, min(stage.limit, until - started))
            ended = Ended(stage.name, code, time.monotonic() - started, self._last_line(stage.name))
            self.ended.append(ended)
            told = "" if ended.code == 0 else "".join(f"\n    {line}" for line in why(self.log(stage.name)))
            print("  ".join(_row(ended)) + told, flush=True)

    def together(self, lanes: Sequence[Sequence[Stage]], until: float) -> None:
        """Several sequences side by side."""
        with ThreadPoolExecutor(len(lanes)) as threads:
            list(threads.map(self.run, lanes, [until] * len(lanes)))

    def log(self, name: str) -> str:
        """What a stage has written; nothing where it has not run."""
        path = self._logs / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def _run(self, stage: Stage, limit: float) -> int | None:
        with (self._logs / f"{stage.name}.log").open("w", encoding="utf-8") as log:
            if limit <= 0:
                log.write("no time was left\n")
                return None
            process = subprocess.Popen(
                [sys.executable, *stage.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self._environment,
                start_new_session=True,
            )
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                log.flush()
                return None
            finally:
                _end(process)

    def _last_line(self, name: str) -> str:
        lines = self.log(name).strip().splitlines()
        return lines[-1].strip()[:120] if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started, which are a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if number == signal.SIGTERM and process.poll() is None:
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                continue


def why(log: str) -> list[str]:
    """What a stage that failed has to say of it: failures of pytest, else the whole first traceback, else the last lines."""
    if lines := re.findall(r"^(?:FAILED|ERROR|E  ).*", log, re.MULTILINE)[:40]:
        return lines
    lines = [line.rstrip() for line in log.strip().splitlines()]
    begin = next((number for number, line in enumerate(lines) if "Traceback (most recent call last)" in line), None)
    if begin is None:
        return lines[-15:]
    # It ends with the first line behind it that is not indented, under whatever torchrun puts before each.
    start = lines[begin].partition("Traceback")[0]
    behind = (number for number, line in enumerate(lines[begin + 1 :], begin + 1) if line[len(start) : len(start) + 1] != " ")
    return lines[begin : next(behind, len(lines)) + 3]


def first(arguments: argparse.Namespace, work: Path) -> list[Stage]:
    """A small run, whole, in one process without torchrun: what fails in every training fails here, and says so."""
    config, data = work / "first.yaml", ["--rows", "4000", "--sparse-features=4", "--dense-features=2", "--scenarios=3"]
    config.write_text(_USER.format(dataset=work / "first", batch=256), encoding="utf-8")
    train = ["-m", "apps.train", "--config", str(config), "--run-dir", str(work / "first-run"), "training.max_steps=2"]
    return [
        Stage("first_data", ["-m", "preprocessing", "synthetic", *data, "--out", str(work / "first")], 60),
        Stage("first", train, 90),
    ]


def tests(device: str) -> list[Stage]:
    """Doctor, and where there are tests, as in a clone, those of a GPU. Only files that hold some are read: all take longer."""
    files = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in p.read_text("utf-8")]
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-rs", "-m", "gpu", *files]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(6, (os.cpu_count() or 1) // 2))), "--dist", "loadgroup"]
    return [
        Stage("doctor", ["-m", "mmlrec.doctor"], 60),
        *([Stage("tests", command, 240 if device == "cuda" else 800)] if files else []),
    ]


def users_run(arguments: argparse.Namespace, work: Path) -> list[Stage]:
    """From data to scores, as a user does it."""
    size, batch = SIZES[arguments.device], 8192 if arguments.device == "cuda" else 256
    ids, run_dir, model = "2,7,21,18,3439,6040,3706", str(work / "user-run"), str(work / "user-model")
    data = ["--rows", str(size.user_rows), "--sparse-features=7", "--dense-features=0", f"--num-ids={ids}", "--scenarios=3"]
    config = work / "user.yaml"
    config.write_text(_USER.format(dataset=work / "user", batch=batch), encoding="utf-8")
    train = ["apps.train", "--config", str(config), "--run-dir", run_dir]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
    return [
        Stage("user_data", ["-m", "preprocessing", "synthetic", *data, "--out", str(work / "user")], 60),
        Stage("train", [*torchrun, *train, "training.max_steps=30"], 90),
        Stage("resume", ["-m", *train, "--resume", "training.max_steps=60"], 90),
        Stage("evaluate", ["-m", "apps.evaluate", "--run-dir", run_dir], 60),
        Stage("export", ["-m", "apps.export", "--run-dir", run_dir, "--out", model], 90),
        Stage("score", ["-c", _SCORE.format(model=model)], 60),
    ]


def shapes_data(arguments: argparse.Namespace, work: Path) -> list[Stage]:
    """A dataset for each shape."""
    size = SIZES[arguments.device]
    return [
        Stage(f"data_{name}", ["-m", *generation(work / name, SHAPES[name], size.rows, tasks=2)], 150) for name in size.shapes
    ]


def measured(arguments: argparse.Namespace, work: Path) -> list[Stage]:
    """What has the machine for itself."""
    device, size = arguments.device, SIZES[arguments.device]
    speed = ["-m", "benchmarks.resident", "--device", device, "--rates", "--profiles", str(work / "logs" / "profiles")]
    speed += ["--steps", "40" if device == "cuda" else "2"]
    # The goal's first, should the time not suffice for all.
    for name, batch, precision in sorted(cases(device), key=lambda case: (case[0] != "b", -case[1], case[2])):
        training = f"{{batch_size: {batch}, precision: {precision}}}"
        config = write_config(work / f"{name}-{batch}-{precision}.yaml", work / name, SHAPES[name], training)
        speed += ["--config", str(config)]
    steps = 60 if device == "cuda" else 10
    training = f"{{batch_size: {size.batches[-1]}, precision: bf16, max_steps: {steps}, log_every_steps: {steps // 5}}}"
    config = write_config(work / "end-to-end.yaml", work / "b", SHAPES["b"], training)
    scaling = ["-m", "benchmarks.scaling", "--device", device, "--ranks=1", "--out", str(work / "scaling"), *size.scaling]
    scaling += ["--scenarios=", "--tasks=", "--planned-ranks=", "--limit=40"]
    return [
        Stage("speed", speed, 170),
        Stage("end_to_end", ["-m", "apps.train", "--config", str(config), "--run-dir", str(work / "end-to-end")], 60),
        Stage("scaling", scaling, 110),
    ]


def cases(device: str) -> list[tuple[str, int, str]]:
    """Shape, batch and precision of what is measured on resident batches."""
    size = SIZES[device]
    return [(name, batch, kind) for name in size.shapes for batch in size.batches for kind in ("fp32", "bf16")]


def speed_table(found: Sequence[dict[str, Any]], device: str) -> tuple[str, str]:
    """What `benchmarks.resident` has printed as a line on the machine and a table in Markdown, in the order of `cases`."""
    if not found:
        return "", ""
    machine, *rest = found
    rates, by_name = machine["rates"], {each["config"]: each for each in rest}
    rows = []
    for name, batch, precision in cases(device):
        if of_case := by_name.get(f"{name}-{batch}-{precision}"):
            shape, *others = resident_row(name, precision, of_case, SHAPES[name], batch, rates)
            rows.append([shape, f"{batch:,}", *others])
    about = (
        f"{machine['device']}: matrix products {rates['fp32'] / 1e12:.3g} TFLOP/s fp32, {rates['bf16'] / 1e12:.3g} bf16;"
        f" copy {rates['copy'] / 1e9:.4g} GB/s"
    )
    headers = [RESIDENT[0], "batch", *RESIDENT[1:]]
    return about, tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, stralign="right")


def waits_of(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Place -> measured case -> times in a step that the host waits there for the GPU."""
    places: dict[str, dict[str, float]] = {}
    for each in found:
        for place, times in (each.get("waits") or {}).items():
            places.setdefault(place, {})[each["config"]] = times
    return places


def end_to_end(run_dir: Path) -> float | None:
    """Samples per second of the windows but the first, from the run's own reports; None where there are none."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    speeds = [line["samples_per_second"] for line in lines if line["split"] == "train"]
    return median(speeds[1:]) if len(speeds) > 1 else None


def _row(ended: Ended) -> list[str]:
    how = "out of time" if ended.code is None else "well" if ended.code == 0 else f"exit code {ended.code}"
    return [f"{ended.name:11}", f"{how:12}", f"{ended.seconds:4.0f} s", ended.line]


def summary(stages: Stages, about: str, table: str, waits: dict[str, dict[str, float]], rate: float | None) -> str:
    """What is worth reading first, the tables last."""
    parts = [tabulate([_row(ended) for ended in stages.ended], headers=["stage", "ended", "seconds", "last line"])]
    for name in [ended.name for ended in stages.ended if ended.code != 0]:
        lines = [f"  {line[:200]}" for line in why(stages.log(name))[-40:]]
        parts.append("\n".join([f"{name}:", *lines]))
    if waits:
        lines = [f"  {place}: {', '.join(f'{case} {times:g}' for case, times in of.items())}" for place, of in waits.items()]
        parts.append("\n".join(["The host waits for the GPU, times a step:", *lines]))
    if rate is not None:
        parts.append(f"End to end from Parquet, shape b, bf16, largest batch: {rate:,.0f} samples/s")
    parts += [about, table] if table else []
    return "\n\n".join(parts)


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=local_path, default=Path("runs/gpu"), help="folder of the results (runs/gpu)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: all in small (cuda)")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which whatever runs is ended (540)")
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[], metavar="STAGE,...", help="leave stages out")
    return parser.parse_args(given)


def main() -> None:
    """Run all stages and print the summary."""
    arguments = parse()
    until = time.monotonic() + arguments.seconds
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible; python -m mmlrec.doctor tells more. --device cpu tries it in small.")
    check_replaced(arguments.out / "results.json", lambda found: isinstance(found, dict) and "stages" in found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        logs = work / "logs"
        logs.mkdir()
        device = arguments.device
        begin, *others = first(arguments, work), users_run(arguments, work), shapes_data(arguments, work)
        lanes = [begin, tests(device), *others, measured(arguments, work)]
        known = [stage.name for lane in lanes for stage in lane]
        if unknown := set(arguments.skip) - set(known):
            raise UserError(f"--skip: no stage '{min(unknown)}'. Stages: {', '.join(known)}.")
        begin, *together, last = ([stage for stage in lane if stage.name not in arguments.skip] for lane in lanes)
        stages = Stages(logs, device)
        stages.run(begin, until)
        if any(ended.code != 0 for ended in stages.ended):
            together, last = together[:1], []
        # What is measured gets its time, whatever hangs before.
        stages.together(together, until - min(sum(stage.limit for stage in last), arguments.seconds / 2))
        stages.run(last, until)
        found = [json.loads(line) for line in stages.log("speed").splitlines() if line.startswith("{")]
        about, table = speed_table(found, device)
        waits, rate = waits_of(found[1:]), end_to_end(work / "end-to-end")
        for result in (work / "scaling").glob("*.csv"):
            shutil.copy(result, logs)
        results = {"stages": [vars(ended) for ended in stages.ended], "speed": found, "end_to_end": rate, "waits": waits}
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "tables.md").write_text(f"{about}\n\n{table}\n", encoding="utf-8")
        with tarfile.open(arguments.out / "logs.tar.gz", "w:gz") as archive:
            archive.add(logs, "logs")
        print(f"\n{summary(stages, about, table, waits, rate)}\n\nMore in {arguments.out}")
    failed = [ended.name for ended in stages.ended if ended.code != 0]
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see above, and their logs in {arguments.out / 'logs.tar.gz'}.")


if __name__ == "__main__":
    run(main)
