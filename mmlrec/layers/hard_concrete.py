"""Random gates that are exactly open or closed with positive probability, and connections that carry them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmlrec.layers.experts import stacked_linear
from mmlrec.layers.scenario import Dispatch


@dataclass(frozen=True)
class HardConcreteOptions:
    """Constants of the distribution.

    Attributes:
        log_alpha_init: where log alpha starts, up to N(0, 0.01^2).
        beta: temperature, above 0.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end, above 1.
    """

    log_alpha_init: float = 2.0
    beta: float = 0.9
    gamma: float = -0.1
    zeta: float = 1.1


class HardConcrete(nn.Module):
    """Hard-concrete gates (Louizos, Welling, Kingma, ICLR 2018), one for each element of `log_alpha`.

        training:    s = sigmoid((log u - log(1 - u) + log_alpha) / beta),  z = clamp(s (zeta - gamma) + gamma, 0, 1)
        evaluation:  E[z] = integral over t from 0 to 1 of P(z > t)
        P(z > t) = sigmoid(log_alpha - beta logit((t - gamma) / (zeta - gamma))),  0 <= t < 1;  P(z != 0) = P(z > 0)

    with u uniform in (0, 1), a new one each step. A gate that is clamped has gradient zero in that step.

    The paper evaluates with clamp(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1), which is above the mean of the gates
    that the weights were trained with (.957 against .840 at log_alpha 2): every level of connections would make the logits
    larger than in training. With the mean no gate is exactly 0: how sparse the gates are is told by P(z != 0), which is
    never below E[z].
    """

    nodes: Tensor
    node_weights: Tensor

    def __init__(self, shape: Sequence[int], options: HardConcreteOptions, generator: torch.Generator) -> None:
        super().__init__()
        self.options = options
        self.log_alpha = nn.Parameter(torch.empty(*shape).normal_(options.log_alpha_init, 0.01, generator=generator))
        nodes, weights = _quadrature(options)
        self.register_buffer("nodes", nodes, persistent=False)
        self.register_buffer("node_weights", weights, persistent=False)

    @property
    def num_noise(self) -> int:
        """Uniform numbers that one training step takes."""
        return self.log_alpha.numel()

    def forward(self, noise: Tensor | None = None) -> Tensor:
        """The gates, in the shape of `log_alpha`.

        Args:
            noise: [num_noise] uniform in (0, 1); drawn here when absent. Not read in evaluation.
        """
        if not self.training:
            return self.mean()
        o, log_alpha = self.options, self.log_alpha
        u = torch.rand_like(log_alpha) if noise is None else noise.view_as(log_alpha)
        # Random numbers can be 0: the logit keeps a distance from both ends.
        s = torch.sigmoid((torch.logit(u, eps=1e-6) + log_alpha) / o.beta)
        return (s * (o.zeta - o.gamma) + o.gamma).clamp(0.0, 1.0)

    def mean(self) -> Tensor:
        """E[z] of each gate, to some 1e-7."""
        above = torch.sigmoid(self.log_alpha.unsqueeze(-1) - self.nodes.to(self.log_alpha.dtype))
        return (above * self.node_weights.to(self.log_alpha.dtype)).sum(dim=-1).clamp(max=1.0)

    def open_probability(self) -> Tensor:
        """P(z != 0) of each gate; its sum is the expected number of open gates, the L0 penalty."""
        o = self.options
        return torch.sigmoid(self.log_alpha - o.beta * math.log(-o.gamma / o.zeta))


def _quadrature(options: HardConcreteOptions) -> tuple[Tensor, Tensor]:
    """Nodes c and weights w, float64 [K], with E[z] = sum_k w_k sigmoid(log_alpha - c_k).

    Gauss and Legendre in y = logit((t - gamma) / (zeta - gamma)), where P(z > t) is smooth however near gamma and zeta are to
    0 and 1: in t it has roots there.
    """
    o = options
    low, high = (math.log((t - o.gamma) / (o.zeta - t)) for t in (0.0, 1.0))
    points, weights = np.polynomial.legendre.leggauss(64)
    y = torch.from_numpy((high - low) / 2 * points + (high + low) / 2)
    s = torch.sigmoid(y)
    return o.beta * y, torch.from_numpy(weights * (high - low) / 2) * (o.zeta - o.gamma) * s * (1 - s)


def split_noise(noise: Tensor | None, gates: Sequence[HardConcrete]) -> list[Tensor | None]:
    """The part of each module in the noise of a network, [sum of num_noise]; None for each when there is none."""
    if noise is None:
        return [None] * len(gates)
    return list(noise.split([gate.num_noise for gate in gates]))


class GatedConnections(nn.Module):
    """Linear connections from E sub-networks to n outputs, each with gates of its own.

        v_i = sum_j z_ij * (u_j M_ij),   i = 1..n, j = 1..E

    The gates are folded into the maps, which makes all connections one matrix product: the cost of the gates does not
    depend on the number of rows.

    Args:
        cells: one gate for each of the `width` elements of v_i in each connection, instead of one for the connection.
    """

    def __init__(
        self,
        outputs: int,
        inputs: int,
        width: int,
        options: HardConcreteOptions,
        generator: torch.Generator,
        *,
        cells: bool = False,
    ) -> None:
        super().__init__()
        self.gates = HardConcrete((outputs, inputs, width) if cells else (outputs, inputs), options, generator)
        # Xavier for each map; the sum over E of them has the variance of one.
        std = 1.0 / math.sqrt(width * inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, width, width).normal_(0.0, std, generator=generator))

    def forward(self, u: Tensor, noise: Tensor | None = None) -> Tensor:
        """All outputs: [E, B, h] -> [n, B, h]."""
        return stacked_linear(_side_by_side(u), self._folded(noise), None)

    def own(self, u: Tensor, dispatch: Dispatch, noise: Tensor | None = None) -> Tensor:
        """Outputs of each row's own scenario, where n counts heads: rows arranged, [E, B, h] -> [n / S, B, h]."""
        weight = self._folded(noise)
        joint = _side_by_side(u)
        return dispatch.linear(joint.expand(len(weight) // dispatch.num_scenarios, *joint.shape), weight, None)

    def _folded(self, noise: Tensor | None) -> Tensor:
        z = self.gates(noise)
        z = z.unsqueeze(2) if z.dim() == 3 else z[:, :, None, None]
        return (z * self.weight).flatten(1, 2)


def _side_by_side(u: Tensor) -> Tensor:
    """[E, B, h] -> [B, E * h]."""
    return u.transpose(0, 1).flatten(1)
