"""Any table of one's own: every option against plain Python on the records, in three formats; bad configurations and data."""

import bisect
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmlrec.hashing import bucket_ids
from mmlrec.schema import DatasetManifest
from preprocessing.common.command_line import main
from preprocessing.table import EXAMPLE
from tests.preprocessing.table_fake import CONFIG, WRITERS, records, write_config, write_csv, write_table

ROOT = Path(__file__).parents[2]
SCENARIOS = {"phone": 0, "tablet": 0, "desktop": 1}


def run(config, out, *options):
    return main(["table", "--config", str(config), "--out", str(out), *options])


def make(folder, out, *options):
    assert run(folder / "my_table.yaml", out, *options) == 0
    return DatasetManifest.load(out)


def read(out):
    """Rows of the folder as dictionaries, with their split."""
    found = []
    for split, content in DatasetManifest.load(out).splits.items():
        for part in content.parts:
            found += [row | {"split": split} for row in pq.read_table(out / part.path).to_pylist()]
    return found


def vocabulary(out, table):
    entries = pq.read_table(out / "vocab" / f"{table}.parquet").to_pydict()
    return dict(zip(entries["value"], entries["id"], strict=True)), entries


def hashed(value, kind, num_buckets, num_hashes, seed):
    return bucket_ids(pa.array([value], kind), seed, num_buckets, num_hashes)[0].tolist()


def signed_log(value):
    return math.copysign(math.log1p(abs(value)), value)


def expected_labels(row):
    click, rating = row["clicked"], row["rating"]
    buy = 0.0 if click == 0 or row["orders"] not in (1, 2) else None if click is None else 1.0
    return {
        "label.click": None if click is None else float(click),
        "label.buy": buy,
        "label.liked": None if rating is None else float(rating > 3),
    }


def assert_equals_records(out, rows):
    found = {row["key.row"]: row for row in read(out)}
    wanted = [row for row in rows if row["device"] in SCENARIOS]
    assert sorted(found) == [row["row"] for row in wanted]
    train = [row for row in wanted if found[row["row"]]["split"] == "train"]
    items = Counter(item for row in train for item in (row["item"], *row["bought"]) if item is not None)
    item_ids, entries = vocabulary(out, "item")
    assert dict(zip(entries["value"], entries["count"], strict=True)) == {k: n for k, n in items.items() if n >= 3}
    user_ids, _ = vocabulary(out, "user")
    assert set(user_ids) == {row["user"] for row in train}
    tag_ids, _ = vocabulary(out, "tags")
    ages = sorted(row["age"] for row in train if row["age"] is not None)
    borders = sorted({ages[j * len(ages) // 5] for j in range(1, 5)} - {ages[0]})
    ranges = {}
    for name, function in (("price", float), ("sold", signed_log)):
        values = [function(row[name]) for row in train if row[name] is not None]
        ranges[name] = min(values), max(values)
    for row in wanted:
        got = found[row["row"]]
        assert got["user"] == user_ids.get(row["user"], 0)
        assert got["item"] == item_ids.get(row["item"], 0)
        assert got["bought"] == [item_ids.get(item, 0) for item in row["bought"]]
        assert got["tags"] == [tag_ids.get(tag, 0) for tag in row["tags"]]
        assert got["page"] == hashed(row["url"], pa.string(), 50, 2, 7)
        assert got["seller"] == hashed(row["seller"], pa.int64(), 20, 1, 3)[0]
        for name, function in (("price", float), ("sold", signed_log)):
            low, high = ranges[name]
            scaled = 0 if row[name] is None else min(max((function(row[name]) - low) / (high - low), 0), 1)
            assert got[name] == pytest.approx(scaled, abs=1e-6)
        assert got["rank"] == pytest.approx(row["rank"] or 0, abs=1e-7)
        assert got["age"] == (0 if row["age"] is None else 1 + bisect.bisect_right(borders, row["age"]))
        assert {name: got[name] for name in expected_labels(row)} == expected_labels(row)
        assert got["sample.scenario"] == SCENARIOS[row["device"]]
        assert got["key.user"] == row["user"]
        assert got["key.time"] == datetime.fromisoformat(row["time"]).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize("form", WRITERS)
def test_every_row_of_each_format(form, tmp_path, capsys):
    manifest = make(write_table(tmp_path / "raw", form, 1500), tmp_path / "out")
    rows = records(1500)
    assert_equals_records(tmp_path / "out", rows)
    assert manifest.scenario.values == ["mobile", "desktop"]
    assert [(t.name, t.role, t.implied_by_next) for t in manifest.tasks] == [
        ("click", "ctr", True),
        ("buy", None, False),
        ("liked", None, False),
    ]
    assert manifest.group_key == "user"
    dropped = sum(count["other scenarios"] for count in manifest.statistics["passed_over"].values())
    assert dropped == sum(row["device"] == "watch" for row in rows)
    train = {row["key.row"] for row in read(tmp_path / "out") if row["split"] == "train"}
    for table, column, kind, rule in (("page", "url", pa.string(), (50, 2, 7)), ("seller", "seller", pa.int64(), (20, 1, 3))):
        values = {row[column] for row in rows if row["row"] in train} - {None}
        ids = {value: tuple(sorted(hashed(value, kind, *rule))) for value in values}
        taken = Counter(ids.values())
        shared = sum(taken[own] > 1 for own in ids.values())
        found = manifest.statistics["hash_collisions"][table]
        assert found == {"values": len(values), "collisions": shared, "rate": shared / len(values)}
        text = f"hashed ids of {table}: {len(values)} values in train, {shared / len(values):.2%} share their ids"
        assert text in " ".join(capsys.readouterr().out.split()) or table == "seller"


def test_the_same_again_and_another_configuration(tmp_path, capsys):
    raw = write_table(tmp_path / "raw", num_rows=200)
    make(raw, tmp_path / "out")
    capsys.readouterr()
    make(raw, tmp_path / "out")
    assert "already there" in capsys.readouterr().out
    config = yaml.safe_load((raw / "my_table.yaml").read_text())
    config["tasks"][2]["label"] = "rating > 4"
    write_config(tmp_path / "elsewhere", config)
    assert run(tmp_path / "elsewhere" / "my_table.yaml", tmp_path / "out", "--raw", str(raw)) == 2
    assert "made with other options" in capsys.readouterr().err
    assert run(tmp_path / "elsewhere" / "my_table.yaml", tmp_path / "out2", "--raw", str(raw)) == 0


SMALL = "user,x,y\n" + "".join(f"u{i % 3},{i},{i % 2}\n" for i in range(20))


def small(tmp_path, content=SMALL, name="rows.csv", **config):
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "raw" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    base = {
        "files": [name],
        "features": {"user": {"kind": "id"}, "x": {"kind": "number"}},
        "tasks": [{"name": "y", "label": "y"}],
    }
    return write_config(tmp_path / "raw", base | config)


def test_text_without_header_by_any_separator_and_encoding(tmp_path):
    lines = "".join(f"ü{i % 4}::skip::{i}::{i % 2}\n" for i in range(40))
    csv = {"separator": "::", "header": False, "columns": ["user", "other", "x", "y"], "encoding": "iso-8859-1"}
    config = small(tmp_path, lines.encode("iso-8859-1"), csv=csv, format="csv", name="rows.data")
    assert run(config, tmp_path / "out") == 0
    ids, _ = vocabulary(tmp_path / "out", "user")
    assert set(ids) == {f"ü{i}" for i in range(4)}
    names = {number: name for name, number in ids.items()}
    low, high = DatasetManifest.load(tmp_path / "out").preprocessing["dense_ranges"]["x"]
    for row in read(tmp_path / "out"):
        if 0 < row["x"] < 1:
            x = round(row["x"] * (high - low) + low)
            assert names[row["user"]] == f"ü{x % 4}"
            assert row["label.y"] == x % 2


def test_files_by_patterns_folders_and_packed(tmp_path):
    rows = records(300)
    raw = tmp_path / "raw"
    write_csv(raw / "logs" / "a.csv.gz", rows[:100])
    write_csv(raw / "logs" / "b.csv", rows[100:200])
    write_csv(raw / "c.csv.zip", rows[200:], compression={"method": "zip", "archive_name": "c.csv"})
    (raw / "logs" / "_SUCCESS").write_text("")
    (raw / "logs" / ".hidden").write_text("x")
    for patterns in (["logs", "c.csv.zip"], ["**/*.csv.gz", "logs/b.csv", "c.*"]):
        make(write_config(raw, CONFIG | {"files": patterns}).parent, tmp_path / "out", "--overwrite")
        assert_equals_records(tmp_path / "out", rows)


def split_of_rows(out):
    return {row["key.row"]: row["split"] for row in read(out)}


def test_split_by_group(tmp_path):
    raw = write_table(tmp_path / "raw", num_rows=900)
    write_config(raw, CONFIG | {"files": ["?-*.csv"], "split": {"rule": "group", "key": "user"}})
    make(raw, tmp_path / "out")
    sides = {}
    for row in read(tmp_path / "out"):
        sides.setdefault(row["key.user"], set()).add(row["split"])
    assert all(len(split) == 1 for split in sides.values())
    assert {split for own in sides.values() for split in own} == {"train", "valid", "test"}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("cuts", [None, ["2024-03-01", "2024-04-15T03:00:00"]])
def test_split_by_time(form, cuts, tmp_path):
    raw = write_table(tmp_path / "raw", form, 600)
    text = yaml.safe_dump(CONFIG | {"files": [f"?-{WRITERS[form][0]}"], "split": {"rule": "time", "key": "time"}})
    if cuts:
        text = text.replace("  rule: time", f"  rule: time\n  cuts: [{cuts[0]}, {cuts[1]}]")
    (raw / "my_table.yaml").write_text(text)
    make(raw, tmp_path / "out")
    rows = [row for row in records(600) if row["device"] in SCENARIOS]
    times = sorted(row["time"] for row in rows)
    first, second = cuts or (times[len(rows) * 8 // 10], times[len(rows) * 8 // 10 + (len(rows) - len(rows) * 8 // 10) // 2])
    found = split_of_rows(tmp_path / "out")
    for row in rows:
        assert found[row["row"]] == ("train" if row["time"] < first else "valid" if row["time"] < second else "test")


@pytest.mark.parametrize("valid", [{"valid": ["valid.csv"]}, {}, {"valid_from": "test", "one_in": 2}])
def test_split_by_files(valid, tmp_path):
    rows = [row for row in records(900) if row["device"] in SCENARIOS]
    raw = tmp_path / "raw"
    write_csv(raw / "train" / "part-0.csv", rows[:200])
    write_csv(raw / "train" / "part-1.csv", rows[200:400])
    write_csv(raw / "test.csv", rows[500:])
    if "valid" in valid:
        write_csv(raw / "valid.csv", rows[400:500])
    split = {"rule": "file", "train": ["train/*.csv"], "test": ["test.csv"]} | valid
    make(write_config(raw, CONFIG | {"split": split}).parent, tmp_path / "out")
    names = ("train", "valid", "test")
    by_side = {name: {row for row, side in split_of_rows(tmp_path / "out").items() if side == name} for name in names}
    parts = [{row["row"] for row in part} for part in (rows[:400], rows[400:500], rows[500:])]
    if "valid" in valid:
        assert [by_side[name] for name in names] == parts
    else:
        whole, other = ("test", "train") if valid else ("train", "test")
        index = {"train": 0, "test": 2}
        assert by_side[other] == parts[index[other]]
        assert by_side[whole] | by_side["valid"] == parts[index[whole]]
        assert len(by_side["valid"]) == len(parts[index[whole]]) // valid.get("one_in", 10)


def test_scenarios_as_a_list_of_numbers_with_a_rest(tmp_path):
    raw = tmp_path / "raw"
    rows = records(200)
    write_csv(raw / "rows.csv", rows)
    scenario = {"column": "orders", "name": "stage", "values": [2, 0], "others": "rest"}
    manifest = make(write_config(raw, CONFIG | {"files": ["rows.csv"], "scenario": scenario}).parent, tmp_path / "out")
    assert manifest.scenario.name == "stage"
    assert manifest.scenario.values == ["2", "0", "rest"]
    found = {row["key.row"]: row["sample.scenario"] for row in read(tmp_path / "out")}
    assert found == {row["row"]: {2: 0, 0: 1}.get(row["orders"], 2) for row in rows}


def test_regression_and_boolean_labels(tmp_path):
    rows = "".join(
        json.dumps({"user": f"u{i}", "x": i, "on": i % 3 == 0} | ({"s": i / 4} if i % 5 else {})) + "\n" for i in range(50)
    )
    tasks = [{"name": "seconds", "label": "s", "kind": "regression"}, {"name": "on", "label": "on == true"}]
    features = {"user": {"kind": "id"}, "x": {"kind": "number", "scale": "none"}}
    assert run(small(tmp_path, rows, "rows.jsonl", tasks=tasks, features=features), tmp_path / "out") == 0
    assert DatasetManifest.load(tmp_path / "out").tasks[0].kind == "regression"
    for row in read(tmp_path / "out"):
        i = int(row["x"])
        assert row["label.seconds"] == (i / 4 if i % 5 else None)
        assert row["label.on"] == (i % 3 == 0)


def test_parquet_of_other_types_and_many_row_groups(tmp_path):
    """Unsigned, small and decimal numbers, booleans, large lists and zoned times, in small row groups."""
    n = 3000
    table = pa.table(
        {
            "row": pa.array(range(n), pa.uint64()),
            "user": pa.array([i % 50 for i in range(n)], pa.int8()),
            "tags": pa.array([[f"t{i % 7}", None] if i % 3 else None for i in range(n)], pa.large_list(pa.large_string())),
            "price": pa.array([i / 4 for i in range(n)]).cast(pa.decimal128(10, 2)),
            "half": pa.array(np.arange(n) % 100, pa.float16()),
            "clicked": pa.array([i % 2 == 0 for i in range(n)]),
            "time": pa.array([i * 1_500_000_000 for i in range(n)], pa.timestamp("ns", "UTC")),
        }
    )
    (tmp_path / "raw").mkdir()
    pq.write_table(table, tmp_path / "raw" / "x.parquet", row_group_size=700)
    config = {
        "files": ["x.parquet"],
        "features": {
            "user": {"kind": "id", "type": "int"},
            "tags": {"kind": "ids"},
            "price": {"kind": "number", "scale": "none"},
            "half": {"kind": "number", "scale": "none"},
        },
        "tasks": [{"name": "click", "label": "clicked"}],
        "keys": {"row": {"type": "int"}, "time": {"type": "datetime"}},
    }
    make(write_config(tmp_path / "raw", config).parent, tmp_path / "out")
    users, _ = vocabulary(tmp_path / "out", "user")
    tags, _ = vocabulary(tmp_path / "out", "tags")
    found = read(tmp_path / "out")
    assert sorted(row["key.row"] for row in found) == list(range(n))
    for row in found:
        i = row["key.row"]
        assert row["user"] == users[i % 50]
        assert row["tags"] == ([tags[f"t{i % 7}"]] if i % 3 else [])
        assert (row["price"], row["half"], row["label.click"]) == (i / 4, i % 100, float(i % 2 == 0))
        assert row["key.time"] == i * 3 // 2


def test_example_is_a_configuration(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["table", "--example"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text == EXAMPLE
    (tmp_path / "views").mkdir()
    columns = "user,item,bought,url,price,age,clicked,orders,device,time"
    lines = [
        f"{i % 9},i{i % 5},i1|i2,/p{i % 7},{i}.5,{20 + i % 40},{i % 2},{i % 4 == 1:d},"
        f"{'phone' if i % 3 else 'desktop'},2024-01-{i % 28 + 1:02}"
        for i in range(300)
    ]
    pd.Series([columns, *lines]).to_csv(tmp_path / "views" / "a.csv.gz", index=False, header=False, quoting=3, sep="\t")
    (tmp_path / "my_table.yaml").write_text(text)
    make(tmp_path, tmp_path / "out")


BAD_CONFIGS = {
    "no config": ("missing.yaml", ["missing.yaml: no such config file"]),
    "unknown key": ({"feature": {}}, ["my_table.yaml: feature: unknown key. Did you mean 'features'?"]),
    "unknown option": (
        {"features": {"user": {"kind": "id", "min_cout": 2}}},
        ["features.user.min_cout: unknown key. Did you mean 'min_count'? Allowed: column, hash, kind, min_count, table, type."],
    ),
    "option of another kind": (
        {"features": {"user": {"kind": "number", "separator": "|"}}},
        ["features.user.separator: unknown key. Allowed: buckets, column, kind, scale."],
    ),
    "unknown kind": (
        {"features": {"user": {"kind": "idd"}}},
        ["features.user.kind: 'idd' is none of id, ids, number.", "'id'?"],
    ),
    "no kind": ({"features": {"user": {}}}, ["features.user.kind: required, but not given"]),
    "bad name": ({"features": {"user.id": {"kind": "id"}}}, ["features.user.id", "should match pattern"]),
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
    "group key of text": (
        {"keys": {"user": {"type": "string"}}, "group_key": "user"},
        ["group_key: key 'user' is of type string; int is needed"],
    ),
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


GOOD_LINES = ["user,x,y,t,d,tags,list", *(f"{i},{i}.5,{i % 2},2024-01-0{i % 9 + 1},a,1|2,[1]" for i in range(30))]
BAD_LINES = {
    "missing column": (0, "user,x,z,t,d,tags,list", "line 1: the header lacks y"),
    "no integer": (7, "u,1,1,2024-01-01,a,1,[1]", "line 8: user must be an integer, found 'u'"),
    "beyond 64 bits": (7, f"{2**63},1,1,2024-01-01,a,1,[1]", "line 8: user = 9223372036854775808 does not fit into 64 bits"),
    "no number": (7, "1,one,1,2024-01-01,a,1,[1]", "line 8: x must be a number, found 'one'"),
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
    "large one among several": (7, f"1,1,1,2024-01-01,a,{2**63}|1,[1]", "line 8: tags must hold integers of 64 bits"),
    "no JSON list": (7, "1,1,1,2024-01-01,a,1,[1", "line 8: list must be a JSON list of integers of 64 bits, found [1"),
    "JSON list of text": (7, '1,1,1,2024-01-01,a,1,"[""a""]"', "line 8: list must be a JSON list of integers"),
    "number for a JSON list": (7, "1,1,1,2024-01-01,a,1,5", "line 8: list must be a JSON list"),
    "one field less": (7, "1,1,1,2024-01-01,a,1", "line 8: 7 fields"),
}
BAD_DATA_CONFIG = {
    "features": {
        "user": {"kind": "id", "type": "int"},
        "x": {"kind": "number"},
        "tags": {"kind": "ids", "type": "int", "separator": "|"},
        "list": {"kind": "ids", "type": "int"},
    },
    "scenario": {"column": "d", "values": ["a", "b"]},
    "keys": {"t": {"type": "datetime"}},
    "split": {"rule": "time", "key": "t"},
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_rows_are_named_by_line_or_counted(case, tmp_path, capsys):
    place, line, words = BAD_LINES[case]
    lines = [*GOOD_LINES[:place], line, *GOOD_LINES[place + 1 :]]
    config = small(tmp_path, "\n".join(lines) + "\n", **BAD_DATA_CONFIG)
    assert run(config, tmp_path / "out") == 2
    assert f"rows.csv, {words}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if place:
        assert run(config, tmp_path / "out", "--max-bad-rows", "1") == 0
        manifest = DatasetManifest.load(tmp_path / "out")
        assert manifest.statistics["bad_rows"] == {"rows.csv": 1}
        assert manifest.statistics["rows"] == 29


def test_good_odd_cells(tmp_path):
    """Blanks and empty ids within lists, missing lists, times with and without zones, in one block."""
    odd = [
        "5,,1,2024-01-02T01:00:00+01:00,a, 1 ||2 ,",
        "6,1,,2024-01-02,b,,null",
        '7,2,0,2024-01-02 00:00:00.9,b,3,"[4, null]"',
    ]
    config = small(
        tmp_path,
        "\n".join([GOOD_LINES[0], *odd, *GOOD_LINES[1:]]) + "\n",
        **(BAD_DATA_CONFIG | {"keys": {"t": {"type": "datetime"}, "user": {"type": "int"}, "tags": {"type": "string"}}}),
    )
    assert run(config, tmp_path / "out") == 0
    found = {row["key.tags"]: row for row in read(tmp_path / "out") if row["key.tags"] != "1|2"}
    tags, _ = vocabulary(tmp_path / "out", "tags")
    assert found[" 1 ||2 "]["tags"] == [tags[1], tags[2]]
    assert found[" 1 ||2 "]["list"] == []
    assert found[" 1 ||2 "]["x"] == 0
    assert found[None]["tags"] == []
    assert found[None]["list"] == []
    assert found[None]["label.y"] is None
    assert len(found["3"]["list"]) == 1
    assert {row["key.t"] for row in found.values()} == {datetime(2024, 1, 2, tzinfo=UTC).timestamp()}


def test_a_chain_that_rows_contradict(tmp_path, capsys):
    tasks = [{"name": "click", "label": "x > 100", "implied_by_next": True}, {"name": "buy", "label": "y"}]
    assert run(small(tmp_path, tasks=tasks), tmp_path / "out") == 2
    assert (
        "rows.csv, line 3: task buy is positive where click is not, which implied_by_next rules out" in capsys.readouterr().err
    )


BAD_PARQUET = {
    "missing column": ({"z": [1.0] * 20}, "there is no column 'x'. Columns: user, y, z."),
    "id of another type": ({"user": list(range(20))}, "column 'user' is of type int64; string is needed"),
    "list for one id": ({"user": [["a"]] * 20}, "column 'user' is of type list<element: string>; string is needed"),
    "text for a number": ({"x": ["1"] * 20}, "column 'x' is of type string; number is needed"),
    "nan": ({"x": [1.0] * 6 + [math.nan] + [2.0] * 13}, "line 7: x = nan is no number that can be used"),
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
        ("id", pa.uint64(), 2**63, "line 3: id = 9223372036854775808 is no integer that can be used"),
        ("id", pa.float64(), 1.5, "line 3: id = 1.5 is no integer that can be used"),
        ("id", pa.float64(), 1e30, "line 3: id = 1e+30 is no integer that can be used"),
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


def test_json_lines_without_a_key(tmp_path, capsys):
    rows = "".join(json.dumps({"usr": f"u{i}", "x": i, "y": i % 2}) + "\n" for i in range(20))
    config = small(tmp_path, rows, "rows.jsonl")
    assert run(config, tmp_path / "out") == 2
    assert "rows.jsonl: no line has the key 'user'" in (message := capsys.readouterr().err)
    assert "Did you mean 'usr'? Keys: usr, x, y." in message
    (tmp_path / "raw" / "rows.jsonl").write_text(json.dumps([{"user": "u", "x": 1, "y": 0}] * 20))
    assert run(config, tmp_path / "out") == 2
    assert "one JSON array" in capsys.readouterr().err


@pytest.mark.long
def test_the_page_can_be_pasted(tmp_path):
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/datasets/table.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    result = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert DatasetManifest.load(tmp_path / "data/shop").statistics["rows"] == 5000
    report = json.loads((tmp_path / "runs/shop/result.json").read_text())["test"]
    assert list(report["tasks"]) == ["liked", "bought"]
