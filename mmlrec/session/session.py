"""From a configuration to a sharded model on this rank: shared by training, evaluation and prediction."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.optim.keyed import CombinedOptimizer

from mmlrec.config import ConfigError, DenseConfig, DenseOptimizerConfig, ManagedConfig, RunConfig, TableOptimizerConfig
from mmlrec.data.batch import Batch
from mmlrec.data.branches import expand_branches
from mmlrec.data.reader import Reader
from mmlrec.data.verification import Verification
from mmlrec.distributed.stopping import StopSignal
from mmlrec.distributed.world import World, logger
from mmlrec.embeddings.communication import Communication
from mmlrec.embeddings.hardware import CPU, GPU, Hardware, host_memory, memory_of
from mmlrec.embeddings.placement import PortableSharder
from mmlrec.embeddings.replicas import average, check_replicas, shard
from mmlrec.embeddings.sharding import (
    apply_table_optimizer,
    forget_former_groups,
    make_plan,
    plan_report,
    short_of_memory,
    tell_rounding,
)
from mmlrec.embeddings.tables import (
    begin_anew,
    build_tables,
    count_steps,
    forget_cached_rows,
    initialize,
    table_configs,
    touch_state,
)
from mmlrec.errors import CheckpointError, DataError
from mmlrec.models.base.model import ModelSpec, MultiTaskModel
from mmlrec.registry import balancing_config
from mmlrec.run_folder import checkpoint, whole
from mmlrec.run_folder.encoder import check_own_encoder, is_encoded_alike
from mmlrec.run_folder.folder import MEASURED_OTHERWISE, RunFolder, differences
from mmlrec.schema import MANIFEST, DatasetManifest
from mmlrec.session.network_cost import bytes_beside_tables, network_bytes, network_cost
from mmlrec.session.objective import label_deviations
from mmlrec.session.optim import build_optimizer
from mmlrec.session.parts import branches_of, build_parts, mean_lengths, table_branches
from mmlrec.session.pipeline import Pipeline, WithoutTables, WithTables
from mmlrec.session.recommender import TABLES, Head, Recommender
from mmlrec.slots.managed import ManagedTables
from mmlrec.storage.places import Place, place

_MEASURED = (
    "Evaluation measures the model as it was trained: leave these keys away, or train another run with them. It takes"
    " dataset.path (rows encoded alike), training.precision, training.eval_batch_size, training.timeout and"
    " embeddings.sharding."
)
#: How many hosts torchrec takes for one, where somebody has set it; the second is that of torchrec 1.6.
_POD_SIZES = ("TORCHREC_RESOLVED_POD_SIZE", "TOPOLOGY_DOMAIN_MULTIPLE")
_ROWS_AT_ONCE = 128  # rows of an evaluation's step are a multiple: products then take the kernels of a full step
_CHECK_SECONDS = 10.0  # ranks that wait for one that still hashes meet this often: collectives have a time limit


@dataclass
class Session:
    """A model, sharded over the ranks, with all that is needed to feed it."""

    config: RunConfig
    world: World
    manifest: DatasetManifest
    #: Where manifest and vocabularies lie: the dataset, or where that is gone `RUN/encoder`, which has no rows.
    encoder: Place
    spec: ModelSpec
    head: Head
    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    pipeline: Pipeline
    managed: ManagedTables
    plan: list[dict[str, Any]]
    #: Regression task -> mean and deviation of the labels that it is trained on; those without one keep their unit.
    scales: dict[str, tuple[float, float]]
    #: Regression task -> "all" or scenario -> deviation of its labels in the data that the run is trained on.
    deviations: dict[str, dict[str, float]]
    #: False in a run that a release began which knew no R²: its regression tasks are selected by mean squared error.
    knows_r2: bool
    verification: Verification = field(init=False)

    def __post_init__(self) -> None:
        local = self.world.local_world_size
        self.verification = Verification(self.world.rank % local, local, (self.world.rank, self.world.world_size))

    @property
    def network(self) -> MultiTaskModel:
        """The network, under whatever wraps it."""
        return self.head.network

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint's state says of the model beside its tensors.

        Of the labels, as `build_session` takes it: nothing in runs that knew no R². Of managed tables, as they take it.
        """
        labels = {"label_scales": self.scales, "label_deviations": self.deviations} if self.knows_r2 else {}
        return labels | self.managed.state

    def load_best(self, folder: Place) -> dict[str, Any]:
        """Be the model of a best checkpoint, which is whole; gives its state.

        Raises:
            CheckpointError: it is of another model.
        """
        state = checkpoint.read_state(folder)
        checkpoint.load(folder, checkpoint.model_tensors(self.model), self.world)
        self.managed.load(folder, state, history=False)
        return state

    def update_slots(self) -> None:
        """At a boundary, between two steps: let rows of managed tables go to other ids. All ranks call it."""
        tables, config = get_unwrapped_module(self.model).tables, self.config
        prefixes = [f"{name}/" for name, _, _ in self.branches()] or [""]
        anew = {prefix + name: slots for name, slots in self.managed.update().items() for prefix in prefixes}
        begin_anew(tables, self.model.fused_optimizer, anew, std=config.embeddings.init_std, seed=config.training.seed)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the losses of a step."""
        return self.head.loss.objectives

    def reader(self, split: str, folder: Place | None = None) -> Reader:
        """The reader of a split, on this rank; of the dataset in `folder` when it is not the one of the configuration.

        Its parts are hashed from now on; `check_parts` tells what came out.

        Raises:
            DataError: the dataset is gone, or damaged.
        """
        training = self.config.training
        there = folder or place(self.config.dataset.path)
        if folder is None and self.encoder != there:
            raise DataError(
                f"dataset.path: {there} is gone, and with it the rows of {split}. Bring it back, or give other rows that are"
                f" encoded alike: --input FOLDER. How they were encoded is in {self.encoder}."
            )
        manifest = self.manifest if folder is None else DatasetManifest.load(folder)
        size = training.batch_size
        if split != "train":
            rows = manifest.splits[split].num_rows if split in manifest.splits else 0  # which the reader refuses
            size = rows_of_step(rows, training.eval_batch_size, self.world.world_size) * self.world.world_size
        reader = Reader(
            there,
            manifest,
            split,
            tasks=[task.name for task in self.spec.tasks],
            batch_size=size,
            rank=self.world.rank,
            world_size=self.world.world_size,
            seed=training.seed,
            pinned=self.world.device.type == "cuda",
            known_rows=None if folder is None else {table.name: table.num_rows for table in self.manifest.tables},
        )
        self.verification.add(there, manifest.splits[split].parts)
        return reader

    def check_parts(self, stop: StopSignal | None = None, *, wait: bool = True) -> bool:
        """Before anything is kept that was made of the parts of any reader: are they those that were written? On all ranks.

        Args:
            stop: a signal ends the waiting.
            wait: until all are hashed; otherwise only what is known by now counts.

        Returns:
            Whether all were waited for.

        Raises:
            DataError: on every rank, when one has found a part that is damaged.
        """
        told = False
        while True:
            waiting = wait and self.world.any(not self.verification.finished(_CHECK_SECONDS))
            self.world.raise_together(self.verification.failure)
            if not waiting or (stop is not None and stop.agreed()):
                return not waiting
            self.world.at("comparing parts of the dataset with their checksums")
            if not told:
                logger.info("waiting until all parts of the dataset have been compared with their checksums")
            told = True

    def count_steps(self, steps: int) -> None:
        """Before steps that follow a validation or a resume: how many training steps there were (see `tables.count_steps`)."""
        count_steps(get_unwrapped_module(self.model).tables, steps)

    def average_replicas(self, step: int) -> None:
        """Behind a training step: the mean of the replicas of the tables, where it is time for it and there are several.

        Args:
            step: 0 where what follows is no training step.
        """
        if step % self.config.embeddings.average_every == 0:
            average(self.model)

    def branches(self) -> list[tuple[str, str, str | None]]:
        """`branches_of` its network and data."""
        return branches_of(self.network, self.manifest)

    def selected_apart(self) -> list[tuple[str, str, str | None]]:
        """The branches of which each has a best step of its own: none where tables are managed, with one map for all."""
        return [] if self.managed else self.branches()

    def prepare(self, batches: Iterator[Batch], *, training: bool) -> Iterator[Batch]:
        """Batches as the model wants them.

        With slots in place of keys of managed tables, which are counted in training; with the features of each branch, when
        branches have tables of their own.
        """
        heads = self.network.branches
        if self.managed:
            batches = self.managed.prepared(batches, training=training)
        if not heads:
            return batches
        names = [name for name, _, _ in self.branches()]
        scenarios = self.spec.num_scenarios
        return (expand_branches(b, names, scenarios, training=training, branches=heads) for b in batches)


def rows_of_step(num_rows: int, most: int, world_size: int) -> int:
    """Rows of each rank in a step of an evaluation: `most`, or where one step holds the split, little more than it has.

    What a split lacks to a step is padded, and computed like rows: of a small split that would be most of the work. A larger
    one is not divided evenly: with other rows beside it a row's score has other last bits in some methods, such as STAR.
    """
    of_rank = -(-num_rows // world_size)
    return min(most, -(-of_rank // _ROWS_AT_ONCE) * _ROWS_AT_ONCE)


def hardware_of(world: World) -> Hardware:
    """What the ranks run on: equal ones, with the least memory that one of them has, on the hosts that the launcher names.

    Raises:
        ConfigError: torchrec is told to take several hosts for one, which the plan here knows nothing of.
    """
    for name in _POD_SIZES:
        if world.world_size > 1 and (pod := os.environ.get(name, "1")) != "1":
            raise ConfigError(
                f"the environment variable {name} is {pod}: torchrec would take that many hosts for one, and look rows up on"
                " other ranks than the plan of the tables says. Unset it: hosts are those that the launcher names."
            )
    least = -world.highest(-memory_of(world.device, world.local_world_size))
    of_hosts = set(world.gather(world.local_world_size))
    kind = world.device.type
    of_host = 0
    if kind == "cuda":
        of_host = -world.highest(-(host_memory("MemTotal") // world.local_world_size))
    bandwidths = GPU if kind == "cuda" else CPU
    return Hardware(world.world_size, max(of_hosts), kind, least, bandwidths, len(of_hosts) == 1, of_host)


def check_memory(report: list[dict[str, Any]], optimizer: str, world: World, *, replica: int, host_bytes: int = 0) -> None:
    """Refuse tables that do not fit where they go, by what each rank finds free on its own GPU and host. All ranks call it.

    Args:
        replica: ranks of one copy of the tables.
        host_bytes: what each rank takes of its host beside them, for maps of managed tables.

    Raises:
        ConfigError: on every rank, when one has too little.
    """
    sizes = world.gather(world.local_world_size)
    short = short_of_memory(
        report, optimizer, rank=world.rank, sizes=sizes, replica=replica, device=world.device, host_bytes=host_bytes
    )
    world.raise_together(short)


def _with_activations(without: int, network: MultiTaskModel, config: RunConfig, world: World) -> int:
    """Bytes to keep free of tables on this rank; those of the network alone, `without`, where its activations are not known."""
    try:
        cost = network_cost(network, bf16=config.training.precision == "bf16")
    except ConfigError as error:  # it may train nevertheless
        if world.is_main:
            logger.warning(
                "%s The plan of the tables keeps %.2f GiB free on each rank, for the network, and nothing for its activations.",
                error,
                without / 2**30,
            )
        return without
    return sum(bytes_beside_tables(network, cost, config, world.world_size))


def build_session(
    config: RunConfig,
    world: World,
    *,
    for_training: bool,
    source: str = "config",
    begun: dict[str, Any] | None = None,
    encoder: Place | None = None,
    known_scales: Mapping[str, tuple[float, float]] | None = None,
) -> Session:
    """Build network and tables, shard them, and write the initial weights.

    Args:
        for_training: False leaves out the optimizers' state (evaluation and prediction need none).
        source: config file, for messages.
        begun: state of a checkpoint of the run; None for a new one.
        encoder: where to read the manifest; the dataset when absent.
        known_scales: of regression tasks of a new run, see `label_scales`.

    Raises:
        ConfigError: the method, its options, the setting or the sharding do not fit.
        DataError: the dataset folder is missing or damaged.
    """
    torch.manual_seed(config.training.seed)  # What a method of another package draws from torch's own state, as nn.Linear does.
    manifest, network, loss, balancing, scales, encoder = build_parts(config, source, begun, encoder, known_scales)
    spec = network.spec
    branches = table_branches(network, manifest)
    prefixes = [""] if branches is None else [f"{name}/" for name in branches]
    if for_training:
        tell_rounding(config.embeddings, world.device)
    tables = build_tables(table_configs(manifest, config.embeddings, branches))
    optimizer_config = config.embeddings.optimizer if for_training else TableOptimizerConfig(name="sgd")
    apply_table_optimizer(tables, optimizer_config, world.device)
    dense = config.dense if for_training else DenseConfig(optimizer=DenseOptimizerConfig(name="sgd"))
    precision = config.embeddings.communication if for_training else "fp32"
    dims = [table.embedding_dim for table in tables.embedding_bag_configs()]
    communication = Communication(precision, config.training.batch_size, dims)
    reserved = network_bytes(network, dense.optimizer.name, world.world_size)
    if for_training and (world.world_size > 1 or config.embeddings.host_cache is not None):  # else nothing is to be chosen
        reserved = world.highest(_with_activations(reserved, network, config, world))
    # Nobody else moves it: torchrec makes its shards where they belong, and our wrapper takes what it gets.
    head = Head(network, loss, balancing, config, prefixes, scales, world.parts).to(world.device)
    recommender = Recommender(tables, head, communication)
    lengths, unknown = mean_lengths(manifest, branches)
    if unknown and for_training and world.world_size > 1 and world.is_main:
        logger.info(
            "%s does not record how many ids a row has of %s: the plan takes 1. Preprocess again to have them counted.",
            config.dataset.path,
            ", ".join(unknown),
        )
    replicas = config.embeddings.replicas if for_training else 1
    if for_training:
        check_replicas(config.embeddings, world.device)
    hardware = hardware_of(world).of_replica(replicas)
    update: dict[str, Any] = {"optimizer": optimizer_config, "communication": precision}
    if not for_training:
        update["plan"] = None  # It is of the ranks of the training: other processes measure.
        update["host_cache"] = config.embeddings.host_cache if world.device.type == "cuda" else None
    plan = make_plan(
        TABLES,
        tables,
        config.embeddings.model_copy(update=update),
        hardware,
        batch_size=-(-config.training.batch_size // world.world_size),
        lengths=lengths,
        reserved=reserved,
    )
    report = plan_report(plan, TABLES, tables, optimizer_config.name, replicas)
    managed = ManagedTables(manifest, config.embeddings.managed, world)
    if not managed and config.embeddings.managed != ManagedConfig():
        raise ConfigError(
            f"embeddings.managed: {config.dataset.path} has no managed table. Leave it out, or preprocess again with one."
        )
    check_memory(report, optimizer_config.name, world, replica=hardware.world_size, host_bytes=managed.num_bytes)
    forget_former_groups()
    gpus = world.gather(world.device.index) if world.device.type == "cuda" else []
    model = shard(recommender, plan, PortableSharder(communication), world.device, replicas, hardware, gpus)
    sharded = get_unwrapped_module(model)
    if config.embeddings.host_cache is not None:
        forget_cached_rows(sharded.tables)
    initialize(sharded.tables, std=config.embeddings.init_std, seed=config.training.seed)
    optimizer = build_optimizer(model, dense, world.parts)
    touch_state(model.fused_optimizer)
    kind = WithTables if manifest.sparse_features else WithoutTables
    pipeline: Pipeline = kind(model, optimizer, world.device, world.parts)
    torch.manual_seed(config.training.seed * 1_000_003 + world.rank)
    knows_r2 = begun is None or "label_deviations" in begun
    deviations = begun["label_deviations"] if begun is not None and knows_r2 else label_deviations(manifest, spec.tasks)
    return Session(
        config,
        world,
        manifest,
        encoder,
        spec,
        sharded.head,
        model,
        optimizer,
        pipeline,
        managed,
        report,
        scales,
        deviations,
        knows_r2,
    )


class Loaded(NamedTuple):
    """The best checkpoint of a run."""

    session: Session
    step: int
    #: What an evaluation measures otherwise than the run does itself: keys of the configuration, each with its value.
    otherwise: list[str]
    #: Other rows than the run's own, to measure it on; None for its own.
    rows: Place | None


def load_session(
    folder: RunFolder, world: World, overrides: list[str], rows: Place | None = None, *, measured: bool = True
) -> Loaded:
    """The best checkpoint of a run, for evaluation and prediction. Where its dataset is gone, there are no rows in the session.

    Args:
        overrides: of the configuration. Other rows and another precision are let pass, see `Loaded.otherwise`.
        rows: a dataset in place of the run's own; the same as `dataset.path` among the overrides.
        measured: the rows are to be measured, so that they must be known to be encoded alike; otherwise the caller compares
            what there is.

    Raises:
        UserError: the folder is no run, has no usable best checkpoint, or one that its run replaces at the moment, or the
            overrides ask for another model or other data.
    """
    config = folder.read_config(overrides)
    balancing_config(config, str(folder.config))  # An option that no strategy has is no other run.
    folder.check_same_run(config, MEASURED_OTHERWISE, remedy=_MEASURED)
    otherwise = [f"{key}={now}" for key, (_, now) in differences(folder.read_config(), config).items()]
    world.raise_together(no_best_yet(folder) if world.is_main else None)
    begun = checkpoint.read_state(folder.best)
    own = folder.read_config().dataset.path
    if config.dataset.path != own:
        if rows is not None and rows != place(config.dataset.path):
            raise ConfigError(f"--input {rows} and dataset.path={config.dataset.path} name other rows each. Give one of them.")
        rows = place(config.dataset.path)
    if rows is not None and measured and folder.check_same_data(begun, rows, other_rows=True):
        encoder, path, rows = rows, str(rows), None  # the run's own, which have moved
    elif rows is not None:
        encoder, path = _encoder_for(folder, place(own), rows, begun), own
        otherwise.insert(0, f"dataset.path={rows}")
    elif (place(own) / MANIFEST).is_file() or not (folder.encoder / MANIFEST).is_file():
        folder.check_same_data(begun, place(own))
        encoder, path = place(own), own
    else:
        encoder, path = _own_encoder(folder, place(own), begun), own
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"path": path})})
    session = build_session(config, world, for_training=False, source=str(folder.config), begun=begun, encoder=encoder)
    with checkpoint.unchanged(folder.best, world):
        checkpoint.verify(folder.best, world)
        state = session.load_best(folder.best)
    return Loaded(session, int(state["step"]), otherwise, rows)


def _encoder_for(folder: RunFolder, own: Place, rows: Place, begun: dict[str, Any]) -> Place:
    """What tells the model of its data when other rows are read: `RUN/encoder`, the run's own dataset, or these rows.

    Raises:
        DataError: it is not of the data that the run was trained on, or there is none.
    """
    kept = (folder.encoder / MANIFEST).is_file()
    if kept and (isinstance(begun.get("data"), dict) or not (own / MANIFEST).is_file()):
        return _own_encoder(folder, own, begun)
    manifest = DatasetManifest.load(rows)
    if "train" in manifest.splits and is_encoded_alike(rows, manifest, begun):
        return rows
    if not (own / MANIFEST).is_file():
        raise DataError(
            f"{folder.path} is a run of a release before: it keeps no encoder ({folder.encoder.name}/{MANIFEST}), and its"
            f" dataset {own} is gone, so what its tables hold cannot be told. Bring the dataset back."
        )
    folder.check_same_data(begun, own)
    return own


def _own_encoder(folder: RunFolder, dataset: Place, begun: dict[str, Any]) -> Place:
    """`RUN/encoder`, which must be of the data of the run; says so where these are gone."""
    check_own_encoder(folder.encoder, DatasetManifest.load(folder.encoder), begun)
    if not (dataset / MANIFEST).is_file():
        logger.info("the dataset %s is gone: what the model has to know of it is taken from %s", dataset, folder.encoder)
    return folder.encoder


def no_best_yet(folder: RunFolder) -> CheckpointError | None:
    """What to tell of a run whose best checkpoint is not there because no validation has chosen one; None of any other."""
    if whole.is_there(folder.best):
        return None
    steps = checkpoint.with_state(folder.checkpoints)
    if any(checkpoint.read_state(path)["selection"]["best"] for path in steps):
        return None
    newest = f"Its newest checkpoint is {steps[-1].name}." if steps else "It has no checkpoint, so it begins at step 0."
    return CheckpointError(
        f"{folder.path} has no best checkpoint: the run ended, or still is, before its first validation. {newest} Let it go on:"
        f" python -m apps.train --config {shlex.quote(str(folder.config))} --run-dir {shlex.quote(str(folder.path))}"
    )
