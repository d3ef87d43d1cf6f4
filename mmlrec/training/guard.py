"""A run that diverges ends before it is saved or chosen: losses that left all bounds, tensors that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmlrec.distributed.world import World
from mmlrec.embeddings.tables import local_shards
from mmlrec.errors import UserError
from mmlrec.storage.places import Place

#: A mean loss so many times that of the first step, or of 1 where that is smaller, comes from scores in the thousands: the run
#: diverges, though nothing has overflowed yet. What trains well stays below ten times.
_MOST_GROWTH = 1e4

_LOWER = "Lower dense.optimizer.lr or embeddings.optimizer.lr, or set dense.clip_norm"


class Diverged(UserError):
    """A run whose losses or tensors left all bounds: what did, and the remedy."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)

    def __str__(self) -> str:
        return " ".join(self.args)

    def of_several(self, name: str, kept: str) -> Diverged:
        """The same of one of several runs that share a configuration, so that none goes on with other rates by itself.

        Args:
            name: of the run among them, such as `seed 2`.
            kept: what becomes of the others.
        """
        return Diverged(f"{name}: {self.args[0]}", f"{_LOWER}, and start all again with another --run-dir. {kept}")


def remedy(run_dir: Place, saved_step: int | None) -> str:
    """What to do about a run that diverged.

    Args:
        run_dir: its folder. The default name of a run with other rates is another one, so it has to be given.
        saved_step: of its newest checkpoint, None without one.
    """
    if saved_step is None:
        return f"{_LOWER}, and start again with another --run-dir."
    return (
        f"{_LOWER}, and give apps.train the same configuration with --run-dir {run_dir} --from-step {saved_step}, or an earlier"
        f" step of {run_dir / 'checkpoints'} if that one is spoilt already."
    )


def check_losses(losses: Mapping[str, float], first: Mapping[str, float], step: int, remedy: str) -> None:
    """Refuse mean losses that are not finite or have grown beyond sense.

    Args:
        losses: mean of each objective over the newest steps.
        first: of the first step.
        step: the newest one, for the message.
        remedy: what to do, for the message.

    Raises:
        Diverged: naming the objective.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            raise Diverged(f"loss '{name}' is not finite ({value}) near step {step}.", remedy)
        if value > _MOST_GROWTH * max(1.0, first[name]):
            grown = f"has grown to {value:.3g} near step {step}, from {first[name]:.3g} at the first step"
            raise Diverged(f"loss '{name}' {grown}: the run diverges.", remedy)


@torch.no_grad()
def check_finite(tensors: Mapping[str, Any], step: int, remedy: str, world: World) -> None:
    """Refuse tensors, plain or sharded, that hold anything not finite; all ranks call it, and raise together.

    One pass over this rank's shards, a small part of what writing them takes.

    Args:
        step: for the message.
        remedy: what to do, for the message.

    Raises:
        Diverged: naming tensor and rows.
    """
    world.at("checking that weights are finite")
    error: UserError | None = None
    for key, value in tensors.items():
        for piece, offsets in local_shards(value):
            # A sum is finite only where all terms are, and needs no memory; it may also overflow.
            wide = torch.promote_types(piece.dtype, torch.float32)
            if error is None and piece.is_floating_point() and not bool(piece.sum(dtype=wide).isfinite()):
                bad = _bad_rows(piece, offsets[0] if offsets else 0)
                if bad:
                    error = Diverged(f"'{key}' is not finite in {bad} at step {step}; not saved.", remedy)
    world.raise_together(error)


def _bad_rows(piece: Tensor, first_row: int) -> str:
    bad = (~piece.isfinite()).reshape(piece.shape[0] if piece.dim() else 1, -1).any(dim=1).nonzero().flatten()
    count = len(bad)
    return f"{count} row{'s' if count > 1 else ''} (the first: {first_row + int(bad[0])})" if count else ""
