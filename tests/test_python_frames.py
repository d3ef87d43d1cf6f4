"""Frames of other types and forms than those that pandas makes by itself, as `mmlrec.prepare` takes them."""

from datetime import date

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import mmlrec
from mmlrec.errors import ConfigError, DataError
from mmlrec.serving.rows import raw_table
from tests.test_python_api import COLUMNS, data_split, frame_of, parts

KEYS = {"user": {"type": "int"}, "time": {"type": "datetime"}}


@pytest.fixture(scope="module")
def frame():
    return frame_of()


@pytest.fixture(scope="module")
def data(frame):
    return mmlrec.prepare(frame, **COLUMNS, split=data_split())


def test_types_of_arrow_are_taken_as_what_they_hold(frame, data):
    table = pa.Table.from_pandas(frame, preserve_index=False)
    item = pa.array(frame["item"].astype(str)).dictionary_encode()
    with_null = pa.DictionaryArray.from_arrays(
        item.indices, pa.concat_arrays([item.dictionary, pa.nulls(1, item.type.value_type)])
    )
    for column, cells in {
        "user": pa.array(frame["user"]).cast(pa.decimal128(38)),
        "item": with_null,  # of which Parquet holds none
        "device": pa.array(frame["device"].astype(str), pa.string_view()),
        "tags": pa.array(list(frame["tags"]), pa.list_view(pa.string_view())),
    }.items():
        table = table.set_column(table.column_names.index(column), column, cells)
    features = {"user": "id", "item": "id", "tags": "ids", "price": "number"}
    assert parts(mmlrec.prepare(table, **COLUMNS | {"features": features, "keys": KEYS}, split=data_split()).path) == parts(
        data.path
    )


def test_categories_of_views_and_half_floats_are_taken_by_short_forms(frame):
    halves, item = frame["price"].to_numpy(np.float16, na_value=np.nan), frame["item"].astype(str)
    plain = pa.table(
        {"item": list(item), "tags": list(frame["tags"]), "price": halves.astype(np.float64), "click": frame["click"]}
    )
    for column, cells in {
        "item": pa.array(list(item), pa.string_view()).dictionary_encode(),
        "tags": pa.array(list(frame["tags"]), pa.list_(pa.string_view())),
        "price": pa.array(halves),
    }.items():
        table = plain.set_column(plain.column_names.index(column), column, cells)
        made = [mmlrec.prepare(each, features=["item", "tags", "price"], tasks=["click"]) for each in (plain, table)]
        assert parts(made[0].path) == parts(made[1].path)


def seconds_of(text):
    return np.int64(pd.Timestamp(text).timestamp())


@pytest.mark.parametrize("of", [str, date.fromisoformat, pd.Timestamp, lambda text: pd.Timestamp(text, tz="UTC"), seconds_of])
def test_cuts_are_dates_of_any_form_and_an_extension_keeps_them(frame, of):
    split = {"rule": "time", "key": "time", "cuts": [of("2024-02-10"), of("2024-02-20")]}
    first = mmlrec.prepare(frame, **COLUMNS, split=split)
    for made in (first, mmlrec.prepare(frame, extend=first)):
        rows = {name: part.num_rows for name, part in made.manifest.splits.items()}
        assert rows == {"train": 40 * 24, "valid": 10 * 24, "test": len(frame) - 50 * 24}


def test_labels_of_which_none_is_known_yet_are_no_labels(frame, data):
    later = frame.assign(click=None, buy=None)
    splits = mmlrec.prepare(later, like=data).manifest.splits
    assert splits["test"].num_rows == len(frame)
    assert splits["test"].label_counts["click"]["all"] == (0, 0)


def test_a_frame_of_another_library_is_told_how_it_becomes_an_arrow_table(frame):
    """As those of polars, which gives texts as views and lists as large ones."""

    class DataFrame:
        def __init__(self, table):
            self.__arrow_c_stream__ = table.__arrow_c_stream__

    DataFrame.__module__ = "polars.dataframe.frame"
    given = DataFrame(pa.Table.from_pandas(frame, preserve_index=False))
    told = r"found polars\.DataFrame; give pyarrow\.table\(frame\)"
    with pytest.raises(ConfigError, match=told):
        mmlrec.prepare(given, **COLUMNS)
    with pytest.raises(DataError, match=told):
        raw_table(given, {})
    assert pa.table(given).column_names == list(frame.columns)  # what it is told to do
