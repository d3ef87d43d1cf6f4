"""PEPNet: a tower for each task; scenarios gate the embedding (EPNet), user and item gate the hidden units (PPNet).

Chang, Zhang, Hui, Leng, Niu, Song, Gai, "PEPNet: Parameter and Embedding Personalized Network for Infusing with
Personalized Prior Information", KDD 2023.

    GateNU(v) = gate_gamma * sigmoid(Lin(relu(Lin(v))))                 in (0, gate_gamma)
    x_ep    = GateNU([scenario embedding, sg(x)]) * x                   [B, d_in]           (EPNet)
    d_l     = GateNU_l([prior embeddings, sg(x_ep)]), l = 1..n          [B, T * o_l]        (PPNet)
    h_{l,t} = act(Lin_{l,t}(h_{l-1,t})) * d_l[slice t], h_{0,t} = x_ep  [B, o_l]
    z_t     = Lin_t(h_{n,t})                                            [B]

sg stops gradients: of what the gates read, only the scenario and prior embeddings learn through them. Scenario
embedding: `scenario_fields`, or without those a vector of the network's own for each scenario. With `head_scope:
per_head` each head (t, s) has a tower and a slice of the gates; with `per_task` scenarios share the towers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmlrec.errors import ConfigError, UserAdvice
from mmlrec.layers.experts import StackedMLP, stacked_linear
from mmlrec.layers.scenario import ScenarioEmbedding
from mmlrec.layers.towers import Towers
from mmlrec.models.base.model import ModelSpec, MultiTaskModel, NetworkConfig, Owner, Width
from mmlrec.output import Output
from mmlrec.schema import Setting


class _GateUnits(nn.Module):
    """Gate units that read the same input, their first layers in one GEMM."""

    decays: ClassVar[dict[str, float]] = {"weight": 0.0, "out_weights": 0.0}

    def __init__(
        self, in_features: int, hidden: Sequence[int], out: Sequence[int], config: PEPNet.Config, generator: torch.Generator
    ) -> None:
        super().__init__()
        options = config.hidden
        self.gamma, self.hidden = config.gate_gamma, list(hidden)
        self.weight = options.hidden_weight(in_features, sum(hidden), generator=generator)
        self.bias = options.hidden_bias(sum(hidden), fan_in=in_features, generator=generator)
        sizes = zip(hidden, out, strict=True)
        self.out_weights = nn.ParameterList(options.output_weight(*size, generator=generator) for size in sizes)
        self.out_biases = nn.ParameterList(torch.zeros(width) for width in out)
        if config.gate_zero_init:
            for weight in self.out_weights:
                nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, i] -> one [B, o] for each unit."""
        hidden = torch.relu_(torch.addmm(self.bias, x, self.weight)).split(self.hidden, dim=1)
        last = zip(hidden, self.out_weights, self.out_biases, strict=True)
        return [self.gamma * torch.sigmoid(torch.addmm(bias, h, weight)) for h, weight, bias in last]


class PEPNet(MultiTaskModel):
    """Embedding and parameters personalised by gates."""

    class Config(NetworkConfig):
        """Options of PEPNet."""

        dnn_hidden_units: list[Width] = Field(default=[256, 128], min_length=1, description="Widths of each tower.")
        use_epnet: bool | None = Field(
            default=None, description="Gate the embedding by scenario. Absent: where there are scenarios or scenario_fields."
        )
        use_ppnet: bool = Field(default=True, description="Gate the towers' hidden units.")
        scenario_fields: list[str] = Field(
            default=[], description="Fields that drive EPNet; empty: vectors of the network's own, one for each scenario."
        )
        prior_fields: list[str] = Field(default=[], description="Fields that drive PPNet: user, item, author.")
        gate_gamma: float = Field(default=2.0, gt=0, description="Upper bound of all gates.")
        epnet_hidden: Width = Field(default=128, description="Hidden width of EPNet's gate.")
        ppnet_gate_hidden: Width | None = Field(
            default=None, description="Hidden width of each of PPNet's gates; as wide as its output when absent."
        )
        head_scope: Literal["per_task", "per_head"] = Field(
            default="per_task", description="One tower for each task, or for each task and scenario."
        )
        gate_zero_init: bool = Field(default=False, description="Start with all gates at gate_gamma / 2: no effect at 2.")

        @model_validator(mode="after")
        def _some_gate(self) -> PEPNet.Config:
            if self.use_epnet is False and not self.use_ppnet:
                raise ValueError("use_epnet and use_ppnet must not both be false: without gates use shared_bottom or mmoe")
            return self

    config: Config

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        super().__init__(spec, config)
        self._check()
        generator, width = self.generator, spec.input_width
        self.towers = spec.num_heads if config.head_scope == "per_head" else spec.num_tasks
        self.scenario_embedding: ScenarioEmbedding | None = None
        self.epnet: _GateUnits | None = None
        if self._with_epnet():
            scenario_width = sum(spec.fields[name] for name in config.scenario_fields)
            if not config.scenario_fields:
                scenario_width = spec.vector_width
                self.scenario_embedding = ScenarioEmbedding(spec.num_scenarios, scenario_width, generator)
            self.epnet = _GateUnits(scenario_width + width, [config.epnet_hidden], [width], config, generator)
        self.ppnet: _GateUnits | None = None
        if config.use_ppnet:
            prior_width = sum(spec.fields[name] for name in config.prior_fields)
            out = [self.towers * units for units in config.dnn_hidden_units]
            hidden = [config.ppnet_gate_hidden or units for units in out]
            self.ppnet = _GateUnits(prior_width + width, hidden, out, config, generator)
        self.networks = StackedMLP(self.towers, width, config.dnn_hidden_units, config.hidden, generator)
        self.outputs = Towers(self.towers, self.networks.out_features, [], config.hidden, generator)

    def owner(self, parameter: str) -> Owner | None:
        """Towers belong to tasks, or to heads; the scenarios' vectors to scenarios. Every gate unit serves all towers."""
        if parameter.startswith(("networks.", "outputs.")):
            return "task" if self.config.head_scope == "per_task" else "head"
        return "scenario" if parameter.startswith("scenario_embedding.") else None

    def output_biases(self) -> Tensor:
        """Those of the towers' last layers."""
        return self.outputs.bias

    def _with_epnet(self) -> bool:
        config = self.config
        possible = self.spec.setting is not Setting.MTL or bool(config.scenario_fields)
        return possible if config.use_epnet is None else config.use_epnet

    def _check(self) -> None:
        config, setting = self.config, self.spec.setting
        self.check_fields("scenario_fields", config.scenario_fields)
        self.check_fields("prior_fields", config.prior_fields)
        if setting is Setting.MTL and not config.scenario_fields and (config.use_epnet or not config.use_ppnet):
            named = "name fields in model.scenario_fields, or " if self.spec.fields else ""
            raise ConfigError(
                f"model.use_epnet: setting 'mtl' has no scenarios to gate the embedding by: {named}leave EPNet out with"
                " model.use_epnet=false and model.use_ppnet=true."
            )
        if config.use_ppnet and not config.prior_fields and self.spec.fields:
            warnings.warn(
                "pepnet: model.prior_fields is empty, so PPNet's gates read the embedding only; name those of user and item",
                UserAdvice,
                stacklevel=3,
            )

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
        config, per_head = self.config, self.config.head_scope == "per_head"
        if self.epnet is not None:
            by_scenario = [fields[name] for name in config.scenario_fields]
            if self.scenario_embedding is not None:
                by_scenario = [self.scenario_embedding(scenario)]
            x = self.epnet(torch.cat([*by_scenario, x.detach()], dim=1))[0] * x
        rows = self.head_rows(scenario, valid) if per_head else valid
        if self.ppnet is None:
            hidden = self.networks(x, rows)
        else:
            prior = [fields[name] for name in config.prior_fields]
            hidden = self._gated(x, self.ppnet(torch.cat([*prior, x.detach()], dim=1)), rows)
        logits = self.outputs(hidden)
        if per_head:
            return self.select(logits, scenario, return_all_heads)
        return Output(logits, logits.repeat_interleave(self.spec.num_scenarios, dim=1) if return_all_heads else None)

    def _gated(self, x: Tensor, gates: list[Tensor], rows: Tensor | None) -> Tensor:
        """Hidden layers of all U towers, each times its slice of a gate [B, U * o]: [B, i] -> [U, B, o]."""
        net = self.networks
        for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
            x = stacked_linear(x, weight, bias)
            x = net.activation(net.norms[layer](x, rows) if net.norms else x)
            x = x * gates[layer].unflatten(1, (self.towers, -1)).transpose(0, 1)
            x = F.dropout(x, net.dropout, self.training)
        return x
