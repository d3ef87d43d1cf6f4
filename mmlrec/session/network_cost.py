"""What a row costs a network, measured by a step of few rows on this CPU: the same for every method, without formulas."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmlrec.layers.products import LEAST_ROWS
from mmlrec.models.base.model import MultiTaskModel

#: Twice as many are still too few for the products of oneDNN, which the counter of torch does not see.
_ROWS = LEAST_ROWS // 4


class NetworkCost(NamedTuple):
    """Of one training row, forward and backward.

    Attributes:
        operations: floating-point operations of matrix products, a multiplication and an addition counted as two.
        activations: bytes that are kept for the backward pass, and of the input with its gradient.
    """

    operations: float
    activations: float


def network_cost(network: MultiTaskModel, *, bf16: bool) -> NetworkCost:
    """What a row costs, from the difference of two steps: what does not grow with the rows is left out.

    Args:
        network: on the CPU; it stays as it is.
        bf16: with autocast, as `training.precision` bf16 trains.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        few, many = (_step(copy.deepcopy(network), rows, bf16) for rows in (_ROWS, 2 * _ROWS))
    return NetworkCost(*((more - less) / _ROWS for less, more in zip(few, many, strict=True)))


def _step(network: MultiTaskModel, rows: int, bf16: bool) -> tuple[float, float]:
    spec = network.spec
    branches = [len(network.branches)] if network.tables_per_branch else []
    x = torch.rand(rows, *branches, spec.input_width, requires_grad=True)
    views = x.split([*spec.fields.values(), spec.num_dense], dim=-1)
    fields = dict(zip(spec.fields, views, strict=False))
    noise = torch.rand(network.num_noise) if network.num_noise else None
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    network.train()
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                # The same scenarios in both steps, so that their weights are not counted as of rows.
                scenario = torch.arange(rows) % min(spec.num_scenarios, _ROWS)
                output = network(x, fields, scenario, valid=torch.ones(rows, dtype=torch.bool), noise=noise)
            total = output.logits.float().square().sum()
        total.backward()
    inputs = 2 * x.numel() * x.element_size()
    return float(counter.get_total_flops()), float(sum(kept.values()) + inputs)
