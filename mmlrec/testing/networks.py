"""What the model tests share: the TINY configuration of the specification, random batches and a float64 step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmlrec.losses import LossOptions
from mmlrec.models.base.model import ModelSpec, MultiTaskModel
from mmlrec.output import Output
from mmlrec.registry import method
from mmlrec.schema import Setting, Task

TINY = {
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
SHAPES = {"mtl": (2, 1), "msl": (1, 2), "mtmsl": (2, 3), "msl-many": (1, 5)}


def make_spec(
    tasks: int = 2, scenarios: int = 1, fields: int = 3, dim: int = 4, num_dense: int = 2, seed: int = 0
) -> ModelSpec:
    setting = Setting.MTL if scenarios == 1 else Setting.MSL if tasks == 1 else Setting.MTMSL
    roles = ("ctr", "ctcvr", *[None] * tasks)
    named = tuple(Task(name=f"t{i}", role=roles[i], implied_by_next=i + 1 < tasks) for i in range(tasks))
    return ModelSpec(setting, named, scenarios, {f"f{i}": dim for i in range(fields)}, num_dense, seed)


def spec_of(shape: str) -> ModelSpec:
    return make_spec(*SHAPES[shape])


def supports(name: str, spec: ModelSpec) -> bool:
    return spec.setting in method(name).settings


def build(name: str, spec: ModelSpec, **options: object) -> MultiTaskModel:
    config = method(name).Config
    known = {key: value for key, value in TINY.items() if key in config.model_fields}
    net = method(name)(spec, config(**(known | options)))
    if net.num_noise:
        # Random gates: the same draw in every step, unless a test hands in another, so that two steps can be compared.
        net.register_forward_pre_hook(_with_noise, with_kwargs=True)
    return net


def _with_noise(net: MultiTaskModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    fixed = torch.rand(net.num_noise, generator=torch.Generator().manual_seed(7))
    return args, {"noise": fixed} | kwargs


@dataclass
class Data:
    x: Tensor
    fields: dict[str, Tensor]
    scenario: Tensor
    labels: Tensor
    mask: Tensor
    weight: Tensor

    def rows(self, index: Tensor | slice) -> Data:
        fields = {name: value[index] for name, value in self.fields.items()}
        return Data(self.x[index], fields, *(getattr(self, n)[index] for n in ("scenario", "labels", "mask", "weight")))


def make_data(net: MultiTaskModel, rows: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Data:
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
    loss = net.make_loss(LossOptions(reduction))  # type: ignore[arg-type]
    targets = (data.labels, data.mask, data.scenario, data.weight)
    return loss(output, *targets, loss.denominators(*targets))


def losses(net: MultiTaskModel, data: Data, reduction: str = "pooled") -> dict[str, Tensor]:
    return losses_of(net, net(data.x, data.fields, data.scenario), data, reduction)


def step(net: MultiTaskModel, data: Data, reduction: str = "pooled") -> tuple[Tensor, dict[str, Tensor]]:
    net.zero_grad()
    total = sum(losses(net, data, reduction).values())
    assert isinstance(total, Tensor)
    total.backward()
    gradients = {}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    return total.detach(), gradients


def assert_gradients_are_slopes(net: MultiTaskModel, data: Data) -> None:
    """The gradients of a step equal finite differences of the loss, along a random direction of each parameter; float64."""
    _, gradients = step(net, data)
    for key, parameter in net.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
                values.append(sum(losses(net, data).values()))
                parameter.sub_(sign * 1e-5 * direction)
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((gradients[key] * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=key)
