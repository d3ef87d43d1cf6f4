"""Which slice of a network's parameter belongs to which task, scenario, head or input column.

No method says so of each parameter, so it is measured: the network is built once more with one task, one scenario and one field
more than it has, and what an axis grows by tells what it is stacked over. An axis that is exactly as long as there are heads
(t * S + s), tasks, scenarios or input columns has one index for each, in their order. Longer stacks hold member n * K + k for
the k-th of K, as everywhere in `layers`; only modules that say that they are stacks, and parameters with an owner, are read so.
What depends on tasks, scenarios or inputs otherwise is taken only where these are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmlrec.models.base.model import ModelSpec, MultiTaskModel
from mmlrec.schema import Setting

Kind = Literal["head", "task", "scenario", "input"]
_PROBES = ("task", "scenario", "input")
#: Indices here, and those there that they take.
Pair = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Known:
    """What a network is made for, in order, by name.

    Attributes:
        tasks: name and kind.
        scenarios: values; one of no name in MTL.
        inputs: columns of x: field, its width and place in its vector, or dense feature, 1 and 0. The vectors of a field of
            another width are other ones.
        branches: heads with tables of their own; all heads when empty.
        chain: the tasks of a chain in its order; as `tasks` for other methods.
    """

    tasks: tuple[tuple[str, str], ...]
    scenarios: tuple[str, ...]
    inputs: tuple[tuple[str, int, int], ...]
    branches: tuple[int, ...]
    chain: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, network: MultiTaskModel, scenarios: Sequence[str], dense: Sequence[str]) -> Known:
        """Of a network."""
        spec = network.spec
        columns = [(name, width, column) for name, width in spec.fields.items() for column in range(width)]
        tasks = tuple((task.name, task.kind) for task in spec.tasks)
        return cls(
            tasks,
            tuple(scenarios) if spec.num_scenarios > 1 else ("",),
            (*columns, *((name, 1, 0) for name in dense)),
            network.branches,
            tuple(tasks[task] for task in network.chain) or tasks,
        )

    def labels(self, kind: Kind) -> list[Hashable]:
        """What stands at each index of an axis of that kind."""
        if kind == "head":
            heads: list[Hashable] = [(task, scenario) for task in self.tasks for scenario in self.scenarios]
            return [heads[branch] for branch in self.branches] if self.branches else heads
        return list({"task": self.tasks, "scenario": self.scenarios, "input": self.inputs}[kind])


@dataclass(frozen=True)
class Axis:
    """What an axis is stacked over: `copies` times the members of `kind`; of kind None it is not.

    Attributes:
        otherwise: what it depends on in a way that is not known.
    """

    kind: Kind | None = None
    copies: int = 1
    otherwise: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Of one tensor of a network.

    Attributes:
        block: neighbouring entries of the first axis that are of one member, as of normalisation behind a stack of layers.
        by_order: it stands for tasks by their places in the chain, so it means the same where their order does.
    """

    axes: tuple[Axis, ...]
    block: int = 1
    by_order: bool = False


def layouts(network: MultiTaskModel) -> dict[str, Layout]:
    """Of each tensor of a network's state, by its name."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    probes = {kind: _shapes_with_more(network, kind) for kind in _PROBES}
    stacks = {name: module.stack for name, module in network.named_modules() if isinstance(getattr(module, "stack", None), int)}
    # Modules of which there is one for each step of a chain.
    steps = {name.partition(".")[0] for name in probes["task"] or () if name not in shapes}
    known = {}
    for name, shape in shapes.items():
        stack = next((size for module, size in stacks.items() if name.startswith(f"{module}.")), None)
        block = shape[0] // stack if shape and stack and ".norms." in name else 1
        axes = []
        for index, size in enumerate(shape):
            others = {
                kind: None if found is None else found[name][index] if len(found.get(name, ())) > index else -1
                for kind, found in probes.items()
            }
            members = size // block if index == 0 else size
            if index == 0 and block > 1:
                others = {kind: other // block if other and other > 0 else other for kind, other in others.items()}
            stacked = index == 0 and (stack is not None or network.owner(name) is not None)
            axes.append(_axis(network, name, members, others, stacked))
        alone = bool(axes and network.sole(name)) and axes[0].kind not in ("head", "task")
        known[name] = Layout(tuple(axes), block, name.partition(".")[0] in steps or alone)
    return known


def _axis(network: MultiTaskModel, name: str, size: int, others: dict[str, int | None], stacked: bool) -> Axis:
    spec = network.spec
    if network.branches and stacked and network.owner(name) == "head":
        return Axis("head", size // len(network.branches))
    grows = tuple(kind for kind, other in others.items() if other is not None and other != size)
    if not grows:
        return Axis()
    tasks, scenarios = spec.num_tasks, spec.num_scenarios
    #: Kind -> its members, and how many there are with one task, scenario or field more.
    members: dict[Kind, tuple[int, dict[str, int]]] = {
        "head": (tasks * scenarios, {"task": (tasks + 1) * scenarios, "scenario": tasks * (scenarios + 1)}),
        "task": (tasks, {"task": tasks + 1}),
        "scenario": (scenarios, {"scenario": scenarios + 1}),
        "input": (spec.input_width, {"input": spec.input_width + spec.vector_width}),
    }
    for kind, (count, more) in members.items():
        copies = size // count
        as_expected = all(
            others[probe] == copies * more.get(probe, count) for probe, other in others.items() if other is not None
        )
        if copies * count == size and as_expected and (copies == 1 or stacked):
            return Axis(kind, copies)
    return Axis(otherwise=grows)


def _shapes_with_more(network: MultiTaskModel, kind: str) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the network for one task, scenario or field more; None where there can be none."""
    spec, config = network.spec, network.config
    if kind == "task":
        if spec.setting is Setting.MSL:
            return None
        name = "".join(task.name for task in spec.tasks) + "+"
        tasks = tuple(replaced.model_copy(update={"implied_by_next": True}) for replaced in spec.tasks)
        spec = replace(spec, tasks=(*tasks, spec.tasks[-1].model_copy(update={"name": name})))
        if getattr(config, "roles", None) is not None:
            config = config.model_copy(update={"roles": [*config.roles, name]})  # type: ignore[attr-defined]
    elif kind == "scenario":
        if spec.setting is Setting.MTL:
            return None
        spec = replace(spec, num_scenarios=spec.num_scenarios + 1)
    else:
        spec = replace(spec, fields=spec.fields | {"".join(spec.fields) + "+": spec.vector_width})
    return {name: tuple(value.shape) for name, value in _built(type(network), spec, config).state_dict().items()}


def _built(method: type[MultiTaskModel], spec: ModelSpec, config: object) -> MultiTaskModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of this network it has said
        return method(spec, config)  # type: ignore[arg-type]


def _indices(tensor: Tensor, axis: int, chosen: NDArray[np.int64] | None) -> Tensor:
    """Indices along one axis, all where none are chosen, in the shape that makes a grid of those of several axes."""
    found = torch.arange(tensor.shape[axis]) if chosen is None else torch.from_numpy(chosen)
    return found.to(tensor.device).view([-1 if dim == axis else 1 for dim in range(tensor.dim())])


@dataclass(frozen=True)
class Taken:
    """What a tensor takes: pairs of indices along each axis, where it is not the whole; or why nothing.

    Attributes:
        whole: nothing of it is left as it was.
    """

    pairs: tuple[Pair | None, ...] = ()
    block: int = 1
    whole: bool = False
    why_not: str = ""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy from a tensor of the other network, or of its optimizer's state, into one of this."""
        if all(pair is None for pair in self.pairs):
            target.copy_(source)
            return
        new, old = self._viewed(target), self._viewed(source)
        into = tuple(_indices(new, axis, pair and pair[0]) for axis, pair in self._axes(new))
        of = tuple(_indices(old, axis, pair and pair[1]) for axis, pair in self._axes(old))
        new[into] = old[of].to(new.device, new.dtype)

    def _axes(self, tensor: Tensor) -> list[tuple[int, Pair | None]]:
        pairs = [*self.pairs[:1], *([None] if self.block > 1 else []), *self.pairs[1:]]
        return list(zip(range(tensor.dim()), pairs, strict=True))

    def _viewed(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1, self.block, *tensor.shape[1:]) if self.block > 1 else tensor


def taken(layout: Layout, new_shape: Sequence[int], old_shape: Sequence[int], new: Known, old: Known) -> Taken:
    """What a tensor takes from the one of its name in another network of the same method."""
    if layout.by_order and new.chain[: len(old.chain)] != old.chain[: len(new.chain)]:
        return Taken(why_not="it stands for tasks by their order, which is another one")
    if len(new_shape) != len(old_shape):
        return Taken(why_not=f"shape {tuple(old_shape)} there, {tuple(new_shape)} here")
    pairs: list[Pair | None] = []
    whole = True
    for index, axis in enumerate(layout.axes):
        size, other = new_shape[index], old_shape[index]
        if index == 0:
            size, other = size // layout.block, other // layout.block
        if axis.kind is None:
            changed = [f"{kind}s" for kind in axis.otherwise if _depends(kind, new) != _depends(kind, old)]
            if changed:
                return Taken(why_not=f"it is made for {' and '.join(changed)} that differ, in a way that has no slices")
            if size != other:
                return Taken(why_not=f"shape {tuple(old_shape)} there, {tuple(new_shape)} here")
            pairs.append(None)
            continue
        mine, theirs = ([(copy, label) for copy in range(axis.copies) for label in k.labels(axis.kind)] for k in (new, old))
        if (len(mine), len(theirs)) != (size, other):
            return Taken(why_not=f"shape {tuple(old_shape)} there, {tuple(new_shape)} here")
        if mine == theirs:
            pairs.append(None)
            continue
        at = {label: place for place, label in enumerate(theirs)}
        found = [(place, at[label]) for place, label in enumerate(mine) if label in at]
        if not found:
            return Taken(why_not=f"no {'column of the input' if axis.kind == 'input' else axis.kind} is known")
        whole = whole and len(found) == len(mine)
        both = np.array(found, np.int64)
        pairs.append((both[:, 0].copy(), both[:, 1].copy()))
    return Taken(tuple(pairs), layout.block, whole)


def _depends(kind: str, known: Known) -> tuple[Hashable, ...]:
    return {"task": known.tasks, "scenario": known.scenarios, "input": known.inputs}[kind]
