"""Single-Task: an independent network, with its own tables, for each head. The lower reference point of sharing.

No paper: a reference point, as benchmarks use it.

    e_h = lookup in the tables of branch h      x[:, h], [B, d_in]
    u_h = MLP_h(e_h; expert_hidden_units)       [B, k]
    z_h = Tower_h(u_h)                          [B], h = t * S + s

A branch is a head: a task, a scenario, or a pair of both. Nothing is shared, so training branch h alone, by
`branches: [h]`, gives the weights it has in the joint run: the initial weights of a branch depend on (seed, h) only.
With `branches` the input is [B, len(branches), d_in], in that order, and the logit of a head that is not trained is 0:
its labels must be masked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mmlrec.errors import ConfigError
from mmlrec.layers.experts import StackedMLP
from mmlrec.layers.towers import Towers
from mmlrec.losses import Loss, LossOptions, counted
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner, Width
from mmlrec.output import Output
from mmlrec.schema import Task


class BranchLoss(Loss):
    """Sum over branches of each branch's mean loss, so that a branch trains as it would alone.

    `loss.scenario_reduction` has no effect: there is nothing shared whose gradient it could balance.
    """

    def __init__(self, tasks: tuple[Task, ...], num_scenarios: int, options: LossOptions) -> None:
        super().__init__(tasks, num_scenarios, replace(options, scenario_reduction="balanced"))

    def _scale(self, denominators: Tensor, scenario: Tensor) -> Tensor:
        if not self.balanced:
            return super()._scale(denominators, scenario)
        return torch.where(counted(denominators), denominators, 1.0).reciprocal()[:, scenario].t()


class SingleTask(MultiTaskModel):
    """One model for each head. `branches` holds the trained heads, in the order of the input's second axis."""

    one_task = True
    tables_per_branch = True
    owners: ClassVar[dict[str, Owner]] = {"networks": "head", "towers": "head"}

    class Config(NetworkConfig):
        """Options of Single-Task."""

        expert_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Widths of each network.")
        tower_hidden_units: list[Width] = Field(default=[64], description="Widths of each tower; may be empty.")
        branches: list[int] | None = Field(
            default=None, min_length=1, description="Heads (t * S + s) to train; all when absent. Saves the others' tables."
        )

    config: Config
    heads: Tensor

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        self.branches = tuple(range(spec.num_heads)) if config.branches is None else tuple(config.branches)
        if len(set(self.branches)) != len(self.branches) or not set(self.branches) <= set(range(spec.num_heads)):
            raise ConfigError(
                f"model.branches: {list(self.branches)} must be different heads in"
                f" 0..{spec.num_heads - 1} (task * S + scenario)."
            )
        self.register_buffer("heads", torch.tensor(self.branches), persistent=False)
        self.networks, self.towers = self._build(len(self.branches), config, self.generator)
        for index, branch in enumerate(self.branches):
            generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + branch)
            for mine, alone in zip((self.networks, self.towers), self._build(1, config, generator), strict=True):
                for parameter, values in zip(mine.parameters(), alone.parameters(), strict=True):
                    parameter.data.view(len(self.branches), -1)[index] = values.data.flatten()

    def make_loss(self, options: LossOptions) -> Loss:
        """Means of each branch; see `BranchLoss`."""
        return BranchLoss(self.spec.tasks, self.spec.num_scenarios, options)

    def _build(self, count: int, config: Config, generator: torch.Generator) -> tuple[StackedMLP, Towers]:
        networks = StackedMLP(count, self.spec.input_width, config.expert_hidden_units, config.hidden, generator)
        return networks, Towers(count, networks.out_features, config.tower_hidden_units, config.hidden, generator)

    def forward(
        self,
        x: Tensor,
        fields: dict[str, Tensor],
        scenario: Tensor,
        *,
        valid: Tensor | None = None,
        noise: Tensor | None = None,
        return_all_heads: bool = False,
    ) -> Output:
        """Logits; see the base class. Here x is [B, H, d_in], or [B, len(branches), d_in]."""
        spec = self.spec
        in_order = self.branches == tuple(range(spec.num_heads))
        dispatch = (
            self.own_dispatch(scenario, [*self.config.expert_hidden_units, *self.config.tower_hidden_units], return_all_heads)
            if in_order
            else None
        )
        if dispatch is not None:
            index = scenario.view(-1, 1, 1, 1).expand(-1, spec.num_tasks, 1, x.shape[2])
            own = torch.gather(x.view(x.shape[0], spec.num_tasks, spec.num_scenarios, -1), 2, index)[:, :, 0]
            hidden = self.networks.own(dispatch.arrange(own.transpose(0, 1)), dispatch)
            return Output(dispatch.restore(self.towers.own(hidden, dispatch)))
        rows = self.head_rows(scenario, valid)
        if rows is not None and rows.dim() == 2:
            rows = rows[self.heads]
        logits = self.towers(self.networks(x.transpose(0, 1), rows), rows)
        if not in_order:
            spread = logits.new_zeros(logits.shape[0], spec.num_heads)
            logits = spread.scatter(1, self.heads.expand(logits.shape[0], -1), logits)
        return self.select(logits, scenario, return_all_heads)
