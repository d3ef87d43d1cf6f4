"""Strategies that compare the objectives' gradients, with one ordinary backward, so that sharded tables are updated once.

A table's optimizer steps inside every backward that reaches the lookup, and DistributedDataParallel averages what that
backward leaves. So nothing here calls backward. Inside the forward pass `torch.autograd.grad` computes gradients by the
network's input x and parameters; it reaches neither table nor hook. The strategy turns their Gram matrix into coefficients c.
What is returned is the loss, with a backward of its own that hands on

    sum_k c_k dL_k/dp for x and every shared parameter p,      sum_k dL_k/dp for what one objective owns.

The caller's backward carries the former from x into the lookup, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmlrec.balancing import rules
from mmlrec.balancing.base import Balancing, by_name, mean_over_ranks, step_generator
from mmlrec.balancing.rules import Array
from mmlrec.config import GradientBalancingConfig, GradNormConfig, MetaBalanceConfig, MgdaConfig

#: Name of a parameter -> for each of its equal parts along the first axis, whether one objective owns it; shared if absent.
Owned = Mapping[str, tuple[bool, ...]]
#: A tensor, and which of its numbers are meant; None: all.
Part = tuple[Tensor, Tensor | None]
#: A rule of `rules` with its options: Gram matrix, losses and step -> coefficients.
Rule = Callable[[Array, Array, int], Array]


class GradientBalancing(Balancing):
    """Coefficients from the Gram matrix of the gradients of shared parameters, of x, or of both.

    Args:
        rule: what makes coefficients of the Gram matrix of those objectives whose gradient is not zero.
        owned: what of the parameters one objective owns.
        num_looked_up: columns of x that come from tables.
    """

    coefficient: Tensor
    gram: Tensor

    def __init__(
        self, num_objectives: int, config: GradientBalancingConfig, rule: Rule | None, owned: Owned, num_looked_up: int
    ) -> None:
        super().__init__()
        self.rule, self.owned, self.num_looked_up = rule, owned, num_looked_up
        self.scope, self.average_grams, self.refresh_every = config.scope, config.gram == "local", config.refresh_every
        self.register_buffer("coefficient", torch.ones(num_objectives, dtype=torch.float64))
        self.register_buffer("gram", torch.zeros(num_objectives, num_objectives, dtype=torch.float64))

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See the base class."""
        shared, owned = self._split(x, parameters)
        tensors, loss = [tensor for tensor, _ in shared + owned], torch.sum(objectives)
        if (step - 1) % self.refresh_every == 0:
            # What is owned comes along: in layers that hold all heads at once, to leave it out saves nothing.
            of_each = [gradients(objective, shared + owned) for objective in objectives.unbind()]
            self._refresh([own[: len(shared)] for own in of_each], objectives.detach(), step)
            found = weighted_sum([own[: len(shared)] for own in of_each], self.coefficient.tolist())
            if owned:
                found += weighted_sum([own[len(shared) :] for own in of_each], [1.0] * len(of_each))
        else:
            found = gradients(torch.sum(objectives * self.coefficient.to(objectives.dtype)), shared)
            found += gradients(loss, owned) if owned else []
        return _Replaced.apply(loss.detach(), len(tensors), *tensors, *found)

    def _split(self, x: Tensor, parameters: Mapping[str, Tensor]) -> tuple[list[Part], list[Part]]:
        """What objectives share, x first, and what one of them owns. A parameter of which parts are owned is in both lists."""
        shared: list[Part] = [(x, None)]
        owned: list[Part] = []
        for name, parameter in parameters.items():
            parts = self.owned.get(name, (False,))
            if len(set(parts)) == 1:
                (owned if parts[0] else shared).append((parameter, None))
                continue
            mask = torch.tensor(parts, device=parameter.device).repeat_interleave(parameter.numel() // len(parts))
            owned.append((parameter, mask.view_as(parameter)))
            shared.append((parameter, ~mask.view_as(parameter)))
        return shared, owned

    def coefficients(self, gram: Array, losses: Array, step: int) -> Array:
        """The c [K] of the objectives whose gradient is not zero; 1 for the others, which have no rows in this batch."""
        assert self.rule is not None
        present = np.diag(gram) > 0
        c = np.ones(len(gram))
        if present.any():
            c[present] = self.rule(gram[np.ix_(present, present)], losses[present], step)
        return c

    def _refresh(self, of_each: list[list[Tensor]], objectives: Tensor, step: int) -> None:
        gram, losses = self._global_gram(of_each, objectives)
        self.gram.copy_(gram)
        if gram.isfinite().all() and losses.isfinite().all():
            c = self.coefficients(gram.cpu().numpy(), losses.cpu().numpy(), step)
            self.coefficient.copy_(torch.from_numpy(c))
        else:  # The plain sum is no more finite; the trainer ends the run and says so.
            self.coefficient.fill_(1.0)

    def _global_gram(self, of_each: list[list[Tensor]], objectives: Tensor) -> tuple[Tensor, Tensor]:
        """Gram matrix [K, K] of the whole batch's gradients, and the losses [K]: float64, equal on all ranks."""
        count, world_size = len(of_each), dist.get_world_size() if dist.is_initialized() else 1
        gram = objectives.new_zeros(count, count, dtype=torch.float64)
        if self.scope != "embedding" and len(of_each[0]) > 1:
            dense = torch.stack([torch.cat([g.flatten() for g in own[1:]]) for own in of_each])
            gram += inner_products(dense if self.average_grams else mean_over_ranks(dense))
        if self.scope != "shared_dense":
            # Each rank has other rows of x, so the inner products add up; a rank's loss is W times its rows' share of the
            # global loss, hence W^2; the mean over ranks below takes one W.
            rows = torch.stack([own[0][:, : self.num_looked_up].flatten() for own in of_each])
            gram += inner_products(rows) / world_size
        joint = mean_over_ranks(torch.cat([gram.flatten(), objectives.double()]))
        return joint[:-count].view(count, count), joint[-count:]

    def report(self, names: Sequence[str]) -> dict[str, float]:
        """Coefficients, norms of the gradients and cosines between them, of the newest refresh."""
        norms = self.gram.diagonal().sqrt()
        cosines = self.gram / (norms[:, None] * norms).clamp(min=1e-300)
        found = by_name("balancing/coefficient", names, self.coefficient) | by_name("balancing/norm", names, norms)
        for i, name in enumerate(names):
            others = [f"{name}~{other}" for other in names[i + 1 :]]
            found |= by_name("balancing/cosine", others, cosines[i, i + 1 :])
        return found


class Monitor(GradientBalancing):
    """The plain sum, whose gradients are compared for the log; training is as without a strategy, to the bit."""

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See the base class."""
        if (step - 1) % self.refresh_every == 0:
            shared, _ = self._split(x, parameters)
            of_each = [gradients(objective, shared) for objective in objectives.unbind()]
            self.gram.copy_(self._global_gram(of_each, objectives.detach())[0])
        return torch.sum(objectives)


class GradNorm(GradientBalancing):
    """Weights w of sum K that follow `rules.gradnorm_slope` by gradient descent; c = w.

    The weights act on what is shared; what an objective owns trains on the plain loss, as under all strategies here.
    """

    weights: Tensor
    first: Tensor

    def __init__(self, num_objectives: int, config: GradNormConfig, owned: Owned, num_looked_up: int) -> None:
        super().__init__(num_objectives, config, None, owned, num_looked_up)
        self.alpha, self.lr = config.alpha, config.lr
        self.register_buffer("weights", torch.ones(num_objectives, dtype=torch.float64))
        self.register_buffer("first", torch.zeros(num_objectives, dtype=torch.float64))

    def coefficients(self, gram: Array, losses: Array, step: int) -> Array:
        """The weights before this step's update."""
        weights, first = self.weights.cpu().numpy().copy(), self.first.cpu().numpy().copy()
        first = np.where(first > 0, first, losses)
        current = weights.copy()
        present = (np.diag(gram) > 0) & (losses > 0)
        if present.any():
            own = (gram[np.ix_(present, present)], losses[present], first[present], weights[present], self.alpha)
            weights[present] -= self.lr * rules.gradnorm_slope(*own)
        weights = np.maximum(weights, 1e-4)
        self.weights.copy_(torch.from_numpy(weights * len(weights) / weights.sum()))
        self.first.copy_(torch.from_numpy(first))
        return current


class MetaBalance(GradientBalancing):
    """`rules.metabalance` on moving averages of the norms, each of the batches in which its objective has rows."""

    norms: Tensor

    def __init__(self, num_objectives: int, config: MetaBalanceConfig, main: int, owned: Owned, num_looked_up: int) -> None:
        super().__init__(num_objectives, config, None, owned, num_looked_up)
        self.r, self.beta, self.main = config.r, config.beta, main
        self.register_buffer("norms", torch.zeros(num_objectives, dtype=torch.float64))

    def coefficients(self, gram: Array, losses: Array, step: int) -> Array:
        """See the base class."""
        before, now = self.norms.cpu().numpy(), np.sqrt(np.diag(gram))
        norms = np.where(before > 0, self.beta * before + (1 - self.beta) * now, now)
        norms = np.where(now > 0, norms, before)
        self.norms.copy_(torch.from_numpy(norms))
        known = norms > 0
        if not known[self.main]:
            return np.ones(len(norms))
        return np.where(known, rules.metabalance(np.where(known, norms, 1.0), self.main, self.r), 1.0)


def pcgrad_rule(seed: int) -> Rule:
    """PCGrad, with orders drawn from (seed, step)."""

    def rule(gram: Array, losses: Array, step: int) -> Array:
        generator = step_generator(seed, step)
        return rules.pcgrad(gram, [torch.randperm(len(gram), generator=generator).tolist() for _ in gram])

    return rule


def mgda_rule(config: MgdaConfig) -> Rule:
    """MGDA on normalised gradients g_t / s_t; K times, because the weights of a sum of K losses add up to K."""

    def rule(gram: Array, losses: Array, step: int) -> Array:
        scales = np.ones(len(gram))
        if config.normalisation in ("l2", "loss+"):
            scales = scales * np.sqrt(np.diag(gram))
        if config.normalisation in ("loss", "loss+"):
            scales = scales * losses
        return np.asarray(len(gram) * rules.mgda(gram / np.outer(scales, scales)) / scales)

    return rule


def nash_rule(ridge: float) -> Rule:
    """Nash bargaining on the Gram matrix divided by its Frobenius norm."""
    return lambda gram, losses, step: rules.nash(gram / np.linalg.norm(gram), ridge)


class _Replaced(torch.autograd.Function):
    """`value`, whose gradient by each of the tensors is the one that is given instead of the one that was recorded."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        """`tensors`: `count` of them, then the gradient of each."""
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        return None, None, *(grads[0] * gradient for gradient in given), *(None for _ in given)


def gradients(loss: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """dloss/dtensor for each, zeros outside of its mask and where the loss does not depend on it; the graph stays."""
    found = torch.autograd.grad(loss, [tensor for tensor, _ in parts], retain_graph=True, materialize_grads=True)
    return [own if mask is None else own * mask for own, (_, mask) in zip(found, parts, strict=True)]


def weighted_sum(of_each: list[list[Tensor]], c: Sequence[float]) -> list[Tensor]:
    """sum_k c_k of_each[k], tensor by tensor."""
    total = list(torch._foreach_mul(of_each[0], c[0]))
    for factor, own in zip(c[1:], of_each[1:], strict=True):
        torch._foreach_add_(total, own, alpha=factor)
    return total


def inner_products(rows: Tensor) -> Tensor:
    """Products rows @ rows^T in float64, [K, P] -> [K, K]."""
    wide = rows.double()
    return wide @ wide.t()
