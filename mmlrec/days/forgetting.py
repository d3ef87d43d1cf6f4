"""Which rows of the tables have not been seen for so many days that they start afresh.

Each day leaves `last_seen.npz` in its run folder: for each table, the number of the day on which a row last stood in train.
Managed tables are left out: their rule says when a row goes to another id.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmlrec.errors import DataError, UserError
from mmlrec.run_folder.folder import delete_leftovers, write_atomically
from mmlrec.run_folder.lock import unwritable
from mmlrec.schema import DatasetManifest
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place, read

LAST_SEEN = "last_seen.npz"
_NEVER = -2
#: Before the name of a table, as numpy takes the names of arrays for arguments.
_PREFIX = "table."

#: Table -> [num_rows] int32, number of the day on which a row last stood in train: from 0 on; -1 before the first, -2 never.
LastSeen = dict[str, NDArray[np.int32]]


def note_seen(before: LastSeen, folder: Place, manifest: DatasetManifest, number: int) -> LastSeen:
    """The days on which rows were last seen, with those of one more day.

    Args:
        before: of the days before; tables may have grown since.
        folder: the dataset of the day.
        number: of the day, from 0 on.

    Raises:
        DataError: a part cannot be read, or has an id beyond its table.
    """
    seen: LastSeen = {}
    for table in (table for table in manifest.tables if not table.managed):
        known = before.get(table.name, np.empty(0, np.int32))
        seen[table.name] = np.append(known, np.full(table.num_rows - len(known), _NEVER, np.int32))
    features = {feature.name: str(feature.table) for feature in manifest.sparse_features if feature.table in seen}
    for part in manifest.splits["train"].parts if features else ():
        path = folder / part.path
        try:
            with open_parquet(path, part.num_bytes, part.sha256) as file:
                for batch in file.iter_batches(columns=list(features)):
                    for name, of_feature in features.items():
                        column = batch.column(name)
                        ids = column.flatten() if pa.types.is_list(column.type) else column
                        seen[of_feature][ids.to_numpy()] = number
        except (OSError, pa.ArrowException, IndexError) as error:
            raise DataError(f"{path}: its ids cannot be read: {error}. Run the preprocessing again.") from error
    return seen


def forgotten_rows(seen: LastSeen, number: int, forget_after: int) -> dict[str, NDArray[np.int64]]:
    """Table -> rows that start afresh before a day is trained: those that the last `forget_after` days before it lacked.

    A row is given once in an absence. Row 0, which stands for no value, never is.

    Args:
        seen: of the days before.
        number: of the day, from 0 on.
    """
    last = number - 1 - forget_after
    if last <= _NEVER:
        return {}
    rows = {table: np.flatnonzero(days == last) for table, days in seen.items()}
    return {table: of_table[of_table > 0] for table, of_table in rows.items()}


def seen_before(manifest: DatasetManifest) -> LastSeen:
    """Those of a run that the first day begins with: all its rows were last seen on the day before."""
    return {table.name: np.full(table.num_rows, -1, np.int32) for table in manifest.tables if not table.managed}


def save_seen(run_dir: Place, seen: LastSeen) -> None:
    """Put them into the run folder of a day, whole.

    Raises:
        UserError: the folder cannot be written.
    """
    content = io.BytesIO()
    arrays: dict[str, Any] = {_PREFIX + table: days for table, days in seen.items()}
    np.savez(content, **arrays)
    try:
        delete_leftovers(run_dir / LAST_SEEN)
        write_atomically(run_dir / LAST_SEEN, content.getvalue())
    except OSError as error:
        raise unwritable(run_dir, error) from error


def load_seen(run_dir: Place) -> LastSeen:
    """Those that a day left.

    Raises:
        UserError: they are gone or damaged.
    """
    path = run_dir / LAST_SEEN
    try:
        with np.load(io.BytesIO(read(path))) as arrays:
            return {name.removeprefix(_PREFIX): arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}. Bring the run folder of that day back.") from error
