"""What a row costs a network, measured by a step of few rows on this CPU: the same for every method, without formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmlrec.config import RunConfig
from mmlrec.errors import ConfigError
from mmlrec.layers.over_ranks import alone
from mmlrec.layers.products import LEAST_ROWS
from mmlrec.models.base.model import MultiTaskModel
from mmlrec.session.optim import STATE_NUMBERS

#: Twice as many are still too few for the products of oneDNN, which the counter of torch does not see.
_ROWS = LEAST_ROWS // 4
#: Sides of a weight below this leave units idle: kernels of products work on blocks that are as wide, on CPUs and on GPUs.
_BLOCK = 128
#: Products of matrices, and which of their arguments is the first matrix.
_PRODUCTS = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0} | dict.fromkeys(
    (torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.baddbmm, torch.ops.aten.baddbmm_), 1
)


class NetworkCost(NamedTuple):
    """Of one training row, forward and backward; of a step, the operators.

    Attributes:
        operations: floating-point operations of matrix products, a multiplication and an addition counted as two.
        occupied: the same, as if the narrowest side of a product that is not of rows had at least 128 numbers: what they occupy
            a device with. A method whose products are not the same for any number of rows has its operations here.
        traffic: bytes that all other operators read and write.
        activations: bytes that are kept for the backward pass, and of the input with its gradient.
        launches: operators that a step starts, whatever its rows, where these are of one scenario.
        launches_of_scenario: how many more for each further scenario, on a CPU; GPUs have none.
    """

    operations: float
    occupied: float
    traffic: float
    activations: float
    launches: int
    launches_of_scenario: float


def network_bytes(network: MultiTaskModel, optimizer: str, world_size: int) -> int:
    """What the network takes on each rank: parameters, gradients, the optimizer's state, and buckets to exchange gradients."""
    copies = 2 + STATE_NUMBERS[optimizer] + (world_size > 1)
    return copies * sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


def bytes_beside_tables(network: MultiTaskModel, cost: NetworkCost, config: RunConfig, world_size: int) -> tuple[int, int]:
    """What a training takes on each rank beside its tables: bytes of the network, and of the activations of its rows."""
    rows = -(-config.training.batch_size // world_size)
    return network_bytes(network, config.dense.optimizer.name, world_size), int(cost.activations * rows)


class _Step(NamedTuple):
    """What a step of some rows was seen to do; `products` in their order: operations and sides."""

    operations: int
    products: list[tuple[int, tuple[int, ...]]]
    traffic: int
    activations: int
    launches: int


class _Operators(TorchDispatchMode):
    """Counts operators, and bytes of those that are no products; views start nothing, and what is only made is not written."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.traffic = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.launches += 1
            if func.overloadpacket not in _PRODUCTS and "empty" not in func.name():
                # What is written is given back, also where it is an argument by name.
                self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in _tensors((args, out)))
        return out


def network_cost(network: MultiTaskModel, *, bf16: bool) -> NetworkCost:
    """What a row costs, from the difference of two steps: what does not grow with the rows is left out.

    Args:
        network: on the CPU; it stays as it is.
        bf16: with autocast, as `training.precision` bf16 trains.

    Raises:
        ConfigError: such a step fails, as of a network that needs a GPU, or more rows.
    """
    # The same in both steps, so that their weights are not counted as of rows.
    scenarios = min(network.spec.num_scenarios, _ROWS)
    try:
        with torch.random.fork_rng(devices=[]), alone():
            torch.manual_seed(0)
            few, many = (_step(copy.deepcopy(network), rows, scenarios, bf16) for rows in (_ROWS, 2 * _ROWS))
            of_one = few if scenarios == 1 else _step(copy.deepcopy(network), _ROWS, 1, bf16)
    except Exception as error:  # of the method, which may be of another package
        raise ConfigError(
            f"{type(network).__name__}: a step of {_ROWS} or {2 * _ROWS} random rows on the CPU, which tells what a row costs,"
            f" fails: {type(error).__name__}: {error}."
        ) from error
    operations = (many.operations - few.operations) / _ROWS
    occupied = operations
    if len(few.products) == len(many.products):
        for (less, sides), (more, sides_of_more) in zip(few.products, many.products, strict=True):
            # A side that has grown is of rows, of which a real step has enough.
            narrowest = min((a for a, b in zip(sides, sides_of_more, strict=True) if a == b), default=_BLOCK)
            occupied += (more - less) / _ROWS * (max(1, _BLOCK / max(narrowest, 1)) - 1)
    return NetworkCost(
        operations,
        occupied,
        (many.traffic - few.traffic) / _ROWS,
        (many.activations - few.activations) / _ROWS,
        of_one.launches,
        (few.launches - of_one.launches) / max(1, scenarios - 1),
    )


def _step(network: MultiTaskModel, rows: int, scenarios: int, bf16: bool) -> _Step:
    spec = network.spec
    branches = [len(network.branches)] if network.tables_per_branch else []
    x = torch.rand(rows, *branches, spec.input_width, requires_grad=True)
    views = x.split([*spec.fields.values(), spec.num_dense], dim=-1)
    fields = dict(zip(spec.fields, views, strict=False))
    noise = torch.rand(network.num_noise) if network.num_noise else None
    kept: dict[int, int] = {}
    products: list[tuple[int, tuple[int, ...]]] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    network.train()
    scenario = torch.arange(rows) % scenarios
    with FlopCounterMode(display=False, custom_mapping=_formulas(products)) as counter, _Operators() as operators:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = network(x, fields, scenario, valid=torch.ones(rows, dtype=torch.bool), noise=noise)
            # Of all that a loss may read: what a method names beside its logits is trained, too.
            outputs = [output.logits, *output.named.values()]
            total = torch.stack([of.float().square().sum() for of in outputs if of.requires_grad]).sum()
        total.backward()
    inputs = 2 * x.numel() * x.element_size()
    return _Step(counter.get_total_flops(), products, operators.traffic, sum(kept.values()) + inputs, operators.launches)


def _formulas(products: list[tuple[int, tuple[int, ...]]]) -> dict[Any, Callable[..., int]]:
    """Operations of products for torch's counter, which knows none that add in place; each is kept with its sides."""

    def formula_of(first: int) -> Callable[..., int]:
        def formula(*shapes: Any, **_: Any) -> int:
            left, right = shapes[first : first + 2]
            operations = 2 * math.prod(left) * int(right[-1])
            products.append((operations, (*left[-2:], right[-1])))
            return operations

        return formula

    return {operator: formula_of(first) for operator, first in _PRODUCTS.items()}


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
