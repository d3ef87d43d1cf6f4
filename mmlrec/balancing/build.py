"""From the `balancing` section to the strategy of a run."""

from __future__ import annotations

from collections.abc import Mapping

from mmlrec.balancing import rules
from mmlrec.balancing.base import (
    Balancing,
    DynamicWeightAverage,
    Famo,
    GeometricLoss,
    RandomWeighting,
    SmoothTchebycheff,
    UncertaintyWeighting,
)
from mmlrec.balancing.gradients import (
    GradientBalancing,
    GradNorm,
    MetaBalance,
    Monitor,
    Owned,
    Rule,
    mgda_rule,
    nash_rule,
    pcgrad_rule,
)
from mmlrec.config import (
    AlignedConfig,
    BalancingConfig,
    CaGradConfig,
    ConfigError,
    DwaConfig,
    FamoConfig,
    GlsConfig,
    GradientBalancingConfig,
    GradNormConfig,
    ImtlGConfig,
    MetaBalanceConfig,
    MgdaConfig,
    MonitorConfig,
    NashConfig,
    PcGradConfig,
    RlwConfig,
    StchConfig,
    UwConfig,
)
from mmlrec.errors import did_you_mean
from mmlrec.losses import Loss


def _owning(loss: Loss) -> set[str]:
    """Owners whose parameters belong to one objective; a task's parameters are shared by its scenarios, and so on."""
    owning: set[str] = {"head", loss.unit}
    if len(loss.tasks) == 1:
        owning.add("scenario")  # a scenario has one head only
    if loss.num_scenarios == 1:
        owning.add("task")
    return owning


def _owned(loss: Loss, owners: Mapping[str, str | None], sole: Mapping[str, tuple[bool, ...]]) -> Owned:
    """What belongs to one objective: parameters of an owner that is one, and parts that the loss of one trains alone."""
    found: dict[str, tuple[bool, ...]] = {}
    for name, owner in owners.items():
        if owner in _owning(loss):
            found[name] = (True,)
        # Where objectives are heads, a task is one only in MTL, and in stacks whose members belong to scenarios.
        elif sole.get(name) and (loss.unit == "task" or (loss.unit == "head" and (loss.num_scenarios == 1 or owner))):
            found[name] = sole[name]
    return found


def build_balancing(
    config: BalancingConfig,
    loss: Loss,
    owners: Mapping[str, str | None],
    sole: Mapping[str, tuple[bool, ...]],
    num_looked_up: int,
    *,
    seed: int,
    steps_per_epoch: int,
) -> Balancing:
    """The strategy of a run.

    Args:
        owners: parameter name -> task, scenario, head, or None where it is shared by all.
        sole: parameter name -> the parts of it that one task's loss alone trains; see `MultiTaskModel.sole`.
        num_looked_up: columns of the network's input that come from tables.

    Raises:
        ConfigError: names of objectives that this run does not have, or nothing to balance.
    """
    names = loss.objectives
    for name in config.loss_weights:
        check_objective("balancing.loss_weights", name, loss)
    if all(config.loss_weights.get(name) == 0 for name in names):
        raise ConfigError("balancing.loss_weights: all objectives have weight 0, so nothing would be trained. Leave one out.")
    if isinstance(config, GradientBalancingConfig):
        owned = _owned(loss, owners, sole)
        any_shared = not all(all(owned.get(name, (False,))) for name in owners)
        return _gradient_balancing(config, loss, owned, any_shared, num_looked_up, seed)
    if isinstance(config, UwConfig):
        return UncertaintyWeighting(_kappas(loss))
    if isinstance(config, RlwConfig):
        return RandomWeighting(len(names), seed)
    if isinstance(config, DwaConfig):
        return DynamicWeightAverage(len(names), config, config.window_steps or steps_per_epoch)
    if isinstance(config, GlsConfig):
        return GeometricLoss(len(names))
    if isinstance(config, StchConfig):
        return SmoothTchebycheff(len(names), config, config.window_steps or steps_per_epoch)
    if isinstance(config, FamoConfig):
        return Famo(len(names), config)
    return Balancing()


def _gradient_balancing(
    config: GradientBalancingConfig, loss: Loss, owned: Owned, any_shared: bool, num_looked_up: int, seed: int
) -> Balancing:
    names, count = loss.objectives, len(loss.objectives)
    if count < 2:
        raise ConfigError(
            f"balancing.name={config.name} compares the gradients of 2 or more objectives; with balancing.unit={loss.unit}"
            f" this run has one, '{names[0]}'. Choose another unit, or balancing.name=static."
        )
    if not any_shared and config.scope == "shared_dense":
        raise ConfigError(
            f"balancing.name={config.name}: with balancing.unit={loss.unit} the network shares no parameters."
            " Set balancing.scope=embedding, which compares gradients of looked-up vectors."
        )
    if isinstance(config, MonitorConfig):
        return Monitor(count, config, None, owned, num_looked_up)
    if isinstance(config, GradNormConfig):
        return GradNorm(count, config, owned, num_looked_up)
    if isinstance(config, MetaBalanceConfig):
        main = names[0] if config.main is None else check_objective("balancing.main", config.main, loss)
        return MetaBalance(count, config, names.index(main), owned, num_looked_up)
    return GradientBalancing(count, config, rule_of(config, seed), owned, num_looked_up)


def rule_of(config: GradientBalancingConfig, seed: int) -> Rule:
    """The rule of a strategy without state. Rules whose coefficients add up to 1 are scaled to K, as for a sum of losses."""
    if isinstance(config, PcGradConfig):
        return pcgrad_rule(seed)
    if isinstance(config, MgdaConfig):
        return mgda_rule(config)
    if isinstance(config, CaGradConfig):
        c_a = config.c_a
        return lambda gram, losses, step: len(gram) * rules.cagrad(gram, c_a)
    if isinstance(config, ImtlGConfig):
        return lambda gram, losses, step: len(gram) * rules.imtl_g(gram)
    if isinstance(config, NashConfig):
        return nash_rule(config.ridge)
    assert isinstance(config, AlignedConfig)
    return lambda gram, losses, step: rules.aligned(gram)


def check_objective(key: str, name: str, loss: Loss) -> str:
    """`name`, if this run has such an objective.

    Raises:
        ConfigError: it has not; the message lists them and suggests the nearest.
    """
    names = loss.objectives
    if name not in names:
        parts = [objective for objective in names if name in objective.split("/")]
        raise ConfigError(
            f"{key}: '{name}' is not an objective of this run.{did_you_mean(name, parts or names)}"
            f" Objectives (balancing.unit={loss.unit}): {', '.join(names)}."
        )
    return name


def _kappas(loss: Loss) -> list[float]:
    """1 for objectives of classification, 1/2 of regression, the mean over the tasks of a scenario."""
    of_tasks = [1.0 if task.kind == "binary" else 0.5 for task in loss.tasks]
    if loss.unit == "task":
        return of_tasks
    if loss.unit == "head":
        return [kappa for kappa in of_tasks for _ in range(loss.num_scenarios)]
    return [sum(of_tasks) / len(of_tasks)] * loss.num_scenarios
