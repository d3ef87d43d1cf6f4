"""The training configuration: a strict schema, YAML files with `base:`, and `key.path=value` overrides.

An unknown key, a wrong type or an impossible combination is a ConfigError that names the file (or the command
line) and the key. Imports neither torch nor torchrec.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmlrec.errors import ConfigError, did_you_mean
from mmlrec.schema import Setting

_HINTS = {
    "weight_decay": "Fused table kernels ignore weight decay on some devices; use embeddings.l2 (a penalty on looked-up"
    " vectors) or dense.l2.",
    "batch_size_per_rank": "training.batch_size is global: the same for every world size.",
    "momentum": "Fused table kernels ignore momentum on some devices, so it is not offered.",
}


class StrictModel(BaseModel):
    """Base of every config section: unknown keys are errors, types are not coerced, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DatasetConfig(StrictModel):
    """Which dataset folder, read in which setting. Features, labels and scenarios come from its manifest."""

    path: str
    setting: Setting = Field(default=Setting.MTL, strict=False)
    tasks: list[str] | None = Field(default=None, description="Tasks in order; all of the manifest's when absent.")


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
    l2: float = Field(default=0.0, ge=0)


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
    """Reduction of the per-sample losses (models.md 1.5)."""

    scenario_reduction: Literal["pooled", "balanced"] = "pooled"


class BalancingConfig(StrictModel):
    """How the task losses become one."""

    name: Literal["static"] = "static"
    loss_weights: dict[str, float] = Field(default={}, description="Task -> weight; 1 when absent.")


class TrainingConfig(StrictModel):
    """Length, batch, precision, validation and checkpoints of a run."""

    batch_size: int = Field(default=4096, gt=0, description="Global batch size, the same for every world size.")
    eval_batch_size: int = Field(default=8192, gt=0, description="Rows per rank and step in evaluation.")
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
    balancing: BalancingConfig = BalancingConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _model_has_a_name(self) -> RunConfig:
        if not isinstance(self.model.get("name"), str):
            raise ValueError("model.name is missing: name the method, e.g. model.name=mmoe")
        return self

    def to_yaml(self) -> str:
        """The resolved configuration; loading it again gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)

Section = TypeVar("Section", bound=BaseModel)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, merge what its `base:` files give, apply `key.path=value` overrides, and check everything.

    Raises:
        ConfigError: naming the file or the command line, the key, what is allowed, and the nearest valid key.
    """
    origin: dict[str, str] = {}
    content = _load_with_base(Path(path), origin, ())
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"command line: '{override}' is not of the form key.path=value, e.g. training.max_steps=200.")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: value of '{key}' is not valid YAML: {text!r}.") from error
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(content, nested, "command line", origin, "")
    return validate_section(RunConfig, content, prefix="", source=str(path), origin=origin)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping strictly.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        beside = f" Beside it: {', '.join(near)}." if near else ""
        raise ConfigError(f"{path}: no such config file.{did_you_mean(str(path), near)}{beside}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections, found {type(content).__name__}.")
    return content


def _load_with_base(path: Path, origin: dict[str, str], above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise ConfigError(f"{path}: `base:` leads back to this file.")
    own = read_yaml(path)
    bases = own.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base: must be a file name or a list of file names, relative to this file.")
    merged: dict[str, Any] = {}
    for base in bases:
        _merge(merged, _load_with_base(path.parent / base, origin, (*above, path.resolve())), None, origin, "")
    _merge(merged, own, str(path), origin, "")
    return merged


def _merge(into: dict[str, Any], new: dict[str, Any], source: str | None, origin: dict[str, str], prefix: str) -> None:
    for key, value in new.items():
        where = f"{prefix}{key}"
        if source is not None:
            origin[where] = source
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, source, origin, f"{where}.")
        else:
            into[key] = value
            if isinstance(value, dict) and source is not None:
                _merge({}, value, source, origin, f"{where}.")


def validate_section(
    section: type[Section], content: dict[str, Any], *, prefix: str, source: str, origin: dict[str, str] | None = None
) -> Section:
    """Check `content` against a section's schema.

    Args:
        prefix: dotted path of the section, with its trailing dot, for messages.
        source: file to name when `origin` does not know the key.
        origin: dotted key -> file or "command line".

    Raises:
        ConfigError: with one line for each problem.
    """
    try:
        return section.model_validate(content)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = [str(part) for part in problem["loc"]]
            key = prefix + ".".join(path)
            where = _origin_of(key, origin or {}, source)
            if problem["type"] == "extra_forbidden":
                allowed = _fields_at(section, path[:-1])
                message = f"unknown key.{did_you_mean(path[-1], allowed)} {_HINTS.get(path[-1], '')}".rstrip()
                message += f" Allowed: {', '.join(sorted(allowed))}."
            elif problem["type"] == "missing":
                message = "required, but not given."
            else:
                message = f"{problem['msg']}; found {problem['input']!r}." if path else f"{problem['msg']}."
            lines.append(f"{where}: {key or 'config'}: {message}")
        raise ConfigError("\n".join(lines)) from None


def _origin_of(key: str, origin: dict[str, str], source: str) -> str:
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return source


def _fields_at(section: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = section.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        section = field.annotation
    return list(section.model_fields)
