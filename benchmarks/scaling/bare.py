"""Lookup and update by the kernels alone, and what random access to memory costs by itself on the same tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from mmlrec.data.batch import Batch
from mmlrec.embeddings.tables import kernels, local_shards
from mmlrec.session.session import Session


@dataclass(frozen=True)
class BareTable:
    """One table without a kernel: no sorting of ids, no sums over equal ones, no optimizer.

    Attributes:
        weight: [rows, dim].
        state: [rows, s] of the optimizer; None where it keeps none.
    """

    weight: Tensor
    state: Tensor | None

    def gather_and_scatter(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Read the rows of `ids` and their state, add, and write both: each once, the least that a lookup with an update needs.

        Args:
            ids: [n] int64; of equal ones the last is written.
            gradient: [n, dim].

        Returns:
            The rows before the update, [n, dim].
        """
        looked_up = self.weight.index_select(0, ids)
        self.weight.index_copy_(0, ids, (looked_up + gradient).to(self.weight.dtype))
        if self.state is not None:
            self.state.index_copy_(0, ids, self.state.index_select(0, ids).add_(gradient[:, : self.state.shape[1]]))
        return looked_up

    def bytes_of(self, ids: int) -> int:
        """Bytes of memory that such a call reads or writes.

        Ids; rows read and given back; gradients; rows written; state read and written.
        """
        dim, size = self.weight.shape[1], self.weight.element_size()
        state = 0 if self.state is None else self.state.shape[1] * self.state.element_size()
        return ids * (8 + 4 * dim * size + 2 * state)


class BareTables:
    """All tables of a session of one rank, and the ids of its batches."""

    def __init__(self, session: Session, batches: Sequence[Batch]) -> None:
        assert session.world.world_size == 1, "on several ranks a rank does not hold the rows of its own ids"
        weights = get_unwrapped_module(session.model).tables.state_dict()
        states = {
            key.split(".")[-2]: _whole(next(iter(values.values()))) if values else None
            for key, values in session.model.fused_optimizer.state_dict()["state"].items()
        }
        self.tables: list[BareTable] = []
        self._ids: list[list[Tensor]] = [[] for _ in batches]
        for feature in session.manifest.sparse_features:
            state = states[feature.table or ""]
            self.tables.append(
                BareTable(
                    _whole(weights[f"embedding_bags.{feature.table}.weight"]),
                    None if state is None else state.view(len(state), -1),
                )
            )
            for ids, batch in zip(self._ids, batches, strict=True):
                ids.append(batch.sparse[feature.name].values())
        self._gradients = [
            1e-3 * torch.randn(len(ids), table.weight.shape[1], device=ids.device)
            for ids, table in zip(self._ids[0], self.tables, strict=True)
        ]
        self._turn = 0

    @property
    def num_bytes(self) -> int:
        """Of one call."""
        return sum(table.bytes_of(len(ids)) for table, ids in zip(self.tables, self._ids[0], strict=True))

    @torch.no_grad()
    def __call__(self) -> None:
        """The rows of one batch: those of all tables read and written. The weights mean nothing after it."""
        ids = self._ids[self._turn % len(self._ids)]
        self._turn += 1
        for table, own, gradient in zip(self.tables, ids, self._gradients, strict=True):
            table.gather_and_scatter(own, gradient[: len(own)])


class KernelsAlone:
    """Lookup and update by the kernels, with the ids as a step gives them to these.

    What torchrec does around them is left out: on one rank it hands ids and vectors on to the rank itself.

    Args:
        session: of one rank, whose tables are out of the pipeline (`benchmarks.resident.TablesAlone`).
    """

    def __init__(self, session: Session, batches: Sequence[Batch]) -> None:
        tables = get_unwrapped_module(session.model).tables
        self._calls: list[list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]] = []

        def keep(kernel: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._calls[-1].append((kernel, given, named))

        hooks = [kernel.register_forward_pre_hook(keep, with_kwargs=True) for kernel in kernels(tables)]
        for batch in batches:
            self._calls.append([])
            tables(batch.sparse).values()
        for hook in hooks:
            hook.remove()
        self._gradients = [1e-3 * torch.randn_like(kernel(*given, **named)) for kernel, given, named in self._calls[0]]
        self._turn = 0

    def __call__(self) -> None:
        """One lookup and one update of all tables."""
        calls = self._calls[self._turn % len(self._calls)]
        self._turn += 1
        for (kernel, given, named), gradient in zip(calls, self._gradients, strict=True):
            kernel(*given, **named).backward(gradient)


def _whole(tensor: Tensor) -> Tensor:
    ((piece, _),) = local_shards(tensor)
    return piece.detach()
