"""Strategies that compare the objectives' gradients, with one ordinary backward, so that sharded tables are updated once.

A table's optimizer steps inside every backward that reaches the lookup, and DistributedDataParallel averages what that
backward leaves. So nothing here calls backward. Inside the forward pass `torch.autograd.grad` computes gradients by the
network's input x and parameters; it reaches neither table nor hook. The strategy turns their Gram matrix into coefficients c.
What is returned is the loss, with a backward of its own that hands on

    sum_k c_k dL_k/dp for x and every shared parameter p,      sum_k dL_k/dp for what one objective owns.

The caller's backward carries the former from x into the lookup, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mmlrec.balancing.base import Balancing, BalancingConfig, BalancingSpec, by_name, mean_over_ranks
from mmlrec.errors import ConfigError

Array = NDArray[np.float64]
#: A tensor, and which of its numbers are meant; None: all.
Part = tuple[Tensor, Tensor | None]


class GradientBalancingConfig(BalancingConfig):
    """Options of all strategies that read the gradients of the objectives."""

    scope: Literal["shared_dense", "embedding", "both"] = Field(
        default="shared_dense", description="Gradients that are compared: of shared parameters, of looked-up vectors, or both."
    )
    gram: Literal["global", "local"] = Field(
        default="global", description="Inner products of gradients averaged over ranks, or averaged inner products."
    )
    refresh_every: int = Field(default=1, gt=0, description="Steps between two computations of the coefficients.")


class GradientBalancing(Balancing):
    """Coefficients from the Gram matrix of the gradients of shared parameters, of x, or of both.

    A subclass implements `rule`, or `coefficients` where objectives without a gradient count, too.

    Raises:
        ConfigError: fewer than two objectives, or nothing that they share.
    """

    Config: ClassVar[type[BalancingConfig]] = GradientBalancingConfig
    config: GradientBalancingConfig

    coefficient: Tensor
    gram: Tensor

    def __init__(self, spec: BalancingSpec, config: GradientBalancingConfig) -> None:
        super().__init__(spec, config)
        count = len(spec.objectives)
        if count < 2:
            raise ConfigError(
                f"balancing.name={spec.name} compares the gradients of 2 or more objectives; with balancing.unit={spec.unit}"
                f" this run has one, '{spec.objectives[0]}'. Choose another unit, or balancing.name=static."
            )
        if not spec.any_shared and config.scope == "shared_dense":
            raise ConfigError(
                f"balancing.name={spec.name}: with balancing.unit={spec.unit} the network shares no parameters."
                " Set balancing.scope=embedding, which compares gradients of looked-up vectors."
            )
        if not spec.num_looked_up and config.scope == "embedding":
            raise ConfigError(
                f"balancing.scope=embedding: {spec.name} would compare gradients of looked-up vectors, and all features of this"
                " dataset are numbers. Use balancing.scope=shared_dense."
            )
        self.register_buffer("coefficient", torch.ones(count, dtype=torch.float64))
        self.register_buffer("gram", torch.zeros(count, count, dtype=torch.float64))

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See the base class."""
        shared, owned = self._split(x, parameters)
        tensors, loss = [tensor for tensor, _ in shared + owned], torch.sum(objectives)
        if (step - 1) % self.config.refresh_every == 0:
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
            parts = self.spec.owned.get(name, (False,))
            if len(set(parts)) == 1:
                (owned if parts[0] else shared).append((parameter, None))
                continue
            mask = torch.tensor(parts, device=parameter.device).repeat_interleave(parameter.numel() // len(parts))
            owned.append((parameter, mask.view_as(parameter)))
            shared.append((parameter, ~mask.view_as(parameter)))
        return shared, owned

    def coefficients(self, gram: Array, losses: Array, step: int) -> Array:
        """The c [K] of the objectives whose gradient is not zero; 1 for the others, which have no rows in this batch."""
        present = np.diag(gram) > 0
        c = np.ones(len(gram))
        if present.any():
            c[present] = self.rule(gram[np.ix_(present, present)], losses[present], step)
        return c

    def rule(self, gram: Array, losses: Array, step: int) -> Array:
        """The c of objectives whose gradient is not zero.

        Args:
            gram: Q, float64, with Q_ij = g_i . g_j of their gradients. No rule needs the gradients themselves, so that its
                cost does not depend on their length.
            losses: of the global batch, float64.
            step: number of this training step, from 1.
        """
        raise NotImplementedError

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
        if self.config.scope != "embedding" and len(of_each[0]) > 1:
            dense = torch.stack([torch.cat([g.flatten() for g in own[1:]]) for own in of_each])
            gram += inner_products(dense if self.config.gram == "local" else mean_over_ranks(dense))
        if self.config.scope != "shared_dense":
            # Each rank has other rows of x, so the inner products add up; a rank's loss is W times its rows' share of the
            # global loss, hence W^2; the mean over ranks below takes one W.
            rows = torch.stack([own[0][:, : self.spec.num_looked_up].flatten() for own in of_each])
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
