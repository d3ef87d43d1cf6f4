"""What every method shares: its view of the data, its output, and its base class. Knows torch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmlrec.errors import ConfigError, did_you_mean
from mmlrec.layers.options import Activation, HiddenOptions, Init
from mmlrec.layers.scenario import Dispatch, prefers_grouped
from mmlrec.layers.towers import Towers
from mmlrec.losses import Loss, LossOptions
from mmlrec.output import Output
from mmlrec.schema import Setting, Task
from mmlrec.yaml_config import StrictModel

#: Which methods have `one_task`; tests/models/test_settings_matrix.py keeps it true.
ONE_TASK = "One task alone trains in setting 'mtl' with model.name=mlp, single_task, shared_bottom, mmoe or apg."
Width = Annotated[int, Field(gt=0)]
#: Stacked members of an owned parameter belong to one head (index t * S + s), task or scenario each, in that order.
Owner = Literal["head", "task", "scenario"]


@dataclass(frozen=True)
class ModelSpec:
    """What a network has to know about the data.

    Attributes:
        tasks: the T tasks, in order.
        num_scenarios: S; 1 in MTL.
        fields: field name -> width D_f of its pooled embedding, in the order of concatenation.
        num_dense: number of dense features, appended after the fields.
        seed: seed of the initialisation.
        embedding_dim: width of a vector that a network owns beside those that are looked up: `embeddings.dim`. None: that of
            the first field.
    """

    setting: Setting
    tasks: tuple[Task, ...]
    num_scenarios: int
    fields: dict[str, int]
    num_dense: int
    seed: int = 0
    embedding_dim: int | None = None

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.tasks)

    @property
    def num_heads(self) -> int:
        """H = T * S; head (t, s) has index t * S + s."""
        return len(self.tasks) * self.num_scenarios

    @property
    def input_width(self) -> int:
        """d_in: width of the concatenated pooled embeddings and dense features."""
        return sum(self.fields.values()) + self.num_dense

    @property
    def vector_width(self) -> int:
        """Width of a vector that a network owns beside those that are looked up."""
        return self.embedding_dim or next(iter(self.fields.values()), 16)


class NetworkConfig(StrictModel):
    """Options of all hidden layers of a method."""

    activation: Activation = Field(default="relu", description="Activation of hidden layers.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout after each hidden layer.")
    use_bn: bool = Field(default=False, description="Batch normalisation before each activation.")
    init: Init = Field(default="standard", description="'standard' (Kaiming) or 'mmlrec', the benchmark's N(0, 1e-4^2).")

    @property
    def hidden(self) -> HiddenOptions:
        """The same, as the layers take it."""
        return HiddenOptions(self.activation, self.dropout, self.use_bn, self.init)


class MultiTaskModel(nn.Module):
    """Base class of all methods: maps features to logits and never sees labels, KeyedJaggedTensors, ranks or shards.

    A subclass sets `Config`, builds its layers in `__init__(spec, config)` and implements `forward`. `spec` may have
    S = 1 or H = 1: for most methods run configurations refuse that before (`check_setting`), tests of degenerate cases need it.
    """

    Config: ClassVar[type[NetworkConfig]] = NetworkConfig
    config: NetworkConfig
    #: Settings in which the method is defined, with what to use instead for those that are missing.
    settings: ClassVar[tuple[Setting, ...]] = (Setting.MTL, Setting.MSL, Setting.MTMSL)
    alternative: ClassVar[str] = ""
    #: True: in setting 'mtl' one task is enough. Others are about what several tasks or scenarios share.
    one_task: ClassVar[bool] = False
    #: True: every branch (head) has its own tables, named `branch/table`, its own early stopping and best checkpoint (but for
    #: managed tables, see `Session.selected_apart`); then x is [B, H, d_in] and fields are [B, H, D_f].
    tables_per_branch: ClassVar[bool] = False
    #: The heads with tables of their own; empty when tables are shared.
    branches: tuple[int, ...] = ()
    #: Module (or parameter) name -> who owns its parameters; what is not listed is shared by all. See `owner`.
    owners: ClassVar[dict[str, Owner]] = {}
    #: Attribute with weights of linear layers -> what `dense.l2` pulls them to; of the network itself, whose layers have their
    #: own. See `mmlrec.layers.decay`.
    decays: ClassVar[dict[str, float]] = {}
    #: Tasks of a chain, first step first, in which each label implies the one before; empty for other methods.
    chain: tuple[int, ...] = ()
    #: Uniform random numbers in (0, 1) that one training step takes, for random gates.
    num_noise: int = 0

    def __init__(self, spec: ModelSpec, config: NetworkConfig) -> None:
        super().__init__()
        self.spec = spec
        self.config = config

    @property
    def generator(self) -> torch.Generator:
        """A new source of random initial weights; depends on `spec.seed` only, not on the global state."""
        return torch.Generator().manual_seed(self.spec.seed)

    def owner(self, parameter: str) -> Owner | None:
        """Who owns a parameter, by its dotted name; None where several heads train it.

        An owned parameter is a stack: member m belongs to head (task, scenario) m modulo their number, and gets a gradient
        from its rows and losses only. Gradient balancing leaves such parameters alone; the tests of isolation check them.
        """
        return next((kind for name, kind in self.owners.items() if parameter == name or parameter.startswith(name + ".")), None)

    def sole(self, parameter: str) -> tuple[bool, ...]:
        """For each of the equal parts of a parameter along its first axis: does one task's loss alone train it? () where none.

        For parameters that no task or head owns, as a stack of which some members are alone in this and others are not.
        """
        return ()

    def check_fields(self, option: str, names: Sequence[str]) -> None:
        """Refuse names of fields that the data does not have, and a name given twice.

        Raises:
            ConfigError: naming the option, the field and the nearest one.
        """
        for name in names:
            if not self.spec.fields:
                raise ConfigError(f"model.{option}: no field '{name}': all features of this dataset are numbers. Leave it out.")
            if name not in self.spec.fields:
                near, known = did_you_mean(name, self.spec.fields), ", ".join(self.spec.fields)
                raise ConfigError(
                    f"model.{option}: no field '{name}'.{near} Fields: {known}."
                    f" Name those of this dataset, model.{option}=[...]."
                )
            if list(names).count(name) > 1:
                raise ConfigError(f"model.{option}: field '{name}' is named twice.")

    def make_loss(self, options: LossOptions) -> Loss:
        """The loss of this network; a method with terms of its own overrides it."""
        return Loss(self.spec.tasks, self.spec.num_scenarios, options)

    def output_biases(self) -> Tensor | None:
        """What is added to the logits last; None where no part of the network is that. Writing to it changes the network.

        Here the biases of `towers`, if there is one for each output; a method with other outputs overrides it.

        Returns:
            [H] or [T, S] of heads, [T] of towers that scenarios share, or one for each of the `branches`.
        """
        towers = getattr(self, "towers", None)
        outputs = (len(self.branches),) if self.branches else (self.spec.num_heads, self.spec.num_tasks)
        return towers.bias if isinstance(towers, Towers) and len(towers.bias) in outputs else None

    def label_logits(self, counts: Tensor) -> Tensor:
        """What logits would be if all rows of a task and scenario had the same: those of the label rates.

        A rate of few rows leans towards that of the task over all scenarios, as if one row more had been half a positive, or
        had the task's rate: it is never 0 or 1. A regression task's is 0.

        Args:
            counts: [T, S, 2], labelled rows and positive rows of train; or with S = 1 for all scenarios together.

        Returns:
            [T, S].
        """
        labelled, positive = counts.double().unbind(-1)
        overall = (positive.sum(1, keepdim=True) + 0.5) / (labelled.sum(1, keepdim=True) + 1)
        logits = torch.logit((positive + overall) / (labelled + 1))
        binary = torch.tensor([task.kind == "binary" for task in self.spec.tasks])
        return torch.where(binary.unsqueeze(1), logits, 0.0)

    @torch.no_grad()
    def start_at_label_rates(self, counts: Tensor) -> None:
        """Set the output biases so that the untrained network predicts the label rates of train, scenario by scenario.

        Otherwise it says .5 of every row, and its first steps go into learning one number for each head.

        Args:
            counts: [T, S, 2], labelled rows and positive rows of train.
        """
        biases = self.output_biases()
        if biases is None:
            return
        if not self.branches and biases.numel() < self.spec.num_heads:
            counts = counts.sum(1, keepdim=True)
        logits = self.label_logits(counts)
        if self.branches:
            logits = logits.flatten()[list(self.branches)]
        biases.copy_(logits.view(biases.shape))

    def lr_factors(self) -> dict[str, float]:
        """Module (or parameter) name -> what its parameters' learning rate is multiplied by; 1 for what is not listed."""
        return {}

    def diagnostics(self) -> dict[str, float]:
        """Numbers by name that tell how the network develops, for reports; read now and then, not in each step."""
        return {}

    def own_dispatch(self, scenario: Tensor, widths: Sequence[int], return_all_heads: bool) -> Dispatch | None:
        """Rows by scenario, where only each row's own scenario has to be computed; else None: compute all heads.

        Args:
            widths: outputs of the scenario-specific layers; the widest decides the strategy.
        """
        scenarios = self.spec.num_scenarios
        # Statistics of a head's normalised layers need whole columns, not each row's own slice.
        if scenarios == 1 or return_all_heads or self.config.use_bn:
            return None
        return Dispatch(scenario, scenarios, grouped=prefers_grouped(scenarios, max(widths, default=1)))

    def head_rows(self, scenario: Tensor, valid: Tensor | None) -> Tensor | None:
        """Rows whose statistics head h sees, real ones of its scenario: bool [H, B]; or just `valid`."""
        scenarios = self.spec.num_scenarios
        if scenarios == 1 or not self.config.use_bn:
            return valid
        rows = scenario == torch.arange(scenarios, device=scenario.device).view(-1, 1)
        return (rows if valid is None else rows & valid).repeat(self.spec.num_tasks, 1)

    def select(self, all_logits: Tensor, scenario: Tensor, return_all_heads: bool) -> Output:
        """The output of a network that computed all heads [B, H]."""
        logits = self.own_scenario(all_logits, scenario, self.spec.num_scenarios)
        return Output(logits, all_logits if return_all_heads else None)

    @classmethod
    def check_defined(cls, setting: Setting) -> None:
        """Refuse a setting in which the method is not defined; needs no data.

        Raises:
            ConfigError: naming the method, the setting and the nearest valid choice.
        """
        if setting not in cls.settings:
            raise ConfigError(f"{cls.__name__} is not defined for setting '{setting}'. {cls.alternative}".rstrip())

    @classmethod
    def check_setting(cls, spec: ModelSpec) -> None:
        """Refuse a setting the method does not support, or data that does not fit the setting.

        Raises:
            ConfigError: naming the method, the setting and the nearest valid choice.
        """
        name, setting = cls.__name__, spec.setting
        cls.check_defined(setting)
        if setting is not Setting.MTL and spec.num_scenarios < 2:
            other = "use setting 'mtl'"
            if spec.num_tasks < 2 and not cls.one_task:
                other = f"make it again with scenarios, or choose 2 or more tasks in setting 'mtl'. {ONE_TASK}"
            raise ConfigError(f"{name} in setting '{setting}' needs 2 or more scenarios; this dataset has none: {other}.")
        if setting is not Setting.MSL and spec.num_tasks < 2 and not (cls.one_task and setting is Setting.MTL):
            other = ", or, with scenarios, use setting 'msl'" if Setting.MSL in cls.settings else ""
            raise ConfigError(
                f"{name} in setting '{setting}' needs at least 2 tasks, got {[t.name for t in spec.tasks]}:"
                f" choose more with dataset.tasks{other}. {ONE_TASK}"
            )
        if setting is Setting.MSL and spec.num_tasks != 1:
            raise ConfigError(
                f"{name} in setting 'msl' needs exactly 1 task, got {[t.name for t in spec.tasks]}:"
                " choose one with dataset.tasks, or use setting 'mtmsl'."
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
        """Compute logits.

        Args:
            x: [B, d_in] float32 (or the autocast type), pooled embeddings in field order, then dense features.
            fields: field name -> [B, D_f], views of the same embeddings.
            scenario: [B] int64 in 0..S-1; all 0 in MTL.
            valid: [B] bool, False where a row is padding: left out of normalisation statistics and dispatch.
            noise: [num_noise] uniform in (0, 1), drawn from (seed, step) and equal on all ranks; a network with random gates
                draws its own in training when it is absent.
            return_all_heads: also fill `Output.all_logits`.
        """
        raise NotImplementedError

    @staticmethod
    def own_scenario(all_logits: Tensor, scenario: Tensor, num_scenarios: int) -> Tensor:
        """Select from [B, H] the logits of each sample's own scenario: z[b, t] = Z[b, t*S + s_b], [B, T]."""
        if num_scenarios == 1:
            return all_logits
        heads = all_logits.view(all_logits.shape[0], -1, num_scenarios)
        index = scenario.view(-1, 1, 1).expand(-1, heads.shape[1], 1)
        return torch.gather(heads, 2, index)[:, :, 0]
