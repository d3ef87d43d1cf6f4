"""Whether the labels of a chain of tasks imply each other, counted on the label columns alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.errors import DataError
from mmlrec.schema import Part, label_column
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place


def count_violations(folder: Place, parts: Sequence[Part], chain: Sequence[str]) -> list[int]:
    """Rows in which a step of the chain is positive and the one before is not; a missing label violates nothing.

    Args:
        parts: files to read, all of a split or some.
        chain: tasks, first step first.

    Returns:
        A count for each two consecutive steps.

    Raises:
        DataError: a file cannot be read.
    """
    columns = [label_column(task) for task in chain]
    counts = [0] * (len(chain) - 1)
    for part in parts:
        path = folder / part.path
        try:
            with open_parquet(path, part.num_bytes, part.sha256) as file:
                for batch in file.iter_batches(batch_size=1 << 18, columns=columns):
                    for step, (before, this) in enumerate(pairwise(columns)):
                        counts[step] += pc.sum(pc.greater(batch[this], batch[before])).as_py() or 0
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: its labels cannot be read: {error}. Run the preprocessing again, or restore the file."
            ) from error
    return counts
