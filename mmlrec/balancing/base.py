"""What every strategy shares: its view of the run, its options, its base class, and that of strategies on loss values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from mmlrec.errors import ConfigError, did_you_mean
from mmlrec.losses import Unit
from mmlrec.schema import Task
from mmlrec.yaml_config import StrictModel

#: Name of a parameter -> for each of its equal parts along the first axis, whether one objective owns it; shared if absent.
Owned = Mapping[str, tuple[bool, ...]]
Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class BalancingSpec:
    """What a strategy has to know about its run.

    Attributes:
        name: the strategy's own, for messages.
        objectives: names of the K objectives, in order.
        unit: what one objective is.
        tasks: the tasks whose losses the objectives are, in order.
        num_scenarios: number of scenarios that objectives tell apart; 1 where they are tasks.
        owned: what of the network's parameters one objective owns.
        any_shared: whether anything is left that objectives share.
        num_looked_up: columns of the network's input that come from tables.
        seed: seed of the run.
        steps_per_epoch: number of training steps of an epoch.
    """

    name: str
    objectives: tuple[str, ...]
    unit: Unit = "task"
    tasks: tuple[Task, ...] = ()
    num_scenarios: int = 1
    owned: Owned = field(default_factory=dict)
    any_shared: bool = True
    num_looked_up: int = 0
    seed: int = 0
    steps_per_epoch: int = 1

    def check_objective(self, key: str, name: str) -> str:
        """`name`, if this run has such an objective.

        Args:
            key: dotted key of the option that names it, for the message.

        Raises:
            ConfigError: it has not; the message lists them and suggests the nearest.
        """
        if name not in self.objectives:
            parts = [objective for objective in self.objectives if name in objective.split("/")]
            raise ConfigError(
                f"{key}: '{name}' is not an objective of this run.{did_you_mean(name, parts or self.objectives)}"
                f" Objectives (balancing.unit={self.unit}): {', '.join(self.objectives)}."
            )
        return name


class BalancingConfig(StrictModel):
    """Options of all strategies, as they stand under `balancing:`."""

    unit: Literal["task", "scenario", "head"] | None = Field(
        default=None, description="What one objective is; when absent a task, in setting msl a scenario."
    )
    loss_weights: dict[str, Weight] = Field(default={}, description="Objective -> weight; 1 when absent.")


class Balancing(nn.Module):
    """Base class of all strategies: joins the K objectives of a step into the scalar that is differentiated once.

    A subclass sets `Config` and implements `forward`, or what `LossBalancing` or `GradientBalancing` leave open. State is kept
    in buffers and parameters, so that checkpoints hold it; all of it is equal on all ranks.
    """

    Config: ClassVar[type[BalancingConfig]] = BalancingConfig
    config: BalancingConfig
    #: Steps at the start in which it does not weigh as it is meant to; a run of no more than these never used it.
    warmup_steps: int = 0

    def __init__(self, spec: BalancingSpec, config: BalancingConfig) -> None:
        super().__init__()
        self.spec = spec
        self.config = config

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """The loss of a training step.

        Args:
            objectives: [K], this rank's share of each, loss weights applied; the mean over ranks is the global loss.
            x: [B, d_in], the network's input.
            parameters: of the network, by name.
            step: number of this training step, from 1.
        """
        raise NotImplementedError

    def checked(self, made: object, losses: Tensor, remedy: str = "") -> Tensor:
        """What `coefficients` made of the losses [K].

        Args:
            remedy: a sentence that the error ends with.

        Raises:
            TypeError: it is no tensor of one number for each objective.
        """
        if not isinstance(made, Tensor) or made.shape != losses.shape:
            found = f"a tensor {list(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise TypeError(
                f"balancing.name={self.spec.name}: {type(self).__name__}.coefficients returns {found} where a tensor"
                f" {list(losses.shape)} is wanted, one number for each objective.{remedy}"
            )
        return made

    def report(self, names: Sequence[str]) -> dict[str, float]:
        """What to log about the newest step, by key; `names` are those of the objectives."""
        return {}


class LossBalancing(Balancing):
    """Coefficients from the losses, averaged over ranks, and from their history."""

    coefficient: Tensor

    def __init__(self, spec: BalancingSpec, config: BalancingConfig) -> None:
        super().__init__(spec, config)
        self.register_buffer("coefficient", torch.ones(len(spec.objectives), dtype=torch.float64))

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See the base class."""
        losses = mean_over_ranks(objectives.detach().double())
        self.coefficient.copy_(self.checked(self.coefficients(losses, step), losses))
        return torch.sum(objectives * self.coefficient.to(objectives.dtype))

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """The c [K] of this step, from global losses [K], float64. An objective without rows has loss 0 and any coefficient."""
        raise NotImplementedError

    def report(self, names: Sequence[str]) -> dict[str, float]:
        """See the base class."""
        return by_name("balancing/coefficient", names, self.coefficient)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over all ranks, equal on each to the bit; `values` itself on one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers that depend on seed and step only: equal on all ranks and after a resume."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, through pinned memory: a copy from elsewhere would wait for all work of the device.

    On the CPU the values themselves.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Values of a device on the host, through pinned memory, with one wait until the device has computed them.

    On the CPU the values themselves.
    """
    if values.device.type == "cpu":
        return values
    found = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    found.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).record_event().synchronize()
    return found


def by_name(key: str, names: Sequence[str], values: Tensor) -> dict[str, float]:
    """`key/name` -> value, for logging."""
    return {f"{key}/{name}": value for name, value in zip(names, values.tolist(), strict=True)}
