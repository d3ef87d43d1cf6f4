"""Base class of methods on a chain of tasks, such as click and conversion: ESMM, ESCM2 and AITM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmlrec.errors import ConfigError, did_you_mean
from mmlrec.layers.scenario import Dispatch
from mmlrec.layers.towers import Towers
from mmlrec.losses import ChainLoss, Loss, LossOptions, chain_products
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner
from mmlrec.output import Output
from mmlrec.schema import Setting


class ChainConfig(NetworkConfig):
    """Options of all methods on a chain of tasks."""

    roles: list[str] | None = Field(
        default=None, description="The tasks from the chain's first step to its last; as the dataset says when absent."
    )
    scenario_towers: Literal["per_scenario", "shared"] = Field(
        default="per_scenario", description="Towers for each scenario, or one chain for the rows of all scenarios."
    )
    max_chain_violation: int = Field(default=0, ge=0, description="Train rows whose labels may contradict the chain.")
    allow_non_chain: bool = Field(default=False, description="Train on labels that are no chain; all reports are marked.")


class ChainModel(MultiTaskModel):
    """Base class of methods on a chain of binary tasks in which each label implies the one before: click, conversion.

    With scenarios the chain's towers are stacks of T * R, index t * R + r: R = S, a row takes those of its own scenario
    (`scenario_towers: per_scenario`), or R = 1 (`shared`).
    """

    Config: ClassVar[type[ChainConfig]] = ChainConfig
    config: ChainConfig
    settings = (Setting.MTL, Setting.MTMSL)
    alternative = "One label is no chain: use setting 'mtl' or 'mtmsl' with a click and a conversion task, or another method."
    #: True: steps have the probability given the step before, so none is above that before. False: each has its own.
    conditional: ClassVar[bool] = True
    #: True: exactly two steps.
    two_steps: ClassVar[bool] = False

    def __init__(self, spec: ModelSpec, config: ChainConfig) -> None:
        super().__init__(spec, config)
        self.chain = self._order()
        self.replicas = spec.num_scenarios if config.scenario_towers == "per_scenario" else 1

    @classmethod
    def check_setting(cls, spec: ModelSpec) -> None:
        """Refuse also regression tasks, and more than two tasks where the method has two steps."""
        super().check_setting(spec)
        where = f"{cls.__name__} in setting '{spec.setting}' needs"
        regression = [task.name for task in spec.tasks if task.kind != "binary"]
        if regression:
            raise ConfigError(
                f"{where} binary tasks, {regression} are regression: choose others with dataset.tasks, or use mmoe."
            )
        if cls.two_steps and spec.num_tasks != 2:
            raise ConfigError(
                f"{where} exactly 2 tasks, a click and a conversion, got {[task.name for task in spec.tasks]}:"
                " choose them with dataset.tasks, or use esmm or aitm."
            )

    def _order(self) -> tuple[int, ...]:
        """The tasks in the order of the chain: `roles`, else the roles ctr and ctcvr, else the dataset's funnel."""
        tasks = self.spec.tasks
        names = [task.name for task in tasks]
        if self.config.roles is not None:
            for name in self.config.roles:
                if name not in names:
                    raise ConfigError(f"model.roles: no task '{name}'.{did_you_mean(name, names)} Tasks: {', '.join(names)}.")
            if sorted(self.config.roles) != sorted(names):
                raise ConfigError(f"model.roles: {self.config.roles} must name each of the tasks {names} once.")
            return tuple(names.index(name) for name in self.config.roles)
        found = {task.name: task.role for task in tasks}
        roles = list(found.values())
        if len(tasks) == 2 and sorted(map(str, roles)) == ["ctcvr", "ctr"]:
            return roles.index("ctr"), roles.index("ctcvr")
        named = len(tasks) == 2 and any(roles)
        if all(task.implied_by_next for task in tasks[:-1]) and not named:
            return tuple(range(len(tasks)))
        raise ConfigError(
            f"{type(self).__name__} in setting '{self.spec.setting}' needs a chain of tasks: the roles ctr and ctcvr, once"
            f" each, or tasks of which each is implied by the next. The dataset gives the roles {found}. Name the tasks from"
            " the first step to the last with model.roles, such as [click, conversion], or use a method such as mmoe."
        )

    def owner(self, parameter: str) -> Owner | None:
        """As `owners` says with towers for each scenario; one chain belongs to no scenario."""
        owner = super().owner(parameter)
        if self.replicas > 1:
            return owner
        return "task" if owner == "head" else None

    def label_logits(self, counts: Tensor) -> Tensor:
        """Of each step, given the one before unless steps are not `conditional`; see the base class.

        Rows on which a step can follow are the positive ones of the step before; where fewer are labelled, those.
        """
        steps = counts.clone()
        for before, this in pairwise(self.chain):
            labelled, positive = counts[this].unbind(-1)
            steps[this, :, 0] = torch.maximum(torch.minimum(counts[before, :, 1], labelled), positive)
        logits = super().label_logits(steps)
        return logits if self.conditional else chain_products(logits.unsqueeze(0), self.chain)[0]

    @property
    def last_step(self) -> tuple[bool, ...]:
        """Of stacks of T * R: the members of the chain's last step. No later step's loss sees them."""
        return tuple(task == self.chain[-1] for task in range(self.spec.num_tasks) for _ in range(self.replicas))

    def make_loss(self, options: LossOptions) -> Loss:
        """Losses in which a step that was not taken implies that the next ones were not, unless the labels are no chain."""
        return ChainLoss(self.spec.tasks, self.spec.num_scenarios, options, self.chain, implied=not self.config.allow_non_chain)

    def chain_dispatch(self, scenario: Tensor, widths: Sequence[int], return_all_heads: bool) -> Dispatch | None:
        """As `own_dispatch`; None, too, when there is one chain for all scenarios."""
        return None if self.replicas == 1 else self.own_dispatch(scenario, widths, return_all_heads)

    def chain_rows(self, scenario: Tensor, valid: Tensor | None) -> Tensor | None:
        """As `head_rows`, for stacks of T * R."""
        return valid if self.replicas == 1 else self.head_rows(scenario, valid)

    def chain_towers(
        self, towers: Towers, x: Tensor, scenario: Tensor, valid: Tensor | None, dispatch: Dispatch | None
    ) -> Tensor:
        """Logits of U * R stacked towers over x [B, d_in]: [B, U, 1] of each row's own with a dispatch, else [B, U, R]."""
        if dispatch is not None:
            return dispatch.restore(towers.own(dispatch.arrange(x), dispatch)).unsqueeze(2)
        rows = self.chain_rows(scenario, valid)
        if rows is not None and rows.dim() == 2:
            rows = rows[: len(towers.bias)]
        return towers(x, rows).unflatten(1, (-1, self.replicas))

    def own_replica(self, values: Tensor, scenario: Tensor) -> Tensor:
        """[B, U] of each row's own scenario, from [B, U, 1] or [B, U, S]."""
        return self.own_scenario(values.flatten(1), scenario, values.shape[2])

    def chain_output(self, logits: Tensor, scenario: Tensor, return_all_heads: bool) -> Output:
        """The output from the unconditional logits [B, T, 1] or [B, T, S]."""
        own = self.own_replica(logits, scenario)
        named = {"ctr": own[:, self.chain[0]], "ctcvr": own[:, self.chain[-1]]}
        every = logits.expand(-1, -1, self.spec.num_scenarios).flatten(1) if return_all_heads else None
        return Output(own, every, named)
