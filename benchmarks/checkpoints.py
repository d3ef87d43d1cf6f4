"""Checkpoints of several ranks, blocking and asynchronous: bytes that each takes checksums of, the pause in training, memory.

python -m benchmarks.checkpoints --work-dir /data/scratch [--gib 2] [--ranks 2]

Trains a few steps with one large table, with a checkpoint every second step, as `apps.train` does; once with
`training.checkpoint_async: false`, once with true, each in processes of its own, and resumes the last one. The disk of
`--work-dir` takes four checkpoints at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import time
import zlib
from pathlib import Path
from statistics import median
from typing import Any

import torch.multiprocessing
from tabulate import tabulate

from benchmarks.throughput import Shape, generate
from mmlrec.config import load_config
from mmlrec.distributed.stopping import StopSignal
from mmlrec.distributed.world import process_group
from mmlrec.paths import local_path
from mmlrec.run_folder.saver import Saver
from mmlrec.storage.places import Place
from mmlrec.training.run import train
from mmlrec.training.trainer import Trainer

#: Width of the table, and bytes of a row with its Adagrad state.
_DIM, _ROW_BYTES = 64, 64 * 4 * 2
_GIB = 2**30
#: Checkpoints of a run, and steps from one to the next.
_SAVES, _EVERY = 5, 2


class Count:
    """Bytes that zlib takes the checksum of in this process."""

    def __init__(self) -> None:
        self.bytes, self._plain = 0, zlib.crc32
        zlib.crc32 = self._crc32

    def _crc32(self, content: Any, value: int = 0) -> int:
        self.bytes += memoryview(content).nbytes
        return self._plain(content, value)


def _rank(rank: int, ranks: int, port: int, config: Path, run_dir: Path, overrides: list[str], output: Path) -> None:
    """One rank of a run: what it measured goes into a file of its own."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    count, pauses, copies, checksums, memory = Count(), [], [], [], []
    plain_save, plain_copy, plain_resume = Trainer._save, Saver.save, Trainer.resume

    def save(self: Trainer, *, final: bool = False) -> None:
        if not final:
            memory.append(_memory("VmRSS"))
            before, bytes_before = time.perf_counter(), count.bytes
            plain_save(self)
            pauses.append(time.perf_counter() - before)
            self.saver.wait()  # between checkpoints there are more than two steps
            checksums.append(count.bytes - bytes_before)
            memory.append(_memory("VmHWM"))
        else:
            plain_save(self, final=True)

    def copy(self: Saver, folder: Place, *arguments: Any, **options: Any) -> None:
        before = time.perf_counter()
        plain_copy(self, folder, *arguments, **options)
        if folder.name.startswith("step_"):
            copies.append(time.perf_counter() - before)

    plain_fit = Trainer.fit

    def fit(self: Trainer, stop: StopSignal) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: tables took more while they were made
        plain_fit(self, stop)

    found: dict[str, Any] = {}

    def resume(self: Trainer, path: Place) -> None:
        found["resume"] = count.bytes
        plain_resume(self, path)

    Trainer.fit, Trainer._save, Saver.save, Trainer.resume = fit, save, copy, resume  # type: ignore[method-assign]
    with process_group() as world:
        train(load_config(config, overrides), run_dir, world)
    found |= {"pauses": pauses, "copies": copies, "checksums": checksums, "memory": memory}
    output.with_suffix(f".{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def _memory(name: str) -> int:
    """Bytes of memory of this process: VmRSS is what it has, VmHWM the most it has had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def _run(ranks: int, config: Path, run_dir: Path, overrides: list[str], output: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (ranks, port, config, run_dir, overrides, output), nprocs=ranks)
    return [json.loads(output.with_suffix(f".{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=local_path, required=True)
    parser.add_argument("--gib", type=float, default=2.0, help="bytes of the table and its optimizer state")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    folder, ranks = Path(arguments.work_dir), arguments.ranks
    folder.mkdir(parents=True, exist_ok=True)
    dataset, config = folder / "dataset", folder / "config.yaml"
    rows = int(arguments.gib * _GIB / _ROW_BYTES)
    if not dataset.exists():
        generate(dataset, Shape(2, 0, _DIM, f"100,{rows}", 0, 0), 20_000, 2, 1)
    config.write_text(
        f"dataset: {{path: {dataset}, setting: mtl}}\nembeddings: {{dim: {_DIM}, sharding: row_wise}}\n"
        f"training: {{batch_size: 512, max_steps: {_SAVES * _EVERY}, checkpoint_every_steps: {_EVERY}, patience: null}}\n",
        encoding="utf-8",
    )
    table = []
    blocking = 0.0
    for kind in ("false", "true"):
        run_dir = folder / f"run-{kind}"
        shutil.rmtree(run_dir, ignore_errors=True)
        found = _run(ranks, config, run_dir, [f"training.checkpoint_async={kind}"], folder / kind)
        sizes = [file.stat().st_size for file in next((run_dir / "checkpoints").glob("step_*")).iterdir()]
        # All ranks pause until the slowest is done; the first checkpoint fills the buffers.
        pause = median(max(one["pauses"][number] for one in found) for number in range(1, _SAVES))
        copy = median(max(one["copies"][number] for one in found) for number in range(1, _SAVES))
        first = max(one["pauses"][0] for one in found)
        blocking = blocking or copy
        table.append(
            [
                "asynchronous" if kind == "true" else "blocking",
                f"{sum(sizes) / _GIB:.2f}",
                " ".join(f"{max(one['checksums']) / (sum(sizes) / ranks):.3f}" for one in found),
                f"{first:.2f}",
                f"{pause:.2f}",
                f"{copy:.2f}",
                f"{copy / blocking:.0%}",
                " ".join(f"{one['memory'][0] / _GIB:.2f}" for one in found),
                " ".join(f"{one['memory'][-1] / _GIB:.2f}" for one in found),
            ]
        )
    found = _run(ranks, config, folder / "run-true", [f"training.max_steps={(_SAVES + 1) * _EVERY}"], folder / "resumed")
    headers = [
        "saves",
        "checkpoint, GiB",
        "checksummed by each rank / (checkpoint / ranks)",
        "first pause, s",
        "later pauses, s",
        "of these, saving",
        "of blocking",
        "memory of each rank before, GiB",
        "at most",
    ]
    print(tabulate(table, headers=headers, disable_numparse=True, stralign="right"))
    # What was looked at: that checkpoint and the best, of weights alone.
    looked_at = 0
    for name in (f"step_{_SAVES * _EVERY:09d}", "best"):
        looked_at += sum(file.stat().st_size for file in (folder / "run-true/checkpoints" / name).iterdir())
    shares = " ".join(f"{one['resume'] / (looked_at / ranks):.3f}" for one in found)
    print(f"resume: checksummed by each rank / ((newest checkpoint + best) / ranks): {shares}")


if __name__ == "__main__":
    main()
