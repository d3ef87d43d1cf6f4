"""What a network returns: logits, and what a loss may add to them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Output:
    """What a network returns.

    Attributes:
        logits: [B, T], for each sample's own scenario, float32.
        all_logits: [B, H], every head, only when asked for.
        named: further logits by name, such as ctr, cvr, ctcvr, each [B].
        extra_losses: scalars that the loss adds as they are.
    """

    logits: Tensor
    all_logits: Tensor | None = None
    named: dict[str, Tensor] = field(default_factory=dict)
    extra_losses: dict[str, Tensor] = field(default_factory=dict)
