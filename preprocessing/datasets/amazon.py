"""Amazon reviews of 2018 and 2014: liked, and liked best, a scenario for each category (docs/datasets/amazon.md).

Ni, Li and McAuley, "Justifying Recommendations using Distantly-Labeled Reviews and Fine-Grained Aspects", EMNLP 2019 (2018).
McAuley, Targett, Shi and van den Hengel, "Image-Based Recommendations on Styles and Substitutes", SIGIR 2015 (2014).

One JSON object a line and one file a category. Many records stand twice in a file, and some users review an item several
times: of a (reviewer, item) pair the latest review counts, so that no copy of a train row is in test.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmlrec.errors import ConfigError
from mmlrec.hashing import hash_ids
from mmlrec.schema import SCENARIO_COLUMN, Scenario, Task, key_column
from preprocessing.dataset import Dataset, multi, sparse
from preprocessing.reading.json_lines import JsonLines
from preprocessing.reading.raw_files import Block, RawFile, RawFolder
from preprocessing.split_rules import RandomSplit, TimeSplit

_INT, _TEXT = pa.int64(), pa.string()
_SHARED = {"overall": pa.float32(), "reviewTime": _TEXT, "unixReviewTime": _INT, "reviewerID": _TEXT, "asin": _TEXT}
_COLUMNS = {
    "2018": _SHARED | {"verified": pa.bool_(), "vote": _TEXT, "style": pa.json_()},
    "2014": _SHARED | {"helpful": pa.list_(_INT)},
}
_DATE = r"^(?P<month>0?[1-9]|1[0-2]) \d{1,2}, (?P<year>\d{4})$"
_ADDRESSES = {
    "2018": "https://jmcauley.ucsd.edu/data/amazon_v2/categoryFilesSmall",
    "2014": "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles",
}
_REMEDY = "Mend the line or fetch the file again."


class Amazon(Dataset):
    """Any ordered set of categories."""

    name = "amazon-2018"
    next_config = "configs/mtl/amazon.yaml"
    summary = "Amazon reviews, 2018 or 2014; two tasks, scenarios by product category"
    home = "https://nijianmo.github.io/amazon/index.html (2018), https://jmcauley.ucsd.edu/data/amazon/ (2014)"
    terms = (
        "Amazon review data (J. Ni, J. McAuley, UC San Diego): no explicit licence; for research, with citation of the paper."
    )
    hint = (
        "One file a category, as it comes: CATEGORY_5.json.gz. The small 5-core files need no login, the full files"
        " (--reviews all: CATEGORY.json.gz) a form. With --release 2014, --raw holds reviews_CATEGORY_5.json.gz and so on."
    )
    single_files = True
    raw_files: tuple[RawFile, ...] = (RawFile("CATEGORY_5.json"),)
    examples = """examples:
  python -m preprocessing amazon-2018 --raw raw/amazon --out data/amazon-2018 --download
  python -m preprocessing amazon-2018 --raw raw/amazon --out data/amazon-small --categories AMAZON_FASHION,All_Beauty,Gift_Cards
  python -m preprocessing amazon-2018 --raw raw/amazon --out data/amazon-2014 --release 2014 --categories Beauty,Baby
"""

    def __init__(self, options: argparse.Namespace) -> None:
        self._release: str = options.release
        self._categories: list[str] = options.categories.split(",")
        named = [category for category in self._categories if re.fullmatch(r"\w+", category)]
        if len({name.lower() for name in named}) != len(self._categories):  # files are found whatever the case of their names
            raise ConfigError(
                f"--categories {options.categories}: give the categories as their files name them, such as"
                " All_Beauty,Gift_Cards, each once, divided by commas."
            )
        pattern = {"2018": "{}", "2014": "reviews_{}"}[self._release] + {"5-core": "_5.json", "all": ".json"}[options.reviews]
        self._files = {pattern.format(category): index for index, category in enumerate(self._categories)}
        # The full files are had through a form only.
        address = _ADDRESSES[self._release] if options.reviews == "5-core" else None
        self.raw_files = tuple(RawFile(name, url=address and f"{address}/{name}.gz") for name in self._files)
        self.parity: bool = options.parity
        self.split = TimeSplit("unix_review_time") if options.split == "time" else RandomSplit()
        self.tasks = (Task(name="label", role="ctr", implied_by_next=True), Task(name="label2", role="ctcvr"))
        self.keys = {"user": _INT, "reviewer_id": _TEXT, "asin_id": _TEXT, "unix_review_time": _INT}
        self.group_key = "user"
        if len(self._categories) > 1:
            self.scenario = Scenario(name="category", values=self._categories)
        kinds = {"month": _INT, "year": _INT, "reviewer_id": _TEXT, "asin_id": _TEXT, "vote": _INT}
        if self._release == "2018":
            kinds = {"verified": _TEXT, **kinds, "style": _TEXT}
        if self.parity and self.scenario is not None:
            kinds["category"] = _TEXT
        self.features = tuple(
            (multi if name == "style" and not self.parity else sparse)(name, kind, min_count=2) for name, kind in kinds.items()
        )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--categories`, `--release`, `--reviews`, `--split`."""
        parser.add_argument(
            "--categories",
            default="Luxury_Beauty,Prime_Pantry,Musical_Instruments",
            help="the categories, as their files name them, in the order of their scenario ids; one category has no scenarios"
            " (default: Luxury_Beauty,Prime_Pantry,Musical_Instruments)",
        )
        parser.add_argument(
            "--release",
            choices=["2018", "2014"],
            default="2018",
            help="2014 knows neither verified nor style, and its helpful[0] is the vote (default: 2018)",
        )
        parser.add_argument(
            "--reviews",
            choices=["5-core", "all"],
            default="5-core",
            help="5-core: CATEGORY_5.json, users and items with five reviews or more; all: CATEGORY.json (default: 5-core)",
        )
        parser.add_argument(
            "--split",
            choices=["random", "time"],
            default="random",
            help="8:1:1 at random, or the latest tenth of the reviews as test and the tenth before as valid (default: random)",
        )

    def prepare(self, raw: RawFolder) -> None:
        """Find the reviews that a later one of the same pair replaces; the parity form keeps them all."""
        self._replaced = np.empty(0, np.int64)
        if not self.parity:
            pairs = _Pairs(raw.scratch / "pairs")
            for source in self.present_sources(raw):
                for records in raw.map(self._records, source, count_bad_rows=False):
                    pairs.add(records)
            self._replaced = pairs.replaced()

    def sources(self) -> Iterator[JsonLines]:
        """The files of the categories."""
        for name in self._files:
            yield JsonLines(name, _COLUMNS[self._release])

    def rows(self, block: Block) -> dict[str, Any]:
        """Reviews, less those that a later one replaces."""
        block = self._checked(block)
        block = block.only(~_among(self._places(block), self._replaced), "a later review of the pair, or a copy, follows")
        review, index = block.table, self._files[block.source.name]
        date = pc.extract_regex(review["reviewTime"].combine_chunks(), _DATE)
        columns = {
            "month": date.field("month").cast(_INT),
            "year": date.field("year").cast(_INT),
            "reviewer_id": review["reviewerID"],
            "asin_id": review["asin"],
            "label.label": pc.greater_equal(review["overall"], 4).cast(pa.float32()),
            "label.label2": pc.equal(review["overall"], 5).cast(pa.float32()),
            SCENARIO_COLUMN: np.full(len(review), index),
            "category": pa.repeat(self._categories[index], len(review)),
            key_column("user"): hash_ids(review["reviewerID"].combine_chunks(), 0).view(np.int64),
            key_column("reviewer_id"): review["reviewerID"],
            key_column("asin_id"): review["asin"],
            key_column("unix_review_time"): review["unixReviewTime"],
            **self.places(block),
        }
        if self._release == "2014":
            return columns | {"vote": pc.list_element(review["helpful"], 0)}
        vote = pc.replace_substring(review["vote"], ",", "").cast(_INT)
        columns |= {"verified": review["verified"].cast(_TEXT), "vote": vote.fill_null(0)}
        texts = review["style"].combine_chunks()
        styles = _by_value(texts, _whole_style, _TEXT) if self.parity else _by_value(texts, _styles, pa.list_(_TEXT))
        return columns | {"style": styles}

    def _checked(self, block: Block) -> Block:
        optional = self.may_lack("overall", "unixReviewTime")
        for name in ("overall", "reviewTime", "unixReviewTime", "reviewerID", "asin"):
            if name not in optional:
                block = block.require(block.present(name), f"{name} is missing. {_REMEDY}")
        good = self.labelled(block, "overall", range(1, 6))
        block = block.require(good, f"overall must be 1, 2, 3, 4 or 5, found {{overall}}. {_REMEDY}")
        good = pc.match_substring_regex(block.table["reviewTime"], _DATE).to_numpy()
        block = block.require(good, f"reviewTime must be a date such as '09 4, 2015', found {{reviewTime!r}}. {_REMEDY}")
        if self._release == "2014":
            complaint = f"helpful must be [helpful votes, votes], found {{helpful}}. {_REMEDY}"
            two = pc.equal(pc.list_value_length(block.table["helpful"]), 2).fill_null(False).to_numpy()
            block = block.require(two, complaint)
            helpful, votes = (pc.list_element(block.table["helpful"], k) for k in (0, 1))
            sound = pc.and_(pc.greater_equal(helpful, 0), pc.less_equal(helpful, votes)).fill_null(False)
            return block.require(sound.to_numpy(), complaint)
        number = pc.match_substring_regex(block.table["vote"], r"^(\d{1,18}|\d{1,3}(,\d{3}){1,4})$").fill_null(True).to_numpy()
        return block.require(number, f"vote must be a whole number such as '1,341', found {{vote!r}}. {_REMEDY}")

    def _places(self, block: Block) -> NDArray[np.int64]:
        """A number for each row that grows through a file and from file to file."""
        return (self._files[block.source.name] << 40) + block.lines

    def _records(self, block: Block) -> NDArray[np.void]:
        """What `_Pairs` takes note of. Among 233 million pairs, the chance that any two share a hash is .15 %."""
        block = self._checked(block)
        records = np.empty(len(block.lines), _Pairs.RECORD)
        reviewer, item = (block.table[name].combine_chunks() for name in ("reviewerID", "asin"))
        records["pair"] = hash_ids(reviewer, 0) ^ hash_ids(item, 1)
        records["time"] = block.table["unixReviewTime"].fill_null(0).to_numpy()  # null in new rows only
        records["place"] = self._places(block)
        return records


class _Pairs:
    """Which rows a later one of the same pair replaces: the greatest time counts, of equal times the last place.

    On disk 24 bytes a row, in 64 files by the pair's hash; in memory one of these, and 8 bytes a replaced row.
    """

    RECORD = np.dtype([("pair", "<u8"), ("time", "<i8"), ("place", "<i8")])

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._paths = [folder / f"{part}.bin" for part in range(64)]

    def add(self, records: NDArray[np.void]) -> None:
        """Take note of rows, [rows] RECORD."""
        parts = (records["pair"] >> np.uint64(58)).astype(np.int64)
        ends = np.cumsum(np.bincount(parts, minlength=len(self._paths)))
        ordered = np.split(records[np.argsort(parts, kind="stable")], ends[:-1])
        for path, part in zip(self._paths, ordered, strict=True):
            with path.open("ab") as file:
                file.write(part.data)

    def replaced(self) -> NDArray[np.int64]:
        """Places of the replaced rows, in order."""
        found = []
        for path in self._paths:
            records = np.fromfile(path, self.RECORD)
            records = records[np.lexsort((records["place"], records["time"], records["pair"]))]
            found.append(records["place"][:-1][records["pair"][:-1] == records["pair"][1:]])
            path.unlink()
        return np.sort(np.concatenate(found))


def _among(places: NDArray[np.int64], ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[rows] whether each place is one of the `ordered` ones."""
    if not len(ordered):
        return np.zeros(len(places), bool)
    return ordered[np.minimum(np.searchsorted(ordered, places), len(ordered) - 1)] == places


def _by_value(texts: pa.Array, function: Callable[[str], Any], kind: pa.DataType) -> pa.Array:
    """`function` of each text, called once for all equal ones; null stays null."""
    encoded = texts.dictionary_encode()
    return pa.array([function(text) for text in encoded.dictionary.to_pylist()], kind).take(encoded.indices)


def _styles(text: str) -> list[str]:
    """Properties of the item in the order of their names: {"Size:": " 7.0 oz"} gives Size=7.0 oz."""
    pairs = {name.strip(" :"): str(value).strip() for name, value in json.loads(text).items()}
    return [f"{name}={pairs[name]}" for name in sorted(pairs)]


def _whole_style(text: str) -> str | None:
    return ";".join(_styles(text)) or None


DATASETS = (Amazon,)
