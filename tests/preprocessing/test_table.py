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
from preprocessing.command_line import main
from preprocessing.datasets.table import EXAMPLE
from tests.preprocessing.table_fake import (
    CONFIG,
    GOOD_LINES,
    GOOD_LINES_CONFIG,
    WRITERS,
    records,
    run,
    small,
    write_config,
    write_csv,
    write_table,
)
from tests.test_hashing import plain_key

ROOT = Path(__file__).parents[2]
SCENARIOS = {"phone": 0, "tablet": 0, "desktop": 1}


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
    ranges, means = {}, {}
    for name, function in (("price", float), ("sold", signed_log), ("rank", float)):
        values = [function(row[name]) for row in train if row[name] is not None]
        ranges[name], means[name] = (min(values), max(values)), math.fsum(values) / len(values)
    for row in wanted:
        got = found[row["row"]]
        assert got["user"] == user_ids.get(row["user"], 0)
        assert got["item"] == item_ids.get(row["item"], 0)
        assert got["bought"] == [item_ids.get(item, 0) for item in row["bought"]]
        assert got["tags"] == [tag_ids.get(tag, 0) for tag in row["tags"]]
        assert got["page"] == hashed(row["url"], pa.string(), 50, 2, 7)
        assert got["seller"] == hashed(row["seller"], pa.int64(), 20, 1, 3)[0]
        assert got["visitor"] == plain_key(row["visitor"], 5)
        assert got["seen"] == [plain_key(page, 0) for page in row["seen"].split()]
        for name, function in (("price", float), ("sold", signed_log)):
            low, high = ranges[name]
            value = means[name] if row[name] is None else function(row[name])
            assert got[name] == pytest.approx(min(max((value - low) / (high - low), 0), 1), abs=1e-6)
        assert got["rank"] == pytest.approx(means["rank"] if row["rank"] is None else row["rank"], abs=1e-7)
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
    train, shown = {row["key.row"] for row in read(tmp_path / "out") if row["split"] == "train"}, ""
    for table, column, kind, rule in (("page", "url", pa.string(), (50, 2, 7)), ("seller", "seller", pa.int64(), (20, 1, 3))):
        values = {row[column] for row in rows if row["row"] in train} - {None}
        ids = {value: tuple(sorted(hashed(value, kind, *rule))) for value in values}
        taken = Counter(ids.values())
        shared = sum(taken[own] > 1 for own in ids.values())
        found = manifest.statistics["hash_collisions"][table]
        assert found == {"values": len(values), "collisions": shared, "rate": shared / len(values)}
        text = f"hashed ids of {table}: {len(values)} values in train, {shared / len(values):.2%} share their ids"
        shown = shown or " ".join(capsys.readouterr().out.split())
        assert text in shown
    visitors = {row["visitor"] for row in rows if row["row"] in train} - {None}
    pages = {page for row in rows if row["row"] in train for page in row["seen"].split()}
    assert manifest.statistics["managed_ids"] == {"visitor": {"values": len(visitors)}, "seen": {"values": len(pages)}}
    assert f"managed ids of visitor: {len(visitors):,} values in train, 40 slots" in shown
    managed = {table.name: table.num_rows for table in manifest.tables if table.managed}
    assert managed == {"visitor": 41, "seen": 31}
    assert manifest.schema_version == 2


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
@pytest.mark.parametrize("cuts", [None, ["2024-03-01", "2024-04-15T03:00:00"], ["'2024-03-01'", "'2024-04-15T03:00:00Z'"]])
def test_split_by_time(form, cuts, tmp_path):
    raw = write_table(tmp_path / "raw", form, 600)
    text = yaml.safe_dump(CONFIG | {"files": [f"?-{WRITERS[form][0]}"], "split": {"rule": "time", "key": "time"}})
    if cuts:
        text = text.replace("  rule: time", f"  rule: time\n  cuts: [{cuts[0]}, {cuts[1]}]")
    (raw / "my_table.yaml").write_text(text)
    make(raw, tmp_path / "out")
    rows = [row for row in records(600) if row["device"] in SCENARIOS]
    times = sorted(row["time"] for row in rows)
    first, second = [cut.strip("'Z") for cut in cuts or ()] or (
        times[len(rows) * 8 // 10],
        times[len(rows) * 8 // 10 + (len(rows) - len(rows) * 8 // 10) // 2],
    )
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
        **(GOOD_LINES_CONFIG | {"keys": {"t": {"type": "datetime"}, "user": {"type": "int"}, "tags": {"type": "string"}}}),
    )
    assert run(config, tmp_path / "out") == 0
    found = {row["key.tags"]: row for row in read(tmp_path / "out") if row["key.tags"] != "1|2"}
    tags, _ = vocabulary(tmp_path / "out", "tags")
    assert found[" 1 ||2 "]["tags"] == [tags[1], tags[2]]
    assert found[" 1 ||2 "]["list"] == []
    preprocessing = DatasetManifest.load(tmp_path / "out").preprocessing
    (low, high), mean = preprocessing["dense_ranges"]["x"], preprocessing["dense_fills"]["x"]
    assert found[" 1 ||2 "]["x"] == pytest.approx((mean - low) / (high - low))
    assert low < mean < high
    assert found[None]["tags"] == []
    assert found[None]["list"] == []
    assert found[None]["label.y"] is None
    assert len(found["3"]["list"]) == 1
    assert {row["key.t"] for row in found.values()} == {datetime(2024, 1, 2, tzinfo=UTC).timestamp()}


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
    assert DatasetManifest.load(tmp_path / "data/shop").statistics["rows"] == 20_000
    report = json.loads((tmp_path / "runs/shop/result.json").read_text())["test"]
    assert list(report["tasks"]) == ["liked", "bought"]
    assert min(task["auc"] for task in report["tasks"].values()) > 0.9


def test_an_empty_text_leaves_a_condition_open(tmp_path):
    rows = "".join(f"u{k % 7},{k},{('buy', '', 'click')[k % 3]}\n" for k in range(60))
    config = small(tmp_path, f"user,x,a\n{rows}", tasks=[{"name": "y", "label": "a != 'buy'"}])
    manifest = make(config.parent, tmp_path / "out")
    labelled = [split.label_counts["y"]["all"] for split in manifest.splits.values()]
    assert (sum(known for known, _ in labelled), sum(positive for _, positive in labelled)) == (40, 20)


def test_patterns_pass_over_hidden_folders_unless_they_name_them(tmp_path):
    text = "user,x,y\n" + "".join(f"u{k % 5},{k},{k % 2}\n" for k in range(40))
    config = small(tmp_path, text, files=["**/*.csv"])
    for name in (".ipynb_checkpoints", "_temporary", "part"):
        (config.parent / name).mkdir()
        (config.parent / name / "more.csv").write_text(text)
    assert make(config.parent, tmp_path / "out").statistics["rows"] == 80
    small(tmp_path, text, files=["_temporary/*.csv"])
    assert make(config.parent, tmp_path / "named").statistics["rows"] == 40


def test_a_feature_may_have_any_name_that_is_allowed(tmp_path):
    features = {name: {"kind": "id", "column": "user"} for name in ("position", "row", "place", "split", "label", "id")}
    features |= {"value": {"kind": "number", "column": "x"}, "count": {"kind": "number", "column": "x", "buckets": 4}}
    rows = "".join(f"u{k % 5},{k},{k % 2}\n" for k in range(60))
    manifest = make(small(tmp_path, f"user,x,y\n{rows}", features=features).parent, tmp_path / "out")
    assert [feature.name for feature in manifest.features] == list(features)
    assert main(["describe", str(tmp_path / "out")]) == 0


def test_numbers_are_scaled_before_they_lose_digits(tmp_path):
    """Seconds of a day since 1970 differ from the ninth digit on; float32 has seven."""
    start = 1_700_000_000
    rows = "".join(f"u{k % 9},{start + 10 * k},{k % 2}\n" for k in range(8640))
    make(small(tmp_path, f"user,x,y\n{rows}").parent, tmp_path / "out")
    written = {row["x"] for row in read(tmp_path / "out")}
    assert len(written) > 8000


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()])
def test_integers_of_parquet_as_numbers_buckets_and_texts(tmp_path, kind):
    values = pa.array([2**60 + k for k in range(39)] + [2**63 - 1], kind)
    columns = {"user": values, "x": values, "y": pa.array([k % 2 for k in range(40)])}
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "raw" / "rows.parquet")
    number = {"kind": "number", "column": "x", "allow_label_feature": True}
    features = {"user": {"kind": "id"}, "x": number, "b": number | {"buckets": 3}}
    content = (tmp_path / "raw" / "rows.parquet").read_bytes()
    tasks = [{"name": "y", "label": "y"}, {"name": "z", "label": f"x > {2**61}"}]
    make(small(tmp_path, content, "rows.parquet", features=features, tasks=tasks).parent, tmp_path / "out")
    _, entries = vocabulary(tmp_path / "out", "user")
    assert set(entries["value"]) <= {str(2**60 + k) for k in range(39)} | {str(2**63 - 1)}
    assert sum(row["label.z"] for row in read(tmp_path / "out")) == 1


def test_lists_of_fixed_size_with_nulls(tmp_path):
    lists = pa.array([[k, k + 1] if k % 3 else None for k in range(40)], pa.list_(pa.int64(), 2))
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"tags": lists, "y": [k % 2 for k in range(40)]}), tmp_path / "raw" / "rows.parquet")
    content = (tmp_path / "raw" / "rows.parquet").read_bytes()
    config = small(tmp_path, content, "rows.parquet", features={"tags": {"kind": "ids", "type": "int"}})
    make(config.parent, tmp_path / "out")
    assert sorted(len(row["tags"]) for row in read(tmp_path / "out")) == [0] * 14 + [2] * 26


def test_parquet_files_without_rows_are_passed_over_beside_others(tmp_path, capsys):
    table = pa.table({"user": ["a", "b"] * 20, "x": np.arange(40.0), "y": np.arange(40) % 2})
    config = small(tmp_path, b"", "rows.parquet", files=["*.parquet"])
    for name, rows in (("rows", table), ("empty", table.slice(0, 0))):
        pq.write_table(rows, config.parent / f"{name}.parquet")
    assert make(config.parent, tmp_path / "out").statistics["rows"] == 40
    (config.parent / "rows.parquet").unlink()
    assert run(config, tmp_path / "none") == 2
    assert "empty.parquet: no rows, at most a header." in capsys.readouterr().err


def test_a_json_key_that_comes_late_is_found(tmp_path, capsys):
    lines = [json.dumps({"user": f"u{k % 9}", "y": k % 2} | ({"x": k} if k > 1500 else {})) for k in range(1600)]
    make(small(tmp_path, "\n".join(lines) + "\n", "rows.json").parent, tmp_path / "out")
    config = small(tmp_path, "\n".join(lines[:1500]) + "\n", "rows.json")
    assert run(config, tmp_path / "none") == 2
    assert "no line has the key 'x'" in capsys.readouterr().err


def test_large_row_groups_of_parquet_are_read_in_bounded_memory(tmp_path, command):
    """One row group of 400 MB; what is looked up is a number, so that no dictionary grows."""
    text = pa.array(["x" * 200] * 50_000)
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw" / "rows.parquet"
    numbers = np.arange(2_000_000)
    table = pa.table({"text": pa.chunked_array([text] * 40), "user": numbers % 50, "x": numbers / 7, "y": numbers % 2})
    pq.write_table(table, path, row_group_size=len(table), compression="none", use_dictionary=False)
    del table
    features = {"t": {"kind": "id", "column": "text", "hash": {"num_buckets": 10}}, "x": {"kind": "number"}}
    config = write_config(
        tmp_path / "raw", {"files": ["rows.parquet"], "features": features, "tasks": [{"name": "y", "label": "y"}]}
    )
    # The peak that a process inherits at its start is that of the one which starts it; this one is of its own memory.
    peak = "[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0]"
    prelude = f"import atexit\natexit.register(lambda: print('peak', {peak}))"
    result = command(
        "table", "--config", config, "--out", tmp_path / "out", "--memory", "0.5", "--workers", "2", prelude=prelude
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split("peak ")[1]) < 512 << 10
