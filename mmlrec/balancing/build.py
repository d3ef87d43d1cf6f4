"""From a run's losses and network to what its strategy has to know of them."""

from __future__ import annotations

from collections.abc import Mapping

from mmlrec.balancing.base import Balancing, BalancingConfig, BalancingSpec, Owned
from mmlrec.errors import ConfigError
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
    name: str,
    strategy: type[Balancing],
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
        name: the strategy's, for messages.
        owners: parameter name -> task, scenario, head, or None where it is shared by all.
        sole: parameter name -> the parts of it that one task's loss alone trains; see `MultiTaskModel.sole`.
        num_looked_up: columns of the network's input that come from tables.

    Raises:
        ConfigError: names of objectives that this run does not have, or nothing to balance.
    """
    owned = _owned(loss, owners, sole)
    spec = BalancingSpec(
        name=name,
        objectives=tuple(loss.objectives),
        unit=loss.unit,
        tasks=tuple(loss.tasks),
        num_scenarios=loss.num_scenarios,
        owned=owned,
        any_shared=not all(all(owned.get(parameter, (False,))) for parameter in owners),
        num_looked_up=num_looked_up,
        seed=seed,
        steps_per_epoch=steps_per_epoch,
    )
    for objective in config.loss_weights:
        spec.check_objective("balancing.loss_weights", objective)
    if all(config.loss_weights.get(objective) == 0 for objective in spec.objectives):
        raise ConfigError("balancing.loss_weights: all objectives have weight 0, so nothing would be trained. Leave one out.")
    return strategy(spec, config)
