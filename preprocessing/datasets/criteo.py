"""Criteo click logs: 1TB text days, the Kaggle file, and DLRM's and MLPerf's arrays (docs/datasets/criteo.md).

Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems", arXiv:1906.00091, 2019.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.errors import ConfigError
from mmlrec.schema import Scenario, Task
from preprocessing.dataset import Column, Dataset, EncodingRules, dense, multi, sparse
from preprocessing.reading.arrays import Arrays
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import Block, RawFile, RowFiles, Source
from preprocessing.split_rules import FileSplit

_INT, _TEXT, _NUMBER = pa.int64(), pa.string(), pa.float32()
NUMBERS = [f"int_{k}" for k in range(13)]
CATEGORIES = [f"cat_{k}" for k in range(26)]
_LINE = {"label": _INT, **dict.fromkeys(NUMBERS, _INT), **dict.fromkeys(CATEGORIES, _TEXT)}
_NUM_DAYS = 24
#: Rows of the tables of MLPerf DLRM-v2: 204,184,588 in all.
TABLE_ROWS = [
    *(40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10),
    *(2_209, 11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36),
]
_DAY_FILES = {
    "days": ("day_{}",),
    "npy": ("day_{}_labels.npy", "day_{}_dense.npy", "day_{}_sparse.npy"),
    "multi-hot": ("day_{}_labels.npy", "day_{}_dense.npy", "day_{}_sparse_multi_hot.npz"),
}
_IS_DIGIT = np.isin(np.arange(256), np.frombuffer(b"0123456789abcdefABCDEF", np.uint8))


_ADDRESS = "https://huggingface.co/datasets/criteo/CriteoClickLogs/resolve/main"


class Criteo(Dataset):
    """One task; days as scenarios where asked for."""

    name = "criteo"
    summary = "a month of ad views, 13 numbers and 26 ids each: 1TB text, Kaggle text, DLRM's and MLPerf's arrays"
    home = "https://ailab.criteo.com/download-criteo-1tb-click-logs-dataset/"
    terms = "1TB click logs: CC BY-NC-SA 4.0, no commercial use. Kaggle file: the terms accepted with it."
    single_files = True
    raw_files: tuple[RawFile, ...] = (RawFile("day_0"), RawFile("..."), RawFile(f"day_{_NUM_DAYS - 1}"))
    hint = (
        "No login is needed, but for the Kaggle file; criteo/CriteoClickLogs on Hugging Face holds the same days. --days says"
        " which of the files day_0.gz ... day_23.gz lie in --raw. --form says in which form they are there: days (text), kaggle"
        " (train.txt, one file), npy (day_N_labels.npy, day_N_dense.npy, day_N_sparse.npy) or multi-hot"
        " (day_N_sparse_multi_hot.npz instead of the last)."
    )
    next_config = "configs/scaling/criteo.yaml"

    def __init__(self, options: argparse.Namespace) -> None:
        self._form: str = options.form
        self._arrays = self._form in ("npy", "multi-hot")
        self._log = options.dense == "log"
        self._modulo: bool = options.modulo
        self._days = [] if self._form == "kaggle" else _days_of(options.days or f"0-{_NUM_DAYS - 1}")
        if self._form == "kaggle" and options.days:
            raise ConfigError("--days: the Kaggle file has no days; leave the option away.")
        if not self._arrays and (options.modulo or options.table_rows):
            raise ConfigError(
                f"--table-rows and --modulo are for --form npy and multi-hot; --form {self._form} fits vocabularies."
            )
        self._table_rows = _table_rows_of(options.table_rows)
        forms = _DAY_FILES.get(self._form, ())
        names = [form.format(day) for day in self._days for form in forms] or ["train.txt"]
        days = self._form == "days"
        self.raw_files = tuple(RawFile(name, url=f"{_ADDRESS}/{name}.gz" if days else None) for name in names)
        ids = zip(CATEGORIES, self._table_rows, strict=True)
        self.features = (*(dense(name, scaled=not self._log) for name in NUMBERS), *(self._id_column(*each) for each in ids))
        self.tasks = (Task(name="click", role="ctr"),)
        self.keys = {"line": _INT} if self._form == "kaggle" else {"day": _INT, "line": _INT}
        self.numbering = ("line",)
        if options.scenario == "day":
            if self._form == "kaggle":
                raise ConfigError("--scenario day: the Kaggle file has no days; leave the option away.")
            if len(self._days) < 2:
                raise ConfigError("--scenario day needs --days with two or more days.")
            self.scenario = Scenario(name="day", values=[str(day) for day in self._days])
            return
        self.next_config += " dataset.setting=mtl"
        if len(self._days) > 1:
            self.split = FileSplit(valid_from="test", one_in=2)

    def _id_column(self, name: str, num_rows: int) -> Column:
        if not self._arrays:
            return sparse(name, _INT, min_count=3)
        return (multi if self._form == "multi-hot" else sparse)(name, _INT, num_ids=num_rows - 1)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--form`, `--days`, `--dense`, `--scenario`, `--table-rows`, `--modulo`."""
        add = parser.add_argument
        add("--form", choices=["days", "kaggle", "npy", "multi-hot"], default="days", help="of the raw files (default: days)")
        add(
            "--days",
            help="those to take, such as 0-2,23; of several the last becomes valid and test, one alone is divided at random"
            " (default: 0-23)",
        )
        add(
            "--dense",
            choices=["log", "min-max"],
            default="log",
            help="numbers as log(max(x, -1) + 3), a missing one as x = 0, or scaled by the train rows (default: log)",
        )
        add(
            "--scenario",
            choices=["none", "day"],
            default="none",
            help="day: each day is a scenario, and rows are divided at random (default: none)",
        )
        add(
            "--table-rows",
            help="26 numbers: rows of the tables that the arrays' ids refer to (default: those of MLPerf DLRM-v2)",
        )
        add("--modulo", action="store_true", help="take the arrays' ids modulo the rows of their table, as DLRM-v2 does")

    def sources(self) -> Iterator[Source]:
        """Day after day."""
        if self._form == "kaggle":
            yield DelimitedText("train.txt", "\t", _LINE, optional=self.may_lack("label"))
        for day in self._days:
            names = [form.format(day) for form in _DAY_FILES[self._form]]
            if self._arrays:
                ids = pa.list_(_INT) if self._form == "multi-hot" else _INT
                columns = {"label": _INT, **dict.fromkeys(NUMBERS, _NUMBER), **dict.fromkeys(CATEGORIES, ids)}
                files = zip(names, (("label",), tuple(NUMBERS), tuple(CATEGORIES)), strict=True)
                optional = self.may_lack("label")
                yield Arrays(names[1 if optional else 0], tuple(files), columns, optional)
            else:
                yield DelimitedText(names[0], "\t", _LINE, optional=self.may_lack("label"))

    def row_files(self) -> list[RowFiles]:
        """Of a day in arrays, that of the labels may be absent."""
        if not self._arrays:
            return super().row_files()
        days = [[form.format(day) for form in _DAY_FILES[self._form]] for day in self._days]
        return [RowFiles(frozenset(names[1:]), frozenset(names[:1])) for names in days]

    def rows(self, block: Block) -> dict[str, Any]:
        """Ad views."""
        if self._arrays:  # the file that a complaint is about
            block = replace(block, path=block.path.with_name(_DAY_FILES[self._form][0].format(_day_of(block))))
        good = self.labelled(block, "label", (0, 1))
        block = block.require(good, "the label must be 0 or 1, found {label}. Mend the line.")
        block, features = self._array_features(block) if self._arrays else self._text_features(block)
        num_rows = len(block.lines)
        columns = features | {"label.click": block.table["label"].cast(_NUMBER), "key.line": block.lines} | self.places(block)
        if self._days:
            day = _day_of(block)
            columns["key.day"] = np.full(num_rows, day)
            columns["sample.scenario"] = np.full(num_rows, self._days.index(day))
            columns["split.side"] = np.full(num_rows, 2 if day == self._days[-1] else 0)
        return columns

    def encoding_rules(self) -> EncodingRules:
        """Numbers as logarithms, ids modulo the rows of their table."""
        rules: dict[str, dict[str, Any]] = {
            name: {"scale": "log(max(x, -1) + 3)"} for name in NUMBERS if self._log and not self._arrays
        }
        rules |= {
            name: {"modulo": num_rows} for name, num_rows in zip(CATEGORIES, self._table_rows, strict=True) if self._modulo
        }
        return EncodingRules(rules)

    def _text_features(self, block: Block) -> tuple[Block, dict[str, Any]]:
        for name in CATEGORIES:
            good = _is_hexadecimal(block.table[name])
            block = block.require(good, f"{name} must be up to 8 hexadecimal digits, found {{{name}!r}}. Mend the line.")
        columns: dict[str, Any] = {name: _from_hexadecimal(block.table[name]) for name in CATEGORIES}
        for name in NUMBERS:
            column = block.table[name]
            columns[name] = _shifted_log(column) if self._log else column.cast(_NUMBER, safe=False)
        return block, columns

    def _array_features(self, block: Block) -> tuple[Block, dict[str, Any]]:
        _, dense_name, ids_name = (form.format(_day_of(block)) for form in _DAY_FILES[self._form])
        block = replace(block, path=block.path.with_name(dense_name))  # the file that a complaint is about
        for name in NUMBERS:
            good = np.isfinite(block.table[name].to_numpy())
            block = block.require(good, f"{name} is nan or infinite. Write the array anew.")
        block = replace(block, path=block.path.with_name(ids_name))
        for name, num_rows in zip(CATEGORIES, self._table_rows, strict=True):
            rows, ids = len(block.lines), _flat(block.table[name])
            ids = ids.reshape(rows, len(ids) // max(rows, 1))
            good = ids.min(axis=1, initial=0) >= 0
            if not self._modulo:
                good &= ids.max(axis=1, initial=0) < num_rows
            remedy = "Give --table-rows or --modulo, or write the array anew."
            block = block.require(good, f"{name} must lie in 0..{num_rows - 1}, found {{{name}}}. {remedy}")
        columns: dict[str, Any] = {name: block.table[name] for name in (*NUMBERS, *CATEGORIES)}
        if self._modulo:
            for name, num_rows in zip(CATEGORIES, self._table_rows, strict=True):
                columns[name] = _modulo(columns[name], num_rows)
        return block, columns


def _day_of(block: Block) -> int:
    return int(block.source.name.split("_")[1])


def _days_of(text: str) -> list[int]:
    parts = [re.fullmatch(r"([0-9]{1,2})(?:-([0-9]{1,2}))?", part) for part in text.split(",")]
    ends = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
    days = [day for first, last in ends for day in range(first, last + 1)] if all(parts) else []
    if not days or days != sorted(set(days)) or not 0 <= days[0] <= days[-1] < _NUM_DAYS:
        raise ConfigError(f"--days {text}: give days of 0..{_NUM_DAYS - 1} in ascending order, such as 0-2,23.")
    return days


def _table_rows_of(text: str | None) -> list[int]:
    if text is None:
        return TABLE_ROWS
    parts = text.split(",")
    if len(parts) != len(CATEGORIES) or not all(re.fullmatch("0*[1-9][0-9]{0,17}", part) for part in parts):
        raise ConfigError(f"--table-rows {text}: give {len(CATEGORIES)} numbers from 1 to 10^18 - 1, divided by commas.")
    return [int(part) for part in parts]


def _digits(ids: pa.ChunkedArray) -> NDArray[np.uint8]:
    """Characters of ids, [rows * 8]: zeros stand before short ids, `?` in those that are too long."""
    text = ids.combine_chunks()
    if not len(text):
        return np.zeros(0, np.uint8)
    lengths = pc.binary_length(text)
    if pc.max(lengths).as_py() > 8:
        text = pc.if_else(pc.greater(lengths, 8), "?", text)
    padded = pc.ascii_lpad(text, 8, "0")
    return np.frombuffer(padded.buffers()[2], np.uint8)[: 8 * len(text)]


def _is_hexadecimal(ids: pa.ChunkedArray) -> NDArray[np.bool_]:
    good = _IS_DIGIT[_digits(ids)]
    if good.all():  # which costs less than to look at every row
        return np.ones(len(ids), bool)
    rows: NDArray[np.bool_] = np.logical_and.reduce(good.reshape(-1, 8), axis=1)
    return rows


def _from_hexadecimal(ids: pa.ChunkedArray) -> pa.Array:
    """Up to 8 hexadecimal digits as int64, all 8 of an id at a time; an empty text as null."""
    words = _digits(ids).view(">u8").astype(np.uint64)  # the first digit in the highest byte
    nine, four = np.uint64(9), np.uint64(4)
    words = (words & np.uint64(0x0F0F0F0F0F0F0F0F)) + nine * ((words >> np.uint64(6)) & np.uint64(0x0101010101010101))
    words = (words | words >> four) & np.uint64(0x00FF00FF00FF00FF)
    words = (words | words >> np.uint64(8)) & np.uint64(0x0000FFFF0000FFFF)
    words = (words | words >> np.uint64(16)) & np.uint64(0xFFFFFFFF)
    return pa.array(words.view(np.int64), mask=pc.equal(ids.combine_chunks(), "").to_numpy(zero_copy_only=False))


def _shifted_log(numbers: pa.ChunkedArray) -> NDArray[np.float32]:
    """log(max(x, -1) + 3), a missing x as 0: DLRM's shift, by which the least value of the 1TB logs, -1, becomes 2."""
    return np.log(np.maximum(numbers.fill_null(0).to_numpy(), -1) + 3.0).astype(np.float32)


def _flat(ids: pa.ChunkedArray) -> NDArray[np.int64]:
    """Ids [rows], or of lists [rows * width]."""
    values = ids.combine_chunks()
    flat: NDArray[np.int64] = (values.flatten() if pa.types.is_list(values.type) else values).to_numpy()
    return flat


def _modulo(ids: pa.ChunkedArray, num_rows: int) -> pa.Array:
    values, folded = ids.combine_chunks(), pa.array(_flat(ids) % num_rows)
    return pa.ListArray.from_arrays(values.offsets, folded) if pa.types.is_list(values.type) else folded


DATASETS = (Criteo,)
