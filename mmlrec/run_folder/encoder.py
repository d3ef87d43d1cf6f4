"""`RUN/encoder/`: how the run's data are encoded, so that new rows can be encoded alike when the dataset is gone.

It is a dataset folder without rows: the manifest, in which no split has parts (counts and statistics stay), and the
vocabularies that it names, hard links where the file system has them. Whole or absent: on a file system it gets its name last,
on an object store its manifest is put last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path, PurePosixPath

from mmlrec.distributed.world import logger
from mmlrec.errors import DataError, UserError
from mmlrec.identity import data_facts, encoding_differences, rows_alone_differ
from mmlrec.run_folder import whole
from mmlrec.schema import MANIFEST, DatasetManifest, Encoding
from mmlrec.storage.places import Place, get_file, put_file, read
from mmlrec.storage.scratch import ScratchFolder


def write_encoder(there: Place, dataset: Place, manifest: DatasetManifest, start: str) -> None:
    """Write the encoder of a run that starts, or goes on, unless it is there; on rank 0. One of other data is replaced.

    Where the dataset lacks a vocabulary that its manifest names, none is written, and a warning says so.

    Args:
        there: `RUN/encoder`.
        manifest: of the dataset.
        start: of this run alone.

    Raises:
        DataError: the manifest names a vocabulary outside of its folder.
        UserError: it cannot be written.
        StorageError: a store cannot be reached, or refuses.
    """
    names = [table.vocabulary for table in manifest.tables if table.vocabulary is not None]
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{dataset / MANIFEST}: vocabulary {name!r} lies outside of the dataset. Do not use this dataset.")
    splits = {name: split.model_copy(update={"parts": []}) for name, split in manifest.splits.items()}
    content = manifest.model_copy(update={"splits": splits}).text().encode()
    try:
        if isinstance(there, Path):
            for leftover in there.parent.glob(f"{there.name}.*{whole.TEMPORARY}"):
                whole.delete(leftover)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if read(there / MANIFEST) == content:
                return
        if missing := [name for name in names if not (dataset / name).is_file()]:
            logger.warning(
                "note: %s is not there, so %s is not written: new rows cannot be encoded as those of this run, nor can another"
                " run begin with its tables. Bring the vocabulary back, and give the command again.",
                dataset / missing[0],
                there,
            )
            return
        if isinstance(there, Path):
            _write(there, dataset, names, content, start)
        else:
            if (there / MANIFEST).is_file():  # first: what is half replaced must not pass for whole
                (there / MANIFEST).unlink()
            for name in names:
                _copy(dataset / name, there / name)
            (there / MANIFEST).write_bytes(content)
    except OSError as error:
        raise UserError(f"{there}: cannot be written: {error}. Free space or choose another run_dir.") from error


def _write(there: Path, dataset: Place, names: list[str], content: bytes, start: str) -> None:
    temporary = whole.make(there, start)
    assert isinstance(temporary, Path)
    try:
        for name in names:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(dataset / name, temporary / name)
        whole.write_synced(temporary / MANIFEST, content)
        whole.sync(temporary)
        if there.exists():
            whole.retire(there, whole.delete)
        temporary.rename(there)
        whole.sync(there.parent)
    except BaseException:
        whole.delete(temporary)
        raise


def _copy(source: Place, target: Place) -> None:
    if isinstance(source, Path):
        if isinstance(target, Path):
            try:
                os.link(source.resolve(), target)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source, target)
                whole.sync(target)
        else:
            put_file(source, target)
    elif isinstance(target, Path):
        get_file(source, target)
        whole.sync(target)
    else:
        with ScratchFolder("vocabulary") as scratch:
            get_file(source, scratch.path / "copy")
            put_file(scratch.path / "copy", target)


def is_encoded_alike(there: Place, manifest: DatasetManifest, state: dict[str, object]) -> bool:
    """Whether a dataset is known to be encoded as that of a run, whatever its labels are.

    Args:
        manifest: of the dataset.
        state: of a checkpoint of the run.
    """
    before = Encoding.read(state.get("encoding"), str(there))
    if before is None or not before.comparable(manifest.encoding):
        return False
    return not encoding_differences(before, manifest, there, scenario=True, labels=False)


def check_own_encoder(there: Place, manifest: DatasetManifest, state: dict[str, object]) -> None:
    """Refuse an encoder that is not of the data that the run was trained on.

    Args:
        manifest: of the encoder.
        state: of a checkpoint of the run.

    Raises:
        DataError: it is another one, as where files were copied together, or it is damaged.
    """
    recorded, before = state.get("data"), Encoding.read(state.get("encoding"), str(there.parent))
    same = isinstance(recorded, dict) and rows_alone_differ(recorded, data_facts(manifest))
    if same and before is not None and before.comparable(manifest.encoding):
        same = not encoding_differences(before, manifest, there, scenario=True, labels=True)
    if not same:
        raise DataError(f"{there} is not of the data that this run was trained on. Bring the dataset, or that folder, back.")
