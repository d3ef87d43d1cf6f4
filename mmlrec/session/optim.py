"""Optimizers of tables and network, the learning-rate schedule, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mmlrec.config import DenseConfig, DenseOptimizerConfig, ScheduleConfig
from mmlrec.distributed.step_parts import OPTIMIZER, StepParts

#: Numbers that an optimizer of the network keeps for each parameter.
STATE_NUMBERS = {"adam": 2, "adagrad": 1, "sgd": 0}


class _ClippedOptimizer(KeyedOptimizerWrapper):
    """Clips the norm of the dense gradient before the step. Table rows are updated inside backward and are not clipped."""

    def __init__(self, parameters: dict[str, nn.Parameter], make: Callable[[Any], torch.optim.Optimizer], norm: float) -> None:
        super().__init__(parameters, make)
        self._clipped = list(parameters.values())
        self._norm = norm

    def step(self, closure: Any = None) -> None:
        torch.nn.utils.clip_grad_norm_(self._clipped, self._norm)
        super().step(closure)


class _TimedOptimizer(CombinedOptimizer):
    """Tells `StepParts` how long its steps take. The one of the tables takes none: their rows are updated inside backward."""

    def __init__(self, optimizers: list[tuple[str, KeyedOptimizer]], parts: StepParts) -> None:
        super().__init__(list(optimizers))
        self._parts = parts

    def step(self, closure: Any = None) -> None:
        with self._parts.of(OPTIMIZER):
            super().step(closure)


def build_optimizer(model: DistributedModelParallel, config: DenseConfig, parts: StepParts) -> CombinedOptimizer:
    """The fused optimizer of the tables and the optimizer of the network as one, its state initialised.

    Dense optimizers make their state at the first step; a checkpoint can only be loaded into state that exists.
    """
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    groups = _groups(parameters, model, config.optimizer.lr)

    def make(_: Any) -> torch.optim.Optimizer:
        return _dense_optimizer(config.optimizer, groups)

    if config.clip_norm is None:
        dense = KeyedOptimizerWrapper(parameters, make)
    else:
        dense = _ClippedOptimizer(parameters, make, config.clip_norm)
    _initialise_state(dense)
    return _TimedOptimizer([("tables", model.fused_optimizer), ("dense", dense)], parts)


def _groups(parameters: dict[str, nn.Parameter], model: DistributedModelParallel, lr: float) -> list[dict[str, Any]]:
    """A parameter group for each learning rate that the network asks for (`MultiTaskModel.lr_factors`)."""
    network = get_unwrapped_module(model).head.network
    factors = {
        parameter: factor
        for name, factor in network.lr_factors().items()
        for key, parameter in network.named_parameters()
        if key == name or key.startswith(name + ".")
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters.values():
        groups.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    return [{"params": members, "lr": lr * factor} for factor, members in groups.items()]


def _dense_optimizer(config: DenseOptimizerConfig, parameters: Any) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, fused=True)
    if config.name == "adagrad":
        return torch.optim.Adagrad(parameters, lr=config.lr, eps=config.eps)
    return torch.optim.Adam(parameters, lr=config.lr, eps=config.eps, betas=(config.beta1, config.beta2), fused=True)


def _initialise_state(optimizer: KeyedOptimizerWrapper) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.init_state()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


class Schedule:
    """Sets every learning rate to its base times a factor of the step; a pure function, so it has no state to save."""

    def __init__(self, config: ScheduleConfig, optimizer: CombinedOptimizer) -> None:
        self._config = config
        self._groups = list(optimizer.param_groups)
        self._base = [group["lr"] for group in self._groups]

    def factor(self, step: int) -> float:
        """Factor of step 0, 1, ...: linear warm-up to 1 over `warmup_steps`, then constant or decay to 0 at `total_steps`."""
        warmup, total = self._config.warmup_steps, self._config.total_steps
        if step < warmup:
            return (step + 1) / warmup
        if self._config.name == "constant":
            return 1.0
        assert total is not None
        done = min(1.0, (step - warmup) / (total - warmup))
        return 1.0 - done if self._config.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def apply(self, step: int) -> None:
        """Set the rates for this step. Call before zero_grad, which hands them to the fused kernels."""
        factor = self.factor(step)
        for group, base in zip(self._groups, self._base, strict=True):
            group["lr"] = base * factor
