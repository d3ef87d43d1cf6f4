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
        ConfigError: it is the run itself, or its tables have another width.
        UserError: it is no run, has no usable best checkpoint, or neither its encoder nor its dataset is there.
    """
    assert config.init_from is not None
    there = place(config.init_from)
    if str(there.absolute()) == str(run_dir.absolute()) or there.resolve() == run_dir.resolve():
        raise ConfigError(f"init_from: {there} is the run itself. Name another one, or choose another --run-dir.")
    folder = RunFolder(there)
    before = folder.read_config()
    if before.embeddings.dim != config.embeddings.dim:
        raise ConfigError(
            f"init_from: the tables of {there} have width {before.embeddings.dim}, embeddings.dim is {config.embeddings.dim}:"
            f" no row could be taken. Set embeddings.dim={before.embeddings.dim}, or leave init_from out."
        )
    world.raise_together(no_best_yet(folder) if world.is_main else None)
    world.at(f"checking the checkpoints of {there}")
    checkpoint.verify(folder.best, world)
    state = checkpoint.read_state(folder.best)
    return Source(folder, before, _encoded(folder, before, state), state, _with_optimizer(folder, int(state["step"]), world))


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


def _with_optimizer(folder: RunFolder, step: int, world: World) -> Place | None:
    """The whole checkpoint with the optimizers' state: that of the step of the best, else the newest."""
    found = checkpoint.with_state(folder.checkpoints) if world.is_main else []
    order = sorted(found, key=lambda path: (checkpoint.step_of(path) == step, checkpoint.step_of(path)), reverse=True)
    names = world.from_main([path.name for path in order])
    assert isinstance(names, list)
    for name in names:
        reason = whole.damage(folder.checkpoints / name, world)
        if reason is None:
            return folder.checkpoints / name
        if world.is_main:
            logger.warning("init_from: passing over a damaged checkpoint: %s", reason)
    return None
