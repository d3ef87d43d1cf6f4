"""AliExpress, fake and sample: decoded and compared with plain pandas; both forms; any countries; bad files; leaks."""

import gzip
import zipfile

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.writing.permutation import RowPermutation
from tests.preprocessing.aliexpress_fake import joined, write_aliexpress, write_processed
from tests.preprocessing.movielens_fake import folder_bytes
from tests.preprocessing.test_splits import chance

CATEGORICAL = [f"categorical_{k}" for k in range(1, 17)]
NUMERICAL = [f"numerical_{k}" for k in range(1, 64)]


@pytest.fixture
def pairs(tmp_path):
    return write_aliexpress(tmp_path / "raw")


def expected_rows(folder, countries, seed=2024):
    """Rows in their order on disk, with their split: the three sides one behind the other, each permuted."""
    rows = [
        joined(folder, country, side).assign(scenario=scenario, split=side)
        for scenario, country in enumerate(countries)
        for side in ("train", "test")
    ]
    rows = pd.concat(rows, ignore_index=True)
    chosen = rows["search_id"].map(lambda search: chance(int(search), seed) < 1 / 10)
    rows.loc[chosen & (rows["split"] == "train"), "split"] = "valid"
    ordered = []
    for split in ("train", "valid", "test"):
        part = rows[rows["split"] == split]
        ordered.append(part.iloc[np.argsort(RowPermutation(len(part), seed).positions(0, len(part)))])
    return pd.concat(ordered, ignore_index=True)


def read(out, split):
    return pd.concat(
        [pq.read_table(out / part.path).to_pandas() for part in DatasetManifest.load(out).splits[split].parts],
        ignore_index=True,
    )


def assert_decodes_to(out, expected, scenarios=True):
    train = expected[expected.split == "train"]
    for split in ("train", "valid", "test"):
        found, wanted = read(out, split), expected[expected.split == split].reset_index(drop=True)
        assert len(found) == len(wanted) > 0
        assert np.array_equal(found["key.search_id"], wanted["search_id"].astype(int))
        for name in CATEGORICAL:
            entries = pq.read_table(out / "vocab" / f"{name}.parquet").to_pandas()
            counts = train[name].astype(int).value_counts()
            truth = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            assert list(zip(entries["value"], entries["count"], strict=True)) == truth
            ids = dict(zip(entries["value"], entries["id"], strict=True))
            assert np.array_equal(found[name], wanted[name].astype(int).map(ids).fillna(0))
        for name in NUMERICAL:
            values = train[name].astype(np.float32)
            low, high = values.min(), values.max()
            scaled = ((wanted[name].astype(float) - low) / (high - low)).clip(0, 1) if high > low else np.zeros(len(wanted))
            assert np.allclose(found[name], scaled, rtol=0, atol=1e-6), (split, name)
        assert np.array_equal(found["label.click"], wanted["click"])
        assert np.array_equal(found["label.conversion"], wanted["conversion"])
        if scenarios:
            assert np.array_equal(found["sample.scenario"], wanted["scenario"])
        else:
            assert "sample.scenario" not in found


@pytest.mark.parametrize("block_bytes", [1 << 12, 8 << 20])
def test_raw_pairs_decode_to_the_joined_rows(pairs, tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr("preprocessing.reading.raw_files.RawFolder.blocks.__defaults__", ("utf-8", block_bytes))
    out = tmp_path / "out"
    assert main(["aliexpress", "--raw", str(pairs), "--out", str(out)]) == 0
    expected = expected_rows(pairs, ["NL", "ES"])
    assert_decodes_to(out, expected)
    manifest = DatasetManifest.load(out)
    assert manifest.scenario.values == ["NL", "ES"]
    assert [(t.name, t.role, t.implied_by_next) for t in manifest.tasks] == [
        ("click", "ctr", True),
        ("conversion", "ctcvr", False),
    ]
    assert (len(manifest.sparse_features), len(manifest.dense_features)) == (16, 63)
    for scenario, country in enumerate(("NL", "ES")):
        rows = expected[expected.scenario == scenario]
        assert manifest.statistics["scenario_rows"][country] == len(rows)
        assert manifest.statistics["label_rates"]["click"][country] == pytest.approx(rows["click"].mean())
        for side in ("train", "test"):
            searches = (pairs / f"{country}_user_{side}.csv").read_text().count("\n")
            items = {line.split(",")[0] for line in (pairs / f"{country}_item_{side}.csv").read_text().splitlines()}
            assert manifest.statistics["searches_without_items"][f"{country}_user_{side}.csv"] == searches - len(items) > 0
    searches = {split: set(expected[expected.split == split]["search_id"]) for split in ("train", "valid")}
    assert not searches["train"] & searches["valid"]


def test_processed_form_gives_the_same_parts(pairs, tmp_path):
    processed = write_processed(pairs, tmp_path / "processed")
    assert main(["aliexpress", "--raw", str(pairs), "--out", str(tmp_path / "a")]) == 0
    assert main(["aliexpress", "--raw", str(processed), "--out", str(tmp_path / "b"), "--form", "processed"]) == 0
    a, b = folder_bytes(tmp_path / "a"), folder_bytes(tmp_path / "b")
    assert [name for name in a if a[name] != b[name]] == ["manifest.json"]
    assert a.keys() == b.keys()
    assert list(DatasetManifest.load(tmp_path / "b").raw_files) == [
        f"AliExpress_{country}/{side}.csv" for country in ("NL", "ES") for side in ("train", "test")
    ]


@pytest.mark.parametrize("countries", [["ES", "NL"], ["US"], ["RU", "FR", "NL"], ["NL", "ES", "FR", "US", "RU"]])
def test_any_countries_in_any_order(tmp_path, countries):
    raw, out = write_aliexpress(tmp_path / "raw", countries), tmp_path / "out"
    assert main(["aliexpress", "--raw", str(raw), "--out", str(out), "--countries", ",".join(countries).lower()]) == 0
    assert_decodes_to(out, expected_rows(raw, countries), scenarios=len(countries) > 1)
    manifest = DatasetManifest.load(out)
    assert (manifest.scenario.values if manifest.scenario else None) == (countries if len(countries) > 1 else None)
    assert manifest.group_key == ("search_id" if len(countries) == 1 else None)


@pytest.mark.parametrize("countries", ["NL,DE", "NL,NL", "", "NL ES"])
def test_countries_that_are_none_are_told(pairs, tmp_path, countries, capsys):
    assert main(["aliexpress", "--raw", str(pairs), "--out", str(tmp_path / "out"), "--countries", countries]) == 2
    assert "give some of NL,ES,FR,US,RU, each once" in capsys.readouterr().err


def test_zip_files_as_shipped_are_read(pairs, tmp_path):
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    for path in pairs.iterdir():
        with zipfile.ZipFile(zipped / f"{path.stem}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, path.name.lower())
    assert main(["aliexpress", "--raw", str(pairs), "--out", str(tmp_path / "a")]) == 0
    assert main(["aliexpress", "--raw", str(zipped), "--out", str(tmp_path / "b")]) == 0
    assert DatasetManifest.load(tmp_path / "a").splits == DatasetManifest.load(tmp_path / "b").splits


def test_missing_values_become_id_0_and_number_0(pairs, tmp_path):
    def without(line):
        fields = line.split(",")
        fields[1] = fields[10] = fields[32] = ""  # categorical_1, numerical_3, categorical_9
        return ",".join(fields)

    path = pairs / "NL_user_train.csv"
    path.write_text("\n".join(without(line) for line in path.read_text().splitlines()) + "\n")
    out = tmp_path / "out"
    assert main(["aliexpress", "--raw", str(pairs), "--out", str(out), "--countries", "NL"]) == 0
    for split in ("train", "valid", "test"):
        rows = read(out, split)
        for name in ("categorical_1", "categorical_9", "numerical_3"):
            assert not rows[name].any()  # test rows have values, but no train row has one to know them by
        for name in ("categorical_2", "categorical_8", "numerical_1", "numerical_23"):
            assert rows[name].any()


def test_valid_and_test_rows_leak_nothing_into_train(pairs, tmp_path):
    """Other items in every valid page, another test side: train, vocabularies and scalers keep every byte."""
    assert main(["aliexpress", "--raw", str(pairs), "--out", str(tmp_path / "before")]) == 0
    other = write_aliexpress(tmp_path / "other", num_searches=40, seed=7)
    for country in ("NL", "ES"):
        for part in ("user", "item"):
            name = f"{country}_{part}_test.csv"
            (pairs / name).write_bytes((other / name).read_bytes())
        path = pairs / f"{country}_item_train.csv"
        lines = path.read_text().splitlines()
        path.write_text(
            "\n".join(
                ",".join([line.split(",")[0], *["9"] * 47, "2"]) if chance(int(line.split(",")[0]), 2024) < 1 / 10 else line
                for line in lines
            )
            + "\n"
        )
    assert main(["aliexpress", "--raw", str(pairs), "--out", str(tmp_path / "after")]) == 0
    before, after = folder_bytes(tmp_path / "before"), folder_bytes(tmp_path / "after")
    kept = [name for name in before if name.startswith(("train/", "vocab/"))]
    assert len(kept) == 1 + 16
    assert {name: before[name] == after[name] for name in kept} == dict.fromkeys(kept, True)
    ranges = [DatasetManifest.load(tmp_path / name).preprocessing["dense_ranges"] for name in ("before", "after")]
    assert ranges[0] == ranges[1]
    assert before["valid/part-00000.parquet"] != after["valid/part-00000.parquet"]


def spoil(name, number, change):
    def apply(raw):
        lines = (raw / name).read_text().split("\n")
        lines[number - 1] = change(lines[number - 1])
        (raw / name).write_text("\n".join(lines))

    return apply


def field(index, text):
    def change(line):
        fields = line.split(",")
        fields[index] = text
        return ",".join(fields)

    return change


ITEM, USER = "ES_item_train.csv", "NL_user_test.csv"
BAD = {
    "missing": (lambda raw: (raw / USER).unlink(), [f"lacks: {USER}", "tianchi.aliyun.com", "A login is needed"]),
    "empty": (lambda raw: (raw / ITEM).write_text(""), [ITEM, "is empty"]),
    "HTML": (lambda raw: (raw / ITEM).write_text("<!doctype html>\n<p>"), [ITEM, "HTML page"]),
    "wrong delimiter": (spoil(USER, 1, lambda line: line.replace(",", "\t")), [f"{USER}, line 1", "33 fields", "1 found"]),
    "one column more": (spoil(ITEM, 30, lambda line: line + ",0"), [f"{ITEM}, line 30", "49 fields", "50 found"]),
    "undecodable": (
        lambda raw: (raw / ITEM).write_bytes((raw / ITEM).read_bytes().replace(b"0", b"\xff", 1)),
        [f"{ITEM}, line 1", "not utf-8"],
    ),
    "no id": (spoil(ITEM, 9, field(18, "1.5")), [f"{ITEM}, line 9", "categorical_10 must be an integer, found '1.5'"]),
    "no number": (spoil(ITEM, 9, field(1, "x")), [f"{ITEM}, line 9", "numerical_24 must be a number, found 'x'"]),
    "inf": (spoil(USER, 4, field(8, "inf")), [f"{USER}, line 4", "numerical_1 is nan or infinite"]),
    "beyond 64 bits": (spoil(USER, 4, field(0, "9" * 20)), [f"{USER}, line 4", "search_id", "64 bits"]),
    "label 3": (spoil(ITEM, 12, field(48, "3")), [f"{ITEM}, line 12", "label must be 0 (shown), 1 (clicked) or 2", "found 3"]),
    "no label": (spoil(ITEM, 12, field(48, "")), [f"{ITEM}, line 12", "found None"]),
    "page unknown": (spoil(ITEM, 13, field(0, "999999")), [f"{ITEM}, line 13", "search_id 999999 is not in ES_user_train.csv"]),
    "page missing": (spoil(USER, 5, field(0, "")), [f"{USER}, line 5", "search_id is missing"]),
    "page twice": (spoil(USER, 8, field(0, "1365")), [USER, "search_id 1365 appears a second time"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_raw_data_is_named_by_file_and_line(case, pairs, tmp_path, capsys):
    change, words = BAD[case]
    change(pairs)
    assert main(["aliexpress", "--raw", str(pairs), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


PROCESSED = {
    "header": (1, lambda line: line.replace("categorical_7", "cat_7"), "train.csv, line 1: the header lacks categorical_7"),
    "click 2": (5, lambda line: line[:-3] + "2,0", "train.csv, line 5: click must be 0 or 1, found 2"),
    "conversion without click": (5, lambda line: line[:-3] + "0,1", "train.csv, line 5: a conversion without a click"),
    "conversion missing": (5, lambda line: line[:-1], "train.csv, line 5: conversion must be 0 or 1, found None"),
    "too few": (6, lambda line: line[:-2], "train.csv, line 6: 82 fields"),
}


@pytest.mark.parametrize("case", PROCESSED)
def test_bad_processed_data_is_named_by_file_and_line(case, pairs, tmp_path, capsys):
    processed = write_processed(pairs, tmp_path / "processed")
    number, change, words = PROCESSED[case]
    spoil("AliExpress_NL/train.csv", number, change)(processed)
    assert main(["aliexpress", "--raw", str(processed), "--out", str(tmp_path / "out"), "--form", "processed"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_truncated_gzip_is_told(pairs, tmp_path, capsys):
    packed = gzip.compress((pairs / ITEM).read_bytes())
    (pairs / ITEM).unlink()
    (pairs / f"{ITEM}.gz").write_bytes(packed[:-40])
    assert main(["aliexpress", "--raw", str(pairs), "--out", str(tmp_path / "out")]) == 2
    assert f"{ITEM}.gz: the gzip file is truncated or damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_rows_may_be_passed_over(pairs, tmp_path):
    assert main(["aliexpress", "--raw", str(pairs), "--out", str(tmp_path / "good")]) == 0
    item, user = (pairs / name for name in (ITEM, USER))
    lines = item.read_text().splitlines()
    bad = [field(48, "7")(lines[3]), field(0, "4")(lines[4]), "1,2", field(1, "nan")(lines[9]), field(18, "z")(lines[9])]
    item.write_text("\n".join([*lines[:7], *bad[:3], *lines[7:], *bad[3:]]) + "\n")
    first = user.read_text().splitlines()[0]
    user.write_text(user.read_text() + field(3, "49")(first) + "\n")  # a second line of one page: the first counts
    arguments = ["aliexpress", "--raw", str(pairs), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--max-bad-rows", "6"]) == 0
    good, out = (DatasetManifest.load(tmp_path / name) for name in ("good", "out"))
    assert out.statistics["bad_rows"] == {ITEM: 5, USER: 1}
    assert out.splits == good.splits


def test_us_sample_decodes_to_the_joined_rows(real_data, tmp_path):
    sample, out = real_data("samples/aliexpress"), tmp_path / "out"
    raw = tmp_path / "raw"  # pandas needs the names as the home has them; the command takes any case
    raw.mkdir()
    for path in sample.glob("us_*.csv"):
        (raw / f"US{path.name[2:]}").write_bytes(path.read_bytes())
    assert main(["aliexpress", "--raw", str(sample), "--out", str(out), "--countries", "US"]) == 0
    assert_decodes_to(out, expected_rows(raw, ["US"]), scenarios=False)
    statistics = DatasetManifest.load(out).statistics
    assert statistics["rows"] == 120
    assert statistics["label_rates"]["click"]["all"] == pytest.approx(70 / 120)
    assert statistics["label_rates"]["conversion"]["all"] == pytest.approx(4 / 120)
