"""HMoE: a mixture of experts, then a mixture of scores; a scenario's score takes in those of all other scenarios.

Li, Li, Da, Zeng, Zhang, "Improving Multi-Scenario Learning to Rank in E-commerce by Exploiting Task Relationships in the
Label Space", CIKM 2020.

    f_e = MLP_e(x; expert_hidden_units)                         [B, k], e = 1..E
    G   = softmax(Gate(x; gate_hidden_units))                   [B, E]
    m   = sum_e G_e f_e                                         [B, k]
    S_j = Tower_j(m)                                            [B], a score for each head
    W   = softmax(GateW(x; score_weight_hidden_units))          [B, R], over the R heads that are mixed
    z_h = W_h S_h + sum_{j != h} W_j sg(S_j)                    sg stops the gradient

so that a tower learns from the rows of its own scenario only, while experts, gate and W learn from all. The heads that are
mixed are the scenarios of one task (`mix_axis: scenario`), the tasks (`task`, in MTL) or all heads (`head`).
`mix_space: prob` mixes probabilities, z_h = logit(sum_j W_j sigmoid(S_j)), computed from logarithms.

Each head has weights W of its own (`weight_mode: per_scenario`); the paper leaves open whether W is per scenario. With one W
for all heads (`shared`) and one gate the logit depends on x only: where two scenarios want opposite logits for equal or
nearby x, each pulls its own tower further and further against the other's, whose gradient is stopped, and losses grow without
bound. A W for each head makes that rare; mixed probabilities are bounded. Where scores of several tasks are mixed one W is
refused, for all tasks would get the same prediction. `gate_mode: per_scenario` gives each head a gate, too; m is then m_h, as
in MMoE.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmlrec.errors import ConfigError, UserAdvice
from mmlrec.layers.experts import StackedMLP
from mmlrec.layers.gates import Gates, NewestGates, mix
from mmlrec.layers.towers import Towers
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner, Width
from mmlrec.output import Output
from mmlrec.schema import Setting

Mode = Literal["shared", "per_scenario"]
Axis = Literal["scenario", "task", "head"]
Space = Literal["logit", "prob"]


class HMoE(MultiTaskModel):
    """Mixture of experts with a mixture of scores."""

    class Config(NetworkConfig):
        """Options of HMoE."""

        num_experts: int = Field(default=4, ge=1, description="Number of experts E.")
        expert_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Widths of each expert.")
        gate_hidden_units: list[Width] = Field(default=[64], description="Widths of the gate; [] = linear gate.")
        tower_hidden_units: list[Width] = Field(default=[64], description="Widths of each tower; may be empty.")
        score_weight_hidden_units: list[Width] = Field(default=[64], description="Widths of the network of W; may be empty.")
        gate_mode: Mode = Field(default="shared", description="One gate for all heads, or one for each ('per_scenario').")
        weight_mode: Mode = Field(default="per_scenario", description="One W for each head, or one for all ('shared').")
        mix_space: Space = Field(default="logit", description="What is mixed: logits, or probabilities ('prob').")
        mix_axis: Axis | None = Field(
            default=None,
            description="What mixes its scores: a task's scenarios, all tasks (mtl) or all heads; absent: one of the former.",
        )

    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        #: True: all heads are mixed; False: the scenarios of each task.
        self.mixes_heads = spec.setting is Setting.MTL or config.mix_axis == "head"
        mixes_tasks = self.mixes_heads and spec.num_tasks > 1
        self._check(spec, config, mixes_tasks)
        self.own_weights = config.weight_mode == "per_scenario"
        heads, generator, hidden = spec.num_heads, self.generator, config.hidden
        self.experts = StackedMLP(config.num_experts, spec.input_width, config.expert_hidden_units, hidden, generator)
        self.own_gates = config.gate_mode == "per_scenario"
        self.gates = Gates(
            heads if self.own_gates else 1, spec.input_width, config.gate_hidden_units, config.num_experts, hidden, generator
        )
        self.towers = Towers(heads, self.experts.out_features, config.tower_hidden_units, hidden, generator)
        self.newest = NewestGates()
        units, mixed = config.score_weight_hidden_units, heads if self.mixes_heads else spec.num_scenarios
        self.score_weights = Gates(heads if self.own_weights else 1, spec.input_width, units, mixed, hidden, generator)

    @staticmethod
    def _check(spec: ModelSpec, config: Config, mixes_tasks: bool) -> None:
        allowed = ("task", "head") if spec.setting is Setting.MTL else ("scenario", "head")
        if config.mix_axis is not None and config.mix_axis not in allowed:
            raise ConfigError(
                f"model.mix_axis: hmoe in setting '{spec.setting}' takes {' or '.join(allowed)}, not {config.mix_axis}."
            )
        kinds = {task.name: task.kind for task in spec.tasks}
        if mixes_tasks and len(set(kinds.values())) > 1:
            raise ConfigError(f"hmoe mixes the scores of all tasks, which cannot be both binary and regression: {kinds}.")
        if config.mix_space == "prob" and "regression" in kinds.values():
            raise ConfigError(f"model.mix_space: prob needs binary tasks, got {kinds}; use logit.")
        if mixes_tasks and config.weight_mode == "shared":
            raise ConfigError(
                f"model.weight_mode: shared would give the tasks {', '.join(kinds)} one and the same prediction, because hmoe"
                " mixes their scores here; use per_scenario."
            )
        if mixes_tasks:
            warnings.warn(
                f"hmoe mixes scores of different tasks ({', '.join(kinds)}); it is made for scenarios of one task",
                UserAdvice,
                stacklevel=3,
            )

    def owner(self, parameter: str) -> Owner | None:
        """Towers belong to heads; so do gates and weights `per_scenario`, which reach no other head's loss."""
        of_head = {"towers": True, "gates": self.own_gates, "score_weights": self.own_weights}
        return "head" if of_head.get(parameter.split(".")[0]) else None

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
        """Logits; see the base class."""
        spec = self.spec
        rows = self.head_rows(scenario, valid)
        gates = self.gates(x, rows if self.own_gates else valid)
        if self.training:
            self.newest.keep(gates, scenario, valid)
        mixed_experts = mix(gates, self.experts(x, valid))
        scores = self.towers(mixed_experts, rows)  # [B, H]
        heads = torch.arange(spec.num_heads, device=x.device).view(spec.num_tasks, spec.num_scenarios)
        wanted = heads.view(1, -1).expand(x.shape[0], -1) if return_all_heads else heads[:, scenario].t()  # [B, N], N = H or T
        weights = self._weights(x, scenario, wanted, rows, valid, return_all_heads)
        if self.mixes_heads:
            candidates, own = scores.unsqueeze(1), wanted  # [B, 1, H]
        else:
            candidates, own = scores.unflatten(1, heads.shape), wanted % spec.num_scenarios  # [B, T, S]
            if return_all_heads:
                candidates = candidates.repeat_interleave(spec.num_scenarios, dim=1)
        is_own = F.one_hot(own, candidates.shape[2]).bool()
        mixed = torch.where(is_own, candidates, candidates.detach())  # [B, N, R]
        logits = mix_scores(weights, mixed, self.config.mix_space)
        return self.select(logits, scenario, True) if return_all_heads else Output(logits)

    def diagnostics(self) -> dict[str, float]:
        """Mean entropy of the gate, or of each head's, on its rows of the newest training batch, over log E."""
        if not self.own_gates:
            return self.newest.entropies(["gate_entropy"], 1)
        return self.newest.entropies([f"gate_entropy/{task.name}" for task in self.spec.tasks], self.spec.num_scenarios)

    def _weights(
        self, x: Tensor, scenario: Tensor, wanted: Tensor, rows: Tensor | None, valid: Tensor | None, return_all_heads: bool
    ) -> Tensor:
        """Weights of the mixed scores, [B, N, R] for the wanted heads [B, N]; or [B, 1, R], shared by all."""
        if not self.own_weights:
            return self.score_weights(x, valid)
        widths = [*self.config.score_weight_hidden_units, self.score_weights.weight.shape[2]]
        dispatch = self.own_dispatch(scenario, widths, return_all_heads)
        if dispatch is not None:
            own = self.score_weights.own(dispatch.arrange(x), dispatch)
            return dispatch.restore(own.transpose(0, 1)).transpose(0, 1)
        every = self.score_weights(x, rows)
        return every.gather(1, wanted.unsqueeze(2).expand(-1, -1, every.shape[2]))


def mix_scores(weights: Tensor, scores: Tensor, space: Space) -> Tensor:
    """Weighted sums over the last axis, of logits or of their probabilities; the result is a logit.

    The logit of p = sum_j w_j sigmoid(s_j) is log p - log(1 - p), and 1 - p = sum_j w_j sigmoid(-s_j) because the weights
    sum to 1: both logarithms are taken by logsumexp, finite and exact for large scores.
    """
    if space == "logit":
        return (weights * scores).sum(dim=-1)
    # A weight that has underflowed to 0 would have an infinite slope.
    log_weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
    log_p = torch.logsumexp(log_weights + F.logsigmoid(scores), dim=-1)
    return log_p - torch.logsumexp(log_weights + F.logsigmoid(-scores), dim=-1)
