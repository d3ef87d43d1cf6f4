"""What can be known of a cluster before a job is sent to it: its scheduler's options, and whether it is large enough."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchx import specs

from mmlrec.errors import ConfigError, did_you_mean

# Where no memory is configured, or next to none, TorchX asks for none.
_LEAST_MEMORY_MB = 1000


@dataclass(frozen=True)
class Node:
    """What a node has in all, busy or not."""

    cpu: int
    memory_mb: int
    gpu: int


def check_options(scheduler: str, given: Mapping[str, Any], known: specs.runopts) -> None:
    """Refuse an option of a preset that its scheduler does not have.

    Raises:
        ConfigError: naming the option, with what was probably meant.
    """
    names = [name for name, _ in known]
    for name in given:
        if name not in names:
            allowed = ", ".join(sorted(names))
            raise ConfigError(
                f"scheduler.options.{name}: no option of {scheduler}.{did_you_mean(name, names)} Allowed: {allowed}."
            )


def check_size(app: specs.AppDef, scheduler: str, options: Mapping[str, Any]) -> None:
    """Refuse a job that the cluster can never start.

    Slurm is asked, and the GPUs of this machine are counted for jobs that run on it. Nodes of Kubernetes come and go.

    Raises:
        ConfigError: what the job asks for, and what there is.
    """
    (role,) = app.roles
    wanted = (
        f"{role.num_replicas} node(s) with {role.resource.cpu} CPUs, {role.resource.memMB} MB and {role.resource.gpu} GPUs each"
    )
    if scheduler == "slurm":
        partition, nodes = slurm_nodes(options.get("partition"))
        enough = [node for node in nodes if _holds(node, role.resource)]
        if nodes and len(enough) < role.num_replicas:
            largest = max(nodes, key=lambda node: (node.gpu, node.cpu, node.memory_mb))
            raise ConfigError(
                f"{app.name}: asks for {wanted}, and the Slurm partition {partition} has {len(enough)} of that size: of its"
                f" {len(nodes)} node(s) the largest has {largest.cpu} CPUs, {largest.memory_mb} MB and {largest.gpu} GPUs."
                " Choose another preset, partition, --nodes or resource."
            )
    elif scheduler.startswith("local"):
        here = len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
        if role.resource.gpu * role.num_replicas > here:
            raise ConfigError(f"{app.name}: asks for {wanted}, and this machine has {here} GPUs. Choose another preset.")


def slurm_nodes(partition: str | None) -> tuple[str, list[Node]]:
    """The nodes of a partition, of the default one where none is named; no nodes where Slurm does not say."""
    if shutil.which("sinfo") is None:
        return "", []
    command = ["sinfo", "--noheader", "--Node", "--format", "%P|%c|%m|%G"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    nodes, name = [], partition or ""
    for line in told.stdout.splitlines():
        label, cpu, memory, generic = line.split("|")
        if label.rstrip("*") == partition if partition else label.endswith("*"):
            name = label.rstrip("*")
            # As in gpu:8, gpu:a100:8(S:0-1), shard:16.
            gpus = re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", generic)
            nodes.append(Node(int(cpu.rstrip("+")), int(memory.rstrip("+")), sum(map(int, gpus))))
    return name, nodes


def _holds(node: Node, asked: specs.Resource) -> bool:
    memory = node.memory_mb <= _LEAST_MEMORY_MB or node.memory_mb >= asked.memMB
    return memory and node.cpu >= asked.cpu and node.gpu >= asked.gpu
