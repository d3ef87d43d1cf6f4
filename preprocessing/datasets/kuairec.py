"""KuaiRec 2.0: watched to the end, watched twice; scenarios by the user's activity (docs/datasets/kuairec.md).

Gao et al., "KuaiRec: A Fully-observed Dataset and Insights for Evaluating Recommender Systems", CIKM 2022.

The big matrix holds what users watched as they were served; the small one nearly all pairs of 1,411 users and 3,327 videos.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.schema import SCENARIO_COLUMN, Scenario, Task
from preprocessing.dataset import Dataset, multi, sparse
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import Block, RawFile, RawFolder
from preprocessing.rows.join import IdIndex
from preprocessing.rows.kuaishou import ACTIVITY, good_users, user_features, user_table
from preprocessing.split_rules import SIDE_COLUMN, FileSplit

_BIG, _SMALL = "big_matrix.csv", "small_matrix.csv"
_ID = pa.int64()
_DAY = "^20[0-9]{2}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])$"


class KuaiRec(Dataset):
    """12,530,806 rows of 7,176 users and 10,728 videos."""

    name = "kuairec"
    next_config = "configs/mtl/kuairec.yaml"
    summary = "12,530,806 videos watched; two tasks of the watch ratio, scenarios by the user's activity"
    home = "https://kuairec.com/"
    terms = (
        "KuaiRec (Gao et al. 2022, doi:10.1145/3511808.3557220): Creative Commons Attribution-ShareAlike 4.0 (CC BY-SA 4.0)."
    )
    hint = "No login. KuaiRec.zip may be unpacked into --raw as it is: its folders (KuaiRec 2.0/data) are looked into."
    archive = "https://zenodo.org/records/18164998/files/KuaiRec.zip"
    archive_md5 = "261550d472c48eff4990fb13c0e5bcf7"
    raw_files: tuple[RawFile, ...] = (RawFile(_BIG), RawFile("user_features.csv"), RawFile("item_categories.csv"))
    examples = """examples:
  python -m preprocessing kuairec --raw raw/kuairec --out data/kuairec --download
  python -m preprocessing kuairec --raw raw/kuairec --out data/kuairec-ids --ids
  python -m preprocessing kuairec --raw raw/kuairec --out data/kuairec-small --variant train-big-eval-small
"""

    def __init__(self, options: argparse.Namespace) -> None:
        self.parity: bool = options.parity
        self._both: bool = options.variant == "train-big-eval-small"
        self._ids: bool = options.ids
        # The log repeats views; of a copy in train, test would measure what was learnt by heart. The benchmark did not mind.
        self.duplicates = "keep" if self.parity or self._both else "keep_together"
        if self._both:
            self.raw_files = (*self.raw_files, RawFile(_SMALL))
            self.split = FileSplit(valid_from="test", one_in=2)
        self.features = (
            *([sparse("user_id", _ID), sparse("video_id", _ID)] if self._ids else []),
            *([] if self._both else [sparse("date", _ID)]),
            *user_features(self.parity),
            sparse("feat") if self.parity else multi("feat", _ID),
        )
        self.tasks = (Task(name="label", role="ctr", implied_by_next=True), Task(name="label2", role="ctcvr"))
        self.scenario = Scenario(name="user_active_degree", values=ACTIVITY)
        self.keys = {"user_id": _ID, "video_id": _ID}
        self.group_key = "user_id"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--variant`, `--ids`."""
        parser.add_argument(
            "--variant",
            choices=["big", "train-big-eval-small"],
            default="big",
            help="big: big_matrix.csv cut 8:1:1 at random; train-big-eval-small: train on it, small_matrix.csv halved at random"
            " into valid and test, without the date, which is partly missing there (default: big)",
        )
        parser.add_argument(
            "--ids", action="store_true", help="take user_id and video_id as features, which the benchmark lacks"
        )

    def prepare(self, raw: RawFolder) -> None:
        """Users and the tags of videos."""
        users = raw.table(user_table("user_features.csv"), lambda block: good_users(block, self.parity))
        videos = raw.table(
            DelimitedText("item_categories.csv", ",", {"video_id": _ID, "feat": pa.string()}, header=True, quoted=True),
            self._good_videos,
        )
        self._users, self._user_index = users.table, IdIndex("user_id", [users], raw.bad_rows)
        self._feat, self._video_index = videos.table["feat"], IdIndex("video_id", [videos], raw.bad_rows)
        activity = pc.index_in(users.table["user_active_degree"], pa.array(ACTIVITY))
        self._activity = activity.to_numpy().astype(np.int64)

    def sources(self) -> Iterator[DelimitedText]:
        """The big matrix, and the small one where it is valid and test."""
        columns = {"user_id": _ID, "video_id": _ID, "watch_ratio": pa.float64()}
        optional, dated = self.may_lack("watch_ratio"), columns if self._both else columns | {"date": _ID}
        yield DelimitedText(_BIG, ",", dated, header=True, optional=optional)
        if self._both:
            yield DelimitedText(_SMALL, ",", columns, header=True, optional=optional)

    def rows(self, block: Block) -> dict[str, Any]:
        """Views joined with users and videos."""
        for name in block.table.column_names:
            if name in self.may_lack("watch_ratio"):
                continue
            block = block.require(block.present(name), f"the {name} is missing. Mend the line or fetch the file again.")
        if not self._both:
            day = pc.match_substring_regex(block.table["date"].cast(pa.string()), _DAY).to_numpy()
            block = block.require(day, "date must be a day such as 20200705, found {date}. Mend the line.")
        good = pc.greater_equal(block.table["watch_ratio"], 0).fill_null(True).to_numpy()
        block = block.require(good, "the watch_ratio must be 0 or more, found {watch_ratio}. Mend the line.")
        block, _ = self._user_index.find(block)
        block, video_rows = self._video_index.find(block)
        user_rows = self._user_index.locate(block.table["user_id"].to_numpy())
        views, ratio = block.table, block.table["watch_ratio"]
        users = self._users.take(user_rows)
        columns = {name: users[name] for name in users.column_names} | {name: views[name] for name in views.column_names}
        return columns | {
            "feat": self._feat.take(video_rows),
            "label.label": pc.greater_equal(ratio, 1).cast(pa.float32()),
            "label.label2": pc.greater(ratio, 2).cast(pa.float32()),
            SCENARIO_COLUMN: self._activity[user_rows],
            "key.user_id": views["user_id"],
            "key.video_id": views["video_id"],
            SIDE_COLUMN: np.full(len(views), 2 if block.source.name == _SMALL else 0),
            **self.places(block),
        }

    def _good_videos(self, videos: Block) -> Block:
        """Tags of a video as a list of numbers, in the parity form as the text that the file has."""
        videos = videos.require(videos.present("video_id"), "the video_id is missing. Mend the line.")
        tag = "(0|[1-9][0-9]{0,8})"
        good = pc.match_substring_regex(videos.table["feat"], rf"^\[({tag}(, ?{tag})*)?\]$").fill_null(False)
        good = good.to_numpy(zero_copy_only=False)
        videos = videos.require(good, "feat must be a list of tags such as [27, 9], found {feat}. Mend the line.")
        if self.parity:
            return videos
        tags = pa.array([json.loads(text) for text in videos.table["feat"].to_pylist()], pa.list_(_ID))
        return replace(videos, table=videos.table.set_column(1, "feat", tags))


DATASETS = (KuaiRec,)
