"""Raw rows of a table of one's own, in any types, become what a reference in plain Python says, cell by cell."""

import json
import math
import random
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.inputs import Inputs
from tests.encoding.reference import Reference
from tests.preprocessing.table_fake import run, write_config

CONFIG = {
    "missing": ["NULL", "?", "-1"],
    "strip": True,
    "features": {
        "user": {"kind": "id", "type": "int"},
        "item": {"kind": "id", "min_count": 2},
        "bought": {"kind": "ids", "separator": "|", "table": "item"},
        "numbers": {"kind": "ids", "type": "int", "separator": ";"},
        "tags": {"kind": "ids", "type": "int"},
        "words": {"kind": "ids"},
        "page": {"kind": "id", "column": "url of page", "hash": {"num_buckets": 50, "num_hashes": 3, "seed": 7}},
        "seller": {"kind": "id", "type": "int", "hash": {"num_buckets": 20, "seed": 2**40}},
        "sellers": {"kind": "ids", "type": "int", "table": "seller"},
        "queries": {"kind": "ids", "hash": {"num_buckets": 1000, "num_hashes": 2}},
        "visitor": {"kind": "id", "column": "seller", "type": "int", "managed": {"slots": 5, "seed": 2**40}},
        "visitors": {"kind": "ids", "column": "sellers", "type": "int", "table": "visitor"},
        "asked": {"kind": "ids", "column": "queries", "managed": {"slots": 5}},
        "price": {"kind": "number", "indicator": True},
        "sold": {"kind": "number", "scale": "log", "fill": 100, "indicator": True},
        "loss": {"kind": "number", "scale": "log"},
        "rank": {"kind": "number", "scale": "none"},
        "share": {"kind": "number", "scale": "none", "fill": 0.1, "column": "rank"},
        "age": {"kind": "number", "buckets": 5},
        "one": {"kind": "number"},
        "flag": {"kind": "number"},
        "flag_id": {"kind": "id", "column": "flag text"},
    },
    "tasks": [{"name": "y", "label": "y"}],
    "scenario": {"column": "device", "values": {"phone": "mobile", "desktop": "desktop", "tablet": "mobile"}, "others": "rest"},
}
#: A list of ids needs some text in JSON lines, as with a separator.
TEXTS = ("bought", "numbers")


def records(num_rows, seed, new=False):
    """Rows with values of Python; `new`: with what no train row has, too."""
    draw = random.Random(seed)
    return [record(row, draw, new) for row in range(num_rows)]


def record(row, draw, new):
    more = 2 if new else 1
    items = (f"item {k}" if k % 3 else f'"{k}", straße and more of it' for k in range(30 * more))
    price = draw.lognormvariate(2, 1)
    return {
        "user": draw.choice([None, *range(2**61, 2**61 + 30 * more)]),
        "item": draw.choice([None, *items]),
        "bought": [f"item {draw.randrange(40 * more)}" for _ in range(draw.choice([0, 1, 3]))],
        "numbers": [draw.randrange(-1, 20 * more) for _ in range(draw.choice([0, 1, 2]))],
        "tags": [draw.randrange(-5, 30 * more) for _ in range(draw.choice([0, 1, 2]))],
        "words": [draw.choice(["NULL", "", "a", "b", "new" if new else "c"]) for _ in range(draw.choice([0, 1, 2]))],
        "url of page": draw.choice([None, "/", *(f"/{k}" * k for k in range(20))]),
        "seller": draw.choice([None, -(2**63), 2**63 - 1, *range(30)]),
        "sellers": [draw.randrange(30) for _ in range(draw.choice([0, 1, 2]))],
        "queries": [f"wörd {draw.randrange(99)}" for _ in range(draw.choice([0, 1, 2]))],
        "price": draw.choice([None, round(price, 2), -1.0, price * more * more]),
        "sold": draw.choice([None, 0, -3, 10 ** draw.randrange(7), *([10**12] if new else [])]),
        "loss": draw.choice([None, -draw.random() * 1e6, draw.random(), *([-1e30] if new else [])]),
        "rank": draw.choice([None, draw.random(), 1e-20, 3e38]),
        "age": draw.choice([None, 18, draw.randrange(18, 90), *([7, 2**53 + 1] if new else [])]),
        "one": draw.choice([None, 5, *([6] if new else [])]),
        "flag": draw.choice([None, True, False]),
        "flag text": draw.choice([True, False]),
        "y": row % 2,
        "device": draw.choice(["phone", "desktop", "tablet", "watch", None]),
    }


def as_text(row, dirty=None):
    """The cells of a row as CSV has them; `dirty`: with blanks around them, and marks of missing values, drawn by it."""
    cells = {}
    for name, value in row.items():
        if isinstance(value, list):
            separator = CONFIG["features"][name].get("separator")
            text = separator.join(map(str, value)) if separator else json.dumps(value)
        else:
            text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            text += ".0" if text and dirty is not None and name == "user" and dirty.random() < 0.5 else ""
        if dirty is not None:
            text = dirty.choice(["NULL", "?", ""]) if text == "" else text
            text = dirty.choice(["", " ", "\t "]) + text + dirty.choice(["", " "])
        cells[name] = text
    return cells


def write_csv(path, rows, dirty):
    pd.DataFrame([as_text(row, dirty) for row in rows]).to_csv(path, index=False)


def write_json(path, rows, dirty):
    lines = []
    for row in rows:
        texts = {name: as_text(row, dirty)[name] for name in TEXTS}
        lines.append(json.dumps({**row, **texts, "flag text": as_text(row)["flag text"]}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def write_parquet(path, rows, dirty):
    frame = pd.DataFrame([{**row, **{name: as_text(row, dirty)[name] for name in TEXTS}} for row in rows])
    for name in ("user", "seller"):
        frame[name] = pd.array([row[name] for row in rows], "Int64")
    frame.to_parquet(path)


WRITE = {"csv": write_csv, "jsonl": write_json, "parquet": write_parquet}


#: Marks by column: the same everywhere, but for the words, among which NULL is one.
BY_COLUMN = {name: CONFIG["missing"] for name in record(0, random.Random(0), False) if name not in ("words", "y")}


@pytest.fixture(scope="module", params=[*WRITE, "csv, marks by column"])
def trained(request, tmp_path_factory):
    """An encoder fitted on files of a form; and the reference, fitted on the values themselves."""
    folder, form = tmp_path_factory.mktemp("table"), request.param.partition(",")[0]
    for side, num_rows in (("train", 300), ("valid", 30), ("test", 30)):
        WRITE[form](folder / f"{side}.{form}", records(num_rows, len(side)), random.Random(3))
    names = {side: [f"{side}.{form}"] for side in ("train", "valid", "test")}
    config = CONFIG | {"split": {"rule": "file", **names}} | ({"missing": BY_COLUMN} if form != request.param else {})
    assert run(write_config(folder, config), folder / "out") == 0
    return Encoder.load(folder / "out"), Reference(config, records(300, len("train")))


def typed(rows):
    return pa.Table.from_pylist(rows)


def with_other_types(rows):
    """Dictionaries, large strings, lists of fixed and of large size, small integers, decimals, half and single floats."""
    table = pa.Table.from_pylist(rows)
    types = {
        "item": pa.dictionary(pa.int8(), pa.string()),
        "url of page": pa.large_string(),
        "sellers": pa.large_list(pa.int32()),
        "words": pa.list_(pa.dictionary(pa.int32(), pa.string())),
        "device": pa.string_view(),
        "one": pa.float16(),
        "age": pa.decimal128(38, 3),
        "tags": pa.list_(pa.int16()),
    }
    for name, kind in types.items():
        values = table[name].combine_chunks()
        if pa.types.is_dictionary(kind):
            values = values.dictionary_encode()
        elif name == "words":
            values = pa.ListArray.from_arrays(values.offsets, values.values.dictionary_encode())
        else:
            values = values.cast(kind)
        table = table.set_column(table.column_names.index(name), name, values)
    return table.combine_chunks() if len(table) % 2 else pa.concat_tables([table.slice(0, 7), table.slice(7)])


def from_pandas(rows):
    """With NaN for numbers that are missing, in floating-point columns; ids beyond 2^53 as integers."""
    frame = pd.DataFrame(rows)
    for name in ("user", "seller"):
        frame[name] = pd.array([row[name] for row in rows], "Int64")
    return pa.Table.from_pandas(frame)


def with_nan(rows):
    """NaN itself where a float is missing, as a list of dictionaries from pandas has it."""
    names = ("price", "loss", "rank", "age", "one")
    numbers = [{name: math.nan if row[name] is None else float(row[name]) for name in names} for row in rows]
    return pa.Table.from_pylist([row | some for row, some in zip(rows, numbers, strict=True)])


def text(rows):
    return pa.Table.from_pylist([as_text(row) for row in rows])


def dirty_text(rows):
    return pa.Table.from_pylist([as_text(row, random.Random(len(rows))) for row in rows])


FORMS = (typed, with_other_types, from_pandas, with_nan, text, dirty_text)


def rounded(value):
    return value if isinstance(value, int | list) else pytest.approx(value, rel=2e-7, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_cells_become_what_the_reference_says(trained, form):
    encoder, reference = trained
    rows = records(401, 9, new=True)
    expected, table = [reference.encoded(row) for row in rows], form(rows)
    encoded = encoder.encode(encoder.canonical(table))
    assert set(encoded.schema.names) == set(expected[0])
    for name in encoded.schema.names:
        for row, (found, right) in enumerate(zip(encoded.column(name).to_pylist(), expected, strict=True)):
            assert found == rounded(right[name]), (name, row, rows[row])
    with mock.patch.object(Encoder, "canonical", side_effect=AssertionError("not column by column")):
        inputs = encoder.inputs(table)
    assert_equal(inputs, Inputs.of(encoded, encoder))


def test_each_row_alone(trained):
    """Where columns of a table of one row are of type null, or lists are empty."""
    encoder, reference = trained
    for row in records(60, 11, new=True):
        inputs, right = encoder.inputs(pa.Table.from_pylist([row])), reference.encoded(row)
        for name, (ids, offsets) in inputs.ids.items():
            wanted = right[name] if isinstance(right[name], list) else [right[name]]
            assert (ids.tolist(), offsets.tolist()) == (wanted, [0, len(wanted)]), (name, row)
        dense = [spec.name for spec in encoder.features if spec.kind == "dense"]
        assert dict(zip(dense, inputs.dense[0].tolist(), strict=True)) == {name: rounded(right[name]) for name in dense}
        assert inputs.scenario.tolist() == [right["sample.scenario"]]


def assert_equal(found, right):
    assert found.num_rows == right.num_rows
    assert list(found.ids) == list(right.ids)
    for name, pair in right.ids.items():
        for some, others in zip(found.ids[name], pair, strict=True):
            assert some.dtype == np.int64
            np.testing.assert_array_equal(some, others, err_msg=name)
    assert found.dense.dtype == np.float32
    np.testing.assert_array_equal(found.dense, right.dense)
    np.testing.assert_array_equal(found.scenario, right.scenario)


def test_more_rows_than_go_through_together(trained):
    encoder, _ = trained
    rows = pa.concat_tables([typed(records(401, 9, new=True))] * 22).slice(3)
    assert_equal(encoder.inputs(rows), Inputs.of(encoder.encode(encoder.canonical(rows)), encoder))


def test_no_rows(trained):
    encoder, _ = trained
    inputs = encoder.inputs(typed(records(3, 1)).slice(0, 0))
    assert inputs.num_rows == 0
    assert inputs.dense.shape == (0, sum(spec.kind == "dense" for spec in encoder.features))
    assert all(ids.shape == (0,) and offsets.tolist() == [0] for ids, offsets in inputs.ids.values())


def test_the_mapped_form_gives_the_same(trained, tmp_path):
    encoder, _ = trained
    encoder.save(tmp_path / "encoder")
    mapped = Encoder.load(tmp_path / "encoder")
    assert mapped.facts == encoder.facts
    assert mapped.features == encoder.features
    assert mapped.columns == encoder.columns
    for form in FORMS[:3]:
        rows = form(records(200, 5, new=True))
        assert_equal(mapped.inputs(rows), encoder.inputs(rows))
        assert mapped.canonical(rows).equals(encoder.canonical(rows))
