"""A table with every setting: files that came later, with the fitted parts of earlier ones, against plain Python."""

import math
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.identity import encoding_differences
from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.dataset import Hashing, Managed, bucketed, dense, multi, sparse
from tests.preprocessing.reference import Reference, in_order
from tests.preprocessing.table_fake import WRITERS, as_text, write_config

INT, DOUBLE = pa.int64(), pa.float64()
FEATURES = {
    "user": {"kind": "id", "type": "int"},
    "item": {"kind": "id", "min_count": 3},
    "bought": {"kind": "ids", "separator": "|", "table": "item"},
    "tags": {"kind": "ids", "type": "int"},
    "page": {"kind": "id", "column": "url", "hash": {"num_buckets": 50, "num_hashes": 2, "seed": 7}},
    "seller": {"kind": "id", "type": "int", "hash": {"num_buckets": 20, "seed": 3}},
    "seen": {"kind": "ids", "column": "bought", "separator": "|", "hash": {"num_buckets": 30, "num_hashes": 2}},
    "seller_key": {"kind": "id", "column": "seller", "type": "int", "managed": {"slots": 7, "seed": 3}},
    "keys": {"kind": "ids", "column": "bought", "separator": "|", "managed": {"slots": 9}},
    "price": {"kind": "number", "indicator": True},
    "cost": {"kind": "number", "column": "price", "scale": "log", "fill": 5},
    "sold": {"kind": "number", "scale": "log"},
    "rank": {"kind": "number", "scale": "none"},
    "level": {"kind": "number", "column": "rank", "scale": "none", "fill": 0.25},
    "age": {"kind": "number", "buckets": 5},
}
COLUMNS = (
    sparse("user", INT),
    sparse("item", min_count=3),
    multi("bought", table="item", min_count=3),
    multi("tags", INT),
    multi("page", hashing=Hashing(50, 2, 7)),
    sparse("seller", INT, hashing=Hashing(20, 1, 3)),
    multi("seen", hashing=Hashing(30, 2, 0)),
    sparse("seller_key", INT, managed=Managed(7, 3)),
    multi("keys", managed=Managed(9)),
    replace(dense("price"), fill="mean"),
    dense("price_missing", scaled=False),
    replace(dense("cost"), fill=math.log1p(5)),
    replace(dense("sold"), fill="mean"),
    replace(dense("rank", scaled=False), fill="mean"),
    replace(dense("level", scaled=False), fill=0.25),
    bucketed("age", 5),
)
CONFIG = {
    "features": FEATURES,
    "missing": ["NA", "?"],
    "strip": True,
    "tasks": [
        {"name": "click", "label": "clicked", "role": "ctr"},
        {"name": "liked", "label": "rating > 3"},
        {"name": "amount", "label": "paid", "kind": "regression"},
    ],
    "weight": "counts",
    "keys": {"row": {"type": "int"}, "user": {"type": "int"}, "time": {"type": "datetime"}},
    "group_key": "user",
}
LABELS = ("clicked", "rating", "paid", "counts")
#: Form of the files, rule of the split, what becomes of other scenarios, what of copies.
CASES = {
    "csv": ({"rule": "random"}, "drop", "keep"),
    "json": ({"rule": "group", "key": "user"}, "desktop", "keep_together"),
    "parquet": ({"rule": "time", "key": "time"}, "desktop", "drop"),
}


def records(seed, later):
    """Rows as they stand in the files; None = an empty cell. Later ones go beyond what the others have, in every respect."""
    draw = random.Random(seed)
    users, items, spread = (90, 70, 2.5) if later else (60, 45, 1)
    rows = []
    for row in range(1500):
        price = draw.lognormvariate(2, spread) * draw.choice([1, 1, 1, -1 if later else 1])
        device = draw.choice(["phone", "phone", "desktop", "tablet", "watch"] + ["fridge"] * later)
        rows.append(
            {
                "row": row,
                "user": 2**61 + draw.randrange(users),
                "item": draw.choice([None, "NA", " ? ", *(f" i{k}" if k % 5 == 0 else f"i{k}" for k in range(items))]),
                "bought": "|".join(
                    draw.choice(["NA", " i7 ", f"i{draw.randrange(items)}"]) for _ in range(draw.choice([0, 1, 3]))
                ),
                "tags": [draw.randrange(-5, users // 2) for _ in range(draw.choice([0, 1, 2]))],
                "url": draw.choice([None, "NA", "/", *(f"/straße/{k}" for k in range(100))]),
                "seller": draw.choice([None, *range(30)]),
                "price": draw.choice([None, round(price, 2), price]),
                "sold": draw.choice([0, -3, 10 ** draw.randrange(8 if later else 6)]),
                "rank": draw.choice([None, draw.random()]),
                "age": draw.choice([None, 18, draw.randrange(10 if later else 18, 99 if later else 80)]),
                "clicked": draw.choice([0, 0, 1, None]),
                "rating": draw.choice([None, 1, 2.5, 3.5, 5]),
                "paid": draw.choice([None, draw.random() * 9]),
                "counts": draw.choice([1, 2]),
                "device": device,
                "time": f"2024-0{draw.randrange(1, 6)}-1{draw.randrange(10)}T0{draw.randrange(10)}:00:00",
            }
        )
    return rows + [dict(row) for row in rows[:40]]


def write(form, path, rows, without=()):
    """As tests/preprocessing/table_fake.py does; lists of ids stand joined already."""
    apart = [row | {"bought": row["bought"].split("|") if row["bought"] else []} for row in rows]
    if form == "csv":
        path.parent.mkdir(parents=True, exist_ok=True)
        as_text(apart).drop(columns=list(without)).to_csv(path, index=False)
    else:
        WRITERS[form][1](path, [{key: cell for key, cell in row.items() if key not in without} for row in apart])


def text(cell):
    """A cell of text: without blanks around it, and None where that says that it is missing."""
    cell = None if cell is None else cell.strip(" \t")
    return None if cell in (None, "", "NA", "?") else cell


def signed_log(value):
    return None if value is None else math.copysign(math.log1p(abs(value)), value)


def single(value):
    return None if value is None else float(np.float32(value))


def canonical(row):
    """Feature -> value."""
    bought = [found for cell in row["bought"].split("|") if (found := text(cell)) is not None]
    price = None if row["price"] is None else float(row["price"])
    return {
        "user": row["user"],
        "item": text(row["item"]),
        "bought": bought,
        "tags": row["tags"],
        "page": [text(row["url"])],
        "seller": row["seller"],
        "seen": bought,
        "seller_key": row["seller"],
        "keys": bought,
        "price": price,
        "price_missing": float(price is None),
        "cost": signed_log(price),
        "sold": signed_log(row["sold"]),
        "rank": single(row["rank"]),
        "level": single(row["rank"]),
        "age": row["age"],
    }


def make(folder, *arguments):
    assert main(["table", *map(str, arguments), "--out", str(folder)]) == 0
    return DatasetManifest.load(folder)


def rows_of(out):
    """Split -> row number -> columns; several rows of a number are copies."""
    found = {}
    for name, split in DatasetManifest.load(out).splits.items():
        rows = [row for part in split.parts for row in pq.read_table(out / part.path).to_pylist()]
        found[name] = rows
    return found


def earlier(form, folder):
    """The raw folder and the dataset of the earlier rows; rows by number; those that are trained on, with copies."""
    split, others, duplicates = CASES[form]
    rows, name = records(1, False), WRITERS[form][0]
    write(form, folder / "raw" / name, rows)
    scenario = {"column": "device", "values": {"phone": "mobile", "tablet": "mobile", "desktop": "desktop"}, "others": others}
    config = CONFIG | {"files": [name], "split": split, "scenario": scenario, "duplicates": duplicates}
    manifest = make(folder / "one", "--config", write_config(folder / "raw", config))
    train = [canonical(rows[row["key.row"]]) for row in rows_of(folder / "one")["train"]]
    return manifest, Reference(COLUMNS, {name: [row[name] for row in train] for name in train[0]})


def scenario_of(form, device):
    others = {"drop": None, "desktop": 1}[CASES[form][1]]
    return {"phone": 0, "tablet": 0, "desktop": 1}.get(device, others)


@pytest.mark.parametrize("form", list(CASES))
def test_later_rows_without_labels(form, tmp_path):
    before, reference = earlier(form, tmp_path)
    rows, name = records(2, True), WRITERS[form][0]
    write(form, tmp_path / "new" / name, rows, LABELS)
    after = make(tmp_path / "two", "--like", tmp_path / "one", "--raw", tmp_path / "new")
    assert after.encoding == before.encoding
    found = rows_of(tmp_path / "two")["test"]
    assert len(found) == sum(scenario_of(form, row["device"]) is not None for row in rows)
    for row in found:
        raw = rows[row["key.row"]]
        wanted = {feature: reference.cell(feature, value) for feature, value in canonical(raw).items()}
        assert {feature: row[feature] for feature in wanted} == wanted
        assert row["sample.scenario"] == scenario_of(form, raw["device"])
        assert row["key.user"] == raw["user"]
        assert [row[f"label.{task}"] for task in ("click", "liked", "amount")] == [None] * 3
    against = after.statistics["against_train"]
    for feature in canonical(rows[0]):
        of_split = dict(against[feature]["test"])
        del of_split["missing_rate_in_train"]
        assert of_split == reference.against_train(feature, [canonical(rows[row["key.row"]])[feature] for row in found])
    for feature in ("user", "item", "bought", "tags"):
        assert against[feature]["test"]["unseen"] > 20
    for feature in ("price", "cost", "sold"):
        assert against[feature]["test"]["below"] + against[feature]["test"]["above"] > 20


@pytest.mark.parametrize("form", list(CASES))
def test_vocabularies_that_grow(form, tmp_path):
    """New values of train rows stand behind, where there are min_count of them among the new rows alone."""
    before, reference = earlier(form, tmp_path)
    rows, name = records(3, True), WRITERS[form][0]
    write(form, tmp_path / "new" / name, rows)
    after = make(tmp_path / "two", "--extend", tmp_path / "one", "--raw", tmp_path / "new")
    found = rows_of(tmp_path / "two")
    assert list(found) == ["train", "valid", "test"]
    known = {table: list(vocabulary) for table, vocabulary in reference.vocabularies.items()}
    train = [canonical(rows[row["key.row"]]) for row in found["train"]]
    grown = Reference(COLUMNS, {feature: [row[feature] for row in train] for feature in train[0]}, known)
    grown.ranges, grown.fills, grown.borders = reference.ranges, reference.fills, reference.borders
    for table, vocabulary in grown.vocabularies.items():
        old, new = (pq.read_table(tmp_path / each / f"vocab/{table}.parquet").to_pydict() for each in ("one", "two"))
        assert new["value"] == list(vocabulary)
        assert new["value"][: len(old["value"])] == old["value"] == known[table]
        assert len(new["value"]) > len(old["value"])
        assert new["id"] == list(range(1, len(vocabulary) + 1))
        counts = dict(zip(old["value"], old["count"], strict=True))
        assert new["count"] == [counts.get(value, 0) + grown.counts[table][value] for value in vocabulary]
        assert in_order(grown.counts[table], 1, known[table])[: len(known[table])] == known[table]
    for split, of_split in found.items():
        for row in of_split:
            wanted = {feature: grown.cell(feature, value) for feature, value in canonical(rows[row["key.row"]]).items()}
            assert {feature: row[feature] for feature in wanted} == wanted
        for feature in canonical(rows[0]):
            counted = dict(after.statistics["against_train"][feature][split])
            del counted["missing_rate_in_train"]
            values = [canonical(rows[row["key.row"]])[feature] for row in of_split]
            assert counted == reference.against_train(feature, values)
    differences = encoding_differences(before.encoding, after, tmp_path / "two", scenario=True, labels=True)
    assert len(differences) == len(grown.vocabularies)
    assert all("the vocabulary of the run, and behind it" in line for line in differences)


def test_ranges_means_and_quantiles_anew(tmp_path):
    _, reference = earlier("csv", tmp_path)
    rows = records(3, True)
    write("csv", tmp_path / "new" / "rows.csv", rows)
    after = make(tmp_path / "two", "--extend", tmp_path / "one", "--refit-ranges", "--raw", tmp_path / "new")
    found = rows_of(tmp_path / "two")
    train = [canonical(rows[row["key.row"]]) for row in found["train"]]
    known = {table: list(vocabulary) for table, vocabulary in reference.vocabularies.items()}
    fitted = Reference(COLUMNS, {feature: [row[feature] for row in train] for feature in train[0]}, known)
    assert fitted.ranges["price"] != reference.ranges["price"]
    for row in (row for of_split in found.values() for row in of_split):
        wanted = {feature: fitted.cell(feature, value) for feature, value in canonical(rows[row["key.row"]]).items()}
        assert {feature: row[feature] for feature in wanted} == wanted
    outside = after.statistics["against_train"]["price"]["train"]["outside"]
    assert outside == reference.against_train("price", [row["price"] for row in train])["outside"] > 20


def test_a_new_scenario_is_an_error_where_the_rule_says_so(tmp_path, capsys):
    rows = [{"user": 1 + k % 3, "device": "ab"[k % 2], "y": k % 2} for k in range(40)]
    lines = ["user,device,y", *(f"{row['user']},{row['device']},{row['y']}" for row in rows)]
    for name, more in (("raw", []), ("new", ["9,c,0"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text("\n".join([*lines, *more]) + "\n")
    config = {"files": ["rows.csv"], "features": {"user": {"kind": "id"}}, "tasks": [{"name": "y", "label": "y"}]}
    config["scenario"] = {"column": "device", "values": ["a", "b"]}
    make(tmp_path / "one", "--config", write_config(tmp_path / "raw", config))
    out = tmp_path / "two"
    assert main(["table", "--like", str(tmp_path / "one"), "--raw", str(tmp_path / "new"), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "rows.csv, line 42" in message
    assert "found c." in message
    assert not out.exists()
