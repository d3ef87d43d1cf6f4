"""Latency and throughput of an exported model: MMoE of shape b of `benchmarks.throughput`, raw rows in, scores out.

python -m benchmarks.serving [--threads 2] [--calls 300] [--requests 10000] [--cpu-time]

All that is compared is called in turn, in one process, so that what else the machine does meets all alike. The network's floor
are its matrix products alone, on the same shapes; `floor at the rate of large products`, by the clock, is `benchmarks.flops` by
the rate of a large matrix product.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.flops import Case, mmoe
from benchmarks.throughput import SHAPES, rates
from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.vocabularies import Vocabularies
from mmlrec.export.network import Format, Scorer, export_network, save_network
from mmlrec.export.tables import write_table
from mmlrec.models.base.model import ModelSpec
from mmlrec.models.mmoe import MMoE
from mmlrec.paths import local_path
from mmlrec.schema import Setting, Task
from mmlrec.serving.model import Model, load

SHAPE = SHAPES["b"]
SIZES = [int(size) for size in SHAPE.ids.split(",")]
TASKS = ("click", "buy")
BATCH, ENCODED_ROWS = 4096, 1 << 16
CLIENTS = 16
UNSEEN = 0.01
Clock = Callable[[], float]


def text(number: int) -> str:
    """A raw value of a vocabulary of texts: every second one is of texts, the others of integers."""
    return f"value-{number:07d}"


def write_models(folder: Path) -> Scorer:
    """Exported models `pt2` and `onnx` of random weights, with vocabularies of 10 to 1,000,000 values; their network."""
    names = [f"f{index}" for index in range(SHAPE.sparse)]
    dense = [f"d{index}" for index in range(SHAPE.dense)]
    spec = ModelSpec(Setting.MTL, tuple(Task(name=task) for task in TASKS), 1, dict.fromkeys(names, SHAPE.dim), SHAPE.dense)
    config = MMoE.Config(num_experts=4, expert_hidden_units=[256, 128], gate_hidden_units=[64], tower_hidden_units=[64])
    scorer = Scorer(MMoE(spec, config), {})
    values: dict[str, Iterable[pa.Array]] = {
        name: [pa.array(list(map(text, range(size))) if index % 2 else range(size))]
        for index, (name, size) in enumerate(zip(names, SIZES, strict=True))
    }
    features: dict[str, Any] = {
        name: {"kind": "sparse", "type": "string" if index % 2 else "int64", "table": name} for index, name in enumerate(names)
    }
    features |= {name: {"kind": "dense", "type": "float32", "range": [0.0, 1.0]} for name in dense}
    tables = {name: {"ids": "vocabulary", "rows": size + 1} for name, size in zip(names, SIZES, strict=True)}
    facts = {"form": 1, "dataset": "benchmark", "digest": "", "features": features, "scenario": None, "tables": tables}
    encoder = Encoder(facts, Vocabularies.of(values))
    formats: tuple[Format, ...] = ("pt2", "onnx")
    for kind in formats:
        model = folder / kind
        (model / "tables").mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        encoder.save(model / "encoder")
        save_network(export_network(scorer, kind), model / f"network.{kind}", kind)
        for name, size in zip(names, SIZES, strict=True):
            rows = 0.1 * torch.randn(size + 1, SHAPE.dim, generator=generator)
            write_table(model / f"tables/{name}.safetensors", name, [rows], (size + 1, SHAPE.dim), "fp32")
        card = {
            **{"form": 1, "name": "benchmark", "method": "mmoe", "multi_scenario": False, "dense": dense},
            "network": {"file": f"network.{kind}", "format": kind, "outputs": TASKS},
            "features": [{"name": name, "kind": of["kind"], "examples": []} for name, of in features.items()],
            "tables": [
                {"name": name, "file": f"tables/{name}.safetensors", "rows": size + 1, "dim": SHAPE.dim, "dtype": "fp32"}
                for name, size in zip(names, SIZES, strict=True)
            ],
            "lookups": [[{"feature": name, "table": name, "pooling": "sum"} for name in names]],
        }
        (model / "model.json").write_text(json.dumps(card), encoding="utf-8")
    return scorer


def raw_rows(num_rows: int, seed: int) -> pa.Table:
    """Rows of uniform values, of which some are in no vocabulary."""
    draw, columns = np.random.default_rng(seed), {}
    for index, size in enumerate(SIZES):
        numbers = draw.integers(0, size + max(1, int(UNSEEN * size)), num_rows)
        columns[f"f{index}"] = pa.array(map(text, numbers.tolist()) if index % 2 else numbers)
    for index in range(SHAPE.dense):
        columns[f"d{index}"] = pa.array(draw.random(num_rows))
    return pa.table(columns)


def in_turn(work: dict[str, Callable[[int], object]], calls: int, clock: Clock) -> dict[str, NDArray[np.float64]]:
    """Seconds of each call, after a tenth of them; the argument is the number of the call."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for call in range(-max(3, calls // 10), calls):
        for name, function in work.items():
            begun = clock()
            function(call)
            if call >= 0:
                found[name].append(clock() - begun)
    return {name: np.array(seconds) for name, seconds in found.items()}


def eager(scorer: Scorer) -> Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]]:
    """The network as training has it."""

    def run(x: NDArray[np.float32], scenario: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            scores: torch.Tensor = scorer(torch.from_numpy(x), torch.from_numpy(scenario))
        return scores.numpy()

    return run


def products(rows: int) -> Callable[[int], object]:
    """The network's matrix products, nothing else: experts side by side, gates and towers of both tasks."""
    shapes = [
        (1, SHAPE.input_width, 4 * 256),
        (4, 256, 128),
        (1, SHAPE.input_width, 2 * 64),
        (2, 64, 4),
        (2, 128, 64),
        (2, 64, 1),
    ]
    operands = [(torch.randn(b, rows, k), torch.randn(b, k, n)) for b, k, n in shapes]

    def run(_: int) -> None:
        for a, b in operands:
            torch.bmm(a, b)

    return run


def scored(model: Model, inputs: list[Any], call: int) -> object:
    """One of the inputs, scored."""
    return model.score(inputs[call % len(inputs)])


def latencies(models: dict[str, Model], calls: int, clock: Clock) -> str:
    """p50 and p99 of calls with few rows."""
    lines = []
    for num_rows in (1, 100, 1000):
        tables = [raw_rows(num_rows, seed) for seed in range(20)]
        given: tuple[tuple[str, list[Any]], ...] = ("Arrow", tables), ("dicts", [table.to_pylist() for table in tables])
        for kind, inputs in given:
            work: dict[str, Callable[[int], object]] = {name: partial(scored, model, inputs) for name, model in models.items()}
            for name, seconds in in_turn(work, calls if num_rows < 1000 else calls // 2, clock).items():
                p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
                lines.append([num_rows, kind, name, f"{p50:.2f}", f"{p99:.2f}"])
    return tabulate(lines, headers=["rows", "given as", "network by", "p50 ms", "p99 ms"], disable_numparse=True)


def throughput(models: dict[str, Model], threads: int, clock: Clock) -> str:
    """Networks and encoder in batches, against the floor."""
    encoder = models["torch.export"].encoder
    inputs = encoder.inputs(raw_rows(BATCH, 0))
    x, scenario = models["torch.export"]._looked_up(inputs, 0, BATCH), np.zeros(BATCH, np.int64)
    chunk = 2048  # rows that `Model.score_inputs` gives the network at a time

    def in_chunks(_: int, network: Any) -> None:
        for start in range(0, BATCH, chunk):
            network(x[start : start + chunk], scenario[start : start + chunk])

    work: dict[str, Callable[[int], object]] = {"floor: products alone": products(BATCH)}
    work |= {f"network, {name}": partial(in_chunks, network=model._network) for name, model in models.items()}
    work["lookups"] = lambda _: models["torch.export"]._looked_up(inputs, 0, BATCH)
    table = raw_rows(ENCODED_ROWS, 1)
    work |= {f"raw rows to scores, {name}": partial(scored, model, [raw_rows(BATCH, 2)]) for name, model in models.items()}
    seconds = {name: float(np.median(found)) for name, found in in_turn(work, 30, clock).items()}
    floor = seconds["floor: products alone"]
    lines = [
        [name, f"{1e3 * found:.1f}", f"{BATCH / found:,.0f}", f"{floor / found:.0%}" if name.startswith("network") else ""]
        for name, found in seconds.items()
    ]
    case = Case(SHAPE.sparse, SHAPE.dim, SHAPE.dense, len(TASKS), 1)
    at_rate = BATCH * mmoe(case) / rates(threads)["fp32"]
    lines.append(
        [
            "floor at the rate of large products (clock)",
            f"{1e3 * at_rate:.1f}",
            f"{BATCH / at_rate:,.0f}",
            f"{floor / at_rate:.0%}",
        ]
    )
    encoded = float(np.median(in_turn({"": lambda _: encoder.inputs(table)}, 7, clock)[""]))
    lines.append(["encoder", f"{1e3 * encoded * BATCH / ENCODED_ROWS:.1f}", f"{ENCODED_ROWS / encoded:,.0f}", ""])
    return tabulate(lines, headers=[f"{BATCH} rows", "ms", "rows/s", "of the floor"], disable_numparse=True)


def over_http(model: Path, requests: int, threads: int) -> str:
    """Requests of one row from clients that keep their connections; a process of their own beside the service."""
    options = ["--model", str(model), "--port", "0", "--threads", str(threads)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    service = subprocess.Popen(
        [sys.executable, "-m", "apps.serve", *options], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert service.stdout is not None
        found = re.search(r"http://[\d.]+:(\d+)/", service.stdout.readline())
        if found is None:
            raise SystemExit("the service did not start")
        bodies = [json.dumps({"rows": [row]}).encode() for row in raw_rows(200, 3).to_pylist()]
        seconds: list[float] = []
        errors: list[int] = []

        def ask(client: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]))
            for number in range(client, requests, CLIENTS):
                begun = time.perf_counter()
                connection.request("POST", "/score", bodies[number % len(bodies)])
                answer = connection.getresponse()
                content = answer.read()
                seconds.append(time.perf_counter() - begun)
                if answer.status != 200 or len(json.loads(content)["scores"]) != 1:
                    errors.append(answer.status)

        begun = time.perf_counter()
        clients = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        whole = time.perf_counter() - begun
    finally:
        service.terminate()
    code = service.wait()
    p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
    return (
        f"HTTP: {len(seconds):,} requests of 1 row from {CLIENTS} clients on the same cores: {len(errors)} errors,"
        f" p50 {p50:.1f} ms, p99 {p99:.1f} ms, {len(seconds) / whole:,.0f} requests/s; exit code {code} after SIGTERM"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=300, help="of each model for each number of rows")
    parser.add_argument("--requests", type=int, default=10_000, help="over HTTP")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, not the clock's: on a busy machine, with 1 thread"
    )
    parser.add_argument("--work-dir", type=local_path, help="write the models here instead of a temporary folder")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    with TemporaryDirectory(dir=arguments.work_dir) as scratch:
        folder = Path(scratch)
        torch.manual_seed(0)
        scorer = write_models(folder)
        models = {"torch.export": load(folder / "pt2", threads=arguments.threads)}
        models["ONNX Runtime"] = load(folder / "onnx", threads=arguments.threads)
        exported = models["torch.export"]
        models["eager"] = Model(exported.card, exported.encoder, exported._tables, eager(scorer))
        row = raw_rows(50, 9)
        for model in models.values():
            apart = np.abs(model.score(row)["score.buy"].to_numpy() - exported.score(row)["score.buy"].to_numpy()).max()
            assert apart < 1e-5, apart
        print(latencies(models, arguments.calls, clock), flush=True)
        print(throughput(models, arguments.threads, clock), flush=True)
        if arguments.requests:
            print(over_http(folder / "pt2", arguments.requests, arguments.threads), flush=True)


if __name__ == "__main__":
    main()
