"""Tables of one's own: configurations and raw files that cannot be used."""

import bz2
import json
import lzma
import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from preprocessing.reading import packed
from tests.preprocessing.table_fake import GOOD_LINES, GOOD_LINES_CONFIG, SMALL, run, small

BAD_CONFIGS = {
    "no config": ("missing.yaml", ["missing.yaml: no such config file"]),
    "unknown key": ({"feature": {}}, ["my_table.yaml: feature: unknown key. Did you mean 'features'?"]),
    "unknown option": (
        {"features": {"user": {"kind": "id", "min_cout": 2}}},
        ["features.user.min_cout: unknown key. Did you mean 'min_count'? Allowed: allow_label_feature, column, hash, kind, "],
    ),
    "option of another kind": (
        {"features": {"user": {"kind": "number", "separator": "|"}}},
        ["features.user.separator: unknown key. Allowed: allow_label_feature, buckets, column, fill, indicator, kind, scale."],
    ),
    "task of two words": (
        {"tasks": [{"name": "to cart", "label": "y"}]},
        ["tasks.0.name: 'to cart' cannot be a name", "such as to_cart. ", "label: '`to cart`'"],
    ),
    "unknown kind": (
        {"features": {"user": {"kind": "idd"}}},
        ["features.user.kind: 'idd' is none of id, ids, number.", "'id'?"],
    ),
    "no kind": ({"features": {"user": {}}}, ["features.user.kind: required, but not given"]),
    "bad name": (
        {"features": {"user.id": {"kind": "id"}}},
        ["features.user.id: 'user.id' cannot be a name", "such as user_id. ", "column: 'user.id'"],
    ),
    "wrong type": ({"features": {"user": {"kind": "id", "min_count": "2"}}}, ["features.user.min_count", "integer; found '2'"]),
    "no features": ({"features": {}}, ["features", "at least 1"]),
    "no tasks": ({"tasks": []}, ["tasks", "at least 1"]),
    "two tasks of one name": ({"tasks": [{"name": "y", "label": "y"}] * 2}, ["two tasks have one name"]),
    "bad condition": ({"tasks": [{"name": "y", "label": "y > "}]}, ["tasks.0: 'y >' cannot be read", "COLUMN in [1, 2]"]),
    "code as condition": (
        {"tasks": [{"name": "y", "label": "__import__('os').getcwd() == 1"}]},
        ["tasks.0", "a condition compares columns with constants"],
    ),
    "regression of a condition": (
        {"tasks": [{"name": "y", "label": "y > 1", "kind": "regression"}]},
        ["tasks.0", "names a column"],
    ),
    "hash and count": (
        {"features": {"user": {"kind": "id", "min_count": 2, "hash": {"num_buckets": 3}}}},
        ["features.user: min_count and hash exclude each other"],
    ),
    "unknown option of hash": (
        {"features": {"user": {"kind": "id", "hash": {"buckets": 3}}}},
        ["features.user.hash.buckets: unknown key. Did you mean 'num_buckets'?", "features.user.hash.num_buckets: required"],
    ),
    "buckets and scale": ({"features": {"x": {"kind": "number", "buckets": 3, "scale": "log"}}}, ["scale and buckets exclude"]),
    "unknown shared table": (
        {"features": {"user": {"kind": "id"}, "friend": {"kind": "id", "table": "usr"}}},
        ["features.friend.table: 'usr' is no feature of ids", "Did you mean 'user'?"],
    ),
    "shared table of another type": (
        {"features": {"user": {"kind": "id"}, "friend": {"kind": "id", "type": "int", "table": "user"}}},
        ["features.friend is int, but 'user', whose table it shares, string"],
    ),
    "column of two types": (
        {"features": {"user": {"kind": "id"}, "u2": {"kind": "number", "column": "user"}}},
        ["column 'user' is read as string by features.user, but as double by features.u2"],
    ),
    "unknown key column": ({"split": {"rule": "group", "key": "usr"}}, ["split.key: 'usr' is not among the keys"]),
    "group key of times": (
        {"keys": {"user": {"type": "datetime"}}, "group_key": "user"},
        ["group_key: key 'user' is of type datetime; int or string is needed"],
    ),
    "key that is the rows' own": (
        {"keys": {"source_line": {"type": "int", "column": "x"}}},
        ["keys.source_line: rows get a key of this name by themselves; rename yours"],
    ),
    "key of the group's hash": (
        {"keys": {"user": {"type": "string"}, "user_hash": {"type": "int", "column": "x"}}, "group_key": "user"},
        ["keys.user_hash: rows get a key of this name by themselves"],
    ),
    "weight of another type": ({"weight": "user"}, ["column 'user' is read as string", "but as double by weight"]),
    "unknown rule": ({"split": {"rule": "tim"}}, ["split.rule: 'tim' is none of", "Did you mean 'time'?"]),
    "cuts in the wrong order": (
        {"keys": {"x": {"type": "int"}}, "split": {"rule": "time", "key": "x", "cuts": [5, 3]}},
        ["split", "the second cut must be after the first"],
    ),
    "one scenario": ({"scenario": {"column": "user", "values": ["u0"]}}, ["scenario: two or more scenarios are needed"]),
    "scenarios that YAML takes for booleans": ({"scenario": {"column": "user", "values": [False, "SE"]}}, ["in quotes"]),
    "files twice": (
        {"split": {"rule": "file", "train": ["rows.csv"], "test": ["rows.csv"]}, "files": []},
        ["split.test: rows.csv is also among split.train"],
    ),
    "a scenario called all": (
        {"scenario": {"column": "user", "values": {"u0": "all", "u1": "b"}}},
        ["'all' is the word for all scenarios together"],
    ),
    "the last task implied by none": (
        {"tasks": [{"name": "y", "label": "y", "implied_by_next": True}]},
        ["tasks.y.implied_by_next: no task follows"],
    ),
    "no label": ({"tasks": [{"name": "y", "label": ""}]}, ["tasks.0.label", "at least 1"]),
    "two columns of one name": ({"csv": {"header": False, "columns": ["user", "x", "x", "y"]}}, ["two columns have one name"]),
    "unknown encoding": ({"csv": {"encoding": "utf8000"}}, ["there is no encoding 'utf8000'"]),
    "encoding of two bytes": ({"csv": {"encoding": "utf-16"}}, ["convert the file to utf-8"]),
    "no text encoding": ({"csv": {"encoding": "hex"}}, ["there is no encoding 'hex'"]),
    "separator that is a quote": ({"csv": {"separator": '"'}}, ["a separator has neither a quote"]),
    "no pattern": ({"files": ["**rows.csv"]}, ["files: '**rows.csv' is no pattern"]),
    "no files": ({"files": []}, ["`files` is missing"]),
    "files and file split": ({"split": {"rule": "file", "train": ["a"], "test": ["b"]}}, ["leave `files` away"]),
    "missing file": ({"files": ["row.csv"]}, ["no file 'row.csv'", "Did you mean 'rows.csv'?", "--raw"]),
    "file outside": ({"files": ["../rows.csv"]}, ["files: '../rows.csv' must lie below the folder that --raw gives"]),
    "mixed formats": ({"files": ["rows.csv", "my_table.yaml"]}, ["format: cannot be told from the names"]),
    "separator for Parquet": ({"format": "parquet", "csv": {"separator": ";"}}, ["csv does not go with format: parquet"]),
    "header and names": ({"csv": {"header": False}}, ["give either a header or columns"]),
    "names lack a column": ({"csv": {"header": False, "columns": ["user", "xx", "y"]}}, ["csv.columns has no 'x'"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations_are_named_by_file_and_key(case, tmp_path, capsys):
    change, words = BAD_CONFIGS[case]
    config = tmp_path / change if isinstance(change, str) else small(tmp_path, **change)
    assert run(config, tmp_path / "out") == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


BAD_LINES = {
    "missing column": (0, "user,x,z,t,d,tags,list", "line 1: the header lacks y"),
    "no integer": (7, "u,1,1,2024-01-01,a,1,[1]", "line 8: user must be an integer, found 'u'"),
    "beyond 64 bits": (7, f"{2**63},1,1,2024-01-01,a,1,[1]", "line 8: user = 9223372036854775808 does not fit into 64 bits"),
    "no number": (
        7,
        "1,one,1,2024-01-01,a,1,[1]",
        "line 8: x must be a number, found 'one'. Mend the line. A label of words is a condition, such as x == 'one'.",
    ),
    "vector": (7, '1,"[1, 2]",1,2024-01-01,a,1,[1]', "line 8: x must be a number, found '[1, 2]'. A vector is not read yet"),
    "nan": (7, "1,nan,1,2024-01-01,a,1,[1]", "line 8: x is nan or infinite"),
    "infinite": (7, "1,-inf,1,2024-01-01,a,1,[1]", "line 8: x is nan or infinite"),
    "too large": (7, "1,1e39,1,2024-01-01,a,1,[1]", "line 8: x must be a finite number that float32 can hold, found 1e+39"),
    "label": (7, "1,1,2,2024-01-01,a,1,[1]", "line 8: y must be 0 or 1, or empty where it is not known, found 2.0"),
    "scenario": (7, "1,1,1,2024-01-01,c,1,[1]", "line 8: d holds no value of the scenarios, found c"),
    "missing scenario": (7, "1,1,1,2024-01-01,,1,[1]", "line 8: d holds no value of the scenarios"),
    "time": (7, "1,1,1,yesterday,a,1,[1]", "line 8: t must be a time in ISO 8601, such as 2024-05-31"),
    "missing time": (7, "1,1,1,,a,1,[1]", "line 8: t, by which rows are divided or grouped, is missing"),
    "no integer among several": (
        7,
        "1,1,1,2024-01-01,a,1|x,[1]",
        "line 8: tags must hold integers of 64 bits, divided by '|', found 1|x",
    ),
    "large one among several": (
        7,
        f"1,1,1,2024-01-01,a,{2**63}|1,[1]",
        f"line 8: tags does not fit into 64 bits, found {2**63}|1. Integers have a sign; as text, type: string",
    ),
    "large one in a JSON list": (
        7,
        f'1,1,1,2024-01-01,a,1,"[1, {2**64}]"',
        f"line 8: list does not fit into 64 bits, found [1, {2**64}]. Integers have a sign; as text, type: string",
    ),
    "no JSON list": (7, "1,1,1,2024-01-01,a,1,[1", "line 8: list must be a JSON list of integers of 64 bits, found [1"),
    "JSON list of text": (7, '1,1,1,2024-01-01,a,1,"[""a""]"', "line 8: list must be a JSON list of integers"),
    "number for a JSON list": (7, "1,1,1,2024-01-01,a,1,5", "line 8: list must be a JSON list"),
    "one field less": (7, "1,1,1,2024-01-01,a,1", "line 8: 7 fields"),
    "another separator": (7, "1;1;1;2024-01-01;a;1;[1]", "line 8: 7 fields (user,x,y,t,d,tags,list) expected, 1 found"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_rows_are_named_by_line_or_counted(case, tmp_path, capsys):
    place, line, words = BAD_LINES[case]
    lines = [*GOOD_LINES[:place], line, *GOOD_LINES[place + 1 :]]
    config = small(tmp_path, "\n".join(lines) + "\n", **GOOD_LINES_CONFIG)
    assert run(config, tmp_path / "out") == 2
    assert f"rows.csv, {words}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if place:
        assert run(config, tmp_path / "out", "--max-bad-rows", "1") == 0
        manifest = DatasetManifest.load(tmp_path / "out")
        assert manifest.statistics["bad_rows"] == {"rows.csv": 1}
        assert manifest.statistics["rows"] == 29


@pytest.mark.parametrize("weight", ["", "-1", "2e30", "-1e-50", "inf"])
def test_a_weight_of_which_a_loss_cannot_be_made_is_a_bad_row(weight, tmp_path, capsys):
    good = ["0", "1", "2.5", "1e30", "1e-45"] * 4  # far away in time is next to nothing
    for weights, code in ((good, 0), ([*good, weight], 2)):
        lines = [f"u,{i},{i % 2},{each}" for i, each in enumerate(weights)]
        config = small(tmp_path, "\n".join(["user,x,y,w", *lines]) + "\n", weight="w")
        assert run(config, tmp_path / "out", "--overwrite") == code
    message = capsys.readouterr().err
    assert "rows.csv, line 22: w" in message
    assert "the weight of a row, must be a number from 0 to 1e30" in message or weight == "inf"


def test_a_chain_that_rows_contradict(tmp_path, capsys):
    tasks = [{"name": "click", "label": "x > 100", "implied_by_next": True}, {"name": "buy", "label": "y"}]
    assert run(small(tmp_path, tasks=tasks, features={"user": {"kind": "id"}}), tmp_path / "out") == 2
    assert (
        "rows.csv, line 3: task buy is positive where click is not, which implied_by_next rules out" in capsys.readouterr().err
    )


BAD_PARQUET = {
    "missing column": ({"z": [1.0] * 20}, "there is no column 'x'. Columns: user, y, z."),
    "id of another type": (
        {"user": [1.5] * 20},
        "column 'user' is of type double; string is needed. Whole numbers are ids with type: int, and times with a format",
    ),
    "list for one id": (
        {"user": [["a"]] * 20},
        "column 'user' is of type list<element: string>; string is needed. A list of ids is a feature of kind: ids, without",
    ),
    "vector for a number": (
        {"x": [[0.5, 1.5]] * 20},
        "column 'x' is of type list<element: double>; number is needed. A vector is not read yet: give its components as",
    ),
    "vector for ids": ({"user": [[0.5]] * 20}, "string is needed. A vector is not read yet"),
    "text for a number": ({"x": ["1"] * 19 + ["one"]}, "line 20: x is no number that can be used, found one"),
    "label of words": ({"y": ["no", "yes"] * 10}, "A label of words is a condition, such as \"`y` == 'yes'\"."),
    "decimals for text": ({"user": [Decimal(1)] * 20}, "string is needed. Whole numbers are ids with type: int"),
    "nan": ({"x": [1.0] * 6 + [math.nan] + [2.0] * 13}, "line 7: x is no number that can be used, found nan"),
    "label": ({"y": [0] * 4 + [7] + [1] * 15}, "line 5: y must be 0 or 1"),
}


@pytest.mark.parametrize("case", BAD_PARQUET)
def test_bad_parquet(case, tmp_path, capsys):
    change, words = BAD_PARQUET[case]
    columns = {
        "user": [f"u{i}" for i in range(20)],
        "x": [float(i) for i in range(20)],
        "y": [i % 2 for i in range(20)],
    } | change
    if "z" in change:
        del columns["x"]
    config = small(tmp_path, b"", "rows.parquet")
    pq.write_table(pa.table(columns), tmp_path / "raw" / "rows.parquet")
    assert run(config, tmp_path / "out") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "kind", "bad", "words"),
    [
        ("id", pa.uint64(), 2**63, "line 3: id is no integer that can be used, found 9223372036854775808"),
        ("id", pa.float64(), 1.5, "line 3: id is no integer that can be used, found 1.5"),
        ("id", pa.float64(), 1e30, "line 3: id is no integer that can be used, found 1e+30"),
        ("id", pa.decimal128(38, 2), Decimal("7.50"), "line 3: id is no integer that can be used, found 7.50"),
        ("id", pa.decimal128(38, 0), Decimal(2**63), "line 3: id is no integer that can be used, found 9223372036854775808"),
    ],
)
def test_ids_of_parquet_that_are_no_int64(column, kind, bad, words, tmp_path, capsys):
    config = small(tmp_path, b"", "rows.parquet", features={"id": {"kind": "id", "type": "int"}})
    ids = pa.array([1, 2, bad, *range(17)], kind)
    pq.write_table(pa.table({"id": ids, "y": [i % 2 for i in range(20)]}), tmp_path / "raw" / "rows.parquet")
    assert run(config, tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert run(config, tmp_path / "out", "--max-bad-rows", "1") == 0


def test_files_that_are_no_parquet(tmp_path, capsys):
    config = small(tmp_path, b"", "rows.parquet")
    columns = {"user": [f"u{i}" for i in range(5000)], "x": np.random.default_rng(0).random(5000), "y": [0, 1] * 2500}
    pq.write_table(pa.table(columns), tmp_path / "good.parquet")
    whole = (tmp_path / "good.parquet").read_bytes()
    for content, words in (
        (b"", "the file is empty"),
        (b"<html>log in</html>", "no Parquet file: it begins with b'<htm'"),
        (whole[: len(whole) // 2], "the Parquet file is truncated or damaged"),
        (whole[:4] + bytes(3000) + whole[3004:], "truncated or damaged"),
    ):
        (tmp_path / "raw" / "rows.parquet").write_bytes(content)
        assert run(config, tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert "rows.parquet" in message
        assert words in message


@pytest.mark.parametrize(
    ("packed_by", "pack"),
    [
        ("zstd", lambda text: pa.compress(text, codec="zstd", asbytes=True)),
        ("bzip2", bz2.compress),
        ("xz", lzma.compress),
        ("UTF-16", lambda text: text.decode().encode("utf-16")),
    ],
)
def test_what_is_packed_or_encoded_otherwise_is_named(packed_by, pack, tmp_path, capsys):
    config = small(tmp_path, pack(SMALL.encode()))
    assert run(config, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert f"rows.csv: {'text in' if packed_by == 'UTF-16' else 'packed by'} {packed_by}, which is not read." in message
    config = small(tmp_path, pack(SMALL.encode()), "rows.csv.zst")
    assert run(config, tmp_path / "out") == 2
    assert "rows.csv.zst is packed in a way that is not read. Unpack it, or pack it by gzip." in capsys.readouterr().err


def test_parquet_that_unpacks_to_too_much_is_refused(tmp_path, capsys, monkeypatch):
    columns = {"user": ["a" * 100] * 50_000, "x": np.arange(50_000.0), "y": [0, 1] * 25_000}
    config = small(tmp_path, b"", "rows.parquet")
    pq.write_table(pa.table(columns), config.parent / "rows.parquet", use_dictionary=False, compression="zstd")
    assert run(config, tmp_path / "out") == 0
    monkeypatch.setattr(packed, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(packed, "MOST_TIMES", 5)
    assert run(config, tmp_path / "none") == 2
    assert "rows.parquet: " in (message := capsys.readouterr().err)
    assert "write it anew without compression" in message
    assert not (tmp_path / "none").exists()
    pq.write_table(pa.table(columns), config.parent / "rows.parquet", use_dictionary=False, compression="none")
    assert run(config, tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"user": 2**63}, f"user does not fit into 64 bits, found {2**63}. Integers have a sign; as text, type: string"),
        ({"user": -(10**400)}, "user does not fit into 64 bits, found -100"),
        (
            {"tags": [1, 2**63]},
            f"tags holds a value that does not fit into 64 bits, found {2**63}. Integers have a sign; as text",
        ),
    ],
)
def test_what_is_said_of_integers_beyond_64_bits_in_json_lines_can_be_done(tmp_path, cells, words, capsys):
    rows = [{"user": i % 5, "tags": [i % 3], "y": i % 2} for i in range(40)]
    rows[30] |= cells
    kinds = {"user": "id", "tags": "ids"}

    def config(kind):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        return small(tmp_path, text, "rows.jsonl", features={name: {"kind": of, "type": kind} for name, of in kinds.items()})

    assert run(config("int"), tmp_path / "out") == 2
    assert f"rows.jsonl, line 31: {words}" in (message := capsys.readouterr().err)
    assert len(message) < 500
    assert run(config("string"), tmp_path / "out") == 0


def test_json_lines_without_a_key(tmp_path, capsys):
    rows = "".join(json.dumps({"usr": f"u{i}", "x": i, "y": i % 2}) + "\n" for i in range(20))
    config = small(tmp_path, rows, "rows.jsonl")
    assert run(config, tmp_path / "out") == 2
    assert "rows.jsonl: no line has the key 'user'" in (message := capsys.readouterr().err)
    assert "Did you mean 'usr'? Keys: usr, x, y." in message
    (tmp_path / "raw" / "rows.jsonl").write_text(json.dumps([{"user": "u", "x": 1, "y": 0}] * 20))
    assert run(config, tmp_path / "out") == 2
    assert "one JSON array" in capsys.readouterr().err


def parquet_table(folder, columns, name="rows.parquet", **config):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return small(folder.parent, (folder / name).read_bytes(), name, **config)


def test_text_of_parquet_that_is_no_utf8_is_a_bad_row(tmp_path, capsys):
    offsets = np.arange(0, 2 * 40 + 1, 2, dtype=np.int32)
    content = bytearray(b"ab" * 40)
    content[10:12] = b"\xff\xfe"
    text = pa.Array.from_buffers(pa.string(), 40, [None, pa.py_buffer(offsets), pa.py_buffer(bytes(content))])
    config = parquet_table(tmp_path / "raw", {"user": text, "x": np.arange(40.0), "y": np.arange(40) % 2})
    assert run(config, tmp_path / "out") == 2
    assert "rows.parquet, line 6: user is no string that can be used, found bytes that are no text" in capsys.readouterr().err
    assert run(config, tmp_path / "out", "--max-bad-rows", "1") == 0
    assert DatasetManifest.load(tmp_path / "out").statistics["bad_rows"] == {"rows.parquet": 1}


def test_two_columns_of_one_name_in_parquet(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    table = pa.Table.from_arrays([pa.array(["a"] * 20), pa.array([1.0] * 20), pa.array([2.0] * 20)], ["user", "x", "x"])
    pq.write_table(table.append_column("y", pa.array([0] * 20)), tmp_path / "raw" / "rows.parquet")
    config = small(tmp_path, (tmp_path / "raw" / "rows.parquet").read_bytes(), "rows.parquet")
    assert run(config, tmp_path / "out") == 2
    assert "two columns have the name 'x'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["user.id", "0", "{a}", "a b", "{", "x!r"])
def test_columns_of_any_name_can_be_complained_about(tmp_path, name, capsys):
    feature = {"user": {"kind": "id", "type": "int", "column": name}}
    rows = {name: [1.0] * 20 + [1.5], "y": [0, 1] * 10 + [0]}
    assert run(parquet_table(tmp_path / "raw", rows, features=feature), tmp_path / "out") == 2
    assert f"line 21: {name} is no integer that can be used, found 1.5." in capsys.readouterr().err
    (tmp_path / "raw" / "rows.csv").write_text(f"{name},y\n" + "1,0\n" * 20 + "1,2\n")
    config = small(tmp_path, (tmp_path / "raw" / "rows.csv").read_bytes(), features=feature)
    assert run(config, tmp_path / "out") == 2
    assert "line 22: y must be 0 or 1, or empty where it is not known, found 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cell", "why"), [("9" * 5000, "does not fit into 64 bits"), ('["\\ud800"]', "must be"), ("[" * 100_000, "must be")]
)
def test_absurd_lists_are_bad_rows(tmp_path, cell, why, capsys):
    kind = "int" if cell[0] == "9" else "string"
    features = {"tags": {"kind": "ids", "type": kind} | ({"separator": "|"} if kind == "int" else {})}
    quoted = '"' + cell.replace('"', '""') + '"'
    rows = "".join(f"{'1' if kind == 'int' else '[]'},{k % 2}\n" for k in range(30))
    config = small(tmp_path, f"tags,y\n{rows}{quoted},1\n", features=features)
    assert run(config, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert f"line 32: tags {why}" in message
    assert len(message) < 1000


def test_a_bad_boolean_is_a_bad_row(tmp_path, capsys):
    rows = "".join(f"u{k % 5},{k},{'true' if k % 2 else '0'}\n" for k in range(40))
    config = small(tmp_path, f"user,x,y\n{rows}u1,1,yes\n", tasks=[{"name": "y", "label": "y == true"}])
    assert run(config, tmp_path / "out") == 2
    assert "line 42: y must be true or false, or 1 or 0, found 'yes'" in capsys.readouterr().err
    assert run(config, tmp_path / "out", "--max-bad-rows", "1") == 0


def test_json_nested_too_deep_is_told(tmp_path, capsys):
    config = small(tmp_path, "[" * 100_000 + "\n", "rows.json")
    assert run(config, tmp_path / "out") == 2
    assert "Traceback" not in capsys.readouterr().err
