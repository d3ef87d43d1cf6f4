"""The best checkpoint: the weights to evaluate, chosen by validation.

A method whose branches have tables of their own (Single-Task) has a best checkpoint for each branch. They are kept as one:
the tensors of each branch come from that branch's best step. Where tables are managed, all come from one
step: a checkpoint has one map of who holds which row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmlrec.embeddings.tables import local_shards
from mmlrec.run_folder import checkpoint
from mmlrec.run_folder.saver import Saver
from mmlrec.session.session import Session
from mmlrec.storage.places import Place


def save_best(
    session: Session, saver: Saver, folder: Place, improved: list[str], state: dict[str, Any], then: Callable[[], None]
) -> None:
    """Save the weights of the whole model, or of the branches that improved and the former best of the others.

    Args:
        then: what is to happen on rank 0 once they are whole.
    """
    tensors = checkpoint.model_tensors(session.model) | session.managed.tensors(history=False)
    branches = [name for name, _, _ in session.selected_apart()]
    mixed = bool(branches) and set(improved) != set(branches)
    if mixed:
        saver.finish()  # The former best is read.
    if mixed and checkpoint.damage(folder, session.world) is None:
        current = {key: [piece.clone() for piece, _ in local_shards(value)] for key, value in tensors.items()}
        checkpoint.load(folder, tensors, session.world)
        for name in improved:
            _copy_branch(tensors, current, branches.index(name), name, len(branches))
        saver.save(folder, tensors, state, then, indispensable=True)
        with torch.no_grad():
            for key, pieces in current.items():
                for (piece, _), kept in zip(local_shards(tensors[key]), pieces, strict=True):
                    piece.copy_(kept)
        return
    saver.save(folder, tensors, state, then, indispensable=True)


@torch.no_grad()
def _copy_branch(tensors: dict[str, Any], current: dict[str, list[Tensor]], index: int, name: str, count: int) -> None:
    """Put one branch's current values back: its tables, and its slice (dimension 0) of every stacked tensor."""
    for key, pieces in current.items():
        shards = [piece for piece, _ in local_shards(tensors[key])]
        if f".{name}/" in key:
            for shard, kept in zip(shards, pieces, strict=True):
                shard.copy_(kept)
        elif key.startswith("model.head.network."):
            # A layer over all branches holds `count` equal blocks, branch after branch.
            (shard,), (kept,) = shards, pieces
            if shard.dim() == 0:  # a counter that all branches share: num_batches_tracked
                shard.copy_(kept)
                continue
            size = shard.shape[0] // count
            shard[index * size : (index + 1) * size].copy_(kept[index * size : (index + 1) * size])
