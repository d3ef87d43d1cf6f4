"""A check before a method on a chain of tasks trains: the labels must be such a chain."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist

from mmlrec.data.chain import count_violations
from mmlrec.errors import DataError, UserError
from mmlrec.models.base.chain import ChainModel
from mmlrec.session.session import Session
from mmlrec.storage.places import place


def check_chain(session: Session) -> str | None:
    """Count train rows whose labels contradict the network's chain; each rank reads its part of the files.

    Returns:
        A warning when there are some and the configuration allows them.

    Raises:
        DataError: there are more than `model.max_chain_violation`, and `model.allow_non_chain` is not set.
    """
    network, world = session.network, session.world
    if not isinstance(network, ChainModel):
        return None
    chain = [session.spec.tasks[index].name for index in network.chain]
    folder = place(session.config.dataset.path)
    split = session.manifest.splits["train"]
    counts, error = [0] * (len(chain) - 1), None
    try:
        counts = count_violations(folder, split.parts[world.rank :: world.world_size], chain)
    except UserError as cause:
        error = cause
    world.raise_together(error)
    total = torch.tensor(counts)
    if world.world_size > 1:
        dist.all_reduce(total, group=world.control)
    violations = int(total.sum())
    if not violations:
        return None
    pairs = zip(total.tolist(), pairwise(chain), strict=True)
    detail = " and ".join(f"{count:,} have '{this}' without '{before}'" for count, (before, this) in pairs if count)
    found = f"{folder}: the labels of {', '.join(chain)} are no chain: of {split.num_rows:,} train rows {detail}."
    if network.config.allow_non_chain:
        return f"{found} Trained all the same (model.allow_non_chain); reports are marked."
    if violations <= network.config.max_chain_violation:
        return f"{found} Within model.max_chain_violation = {network.config.max_chain_violation}."
    raise DataError(
        f"{found} {type(network).__name__} allows {network.config.max_chain_violation} (model.max_chain_violation). Choose"
        " tasks that are a chain with dataset.tasks, put them in order with model.roles, or use a method such as mmoe;"
        " model.allow_non_chain=true trains all the same and marks the reports."
    )
