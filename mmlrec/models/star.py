"""STAR: each scenario's network is a shared network times one of its own, element by element.

Sheng, Zhao, Zhou, Ding, Dai, Luo, Yang, Lv, Zhang, Deng, Zhu, "One Model to Serve All: Star Topology Adaptive Recommender
for Multi-Domain CTR Prediction", CIKM 2021.

    x'    = (g * g_s) * (x - mu_s) / sqrt(var_s + eps) + b + b_s      partitioned normalisation, moments of scenario s
    h_0   = x'
    h_l   = act(h_{l-1} (W_l * W_{l,u}) + (b_l + b_{l,u}))            l = 1..n; W_l [i, o] shared, W_{l,u} [U, i, o]
    z_fcn = h_n (W * W_u) + (b + b_u)
    z_aux = Lin(MLP([scenario, x]; aux_hidden_units))                   [B]
    z     = z_fcn + z_aux

Member u is a head (`star_axis: head`; in MTL a task) or a scenario (`scenario`; then the last layer has a column for each
task). W_u = 1 and b_u = 0 at the start, so that STAR begins as one shared MLP. `scenario` is the embedding of the named
`scenario_fields`, or a vector for each scenario that the network owns. In MTL a row has no scenario: then there is neither
normalisation nor auxiliary network. With all heads asked for, normalisation and auxiliary network still see the row's own
scenario.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmlrec.errors import ConfigError
from mmlrec.layers.experts import stacked_linear
from mmlrec.layers.normalisation import BatchNorm, PartitionedNorm
from mmlrec.layers.options import ACTIVATIONS, HiddenOptions
from mmlrec.layers.scenario import Dispatch, ScenarioEmbedding
from mmlrec.layers.towers import Towers
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner, Width
from mmlrec.output import Output
from mmlrec.schema import Setting

Axis = Literal["head", "scenario", "task"]


class _Star(nn.Module):
    """U networks of the same widths; weights of member u are shared ones times, biases plus, those of member u."""

    def __init__(
        self,
        stack: int,
        in_features: int,
        hidden: Sequence[int],
        num_outputs: int,
        options: HiddenOptions,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.stack, self.activation, self.dropout = stack, ACTIVATIONS[options.activation], options.dropout
        self.weights, self.biases, self.norms = nn.ParameterList(), nn.ParameterList(), nn.ModuleList()
        self.own_weights, self.own_biases = nn.ParameterList(), nn.ParameterList()
        for width in hidden:
            self.weights.append(options.hidden_weight(in_features, width, generator=generator))
            self.biases.append(options.hidden_bias(width, fan_in=in_features, generator=generator))
            if options.use_bn:
                self.norms.append(BatchNorm(stack * width))
            in_features = width
        self.weights.append(options.output_weight(in_features, num_outputs, generator=generator))
        self.biases.append(nn.Parameter(torch.zeros(num_outputs)))
        for weight in self.weights:
            self.own_weights.append(nn.Parameter(torch.ones(stack, *weight.shape)))
            self.own_biases.append(nn.Parameter(torch.zeros(stack, weight.shape[1])))

    def forward(self, x: Tensor, rows: Tensor | None, dispatch: Dispatch | None) -> Tensor:
        """Logits, float32 or wider also under autocast.

        Args:
            x: [B, d], rows arranged by `dispatch`.
            rows: bool [B] or [U, B], the rows that count in normalisation statistics.
            dispatch: compute the members of each row's own scenario only; None: all.

        Returns:
            [B, c * N], output c of member n at c * N + n; N = U / S members for each row with `dispatch`, else U.
        """
        if dispatch is not None:
            x = x.expand(self.stack // dispatch.num_scenarios, *x.shape)
        last = len(self.weights) - 1
        for layer in range(last):
            x = self._linear(x, layer, dispatch)
            if self.norms:
                x = self.norms[layer](x, rows)
            x = F.dropout(self.activation(x), self.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):
            x = self._linear(x.to(self.weights[last].dtype), last, dispatch)
        return x.permute(1, 2, 0).flatten(1)

    def _linear(self, x: Tensor, layer: int, dispatch: Dispatch | None) -> Tensor:
        shared, own, bias = self.weights[layer], self.own_weights[layer], self.biases[layer] + self.own_biases[layer]
        return stacked_linear(x, shared * own, bias) if dispatch is None else dispatch.linear(x, own, bias, shared)


class STAR(MultiTaskModel):
    """Star topology over heads or scenarios, partitioned normalisation, auxiliary network."""

    class Config(NetworkConfig):
        """Options of STAR."""

        dnn_hidden_units: list[Width] = Field(default=[256, 128], description="Widths of the network; may be empty.")
        star_axis: Axis = Field(
            default="head", description="What has a network of its own: 'head' ('task' in mtl is the same) or 'scenario'."
        )
        use_pn: bool | None = Field(default=None, description="Partitioned normalisation of x; absent: if there are scenarios.")
        pn_momentum: float = Field(default=0.01, gt=0, le=1, description="Least weight of a batch in the running statistics.")
        pn_eps: float = Field(default=1.0, gt=0, description="Added to the variance.")
        pn_min_count: int = Field(default=2, ge=2, description="With fewer rows a scenario uses its running statistics.")
        use_aux: bool | None = Field(default=None, description="Auxiliary network; absent: if there are scenarios.")
        aux_hidden_units: list[Width] = Field(default=[64], description="Widths of the auxiliary network; may be empty.")
        scenario_fields: list[str] = Field(
            default=[], description="Fields that tell the scenario to the auxiliary network; [] = a vector of its own for each."
        )

    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        self._check(spec, config)
        self.check_fields("scenario_fields", config.scenario_fields)
        generator, hidden = self.generator, config.hidden
        scenarios, by_scenario = spec.num_scenarios, config.star_axis == "scenario"
        stack, outputs = (scenarios, spec.num_tasks) if by_scenario else (spec.num_heads, 1)
        self.star = _Star(stack, spec.input_width, config.dnn_hidden_units, outputs, hidden, generator)
        has_scenarios = spec.setting is not Setting.MTL
        self.norm: PartitionedNorm | None = None
        if has_scenarios if config.use_pn is None else config.use_pn:
            self.norm = PartitionedNorm(
                scenarios, spec.input_width, config.pn_eps, momentum=config.pn_momentum, min_count=config.pn_min_count
            )
        self.aux: Towers | None = None
        self.scenario_embedding: ScenarioEmbedding | None = None
        if has_scenarios if config.use_aux is None else config.use_aux:
            width = sum(spec.fields[name] for name in config.scenario_fields)
            if not config.scenario_fields:
                width = next(iter(spec.fields.values()))
                self.scenario_embedding = ScenarioEmbedding(scenarios, width, generator)
            self.aux = Towers(1, width + spec.input_width, config.aux_hidden_units, hidden, generator)

    @staticmethod
    def _check(spec: ModelSpec, config: Config) -> None:
        allowed = ("head", "task") if spec.setting is Setting.MTL else ("head", "scenario")
        if config.star_axis not in allowed:
            raise ConfigError(
                f"model.star_axis: star in setting '{spec.setting}' takes {' or '.join(allowed)}, not {config.star_axis}."
            )
        for key in ("use_pn", "use_aux"):
            if spec.setting is Setting.MTL and getattr(config, key):
                raise ConfigError(f"model.{key}: star has none in setting 'mtl', where rows have no scenario: leave it out.")
        kinds = {task.name: task.kind for task in spec.tasks}
        if len(set(kinds.values())) > 1:
            raise ConfigError(f"star gives all tasks one score space, which cannot be both binary and regression: {kinds}.")

    def owner(self, parameter: str) -> Owner | None:
        """The members of the star belong to `star_axis`, statistics and vectors of scenarios to the scenarios."""
        if parameter.startswith(("star.own_", "star.norms.")):
            return self.config.star_axis
        return "scenario" if parameter.startswith(("norm.scenario_", "scenario_embedding.")) else None

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
        normed = x if self.norm is None else self.norm(x, scenario, valid)
        dispatch = self.own_dispatch(scenario, self.config.dnn_hidden_units, return_all_heads)
        if dispatch is not None:
            output = Output(dispatch.restore(self.star(dispatch.arrange(normed), None, dispatch)))
        else:
            rows = self.head_rows(scenario, valid)
            if rows is not None and rows.dim() == 2:
                rows = rows[: self.star.stack]  # By scenario: heads repeat the scenarios for each task.
            output = self.select(self.star(normed, rows, None), scenario, return_all_heads)
        if self.aux is not None:
            named = [fields[name] for name in self.config.scenario_fields]
            own = named if self.scenario_embedding is None else [self.scenario_embedding(scenario)]
            extra = self.aux(torch.cat([*own, x], dim=1), valid)  # [B, 1]
            output.logits = output.logits + extra
            if output.all_logits is not None:
                output.all_logits = output.all_logits + extra
        return output
