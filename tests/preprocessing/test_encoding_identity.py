"""The identity of an encoding against facts worked out by hand: what counts, what does not, and that it stays what it is."""

import argparse
import hashlib
import json
import struct
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mmlrec.errors import DataError
from mmlrec.identity import check_vocabulary, encoding_differences, vocabulary_digest
from mmlrec.schema import DatasetManifest, Encoding, Feature, Table, Task
from preprocessing.dataset import Column
from preprocessing.datasets.table import Table as TableDataset
from preprocessing.encoding import identity
from preprocessing.encoding.encoder import DenseRange, Encoder
from preprocessing.own_tables.config import TaskConfig
from preprocessing.reading.raw_files import RawFolder
from tests.preprocessing.table_fake import WRITERS, run, small, write_table

LINES = "user,item,x,z,age,page,d,y,r\n" + "".join(
    f"{k % 5},i{k % 3},{k % 11}.5,{k % 7},{k % 4},p{k},{'ab'[k % 2]},{k % 2},{k % 6}\n" for k in range(60)
)
FEATURES = {
    "user": {"kind": "id", "type": "int"},
    "item": {"kind": "id"},
    "x": {"kind": "number", "fill": 2},
    "z": {"kind": "number", "scale": "none", "fill": 0},
    "age": {"kind": "number", "buckets": 4},
    "page": {"kind": "id", "hash": {"num_buckets": 9, "num_hashes": 2, "seed": 7}},
}
CONFIG = {
    "features": FEATURES,
    "tasks": [{"name": "y", "label": "y"}, {"name": "r", "label": "r > 3"}],
    "scenario": {"column": "d", "values": {"a": "one", "b": "two"}},
}


def canonical(facts):
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def values_digest(kind, values):
    """As docs/datasets/encoding.md says, in plain Python."""
    if kind == "string":
        lengths = b"".join(struct.pack("<q", len(value.encode())) for value in values)
        content = b"".join(value.encode() for value in values)
    else:
        lengths, content = b"", b"".join(struct.pack({"int64": "<q", "float32": "<f"}[kind], value) for value in values)
    return canonical([kind, len(values), hashlib.sha256(lengths).hexdigest(), hashlib.sha256(content).hexdigest()])


def encoding(folder, content=LINES, **config):
    """The encoding of a table, made in a folder of its own."""
    folder.mkdir()
    out = folder / "out"
    assert run(small(folder, content, **(CONFIG | config)), out) == 0
    return DatasetManifest.load(out).encoding


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return encoding(tmp_path_factory.mktemp("usual") / "table")


def test_facts_and_digests_are_those_of_the_document(usual):
    tables = usual.tables
    assert usual.features == {
        "user": {"kind": "sparse", "type": "int64", "table": "user"},
        "item": {"kind": "sparse", "type": "string", "table": "item"},
        "x": {"kind": "dense", "type": "float64", "range": [0.5, 10.5], "fill": 2.0},
        "z": {"kind": "dense", "type": "float32", "fill": 0.0},
        "age": {"kind": "sparse", "type": "float32", "table": "age"},
        "page": {"kind": "multi", "type": "string", "table": "page"},
    }
    assert tables["page"] == {"ids": "hash", "buckets": 9, "hashes": 2, "seed": 7}
    assert (tables["user"]["ids"], tables["user"]["type"], tables["user"]["entries"]) == ("vocabulary", "int64", 5)
    assert (tables["age"]["ids"], tables["age"]["type"], tables["age"]["entries"]) == ("quantiles", "float32", 4)
    assert tables["age"]["digest"] == values_digest("float32", [float("-inf"), 1, 2, 3])
    assert usual.scenario == {"values": ["one", "two"], "map": [["a", "one"], ["b", "two"]]}
    assert usual.labels == {
        "y": {"kind": "binary", "column": "y"},
        "r": {"kind": "binary", "rule": [">", "r", 3]},
    }
    parts = {"form": 1, "features": usual.features, "tables": tables, "scenario": usual.scenario}
    assert usual.digest == canonical(parts)


def test_the_digest_of_a_form_never_changes():
    found = Encoding.of(
        {"x": {"kind": "dense", "type": "float64", "range": [0.1, 1e22]}},
        {"t": {"ids": "hash", "buckets": 7, "hashes": 1, "seed": 0}},
        {"values": ["ä", "b"]},
        {"y": {"kind": "binary"}},
    )
    text = (
        r'{"features":{"x":{"kind":"dense","range":[0.1,1e+22],"type":"float64"}},"form":1,"scenario":{"values":["\u00e4","b"]},'
        r'"tables":{"t":{"buckets":7,"hashes":1,"ids":"hash","seed":0}}}'
    )
    assert found.digest == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"x": {"kind": "number", "scale": "log", "fill": 0}}, {"feature 'x', " + of for of in ("range", "scale", "fill")}),
        ({"x": {"kind": "number", "scale": "none", "fill": 2}}, {"feature 'x', range", "feature 'x', type"}),
        ({"x": {"kind": "number", "fill": 3}}, {"feature 'x', fill"}),
        ({"z": FEATURES["z"] | {"indicator": True}}, {"feature 'z_missing'"}),
        ({"user": {"kind": "id"}}, {"feature 'user', type", "table 'user', type", "table 'user', digest"}),
        ({"item": {"kind": "id", "min_count": 21}}, {"table 'item', entries", "table 'item', digest"}),
        ({"item": {"kind": "id", "min_count": 2}}, set()),
        ({"age": {"kind": "number", "buckets": 2}}, {"table 'age', entries", "table 'age', digest"}),
        (
            {"page": {"kind": "id", "hash": {"num_buckets": 9, "num_hashes": 2, "seed": 8}}},
            {"table 'page', seed"},
        ),
        (
            {"page": {"kind": "id", "hash": {"num_buckets": 8, "num_hashes": 2, "seed": 7}}},
            {"table 'page', buckets"},
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_an_option_of_a_feature_changes_its_own_part(change, differs, usual, tmp_path):
    assert parts_that_differ(usual, encoding(tmp_path / "t", features=FEATURES | change)) == differs


def test_the_mean_that_missing_numbers_become_is_a_fact(tmp_path):
    folder = tmp_path / "t"
    found = encoding(folder, features=FEATURES | {"z": {"kind": "number", "scale": "none"}})
    rows = pa.concat_tables(pq.read_table(part) for part in (folder / "out" / "train").glob("*.parquet"))
    assert found.features["z"] == {"kind": "dense", "type": "float32", "fill": np.mean(rows["z"].to_numpy().astype(float))}


def test_marks_of_missing_values_count_where_they_are_looked_for(usual, tmp_path):
    everywhere = parts_that_differ(usual, encoding(tmp_path / "all", missing=["NA", "-"]))
    names = [*(f"feature '{name}'" for name in FEATURES), "scenario", "label 'y'", "label 'r'"]
    assert everywhere == {f"{name}, missing" for name in names}
    assert encoding(tmp_path / "order", missing=["-", "NA"]) == encoding(tmp_path / "all-again", missing=["NA", "-", "NA"])
    one = encoding(tmp_path / "one", missing={"item": ["NA"], "r": ["9"]})
    assert parts_that_differ(usual, one) == {"feature 'item', missing", "label 'r', missing"}
    assert one.features["item"]["missing"] == ["NA"]
    blanks = encoding(tmp_path / "strip", strip=True)
    assert parts_that_differ(usual, blanks) == {f"{name}, strip" for name in names}


def test_scenarios_and_labels_are_parts_of_their_own(usual, tmp_path):
    scenario = {"column": "d", "values": {"a": "two", "b": "one"}}
    assert parts_that_differ(usual, encoding(tmp_path / "map", scenario=scenario)) == {"scenario, values", "scenario, map"}
    others = {"column": "d", "values": {"a": "one", "c": "two"}, "others": "two"}
    assert parts_that_differ(usual, encoding(tmp_path / "others", scenario=others)) == {"scenario, map", "scenario, others"}
    label = encoding(tmp_path / "label", tasks=[CONFIG["tasks"][0], {"name": "r", "label": "r > 4"}])
    assert parts_that_differ(usual, label) == {"label 'r', rule"}
    assert label.digest == usual.digest


def test_texts_that_say_the_same_are_the_same(usual, tmp_path):
    renamed = LINES.replace("user,item,x", "u,item,price")
    features = {
        "page": FEATURES["page"],
        "user": {"kind": "id", "type": "int", "column": "u", "min_count": 1},
        "x": {"kind": "number", "scale": "min_max", "column": "price", "fill": 2.0},
        **{name: FEATURES[name] for name in ("age", "z", "item")},
    }
    tasks = [CONFIG["tasks"][0], {"name": "r", "label": "3.0<r"}]
    scenario = {"column": "d", "name": "place", "values": {"a": "one", "b": "two"}, "others": "drop"}
    again = encoding(
        tmp_path / "t",
        renamed,
        features=features,
        tasks=tasks,
        scenario=scenario,
        terms="none",
        keys={"x": {"type": "string", "column": "item"}},
    )
    assert again == usual


def parts_that_differ(before, now):
    """The parts that are told to differ, without their values."""
    manifest = DatasetManifest(
        name="x",
        tables=[Table(name="t", num_rows=2)],
        features=[Feature(name="f", kind="sparse", table="t")],
        tasks=[Task(name="y")],
        num_lanes=1,
        row_group_size=1,
        splits={},
        encoding=now,
    )
    lines = encoding_differences(before, manifest, None, scenario=True, labels=True)
    assert bool(lines) == (before != now)
    return {line.strip().partition(":")[0] for line in lines}


def test_an_outlier_is_told_as_the_range(usual, tmp_path):
    lines = LINES.splitlines(keepends=True)
    other = encoding(tmp_path / "t", lines[0] + "".join(line.replace(",10.5,", ",100000,") for line in lines[1:]))
    assert parts_that_differ(usual, other) == {"feature 'x', range"}
    assert other.features["x"]["range"] == [0.5, 100000.0]


def test_every_format_and_any_way_of_working_gives_the_same_identity(tmp_path):
    found = []
    for form in WRITERS:
        raw = write_table(tmp_path / form, form, 600)
        assert run(raw / "my_table.yaml", tmp_path / f"{form}-out") == 0
        found.append(DatasetManifest.load(tmp_path / f"{form}-out").encoding)
    raw = tmp_path / "csv"
    assert run(raw / "my_table.yaml", tmp_path / "again", "--workers", "3", "--memory", "0.5") == 0
    found.append(DatasetManifest.load(tmp_path / "again").encoding)
    assert found[0].digest
    assert [each == found[0] for each in found] == [True] * 4


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("x>3", [">", "x", 3]),
        ("3.0 <  x", [">", "x", 3]),
        ("x in [2, 1, 2]", ["in", "x", [1, 2]]),
        ("1 < x <= 3.5", ["and", ["<=", "x", 3.5], [">", "x", 1]]),
        ("x <= 3.5 and (x > 1 and x > 1)", ["and", ["<=", "x", 3.5], [">", "x", 1]]),
        ("not (a == 'b' or c == true)", ["not", ["or", ["==", "a", "b"], ["==", "c", True]]]),
        ("x < 1e999", ["<", "x", "inf"]),
        ("x != 9007199254740993", ["!=", "x", 9007199254740993]),
    ],
)
def test_conditions_as_facts(text, facts):
    assert TaskConfig(name="t", label=text).condition.facts() == facts


def test_conditions_that_differ_have_other_facts():
    texts = [
        "x > 3",
        "x >= 3",
        "x < 3",
        "y > 3",
        "x > 3.5",
        "not x > 3",
        "x > 3 or y > 3",
        "x > 3 and y > 3",
        "x == '3'",
        "x == 3",
    ]
    texts += ["x in [3]", "x not in [3]", "x == true", "not (x > 3 and y > 3)"]
    facts = [json.dumps(TaskConfig(name="t", label=text).condition.facts()) for text in texts]
    assert len(set(facts)) == len(texts)


def write_vocabulary(path, values, kind):
    pq.write_table(pa.table({"value": pa.array(values, kind), "id": range(1, len(values) + 1)}), path, row_group_size=1000)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.string(), ["b", "", "a\0b", "日本", *(f"value {k}" for k in range(70_000))]),
        (pa.int64(), [5, -3, 2**62, *range(100, 70_100)]),
        (pa.float32(), [float("-inf"), -0.5, 0.0, 3.25]),
        (pa.string(), []),
    ],
    ids=["text", "int", "number", "empty"],
)
def test_a_vocabulary_begins_with_another_one(kind, values, tmp_path):
    write_vocabulary(tmp_path / "whole", values, kind)
    name = "float32" if kind == pa.float32() else str(kind)
    assert vocabulary_digest(tmp_path / "whole") == values_digest(name, values)
    for count in {0, 1, min(3, len(values)), len(values) // 2, len(values)}:
        if count <= len(values):
            assert vocabulary_digest(tmp_path / "whole", count) == values_digest(name, values[:count])
    if pa.types.is_string(kind):
        write_vocabulary(tmp_path / "large", values, pa.large_string())
        assert vocabulary_digest(tmp_path / "large") == vocabulary_digest(tmp_path / "whole")


def test_values_and_their_borders_count(tmp_path):
    lists = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""], ["abc"]]
    for index, values in enumerate(lists):
        write_vocabulary(tmp_path / str(index), values, pa.string())
    assert len({vocabulary_digest(tmp_path / str(index)) for index in range(len(lists))}) == len(lists)
    write_vocabulary(tmp_path / "text", ["7"], pa.string())
    write_vocabulary(tmp_path / "number", [7], pa.int64())
    assert vocabulary_digest(tmp_path / "text") != vocabulary_digest(tmp_path / "number")


def test_a_vocabulary_that_has_changed_is_named(tmp_path):
    write_vocabulary(tmp_path / "v.parquet", ["a", "b"], pa.string())
    facts = {"digest": vocabulary_digest(tmp_path / "v.parquet")}
    check_vocabulary(tmp_path / "v.parquet", facts)
    write_vocabulary(tmp_path / "v.parquet", ["b", "a"], pa.string())
    with pytest.raises(
        DataError, match=r"v\.parquet is damaged: the digest of its values is \w{12}…, the manifest says \w{12}…"
    ):
        check_vocabulary(tmp_path / "v.parquet", facts)
    (tmp_path / "v.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"v\.parquet is damaged: the vocabulary cannot be read"):
        check_vocabulary(tmp_path / "v.parquet", facts)


@dataclass(frozen=True)
class Clipped(Column):
    """As a later release may declare it."""

    most: float = 0.0


def test_what_a_column_declares_besides_counts_unless_it_is_the_default():
    both = (Clipped("x", "dense", pa.float32(), scaled=True, most=most) for most in (0.0, 2.5))
    usual, other = (identity._feature(column, None, None) for column in both)
    assert usual == identity._feature(Column("x", "dense", pa.float32(), scaled=True), None, None)
    assert other == usual | {"most": 2.5}


def test_ranges_that_scale_alike_are_alike():
    assert DenseRange(-0.0, 1.0).scaling == DenseRange(0.0, 1.0).scaling == [0.0, 1.0]
    assert str(DenseRange(-0.0, 1.0).scaling) == "[0.0, 1.0]"
    assert [DenseRange().scaling, DenseRange(2.0, 2.0).scaling, DenseRange(-1e308, 1e308).scaling] == [None] * 3


def test_a_changed_record_is_no_record(usual, tmp_path):
    content = usual.model_dump(mode="json")
    content["features"]["x"]["range"] = [0.5, 11.0]
    with pytest.raises(DataError, match="digest is not that of its facts"):
        Encoding.read(content, "here")
    later = Encoding.read(content | {"form": 2, "digest": "of its own"}, "here")
    assert not later.comparable(usual)
    assert not usual.comparable(None)
    assert usual.comparable(usual)


def test_counters_that_are_merged_as_spark_merges_them_give_the_same_identity(tmp_path):
    split = {"rule": "file", "train": ["rows.csv"], "valid": ["valid.csv"], "test": ["valid2.csv"]}
    for name in ("valid", "valid2"):
        small(tmp_path, LINES.replace(",10.5,", ",99,"), f"{name}.csv")
    config = small(tmp_path, LINES, **(CONFIG | {"files": [], "split": split}))
    assert run(config, tmp_path / "local") == 0
    options = argparse.Namespace(config=config, raw=None)
    dataset = TableDataset(options)
    raw = RawFolder(options.raw, dataset.raw_files, "")
    parts = [Encoder(dataset.features, False) for _ in range(3)]
    for number, batch in enumerate(dataset.batches(raw)):
        train = batch.filter(pc.equal(batch.column("split.side"), 0))
        for start in range(0, train.num_rows, 7):
            parts[(number + start) % 3].fit(train.slice(start, 7))
    merged = Encoder(dataset.features, False)
    for part in parts:
        for counter, other in zip(merged.counters(), part.counters(), strict=True):
            counter.merge(other)
    merged.freeze()
    merged.save(tmp_path / "vocab")
    found = identity.encoding_of(dataset, merged, tmp_path, 1)
    assert found == DatasetManifest.load(tmp_path / "local").encoding
    assert found.features["x"]["range"] == [0.5, 10.5]
