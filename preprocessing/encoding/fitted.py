"""The fitted parts of another dataset, given to a new one: vocabularies, ranges, means and quantiles are taken, not found.

One mechanism for two uses. *Frozen* parts stay as they are, and what they do not know is id 0. Parts that *grow* have the same
ids for what they know; values that are new in train rows, and reach `min_count` there, stand behind, in the usual order.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from mmlrec.encoding.folders import encoder_folder
from mmlrec.errors import DataError
from mmlrec.schema import ENCODING_FORM, DatasetManifest, Encoding, Table
from mmlrec.storage.parquet import open_parquet
from mmlrec.storage.places import Place, get_file

_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class GivenVocabulary:
    """A file of values, or of quantiles, whose entries have the ids 1, 2, ... in their order."""

    path: Place
    num_entries: int

    def num_bytes(self) -> int:
        """Of the values, in memory."""
        with open_parquet(self.path) as file:
            groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
            return sum(group.column(0).total_uncompressed_size for group in groups)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Columns `value` and `count` in the order of ids, some at a time."""
        with open_parquet(self.path) as file:
            yield from file.iter_batches(_BATCH_ROWS, columns=["value", "count"])

    def table(self) -> pa.Table:
        """All `batches` at once."""
        with open_parquet(self.path) as file:
            return file.read(columns=["value", "count"])

    def copy(self, path: Path) -> None:
        """Put the file, as it is, to another place."""
        if isinstance(self.path, Path):
            shutil.copyfile(self.path, path)
        else:
            get_file(self.path, path)


@dataclass(frozen=True)
class Fitted:
    """The fitted parts of a dataset folder, or of what a run keeps of one. Made by `of`.

    Attributes:
        folder: holds manifest.json and the vocabularies.
        grows: values that are new in train rows get ids behind those that are known.
        refit_ranges: ranges, means and quantiles are found anew on train rows, which is another encoding.
    """

    folder: Place
    manifest: DatasetManifest
    encoding: Encoding
    grows: bool
    refit_ranges: bool

    @classmethod
    def of(cls, folder: Place, *, grows: bool, refit_ranges: bool) -> Fitted:
        """Those of a dataset, or of the dataset of a run.

        Raises:
            UserError: the folder is neither.
            DataError: it has no record of its encoding that this release can compare.
        """
        folder = encoder_folder(folder)
        manifest = DatasetManifest.load(folder)
        if manifest.encoding is None or manifest.encoding.form != ENCODING_FORM:
            raise DataError(
                f"{folder} does not say how it is encoded in a way that this release knows, so no other rows can be encoded"
                " alike. Run the preprocessing again."
            )
        return cls(folder, manifest, manifest.encoding, grows, refit_ranges)

    @property
    def frozen(self) -> bool:
        """Whether nothing is fitted at all."""
        return not (self.grows or self.refit_ranges)

    @property
    def ranges(self) -> dict[str, list[float] | None]:
        """Scaled feature -> least and greatest value of the train rows; None where all were missing."""
        found: dict[str, list[float] | None] = self.manifest.preprocessing.get("dense_ranges", {})
        return found

    @property
    def fills(self) -> dict[str, float]:
        """Feature with a fill value -> what a missing value becomes."""
        found: dict[str, float] = self.manifest.preprocessing.get("dense_fills", {})
        return found

    def missing_rate(self, feature: str) -> float | None:
        """Share of the train rows that had no value of a feature; None where that is not known."""
        train, counts = self.manifest.splits.get("train"), self.manifest.statistics.get("missing", {}).get(feature, {})
        if train is not None and train.num_rows and "train" in counts:
            return float(counts["train"] / train.num_rows)
        of_splits = self.manifest.statistics.get("against_train", {}).get(feature, {})
        return next((of_split["missing_rate_in_train"] for of_split in of_splits.values()), None)

    def vocabulary(self, table: str) -> GivenVocabulary:
        """The vocabulary of a table, or its quantiles."""
        of_table = self._tables[table]
        return GivenVocabulary(self.folder / str(of_table.vocabulary), of_table.num_rows - 1)

    @cached_property
    def _tables(self) -> dict[str, Table]:
        return self.manifest.by_name
