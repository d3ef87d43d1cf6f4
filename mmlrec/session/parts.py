"""From a configuration and a dataset's manifest to the parts of a model, before any table is built; reads no row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mmlrec.balancing.base import Balancing
from mmlrec.config import ConfigError, RunConfig
from mmlrec.data.branches import branch_names
from mmlrec.embeddings.tables import check_table_dim
from mmlrec.errors import DataError, did_you_mean
from mmlrec.losses import Loss
from mmlrec.models.base.model import ModelSpec, MultiTaskModel
from mmlrec.registry import balancing_config, method, model_config
from mmlrec.schema import SPLITS, DatasetManifest, Setting, Task
from mmlrec.session.objective import balancing_of, label_counts, label_scales, loss_of
from mmlrec.storage.places import Place, place


def branches_of(network: MultiTaskModel, manifest: DatasetManifest) -> list[tuple[str, str, str | None]]:
    """(name, task, scenario value or None) of each branch that trains independently; empty when they train as one."""
    if not network.branches:
        return []
    spec = network.spec
    names = branch_names(spec.setting, spec.tasks, manifest.scenario)
    values: list[str | None] = [None]
    if spec.setting is not Setting.MTL and manifest.scenario is not None:
        values = list(manifest.scenario.values)
    pairs = [(task.name, value) for task in spec.tasks for value in values]
    heads = [(name, task, value) for name, (task, value) in zip(names, pairs, strict=True)]
    return [heads[branch] for branch in network.branches]


def build_spec(config: RunConfig, manifest: DatasetManifest) -> ModelSpec:
    """What the network has to know, from the configuration's selection of the manifest.

    Raises:
        ConfigError: a task or a table that the dataset does not have, or features the model cannot take.
    """
    tasks = _selected_tasks(config, manifest)
    check_table_dim(manifest, config.embeddings)
    if not manifest.features:
        raise DataError(f"{config.dataset.path} has no feature, so a model has nothing to read: make it again with some.")
    multi_scenario = config.dataset.setting is not Setting.MTL
    scenarios = len(manifest.scenario.values) if multi_scenario and manifest.scenario else 1
    return ModelSpec(
        setting=config.dataset.setting,
        tasks=tuple(tasks),
        num_scenarios=scenarios,
        fields={feature.name: config.embeddings.width(str(feature.table)) for feature in manifest.sparse_features},
        num_dense=len(manifest.dense_features),
        seed=config.training.seed,
        embedding_dim=config.embeddings.dim,
    )


def _selected_tasks(config: RunConfig, manifest: DatasetManifest) -> list[Task]:
    by_name = {task.name: task for task in manifest.tasks}
    names = config.dataset.tasks or list(by_name)
    for name in names:
        if name not in by_name:
            raise ConfigError(
                f"dataset.tasks: '{name}' is not a task of {config.dataset.path}.{did_you_mean(name, by_name)}"
                f" Tasks: {', '.join(by_name)}."
            )
    if len(set(names)) != len(names):
        raise ConfigError(f"dataset.tasks: a task is named twice: {names}.")
    return [by_name[name] for name in names]


def build_network(config: RunConfig, spec: ModelSpec, source: str) -> MultiTaskModel:
    """The network of the configuration, for data of this kind.

    Raises:
        ConfigError: the method, its options or the setting do not fit.
    """
    options = model_config(config.model, config.model_defaults, source)
    network_class = method(config.model["name"])
    network_class.check_setting(spec)
    return network_class(spec, options)


class Parts(NamedTuple):
    """What a configuration makes of a dataset's manifest, before any table is built."""

    manifest: DatasetManifest
    network: MultiTaskModel
    loss: Loss
    balancing: Balancing
    scales: dict[str, tuple[float, float]]
    #: Where the manifest lies.
    encoder: Place


def build_parts(
    config: RunConfig,
    source: str = "config",
    begun: dict[str, Any] | None = None,
    encoder: Place | None = None,
    known_scales: Mapping[str, tuple[float, float]] | None = None,
) -> Parts:
    """Build all but the tables; reads no row.

    Args:
        source: config file, for messages.
        begun: state of a checkpoint of the run; None for a new one.
        encoder: where to read the manifest; the dataset when absent.
        known_scales: of regression tasks of a new run, see `label_scales`.

    Raises:
        ConfigError: the method, its options, the setting or the strategy do not fit the dataset.
        DataError: the dataset folder or its manifest is missing or damaged.
    """
    encoder = encoder or place(config.dataset.path)
    manifest = DatasetManifest.load(encoder)
    if begun is None and not {*SPLITS} <= {*manifest.splits}:
        raise DataError(
            f"{encoder}: a run needs rows of {', '.join(SPLITS)}, and here are those of {', '.join(manifest.splits)}, as new"
            " rows have them. Make a dataset to train on with --split train,valid,test."
        )
    network = build_network(config, build_spec(config, manifest), source)
    spec = network.spec
    if config.dense.start_at_label_rates:
        network.start_at_label_rates(label_counts(manifest, spec))
    balancing_options = balancing_config(config, source)
    # What the labels of a run mean is settled when it begins; releases before left them as they are, and say nothing of it.
    recorded = begun.get("label_scales", {}) if begun is not None else label_scales(config, manifest, spec.tasks, known_scales)
    scales = {name: (mean, deviation) for name, (mean, deviation) in recorded.items()}
    loss = loss_of(config, balancing_options, network, manifest, scales)
    return Parts(manifest, network, loss, balancing_of(config, balancing_options, network, loss, manifest), scales, encoder)


def table_branches(network: MultiTaskModel, manifest: DatasetManifest) -> list[str] | None:
    """Names of the branches that have tables of their own; None where all share them."""
    if not network.branches:
        return None
    names = branch_names(network.spec.setting, network.spec.tasks, manifest.scenario)
    return [names[branch] for branch in network.branches]


def mean_lengths(manifest: DatasetManifest, branches: list[str] | None) -> tuple[dict[str, float], list[str]]:
    """Mean number of ids of a train row, by the names that features have in the tables; and those of which it is not known."""
    prefixes = [""] if branches is None else [f"{branch}/" for branch in branches]
    found = {feature.name: manifest.mean_length(feature) for feature in manifest.sparse_features}
    known = {prefix + name: length for prefix in prefixes for name, length in found.items() if length is not None}
    return known, [name for name, length in found.items() if length is None]
