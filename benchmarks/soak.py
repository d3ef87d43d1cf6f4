"""A long training of tiny steps, to see whether memory, file handles and threads of its ranks stay what they are.

python -m benchmarks.soak [--steps 100000] [--checkpoint-every 500] [--processes 2] [--work-dir DIR]

Trains under torchrun and looks at each rank in /proc every few seconds. WORK-DIR/soak.csv has all that was seen: seconds since
the start, step, rank, resident memory in MiB, of that anonymous (not of mapped files), file handles, threads. The table
compares the medians of the second tenth of the steps, when all is warm, with those of the last tenth. The exit code is 1 unless
both are alike: as many handles and threads, and at most 2 % or 16 MiB more memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from tabulate import tabulate

from benchmarks.throughput import Shape, generate
from mmlrec.paths import local_path

_SHAPE = Shape(2, 0, 4, "50,500", 0, 0)
_ROWS = 80_000
_COLUMNS = ("seconds", "step", "rank", "resident_mib", "anonymous_mib", "handles", "threads")
_PROGRESS_S = 30.0


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process of each rank that a torchrun has started."""
    found = {}
    try:
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii").split():
            rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes())
            if rank:
                found[int(rank[1])] = int(child)
    except OSError:  # has ended meanwhile
        pass
    return found


def look_at(process: int) -> tuple[float, float, int, int] | None:
    """Resident and anonymous memory in MiB, file handles and threads of a process; None where it has ended."""
    place = Path(f"/proc/{process}")
    try:
        status = (place / "status").read_text(encoding="utf-8")
        handles = len(list((place / "fd").iterdir()))
        values = {
            name: int(re.findall(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[0]) for name in ("VmRSS", "RssAnon", "Threads")
        }
    except (OSError, IndexError):
        return None
    return values["VmRSS"] / 1024, values["RssAnon"] / 1024, handles, values["Threads"]


def newest_step(metrics: Path) -> int:
    """Of the last report."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 65_536))
            lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b'{"step"')]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except OSError:
        return 0


def table_of(samples: list[tuple[float, ...]], steps: int) -> tuple[str, bool]:
    """The table of what was seen, rows as `_COLUMNS`, and whether all stayed what it was.

    Args:
        steps: of the whole run.
    """
    rows, flat = [], True
    for rank in sorted({int(sample[2]) for sample in samples}):
        own = [sample for sample in samples if sample[2] == rank]
        early = [sample for sample in own if 0.1 * steps <= sample[1] < 0.2 * steps]
        late = [sample for sample in own if sample[1] >= 0.9 * steps]
        if not early or not late:
            raise SystemExit("too few samples: take more steps, or a smaller --every.")
        for column in range(3, len(_COLUMNS)):
            before, after = (median(sample[column] for sample in part) for part in (early, late))
            most = max(sample[column] for sample in own)
            allowed = max(0.02 * before, 16.0) if column < 5 else 0.0
            flat &= after <= before + allowed
            rows.append([rank, _COLUMNS[column], *(f"{value:.6g}" for value in (before, after, after - before, most))])
    headers = ["rank", "what", "steps 10 to 20 %", "90 to 100 %", "more", "most"]
    return tabulate(rows, headers=headers, disable_numparse=True, stralign="right"), flat


def main() -> None:
    """Run, sample, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps (default: 500)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples (default: 5)")
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds after which the run is given up (default: 7200)")
    parser.add_argument("--work-dir", type=local_path, default=Path("benchmark-soak"))
    options = parser.parse_args()
    work = options.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    dataset, run, config = work / "data", work / "run", work / "config.yaml"
    shutil.rmtree(run, ignore_errors=True)
    if not dataset.exists():
        generate(dataset, _SHAPE, _ROWS, 1, options.processes)
    config.write_text(
        f"dataset: {{path: {dataset}, setting: mtl}}\n"
        "model: {name: shared_bottom, bottom_hidden_units: [8], tower_hidden_units: []}\n"
        f"embeddings: {{dim: {_SHAPE.dim}}}\n"
        f"training: {{batch_size: 8, epochs: 100000, patience: null, max_steps: {options.steps},"
        f" checkpoint_every_steps: {options.checkpoint_every}}}\n",
        encoding="utf-8",
    )
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes), "-m"]
    command = [sys.executable, "-m", *launcher, "apps.train", "--config", str(config), "--run-dir", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    samples: list[tuple[float, ...]] = []
    start = told = time.monotonic()
    with (work / "output.txt").open("w") as output, (work / "soak.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        job = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while job.poll() is None and time.monotonic() - start < options.limit:
                now, step = time.monotonic(), newest_step(run / "metrics.jsonl")
                for rank, process in sorted(ranks_of(job.pid).items()):
                    seen = look_at(process)
                    if seen is not None:
                        samples.append((round(now - start, 1), step, rank, *(round(value, 2) for value in seen)))
                        writer.writerow(samples[-1])
                file.flush()
                if now - told >= _PROGRESS_S:
                    told = now
                    rest = f"{(options.steps - step) * (now - start) / step / 60:.0f} min left" if step else "starting"
                    print(f"step {step} of {options.steps}, {now - start:.0f} s, {rest}", file=sys.stderr, flush=True)
                time.sleep(options.every)
        finally:
            job.terminate()
            job.wait()
    if job.returncode != 0:
        raise SystemExit(f"the run ended with {job.returncode} after {time.monotonic() - start:.0f} s: {work / 'output.txt'}")
    text, flat = table_of(samples, options.steps)
    print(f"{options.steps} steps on {options.processes} ranks in {time.monotonic() - start:.0f} s; {work / 'soak.csv'}")
    print(text)
    print("flat" if flat else "not flat")
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
