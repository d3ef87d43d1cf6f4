"""IJCAI-15 (Tmall repeat buyers): events of a shop's log, in two definitions (docs/datasets/ijcai15.md).

"Repeat Buyers Prediction after Sales Promotion", competition of IJCAI 2015, data of Tmall (Alibaba).

repeat: the events between the users and merchants of the train pairs; did the user come back to buy again (label), and is this
event a purchase (label2). funnel: all events; more than a click (label), and a purchase (label2).

Two packages hold the same events. Format 1: a log, the users, the pairs. Format 2: one line a pair, its events as a list.
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
from mmlrec.schema import Task
from preprocessing.dataset import Dataset, sparse
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import Block, RawFile, RawFolder
from preprocessing.rows.join import IdIndex
from preprocessing.split_rules import GroupSplit, RandomSplit, SplitRule, TimeSplit

_INT, _TEXT = pa.int64(), pa.string()
_LOG, _USERS, _PAIRS = "user_log_format1.csv", "user_info_format1.csv", "train_format1.csv"
_LISTS = ("train_format2.csv", "test_format2.csv")
_LOG_FIELDS = {"user_id": _INT, "item_id": _INT, "cat_id": _INT, "seller_id": _INT, "brand_id": _TEXT}
_LOG_FIELDS |= {"time_stamp": _INT, "action_type": _INT}
_USER_FIELDS = {"user_id": _INT, "age_range": _TEXT, "gender": _TEXT}
_PAIR_FIELDS = {"user_id": _INT, "merchant_id": _INT, "label": _INT}
_FEATURES = ("age_range", "gender", "item_id", "cat_id", "brand_id", "user_id", "merchant_id")
_ID_END = 10**9  # a pair's key has the user's id above the last nine digits, the merchant's in them
_DAY = "(1[0-2]|[1-9])(0[1-9]|[12][0-9]|3[01])"  # month and day, without a leading zero
_EVENT = rf"[0-9]{{1,18}}:[0-9]{{1,18}}:([0-9]{{1,18}}(\.0*)?)?:{_DAY}:[0-3]"
#: Of new rows: neither day nor action need be there.
_UNLABELLED_EVENT = rf"[0-9]{{1,18}}:[0-9]{{1,18}}:([0-9]{{1,18}}(\.0*)?)?:({_DAY})?:[0-3]?"
#: 11 November alone holds 10,582,633 of 54,925,330 events, so cuts at 80 and 90 % of the rows would both fall on that day.
_CUTS = (1101, 1111)


class Ijcai15(Dataset):
    """54,925,330 events of 424,170 users; 260,864 train pairs."""

    name = "ijcai15"
    next_config = "configs/mtl/ijcai15.yaml"
    summary = "IJCAI-15, Tmall repeat buyers: 54,925,330 events; two tasks, by --variant repeat or funnel"
    home = "https://tianchi.aliyun.com/dataset/42"
    terms = "Alibaba Tianchi data: as its page says, for research after login; no redistribution."
    hint = (
        "A login is needed. Unpack data_format1.zip and put its csv files into --raw; or data_format2.zip, with --form 2"
        f" ({', '.join(_LISTS)}; repeat needs the first only). --variant funnel does without {_PAIRS}."
    )
    raw_files: tuple[RawFile, ...] = (RawFile(_LOG), RawFile(_USERS), RawFile(_PAIRS))
    examples = """examples:
  python -m preprocessing ijcai15 --raw raw/ijcai15 --out data/ijcai15
  python -m preprocessing ijcai15 --raw raw/ijcai15 --out data/ijcai15-funnel --variant funnel --split time
"""

    def __init__(self, options: argparse.Namespace) -> None:
        self.parity: bool = options.parity
        self._repeat: bool = options.variant == "repeat"
        self._lists: bool = options.form == "2"
        if self._lists:
            names: tuple[str, ...] = _LISTS[:1] if self._repeat else _LISTS
        else:
            names = (_LOG, _USERS, _PAIRS) if self._repeat else (_LOG, _USERS)
        self.raw_files = tuple(RawFile(name) for name in names)
        self.features = tuple(sparse(name, _INT, min_count=2) for name in _FEATURES)
        self.keys = dict.fromkeys(("user_id", "merchant_id", "item_id", "time_stamp"), _INT)
        self.group_key = "user_id"
        if self._repeat:
            self.tasks = (Task(name="label"), Task(name="label2"))
            self.keys["pair"] = _INT
        else:
            self.tasks = (Task(name="label", role="ctr", implied_by_next=True), Task(name="label2", role="ctcvr"))
        self._own_keys = tuple(self.keys)
        own: dict[str, SplitRule] = {"pair": GroupSplit("pair")} if self._repeat else {"time": TimeSplit("time_stamp", _CUTS)}
        rules = own | {"random": RandomSplit()}
        split = options.split or ("pair" if self._repeat else "random")
        if split not in rules:
            raise ConfigError(
                f"--split {split} is not for --variant {options.variant}; choose from {', '.join(sorted(rules))}."
            )
        self.split = rules[split]

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--variant`, `--form`, `--split`."""
        parser.add_argument(
            "--variant",
            choices=["repeat", "funnel"],
            default="repeat",
            help=f"repeat: events of the pairs of {_PAIRS}, label = the user bought again, label2 = a purchase; funnel: all"
            " events, label = cart, purchase or favourite, label2 = a purchase (default: repeat)",
        )
        parser.add_argument(
            "--form", choices=["1", "2"], default="1", help="the package: data_format1 or data_format2 (default: 1)"
        )
        parser.add_argument(
            "--split",
            choices=["pair", "random", "time"],
            help="pair: all events of a user and merchant on one side (repeat); random: by events, which tells the label of a"
            " pair from its other events: for comparing only (repeat), or 8:1:1 (funnel); time: train to 31 October, valid"
            " to 10 November, test 11 and 12 November (funnel) (default: pair for repeat, random for funnel)",
        )

    def prepare(self, raw: RawFolder) -> None:
        """Format 1: the users, and for repeat the pairs."""
        if self._lists:
            return
        users = raw.table(DelimitedText(_USERS, ",", _USER_FIELDS, header=True), self._good_users)
        self._users, self._user_index = users.table, IdIndex("user_id", [users], raw.bad_rows)
        if self._repeat:
            optional = self.may_lack("label")
            pairs = raw.table(
                DelimitedText(_PAIRS, ",", _PAIR_FIELDS, header=True, optional=optional),
                lambda block: good_pairs(block, optional=self.labels_optional),
            )
            self._pair_index = IdIndex("pair", [pairs], raw.bad_rows)
            self._pair_label = pairs.table["label"].combine_chunks()

    def sources(self) -> Iterator[DelimitedText]:
        """The log, or the files of lists. Test lists carry events of train's time: they serve the funnel."""
        if not self._lists:
            optional = self.may_lack("action_type", "time_stamp")
            yield DelimitedText(_LOG, ",", _LOG_FIELDS, header=True, optional=optional)
            return
        fields = _USER_FIELDS | {"merchant_id": _INT, "activity_log": _TEXT}
        if self._repeat:
            fields["label"] = _INT
        for file in self.raw_files:
            yield DelimitedText(file.name, ",", fields, header=True, optional=self.may_lack("label") if self._repeat else ())

    def rows(self, block: Block) -> dict[str, Any]:
        """The events of a block with their user's age and gender."""
        block = self._listed(block) if self._lists else self._logged(block)
        event, action = block.table, block.table["action_type"]
        columns: dict[str, Any] = {name: event[name] for name in _FEATURES}
        columns["label.label"] = (event["label"] if self._repeat else pc.greater(action, 0)).cast(pa.float32())
        columns["label.label2"] = pc.equal(action, 2).cast(pa.float32())
        return columns | {f"key.{name}": event[name] for name in self._own_keys} | self.places(block)

    def _logged(self, block: Block) -> Block:
        """Lines of the log. For repeat: those of the pairs, with their label."""
        block = _whole_numbers(block, "brand_id")
        for name in ("user_id", "seller_id"):
            block = _within(block, name, 0, _ID_END - 1)
        block = _within(block, "action_type", 0, 3, optional=self.labels_optional)
        day = pc.match_substring_regex(block.table["time_stamp"].cast(_TEXT), f"^{_DAY}$").fill_null(self.labels_optional)
        block = block.require(day.to_numpy(), "time_stamp must be month and day, as in 829, found {time_stamp}. Mend the line.")
        names = ["merchant_id" if name == "seller_id" else name for name in block.table.column_names]
        block = _with_pair(replace(block, table=block.table.rename_columns(names)))
        if self._repeat:
            at = self._pair_index.locate(block.table["pair"].to_numpy())
            block = _with(block, label=self._pair_label.take(pa.array(at, mask=at < 0))).only(
                at >= 0, "outside the train pairs"
            )
        block, at = self._user_index.find(block)
        return _with(block, **{name: self._users[name].take(at) for name in ("age_range", "gender")})

    def _listed(self, block: Block) -> Block:
        """The events in the lists of format 2's lines, in their order. For repeat: of the lines with a label."""
        block = _with_pair(self._good_users(_within(block, "merchant_id", 0, _ID_END - 1)))
        log = block.table["activity_log"]
        event = _UNLABELLED_EVENT if self.labels_optional else _EVENT
        good = pc.match_substring_regex(log, f"^({event}(#{event})*)?$").to_numpy()
        form = "item_id:cat_id:brand_id:time_stamp:action_type divided by #"
        block = block.require(good, f"activity_log is no list of {form}. Mend the line or fetch the file again.")
        if self._repeat:
            block = _within(block, "label", -1, 1, optional=self.labels_optional)
            inside = pc.greater_equal(block.table["label"], 0).fill_null(True)
            block = block.only(inside.to_numpy(), "outside the train pairs")
        block = block.only(block.present("activity_log"), "no event")
        lists = pc.split_pattern(block.table["activity_log"].combine_chunks(), "#")
        line = pc.list_parent_indices(lists).to_numpy()
        parts = pc.split_pattern(lists.flatten(), ":").flatten()
        columns = {name: block.table[name].take(line) for name in block.table.column_names if name != "activity_log"}
        for number, name in enumerate(("item_id", "cat_id", "brand_id", "time_stamp", "action_type")):
            part = parts.take(np.arange(number, len(parts), 5))
            columns[name] = part if name == "brand_id" else pc.if_else(pc.equal(part, ""), None, part).cast(_INT)
        return _whole_numbers(replace(block, lines=block.lines[line], table=pa.table(columns)), "brand_id")

    def _good_users(self, block: Block) -> Block:
        """Age 0 and gender 2 are unknown, as empty ones are; in the parity form they are values."""
        block = _within(block, "user_id", 0, _ID_END - 1)
        for name, highest, unknown in (("age_range", 8, 0), ("gender", 2, 2)):
            block = _within(_whole_numbers(block, name), name, 0, highest, optional=True)
            if not self.parity:
                column = block.table[name]
                block = _with(block, **{name: pc.if_else(pc.equal(column, unknown), None, column)})
        return block


def good_pairs(block: Block, *, optional: bool = False) -> Block:
    """Lines of the train pairs with a column `pair`; those whose label is not 0 or 1, or `optional`, are bad rows."""
    for name in ("user_id", "merchant_id"):
        block = _within(block, name, 0, _ID_END - 1)
    return _with_pair(_within(block, "label", 0, 1, optional=optional))


def _with(block: Block, **columns: Any) -> Block:
    """The block with these columns added or replaced."""
    return replace(block, table=pa.table({name: block.table[name] for name in block.table.column_names} | columns))


def _with_pair(block: Block) -> Block:
    """With the key of user and merchant: 34176 and 3906 give 34176000003906."""
    user, merchant = (block.table[name].to_numpy() for name in ("user_id", "merchant_id"))
    return _with(block, pair=user * _ID_END + merchant)


def _within(block: Block, name: str, lowest: int, highest: int, *, optional: bool = False) -> Block:
    """The rows whose value lies in a range, or is missing where that is `optional`."""
    column = block.table[name]
    good = pc.and_(pc.greater_equal(column, lowest), pc.less_equal(column, highest)).fill_null(optional)
    complaint = f"{name} must be a whole number from {lowest} to {highest}, found {{{name}}}. Mend the line."
    return block.require(np.asarray(good, bool), complaint)


def _whole_numbers(block: Block, name: str) -> Block:
    """A text column as int64. Common tools write whole numbers as 2661.0 once a column has empty cells."""
    texts = block.table[name].combine_chunks().dictionary_encode()
    distinct = pc.replace_substring_regex(pc.utf8_trim_whitespace(texts.dictionary), r"\.0*$", "")
    number = pc.match_substring_regex(distinct, "^[0-9]{1,18}$")
    good = np.asarray(pc.or_(number, pc.equal(distinct, "")).take(texts.indices), bool)
    block = block.require(good, f"{name} must be a whole number or empty, found {{{name}!r}}. Mend the line.")
    numbers = pc.if_else(number, distinct, None).cast(_INT).take(texts.indices)
    return _with(block, **{name: numbers.filter(pa.array(good))})


DATASETS = (Ijcai15,)
