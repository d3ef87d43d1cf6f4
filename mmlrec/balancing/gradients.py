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

from mmlrec.balancing.base import Balancing, BalancingConfig, BalancingSpec, by_name, mean_over_ranks, to_device, to_host
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

    A subclass implements `rule`, on the host; or `coefficients`, where it needs no solver, or objectives without rows count.

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
        #: Of parameters of which parts are owned: made in the first step, as a copy to the device waits for it.
        self._owned_numbers: dict[str, Tensor] = {}

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See the base class."""
        shared, owned = self._split(x, parameters)
        tensors, loss = [tensor for tensor, _ in shared + owned], torch.sum(objectives)
        if (step - 1) % self.config.refresh_every == 0:
            # What is owned comes along: in layers that hold all heads at once, to leave it out saves nothing.
            of_each = [gradients(objective, shared + owned) for objective in objectives.unbind()]
            of_x, dense = side_by_side([own[: len(shared)] for own in of_each])
            self._refresh(of_x, dense, objectives.detach(), step)
            found = [weighted_sum(of_x, self.coefficient)]
            parts = weighted_sum(dense.unbind(), self.coefficient).split([tensor.numel() for tensor, _ in shared[1:]])
            found += [part.view_as(tensor) for part, (tensor, _) in zip(parts, shared[1:], strict=True)]
            if owned:
                found += plain_sum([own[len(shared) :] for own in of_each])
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
            if name not in self._owned_numbers:
                mask = torch.tensor(parts).repeat_interleave(parameter.numel() // len(parts)).view_as(parameter)
                self._owned_numbers[name] = mask.to(parameter.device)
            mask = self._owned_numbers[name]
            owned.append((parameter, mask))
            shared.append((parameter, ~mask))
        return shared, owned

    def coefficients(self, gram: Tensor, losses: Tensor, step: int) -> Tensor:
        """The c [K] of a step, float64, on the device of its arguments; 1 for objectives that have no rows in this batch.

        Here by `rule`, on the host, which waits once until the device has computed the Gram matrix. A strategy that needs
        no solver does without: it overrides this with few operations on tensors that read no number.

        Args:
            gram: Q [K, K], float64, with Q_ij = g_i . g_j, equal on all ranks; a row of zeros where there are no rows.
            losses: [K], of the global batch, float64.
            step: number of this training step, from 1.
        """
        numbers = to_host(torch.cat([gram.flatten(), losses])).numpy()
        matrix, values = numbers[: gram.numel()].reshape(gram.shape), numbers[gram.numel() :]
        present = np.diag(matrix) > 0
        c = np.ones(len(matrix))
        if present.any():
            c[present] = self.rule(matrix[np.ix_(present, present)], values[present], step)
        return to_device(torch.from_numpy(c), gram.device)

    def rule(self, gram: Array, losses: Array, step: int) -> Array:
        """The c of objectives whose gradient is not zero, on the host.

        Args:
            gram: Q, float64, with Q_ij = g_i . g_j of their gradients. No rule needs the gradients themselves, so that its
                cost does not depend on their length.
            losses: of the global batch, float64.
            step: number of this training step, from 1.
        """
        raise NotImplementedError

    def _refresh(self, of_x: Sequence[Tensor], dense: Tensor, objectives: Tensor, step: int) -> None:
        gram, losses = self._global_gram(of_x, dense, objectives)
        self.gram.copy_(gram)
        # Else (0 times what is not finite is NaN) the plain sum is not, either: the trainer ends the run and says so.
        finite = (gram * 0.0).sum() + (losses * 0.0).sum() == 0
        c = self.coefficients(torch.where(finite, gram, 0.0), torch.where(finite, losses, 0.0), step)
        c = self.checked(c, losses, " What computes with NumPy belongs into `rule`.")
        self.coefficient.copy_(torch.where(finite, c, 1.0))

    def _global_gram(self, of_x: Sequence[Tensor], dense: Tensor, objectives: Tensor) -> tuple[Tensor, Tensor]:
        """Gram matrix [K, K] of the whole batch's gradients, and the losses [K]: float64, equal on all ranks.

        Args:
            of_x: gradient of each objective by x.
            dense: [K, P], those by shared parameters.
            objectives: [K].
        """
        count, world_size = len(of_x), dist.get_world_size() if dist.is_initialized() else 1
        gram = objectives.new_zeros(count, count, dtype=torch.float64)
        if self.config.scope != "embedding" and dense.numel():
            gram += inner_products(dense if self.config.gram == "local" else mean_over_ranks(dense))
        if self.config.scope != "shared_dense":
            # Each rank has other rows of x, so the inner products add up; a rank's loss is W times its rows' share of the
            # global loss, hence W^2; the mean over ranks below takes one W.
            rows = torch.stack([own[:, : self.spec.num_looked_up].flatten() for own in of_x])
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


def side_by_side(of_each: list[list[Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Gradients of each objective, that by x first: those by x, and the others as rows of one matrix [K, P]."""
    of_x = [own[0] for own in of_each]
    flat = [gradient.flatten() for own in of_each for gradient in own[1:]]
    return of_x, torch.cat(flat).view(len(of_each), -1) if flat else of_x[0].new_zeros(len(of_each), 0)


def weighted_sum(of_each: Sequence[Tensor], c: Tensor) -> Tensor:
    """sum_k c_k of_each[k], c [K] being on the same device: its numbers are not read."""
    first, *others = c.to(of_each[0].dtype).unbind()
    total = of_each[0] * first
    for factor, own in zip(others, of_each[1:], strict=True):
        total.addcmul_(own, factor)
    return total


def plain_sum(of_each: list[list[Tensor]]) -> list[Tensor]:
    """sum_k of_each[k], tensor by tensor."""
    total = list(torch._foreach_add(of_each[0], of_each[1]))
    for own in of_each[2:]:
        torch._foreach_add_(total, own)
    return total


def inner_products(rows: Tensor) -> Tensor:
    """Products rows @ rows^T in float64, [K, P] -> [K, K]."""
    wide = rows.double()
    return wide @ wide.t()
