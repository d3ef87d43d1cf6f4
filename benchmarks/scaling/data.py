"""The data of a point: tables that no dataset has, and a few batches of generated rows, which are all that a rank needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from benchmarks.scaling.points import FEATURES, NUMBERS, Point
from mmlrec.config import RunConfig
from mmlrec.data.batch import Batch
from mmlrec.registry import load
from mmlrec.schema import SPLITS, DatasetManifest, Setting, Split
from mmlrec.session.table_list import DescribedTable, TableList
from preprocessing.rows.zipf import Zipf


def described(point: Point) -> TableList:
    """The tables of a point, as `apps.plan --tables` takes them."""
    return TableList(
        name="scaling",
        tables=[DescribedTable(name=f"sparse_{f}", rows=point.ids // FEATURES) for f in range(FEATURES)],
        dense=NUMBERS,
        tasks=point.tasks,
        scenarios=point.scenarios,
    )


def manifest_of(point: Point) -> DatasetManifest:
    """The same as the manifest of a dataset that has no rows."""
    empty = Split(parts=[], num_rows=0, label_counts={})
    return described(point).manifest().model_copy(update={"splits": dict.fromkeys(SPLITS, empty)})


def config_of(point: Point, name: str, overrides: list[str], folder: Path) -> RunConfig:
    """The configuration of a training of a point.

    Args:
        name: of the configuration that all points share.
        folder: where its manifest lies, or would.

    Raises:
        ConfigError: the configuration does not fit.
    """
    setting = Setting.MTL if point.scenarios == 1 else Setting.MSL if point.tasks == 1 else Setting.MTMSL
    given = [f"dataset.path={folder}", f"dataset.setting={setting.value}", f"training.batch_size={point.batch}"]
    return load(name, [*overrides, *given])


def batches_of(point: Point, rank: int, count: int, zipf: float) -> list[Batch]:
    """Some batches of a rank, on the CPU; a function of point and rank.

    Args:
        zipf: exponent of the distribution of ids, see `preprocessing synthetic --zipf`; 0: all rows of a table alike.
    """
    rows = -(-point.batch // point.ranks)
    random = np.random.Generator(np.random.Philox(key=[rank, 0]))
    draw = Zipf(point.ids // FEATURES - 1, zipf)  # row 0 stands for missing values
    keys = [f"sparse_{f}" for f in range(FEATURES)]
    found = []
    for _ in range(count):
        ids = torch.from_numpy(draw.draw(random, FEATURES * rows))
        scenario = torch.from_numpy(random.integers(point.scenarios, size=rows))
        labels = torch.from_numpy(random.integers(2, size=(rows, point.tasks)).astype(np.float32))
        found.append(
            Batch(
                sparse=KeyedJaggedTensor(keys, ids, lengths=torch.ones(FEATURES * rows, dtype=torch.int32), stride=rows),
                dense=torch.from_numpy(random.random((rows, NUMBERS), dtype=np.float32)),
                labels=labels,
                mask=torch.ones_like(labels),
                scenario=scenario,
                weight=torch.ones(rows),
                valid=torch.ones(rows, dtype=torch.bool),
                row=torch.arange(rows),
                group=torch.zeros(rows, dtype=torch.int64),
            )
        )
    return found
