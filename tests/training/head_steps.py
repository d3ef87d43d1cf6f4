"""Training steps of what stands behind the lookup, on any device: network, loss, strategy, backward, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchrec import KeyedJaggedTensor, KeyedTensor

from mmlrec.balancing.build import build_balancing
from mmlrec.config import RunConfig
from mmlrec.data.batch import Batch
from mmlrec.distributed.step_parts import StepParts
from mmlrec.losses import LossOptions
from mmlrec.registry import method, strategy
from mmlrec.session.recommender import Head, Predictions
from tests.models.support import TINY, spec_of

ROWS = 24


def training_step(
    name: str,
    shape: str,
    device: str,
    *,
    balancing: str = "static",
    unit: Any = None,
    l2: float = 0.0,
    regression: bool = False,
    **options: Any,
) -> Callable[[], Predictions]:
    """A function that does one step on a batch of random numbers. It needs a process group, as the loss asks for its size.

    Args:
        shape: of the data, one of `SHAPES`.
        balancing: name of the strategy.
        unit: what one objective is; as without one in a configuration.
        l2: weight of the penalties on network and looked-up vectors.
        regression: whether labels have a mean and a deviation.
        options: of the method.
    """
    spec, chosen = spec_of(shape), method(name)
    known = {key: value for key, value in TINY.items() if key in chosen.Config.model_fields}
    network = chosen(spec, chosen.Config(**(known | options)))
    loss = network.make_loss(LossOptions(unit=unit or ("scenario" if spec.num_tasks == 1 else "task")))
    owners = {key: network.owner(key) for key, _ in network.named_parameters()}
    sole = {key: network.sole(key) for key, _ in network.named_parameters()}
    joined, width = strategy(balancing), sum(spec.fields.values())
    weighing = build_balancing(balancing, joined, joined.Config(), loss, owners, sole, width, seed=0, steps_per_epoch=1)
    config = RunConfig.model_validate(
        {
            "dataset": {"path": "data", "setting": spec.setting},
            "model": {"name": name},
            "dense": {"l2": l2},
            "embeddings": {"l2": l2},
        }
    )
    prefixes = [f"{branch}/" for branch in network.branches] or [""]
    scales = {task.name: (1.0, 2.0) for task in spec.tasks} if regression else {}
    head = Head(network, loss, weighing, config, prefixes, scales, StepParts()).to(device).train()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    keys = [prefix + field for prefix in prefixes for field in spec.fields]
    widths = [width for _ in prefixes for width in spec.fields.values()]
    with torch.device(device):
        batch = Batch(
            sparse=KeyedJaggedTensor.empty(),
            dense=torch.randn(ROWS, spec.num_dense),
            labels=(torch.rand(ROWS, spec.num_tasks) < 0.5).float(),
            mask=torch.ones(ROWS, spec.num_tasks),
            scenario=torch.randint(spec.num_scenarios, (ROWS,)),
            weight=torch.ones(ROWS),
            valid=torch.ones(ROWS, dtype=torch.bool),
            row=torch.arange(ROWS),
            group=torch.zeros(ROWS, dtype=torch.long),
        )
        looked_up = torch.randn(ROWS, sum(widths), requires_grad=True)

    def step() -> Predictions:
        optimizer.zero_grad()
        total, predictions = head(KeyedTensor(keys, widths, looked_up), batch)
        total.backward()
        optimizer.step()
        return predictions

    return step
