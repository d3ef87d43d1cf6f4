"""AliExpress search logs: click and conversion, a scenario for each country (docs/datasets/aliexpress.md).

Li et al., "Improving Multi-Scenario Learning to Rank in E-commerce by Exploiting Task Relationships in the Label Space",
CIKM 2020.

Raw form, for each country and each of train and test a pair of files without header: the user file has one line a result page
(33 fields), the item file one line a shown product (49 fields); they join on the first field, the search id. Processed form:
one file with a header, already joined. Both give the same rows when the processed file keeps the order of the item file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmlrec.errors import ConfigError
from mmlrec.schema import SCENARIO_COLUMN, Scenario, Task
from preprocessing.dataset import Dataset, dense, sparse
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import Block, RawFile, RawFolder, RowFiles
from preprocessing.rows.join import IdIndex, RowsOnDisk
from preprocessing.split_rules import SIDE_COLUMN, FileSplit

_COUNTRIES = ["NL", "ES", "FR", "US", "RU"]
_ID, _NUMBER = pa.int64(), pa.float32()
_CATEGORICAL = [f"categorical_{k}" for k in range(1, 17)]
_NUMERICAL = [f"numerical_{k}" for k in range(1, 64)]
_ITEM_CODES = (19, 34, 35, 36, 40, 41, 42)  # fields of the item file that hold ids, counted from 1


def _layout() -> tuple[dict[str, pa.DataType], dict[str, pa.DataType]]:
    """Fields of the user file and of the item file, in order, by the feature names of the processed form."""
    categorical, numerical = iter(_CATEGORICAL), iter(_NUMERICAL)
    user = {"search_id": _ID, **{next(categorical): _ID for _ in range(2, 9)}}
    user |= {next(numerical): _NUMBER for _ in range(9, 32)} | {next(categorical): _ID for _ in range(32, 34)}
    item = {"search_id": _ID}
    for field in range(2, 49):
        item |= {next(categorical): _ID} if field in _ITEM_CODES else {next(numerical): _NUMBER}
    return user, item | {"label": _ID}


_USER, _ITEM = _layout()
_PROCESSED = {"search_id": _ID} | dict.fromkeys(_CATEGORICAL, _ID) | dict.fromkeys(_NUMERICAL, _NUMBER)
_PROCESSED |= {"click": _ID, "conversion": _ID}


class AliExpress(Dataset):
    """Any ordered set of countries; train and test as shipped, a tenth of the train searches becomes valid."""

    name = "aliexpress"
    next_config = "configs/msl/aliexpress.yaml"
    summary = "AliExpress search logs; click and conversion, scenarios by country"
    home = "https://tianchi.aliyun.com/dataset/74690"
    terms = "Alibaba Tianchi data: as its page says, for research after login; no redistribution."
    hint = (
        "A login is needed. Unpack each country's archive; the four zip files in it (NL_user_train.zip ...) may stay as they"
        " are. With --form processed, --raw holds AliExpress_NL/train.csv, AliExpress_NL/test.csv and so on."
    )
    split = FileSplit(valid_from="train", one_in=10, group="search_id")
    raw_files = tuple(RawFile(f"CC_{part}_{side}.csv") for side in ("train", "test") for part in ("user", "item"))
    examples = """examples:
  python -m preprocessing aliexpress --raw raw/aliexpress --out data/aliexpress
  python -m preprocessing aliexpress --raw raw/aliexpress --out data/aliexpress-us --countries US --form processed
"""

    def __init__(self, options: argparse.Namespace) -> None:
        self._countries: list[str] = options.countries.upper().split(",")
        known = [country for country in _COUNTRIES if country in self._countries]
        if sorted(self._countries) != sorted(known):
            raise ConfigError(
                f"--countries {options.countries}: give some of {','.join(_COUNTRIES)}, each once, divided by commas."
            )
        self._processed: bool = options.form == "processed"
        self.raw_files = tuple(RawFile(name) for country in self._countries for names in self._names(country) for name in names)
        several = len(self._countries) > 1
        country = [sparse("country")] if options.parity and several else []  # the reference appends the scenario
        self.features = (*(sparse(name, _ID) for name in _CATEGORICAL), *country, *(dense(name) for name in _NUMERICAL))
        self.tasks = (Task(name="click", role="ctr", implied_by_next=True), Task(name="conversion", role="ctcvr"))
        self.keys = {"search_id": _ID}
        if several:
            self.scenario = Scenario(name="country", values=self._countries)
        else:
            self.next_config += " dataset.setting=mtl dataset.tasks=[click,conversion]"
            self.group_key = "search_id"  # two countries may use one id for two searches
        #: Name of the file that gives the rows -> scenario and side.
        self._place: dict[str, tuple[int, int]] = {}
        for scenario, country in enumerate(self._countries):
            for side, names in zip((0, 2), self._names(country), strict=True):
                self._place[names[-1]] = scenario, side
        self._unshown: dict[str, int] = {}

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--countries`, `--form`."""
        parser.add_argument(
            "--countries",
            default="NL,ES",
            help=f"which of {','.join(_COUNTRIES)}, in the order of their scenario ids; one country has no scenarios"
            " (default: NL,ES)",
        )
        parser.add_argument(
            "--form",
            choices=["raw", "processed"],
            default="raw",
            help="raw: pairs CC_user_train.csv, CC_item_train.csv, CC_user_test.csv, CC_item_test.csv without header;"
            " processed: AliExpress_CC/train.csv and test.csv with header, joined (default: raw)",
        )

    def batches(self, raw: RawFolder) -> Iterator[pa.RecordBatch]:
        """Country by country, train before test, in the order of the item file."""
        if self._processed:
            yield from super().batches(raw)
            return
        for country in self._countries:
            for user_name, item_name in self._names(country):
                if item_name not in raw.paths:  # of new rows
                    continue
                users = RowsOnDisk(raw.scratch / user_name, {name: _USER[name] for name in _USER if name != "search_id"})
                blocks = users.store(raw.map(_with_search_id, DelimitedText(user_name, ",", _USER)))
                index = IdIndex("search_id", blocks, raw.bad_rows)
                self._pair = index, users, np.zeros(users.num_rows, bool)
                for batches in raw.map(self.canonical, DelimitedText(item_name, ",", _ITEM, optional=self.may_lack("label"))):
                    yield from batches
                self._unshown[user_name] = int(users.num_rows - np.count_nonzero(self._pair[2]))
                users.remove()

    def sources(self) -> Iterator[DelimitedText]:
        """Files of the processed form."""
        for country in self._countries:
            for (name,) in self._names(country):
                optional = self.may_lack("click", "conversion")
                yield DelimitedText(name, ",", _PROCESSED, header=True, optional=optional)

    def row_files(self) -> list[RowFiles]:
        """Pairs, or processed files."""
        return [RowFiles(frozenset(names)) for country in self._countries for names in self._names(country)]

    def rows(self, block: Block) -> dict[str, Any]:
        """Of a processed file, or of an item file joined with the user file of its pair."""
        block = _with_search_id(block)
        block, columns = self._processed_rows(block) if self._processed else self._joined_rows(block)
        columns["key.search_id"] = block.table["search_id"]
        scenario, side = self._place[block.source.name]
        columns[SCENARIO_COLUMN] = np.full(len(block.lines), scenario)
        columns["country"] = pa.repeat(self._countries[scenario], len(block.lines))
        columns[SIDE_COLUMN] = np.full(len(block.lines), side)
        return columns | self.places(block)

    def statistics(self) -> dict[str, Any]:
        """`searches_without_items`: lines of each user file that no item refers to (raw form only)."""
        return {} if self._processed else {"searches_without_items": self._unshown}

    def _names(self, country: str) -> list[tuple[str, ...]]:
        """Raw files of the train and the test side."""
        if self._processed:
            return [(f"AliExpress_{country}/{side}.csv",) for side in ("train", "test")]
        return [tuple(f"{country}_{part}_{side}.csv" for part in ("user", "item")) for side in ("train", "test")]

    def _processed_rows(self, block: Block) -> tuple[Block, dict[str, Any]]:
        for label in ("click", "conversion"):
            good = self.labelled(block, label, (0, 1))
            block = block.require(good, f"{label} must be 0 or 1, found {{{label}}}. Mend the line.")
        good = pc.less_equal(block.table["conversion"], block.table["click"]).fill_null(True).to_numpy()
        block = block.require(good, "a conversion without a click. Mend the line or fetch the file again.")
        return block, _with_labels(block.table, block.table["click"], block.table["conversion"])

    def _joined_rows(self, block: Block) -> tuple[Block, dict[str, Any]]:
        index, users, shown = self._pair
        good = self.labelled(block, "label", (0, 1, 2))
        block = block.require(good, "the label must be 0 (shown), 1 (clicked) or 2 (bought), found {label}. Mend the line.")
        block, rows = index.find(block)
        shown[rows] = True
        label = block.table["label"]
        return block, _with_labels(block.table, pc.greater(label, 0), pc.greater(label, 1)) | users.take(rows)


def _with_search_id(block: Block) -> Block:
    return block.require(block.present("search_id"), "the search_id is missing. Mend the line.")


def _with_labels(table: pa.Table, click: pa.ChunkedArray, conversion: pa.ChunkedArray) -> dict[str, Any]:
    """The table's columns, and the labels."""
    columns = {name: table[name] for name in table.column_names}
    return columns | {"label.click": click.cast(_NUMBER), "label.conversion": conversion.cast(_NUMBER)}


DATASETS = (AliExpress,)
