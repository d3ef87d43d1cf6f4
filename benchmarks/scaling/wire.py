"""Bytes that a rank sends in a step: counted by the kernel at its sockets, and by a formula from the placement alone."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TCP_INFO_BYTES = 256
_BYTES_SENT = 200  # offset in struct tcp_info of tcpi_bytes_sent, before tcpi_bytes_retrans (Linux 4.19 and later)


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
            if len(info) < _BYTES_SENT + 16:
                return None
            sent, sent_again = struct.unpack_from("2Q", info, _BYTES_SENT)
            total += sent - sent_again
    return total


@dataclass(frozen=True)
class Placement:
    """What the formula needs to know of one feature.

    Attributes:
        rows: of its table.
        sharding: "table_wise", "row_wise" or "table_row_wise".
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
    vector_bytes: float = 4,
) -> dict[str, float]:
    """Bytes that a rank sends in a step, by phase.

    W ranks, b rows on each, H the ranks that share the rows of a table, v = 4 b d bytes of a feature's vectors for b rows:

    ids        4 b lengths to each of the H, and 8 for each id to the one that holds its row.
    vectors    Of a table on several ranks, the sums over these of the vectors for all rows: in a ring (H - 1) v W / H from each
               of them, and twice that on gloo, which makes a reduce-scatter of an all-reduce. Then v to each other rank, or
               with table_row_wise to the rank on each other host that has the same place there.
    gradients  The other way: v to the rank, or the one of the H, that the vectors came from; then among the H what the others
               lack, (H - 1) v W / H.
    network    The gradients, all-reduced in a ring: 2 (W - 1) / W of their bytes.

    What is left out is a few numbers a step: sizes of messages, sums of the loss.

    Args:
        ids: feature -> those of the rows of this rank in a step, [n] int64.
        batch_size: rows of this rank, b.
        parameter_bytes: of the network.
        backend: "gloo" or "nccl".
        vector_bytes: of a number of a vector between ranks (`embeddings.communication`).
    """
    sent = dict.fromkeys(("ids", "vectors", "gradients", "network"), 0.0)
    for feature in placements:
        if feature.sharding not in ("table_wise", "row_wise", "table_row_wise"):
            raise ValueError(f"no formula for {feature.sharding}")
        sharing, vectors, own = len(feature.ranks), vector_bytes * batch_size * feature.dim, ids[feature.name]
        holders = torch.tensor(feature.ranks)[own // -(-feature.rows // sharing)]
        sent["ids"] += 4 * batch_size * len(set(feature.ranks) - {rank}) + 8 * int((holders != rank).sum())
        if rank in feature.ranks:
            among = (sharing - 1) * vectors * world_size / sharing
            sent["vectors"] += among * (2 if backend == "gloo" else 1) + (world_size // sharing - 1) * vectors
            sent["gradients"] += among
        else:
            sent["gradients"] += vectors
    sent["network"] = 2 * (world_size - 1) / world_size * parameter_bytes
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
