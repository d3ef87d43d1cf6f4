"""Which parameters `dense.l2` decays, and to what.

A module that has weights of linear layers says so: `decays`, attribute -> what the parameters in it decay to. That is 0, and 1
for factors of other weights, which change nothing at 1. Biases, scales of normalisation, gates' openness, stitches and vectors
of scenarios decay in no module: pulled to 0 they would shift, silence or shut what they act on.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def decay_targets(network: nn.Module) -> dict[str, float]:
    """Name of each parameter of a network that decays -> what it decays to."""
    found: dict[str, float] = {}
    for prefix, module in network.named_modules():
        declared: Mapping[str, float] = {"weight": 0.0} if isinstance(module, nn.Linear) else getattr(module, "decays", {})
        for attribute, target in declared.items():
            start = f"{prefix}.{attribute}" if prefix else attribute
            held = getattr(module, attribute, None)
            names = [f"{start}.{index}" for index in range(len(held))] if isinstance(held, nn.ParameterList) else [start]
            found |= dict.fromkeys(names if held is not None else [], target)
    return found
