"""The training configuration: a strict schema, YAML files with `base:`, and `key.path=value` overrides.

An unknown key, a wrong type or an impossible combination is a ConfigError that names the file (or the command
line) and the key. Imports neither torch nor torchrec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PrivateAttr, field_validator, model_validator

from mmlrec.errors import ConfigError, did_you_mean
from mmlrec.paths import config_file, scheme_of, shipped_configs
from mmlrec.schema import Setting
from mmlrec.storage.places import Place, place, refusal
from mmlrec.yaml_config import Loader, StrictModel, keys_of, load_with_base, merge, missing, validate_section


class DatasetConfig(StrictModel):
    """Which dataset folder, read in which setting. Features, labels and scenarios come from its manifest."""

    path: str
    setting: Setting = Field(default=Setting.MTL, strict=False)
    tasks: list[str] | None = Field(
        default=None, min_length=1, description="Tasks in order; all of the manifest's when absent."
    )

    @field_validator("path")
    @classmethod
    def _can_be_reached(cls, path: str) -> str:
        return _checked_path(path)


class TableOptimizerConfig(StrictModel):
    """Optimizer inside the fused table kernel. Adam needs a GPU."""

    name: Literal["adagrad", "rowwise_adagrad", "sgd", "adam"] = "adagrad"
    lr: float = Field(default=0.05, gt=0)
    eps: float = Field(default=1e-8, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)


#: fbgemm wants a multiple of 4.
TableDim = Annotated[int, Field(gt=0, multiple_of=4)]


class ManagedConfig(StrictModel):
    """Managed tables, whose ids earn and lose their rows (docs/managed_ids.md)."""

    admit_after: int = Field(default=1, ge=1, description="Occurrences over the run from which on an id may have a row.")
    evict: Literal["lfu", "lru"] = Field(
        default="lfu", description="Which id loses its row: the one with fewest occurrences, or the one not seen for longest."
    )
    update_every: int = Field(default=100, ge=1, description="Training steps between changes of who has a row.")


class EmbeddingsConfig(StrictModel):
    """Tables: width, number format, initialisation, optimizer and sharding."""

    dim: TableDim = Field(default=8, description="Width of every table that table_dim does not name.")
    table_dim: dict[str, TableDim] = Field(default={}, description="Table name -> width.")
    dtype: Literal["fp32", "fp16"] = Field(
        default="fp32",
        description="Numbers of the tables, for which fbgemm has fp32 and fp16; the optimizer's state is fp32 in any case.",
    )
    init_std: float = Field(default=0.01, gt=0)
    optimizer: TableOptimizerConfig = TableOptimizerConfig()
    sharding: Literal["auto", "table_wise", "table_row_wise", "row_wise"] = Field(
        default="auto", description="Each table whole on a rank, split over the ranks of a host, or over all ranks."
    )
    table_sharding: dict[str, Literal["table_wise", "table_row_wise", "row_wise"]] = Field(
        default={}, description="Table name -> sharding."
    )
    plan: str | None = Field(
        default=None, description="A plan of apps.plan, or plan.json of a run, to place the tables by; instead of sharding."
    )
    communication: Literal["fp32", "fp16", "bf16", "fp8"] = Field(
        default="fp32",
        description="Looked-up vectors and their gradients between ranks, in training steps; bf16 and fp8 need GPUs.",
    )
    replicas: int = Field(
        default=1, gt=0, description="Copies of all tables, each on a part of the ranks; another algorithm, and on GPUs only."
    )
    host_cache: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="GPUs: tables beyond their memory may lie in that of the hosts, this share of their rows in a cache.",
    )
    average_every: int = Field(default=1, gt=0, description="Steps between two averages of the replicas.")
    l2: float = Field(default=0.0, ge=0, description="Penalty on the looked-up vectors, mean over samples.")
    managed: ManagedConfig = ManagedConfig()

    def width(self, table: str) -> int:
        """Width of a table, by its name in the manifest."""
        return self.table_dim.get(table, self.dim)

    @field_validator("plan")
    @classmethod
    def _can_be_reached(cls, path: str | None) -> str | None:
        return None if path is None else _checked_path(path)

    @model_validator(mode="after")
    def _one_says_where(self) -> EmbeddingsConfig:
        if self.plan is not None and (self.sharding != "auto" or self.table_sharding):
            raise ValueError("plan says where every table lies: leave sharding and table_sharding out, or plan")
        return self

    @model_validator(mode="after")
    def _replicas_can_be_averaged(self) -> EmbeddingsConfig:
        if self.replicas > 1 and self.host_cache is not None:
            raise ValueError("replicas are not averaged in the memory of hosts: leave host_cache out, or replicas")
        if self.replicas > 1 and self.optimizer.name == "adam":
            raise ValueError(
                "the state of 'adam' is not averaged over replicas: use adagrad, rowwise_adagrad or sgd, or no replicas"
            )
        return self


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
    l2: float = Field(default=0.0, ge=0, description="Penalty on the squares of the weights of linear layers.")
    start_at_label_rates: bool = Field(
        default=True, description="Start output biases at the label rates of train, by task and scenario; false: at 0."
    )


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
        default=None,
        gt=0,
        description="Regression: errors above this, in the labels' unit, count linearly (Huber); absent: squared error.",
    )
    standardise_labels: bool = Field(
        default=True,
        description="Regression: train on labels less their mean in train, over their deviation; scores keep the labels' unit.",
    )


#: Alias -> (method, strategy): a model.name that stands for a method trained with a strategy.
ALIASES = {"pcg": ("mmoe", "pcgrad")}


class TrainingConfig(StrictModel):
    """Length, batch, precision, validation and checkpoints of a run."""

    batch_size: int = Field(default=4096, gt=0, le=2**31 - 1, description="Global batch size, the same for every world size.")
    eval_batch_size: int = Field(default=8192, gt=0, le=2**31 - 1, description="Most rows per rank and step in evaluation.")
    epochs: int = Field(default=40, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    patience: int | None = Field(default=3, gt=0, description="Validations without a better metric before stopping.")
    monitor: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        min_length=1,
        description="What early stopping and the best checkpoint go by: one metric of the report, such as buy.gauc, or metrics"
        " with weights; the mean over tasks of AUC and R² when absent.",
    )
    validate_every_steps: int | None = Field(default=None, gt=0, description="In addition to the end of each epoch.")
    checkpoint_every_steps: int | None = Field(default=None, gt=0, description="In addition to the end of each epoch.")
    checkpoint_every_minutes: float | None = Field(
        default=None, gt=0, description="In addition, when so much time has passed since the checkpoint before."
    )
    checkpoint_async: bool = Field(
        default=False, description="Write checkpoints while training goes on, from a copy of each rank's shards in memory."
    )
    keep_checkpoints: int = Field(default=2, gt=0)
    keep_every_steps: int | None = Field(
        default=None, gt=0, description="In addition, a checkpoint at each multiple of these steps, which stays."
    )
    max_failed_checkpoints: int = Field(
        default=3, gt=0, description="The run ends when so many in a row could not be written, each after several attempts."
    )
    log_every_steps: int = Field(default=50, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    timeout: float = Field(default=600.0, ge=1, le=86400, description="Longest wait for another rank, in seconds.")
    seed: int = Field(default=0, ge=0, lt=2**31)

    @field_validator("monitor", mode="before")
    @classmethod
    def _one_metric(cls, monitor: Any) -> Any:
        if isinstance(monitor, str):
            return {monitor: 1.0}
        if isinstance(monitor, list) or (isinstance(monitor, dict) and any(isinstance(of, dict) for of in monitor.values())):
            raise ValueError(
                "must be one metric, such as bought.gauc, or metrics with weights, such as {bought.gauc: 1, clicked.auc: 0.5};"
                f" found {monitor}"
            )
        return monitor


#: What people call a key elsewhere, in lower case without underscores -> a sentence that names the key here.
OTHER_NAMES = {
    name: sentence
    for sentence, names in {
        "Did you mean 'dense.optimizer.lr' (network) or 'embeddings.optimizer.lr' (tables)?": ("learningrate", "alpha"),
        "Did you mean 'training.patience'?": ("earlystopping", "earlystop", "earlystoppingpatience"),
        "Did you mean 'embeddings.dim'?": ("embdim", "embeddingsize", "embedsize", "emb"),
        "Did you mean 'training.precision' (network) or 'embeddings.dtype' (tables)?": (
            *("amp", "fp16", "bf16", "mixedprecision", "dtype"),
        ),
        "Did you mean 'run_dir'?": ("outputdir", "logdir", "savedir", "output", "out"),
        "Did you mean 'model.name'?": ("method", "modelname", "network"),
        "Did you mean 'balancing.name'?": ("strategy", "balancer"),
        "Did you mean 'dataset.tasks'?": ("labels", "label", "targets", "target"),
        "Weights of tasks and scenarios stand in balancing.loss_weights.": ("lossweights", "taskweights", "lossweight"),
        "Features and scenarios are those of the dataset folder (python -m preprocessing).": (
            "features",
            "scenario",
            "scenarios",
        ),
        "The device is a GPU where there is one; processes are torchrun's: --nproc-per-node.": (
            "device",
            "gpu",
            "gpus",
            "cuda",
        ),
        "training.batch_size is global: the same for every world size.": ("batchsizeperrank", "batchsizepergpu"),
        "Fused table kernels ignore weight decay on some devices; use embeddings.l2 (a penalty on looked-up vectors) or"
        " dense.l2.": ("weightdecay",),
        "Fused table kernels ignore momentum on some devices, so it is not offered.": ("momentum",),
    }.items()
    for name in names
}


def _checked_path(path: str) -> str:
    if message := refusal(path):
        raise ValueError(message)
    return path


class RunConfig(StrictModel):
    """The whole file. `model` and `balancing` are plain: their options are those of the files that their names stand for."""

    run_dir: str | None = None
    init_from: str | None = Field(
        default=None, description="A run folder: begin with its rows, by value, and its network, by name (docs/warm_start.md)."
    )
    dataset: DatasetConfig
    model: dict[str, Any] = {"name": "mmoe"}
    model_defaults: dict[str, Any] = {}
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    dense: DenseConfig = DenseConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    balancing: dict[str, Any] = {"name": "static"}
    training: TrainingConfig = TrainingConfig()
    _origin: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origin(self) -> dict[str, str]:
        """Dotted key -> the file it is from, or "command line": `model` and `balancing` are checked later, by the registry."""
        return self._origin

    def __eq__(self, other: object) -> bool:
        """Whether all values are equal, wherever they are from."""
        return isinstance(other, RunConfig) and self.model_dump() == other.model_dump()

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

    @field_validator("run_dir", "init_from")
    @classmethod
    def _can_be_reached(cls, path: str | None) -> str | None:
        return None if path is None else _checked_path(path)

    @field_validator("balancing", mode="before")
    @classmethod
    def _strategy_has_a_name(cls, section: Any) -> Any:
        return {"name": "static", **section} if isinstance(section, dict) else section

    @model_validator(mode="after")
    def _model_has_a_name(self) -> RunConfig:
        if not isinstance(self.model.get("name"), str):
            raise ValueError("model.name is missing: name the method, e.g. model.name=mmoe")
        return self

    def to_yaml(self) -> str:
        """The resolved configuration; loading it again gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _found(path: str | Place) -> Place:
    if not isinstance(path, str | Path) or scheme_of(path):
        file = place(path)
        if not file.is_file():
            raise ConfigError(f"{file}: no such config file.")
        return file
    file = config_file(path)
    if not file.exists():
        names = shipped_configs()
        wanted = Path(path).with_suffix("").as_posix().removeprefix("configs/")
        raise ConfigError(f"{missing(file)}{did_you_mean(wanted, names)} Shipped ones, by name: {', '.join(names)}.")
    return file


def load_config(
    path: str | Place | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
    options: Callable[[], Iterable[str]] = tuple,
) -> RunConfig:
    """Read a YAML file, merge what its `base:` files give, apply `key.path=value` overrides, and check everything but options.

    Those of method and strategy stand in the files of these: `registry.load` checks them, too.

    Args:
        path: of the file, an address, or the name of a shipped one: see `paths.config_file`. From Python also the content.
        overrides: of the command line; from Python also sections, which are merged key by key.
        options: gives the dotted keys of such options, for hints about an unknown key.

    Raises:
        ConfigError: naming the file or the command line, the key, what is allowed, and the nearest valid key.
        UserError: `path` is an address that cannot be read.
    """
    origin: dict[str, str] = {}
    content: dict[str, Any] = {}
    if isinstance(path, Mapping):
        source = "config"
        merge(content, dict(path), source, origin)
    else:
        source = str(path)
        content = load_with_base(_found(path), origin)
    if isinstance(overrides, Mapping):
        merge(content, dict(overrides), "overrides", origin)
        overrides = []
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not all(part.strip() == part != "" for part in key.split(".")):
            name = override.strip(":= ").partition(":")[0] if "." in override else "training.max_steps"
            raise ConfigError(
                f"command line: '{override}' is not of the form key.path=value, without blanks around the equals sign, e.g."
                f" {name}={'VALUE' if '.' in override else 200}."
            )
        try:
            value = yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"command line: value of '{key}' is not valid YAML: {text!r}. The shell takes quotes away, and cuts at blanks:"
                f" put the whole into quotes, such as '{key}=[a, b]'."
            ) from error
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merge(content, nested, "command line", origin)
    config = validate_section(
        RunConfig,
        content,
        prefix="",
        source=source,
        origin=origin,
        everywhere=lambda: (keys() for keys in (partial(keys_of, RunConfig), options)),
        other_names=OTHER_NAMES,
    )
    config.origin.update(origin)
    return config
