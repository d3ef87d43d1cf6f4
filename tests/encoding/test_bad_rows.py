"""Raw rows that cannot be encoded: the message names row, column and value; and what the rule of scenarios says of others."""

import datetime
import decimal

import pyarrow as pa
import pytest

from mmlrec.encoding.encoder import Encoder
from mmlrec.errors import DataError
from tests.preprocessing.table_fake import run, small

LINES = "user,item,tags,words,codes,x,place\n" + "".join(
    f'{i % 5},i{i % 7},{i % 3}|{i % 4},"[""a{i % 3}""]",[{i % 3}],{i}.5,{"north" if i % 2 else "south"}\n' for i in range(60)
)
FEATURES = {
    "user": {"kind": "id", "type": "int"},
    "item": {"kind": "id"},
    "tags": {"kind": "ids", "type": "int", "separator": "|"},
    "words": {"kind": "ids"},
    "codes": {"kind": "ids", "type": "int"},
    "x": {"kind": "number", "allow_label_feature": True},
}
GOOD = {"user": 1, "item": "i1", "tags": "1|2", "words": ["a1"], "codes": [1], "x": 1.5, "place": "north"}


def made(folder, others="error", values=("north", "south"), lines=LINES, **config):
    folder.mkdir(exist_ok=True)
    scenario = {"column": "place", "values": values if isinstance(values, dict) else list(values), "others": others}
    base = {"features": FEATURES, "tasks": [{"name": "y", "label": "x > 20"}], "scenario": scenario}
    assert run(small(folder, lines, **{**base, **config}), folder / "out", "--max-bad-rows", "20") == 0
    return Encoder.load(folder / "out")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("table"))


def table(**columns):
    """Rows that are good but for these columns."""
    num_rows = len(next(iter(columns.values())))
    rows = {name: pa.array([value] * num_rows) for name, value in GOOD.items()}
    return pa.table(
        rows | {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    )


def large(column, found):
    """What is said of an integer beyond 64 bits in row 1, whatever it came as."""
    hint = "Integers have a sign; as text, type: string, it can be an id."
    return f"row 1 (counted from 0): {column} does not fit into 64 bits, found {found}. {hint}"


BAD_CELLS = {
    "fraction": ({"user": [1.0, 2.0, 2.5]}, "row 2 (counted from 0): user must be an integer of 64 bits, found 2.5."),
    "infinite id": ({"user": [1.0, float("inf")]}, "row 1 (counted from 0): user must be an integer of 64 bits, found inf."),
    "large": (
        {"user": pa.array([1, 2**63], pa.uint64())},
        large("user", 2**63),
    ),
    "word": ({"user": ["1", "two"]}, "row 1 (counted from 0): user must be an integer of 64 bits, found two."),
    "large text": ({"user": ["1", str(2**63)]}, large("user", 2**63)),
    "very large text": ({"user": ["1", "9" * 30]}, large("user", "9" * 30)),
    "large text below 0": ({"user": ["1", str(-(2**63) - 1)]}, large("user", -(2**63) - 1)),
    "large text with a point": ({"user": ["1", f"{2**64}.0"]}, large("user", f"{2**64}.0")),
    "large decimal": ({"user": pa.array(["1", str(2**64 - 1)]).cast(pa.decimal128(20, 0))}, large("user", 2**64 - 1)),
    "large element": ({"tags": pa.array([[1], [2, 2**63]], pa.list_(pa.uint64()))}, large("tags", [2, 2**63])),
    "large one among several": ({"tags": ["1", f"1|{2**63}"]}, large("tags", f"1|{2**63}")),
    "large one in a JSON list": (
        {"codes": ["[1]", f"[2, {2**63}]"]},
        f"codes does not fit into 64 bits, found [2, {2**63}]. Integers have a sign; as text, type: string, it can be an id",
    ),
    "zeros before a number beside another fault": ({"user": ["0" * 30 + "7", "x"]}, "row 1 (counted from 0): user must be"),
    "large float": (
        {"user": [1.0, 2.0**63]},
        "row 1 (counted from 0): user must be an integer of 64 bits, found 9.223372036854776e+18. Floats are rounded",
    ),
    "hexadecimal": ({"user": ["0x1"]}, "row 0 (counted from 0): user must be an integer of 64 bits, found 0x1."),
    "decimal": ({"user": [decimal.Decimal("2.5")]}, "row 0 (counted from 0): user must be an integer of 64 bits, found 2.5."),
    "number as text id": ({"item": [1.5]}, "row 0 (counted from 0): item must be text, or an integer, found 1.5."),
    "elements": ({"tags": [[1], [2, 2.5]]}, "row 1 (counted from 0): tags must be an integer of 64 bits, found [2.0, 2.5]."),
    "separated": (
        {"tags": ["1", "1|x"]},
        "row 1 (counted from 0): tags must hold integers of 64 bits, divided by '|', found 1|x.",
    ),
    "no JSON": ({"words": ["[]", "a"]}, "row 1 (counted from 0): words must be a JSON list of strings, found a."),
    "infinite": (
        {"x": [1.0, float("-inf")]},
        "row 1 (counted from 0): x must be a finite number that float32 can hold, found -inf.",
    ),
    "too large": ({"x": [1e39]}, "row 0 (counted from 0): x must be a finite number that float32 can hold, found 1e+39."),
    "no number": ({"x": ["1", "one"]}, "row 1 (counted from 0): x must be a number, found one."),
    "nan as text": ({"x": ["1", "nan"]}, "row 1 (counted from 0): x must be a number, found nan."),
    "scenario": ({"place": ["north", "west"]}, "row 1 (counted from 0): place holds no value of the scenarios, found west."),
    "no scenario": ({"place": ["north", None]}, "row 1 (counted from 0): place holds no value of the scenarios, found None."),
    "boolean": ({"user": [True]}, "column 'user' is of type bool; an integer is needed in each row."),
    "time": ({"x": [datetime.datetime(2024, 1, 1)]}, "column 'x' is of type timestamp[us]; a number is needed in each row."),
    "list": ({"item": [["a"]]}, "column 'item' is of type list<item: string>; text is needed in each row."),
    "no list": ({"words": [1]}, "column 'words' is of type int64; a list of ids is needed in each row"),
    "bytes": ({"item": [b"a"]}, "column 'item' is of type binary; text is needed in each row."),
}


@pytest.mark.parametrize("case", BAD_CELLS)
def test_bad_cells_are_told_by_row_column_and_value(encoder, case):
    columns, message = BAD_CELLS[case]
    for give in (encoder.canonical, encoder.inputs):
        with pytest.raises(DataError) as told:
            give(table(**columns))
        assert message in str(told.value)


def test_the_row_is_that_of_all_rows_not_of_those_that_go_through_together(encoder):
    with pytest.raises(DataError, match=r"row 9000 \(counted from 0\): x must be a finite number"):
        encoder.inputs(table(x=[1.0] * 9000 + [float("inf")]))


def test_the_first_bad_row_of_a_column_is_told(encoder):
    with pytest.raises(DataError, match=r"row 1 .*found a\."):
        encoder.inputs(table(user=["1", "a", "b"]))


def test_a_missing_column_is_named_with_what_it_is_for(encoder):
    rows = table(x=[1.0])
    with pytest.raises(
        DataError, match=r"no column 'item', which feature item is made of\. Did you mean 'itme'\? Columns: user, itme"
    ):
        encoder.inputs(rows.rename_columns(["user", "itme", *rows.column_names[2:]]))
    with pytest.raises(DataError, match="no column 'place', which scenario is made of"):
        encoder.canonical(rows.drop_columns(["place"]))
    assert encoder.canonical(rows.drop_columns(["place"]), scenario=False).schema.names == list(FEATURES)


def test_two_columns_of_one_name(encoder):
    rows = table(x=[1.0])
    with pytest.raises(DataError, match="two columns have the name 'x'"):
        encoder.inputs(rows.append_column("x", rows["x"]))
    encoder.inputs(rows.append_column("other", rows["x"]).append_column("other", rows["x"]))


def test_scenarios_that_training_dropped_are_errors_and_those_that_join_join(tmp_path):
    dropping, joining = made(tmp_path / "drop", "drop", ["north", "east"]), made(tmp_path / "join", "south", ["north", "south"])
    rows = table(place=["north", "west", None])
    with pytest.raises(
        DataError, match=r"row 1 \(counted from 0\): place holds no value of the scenarios, found west\. Known are: east, north"
    ):
        dropping.inputs(rows)
    assert joining.inputs(rows).scenario.tolist() == joining.canonical(rows)["sample.scenario"].to_pylist() == [0, 1, 1]


def test_scenarios_by_number(tmp_path):
    lines = LINES.replace("north", "1").replace("south", "2")
    encoder = made(tmp_path, "rest", {2: "two", 1: "one"}, lines)
    assert encoder.scenario.values == ("two", "one", "rest")
    for places in ([1, 2, 3, None], ["1", "2.0", "3", ""], [1.0, 2.0, 3.0, float("nan")], pa.array([1, 2, 3, None], pa.int8())):
        assert encoder.inputs(table(place=places)).scenario.tolist() == [1, 0, 2, 2]
    rows = table(place=["1", "one"])
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\): place must be an integer of 64 bits, found one"):
        encoder.inputs(rows)


def test_columns_say_what_is_read(encoder):
    found = {column.name: (str(column.type), column.is_list, column.uses) for column in encoder.columns.values()}
    assert found == {
        "user": ("int64", False, ("feature user",)),
        "item": ("string", False, ("feature item",)),
        "tags": ("string", False, ("feature tags",)),
        "words": ("list<item: string>", True, ("feature words",)),
        "codes": ("list<item: int64>", True, ("feature codes",)),
        "x": ("double", False, ("feature x",)),
        "place": ("string", False, ("scenario",)),
    }
