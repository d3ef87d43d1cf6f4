"""What ranks run on, as far as a plan depends on it: read from this machine, or said of machines that are not at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchrec.distributed.planner import Topology

from mmlrec.errors import ConfigError

#: Share of a device's memory that no plan counts on: context and workspaces of the libraries, fragments, the process itself.
RESERVED_SHARE = 0.15
_GIB = 2**30


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second, of each rank; and seconds that pass however few bytes there are.

    Attributes:
        round: seconds of a message from rank to rank that carries nothing, between ranks that have worked in between: a
            collective takes one or several.
        launch: seconds that the host takes to start an operator.
    """

    in_host: float
    between_hosts: float
    memory: float
    round: float
    launch: float


#: What torchrec's planner takes for a GPU: NVLink, a network card of 100 Gb/s for each, and its memory. Seconds: what NCCL
#: and CUDA are said to take; not measured.
GPU = Bandwidths(600.0 * _GIB, 12.5 * _GIB, 897.0 * _GIB, 25e-6, 5e-6)
#: Processes on CPUs: gloo in a host, 10 Gb/s between hosts, and a share of the host's memory channels. Seconds: measured.
CPU = Bandwidths(3.0 * _GIB, 1.25 * _GIB, 51.0 * _GIB, 100e-6, 4.5e-6)
#: Operations per second of a rank in matrix products, by device, where they are not told. Of a CPU: measured, one core with
#: AVX-512 in products of 256 columns.
OPERATIONS = {"cuda": 2e13, "cpu": 1.9e11}


@dataclass(frozen=True)
class Hardware:
    """The ranks of a plan: equal ones, `ranks_per_host` on each host.

    Attributes:
        device: "cuda" or "cpu".
        memory: bytes of one rank: of its GPU, or its share of the host's memory.
        host_memory: bytes of the host's memory for each rank, beside that of its GPU.
        equal_hosts: False where hosts have different numbers of ranks; then no table can be split over those of a host.
    """

    world_size: int
    ranks_per_host: int
    device: str
    memory: int
    bandwidths: Bandwidths
    equal_hosts: bool = True
    host_memory: int = 0

    @property
    def num_hosts(self) -> int:
        """Hosts, the last of which may have fewer ranks."""
        return -(-self.world_size // self.ranks_per_host)

    @property
    def host_of_several(self) -> bool:
        """Whether a host is less than all ranks, and more than one: only then it is a place of its own for a table."""
        return self.has_whole_hosts and 1 < self.ranks_per_host < self.world_size

    @property
    def has_whole_hosts(self) -> bool:
        """Whether all hosts have as many ranks."""
        return self.equal_hosts and self.world_size % self.ranks_per_host == 0

    def split_over(self, sharding: str) -> int:
        """How many ranks share the rows of a table."""
        return {"table_wise": 1, "table_row_wise": self.ranks_per_host, "row_wise": self.world_size}[sharding]

    def host(self, index: int) -> list[int]:
        """The ranks of a host."""
        return list(range(index * self.ranks_per_host, (index + 1) * self.ranks_per_host))

    def of_replica(self, replicas: int) -> Hardware:
        """The ranks of one of several copies of the tables, which follow each other.

        Raises:
            ConfigError: they cannot be shared out evenly, or not so that a host has whole copies or a copy whole hosts.
        """
        ranks, rest = divmod(self.world_size, replicas)
        each = min(self.ranks_per_host, ranks)
        if rest or (replicas > 1 and (not self.has_whole_hosts or ranks % each or self.ranks_per_host % each)):
            raise ConfigError(
                f"embeddings.replicas: {self.world_size} ranks on hosts of {self.ranks_per_host} cannot be divided into"
                f" {replicas} equal parts that are whole hosts, or that whole hosts consist of."
            )
        return replace(self, world_size=ranks, ranks_per_host=each)

    @property
    def usable(self) -> int:
        """Bytes of a rank that a plan may fill."""
        return int(self.memory * (1 - RESERVED_SHARE))

    @property
    def usable_on_host(self) -> int:
        """Bytes of the host's memory that a plan may fill for each rank, beside its GPU."""
        return int(self.host_memory * (1 - RESERVED_SHARE))

    def topology(self, reserved: int = 0) -> Topology:
        """The same for torchrec's planner, less `reserved` bytes of each rank for other things than tables."""
        capacity = max(self.usable - reserved, 0)
        on_gpu = self.device == "cuda"
        return Topology(
            world_size=self.world_size,
            local_world_size=self.ranks_per_host,
            compute_device=self.device,
            hbm_cap=capacity if on_gpu else 0,
            ddr_cap=self.usable_on_host if on_gpu else capacity,
            # torchrec counts in milliseconds
            intra_host_bw=self.bandwidths.in_host / 1000,
            inter_host_bw=self.bandwidths.between_hosts / 1000,
            hbm_mem_bw=self.bandwidths.memory / 1000,
            ddr_mem_bw=self.bandwidths.memory / 1000,
        )


def memory_of(device: torch.device, local_world_size: int) -> int:
    """Bytes that a rank on this machine has: all of its GPU, or its share of the host."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory("MemTotal") // local_world_size


def host_memory(key: str) -> int:
    """Bytes of this host, by a key of /proc/meminfo such as MemAvailable; 2^62, without end, where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
    except (OSError, StopIteration):
        return 2**62
