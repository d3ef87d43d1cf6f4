"""Ali-CCP: clicks and purchases on Taobao, scenarios by the place of the page (docs/datasets/aliccp.md).

Ma et al., "Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click Conversion Rate", SIGIR 2018.

Of each of train and test there is a file of samples ("skeleton") and one of what many samples share ("common features": the
user), joined by an index. Features are entries FIELD 0x02 FEATURE 0x03 VALUE, divided by 0x01; a field may come several times.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from mmlrec.errors import ConfigError, DataError
from mmlrec.schema import SCENARIO_COLUMN, DatasetManifest, Scenario, Task
from preprocessing.dataset import Dataset, EncodingRules, multi, sparse
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import Block, RawFile, RawFolder, RowFiles
from preprocessing.rows.join import IdIndex, RowsOnDisk
from preprocessing.split_rules import SIDE_COLUMN, FileSplit

_SIDES = {"train": 0, "test": 2}
_USER = ("101", "121", "122", "124", "125", "126", "127", "128", "129")
_HISTORIES = ("109_14", "110_14", "127_14", "150_14")
_SAMPLE = ("205", "206", "207", "216", "508", "509", "702", "853", "301")
_SAMPLE_LISTS = ("210",)
_ID, _TEXT = pa.int64(), pa.string()
_COMMON = {"common_feature_index": _TEXT, "feature_count": _ID, "features": _TEXT}
_SKELETON = {"sample_id": _ID, "click": _ID, "purchase": _ID} | _COMMON
_NUM_PLACES = 3
_PLACES_PIECES = 8
_NO_FEATURE = np.iinfo(np.int64).min
_ENTRY = re.compile(r"[^\x01-\x03]+\x02-?[0-9]{1,18}\x03([-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?)")
_ENTRIES = "entries FIELD 0x02 FEATURE 0x03 VALUE divided by 0x01"
_MIN_COUNT = 10


class AliCCP(Dataset):
    """About 85.3 million samples of 0.4 million users and 4.3 million items."""

    name = "aliccp"
    next_config = "configs/msl/aliexpress.yaml"
    summary = "Ali-CCP, 85 million samples of Taobao; click and purchase, scenarios by place"
    home = "https://tianchi.aliyun.com/dataset/408"
    terms = "Alibaba Tianchi data: as its page says, for research after login; no redistribution."
    hint = "A login is needed. Unpack sample_train.tar.gz and sample_test.tar.gz into --raw."
    raw_files = tuple(RawFile(f"{part}_{side}.csv") for side in _SIDES for part in ("sample_skeleton", "common_features"))
    split = FileSplit(valid_from="test", one_in=2)

    def __init__(self, options: argparse.Namespace) -> None:
        self.parity: bool = options.parity
        self._max_history: int = options.max_history
        if self._max_history < 1:
            raise ConfigError(f"--max-history {self._max_history}: give 1 or more.")
        self._places: list[int] = []
        if options.places is not None:
            self._places = _whole_numbers(options.places)
        self.features = tuple(sparse(f"f{field}", _ID, min_count=_MIN_COUNT) for field in (*_USER, *_SAMPLE))
        if not self.parity:
            self.features += tuple(multi(f"f{field}", _ID, min_count=_MIN_COUNT) for field in (*_SAMPLE_LISTS, *_HISTORIES))
        self.tasks = (Task(name="click", role="ctr", implied_by_next=True), Task(name="purchase", role="ctcvr"))
        num_places = len(self._places) or _NUM_PLACES
        self.scenario = Scenario(name="place", values=[str(place + 1) for place in range(num_places)])
        self.keys = {"sample_id": _ID, "common_features": _ID}
        self.group_key = "common_features"  # the user with his history; the user id itself is missing in some

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """`--places`, `--max-history`."""
        parser.add_argument(
            "--places",
            metavar="A,B,...",
            help="features of field 301 in the order of their scenario ids; samples of others are bad rows (default: the"
            f" {_NUM_PLACES} in the first 64 MiB of sample_skeleton_train.csv, ascending; the official file has no more)",
        )
        parser.add_argument(
            "--max-history",
            type=int,
            default=20,
            metavar="N",
            help="keep the N features with the greatest values of each of the four histories, some of which hold a thousand"
            " (default: 20)",
        )

    def prepare(self, raw: RawFolder) -> None:
        """Common features on disk, their index in memory; the places."""
        if not self._places:
            self._places = _first_places(raw)
        singles = dict.fromkeys((f"f{field}" for field in _USER), _ID)
        lists = {} if self.parity else dict.fromkeys((f"f{field}" for field in _HISTORIES), pa.list_(_ID))
        self._common: dict[str, tuple[IdIndex, RowsOnDisk]] = {}
        for side in _SIDES:
            if f"common_features_{side}.csv" not in raw.paths:  # of new rows
                continue
            rows = RowsOnDisk(raw.scratch / f"common_{side}", singles | lists)
            source = DelimitedText(f"common_features_{side}.csv", ",", _COMMON)
            blocks = rows.store(raw.map(self._good_common, source))
            self._common[side] = IdIndex("common_features", blocks, raw.bad_rows, _as_hex), rows

    def sources(self) -> Iterator[DelimitedText]:
        """The samples."""
        for side in _SIDES:
            optional = self.may_lack("click", "purchase")
            yield DelimitedText(f"sample_skeleton_{side}.csv", ",", _SKELETON, optional=optional)

    def row_files(self) -> list[RowFiles]:
        """Pairs of samples and what they share."""
        return [RowFiles(frozenset((f"sample_skeleton_{side}.csv", f"common_features_{side}.csv"))) for side in _SIDES]

    def take_over(self, manifest: DatasetManifest) -> None:
        """The places."""
        if manifest.encoding is not None and manifest.encoding.scenario is not None:
            self._places = list(manifest.encoding.scenario["places"])

    def rows(self, block: Block) -> dict[str, Any]:
        """Samples joined with their common features; purchases without a click are left out."""
        side = block.source.name.removeprefix("sample_skeleton_").removesuffix(".csv")
        block = block.require(block.present("sample_id"), "the sample_id is missing. Mend the line.")
        for name in ("click", "purchase"):
            good = self.labelled(block, name, (0, 1))
            block = block.require(good, f"{name} must be 0 or 1, found {{{name}}}. Mend the line.")
        possible = pc.less_equal(block.table["purchase"], block.table["click"]).fill_null(True)
        block = block.only(possible.to_numpy(), "purchases without a click")
        block = _with_features(_with_index(block), _SAMPLE, () if self.parity else _SAMPLE_LISTS)
        block = block.only(block.present("f301"), "without field 301")
        block = block.require(
            np.isin(block.table["f301"].to_numpy(), self._places),
            f"field 301 must hold one of {', '.join(map(str, self._places))}, found {{f301}}. Mend the line, or see --places.",
        )
        index, common = self._common[side]
        found = index.locate(block.table["common_features"].to_numpy())
        block = block.require(
            found >= 0,
            f"common_feature_index {{common_feature_index}} is not in common_features_{side}.csv. Fetch both files again.",
        )
        samples = block.table
        columns = {name: samples[name] for name in samples.column_names} | common.take(found[found >= 0])
        return columns | {
            **{f"label.{task.name}": samples[task.name].cast(pa.float32()) for task in self.tasks},
            SCENARIO_COLUMN: pc.index_in(samples["f301"], pa.array(self._places)).cast(_ID),
            "key.sample_id": samples["sample_id"],
            "key.common_features": samples["common_features"],
            SIDE_COLUMN: np.full(len(samples), _SIDES[side]),
            **self.places(block),
        }

    def statistics(self) -> dict[str, Any]:
        """`places`: the feature of field 301 of each scenario."""
        return {"places": self._places}

    def encoding_rules(self) -> EncodingRules:
        """How long histories may be, and the feature of field 301 that is each scenario."""
        histories = {} if self.parity else {f"f{field}": {"longest": self._max_history} for field in _HISTORIES}
        return EncodingRules(histories, scenario={"places": self._places})

    def _good_common(self, block: Block) -> Block:
        return _with_features(_with_index(block), _USER, () if self.parity else _HISTORIES, self._max_history)


def _whole_numbers(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(re.fullmatch(r"\d{1,18}", number) for number in numbers) or not 2 <= len(set(numbers)) == len(numbers):
        raise ConfigError(f"--places {text}: give two or more whole numbers, each once, divided by commas.")
    return [int(number) for number in numbers]


def _first_places(raw: RawFolder) -> list[int]:
    """Those in the first 64 MiB of the train samples, and as far beyond as fewer than three are found."""
    name, found = "sample_skeleton_train.csv", Counter[int]()
    for number, piece in enumerate(raw.pieces(name)):
        if number >= _PLACES_PIECES and len(found) >= _NUM_PLACES:
            break
        found.update(map(int, re.findall(rb"[\x01,]301\x02([0-9]{1,18})\x03", piece.text)))
    counts = found.most_common()
    clear = len(counts) == _NUM_PLACES or (
        len(counts) > _NUM_PLACES and counts[_NUM_PLACES - 1][1] > 10 * counts[_NUM_PLACES][1]
    )
    if clear:  # what is rare beside them is a bad row where it stands
        return sorted(place for place, _ in counts[:_NUM_PLACES])
    shown = ", ".join(f"{feature} in {count:,} samples" for feature, count in counts[:8])
    raise DataError(
        f"{raw.paths[name]}: field 301, the scenario, has {len(found)} features there ({shown or 'none'}), not {_NUM_PLACES}."
        " Fetch the file again, or name the scenarios with --places."
    )


def _with_index(block: Block) -> Block:
    """The block with `common_features`: the index, up to 16 hexadecimal digits, as int64."""
    good = pc.match_substring_regex(block.table["common_feature_index"], "^[0-9a-fA-F]{1,16}$").to_numpy(zero_copy_only=False)
    block = block.require(
        good, "common_feature_index must be up to 16 hexadecimal digits, found {common_feature_index}. Mend the line."
    )
    padded = pc.ascii_lpad(block.table["common_feature_index"].combine_chunks(), 16, "0")
    letters = np.frombuffer(padded.cast(pa.binary(16)).buffers()[1], np.uint8, len(padded) * 16).reshape(-1, 16)
    return replace(block, table=block.table.append_column("common_features", pa.array(_from_hex(letters))))


def _from_hex(letters: NDArray[np.uint8]) -> NDArray[np.int64]:
    digits = np.where(letters >= ord("a"), letters - (ord("a") - 10), letters - ord("0"))
    digits = np.where((letters >= ord("A")) & (letters <= ord("F")), letters - (ord("A") - 10), digits)
    found = np.zeros(len(letters), np.uint64)
    for place in range(16):
        found = found << np.uint64(4) | digits[:, place].astype(np.uint64)
    return found.view(np.int64)


def _as_hex(index: np.int64) -> str:
    return f"{int(index) & (1 << 64) - 1:016x}"


def _with_features(block: Block, singles: Sequence[str], lists: Sequence[str], longest: int | None = None) -> Block:
    """The block with its entries as columns f<FIELD>, int64 or lists of int64, instead of `features`.

    Where a field with one value comes several times, the last entry counts. Lists have the features with the `longest`
    greatest values, in descending order; without `longest`, all in their order.
    """
    block, entries = _entries(block)
    num_rows = len(block.lines)
    code_of = {field: code for code, field in enumerate([*singles, *lists])}
    field = entries["field"].combine_chunks()
    code_of_index = np.array([code_of.get(name, -1) for name in field.dictionary.to_pylist()], np.int64)
    codes = code_of_index[field.indices.to_numpy()]
    rows, features, values = entries["row"].to_numpy(), entries["feature"].to_numpy(), entries["value"].to_numpy()
    single = (codes >= 0) & (codes < len(singles))
    table = np.full((len(singles), num_rows), _NO_FEATURE)
    table[codes[single], rows[single]] = features[single]
    columns: dict[str, Any] = {name: block.table[name] for name in block.table.column_names if name != "features"}
    columns |= {f"f{field}": pa.array(of, mask=of == _NO_FEATURE) for field, of in zip(singles, table, strict=True)}
    for code, field in enumerate(lists, len(singles)):
        here = np.flatnonzero(codes == code)
        if longest is not None:
            here = here[np.lexsort((-values[here], rows[here]))]
            starts = np.searchsorted(rows[here], rows[here])
            here = here[np.arange(len(here)) - starts < longest]
        ends = np.cumsum(np.bincount(rows[here], minlength=num_rows))
        offsets = pa.array(np.append(0, ends), pa.int32())
        columns[f"f{field}"] = pa.ListArray.from_arrays(offsets, pa.array(features[here]))
    return replace(block, table=pa.table(columns))


def _entries(block: Block) -> tuple[Block, pa.Table]:
    """The block without rows whose features are damaged; row (from 0), field, feature and value of each entry."""
    block = block.require(block.present("features"), "there are no features. Mend the line or fetch the file again.")
    texts = block.table["features"].combine_chunks()
    counts = pc.add(pc.count_substring(texts, "\x01"), 1).to_numpy()
    every = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts), "\n")
    lines = every[0].as_py().encode().translate(bytes.maketrans(b"\x01\x03", b"\n\x02")) if len(texts) else b""
    try:
        table = _parsed(lines)
        whole = len(table) == counts.sum() and not any(column.null_count for column in table.columns)
        whole = whole and bool(np.isfinite(table["value"].to_numpy()).all())
        whole = whole and b"\x020x" not in lines and b"\x020X" not in lines  # which Arrow takes for integers
        feature = table["feature"].to_numpy()
        whole = whole and bool(((feature > -(10**18)) & (feature < 10**18)).all())
    except pa.ArrowInvalid:
        whole = False
    if not whole:
        good = np.array([all(map(_is_entry, text.split("\x01"))) for text in texts.to_pylist()])
        if good.all():
            raise DataError(f"{block.path}, lines from {block.lines[0]}: the features cannot be parsed. Fetch the file again.")
        return _entries(block.require(good, f"the features are no {_ENTRIES}. Mend the line or fetch the file again."))
    return block, table.append_column("row", pa.array(np.repeat(np.arange(len(texts)), counts)))


def _is_entry(text: str) -> bool:
    found = _ENTRY.fullmatch(text)
    return found is not None and math.isfinite(float(found[1]))


def _parsed(lines: bytes) -> pa.Table:
    """Entries, one a line, as columns field, feature and value."""
    kinds = {"field": pa.dictionary(pa.int32(), _TEXT), "feature": _ID, "value": pa.float64()}
    if not lines:
        return pa.schema(kinds.items()).empty_table()
    return pyarrow.csv.read_csv(
        pa.py_buffer(lines),
        read_options=pyarrow.csv.ReadOptions(column_names=list(kinds), block_size=len(lines) + 1, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(delimiter="\x02", quote_char=False, ignore_empty_lines=False),
        convert_options=pyarrow.csv.ConvertOptions(column_types=kinds, null_values=[""]),
    )


DATASETS = (AliCCP,)
