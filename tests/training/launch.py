"""Starts the ranks of a test launch as real processes (gloo), and reads what they leave."""

import contextlib
import json
import random
import socket
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.processes import Command, environment

WORKER = Path(__file__).parent / "worker.py"


def free_port() -> int:
    """A port that is free, and below those that the system hands out: connections of ranks of other tests take such."""
    while True:
        port = random.SystemRandom().randint(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_ranks(arguments: list[str], logs: list[Path], hosts: int = 1, **options) -> list[Command]:
    """A command as the ranks of one process group, one for each log, without torchrun: rank 0 hosts the store.

    Args:
        hosts: that these ranks are told to be on, as many on each.
    """
    port = str(free_port())
    each = len(logs) // hosts
    ranks: list[Command] = []
    for rank, log in enumerate(logs):
        variables = environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank % each),
            GROUP_RANK=str(rank // each),
            WORLD_SIZE=str(len(logs)),
            LOCAL_WORLD_SIZE=str(each),
            GROUP_WORLD_SIZE=str(hosts),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        ranks.append(Command(arguments, env=variables, log=log, **options))
    return ranks


def rank_process(run_dir: Path | str, rank: int) -> int:
    """The id of the process that is a rank of the training in that run folder, as its command line names it."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            named = f"\0{run_dir}\0".encode() in (process / "cmdline").read_bytes()
            if named and f"RANK={rank}".encode() in (process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
    raise AssertionError(f"no rank {rank} of {run_dir}")


def launch(world_size: int, actions: list[dict], folder: Path, timeout: float = 900, hosts: int = 1) -> None:
    """Run actions on `world_size` ranks; raise with their output when one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"actions-{world_size}.json"
    file.write_text(json.dumps(actions))
    logs = [folder / f"rank-{world_size}-{rank}.log" for rank in range(world_size)]
    ranks = start_ranks([sys.executable, str(WORKER), str(file)], logs, hosts)
    try:
        failed = [rank for rank, command in enumerate(ranks) if command.wait(timeout) != 0]
    finally:
        for command in ranks:
            command.kill()
    assert not failed, "\n".join(f"--- rank {rank}:\n{logs[rank].read_text()[-4000:]}" for rank in failed)


def losses(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> losses, as the run logged them."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def validations(run_dir: Path) -> list[dict]:
    """The validations, as the run logged them, in order."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "valid"]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, gathered, without random states (which belong to ranks)."""
    file = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, file)
    content = torch.load(file, weights_only=False)
    file.unlink()
    flat: dict[str, torch.Tensor] = {}

    def visit(value, prefix: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(inner, f"{prefix}.{key}" if prefix else str(key))
        elif not prefix.startswith("random."):
            flat[prefix] = value

    visit(content, "")
    return flat


def rows_of_steps(run_dir: Path, name: str, world_size: int) -> list[list[int]]:
    """The global batch of each step, rank after rank."""
    ranks = [json.loads((run_dir / f"rows-{name}-{rank}.json").read_text()) for rank in range(world_size)]
    return [[row for rank in step for row in rank] for step in zip(*ranks, strict=True)]
