"""MLP: one logit, so one ranking, for all tasks: full sharing up to a bias. A reference point where there are several tasks.

No paper: a reference point, as benchmarks use it.

    u = MLP(x; dnn_hidden_units)      [B, d_in] -> [B, k]
    r = u v                           v [k, 1], no bias
    z_h = r + beta_h                  beta [H], 0 at the start

`per_head_output` replaces the last two by z_h = Lin_h(u), which is SharedBottom without towers: report it as such.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlrec.errors import ConfigError, UserAdvice
from mmlrec.layers import mlp
from mmlrec.layers.towers import Towers
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner, Width
from mmlrec.output import Output


class MLP(MultiTaskModel):
    """One network for everything."""

    class Config(NetworkConfig):
        """Options of MLP."""

        dnn_hidden_units: list[Width] = Field(default=[256, 128], description="Widths of the shared network.")
        per_head_output: bool = Field(default=False, description="A linear output of its own for each head.")

    owners: ClassVar[dict[str, Owner]] = {"bias": "head", "outputs": "head"}
    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        if not config.per_head_output and len({task.kind for task in spec.tasks}) > 1:
            kinds = {task.name: task.kind for task in spec.tasks}
            raise ConfigError(f"mlp gives all tasks one score, which cannot be both binary and regression: {kinds}.")
        if not config.per_head_output and spec.num_tasks > 1:
            warnings.warn(
                f"mlp has one logit for all tasks: {', '.join(task.name for task in spec.tasks)} rank rows alike, and"
                " what they disagree on is lost. It is a reference point: model.per_head_output=true, model.name=shared_bottom"
                " or model.name=mmoe give each task a score of its own.",
                UserAdvice,
                stacklevel=2,
            )
        generator = self.generator
        self.trunk = mlp.MLP(spec.input_width, config.dnn_hidden_units, config.hidden, generator)
        width = self.trunk.out_features
        if config.per_head_output:
            self.outputs = Towers(spec.num_heads, width, [], config.hidden, generator)
        else:
            self.weight = config.hidden.output_weight(width, 1, generator=generator)
            self.bias = nn.Parameter(torch.zeros(spec.num_heads))

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
        hidden = self.trunk(x, valid)
        if self.config.per_head_output:
            all_logits = self.outputs(hidden)
        else:
            all_logits = (hidden * self.weight.t()).sum(dim=1, keepdim=True) + self.bias
        return self.select(all_logits, scenario, return_all_heads)
