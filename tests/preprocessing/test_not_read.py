"""Tables as others write them, in ways that are not read: told by name, with the remedy."""

import datetime
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.preprocessing.table_fake import small
from tests.preprocessing.test_tables_as_they_come import told


def lines(x="1", user="u", s="a", head="user,x,s,y", separator=","):
    rows = [separator.join([user, x, s, str(row % 2)]) for row in range(20)]
    return "\n".join([head.replace(",", separator), *rows]) + "\n"


def columns(**given):
    return pa.table({"user": ["u"] * 20, "x": range(20), "y": [0, 1] * 10} | {name: [of] * 20 for name, of in given.items()})


def records(**given):
    return "".join(json.dumps({"user": "u", "x": row, "y": row % 2} | given) + "\n" for row in range(20))


NUMBERS = "Numbers have a point before decimals and nothing between thousands"
OBJECTS = "What lies in an object is not read: write it as a column, or a key, of its own."
SCENARIO = {"column": "s", "values": ["a", "b"]}
IDS = {"features": {"user": {"kind": "ids"}}}
INTEGERS = {"features": {"user": {"kind": "id", "type": "int"}}}
DOTTED = {"features": {"user": {"kind": "id", "column": "user.id"}}}
PARTS = {"features": {"day": {"kind": "id"}}}
ZONE = {"keys": {"s": {"type": "datetime", "format": "%d.%m.%Y %H:%M %Z"}}}
NOT_READ = {
    "thousands with commas": ("a.csv", lines('"1,000"'), {}, ["x must be a number, found '1,000'", NUMBERS]),
    "thousands with blanks": ("a.csv", lines("1 000,5", separator=";"), {"csv": {"separator": ";"}}, [NUMBERS]),
    "decimal commas": ("a.csv", lines("1.234,5", separator=";"), {"csv": {"separator": ";"}}, [NUMBERS]),
    "integers with commas": ("a.csv", lines(user='"1,000"'), INTEGERS, ["user must be an integer, found '1,000'", NUMBERS]),
    "decimal commas in JSON": ("a.jsonl", records(x="1,5"), {}, ["x must be a number, found '1,5'", NUMBERS]),
    "decimal commas in Parquet": ("a.parquet", columns(x="1,5"), {}, ["x is no number that can be used, found 1,5", NUMBERS]),
    "a mark of order in a name": ("a.parquet", columns().rename_columns(["\ufeffuser", "x", "y"]), {}, ["mean '\\ufeffuser'"]),
    "a blank that is none": ("a.csv", lines(head="user\u00a0,x,s,y"), {}, ["Did you mean 'user\\xa0', with what is not seen"]),
    "UTF-16 without a mark": ("a.csv", lines().encode("utf-16-le"), {}, ["It holds zero bytes, as text in UTF-16 does"]),
    "control characters": ("a.csv", lines(separator="\x01"), {}, ['Set another: csv: {separator: "\\u0001"}.']),
    "lists of lists": ("a.parquet", columns(user=[["a"], ["b"]]), IDS, ["is of type list<", "list of strings is needed."]),
    "lists of structs": ("a.parquet", columns(user=[{"id": "a"}]), IDS, ["list of strings is needed.", OBJECTS]),
    "a struct": ("a.parquet", columns(user={"id": "a"}), {}, ["is of type struct<", OBJECTS]),
    "a field of a struct": ("a.parquet", columns(user={"id": "a"}), DOTTED, ["there is no column 'user.id'.", OBJECTS]),
    "an object": ("a.jsonl", records(user={"id": "a"}), {}, ["user must be a string, found {'id': 'a'}.", OBJECTS]),
    "a value of an object": ("a.jsonl", records(user={"id": "a"}), DOTTED, ["no line has the key 'user.id'.", OBJECTS]),
    "a key that stands as a value": (
        "a.jsonl",
        records(user="shop"),
        {"features": {"shop": {"kind": "id"}}},
        ["no line has the key 'shop'. Keys: user"],
    ),
    "a column in folders": ("day=1/a.parquet", columns(), PARTS, ["there is no column 'day'", "folder, day=1, which is not"]),
    "a field in folders": (
        "day=1/a.csv",
        lines(),
        PARTS,
        ["the header lacks day", "folder, day=1, which is not read: write it"],
    ),
    "a key in folders": ("day=1/a.json", records(), PARTS, ["no line has the key 'day'", "folder, day=1, which is not read"]),
    "scenarios in blanks": (
        "a.csv",
        lines(s=" a"),
        {"scenario": SCENARIO},
        ["found ' a'. Blanks stand around it: strip: true"],
    ),
    "scenarios of dates": (
        "a.csv",
        lines(),
        {"scenario": SCENARIO | {"values": [datetime.date(2024, 5, 1), datetime.date(2024, 5, 2)]}},
        ["scenario.values: 2024-05-01 among the values: integers and texts tell scenarios; write it in quotes."],
    ),
    "names of zones": ("a.csv", lines(s="31.05.2024 12:00 CET"), ZONE, ["found 31.05.2024 12:00 CET", "UTC and GMT are known"]),
    "packed twice": ("a.csv.gz", gzip.compress(gzip.compress(lines().encode())), {}, ["a.csv.gz: packed by gzip twice."]),
    "an archive": ("a.tar.gz", gzip.compress(lines().encode()), {}, ["a.tar.gz is packed in a way that is not read."]),
    "a spreadsheet's first line": ("a.csv", "sep=;\n" + lines(separator=";"), {}, ["With csv: {comment: 'sep='} this line"]),
    "carriage returns alone": ("a.csv", lines().replace("\n", "\r"), {}, ["Its lines end in carriage returns alone: write"]),
    "blanks alone": (
        "a.csv",
        lines(x=" "),
        {},
        ["found ' '. Where blanks alone mean a missing value, say"],
    ),
    "a list as text": ("a.jsonl", records(user="a,b"), IDS, ["found 'a,b'", "name what stands between them: separator."]),
    "a list where a text is wanted": (
        "a.jsonl",
        records(user=["a"]),
        {},
        ["['a']. A list of ids is a feature of kind: ids, wi"],
    ),
    "a list column of one id": ("a.parquet", columns(user=["a"]), {}, ["A list of ids is a feature of kind: ids, without a"]),
    "a list of Python": (
        "a.csv",
        lines(user="\"['a', 'b']\""),
        IDS,
        ['Mend the line, such as ["a", "b"], or'],
    ),
    "all in objects": ("a.jsonl", '{"id": 1, "of": {"user": "u", "x": 1, "y": 1}}\n' * 20, {}, ["the key 'user'.", OBJECTS]),
    "a workbook": ("a.xlsx", b"PK", {}, ["a.xlsx is of a format that is not read. Save it as CSV, JSON lines or Parquet."]),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_is_not_read_is_told_by_name_with_the_remedy(case, tmp_path, capsys):
    name, content, config, words = NOT_READ[case]
    (tmp_path / "raw" / name).parent.mkdir(parents=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, tmp_path / "raw" / name)
        content = (tmp_path / "raw" / name).read_bytes()
    message = told(capsys, small(tmp_path, content, name, **config), tmp_path / "out")
    assert [each for each in words if each not in message] == [], message
