"""The base of all strategies, which is also the plain weighted sum, and the strategies that need loss values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmlrec.config import DwaConfig, FamoConfig, StchConfig


class Balancing(nn.Module):
    """Joins the K objectives of a step into the scalar that is differentiated once. Here: their sum.

    State is kept in buffers and parameters, so that checkpoints hold it; all of it is equal on all ranks.
    """

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """The loss of a training step.

        Args:
            objectives: [K], this rank's share of each, loss weights applied; the mean over ranks is the global loss.
            x: [B, d_in], the network's input.
            parameters: of the network, by name.
            step: number of this training step, from 1.
        """
        return torch.sum(objectives)

    def report(self, names: Sequence[str]) -> dict[str, float]:
        """What to log about the newest step, by key; `names` are those of the objectives."""
        return {}


class LossBalancing(Balancing):
    """Coefficients from the losses, averaged over ranks, and from their history."""

    coefficient: Tensor

    def __init__(self, num_objectives: int) -> None:
        super().__init__()
        self.register_buffer("coefficient", torch.ones(num_objectives, dtype=torch.float64))

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See the base class."""
        losses = mean_over_ranks(objectives.detach().double())
        self.coefficient.copy_(self.coefficients(losses, step))
        return torch.sum(objectives * self.coefficient.to(objectives.dtype))

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """The c [K] of this step, from global losses [K], float64. An objective without rows has loss 0 and any coefficient."""
        raise NotImplementedError

    def report(self, names: Sequence[str]) -> dict[str, float]:
        """See the base class."""
        return by_name("balancing/coefficient", names, self.coefficient)


class UncertaintyWeighting(LossBalancing):
    """UW: sum_t kappa_t exp(-v_t) L_t + v_t / 2 with learned v_t, the logarithms of variances, over objectives with rows.

    Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics", CVPR 2018.
    v is trained by the optimizer of the network, without a penalty, and kept in [-10, 10].

    Args:
        kappa: 1 for classification, 1/2 for regression, of each objective.
    """

    kappa: Tensor

    def __init__(self, kappa: Sequence[float]) -> None:
        super().__init__(len(kappa))
        self.log_variances = nn.Parameter(torch.zeros(len(kappa)))
        self.register_buffer("kappa", torch.tensor(kappa), persistent=False)

    def forward(self, objectives: Tensor, x: Tensor, parameters: Mapping[str, Tensor], step: int) -> Tensor:
        """See the base class."""
        with torch.no_grad():
            self.log_variances.clamp_(-10.0, 10.0)
        coefficients = self.kappa * torch.exp(-self.log_variances)
        self.coefficient.copy_(coefficients.detach())
        present = mean_over_ranks(objectives.detach().double()) > 0
        return torch.sum(coefficients * objectives) + torch.where(present, self.log_variances, 0.0).sum() / 2


class RandomWeighting(LossBalancing):
    """RLW: c = K softmax(n), n standard normal, drawn anew each step.

    Lin, Ye, Zhang, Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning", TMLR 2022.
    """

    def __init__(self, num_objectives: int, seed: int) -> None:
        super().__init__(num_objectives)
        self.seed = seed

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        draws = torch.randn(len(losses), dtype=torch.float64, generator=step_generator(self.seed, step))
        return len(losses) * torch.softmax(draws, 0)


class DynamicWeightAverage(LossBalancing):
    """DWA: c = K softmax(r / tau), r_t the mean loss of the last window over that of the window before; 1 in the first two.

    Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019. Means are over the steps in which an
    objective has rows; r_t = 1 where it had none in a window.
    """

    total: Tensor
    count: Tensor
    last: Tensor
    before: Tensor

    def __init__(self, num_objectives: int, config: DwaConfig, window_steps: int) -> None:
        super().__init__(num_objectives)
        self.tau, self.window_steps = config.tau, window_steps
        for name in ("total", "count", "last", "before"):
            self.register_buffer(name, torch.zeros(num_objectives, dtype=torch.float64))

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        windows, position = divmod(step - 1, self.window_steps)
        if windows and position == 0:
            self.before.copy_(self.last)
            self.last.copy_(self.total / self.count.clamp(min=1))
            self.total.zero_()
            self.count.zero_()
        self.total += losses
        self.count += losses > 0
        if windows < 2:
            return torch.ones_like(losses)
        ratios = torch.where((self.last > 0) & (self.before > 0), self.last / self.before, 1.0)
        return len(losses) * torch.softmax(ratios / self.tau, 0)


class GeometricLoss(LossBalancing):
    """GLS: the geometric mean of the losses, exp(mean_t log L_t), so c_t = GLS / (K L_t).

    Chennupati, Sistu, Yogamani, Rawashdeh, "MultiNet++", CVPR workshops 2019. Objectives without rows are left out.
    """

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        present = losses > 0
        count = present.sum().clamp(min=1)
        logs = torch.where(present, losses, 1.0).log()
        return torch.where(present, torch.exp(logs.sum() / count - logs) / count, 0.0)


class SmoothTchebycheff(LossBalancing):
    """STCH: K mu logsumexp_t(log(L_t / ref_t) / mu), a smooth maximum; so c_t = K softmax_t(log(L_t / ref_t) / mu) / L_t.

    Lin, Zhang, Yang, Liu, Wang, Zhang, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024. In the
    warm-up the loss is sum_t log L_t, and its mean losses become the references. Objectives without rows are left out, of
    the means, too.
    """

    total: Tensor
    count: Tensor

    def __init__(self, num_objectives: int, config: StchConfig, window_steps: int) -> None:
        super().__init__(num_objectives)
        self.mu, self.warmup_steps = config.mu, config.warmup_windows * window_steps
        for name in ("total", "count"):
            self.register_buffer(name, torch.zeros(num_objectives, dtype=torch.float64))

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        present = losses > 0
        some = torch.where(present, losses, 1.0)
        if step <= self.warmup_steps:
            self.total += losses
            self.count += present
            return torch.where(present, 1.0 / some, 0.0)
        reference = torch.where(self.count > 0, self.total / self.count, 1.0)
        scores = torch.where(present, (some / reference).log() / self.mu, -torch.inf)
        return torch.where(present, len(losses) * torch.softmax(scores, 0) / some, 0.0)


class Famo(LossBalancing):
    """FAMO: with z = softmax(w), the loss sum_t z_t / C log L_t, C = sum_t z_t / L_t; w falls where losses fell fastest.

    Liu, Feng, Stone, Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023. The paper reads the losses of the same
    batch after the update; that is a second lookup and forward pass, so here the next batch's losses are read instead: on
    average they show the same progress, with the noise of batches. c_t = K z_t / (C L_t): K times, for the scale of a sum.
    """

    logits: Tensor
    moment: Tensor
    square: Tensor
    previous: Tensor

    def __init__(self, num_objectives: int, config: FamoConfig) -> None:
        super().__init__(num_objectives)
        self.lr, self.decay = config.lr, config.decay
        for name in ("logits", "moment", "square", "previous"):
            self.register_buffer(name, torch.zeros(num_objectives, dtype=torch.float64))

    def coefficients(self, losses: Tensor, step: int) -> Tensor:
        """See the base class."""
        present = losses > 0
        if step > 1:
            self._follow(torch.where(present & (self.previous > 0), (self.previous / losses).log(), 0.0), step - 1)
        self.previous.copy_(losses)
        shares = torch.where(present, torch.softmax(self.logits, 0) / torch.where(present, losses, 1.0), 0.0)
        return len(losses) * shares / shares.sum().clamp(min=1e-300)

    def _follow(self, progress: Tensor, count: int) -> None:
        """One Adam step on the logits along J^T progress, J the Jacobian of the softmax, plus weight decay."""
        z = torch.softmax(self.logits, 0)
        slope = z * (progress - (z * progress).sum()) + self.decay * self.logits
        self.moment.lerp_(slope, 0.1)
        self.square.lerp_(slope.square(), 0.001)
        mean, square = self.moment / (1 - 0.9**count), self.square / (1 - 0.999**count)
        self.logits -= self.lr * mean / (square.sqrt() + 1e-8)


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


def by_name(key: str, names: Sequence[str], values: Tensor) -> dict[str, float]:
    """`key/name` -> value, for logging."""
    return {f"{key}/{name}": value for name, value in zip(names, values.tolist(), strict=True)}
