"""The dataset folder comes into being at once: built beside its place, then renamed, or uploaded. Never half."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmlrec.errors import DataError
from mmlrec.schema import DatasetManifest
from mmlrec.storage.new_folder import new_local_folder, temporary_folder
from mmlrec.storage.parquet import stored_size
from mmlrec.storage.places import Place
from preprocessing.writing import upload

REMEDY = "Make the dataset again with --overwrite."
_WHAT = "dataset"


def check_files(folder: Place, manifest: DatasetManifest) -> None:
    """Raise DataError when a part of the dataset is missing or cut, or a vocabulary is missing."""
    parts = {part.path: part.num_bytes for split in manifest.splits.values() for part in split.parts}
    for name in [*parts, *(table.vocabulary for table in manifest.tables if table.vocabulary)]:
        size = stored_size(folder / name)
        if size is None or size != parts.get(name, size):
            raise DataError(f"{folder / name} is missing or cut. {REMEDY}")


@contextmanager
def new_folder(out: Place) -> Iterator[Path]:
    """A temporary folder beside `out`; at a clean exit it takes the place of `out`, otherwise it is removed.

    What a killed run left behind is removed at the start. An old `out` is replaced only when the new one is complete. Of an
    address the folder is one of this machine, uploaded at a clean exit: see upload.py.

    Raises:
        DataError: the place cannot be written, the disk is full, or another run is writing there.
        StorageError: the object store refuses, or cannot be reached.
    """
    if not isinstance(out, Path):
        with temporary_folder(out, upload.staging_folder(out), _WHAT) as staging, upload.target(out) as target:
            yield staging
            target.fill(staging)
        return
    with new_local_folder(out, _WHAT) as temporary:
        yield temporary
