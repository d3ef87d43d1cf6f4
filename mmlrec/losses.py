"""Masked losses of each task, with denominators over all ranks, and the logit of a product of probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlrec.errors import ConfigError
from mmlrec.output import Output
from mmlrec.schema import Task

Reduction = Literal["pooled", "balanced"]
Unit = Literal["task", "scenario", "head"]


@dataclass(frozen=True)
class LossOptions:
    """What the configuration and the dataset say about losses; see `Loss`.

    Attributes:
        scenario_reduction: see `Loss`.
        unit: what one objective is.
        scenarios: names of the S scenarios, for objectives by scenario; their indices when empty.
        huber_delta: error of a regression task, in the unit of its labels, from which its loss grows linearly; None: never.
        deviations: by which the labels of each task that the loss gets are divided; empty: by none.
    """

    scenario_reduction: Reduction = "pooled"
    unit: Unit = "task"
    scenarios: tuple[str, ...] = ()
    huber_delta: float | None = None
    deviations: tuple[float, ...] = ()


class Loss:
    """The objectives of one step: each task's mean loss over its labelled rows, all ranks together.

        L_t = sum_b w_b m[b, t] l(z[b, t], y[b, t]) / sum_b w_b m[b, t]

    with l the binary cross-entropy of the logit, or the squared error e^2 of a regression task (with a Huber delta d:
    d (2 |e| - d) where |e| > d). `pooled` counts every row once; `balanced` is the mean of the per-scenario means, over the
    scenarios that have labelled rows. A task without rows has loss 0 and zero gradients. A NaN label counts as missing.

    With unit `scenario` or `head` an objective is the part of these sums that comes from the rows of one scenario, over all
    tasks or for one task: the objectives of every unit add up to the same loss.

    Use: `denominators` on every rank, sum over ranks, then call. With gradients averaged over ranks (DDP), W ranks give
    the gradient of one process on the whole batch; a returned scalar's mean over ranks is the loss of the whole batch.
    Methods with other losses override `row_losses` (what a row and task costs) or `terms` (scalars added as they are), and
    `MultiTaskModel.make_loss`.
    """

    def __init__(self, tasks: tuple[Task, ...], num_scenarios: int, options: LossOptions = LossOptions()) -> None:
        self.tasks, self.num_scenarios = tasks, num_scenarios
        self.balanced = options.scenario_reduction == "balanced" and num_scenarios > 1
        self.unit = options.unit
        #: Of each task, in the unit of the labels that the loss gets.
        self.huber_deltas: list[float] | None = None
        if options.huber_delta is not None:
            self.huber_deltas = [options.huber_delta / each for each in options.deviations or [1.0] * len(tasks)]
        self.scenarios = options.scenarios or tuple(str(s) for s in range(num_scenarios))

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the losses that weights apply to; others in the result (a method's own terms) are added as they are.

        Tasks, scenarios, or `task/scenario` for each head t * S + s.
        """
        if self.unit == "task":
            return tuple(task.name for task in self.tasks)
        if self.unit == "scenario":
            return self.scenarios
        return tuple(f"{task.name}/{scenario}" for task in self.tasks for scenario in self.scenarios)

    def denominators(self, labels: Tensor, mask: Tensor, scenario: Tensor, weight: Tensor) -> Tensor:
        """Sums of the weights of this rank's labelled rows, to be summed over ranks.

        Args:
            labels: [B, T], NaN where missing.
            mask: [B, T], 1 where the label is present.
            scenario: [B] int64.
            weight: [B].

        Returns:
            [T] float32; [T, S] when balanced.
        """
        counted = row_weights(*self.known(labels, mask), weight)
        if not self.balanced:
            return counted.sum(dim=0)
        return counted.t() @ F.one_hot(scenario, self.num_scenarios).to(counted.dtype)

    def __call__(
        self,
        output: Output,
        labels: Tensor,
        mask: Tensor,
        scenario: Tensor,
        weight: Tensor,
        denominators: Tensor,
        world_size: int = 1,
    ) -> dict[str, Tensor]:
        """Objectives by name, each a scalar, then the terms that are added as they are.

        Args:
            output: of the network; `logits` [B, T].
            labels, mask, scenario, weight: as for `denominators`.
            denominators: summed over ranks.
            world_size: number of ranks over which gradients are averaged.

        Raises:
            ConfigError: an objective has the name of a term, which would take its place.
        """
        labels, mask = self.known(labels, mask)
        losses = self.row_losses(output, labels)
        share = row_weights(labels, mask, weight).to(losses.dtype) * self._scale(denominators, scenario) * world_size
        sums = self._by_unit(losses * share, scenario)
        terms = self.terms(output, labels, share)
        for name in terms:
            if name in self.objectives:
                raise ConfigError(f"objective '{name}' has the name of a term of the method's loss: rename it in the dataset.")
        return dict(zip(self.objectives, sums.unbind(), strict=True)) | terms

    def known(self, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and mask, both [B, T], that the loss is of: here those given."""
        return labels, mask

    def row_losses(self, output: Output, labels: Tensor) -> Tensor:
        """Loss of each row and task, [B, T], finite also where a label is missing (NaN)."""
        return per_sample(output.logits, labels, self.tasks, self.huber_deltas)

    def terms(self, output: Output, labels: Tensor, share: Tensor) -> dict[str, Tensor]:
        """Scalars that are added to the objectives as they are, by name: here the network's own.

        Args:
            share: [B, T], what multiplies each row's loss in its objective: its weight over the global denominator, times
                the world size; 0 where the label is missing.
        """
        return output.extra_losses

    def _by_unit(self, losses: Tensor, scenario: Tensor) -> Tensor:
        """Sums over the rows of each objective, [K], of losses [B, T]."""
        if self.unit == "task":
            return losses.sum(dim=0)
        of_heads = losses.t() @ F.one_hot(scenario, self.num_scenarios).to(losses.dtype)
        return of_heads.sum(dim=0) if self.unit == "scenario" else of_heads.flatten()

    def _scale(self, denominators: Tensor, scenario: Tensor) -> Tensor:
        """1 / denominator of each row and task, broadcast to [B, T]."""
        present = counted(denominators)
        scale = torch.where(present, denominators, 1.0).reciprocal()
        if not self.balanced:
            return scale
        return (scale / present.sum(dim=1, keepdim=True).clamp(min=1))[:, scenario].t()


class ChainLoss(Loss):
    """Losses of a chain of tasks in which each label implies the one before, such as click and conversion.

    Who has not taken a step has not taken the next one: a label that is missing where the one before is known to be 0 counts
    as 0, with the mask of the one before. One missing after a 1 stays missing.
    """

    def __init__(
        self, tasks: tuple[Task, ...], num_scenarios: int, options: LossOptions, chain: Sequence[int], *, implied: bool
    ) -> None:
        """The losses of the tasks; `chain` gives their columns from the first step to the last, `implied` whether it holds."""
        super().__init__(tasks, num_scenarios, options)
        self.chain, self.implied = chain, implied

    def known(self, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and mask, both [B, T], with those that follow from the step before."""
        if not self.implied:
            return labels, mask
        columns, masks = list(labels.unbind(1)), list(mask.unbind(1))
        for before, this in pairwise(self.chain):
            missing = columns[this].isnan() | (masks[this] == 0)
            follows = missing & (columns[before] == 0) & (masks[before] != 0)
            columns[this] = torch.where(follows, 0.0, columns[this])
            masks[this] = torch.where(follows, masks[before], masks[this])
        return torch.stack(columns, dim=1), torch.stack(masks, dim=1)


def counted(sums: Tensor) -> Tensor:
    """Whether weights sum up to something: 0 does not, nor does what is so little that its reciprocal may be infinite."""
    return sums >= torch.finfo(sums.dtype).tiny


def row_weights(labels: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Weight of each row in each task's loss, [B, T]: 0 where the label is masked or NaN."""
    return torch.where(labels.isnan(), 0.0, mask * weight.unsqueeze(1))


def per_sample(logits: Tensor, labels: Tensor, tasks: tuple[Task, ...], huber_deltas: Sequence[float] | None = None) -> Tensor:
    """Loss of each row and task, [B, T], in float32 or wider; NaN labels are read as 0. Deltas are those of each task."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Replaced before the loss: 0 * NaN is NaN, so masking after it would be too late.
    labels = torch.nan_to_num(labels.to(logits.dtype), nan=0.0)
    binary = [task.kind == "binary" for task in tasks]
    if all(binary):
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    columns = [
        F.binary_cross_entropy_with_logits(logits[:, t], labels[:, t], reduction="none")
        if is_binary
        else _regression(logits[:, t], labels[:, t], None if huber_deltas is None else huber_deltas[t])
        for t, is_binary in enumerate(binary)
    ]
    return torch.stack(columns, dim=1)


def _regression(values: Tensor, labels: Tensor, huber_delta: float | None) -> Tensor:
    """Squared error; Huber (1964), times 2 so that small errors count alike, with a delta."""
    if huber_delta is None:
        return (values - labels).square()
    return 2 * F.huber_loss(values, labels, reduction="none", delta=huber_delta)


def chain_logit(a: Tensor, c: Tensor) -> Tensor:
    """logit(sigmoid(a) * sigmoid(c)), exact and finite for large inputs: - logsumexp(-a, -c, -(a + c)).

    Because 1/p - 1 = e^-a + e^-c + e^-(a+c) for the product p. Longer chains fold pairwise. Float32 or wider.
    """
    kind = torch.promote_types(torch.promote_types(a.dtype, c.dtype), torch.float32)
    a, c = a.to(kind), c.to(kind)
    return -torch.logsumexp(torch.stack([-a, -c, -(a + c)]), dim=0)


def chain_products(steps: Tensor, chain: Sequence[int]) -> Tensor:
    """Logits of the products along a chain: column k of the result is logit(prod_{j up to k} sigmoid(steps_j)).

    Args:
        steps: [B, T, ...] conditional logits.
        chain: the T columns, first step first.

    Returns:
        [B, T, ...], in the columns of `steps`.
    """
    logits = list(steps.unbind(1))
    for before, this in pairwise(chain):
        logits[this] = chain_logit(logits[before], logits[this])
    return torch.stack(logits, dim=1)
