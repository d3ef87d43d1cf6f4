"""Days written by hand: vocabularies grow by a few values a day, and some of the known ones are absent from a day."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmlrec.schema import DatasetManifest
from tests.datasets import WrittenDataset, rewrite_part, with_vocabularies, write_dataset

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
training: {{batch_size: 50, epochs: 1, log_every_steps: 2, checkpoint_every_steps: 3}}
"""
FIRST_ROWS, NEW_ROWS = 30, 3  # of the first table on the first day, and on each later one; the other tables have a few more


def write_day(folder: Path, number: int, *, rows: int = 300, **options) -> WrittenDataset:
    """Day `number`, from 0 on, as `folder/day-NN`."""
    written = write_dataset(
        folder / f"day-{number + 1:02d}", rows=rows, table_rows=FIRST_ROWS + NEW_ROWS * number, seed=number, **options
    )
    return with_vocabularies(written)


def write_days(folder: Path, count: int, **options) -> list[WrittenDataset]:
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "none"))
    return [write_day(folder, number, **options) for number in range(count)]


def without_ids(written: WrittenDataset, feature: str, ids: range) -> WrittenDataset:
    """The day with id 0 in place of some ids of a sparse feature in train."""
    start = 0
    for part, listed in enumerate(written.manifest.splits["train"].parts):
        table = written.tables["train"].slice(start, listed.num_rows)
        start += listed.num_rows
        column = table[feature].to_numpy()
        column = pa.array(np.where(np.isin(column, ids), 0, column))
        table = table.set_column(table.schema.get_field_index(feature), feature, column)
        written = WrittenDataset(written.folder, rewrite_part(written, table, part), written.tables)
    return written


def read_day(folder: Path) -> WrittenDataset:
    """As it lies on disk; rows are not read."""
    return WrittenDataset(folder, DatasetManifest.load(folder), {})


def ids_of(written: WrittenDataset, feature: str, split: str) -> list[int]:
    """Those of all rows of a split, as they lie on disk."""
    tables = [pq.read_table(written.folder / part.path) for part in written.manifest.splits[split].parts]
    column = pa.concat_tables(tables)[feature].combine_chunks()
    return (column.flatten() if pa.types.is_list(column.type) else column).to_pylist()


def ids_in_train(written: WrittenDataset, feature: str) -> set[int]:
    """The ids that stand in train."""
    return set(ids_of(written, feature, "train"))


def lines(run_dir: Path) -> list[dict]:
    path = run_dir / "days.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
