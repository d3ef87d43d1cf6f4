"""The run that another one begins with: its best checkpoint, and how its data were encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmlrec.config import RunConfig
from mmlrec.distributed.world import World, logger
from mmlrec.errors import ConfigError, DataError
from mmlrec.run_folder import checkpoint, whole
from mmlrec.run_folder.encoder import check_own_encoder
from mmlrec.run_folder.folder import RunFolder
from mmlrec.schema import MANIFEST, DatasetManifest
from mmlrec.session.session import no_best_yet
from mmlrec.storage.places import Place, place
from mmlrec.warm_start.rows import Encoded


@dataclass(frozen=True)
class Source:
    """A run to begin with.

    Attributes:
        state: of its best checkpoint.
        optimizer: the checkpoint that the optimizers' state is taken from, as the best holds weights only; None where none is.
    """

    folder: RunFolder
    config: RunConfig
    encoded: Encoded
    state: dict[str, Any]
    optimizer: Place | None

    @property
    def scales(self) -> dict[str, tuple[float, float]]:
        """Regression task -> mean and deviation of the labels that its network was trained on."""
        return {name: (mean, deviation) for name, (mean, deviation) in self.state.get("label_scales", {}).items()}


def open_source(config: RunConfig, run_dir: Place, world: World) -> Source:
    """The run that `init_from` names, its checkpoints checked; all ranks call it together.

    Args:
        run_dir: of the run that begins.

    Raises:
        ConfigError: it is the run itself, or all its tables have another width.
        UserError: it is no run, has no usable best checkpoint, or neither its encoder nor its dataset is there.
    """
    assert config.init_from is not None
    there = place(config.init_from)
    if str(there.absolute()) == str(run_dir.absolute()) or there.resolve() == run_dir.resolve():
        raise ConfigError(f"init_from: {there} is the run itself. Name another one, or choose another --run-dir.")
    folder = RunFolder(there)
    before = folder.read_config()
    _check_widths(before, config)
    world.raise_together(no_best_yet(folder) if world.is_main else None)
    world.at(f"checking the checkpoints of {there}")
    checkpoint.verify(folder.best, world)
    state = checkpoint.read_state(folder.best)
    return Source(folder, before, _encoded(folder, before, state), state, _with_optimizer(folder, world))


def _check_widths(before: RunConfig, config: RunConfig) -> None:
    """Refuse a run of which no table is as wide as here; tables of some are, see `take`."""
    tables = [table.name for table in DatasetManifest.load(place(config.dataset.path)).tables]
    old, new = before.embeddings, config.embeddings
    if not tables or any(old.width(name) == new.width(name) for name in tables):
        return
    widths = ", ".join(map(str, sorted({old.width(name) for name in tables})))
    by_table = f", embeddings.table_dim {new.table_dim}" if new.table_dim else ""
    theirs = f" and embeddings.table_dim={old.table_dim}" if old.table_dim else ""
    raise ConfigError(
        f"init_from: the tables of {config.init_from} have width {widths}, embeddings.dim is {new.dim}{by_table}: no row could"
        f" be taken. Set embeddings.dim={old.dim}{theirs}, or leave init_from out."
    )


def _encoded(folder: RunFolder, config: RunConfig, state: dict[str, Any]) -> Encoded:
    """How the data of a run were encoded: by its own record, or by its dataset where that is still there."""
    if (folder.encoder / MANIFEST).is_file():
        manifest = DatasetManifest.load(folder.encoder)
        check_own_encoder(folder.encoder, manifest, state)
        return Encoded(manifest, folder.encoder)
    dataset = place(config.dataset.path)
    if not (dataset / MANIFEST).is_file():
        raise DataError(
            f"init_from: {folder.path} has no {folder.encoder.name}/ (an earlier release has written it), and its dataset"
            f" {dataset} is gone, so nothing says which row stands for which value. Bring the dataset back."
        )
    folder.check_same_data(state, dataset)
    return Encoded(DatasetManifest.load(dataset), dataset)


def _with_optimizer(folder: RunFolder, world: World) -> Place | None:
    """The whole checkpoint with the optimizers' state: the newest.

    Not that of the step of the best, which is there or not by when the run was interrupted: a run that begins with one that was
    is the same to the bit as with one that was not.
    """
    found = checkpoint.with_state(folder.checkpoints) if world.is_main else []
    names = world.from_main([path.name for path in reversed(found)])
    assert isinstance(names, list)
    for name in names:
        reason = whole.damage(folder.checkpoints / name, world)
        if reason is None:
            return folder.checkpoints / name
        if world.is_main:
            logger.warning("init_from: passing over a damaged checkpoint: %s", reason)
    return None
