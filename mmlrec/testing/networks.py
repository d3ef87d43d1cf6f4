"""What the tests of methods share: sizes of tiny networks, shapes of data, random batches and a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmlrec.losses import LossOptions
from mmlrec.models.base.model import ModelSpec, MultiTaskModel
from mmlrec.output import Output
from mmlrec.schema import Setting, Task

#: Sizes by the name of the option; a network has those that its method knows.
TINY: dict[str, Any] = {
    "dnn_hidden_units": [8, 6],
    "bottom_hidden_units": [8, 6],
    "expert_hidden_units": [8, 6],
    "gate_hidden_units": [5],
    "tower_hidden_units": [4],
    "num_experts": 3,
    "num_shared_experts": 2,
    "num_specific_experts": 2,
    "num_levels": 2,
    # Terms without labels have tests of their own; without them a parameter's gradient comes from its heads' rows only.
    "l0_lambda": 0.0,
    "l0_field": 0.0,
    "l0_cell": 0.0,
    "aux_hidden_units": [4],
    "score_weight_hidden_units": [5],
    "condition_fields": ["f0"],
    "epnet_hidden": 14,
    "prior_fields": ["f1", "f2"],
}
#: Name -> tasks, scenarios.
SHAPES = {"mtl": (2, 1), "msl": (1, 2), "mtmsl": (2, 3), "msl-many": (1, 5)}


def make_spec(
    tasks: int = 2, scenarios: int = 1, fields: int = 3, dim: int = 4, num_dense: int = 2, seed: int = 0
) -> ModelSpec:
    """Data with tasks t0, t1, .. that are a chain, and fields f0, f1, .. of width `dim`."""
    setting = Setting.MTL if scenarios == 1 else Setting.MSL if tasks == 1 else Setting.MTMSL
    roles = ("ctr", "ctcvr", *[None] * tasks)
    named = tuple(Task(name=f"t{i}", role=roles[i], implied_by_next=i + 1 < tasks) for i in range(tasks))
    return ModelSpec(setting, named, scenarios, {f"f{i}": dim for i in range(fields)}, num_dense, seed)


def spec_of(shape: str) -> ModelSpec:
    """Data of one of the SHAPES."""
    return make_spec(*SHAPES[shape])


def build(method: type[MultiTaskModel], spec: ModelSpec, **options: Any) -> MultiTaskModel:
    """A network with the sizes of TINY, where `options` have no other; one with random gates draws the same in every step."""
    known = {key: value for key, value in TINY.items() if key in method.Config.model_fields}
    net = method(spec, method.Config(**(known | options)))
    if net.num_noise:
        # Two steps can be compared; a test may hand in another draw.
        net.register_forward_pre_hook(_with_noise, with_kwargs=True)
    return net


def _with_noise(net: MultiTaskModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    fixed = torch.rand(net.num_noise, generator=torch.Generator().manual_seed(7))
    return args, {"noise": fixed} | kwargs


@dataclass
class Data:
    """A batch, as a network and a loss take it: x [B, d_in], labels and mask [B, T], scenario and weight [B]."""

    x: Tensor
    fields: dict[str, Tensor]
    scenario: Tensor
    labels: Tensor
    mask: Tensor
    weight: Tensor

    def rows(self, index: Tensor | slice) -> Data:
        """Some of its rows."""
        fields = {name: value[index] for name, value in self.fields.items()}
        return Data(self.x[index], fields, *(getattr(self, n)[index] for n in ("scenario", "labels", "mask", "weight")))


def make_data(net: MultiTaskModel, rows: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Data:
    """Normal inputs and labels, 40 % positive, with every scenario among the rows in equal parts."""
    spec, g = net.spec, torch.Generator().manual_seed(seed)
    lead = (rows, spec.num_heads) if net.tables_per_branch else (rows,)
    x = torch.randn(*lead, spec.input_width, generator=g, dtype=dtype)
    parts = x[..., : sum(spec.fields.values())].split(list(spec.fields.values()), dim=-1)
    scenario = torch.arange(rows) % spec.num_scenarios
    scenario = scenario[torch.randperm(rows, generator=g)]
    labels = (torch.rand(rows, spec.num_tasks, generator=g) < 0.4).to(dtype)
    if net.chain:
        labels = labels.cumprod(dim=1)
    ones = torch.ones(rows, dtype=dtype)
    return Data(x, dict(zip(spec.fields, parts, strict=True)), scenario, labels, torch.ones_like(labels), ones)


def losses_of(net: MultiTaskModel, output: Output, data: Data, reduction: str = "pooled") -> dict[str, Tensor]:
    """Objective -> loss of an output."""
    loss = net.make_loss(LossOptions(reduction))  # type: ignore[arg-type]
    targets = (data.labels, data.mask, data.scenario, data.weight)
    return loss(output, *targets, loss.denominators(*targets))


def losses(net: MultiTaskModel, data: Data, reduction: str = "pooled") -> dict[str, Tensor]:
    """Objective -> loss of a forward pass."""
    return losses_of(net, net(data.x, data.fields, data.scenario), data, reduction)


def sum_of(found: dict[str, Tensor]) -> Tensor:
    """The sum of losses."""
    total = sum(found.values())
    assert isinstance(total, Tensor)
    return total


def step(net: MultiTaskModel, data: Data, reduction: str = "pooled") -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the losses, and the gradient of each parameter by its name. Every parameter must have one."""
    net.zero_grad()
    total = sum_of(losses(net, data, reduction))
    total.backward()
    gradients = {}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    return total.detach(), gradients
