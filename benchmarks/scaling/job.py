"""The ranks that torchrun has started: each starts a fresh process for each point, rank 0 keeps the results."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from benchmarks.scaling import results
from benchmarks.scaling.planned import Planner
from benchmarks.scaling.points import AXES, Point, points
from benchmarks.scaling.results import GIB, MEASURED, PLANNED, Row, Rows, Study
from benchmarks.scaling.work import task_of
from mmlrec.distributed.world import quiet_libraries
from mmlrec.embeddings.hardware import host_memory
from mmlrec.errors import RankError, UserError
from mmlrec.session.planning import TrainingPlan

_JOIN = timedelta(minutes=10)
_BEYOND_LIMIT = 60.0  # seconds that ranks wait for each other's processes after their limit
_KILLED = 124


def work(options: argparse.Namespace) -> None:
    """All points of this number of ranks, in step with the other ranks.

    Raises:
        UserError: there is no such device.
        RankError: on rank 0, when points could not be measured.
    """
    there = torch.cuda.is_available()
    device = options.device or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        raise UserError("--device cuda: no GPU is visible.")
    signal.signal(signal.SIGTERM, _end)
    quiet_libraries()
    store, rank, world_size = next(rendezvous("env://", timeout=_JOIN))
    book = _Book(options, device, world_size) if rank == 0 else None
    if book is not None:
        store.set("todo", json.dumps([vars(point) for point in book.todo]))
    todo = [Point(**values) for values in json.loads(store.get("todo"))]
    with TemporaryDirectory() as folder:
        for number, point in enumerate(todo):
            result, begun = Path(folder, f"{number}.json"), time.monotonic()
            if book is not None:
                store.set(f"{number}/port", str(_free_port()))
            task = task_of(
                point,
                config=options.config,
                overrides=options.overrides,
                zipf=options.zipf,
                seconds=options.seconds,
                device=device,
                result=result,
            )
            outcome = _run(task, int(store.get(f"{number}/port")), options, device)
            store.set(f"{number}/of/{rank}", json.dumps(outcome))
            if book is not None:
                limit = timedelta(seconds=options.limit + _BEYOND_LIMIT)
                outcomes = _outcomes(store, [f"{number}/of/{other}" for other in range(world_size)], limit)
                book.keep(number, point, outcomes, result, time.monotonic() - begun)
                store.set(f"{number}/kept", "")
            else:
                store.wait([f"{number}/kept"], timedelta(seconds=options.limit + 2 * _BEYOND_LIMIT))
        # Rank 0 may host the store: it leaves last.
        store.set(f"left/{rank}", "")
        if book is not None:
            store.wait([f"left/{other}" for other in range(world_size)], _JOIN)
    if book is not None and book.failed:
        raise RankError(f"{book.failed} of {len(todo)} points could not be measured; the next start tries them again.")


def _end(number: int, frame: FrameType | None) -> None:
    """On SIGTERM: out of the wait for the process of a point, which ends that, too."""
    sys.exit(128 + number)


def _run(task: str, port: int, options: argparse.Namespace, device: str) -> tuple[int, str]:
    """One process of a point: exit code, and its last words where it failed."""
    # Ranks meet in a store of their own, and tell what is wrong here, not to the agent.
    environment = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_ERROR_FILE"}
    environment |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    environment |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "benchmarks.scaling.work", task]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=options.limit, check=False
        )
    except subprocess.TimeoutExpired:
        return _KILLED, f"not done within {options.limit:g} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    return done.returncode, (told or lines or [f"ended with {done.returncode}"])[-1] if done.returncode else ""


def _outcomes(store: dist.Store, keys: list[str], limit: timedelta) -> list[tuple[int, str]]:
    try:
        store.wait(keys, limit)
    except RuntimeError:
        return [(_KILLED, "not all ranks have ended in time")]
    return [tuple(json.loads(store.get(key))) for key in keys]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


class _Book:
    """What rank 0 knows: plans, what is to be done, and the files of the results."""

    def __init__(self, options: argparse.Namespace, device: str, ranks: int) -> None:
        self._folder, self._ranks = options.out, ranks
        per_host = options.ranks_per_host or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        base = replace(options.base, ranks=ranks)
        self._study = Study(
            device=device,
            machine=_machine(device),
            threads=options.threads,
            ranks_per_host=per_host,
            config=shlex.join([options.config, *options.overrides]),
            base=" ".join(f"{axis}={getattr(base, axis)}" for axis in AXES),
            zipf=options.zipf,
        )
        memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else host_memory("MemTotal")
        self._planner = Planner(options.config, options.overrides, device, memory, per_host)
        own = points(base, {axis: getattr(options, axis) for axis in AXES})
        known = results.read(self._folder, ranks, self._study)[1]
        self.todo: list[Point] = []
        beyond: list[Point] = []
        rows: Rows = {}
        for point in own:
            plan, before = self._planner.plan(point), known.get(point)
            note = self._cannot(point, plan)
            measured = before is not None and before.kind == MEASURED
            # What was measured stays until it is measured again.
            rows[point] = _with_plan(before if before is not None and measured else Row(PLANNED, note=note), plan)
            if measured and not options.again:
                continue
            if not note:
                self.todo.append(point)
            elif plan.missing and (least := self._planner.least_ranks(point)):
                beyond.append(replace(point, ranks=least))
        for number in set(options.planned_ranks) - {ranks}:
            beyond += points(replace(base, ranks=number), {})
        self._rows = known | rows
        results.write(self._folder, self._study, ranks, self._rows)
        self._plan_others(beyond)
        self.failed, self._seconds = 0, 0.0
        left_out = len(own) - len(self.todo)
        print(f"{ranks} rank(s): {len(self.todo)} points to measure, {left_out} measured before or planned only", flush=True)

    def _plan_others(self, beyond: Iterable[Point]) -> None:
        """Plan points of other numbers of ranks, beside what is measured of them."""
        by_ranks: dict[int, list[Point]] = {}
        for point in beyond:
            by_ranks.setdefault(point.ranks, []).append(point)
        for ranks, those in by_ranks.items():
            rows = results.read(self._folder, ranks, self._study)[1]
            for point in those:
                rows[point] = _with_plan(rows.get(point, Row(PLANNED, note="of other ranks")), self._planner.plan(point))
            results.write(self._folder, self._study, ranks, rows)

    def _cannot(self, point: Point, plan: TrainingPlan) -> str:
        """Why a point cannot be measured here; nothing where it can."""
        if plan.missing:
            return f"does not fit: {plan.missing / GIB:.1f} GiB too many on a rank"
        need = plan.fullest.total * min(point.ranks, self._study.ranks_per_host)
        free = host_memory("MemAvailable")
        if self._study.device == "cpu" and need > free:
            return f"{need / GIB:.1f} GiB needed, {free / GIB:.1f} free at the moment"
        return ""

    def keep(self, number: int, point: Point, outcomes: list[tuple[int, str]], result: Path, seconds: float) -> None:
        """Keep what came out of a point, and say it."""
        if all(code == 0 for code, _ in outcomes):
            row = replace(self._rows[point], kind=MEASURED, note="", **json.loads(result.read_text(encoding="utf-8")))
            said = f"{row.samples_per_second:,.0f} samples/s, {row.step_ms:,.1f} ms a step"
        else:
            told = [words for code, words in outcomes if code]
            why = next((words for words in told if words.startswith("error: ")), told[0]).removeprefix("error: ")
            row, said = replace(self._rows[point], note=f"failed: {why}"), f"FAILED: {why}"
            self.failed += 1
        self._rows[point] = row
        results.write(self._folder, self._study, self._ranks, self._rows)
        self._seconds += seconds
        left = self._seconds / (number + 1) * (len(self.todo) - number - 1)
        print(f"[{number + 1}/{len(self.todo)}] {point}: {said} ({seconds:.0f} s; about {left:.0f} s left)", flush=True)


def _with_plan(row: Row, plan: TrainingPlan) -> Row:
    update: dict[str, Any] = {
        "planned": plan.fullest.total,
        "planned_step_ms": plan.step_ms,
        "missing": plan.missing,
        "placed": row.placed or results.placed_as(table.sharding for table in plan.tables),
    }
    return replace(row, **update)


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {os.cpu_count()} cores"
