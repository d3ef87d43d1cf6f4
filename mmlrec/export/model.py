"""From a run's best checkpoint to a folder that scores without torchrec and fbgemm; whole and proven, or absent."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from torch import Tensor

from mmlrec.distributed.stopping import StopSignal
from mmlrec.distributed.world import World, logger
from mmlrec.encoding.encoder import ENCODER_FILE, Encoder
from mmlrec.encoding.mapped import mark_of
from mmlrec.errors import CheckpointError, DataError, UserError
from mmlrec.evaluation.evaluation import predict_split, stopped
from mmlrec.evaluation.prediction import check_same_inputs
from mmlrec.export.card import README, TABLES_FOLDER, make_card, table_file, write_card, write_readme
from mmlrec.export.network import Format, Scorer, export_network, save_network
from mmlrec.export.parity import add_last_bit, beyond_tolerance, compare, compare_encoder, exported_scores, parity_text
from mmlrec.export.tables import CHUNK_BYTES, Precision, write_table
from mmlrec.metrics.gather import PredictionRows, gather_rows
from mmlrec.run_folder import checkpoint
from mmlrec.run_folder.folder import RunFolder
from mmlrec.run_folder.table_rows import TableRows
from mmlrec.schema import DatasetManifest
from mmlrec.serving import load
from mmlrec.serving.card import CARD
from mmlrec.serving.model import ENCODER
from mmlrec.session.recommender import TABLES
from mmlrec.session.session import Loaded, Session, load_session
from mmlrec.slots.stored import read as stored_slots
from mmlrec.storage.new_folder import new_local_folder
from mmlrec.storage.places import Place, place

#: The split that a model is compared on.
_SPLIT = "test"
#: What lies in the folder of an exported model.
_PARTS = {CARD, README, ENCODER, TABLES_FOLDER, *(f"network.{kind}" for kind in get_args(Format))}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What to export, and how.

    Attributes:
        run: folder of the run.
        out: folder to write.
        tables: precision of the tables.
        kind: format of the network.
        dataset: rows to compare the models on, encoded as those of the run; None: those of the run.
        overwrite: replace `out`, if it is there.
    """

    run: RunFolder
    out: Path
    tables: Precision = "fp32"
    kind: Format = "pt2"
    dataset: Place | None = None
    overwrite: bool = False


def export_model(asked: Exported, world: World, stop: StopSignal | None = None) -> None:
    """Write a model folder and prove that it scores as the run's model; all ranks call it, rank 0 writes and prints.

    The run's model is the sharded one in float32, whatever the precision of its training.

    Raises:
        UserError: the run has no usable best checkpoint, there are no rows to compare on, the folder exists, or the scores of
            float32 tables differ by more than the order of arithmetic explains. No part of the folder is left.
    """
    _check_out(asked)
    precision = asked.run.read_config().training.precision
    loaded = load_session(asked.run, world, [] if precision == "fp32" else ["training.precision=fp32"])
    session = loaded.session
    dataset = _rows_to_compare(asked, session)
    reader = session.reader(_SPLIT, asked.dataset)
    title = f"scoring {_SPLIT}"
    own = predict_split(session, reader.sequential(), stop=stop, total=reader.num_batches, title=title)
    rows = gather_rows(own, rank=world.rank, world_size=world.world_size, group=world.control)
    if not session.check_parts(stop) and stop is not None:
        raise stopped(stop, title)
    world.without_limit().on_main(_write, asked, loaded, dataset, rows, stop)  # Large tables take their time.


def _check_out(asked: Exported) -> None:
    """Refuse a place that is taken; with `overwrite` one that holds anything but an exported model."""
    if not asked.out.exists():
        return
    if not asked.overwrite:
        raise UserError(f"{asked.out} exists. Choose another --out, or replace it with --overwrite.")
    names = {path.name for path in asked.out.iterdir()} if asked.out.is_dir() else {asked.out.name}
    if others := sorted(names - _PARTS if CARD in names else names):
        raise UserError(f"{asked.out} is no exported model: it holds {others[0]}, which is not deleted. Choose another --out.")


def _rows_to_compare(asked: Exported, session: Session) -> Place:
    own = place(session.config.dataset.path)
    if asked.dataset is None and session.encoder != own:
        raise DataError(
            f"the dataset of the run, {own}, is gone, and an export is compared with the run's model on rows: bring it back, or"
            " give rows that are encoded alike: --input DATASET; in Python, data=."
        )
    dataset = asked.dataset or own
    manifest = session.manifest if asked.dataset is None else DatasetManifest.load(dataset)
    if asked.dataset is not None:
        check_same_inputs(session, manifest, dataset)
    if _SPLIT not in manifest.splits or not manifest.splits[_SPLIT].num_rows:
        raise DataError(
            f"{dataset} has no rows in split '{_SPLIT}', and an export is compared with the run's model on rows: give a dataset"
            " that has some, encoded alike: --input DATASET; in Python, data=."
        )
    return dataset


def _write(asked: Exported, loaded: Loaded, dataset: Place, rows: PredictionRows, stop: StopSignal | None) -> None:
    session, run = loaded.session, asked.run
    manifest = session.manifest if asked.dataset is None else DatasetManifest.load(dataset)
    with new_local_folder(asked.out, "model") as folder:
        scorer = Scorer(copy.deepcopy(session.network).cpu(), session.scales)
        save_network(export_network(scorer, asked.kind), folder / f"network.{asked.kind}", asked.kind)
        encoder = Encoder.load(session.encoder).with_slots({table: stored_slots(run.best, table) for table in session.managed})
        encoder.save(folder / ENCODER)
        stored = _write_tables(asked, loaded, folder, stop)
        result = run.read_result()
        card = make_card(
            session, encoder, scorer, stored, asked.tables, asked.kind, result if result.get("step") == loaded.step else {}
        )
        written = [f"{ENCODER}/{ENCODER_FILE}", card["network"]["file"], *(table["file"] for table in card["tables"])]
        card["files"] = {name: mark_of(folder / name) for name in written}
        write_card(folder, card)
        model = load(folder)
        scores = exported_scores(model, dataset, manifest, _SPLIT)
        card["parity"] = compare(session, rows, scores, scorer.outputs, _SPLIT, dataset)
        if asked.tables == "fp32" and beyond_tolerance(card["parity"]):
            moved = exported_scores(model, dataset, manifest, _SPLIT, next_numbers=True) - scores
            add_last_bit(card["parity"], moved, scorer.outputs)
        card["parity"]["encoder"] = compare_encoder(model, session, dataset, manifest, _SPLIT)
        print(parity_text(card["parity"]), flush=True)  # noqa: T201
        if asked.tables == "fp32" and (apart := beyond_tolerance(card["parity"])):
            raise DataError(
                f"{asked.out}: not written: the exported model does not score as the run's model does.\n  "
                + "\n  ".join(apart)
                + "\nThis is a fault of the export or of the method's code: please report it, with the method and its options."
            )
        write_card(folder, card)
        write_readme(folder, card)
        _check_out(asked)  # Again: much time has gone by, and what has come there meanwhile is not replaced.
    logger.info("%s: %s on %s, tables in %s", asked.out, card["method"], card["name"], asked.tables)


def _write_tables(asked: Exported, loaded: Loaded, folder: Path, stop: StopSignal | None) -> dict[str, tuple[int, int]]:
    """The tables of the checkpoint that was loaded; table -> rows and width."""
    session, best = loaded.session, asked.run.best
    branches = [name for name, _, _ in session.branches()]
    keys = {table["table"]: f"model.{TABLES}.embedding_bags.{table['table']}.weight" for table in session.plan}
    (folder / TABLES_FOLDER).mkdir()
    _check_step(best, loaded.step)
    tables = TableRows(best, list(keys.values()))
    for name, key in keys.items():
        shape = tables.shape(key)
        rows = _until(stop, tables.read(key, max(1, CHUNK_BYTES // (4 * shape[1]))), asked.out)
        write_table(folder / table_file(name, branches), name, rows, shape, asked.tables)
    _check_step(best, loaded.step)
    return {name: tables.shape(key) for name, key in keys.items()}


def _until(stop: StopSignal | None, rows: Iterator[Tensor], out: Path) -> Iterator[Tensor]:
    for some in rows:
        if stop is not None and stop.received:  # of this rank, which alone writes
            raise stop.interrupted(f"{out}: not written: stopped by a signal. Run the same command again.")
        yield some


def _check_step(best: Place, step: int) -> None:
    if int(checkpoint.read_state(best)["step"]) != step:
        raise CheckpointError(f"{best} was replaced by its run while it was read. Give the command again.")
