"""What a run minimises: labels in which unit, losses of which objectives, and how these are joined."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmlrec.balancing.base import Balancing, BalancingConfig
from mmlrec.balancing.build import build_balancing
from mmlrec.config import ConfigError, RunConfig
from mmlrec.errors import UserAdvice
from mmlrec.losses import Loss, LossOptions, Unit
from mmlrec.models.base.model import ModelSpec, MultiTaskModel
from mmlrec.registry import strategy
from mmlrec.schema import DatasetManifest, Setting, Task


def label_counts(manifest: DatasetManifest, spec: ModelSpec) -> Tensor:
    """Labelled and positive train rows of each task and scenario, [T, S, 2]; 0 where the manifest does not tell."""
    names = manifest.scenario.values if manifest.scenario and spec.setting is not Setting.MTL else ["all"]
    counts = manifest.splits["train"].label_counts
    rows = [[counts.get(task.name, {}).get(name, (0, 0)) for name in names] for task in spec.tasks]
    return torch.tensor(rows, dtype=torch.float64)


def label_scales(
    config: RunConfig, manifest: DatasetManifest, tasks: Sequence[Task], known: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, tuple[float, float]]:
    """Mean and deviation by which a new run standardises the labels of its regression tasks; none for other tasks.

    Args:
        known: of tasks whose network is taken from another run: its outputs mean what they were trained on.

    Labels of one value keep their unit, less that value. Warns (`UserAdvice`) where a dataset does not record its labels.
    """
    scales, unknown = {}, []
    for task in tasks:
        if task.kind == "regression" and config.loss.standardise_labels:
            found = (known or {}).get(task.name) or manifest.train_moments(task.name).get("all")
            if found is None:
                unknown.append(task.name)
            else:
                scales[task.name] = (found[0], found[1] or 1.0)
    if unknown:
        warnings.warn(
            f"{config.dataset.path} does not record mean and deviation of the labels of {', '.join(unknown)}: trained in their"
            " own unit, and selected by mean squared error. Preprocess again to have them standardised.",
            UserAdvice,
            stacklevel=2,
        )
    return scales


def label_deviations(manifest: DatasetManifest, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """Regression task -> "all" or scenario -> deviation of its labels in train."""
    moments = {task.name: manifest.train_moments(task.name) for task in tasks if task.kind == "regression"}
    return {task: {name: deviation for name, (_, deviation) in found.items()} for task, found in moments.items()}


def loss_of(
    config: RunConfig,
    options: BalancingConfig,
    network: MultiTaskModel,
    manifest: DatasetManifest,
    scales: dict[str, tuple[float, float]],
) -> Loss:
    """The network's loss, with the objectives that the options of the strategy ask for.

    Raises:
        ConfigError: the options do not fit the setting, or the kinds of the tasks.
    """
    setting = config.dataset.setting
    unit: Unit = options.unit or ("scenario" if setting is Setting.MSL else "task")
    if unit != "task" and setting is Setting.MTL:
        raise ConfigError(f"balancing.unit={unit}: setting 'mtl' has no scenarios. Use unit 'task', or setting 'mtmsl'.")
    scenarios = tuple(manifest.scenario.values) if unit != "task" and manifest.scenario else ()
    huber_delta = config.loss.huber_delta
    if huber_delta is not None and all(task.kind == "binary" for task in network.spec.tasks):
        raise ConfigError("loss.huber_delta is for regression tasks, and all tasks are binary: leave it out.")
    deviations = tuple(scales.get(task.name, (0.0, 1.0))[1] for task in network.spec.tasks)
    return network.make_loss(LossOptions(config.loss.scenario_reduction, unit, scenarios, huber_delta, deviations))


def balancing_of(
    config: RunConfig, options: BalancingConfig, network: MultiTaskModel, loss: Loss, manifest: DatasetManifest
) -> Balancing:
    """The strategy that joins the objectives of a loss."""
    chosen = config.balancing["name"]
    return build_balancing(
        chosen,
        strategy(chosen),
        options,
        loss,
        {name: network.owner(name) for name, _ in network.named_parameters()},
        {name: network.sole(name) for name, _ in network.named_parameters()},
        sum(network.spec.fields.values()),
        seed=config.training.seed,
        steps_per_epoch=-(-manifest.splits["train"].num_rows // config.training.batch_size),
    )
