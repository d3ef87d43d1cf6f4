"""Inputs that no model can use: one block at the end of preprocessing and of `describe`; numbers that say what they seem to."""

import re

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.describing.description import describe
from preprocessing.describing.notes import look_at_this
from preprocessing.describing.report import sections
from preprocessing.writing.summaries import Moments
from tests.preprocessing.table_fake import run, write_config

FEATURES = {"user": {"kind": "id", "type": "int"}, "item": {"kind": "id"}, "price": {"kind": "number"}}
SCENARIO = {"column": "device", "values": ["a", "b"]}


def frame(num_rows=300, seed=0):
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user": random.integers(0, 20, num_rows),
            "item": [f"i{k}" for k in random.integers(0, 9, num_rows)],
            "price": random.uniform(1, 9, num_rows).round(2),
            "label": random.integers(0, 2, num_rows),
            "device": random.choice(["a", "b"], num_rows),
            "row": np.arange(num_rows),
        }
    )


def make(tmp_path, capsys, rows, *options, **config):
    """Preprocess a table; its block, which must be the one that `describe` ends with, too, without its head."""
    (tmp_path / "raw").mkdir(exist_ok=True)
    rows.to_csv(tmp_path / "raw" / "a.csv", index=False)
    base = {"files": ["a.csv"], "features": FEATURES, "tasks": [{"name": "y", "label": "label"}], "scenario": SCENARIO}
    base["keys"] = {"row": {"type": "int"}}  # no two rows are equal
    path = write_config(tmp_path / "raw", base | config)
    capsys.readouterr()
    assert run(path, tmp_path / "out", "--overwrite", *options) == 0
    blocks = [capsys.readouterr().out]
    assert main(["describe", str(tmp_path / "out")]) == 0
    blocks.append(capsys.readouterr().out)
    found = [re.findall(r"^  \* (.*)$", text.partition("Look at this:\n")[2], re.MULTILINE) for text in blocks]
    assert found[0] == found[1]
    assert found[0] == look_at_this(DatasetManifest.load(tmp_path / "out"), tmp_path / "out")
    return found[0]


def test_a_table_that_can_be_used_has_no_block(tmp_path, capsys):
    assert make(tmp_path, capsys, frame()) == []


@pytest.mark.parametrize("feature", [{"kind": "number"}, {"kind": "number", "scale": "none"}, {"kind": "number", "buckets": 4}])
def test_an_empty_number(feature, tmp_path, capsys):
    (note,) = make(tmp_path, capsys, frame().assign(price=None), features=FEATURES | {"price": feature})
    assert note.startswith("Feature 'price' has no value in any of the 240 rows of train.")


@pytest.mark.parametrize("hashed", [{}, {"hash": {"num_buckets": 7}}, {"hash": {"num_buckets": 7, "num_hashes": 2}}])
@pytest.mark.parametrize("kind", ["id", "ids"])
def test_empty_ids(kind, hashed, tmp_path, capsys):
    feature = {"kind": kind, **hashed} | ({"separator": "|"} if kind == "ids" else {})
    (note,) = make(tmp_path, capsys, frame().assign(item=None), features=FEATURES | {"item": feature})
    assert note.startswith("Feature 'item' has no value in any of the 240 rows of train.")


def test_a_minimum_count_above_every_count(tmp_path, capsys):
    (note,) = make(tmp_path, capsys, frame(), features=FEATURES | {"item": {"kind": "id", "min_count": 241}})
    assert "Feature 'item' has no id but 0" in note
    assert "Lower min_count" in note


CONSTANTS = {
    "text": ({"kind": "id"}, "x"),
    "hashed": ({"kind": "id", "hash": {"num_buckets": 7}}, "x"),
    "list": ({"kind": "ids", "separator": "|"}, "x|x"),
    "buckets": ({"kind": "number", "buckets": 4}, 3.5),
    "number": ({"kind": "number"}, 3.5),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_a_constant_column_and_one_that_is_constant_in_train(case, tmp_path, capsys):
    feature, value = CONSTANTS[case]
    rows = frame().assign(more=value)
    (note,) = make(tmp_path, capsys, rows, features=FEATURES | {"more": feature})
    assert note.startswith("Feature 'more' has one value in train")
    config = {"split": {"rule": "time", "key": "row"}}
    later = rows.copy()
    later["more"] = later["more"].astype(object)
    later.loc[250:, "more"] = 7 if isinstance(value, float) else "y"
    (note,) = make(tmp_path, capsys, later, features=FEATURES | {"more": feature}, **config)
    assert note.startswith("Feature 'more' has one value in train")


@pytest.mark.parametrize("far", [1e30, 1e4, -1e6])
def test_an_outlier_that_squeezes_the_others(far, tmp_path, capsys):
    rows = frame()
    config = {"split": {"rule": "time", "key": "row"}}
    rows.loc[290, "price"] = far
    assert make(tmp_path, capsys, rows, **config) == []  # in test it squeezes nothing
    rows.loc[5, "price"] = far
    (note,) = make(tmp_path, capsys, rows, **config)
    end = "greatest" if far > 0 else "least"
    assert note.startswith(f"Feature 'price' is squeezed by its {end} values")
    assert f"{far:g}" in note
    assert "scale: log" in note


def test_flags_and_counts_with_many_zeros_are_not_squeezed(tmp_path, capsys):
    random = np.random.default_rng(3)
    flag, counts = (random.random(300) < 0.02).astype(int), random.poisson(3, 300) * (random.random(300) < 0.1)
    features = FEATURES | {"flag": {"kind": "number"}, "counts": {"kind": "number"}}
    assert make(tmp_path, capsys, frame().assign(flag=flag, counts=counts), features=features) == []


def test_a_scenario_without_rows_and_one_without_rows_in_a_split(tmp_path, capsys):
    three = {"column": "device", "values": ["a", "b", "c"]}
    (note,) = make(tmp_path, capsys, frame(), scenario=three)
    assert note.startswith("Scenario 'c' is listed, but no row belongs to it.")
    rows = frame()
    rows.loc[:100, "device"] = "c"
    rows.loc[101:, "device"] = rows["device"][101:].replace("c", "a")
    (note,) = make(tmp_path, capsys, rows, scenario=three, split={"rule": "time", "key": "row"})
    assert note.startswith("Scenario 'c' has no row in valid and test.")


def test_a_task_of_one_class_and_one_without_labels(tmp_path, capsys):
    rows = frame().assign(other=1.0)
    rows.loc[239:, "label"] = 0
    rows.loc[:269, "other"] = None
    tasks = [{"name": "y", "label": "label"}, {"name": "z", "label": "other"}]
    config = {"split": {"rule": "time", "key": "row"}, "tasks": tasks}
    first, second, third = make(tmp_path, capsys, rows, **config)
    assert first.startswith("Task 'y' has labels of one class only in valid (0 of 30 positive), test (0 of 30 positive):")
    assert second.startswith("Task 'z' has no label in train (0 of 240 rows), valid (0 of 30 rows):")
    assert third.startswith("Task 'z' has labels of one class only in test (30 of 30 positive):")


def test_a_regression_task_has_mean_deviation_and_range_in_place_of_a_rate(tmp_path, capsys):
    rows = frame(3000).assign(amount=lambda table: (table["price"] ** 2 - 20).where(table.index % 9 != 0))
    tasks = [{"name": "amount", "label": "amount", "kind": "regression"}, {"name": "y", "label": "label"}]
    assert make(tmp_path, capsys, rows, tasks=tasks) == []
    manifest = DatasetManifest.load(tmp_path / "out")
    assert list(manifest.statistics["label_rates"]) == ["y"]
    told = manifest.statistics["label_values"]["amount"]
    place = {
        row: split
        for split, content in manifest.splits.items()
        for part in content.parts
        for row in pq.read_table(tmp_path / "out" / part.path)["key.row"].to_pylist()
    }
    rows["split"] = rows.index.map(place)
    for split in ("all", "train", "valid", "test"):
        for device in ("all", "a", "b"):
            values = rows[(split == "all") | (rows["split"] == split)]
            values = values[(device == "all") | (values["device"] == device)]["amount"].dropna()
            found = told[split][device]
            assert found["mean"] == pytest.approx(values.mean(), rel=1e-6)
            assert found["deviation"] == pytest.approx(values.std(ddof=0), rel=1e-6)
            assert (found["least"], found["greatest"]) == pytest.approx((values.min(), values.max()), rel=1e-6)
    assert run(tmp_path / "raw" / "my_table.yaml", tmp_path / "out", "--overwrite") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  label amount +mean +deviation +least +greatest$", shown, re.MULTILINE)
    assert re.search(rf"^  a +{told['all']['a']['mean']:.6g} ", shown, re.MULTILINE)
    assert "rate amount" not in shown
    (values,) = [section for section in sections(describe(tmp_path / "out", 0)) if section.title == "Values of amount"]
    assert values.rows[0][:3] == ["train", "all", f"{told['train']['all']['mean']:.6g}"]
    (rates,) = [section for section in sections(describe(tmp_path / "out", 0)) if section.title == "Rows and label rates"]
    assert "rate of amount" not in rates.headers
    assert "labelled amount" in rates.headers


def test_a_regression_label_that_is_the_same_everywhere(tmp_path, capsys):
    tasks = [{"name": "amount", "label": "price", "kind": "regression"}]
    features = {name: FEATURES[name] for name in ("user", "item")}
    (note,) = make(tmp_path, capsys, frame().assign(price=2.5), tasks=tasks, features=features)
    assert note.startswith("Task 'amount' has one value only in train (2.5 in 240 labelled rows), valid (2.5 in 30")


def test_moments_joined_are_those_of_all_numbers():
    random = np.random.default_rng(0)
    numbers = 1e4 + random.normal(size=1000)
    joined = Moments()
    for piece in np.split(numbers, [0, 1, 400, 400, 977]):
        joined += Moments.of(piece)
    found = joined.statistics()
    assert joined.count == 1000
    assert found["mean"] == pytest.approx(numbers.mean(), rel=1e-12)
    assert found["deviation"] == pytest.approx(numbers.std(), rel=1e-9)
    assert (found["least"], found["greatest"]) == (numbers.min(), numbers.max())
    assert Moments().statistics() == dict.fromkeys(("mean", "deviation", "least", "greatest"))


def cells(section, feature):
    (row,) = [row for row in section.rows if row[0] == feature]
    return dict(zip(section.headers, row, strict=True))


def share(chosen):
    return f"{100 * chosen.mean():.2f} %"


def test_missing_rare_and_unseen_are_told_apart(tmp_path, capsys):
    """A column whose rest is missing is not unseen: 94 % of it used to be 'known', as if 6 % of its values were new."""
    random = np.random.default_rng(5)
    rows = frame(2000, seed=5)
    rows["item"] = rows["item"].where(random.random(2000) > 0.2)
    rows.loc[1700:1750, "item"] = "new"  # in valid: values that train does not have
    rows.loc[[3, 5, 7], "item"] = "seldom"
    rows["tags"] = [random.choice([None, "x", "x|y", "y"]) for _ in range(2000)]
    rows.loc[1900:1919, "tags"] = "x|z"
    rows["code"] = rows["item"]
    rows["price"] = rows["price"].where(random.random(2000) > 0.3)
    rows["raw"] = (random.random(2000) < 0.5).astype(float)
    rows.loc[random.random(2000) < 0.1, "raw"] = None
    features = {
        "item": {"kind": "id", "min_count": 4},
        "tags": {"kind": "ids", "separator": "|"},
        "code": {"kind": "id", "hash": {"num_buckets": 10_000}},
        "price": {"kind": "number"},
        "raw": {"kind": "number", "scale": "none"},
    }
    make(tmp_path, capsys, rows, features=features, split={"rule": "time", "key": "row"})
    manifest = DatasetManifest.load(tmp_path / "out")
    splits = {"train": rows[:1600], "valid": rows[1600:1800], "test": rows[1800:]}
    for name in features:
        found = manifest.statistics["missing"][name]
        assert found == {split: int(part[name].isna().sum()) for split, part in splits.items()}
    by_title = {section.title: section for section in sections(describe(tmp_path / "out", 0))}
    sparse, numbers = by_title["Sparse and multi-valued features"], by_title["Dense features"]
    for name, section in (("item", sparse), ("tags", sparse), ("code", sparse), ("price", numbers), ("raw", numbers)):
        found = cells(section, name)
        for split, part in splits.items():
            assert found[f"missing in {split}"] == share(part[name].isna()), (name, split)
    train = splits["train"]
    item = cells(sparse, "item")
    assert item["rare in train"] == share(train["item"] == "seldom") != "0.00 %"
    assert item["unseen in valid"] == share(splits["valid"]["item"].dropna() == "new") != "0.00 %"
    assert item["unseen in test"] == "0.00 %"
    assert cells(sparse, "code")["unseen in valid"] == item["unseen in valid"]
    assert cells(sparse, "code")["rare in train"] == "0.00 %"
    values = splits["test"]["tags"].dropna().str.split("|").explode()
    assert cells(sparse, "tags")["unseen in test"] == share(values == "z") != "0.00 %"
    assert cells(numbers, "price")["zero in train"] == "-"  # the least value is written as 0, too
    assert cells(numbers, "raw")["zero in train"] == share(train["raw"] == 0)


def test_copies_on_both_sides_are_told_until_they_are_gone(tmp_path, capsys):
    """The files say the side of a row: keeping copies together changes nothing there."""
    (tmp_path / "raw").mkdir()
    train, others = frame(100), frame(40, seed=1)
    for name, rows in {"train": train, "valid": [train[:30], others[:20]], "test": [train[:30], others[20:]]}.items():
        table = rows if name == "train" else pd.concat(rows)
        table.to_csv(tmp_path / "raw" / f"{name}.csv", index=False)
    split = {"rule": "file"} | {name: [f"{name}.csv"] for name in ("train", "valid", "test")}
    features = {name: FEATURES[name] for name in ("user", "item")} | {"price": {"kind": "number"}}
    config = write_config(tmp_path / "raw", {"split": split, "features": features, "tasks": [{"name": "y", "label": "label"}]})

    def copies(policy):
        assert run(config, tmp_path / "out", "--overwrite", "--duplicates", policy) == 0
        notes = look_at_this(DatasetManifest.load(tmp_path / "out"), tmp_path / "out")
        return [note for note in notes if note.startswith("Copies on both sides: 30 of 50 rows of valid and 30 of 50")]

    (note,) = copies("keep")
    assert "--duplicates keep_together or drop." in note
    (note,) = copies("keep_together")
    assert "leave them out: --duplicates drop." in note
    assert copies("drop") == []


def test_the_page_has_the_block(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("preprocessing.describing.page._figures", lambda description: iter(()))
    make(tmp_path, capsys, frame().assign(price=None))
    page = tmp_path / "page.html"
    assert main(["describe", str(tmp_path / "out"), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<h2>Look at this</h2>\n<ul><li>Feature &#x27;price&#x27; has no value" in text


def leaking(tmp_path, **config):
    """The configuration of a table with a feature that is the label, or the rating that decides it."""
    (tmp_path / "raw").mkdir(exist_ok=True)
    frame().assign(rating=lambda rows: rows["user"] % 5 + 1).to_csv(tmp_path / "raw" / "a.csv", index=False)
    base = {
        "files": ["a.csv"],
        "features": FEATURES | {"leak": {"kind": "number", "column": "label"}},
        "tasks": [{"name": "y", "label": "label"}, {"name": "liked", "label": "rating > 3 and price < 8"}],
        "scenario": SCENARIO,
    }
    return write_config(tmp_path / "raw", base | config)


FED = {
    "the label": ({"leak": {"kind": "number", "column": "label"}}, "leak", "label", "y"),
    "the label as an id": ({"leak": {"kind": "id", "type": "int", "column": "label"}}, "leak", "label", "y"),
    "by its own name": ({"label": {"kind": "number", "buckets": 2}}, "label", "label", "y"),
    "what decides a condition": ({"stars": {"kind": "number", "column": "rating"}}, "stars", "rating", "liked"),
    "one of its columns": ({"price": {"kind": "number"}}, "price", "price", "liked"),
    "ids": ({"rating": {"kind": "ids", "type": "int", "separator": "|"}}, "rating", "rating", "liked"),
}


@pytest.mark.parametrize("case", FED)
def test_a_feature_made_of_a_label_is_refused_by_name_unless_it_says_so(case, tmp_path, capsys):
    more, feature, column, task = FED[case]
    features = {"user": FEATURES["user"], "item": FEATURES["item"]} | more
    config = leaking(tmp_path, features=features)
    assert run(config, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"features.{feature} is made of column '{column}', and so is the label of task '{task}'" in error
    assert f"features.{feature}.allow_label_feature: true" in error
    assert not (tmp_path / "out").exists()
    if case == "ids":
        return  # a number cannot be read as a list, whatever is allowed
    told = {name: options | {"allow_label_feature": True} if name == feature else options for name, options in features.items()}
    assert run(leaking(tmp_path, features=told), tmp_path / "out") == 0


def test_the_example_has_no_such_feature(tmp_path):
    from preprocessing.datasets.table import EXAMPLE
    from preprocessing.own_tables.config import read_table_config

    (tmp_path / "example.yaml").write_text(EXAMPLE)
    assert len(read_table_config(tmp_path / "example.yaml").tasks) == 2
