"""APG: one low-rank network whose inner weights are generated for each row (or scenario) from a condition vector.

Yan, Wang, Zhang, Li, Deng, Xu, Zheng, "APG: Adaptive Parameter Generation Network for Click-Through Rate
Prediction", NeurIPS 2022.

Layer l of width i -> o, with k = ceil(min(i, o) / mf_k), input h_{l-1} (h_0 = x) and condition c [B, d_c]:

    r = h_{l-1} V + b_v                           V [i, k]                              [B, k]
    t = r C + c W_b + b_b                         C = reshape(c W_c + b_c) [B, k, k]    [B, k]
    h_l = act(BatchNorm(t U + b_u))               U [k, o]                              [B, o]
    z_h = Lin_h(h_n)                              h = t * S + s                         [B]

`inner_activation` acts on r and t. The condition is: `group`, a vector for each scenario that the network owns;
`mix`, the embeddings of `condition_fields`; `self`, h_{l-1}. With `group` there are only S cores, which are computed
once, and rows are multiplied by the core of their scenario. C starts near the identity: a plain low-rank network.
With `apg_overparam` V and U are products V_1 V_2 and U_1 U_2 of inner width `apg_p`; `folded` multiplies them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmlrec.errors import ConfigError
from mmlrec.layers.normalisation import BatchNorm
from mmlrec.layers.options import ACTIVATIONS, Activation
from mmlrec.layers.scenario import Dispatch, ScenarioEmbedding, prefers_grouped
from mmlrec.layers.towers import Towers
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner, Width
from mmlrec.output import Output
from mmlrec.schema import Setting

Condition = Literal["group", "mix", "self"]


class _Factor(nn.Module):
    """A matrix [i, o], stored as the product of one or two matrices."""

    decays: ClassVar[dict[str, float]] = {"parts": 0.0}

    def __init__(self, widths: Sequence[int], config: APG.Config, generator: torch.Generator) -> None:
        super().__init__()
        weight = config.hidden.output_weight
        self.parts = nn.ParameterList(weight(*pair, generator=generator) for pair in pairwise(widths))

    def forward(self) -> Tensor:
        """The matrix, multiplied out."""
        return self.parts[0] if len(self.parts) == 1 else self.parts[0] @ self.parts[1]


class _Layer(nn.Module):
    """One generated layer."""

    decays: ClassVar[dict[str, float]] = {"core_weight": 0.0, "core_bias_weight": 0.0}

    def __init__(
        self,
        in_features: int,
        inner: int,
        out_features: int,
        condition_width: int,
        config: APG.Config,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        between = [config.apg_p or max(in_features, out_features)] if config.apg_overparam else []
        self.inner, self.dropout = inner, config.dropout
        self.activation = ACTIVATIONS[config.activation]
        self.inner_activation = ACTIVATIONS[config.inner_activation] if config.inner_activation else nn.Identity()
        self.v = _Factor([in_features, *between, inner], config, generator)
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.core_weight, self.core_bias_weight = (
            nn.Parameter(torch.empty(condition_width, width).normal_(0.0, 0.01, generator=generator))
            for width in (inner * inner, inner)
        )
        self.core = nn.Parameter(torch.eye(inner).flatten())
        self.core_bias = nn.Parameter(torch.zeros(inner))
        self.u = _Factor([inner, *between, out_features], config, generator)
        self.u_bias = nn.Parameter(torch.zeros(out_features))
        self.norm = BatchNorm(out_features) if config.use_bn else None

    def forward(self, h: Tensor, condition: Tensor, dispatch: Dispatch | None, valid: Tensor | None) -> Tensor:
        """One layer.

        Args:
            h: [B, i], arranged by `dispatch` if there is one.
            condition: [S, d_c], read through `dispatch`; or [B, d_c], each row's own.
            valid: bool [B], the rows that count in normalisation statistics.

        Returns:
            [B, o].
        """
        r = self.inner_activation(torch.addmm(self.v_bias, h, self.v()))
        core = torch.addmm(self.core, condition, self.core_weight).view(-1, self.inner, self.inner)
        bias = torch.addmm(self.core_bias, condition, self.core_bias_weight)
        if dispatch is None:
            t = torch.baddbmm(bias.unsqueeze(1), r.unsqueeze(1), core)[:, 0]
        else:
            t = dispatch.linear(r.unsqueeze(0), core, bias)[0]
        h = torch.addmm(self.u_bias, self.inner_activation(t), self.u())
        if self.norm is not None:
            h = self.norm(h, valid)
        return F.dropout(self.activation(h), self.dropout, self.training)


class APG(MultiTaskModel):
    """Adaptive parameter generation."""

    class Config(NetworkConfig):
        """Options of APG."""

        dnn_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Widths of the layers.")
        condition: Condition | None = Field(
            default=None,
            description="What weights are generated from: 'group' (the scenario), 'mix' (condition_fields) or 'self' (the"
            " layer's input). Absent: 'group' where the setting has scenarios, else 'mix'.",
        )
        condition_fields: list[str] = Field(default=[], description="Fields whose embeddings are the condition of 'mix'.")
        mf_k: int = Field(default=4, ge=1, description="The inner width is the smaller outer one divided by this.")
        apg_overparam: bool = Field(default=False, description="Train V and U as products of two matrices.")
        apg_p: int | None = Field(default=None, ge=1, description="Inner width of those products; max(i, o) when absent.")
        inner_activation: Activation | None = Field(default=None, description="Activation of the two inner vectors.")
        detach_condition: bool = Field(default=False, description="No gradient into the condition; not for 'group'.")

        @model_validator(mode="after")
        def _width_of_a_product(self) -> APG.Config:
            if self.apg_p is not None and not self.apg_overparam:
                raise ValueError("apg_p is the inner width of apg_overparam: set apg_overparam: true, or leave it out")
            return self

    one_task = True
    owners: ClassVar[dict[str, Owner]] = {"heads": "head", "scenario_embedding": "scenario"}
    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        self.condition = self._condition()
        generator = self.generator
        self.scenario_embedding: ScenarioEmbedding | None = None
        condition_width = sum(spec.fields[name] for name in config.condition_fields)
        if self.condition == "group":
            condition_width = spec.vector_width
            self.scenario_embedding = ScenarioEmbedding(spec.num_scenarios, condition_width, generator)
        self.layers = nn.ModuleList()
        self.inner_widths: list[int] = []
        width = spec.input_width
        for out_features in config.dnn_hidden_units:
            condition_width = width if self.condition == "self" else condition_width
            self.inner_widths.append(-(-min(width, out_features) // config.mf_k))
            self.layers.append(_Layer(width, self.inner_widths[-1], out_features, condition_width, config, generator))
            width = out_features
        self.heads = Towers(spec.num_heads, width, [], config.hidden, generator)

    def output_biases(self) -> Tensor:
        """Those of the heads."""
        return self.heads.bias

    def _condition(self) -> Condition:
        config, setting = self.config, self.spec.setting
        self.check_fields("condition_fields", config.condition_fields)
        condition = config.condition or ("group" if setting is not Setting.MTL else "mix")
        if condition == "group" and setting is Setting.MTL:
            raise ConfigError("model.condition: 'group' needs scenarios, and setting 'mtl' has none: use 'mix' or 'self'.")
        if condition == "mix" and not self.spec.fields:
            raise ConfigError(
                f"apg in setting '{setting}': 'mix' generates weights from the embeddings of fields, and all features of this"
                " dataset are numbers. Set model.condition=self."
            )
        if condition == "mix" and not config.condition_fields:
            raise ConfigError(
                f"apg in setting '{setting}': name the fields that weights are generated from in model.condition_fields"
                f" (fields: {', '.join(self.spec.fields)}), or set model.condition=self."
            )
        if condition == "group" and config.detach_condition:
            raise ConfigError(
                "model.detach_condition: the vectors of condition 'group' learn through the generated weights only;"
                " leave it out, or use condition 'mix' or 'self'."
            )
        return condition

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
        scenarios, group = self.spec.num_scenarios, self.scenario_embedding is not None
        grouped = group and prefers_grouped(scenarios, max(self.inner_widths))
        dispatch = Dispatch(scenario, scenarios, grouped=grouped)
        h = dispatch.arrange(x)
        if valid is not None:
            valid = dispatch.arrange(valid.unsqueeze(1))[:, 0]
        condition: Tensor | None = None
        if self.scenario_embedding is not None:
            condition = self.scenario_embedding.weight
        elif self.condition == "mix":
            condition = torch.cat([fields[name] for name in self.config.condition_fields], dim=1)
        for layer in self.layers:
            source = h if condition is None else condition
            h = layer(h, source.detach() if self.config.detach_condition else source, dispatch if group else None, valid)
        if return_all_heads:
            return self.select(dispatch.restore(self.heads(h)), scenario, return_all_heads)
        return Output(dispatch.restore(self.heads.own(h, dispatch)))

    def folded(self) -> APG:
        """The same network with the products of `apg_overparam` multiplied out, for serving: as small as one without."""
        plain = APG(self.spec, self.config.model_copy(update={"apg_overparam": False, "apg_p": None})).to(self.heads.bias)
        factors = {f"{name}.parts.0": part().detach() for name, part in self.named_modules() if isinstance(part, _Factor)}
        others = {key: value for key, value in self.state_dict().items() if ".parts." not in key}
        plain.load_state_dict(others | factors)
        return plain.train(self.training)
