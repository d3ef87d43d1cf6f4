"""Bytes that a rank sends in a step: counted by the kernel at its sockets, and by a formula from the placement alone."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_TCP_INFO_BYTES = 256
_BYTES_SENT = 200  # offset of tcpi_bytes_sent in struct tcp_info (Linux 4.19 and later)


def bytes_sent() -> int | None:
    """Bytes that this process has sent so far through the TCP connections that it holds now; None where nobody counts them.

    Without headers, and without those to the store, over which ranks only find each other. gloo sends everything by such
    connections, within a host, too. NCCL does not.
    """
    store = int(os.environ.get("MASTER_PORT", "0"))
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile
            continue
        with connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                continue
            try:
                ports = connection.getpeername()[1], connection.getsockname()[1]
            except OSError:  # not connected
                continue
            if store in ports:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            if len(info) < _BYTES_SENT + 8:
                return None
            total += struct.unpack_from("Q", info, _BYTES_SENT)[0]
    return total


@dataclass(frozen=True)
class Placement:
    """What the formula needs to know of one feature.

    Attributes:
        rows: of its table.
        sharding: "table_wise" or "row_wise".
        ranks: that hold the rows, in their order.
    """

    name: str
    rows: int
    dim: int
    sharding: str
    ranks: list[int]


def formula(
    rank: int,
    world_size: int,
    placements: Sequence[Placement],
    ids: dict[str, Tensor],
    *,
    batch_size: int,
    parameter_bytes: int,
    backend: str,
) -> dict[str, float]:
    """Bytes that a rank sends in a step, by phase.

    W ranks, b rows on each, d the width of a feature:

    ids        4 b lengths and 8 for each id to every rank that may hold its row. table_wise: to one rank. row_wise: lengths to
               all, each id to the rank of its row.
    vectors    table_wise: 4 b d to each other rank, of its own tables. row_wise: sums over ranks of [W b, d]; a ring sends
               4 (W - 1) b d, and gloo, which makes it of an all-reduce, twice that.
    gradients  table_wise: 4 b d for each table of another rank. row_wise: 4 (W - 1) b d.
    network    the gradients, all-reduced in a ring: 2 (W - 1) / W of their bytes.

    What is left out is a few numbers a step: sizes of messages, sums of the loss.

    Args:
        ids: feature -> those of the rows of this rank in a step, [n] int64.
        batch_size: rows of this rank, b.
        parameter_bytes: of the network.
        backend: "gloo" or "nccl".
    """
    others, b = world_size - 1, batch_size
    sent = dict.fromkeys(("ids", "vectors", "gradients", "network"), 0.0)
    for feature in placements:
        vectors = 4 * b * feature.dim
        own = ids[feature.name]
        if feature.sharding == "table_wise":
            if feature.ranks == [rank]:
                sent["vectors"] += others * vectors
            else:
                sent["ids"] += 4 * b + 8 * len(own)
                sent["gradients"] += vectors
        elif feature.sharding == "row_wise":
            block = -(-feature.rows // world_size)
            elsewhere = int(((own // block) != rank).sum())
            sent["ids"] += others * 4 * b + 8 * elsewhere
            sent["vectors"] += others * vectors * (2 if backend == "gloo" else 1)
            sent["gradients"] += others * vectors
        else:
            raise ValueError(f"no formula for {feature.sharding}")
    sent["network"] = 2 * others / world_size * parameter_bytes
    return sent


def placements_of(plan: Sequence[dict[str, Any]], tables: dict[str, str]) -> list[Placement]:
    """The placement of each feature.

    Args:
        plan: of `Session.plan`.
        tables: feature -> table.
    """
    by_name = {row["table"]: row for row in plan}
    return [
        Placement(feature, row["rows"], row["dim"], row["sharding"], row["ranks"])
        for feature, row in ((feature, by_name[table]) for feature, table in tables.items())
    ]
