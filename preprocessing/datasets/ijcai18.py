"""IJCAI-18 (Alimama search advertising): does a shown advertisement end in a purchase (docs/datasets/ijcai18.md).

"Alimama International Advertising Algorithm Competition", competition of IJCAI 2018 (IAAC).

One text file with labels, one line an impression; -1 is a missing value in any field. Test files lack labels and are not read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.schema import SCENARIO_COLUMN, Scenario, Task
from preprocessing.dataset import Column, Dataset, dense, multi, sparse
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import Block, RawFile, RawFolder
from preprocessing.split_rules import SIDE_COLUMN, FileSplit

_INT, _NUMBER, _TEXT = pa.int64(), pa.float32(), pa.string()
_FILES = {"1": "round1_ijcai_18_train_20180301.txt", "2": "round2_train.txt"}
_DENSE = ("shop_review_positive_rate", "shop_score_service", "shop_score_delivery", "shop_score_description")
_FIELDS = {
    **{"instance_id": _INT, "item_id": _INT, "item_category_list": _TEXT, "item_property_list": _TEXT, "item_brand_id": _INT},
    **{"item_city_id": _INT, "item_price_level": _INT, "item_sales_level": _INT, "item_collected_level": _INT},
    **{"item_pv_level": _INT, "user_id": _INT, "user_gender_id": _INT, "user_age_level": _INT, "user_occupation_id": _INT},
    **{"user_star_level": _INT, "context_id": _INT, "context_timestamp": _INT, "context_page_id": _INT},
    **{"predict_category_property": _TEXT, "shop_id": _INT, "shop_review_num_level": _INT, "shop_star_level": _INT},
    **dict.fromkeys(_DENSE, _NUMBER),
    **{"is_trade": _INT},
}
_IDS = ("item_id", "user_id")
_KEYS = ("instance_id", "user_id", "item_id", "context_timestamp")
#: The 18 sparse columns of the reference, and the gender.
_SPARSE = [name for name in _FIELDS if name not in {*_DENSE, *_IDS, "instance_id", "is_trade"}]
#: Columns that the native form replaces by others.
_REPLACED = ("item_category_list", "item_property_list", "context_id", "context_timestamp", "predict_category_property")
_ID = "-?[0-9]+"
_PREDICTED = f"{_ID}(:{_ID}(,{_ID})*)?"
#: List column -> pattern of its entries, and what a cell looks like.
_LISTS = {
    "item_category_list": (_ID, "category;category"),
    "item_property_list": (_ID, "property;property"),
    "predict_category_property": (_PREDICTED, "category:property,property;category:-1"),
}
_DAY_SECONDS, _EAST_8_SECONDS = 86_400, 8 * 3_600  # the log's first day begins at midnight in China, UTC+8
_LAST_SECOND = 2**32 - 1  # a time in milliseconds is beyond


class Ijcai18(Dataset):
    """478,087 different impressions of 18 to 24 September (round 1); one task, scenarios by the user's gender."""

    name = "ijcai18"
    next_config = "configs/msl/ijcai18.yaml"
    summary = "IJCAI-18, Alimama search advertising: 478,087 impressions; is_trade, scenarios by gender"
    home = "https://tianchi.aliyun.com/dataset/147588"
    terms = "Alibaba Tianchi data: as its page says, for research after login; no redistribution."
    hint = (
        f"A login is needed. The zip file may stay as it is. With --round 2, --raw holds {_FILES['2']}; the test files of"
        " either round have no labels and are not used."
    )
    raw_files: tuple[RawFile, ...] = (RawFile(_FILES["1"]),)
    examples = """examples:
  python -m preprocessing ijcai18 --raw raw/ijcai18 --out data/ijcai18
  python -m preprocessing ijcai18 --raw raw/ijcai18 --out data/ijcai18-last-day --split last_day --ids
"""

    def __init__(self, options: argparse.Namespace) -> None:
        self.parity: bool = options.parity
        self._last_day: bool = options.split == "last_day"
        self.raw_files = (RawFile(_FILES[options.round]),)
        ids = tuple(sparse(name, _INT) for name in _IDS) if options.ids else ()
        self.features = (_parity_features() if self.parity else _native_features()) + ids
        self.tasks = (Task(name="is_trade"),)
        self.scenario = Scenario(name="user_gender_id", values=["missing", "female", "male", "household"])
        self.keys = dict.fromkeys(_KEYS, _INT)
        self.group_key = "user_id"
        if self._last_day:
            self.split = FileSplit()

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--split`, `--ids`, `--round`."""
        parser.add_argument(
            "--split",
            choices=["random", "last_day"],
            default="random",
            help="random: 8:1:1, as the benchmark; last_day: test is the last day of the file, valid the day before, train"
            " what is earlier, as the competition did (default: random)",
        )
        parser.add_argument("--ids", action="store_true", help="item_id and user_id are features too")
        parser.add_argument(
            "--round", choices=list(_FILES), default="1", help=f"1: {_FILES['1']}; 2: {_FILES['2']} (default: 1)"
        )

    def prepare(self, raw: RawFolder) -> None:
        """A first reading: the lines that repeat an instance_id, and the last day."""

        def look(block: Block) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
            block = self._good(block)
            last_day = int(_local(block.table).max(initial=0)) // _DAY_SECONDS
            return block.lines, block.table["instance_id"].to_numpy(), last_day

        lines, ids, days = zip(*raw.map(look, self._source(), count_bad_rows=False), strict=True)
        line, instance = np.concatenate(lines), np.concatenate(ids)
        order = np.argsort(instance, kind="stable")
        again = np.append(False, instance[order[1:]] == instance[order[:-1]])
        self._repeated = np.sort(line[order[again]])
        self._test_day = max(days)

    def sources(self) -> Iterator[DelimitedText]:
        """The file with labels."""
        yield self._source()

    def rows(self, block: Block) -> dict[str, Any]:
        """Impressions, each the first of its instance_id."""
        block = self._good(block)
        block = block.only(~np.isin(block.lines, self._repeated), "an earlier line has the instance_id")
        table = block.table
        columns: dict[str, Any] = {f"key.{name}": table[name] for name in _KEYS} | self.places(block)
        columns["label.is_trade"] = table["is_trade"].cast(_NUMBER)
        columns[SCENARIO_COLUMN] = pc.add(table["user_gender_id"], 1)
        if self._last_day:
            columns[SIDE_COLUMN] = np.clip(_local(table) // _DAY_SECONDS - self._test_day + 2, 0, 2)
        return columns | (_parity_columns(table) if self.parity else _native_columns(table))

    def _source(self) -> DelimitedText:
        return DelimitedText(self.raw_files[0].name, " ", _FIELDS, header=True, optional=self.may_lack("is_trade"))

    def _good(self, block: Block) -> Block:
        """The rows that can be used, with -1 in empty cells."""
        table = block.table
        for number, name in enumerate(table.column_names):
            column = table[name]
            if name in self.may_lack("is_trade"):
                continue
            filled = pc.if_else(pc.equal(column, ""), "-1", column) if name in _LISTS else column.fill_null(-1)
            table = table.set_column(number, name, filled)
        block = replace(block, table=table)
        block = block.require(~_equals(table["instance_id"], -1), "the instance_id is missing. Mend the line.")
        good = self.labelled(block, "is_trade", (0, 1))
        block = block.require(good, "is_trade must be a whole number from 0 to 1, found {is_trade}. Mend the line.")
        for name, lowest, highest in (("user_gender_id", -1, 2), ("context_timestamp", -1, _LAST_SECOND)):
            value = block.table[name].to_numpy()
            complaint = f"{name} must be a whole number from {lowest} to {highest}, found {{{name}}}. Mend the line."
            block = block.require((value >= lowest) & (value <= highest), complaint)
        for name in _DENSE:
            value = block.table[name].to_numpy()
            good = (value == -1) | ((value >= 0) & (value <= 1))
            block = block.require(good, f"{name} must lie in 0..1, or be -1 for missing, found {{{name}}}. Mend the line.")
        if self._last_day and isinstance(self.split, FileSplit):
            complaint = "context_timestamp is missing, but --split last_day needs it. Mend the line."
            block = block.require(~_equals(block.table["context_timestamp"], -1), complaint)
        for name, (entry, shown) in _LISTS.items():
            good = pc.match_substring_regex(block.table[name], f"^{entry}(;{entry})*$").to_numpy()
            block = block.require(good, f"{name} must be -1 or like {shown}, found {{{name}!r}}. Mend the line.")
        return block


def _parity_features() -> tuple[Column, ...]:
    return (*(sparse(name, _FIELDS[name]) for name in _SPARSE), *(dense(name) for name in _DENSE))


def _native_features() -> tuple[Column, ...]:
    plain = [sparse(name, _INT) for name in _SPARSE if name not in _REPLACED]
    made = [sparse("item_category_2"), sparse("item_category_leaf"), sparse("hour", _INT), sparse("day")]
    lists = [multi("item_property_list"), multi("predicted_categories")]
    numbers = [dense(name) for name in _DENSE] + [dense(f"{name}_missing", scaled=False) for name in _DENSE]
    return (*plain, *made, *lists, *numbers)


def _parity_columns(table: pa.Table) -> dict[str, Any]:
    """As they stand in the file: -1 is a value, a list is one text."""
    return {name: table[name] for name in (*_SPARSE, *_IDS, *_DENSE)}


def _native_columns(table: pa.Table) -> dict[str, Any]:
    """-1 is missing, with an indicator where it is a number; lists taken apart; hour and day of the time."""
    columns: dict[str, Any] = {name: _null(table[name], -1) for name in (*_SPARSE, *_IDS, *_DENSE) if name not in _LISTS}
    for name in _DENSE:
        columns[f"{name}_missing"] = pc.is_null(columns[name]).cast(_NUMBER)
    path = table["item_category_list"]
    second = pc.list_element(pc.split_pattern(pc.binary_join_element_wise(path, "-1", ";"), ";"), 1)
    columns["item_category_2"] = _null(second, "-1")
    columns["item_category_leaf"] = _null(pc.replace_substring_regex(path, "^.*;", ""), "-1")
    columns["item_property_list"] = _entries(table["item_property_list"])
    columns["predicted_categories"] = _entries(pc.replace_substring_regex(table["predict_category_property"], ":[^;]*", ""))
    time, missing = _local(table), _equals(table["context_timestamp"], -1)
    columns["hour"] = pa.array(time % _DAY_SECONDS // 3_600, mask=missing)
    columns["day"] = pc.strftime(pa.array(time, mask=missing).cast(pa.timestamp("s")), format="%Y-%m-%d")
    return columns


def _local(table: pa.Table) -> NDArray[np.int64]:
    """Seconds in the time of China."""
    return np.asarray(table["context_timestamp"].to_numpy()) + _EAST_8_SECONDS


def _equals(column: pa.ChunkedArray, value: int) -> NDArray[np.bool_]:
    return np.asarray(column.to_numpy() == value)


def _null(column: pa.ChunkedArray, value: int | str) -> pa.ChunkedArray:
    """The column with nulls in place of a value."""
    return pc.if_else(pc.equal(column, value), None, column)


def _entries(column: pa.ChunkedArray) -> pa.ListArray:
    """Texts divided by ; as lists, without the entries that are missing."""
    lists = pc.split_pattern(column.combine_chunks(), ";")
    entries, rows = lists.flatten(), pc.list_parent_indices(lists)
    known = pc.not_equal(entries, "-1")
    lengths = np.bincount(rows.filter(known).to_numpy(), minlength=len(lists))
    ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(ends, entries.filter(known))


DATASETS = (Ijcai18,)
