"""The training configuration: a strict schema, YAML files with `base:`, and `key.path=value` overrides.

An unknown key, a wrong type or an impossible combination is a ConfigError that names the file (or the command
line) and the key. Imports neither torch nor torchrec.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, field_validator, model_validator

from mmlrec.errors import ConfigError, did_you_mean
from mmlrec.schema import Setting
from mmlrec.yaml_config import Loader, OptionError, StrictModel, load_with_base, merge, validate_section


class DatasetConfig(StrictModel):
    """Which dataset folder, read in which setting. Features, labels and scenarios come from its manifest."""

    path: str
    setting: Setting = Field(default=Setting.MTL, strict=False)
    tasks: list[str] | None = Field(
        default=None, min_length=1, description="Tasks in order; all of the manifest's when absent."
    )


class TableOptimizerConfig(StrictModel):
    """Optimizer inside the fused table kernel. Adam needs a GPU."""

    name: Literal["adagrad", "rowwise_adagrad", "sgd", "adam"] = "adagrad"
    lr: float = Field(default=0.05, gt=0)
    eps: float = Field(default=1e-8, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)


class EmbeddingsConfig(StrictModel):
    """Tables: width, initialisation, optimizer and sharding."""

    dim: int = Field(default=8, gt=0, multiple_of=4, description="Width of every table; fbgemm wants a multiple of 4.")
    init_std: float = Field(default=0.01, gt=0)
    optimizer: TableOptimizerConfig = TableOptimizerConfig()
    sharding: Literal["auto", "table_wise", "row_wise"] = "auto"
    table_sharding: dict[str, Literal["table_wise", "row_wise"]] = Field(default={}, description="Table name -> sharding.")
    l2: float = Field(default=0.0, ge=0, description="Penalty on the looked-up vectors, mean over samples.")


class DenseOptimizerConfig(StrictModel):
    """Optimizer of the network."""

    name: Literal["adam", "adagrad", "sgd"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    eps: float = Field(default=1e-8, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)


class DenseConfig(StrictModel):
    """How the network's parameters are trained."""

    optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    clip_norm: float | None = Field(default=None, gt=0, description="Largest norm of the dense gradient.")
    l2: float = Field(default=0.0, ge=0, description="Penalty on the squares of all parameters, gates and norms included.")


class ScheduleConfig(StrictModel):
    """Factor on all learning rates: linear warm-up, then constant, linear or cosine decay to zero at `total_steps`."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    total_steps: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _decay_has_an_end(self) -> ScheduleConfig:
        if self.name != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(f"schedule '{self.name}' needs total_steps above warmup_steps")
        return self


class LossConfig(StrictModel):
    """Loss of a sample and reduction over samples."""

    scenario_reduction: Literal["pooled", "balanced"] = Field(
        default="pooled", description="Mean over all rows of a task, or mean of the means of its scenarios."
    )
    huber_delta: float | None = Field(
        default=None, gt=0, description="Regression: errors above this count linearly (Huber); absent: squared error."
    )


Weight = Annotated[float, Field(ge=0)]


class BalancingConfig(StrictModel):
    """How the losses become one: the strategy and what all strategies take. Options of one strategy are in its class below."""

    name: str
    unit: Literal["task", "scenario", "head"] | None = Field(
        default=None, description="What one objective is; when absent a task, in setting msl a scenario."
    )
    loss_weights: dict[str, Weight] = Field(default={}, description="Objective -> weight; 1 when absent.")


class GradientBalancingConfig(BalancingConfig):
    """Options of all strategies that read the gradients of the objectives."""

    scope: Literal["shared_dense", "embedding", "both"] = Field(
        default="shared_dense", description="Gradients that are compared: of shared parameters, of looked-up vectors, or both."
    )
    gram: Literal["global", "local"] = Field(
        default="global", description="Inner products of gradients averaged over ranks, or averaged inner products."
    )
    refresh_every: int = Field(default=1, gt=0, description="Steps between two computations of the coefficients.")


class StaticConfig(BalancingConfig):
    """The weighted sum."""

    name: Literal["static"] = "static"


class UwConfig(BalancingConfig):
    """Uncertainty weighting."""

    name: Literal["uw"] = "uw"


class RlwConfig(BalancingConfig):
    """Random loss weighting."""

    name: Literal["rlw"] = "rlw"


class DwaConfig(BalancingConfig):
    """Dynamic weight average."""

    name: Literal["dwa"] = "dwa"
    tau: float = Field(default=2.0, gt=0, description="Temperature of the softmax.")
    window_steps: int | None = Field(default=None, gt=0, description="Steps over which losses are averaged; absent: an epoch.")


class GlsConfig(BalancingConfig):
    """Geometric mean of the losses."""

    name: Literal["gls"] = "gls"


class StchConfig(BalancingConfig):
    """Smooth Tchebycheff scalarisation."""

    name: Literal["stch"] = "stch"
    mu: float = Field(default=1.0, gt=0, description="Smoothing: the smaller, the more the worst objective counts.")
    warmup_windows: int = Field(default=4, gt=0, description="Windows of log losses, whose mean losses become the references.")
    window_steps: int | None = Field(default=None, gt=0, description="Steps of a window; absent: an epoch.")


class FamoConfig(BalancingConfig):
    """Fast adaptive multitask optimisation, on the next batch's losses."""

    name: Literal["famo"] = "famo"
    lr: float = Field(default=0.025, gt=0, description="Learning rate of the logits.")
    decay: float = Field(default=1e-3, ge=0, description="Weight decay of the logits.")


class GradNormConfig(GradientBalancingConfig):
    """Weights under which all objectives train at a similar rate."""

    name: Literal["gradnorm"] = "gradnorm"
    alpha: float = Field(default=1.5, ge=0, description="How strongly slow objectives are favoured.")
    lr: float = Field(default=0.025, gt=0, description="Learning rate of the weights.")


class PcGradConfig(GradientBalancingConfig):
    """Projection of conflicting gradients."""

    name: Literal["pcgrad"] = "pcgrad"


class MgdaConfig(GradientBalancingConfig):
    """Shortest vector in the convex hull of the gradients."""

    name: Literal["mgda"] = "mgda"
    normalisation: Literal["none", "l2", "loss", "loss+"] = Field(
        default="none", description="Divide each gradient by 1, its norm, its loss, or both, before."
    )


class CaGradConfig(GradientBalancingConfig):
    """Conflict-averse direction around the mean gradient."""

    name: Literal["cagrad"] = "cagrad"
    c_a: float = Field(default=0.5, ge=0, lt=1, description="Radius around the mean gradient, as a share of its norm.")


class ImtlGConfig(GradientBalancingConfig):
    """Equal projections on all gradients."""

    name: Literal["imtl_g"] = "imtl_g"


class NashConfig(GradientBalancingConfig):
    """Nash bargaining."""

    name: Literal["nash"] = "nash"
    ridge: float = Field(default=0.01, gt=0, description="Added to the normalised Gram matrix: bounds c by sqrt(K / ridge).")


class AlignedConfig(GradientBalancingConfig):
    """Aligned principal components."""

    name: Literal["aligned"] = "aligned"


class MetaBalanceConfig(GradientBalancingConfig):
    """Auxiliary gradients near the norm of the main one's."""

    name: Literal["metabalance"] = "metabalance"
    main: str | None = Field(default=None, description="The main objective; absent: the first.")
    r: float = Field(default=0.7, ge=0, le=1, description="1: norms become equal to the main one's; 0: unchanged.")
    beta: float = Field(default=0.9, ge=0, lt=1, description="Decay of the moving averages of norms.")


class MonitorConfig(GradientBalancingConfig):
    """The weighted sum, with the gradients compared and logged."""

    name: Literal["monitor"] = "monitor"


STRATEGIES: dict[str, type[BalancingConfig]] = {
    strategy.model_fields["name"].default: strategy
    for strategy in (
        *(StaticConfig, UwConfig, RlwConfig, DwaConfig, GlsConfig, StchConfig, FamoConfig, GradNormConfig, PcGradConfig),
        *(MgdaConfig, CaGradConfig, ImtlGConfig, NashConfig, AlignedConfig, MetaBalanceConfig, MonitorConfig),
    )
}

#: Alias -> (method, strategy): a model.name that stands for a method trained with a strategy.
ALIASES = {"pcg": ("mmoe", "pcgrad")}


class TrainingConfig(StrictModel):
    """Length, batch, precision, validation and checkpoints of a run."""

    batch_size: int = Field(default=4096, gt=0, le=2**31 - 1, description="Global batch size, the same for every world size.")
    eval_batch_size: int = Field(default=8192, gt=0, le=2**31 - 1, description="Rows per rank and step in evaluation.")
    epochs: int = Field(default=40, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    patience: int | None = Field(default=3, gt=0, description="Validations without a better metric before stopping.")
    validate_every_steps: int | None = Field(default=None, gt=0, description="In addition to the end of each epoch.")
    checkpoint_every_steps: int | None = Field(default=None, gt=0, description="In addition to the end of each epoch.")
    keep_checkpoints: int = Field(default=2, gt=0)
    log_every_steps: int = Field(default=50, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(default=0, ge=0, lt=2**31)


class RunConfig(StrictModel):
    """The whole file."""

    run_dir: str | None = None
    dataset: DatasetConfig
    model: dict[str, Any] = {"name": "mmoe"}
    model_defaults: dict[str, Any] = {}
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    dense: DenseConfig = DenseConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    balancing: SerializeAsAny[BalancingConfig] = StaticConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="before")
    @classmethod
    def _alias_brings_its_strategy(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            return content
        name, balancing = content["model"].get("name"), content.get("balancing", {})
        if not isinstance(name, str) or name not in ALIASES or not isinstance(balancing, dict):
            return content
        method, strategy = ALIASES[name]
        if balancing.get("name", strategy) != strategy:
            raise ValueError(
                f"model.name={name} stands for {method} with balancing.name={strategy}, but balancing.name is"
                f" '{balancing['name']}': leave it out, or use model.name={method}"
            )
        return {**content, "balancing": {**balancing, "name": strategy}}

    @field_validator("balancing", mode="before")
    @classmethod
    def _options_of_the_strategy(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        name = section.get("name", "static")
        if not isinstance(name, str) or name not in STRATEGIES:
            near = did_you_mean(str(name), STRATEGIES)
            raise ValueError(f"unknown strategy '{name}'.{near} Strategies: {', '.join(STRATEGIES)}")
        strategy = STRATEGIES[name]
        for key in section:
            if key not in strategy.model_fields:
                near = did_you_mean(str(key), strategy.model_fields)
                others = [n for n, other in STRATEGIES.items() if key in other.model_fields]
                belongs = f" It belongs to {', '.join(others)}." if others else ""
                allowed = ", ".join(sorted(strategy.model_fields))
                text = f"strategy '{name}' has no option '{key}'.{near}{belongs} Its options: {allowed}"
                # The option may stand in a file and the name on the command line: the message tells where the option does.
                raise OptionError(text, str(key))
        return strategy.model_validate(section)

    @model_validator(mode="after")
    def _model_has_a_name(self) -> RunConfig:
        if not isinstance(self.model.get("name"), str):
            raise ValueError("model.name is missing: name the method, e.g. model.name=mmoe")
        return self

    def to_yaml(self) -> str:
        """The resolved configuration; loading it again gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, merge what its `base:` files give, apply `key.path=value` overrides, and check everything.

    Raises:
        ConfigError: naming the file or the command line, the key, what is allowed, and the nearest valid key.
    """
    origin: dict[str, str] = {}
    content = load_with_base(Path(path), origin)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"command line: '{override}' is not of the form key.path=value, e.g. training.max_steps=200.")
        try:
            value = yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: value of '{key}' is not valid YAML: {text!r}.") from error
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merge(content, nested, "command line", origin)
    return validate_section(RunConfig, content, prefix="", source=str(path), origin=origin)
