"""KuaiRand: clicks and long views, scenarios by the tab of the app (docs/datasets/kuairand.md).

Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM 2022.

Of the logs, the two standard ones are read. What happened after the view (play time, likes, comments) is no feature.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.errors import ConfigError
from mmlrec.schema import SCENARIO_COLUMN, Scenario, Task
from preprocessing.dataset import Dataset, dense, multi, sparse
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import Block, RawFile, RawFolder
from preprocessing.rows.join import IdIndex, RowsOnDisk
from preprocessing.rows.kuaishou import good_users, user_features, user_table, whole_numbers, without_empty_texts
from preprocessing.split_rules import TimeSplit

_ID, _TEXT = pa.int64(), pa.string()
_LOG = dict.fromkeys(("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "long_view", "tab"), _ID)
_VIDEO_TEXTS = ("video_type", "upload_dt", "upload_type")
_VIDEO_CODES = ("author_id", "visible_status", "server_width", "server_height", "music_id", "music_type")
_KEYS = ("user_id", "video_id", "date", "time_ms")
_NUM_TABS = 15
_ARCHIVE = "https://zenodo.org/records/10439422/files/KuaiRand-{}.tar.gz"
_ARCHIVES = {"pure": "Pure", "1k": "1K", "27k": "27K"}
_MD5 = {
    "pure": "0820331067a3784d9691136f772b35a7",
    "1k": "6b0b9c8222d67fcd4c676218edca3f1f",
    "27k": "3e3c799a24e2d23a4d2c757fbf9adf59",
}
_DAYS = (20220408, 20220508)


class KuaiRand(Dataset):
    """Three sizes: 1.4, 11.7 and 322 million views."""

    name = "kuairand"
    next_config = "configs/msl/kuairec.yaml dataset.tasks=[is_click]"
    summary = "KuaiRand-Pure, -1K, -27K: videos shown in an app; click and long view, scenarios by tab"
    home = "https://kuairand.com/"
    terms = "KuaiRand (Gao et al. 2022, doi:10.1145/3511808.3557624): Creative Commons Attribution-ShareAlike (CC BY-SA 4.0)."
    hint = (
        "The home page leads to the archives; no login. KuaiRand-Pure.tar.gz may be unpacked into --raw as it is: its folders"
        " (KuaiRand-Pure/data) are looked into. The files of --version 1k and 27k end in these words instead of pure."
    )
    archive = _ARCHIVE.format("Pure")
    archive_md5 = _MD5["pure"]
    raw_files: tuple[RawFile, ...] = tuple(
        RawFile(f"{table}_pure.csv")
        for table in ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08", "user_features", "video_features_basic")
    )
    split = TimeSplit("date", cuts=(20220422, 20220501))
    examples = """examples:
  python -m preprocessing kuairand --raw raw/kuairand --out data/kuairand --download
  python -m preprocessing kuairand --raw raw/kuairand --out data/kuairand-1k --version 1k --tabs 1,0
"""

    def __init__(self, options: argparse.Namespace) -> None:
        self.parity: bool = options.parity
        tabs = options.tabs.split(",")
        if len(set(tabs)) < len(tabs) or not {*tabs} <= {str(tab) for tab in range(_NUM_TABS)}:
            raise ConfigError(f"--tabs {options.tabs}: give some of 0..{_NUM_TABS - 1}, each once, divided by commas.")
        self._tabs = [int(tab) for tab in tabs]
        self._version: str = options.version
        parts = ["_part1", "_part2"] if self._version == "27k" else [""]
        periods = ("4_08_to_4_21", "4_22_to_5_08")
        self._logs = [f"log_standard_{period}_{self._version}{part}.csv" for period in periods for part in parts]
        self._tables = [f"{table}_{self._version}.csv" for table in ("user_features", "video_features_basic")]
        self.raw_files = tuple(map(RawFile, (*self._logs, *self._tables)))
        self.archive, self.archive_md5 = _ARCHIVE.format(_ARCHIVES[self._version]), _MD5[self._version]
        self.features = (
            *(sparse(name, _ID) for name in ("user_id", "video_id", "tab", "hour")),
            *user_features(self.parity),
            *(sparse(name) for name in _VIDEO_TEXTS),
            *(sparse(name, _ID) for name in _VIDEO_CODES),
            dense("video_duration"),
            sparse("tag") if self.parity else multi("tag", _ID),
        )
        self.tasks = (Task(name="is_click"), Task(name="long_view"))
        if len(tabs) > 1:
            self.scenario = Scenario(name="tab", values=tabs)
        else:
            self.next_config = "configs/mtl/kuairec.yaml dataset.tasks=[is_click,long_view]"
        self.keys = dict.fromkeys(_KEYS, _ID)
        self.group_key = "user_id"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--version`, `--tabs`."""
        parser.add_argument(
            "--version",
            choices=["pure", "1k", "27k"],
            default="pure",
            help="which of the three archives; it is the ending of the file names (default: pure)",
        )
        parser.add_argument(
            "--tabs",
            default="1,0,4,2,6",
            help=f"which of the tabs 0..{_NUM_TABS - 1}, in the order of their scenario ids; views in other tabs are left out;"
            " one tab has no scenarios (default: 1,0,4,2,6, the five largest)",
        )

    def prepare(self, raw: RawFolder) -> None:
        """Users in memory, videos on disk: there are up to 32 million."""
        users_name, videos_name = self._tables
        users = raw.table(user_table(users_name), lambda block: good_users(block, self.parity))
        self._users, self._user_index = users.table, IdIndex("user_id", [users], raw.bad_rows)
        read = {"video_id": _ID} | dict.fromkeys(_VIDEO_TEXTS, _TEXT) | dict.fromkeys(_VIDEO_CODES, pa.float64())
        read |= {"video_duration": pa.float64(), "tag": _TEXT}
        kept = dict.fromkeys(_VIDEO_TEXTS, _TEXT) | dict.fromkeys(_VIDEO_CODES, _ID)
        kept |= {"video_duration": pa.float32(), "tag": _TEXT if self.parity else pa.list_(_ID)}
        self._videos = RowsOnDisk(raw.scratch / "videos", kept)
        videos = raw.map(self._good_videos, DelimitedText(videos_name, ",", read, header=True, quoted=True))
        self._video_index = IdIndex("video_id", self._videos.store(videos), raw.bad_rows)

    def sources(self) -> Iterator[DelimitedText]:
        """The logs, in the order of time."""
        for name in self._logs:
            yield DelimitedText(
                name, ",", _LOG, header=True, optional=self.may_lack("is_click", "long_view", "date", "time_ms")
            )

    def rows(self, block: Block) -> dict[str, Any]:
        """Views in the wanted tabs, joined with users and videos."""
        optional = self.may_lack("date", "time_ms")
        for name in ("user_id", "video_id", "date", "hourmin", "tab"):
            if name in optional:
                continue
            block = block.require(block.present(name), f"the {name} is missing. Mend the line or fetch the file again.")
        for name, low, high in (("tab", 0, _NUM_TABS - 1), ("hourmin", 0, 2359), ("date", *_DAYS)):
            values = block.table[name]
            within = pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high))
            good = within.fill_null(name in optional).to_numpy()
            block = block.require(good, f"{name} must lie in {low}..{high}, found {{{name}}}. Mend the line.")
        for name in ("is_click", "long_view"):
            good = self.labelled(block, name, (0, 1))
            block = block.require(good, f"{name} must be 0 or 1, found {{{name}}}. Mend the line.")
        block = block.only(np.isin(block.table["tab"].to_numpy(), self._tabs), "in other tabs")
        block, _ = self._user_index.find(block)
        block, video_rows = self._video_index.find(block)
        views = block.table
        users = self._users.take(self._user_index.locate(views["user_id"].to_numpy()))
        columns = {name: users[name] for name in users.column_names} | self._videos.take(video_rows)
        return columns | {
            **{name: views[name] for name in ("user_id", "video_id", "tab")},
            "hour": views["hourmin"].to_numpy() // 100,
            **{f"label.{task.name}": views[task.name].cast(pa.float32()) for task in self.tasks},
            SCENARIO_COLUMN: pc.index_in(views["tab"], pa.array(self._tabs)).cast(_ID),
            **{f"key.{name}": views[name] for name in _KEYS},
            **self.places(block),
        }

    def _good_videos(self, videos: Block) -> Block:
        """Videos as raw values: codes whole, log(1 + duration), tags as a list of numbers (parity: as text)."""
        videos = videos.require(videos.present("video_id"), "the video_id is missing. Mend the line.")
        videos = without_empty_texts(whole_numbers(videos, _VIDEO_CODES))
        good = videos.table["video_duration"].fill_null(0).to_numpy() >= 0
        videos = videos.require(good, "video_duration must be 0 or more, found {video_duration}. Mend the line.")
        good = pc.match_substring_regex(videos.table["tag"], r"^-?\d{1,9}(,-?\d{1,9})*$")
        good = good.fill_null(True).to_numpy(zero_copy_only=False)
        videos = videos.require(good, "tag must be numbers divided by commas such as 12,65, found {tag}. Mend the line.")
        table = videos.table
        columns = {name: table[name] for name in table.column_names}
        columns["video_duration"] = pc.log1p(table["video_duration"]).cast(pa.float32())
        columns["tag"] = table["tag"] if self.parity else _numbers(table["tag"].combine_chunks())
        return replace(videos, table=pa.table(columns))


def _numbers(texts: pa.StringArray) -> pa.ListArray:
    """The numbers of texts such as "12,65"; a missing text has none."""
    lists = pc.split_pattern(texts, ",")
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, lists.flatten().cast(_ID))


DATASETS = (KuaiRand,)
