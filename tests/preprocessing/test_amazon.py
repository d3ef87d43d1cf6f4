"""Amazon reviews, fake and real: decoded and compared with plain pandas; releases, categories, splits; bad files."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlrec.hashing import hash_ids
from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.datasets.amazon import _Pairs
from tests.preprocessing.amazon_fake import CATEGORIES, write_amazon, write_amazon_2014
from tests.preprocessing.decoded import assert_decodes_to, read, sides_in_order
from tests.preprocessing.movielens_fake import folder_bytes

SMALL = ("AMAZON_FASHION", "All_Beauty", "Gift_Cards")


@pytest.fixture
def fake(tmp_path):
    return write_amazon(tmp_path / "raw")


def raw_rows(folder, categories, pattern="{}_5.json"):
    """All records of the files, in order."""
    found = []
    for scenario, category in enumerate(categories):
        path = folder / pattern.format(category)
        text = (path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())).decode()
        records = [json.loads(line) | {"scenario": scenario, "line": line} for line in text.split("\n") if line]
        found.append(pd.DataFrame(records).astype(object))
    return pd.concat(found, ignore_index=True)


def latest(rows):
    """One review a (reviewer, item) pair: the latest, of equally late ones the last."""
    order = rows.assign(place=range(len(rows))).sort_values(["unixReviewTime", "place"], kind="stable")
    return order.drop_duplicates(["reviewerID", "asin"], keep="last").sort_values("place").reset_index(drop=True)


def pairs(style):
    return [f"{name.rstrip(':')}={style[name].strip()}" for name in sorted(style)] if isinstance(style, dict) else []


def expected(rows, parity=False, scenarios=CATEGORIES):
    """Columns as the parts have them, with raw values."""
    month, _, year = zip(*(date.replace(",", "").split() for date in rows["reviewTime"]), strict=True)
    columns = {"month": map(int, month), "year": map(int, year), "reviewer_id": rows["reviewerID"], "asin_id": rows["asin"]}
    if "helpful" in rows:
        columns["vote"] = [helpful[0] for helpful in rows["helpful"]]
    else:
        columns["vote"] = [int(vote.replace(",", "")) if isinstance(vote, str) else 0 for vote in rows["vote"]]
        columns["verified"] = [str(flag).lower() for flag in rows["verified"]]
        styles = [pairs(style) for style in rows["style"]]
        columns["style"] = [";".join(style) or None for style in styles] if parity else styles
    columns["label.label"] = [float(stars in (4, 5)) for stars in rows["overall"]]
    columns["label.label2"] = [float(stars == 5) for stars in rows["overall"]]
    if len(scenarios) > 1:
        columns["sample.scenario"] = rows["scenario"]
        if parity:
            columns["category"] = [scenarios[index] for index in rows["scenario"]]
    columns["key.user"] = hash_ids(pa.array(rows["reviewerID"]), 0).view(np.int64)
    columns |= {"key.reviewer_id": rows["reviewerID"], "key.asin_id": rows["asin"]}
    columns["key.unix_review_time"] = rows["unixReviewTime"]
    return pd.DataFrame({name: list(values) for name, values in columns.items()}).astype(object)


def make(raw, out, *options):
    assert main(["amazon-2018", "--raw", str(raw), "--out", str(out), *options]) == 0
    return DatasetManifest.load(out)


@pytest.mark.parametrize("piece_bytes", [1 << 12, 8 << 20])
def test_reviews_decode_to_the_latest_of_each_pair(fake, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr("preprocessing.reading.raw_files.PIECE_BYTES", piece_bytes)
    manifest = make(fake, tmp_path / "out")
    every = raw_rows(fake, CATEGORIES)
    rows = latest(every)
    assert every["line"].duplicated().sum() > 200
    assert not rows["line"].duplicated().any()
    assert_decodes_to(tmp_path / "out", sides_in_order(expected(rows), None), min_count=2)
    assert manifest.scenario.values == list(CATEGORIES)
    assert [(t.name, t.role, t.implied_by_next) for t in manifest.tasks] == [("label", "ctr", True), ("label2", "ctcvr", False)]
    assert [f.name for f in manifest.features if f.kind == "multi"] == ["style"]
    gone = {
        f"{category}_5.json": {
            "a later review of the pair, or a copy, follows": int(sum(every["scenario"] == s) - sum(rows["scenario"] == s))
        }
        for s, category in enumerate(CATEGORIES)
    }
    assert manifest.statistics["passed_over"] == gone


def test_parity_keeps_all_rows_and_whole_styles(fake, tmp_path):
    manifest = make(fake, tmp_path / "out", "--parity")
    rows = expected(raw_rows(fake, CATEGORIES), parity=True)
    assert_decodes_to(tmp_path / "out", sides_in_order(rows, None), parity=True)
    assert {f.kind for f in manifest.features} == {"sparse"}
    assert len(manifest.features) == 8


@pytest.mark.parametrize("parity", [False, True])
def test_reviews_of_2014(tmp_path, parity):
    raw, names = write_amazon_2014(tmp_path / "raw"), ("Baby", "Beauty")
    make(raw, tmp_path / "out", "--release", "2014", "--categories", "Baby,Beauty", *(["--parity"] * parity))
    every = raw_rows(raw, names, "reviews_{}_5.json")
    rows = expected(every if parity else latest(every), parity, names)
    assert_decodes_to(tmp_path / "out", sides_in_order(rows, None), min_count=1 if parity else 2, parity=parity)


@pytest.mark.parametrize("categories", [("Prime_Pantry",), ("Musical_Instruments", "Luxury_Beauty")])
def test_any_categories_in_any_order(fake, tmp_path, categories):
    manifest = make(fake, tmp_path / "out", "--categories", ",".join(categories))
    rows = expected(latest(raw_rows(fake, categories)), scenarios=categories)
    assert_decodes_to(tmp_path / "out", sides_in_order(rows, None), min_count=2)
    assert (manifest.scenario.values if manifest.scenario else None) == (list(categories) if len(categories) > 1 else None)
    assert list(manifest.raw_files) == [f"{name}_5.json" for name in categories]


def test_split_by_time(fake, tmp_path):
    make(fake, tmp_path / "out", "--split", "time")
    rows = expected(latest(raw_rows(fake, CATEGORIES)))
    times = rows["key.unix_review_time"].astype(np.int64)
    cuts = [np.sort(times)[len(times) * tenths // 10] for tenths in (8, 9)]
    sides = np.select([times < cuts[0], times < cuts[1]], ["train", "valid"], "test")
    assert_decodes_to(tmp_path / "out", sides_in_order(rows, sides), min_count=2)


def test_full_files_and_packed_ones(fake, tmp_path):
    make(fake, tmp_path / "a")
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in CATEGORIES:
        (packed / f"{name}.json.gz").write_bytes(gzip.compress((fake / f"{name}_5.json").read_bytes()))
    make(packed, tmp_path / "b", "--reviews", "all")
    a, b = folder_bytes(tmp_path / "a"), folder_bytes(tmp_path / "b")
    assert [name for name in a if a[name] != b[name]] == ["manifest.json"]


def test_a_pair_in_two_categories_counts_once(fake, tmp_path):
    path = fake / "Prime_Pantry_5.json"
    path.write_text(path.read_text("utf-8") + (fake / "Luxury_Beauty_5.json").read_text("utf-8"), encoding="utf-8")
    make(fake, tmp_path / "out")
    rows = latest(raw_rows(fake, CATEGORIES))
    assert not (rows["scenario"] == 0).any()  # the same reviews follow in the second file
    assert_decodes_to(tmp_path / "out", sides_in_order(expected(rows), None), min_count=2)


def test_pairs_against_a_sort_of_all(tmp_path):
    random = np.random.default_rng(0)
    records = np.empty(5000, _Pairs.RECORD)
    records["pair"] = random.integers(0, 700, 5000).astype(np.uint64) * np.uint64(2**54 + 1)
    records["time"] = random.integers(-5, 5, 5000)
    records["place"] = np.arange(5000) * 3
    found = _Pairs(tmp_path / "pairs")
    for part in np.array_split(records, 7):
        found.add(part)
    kept = {}
    for pair, moment, place in records.tolist():
        kept[pair] = max(kept.get(pair, (moment, place)), (moment, place))
    assert found.replaced().tolist() == sorted(set(records["place"].tolist()) - {place for _, place in kept.values()})
    assert not list((tmp_path / "pairs").iterdir())


@pytest.mark.parametrize("categories", ["", "Prime_Pantry,Prime_Pantry", "Prime Pantry", "../x", "A,,B"])
def test_categories_that_are_none_are_told(fake, tmp_path, categories, capsys):
    assert main(["amazon-2018", "--raw", str(fake), "--out", str(tmp_path / "out"), "--categories", categories]) == 2
    assert "give the categories as their files name them" in capsys.readouterr().err


def change(**values):
    """A line with other values; None leaves the key out."""

    def apply(line):
        record = {name: value for name, value in (json.loads(line) | values).items() if value is not None}
        return json.dumps(record)

    return apply


BAD = {
    "no stars": (change(overall=None), "overall is missing"),
    "six stars": (change(overall=6.0), "overall must be 1, 2, 3, 4 or 5, found 6.0"),
    "half a star": (change(overall=4.5), "found 4.5"),
    "stars as text": (change(overall="5"), "overall must be a number, found '5'"),
    "nan": (change(overall=float("nan")), "overall is nan or infinite"),
    "no reviewer": (change(reviewerID=None), "reviewerID is missing"),
    "empty item": (change(asin=""), "asin is missing"),
    "item as number": (change(asin=12), "asin must be a string, found 12"),
    "no date": (change(reviewTime=None), "reviewTime is missing"),
    "month 13": (change(reviewTime="13 4, 2015"), "reviewTime must be a date such as '09 4, 2015', found '13 4, 2015'"),
    "ISO date": (change(reviewTime="2015-09-04"), "found '2015-09-04'"),
    "no time": (change(unixReviewTime=None), "unixReviewTime is missing"),
    "time beyond 64 bits": (
        change(unixReviewTime=2**63),
        "unixReviewTime does not fit into 64 bits, found 9223372036854775808",
    ),
    "vote": (change(vote="many"), "vote must be a whole number such as '1,341', found 'many'"),
    "vote beyond 64 bits": (change(vote="9" * 19), "vote must be a whole number"),
    "style": (change(style="Blue"), "style must be an object, found 'Blue'"),
    "verified": (change(verified="yes"), "verified must be true or false, found 'yes'"),
    "cut": (lambda line: line[:-9], "no JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_file_and_line_or_passed_over(case, fake, tmp_path, capsys):
    spoil, words = BAD[case]
    path = fake / "Prime_Pantry_5.json"
    good = path.read_text("utf-8").split("\n")
    bad = spoil(good[0].replace("A0", "B0"))
    path.write_text("\n".join([*good[:30], bad, *good[30:]]), encoding="utf-8")
    assert main(["amazon-2018", "--raw", str(fake), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"{path}, line 31: " in message
    assert words in message
    assert not (tmp_path / "out").exists()
    manifest = make(fake, tmp_path / "out", "--max-bad-rows", "1")
    assert manifest.statistics["bad_rows"] == {"Prime_Pantry_5.json": 1}
    path.write_text("\n".join(good), encoding="utf-8")
    assert make(fake, tmp_path / "whole").splits == manifest.splits


def test_helpful_that_is_no_pair_is_told(tmp_path, capsys):
    raw = write_amazon_2014(tmp_path / "raw")
    path = raw / "reviews_Baby_5.json"
    lines = path.read_text("utf-8").split("\n")
    lines[4] = change(helpful=[3])(lines[4])
    path.write_text("\n".join(lines), encoding="utf-8")
    options = ["--release", "2014", "--categories", "Beauty,Baby"]
    assert main(["amazon-2018", "--raw", str(raw), "--out", str(tmp_path / "out"), *options]) == 2
    assert "reviews_Baby_5.json, line 5: helpful must be [helpful votes, votes], found [3]" in capsys.readouterr().err


def test_an_array_instead_of_lines_is_told(fake, tmp_path, capsys):
    path = fake / "Prime_Pantry_5.json"
    path.write_text("[" + ",".join(path.read_text("utf-8").splitlines()) + "]", encoding="utf-8")
    assert main(["amazon-2018", "--raw", str(fake), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"{path}, line 1: the file begins with '[', so it is one JSON array" in message
    assert "python -c" in message


def test_a_missing_file_tells_where_it_is_had(fake, tmp_path, capsys):
    (fake / "Prime_Pantry_5.json").unlink()
    assert main(["amazon-2018", "--raw", str(fake), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for word in ("lacks: Prime_Pantry_5.json", "nijianmo.github.io", "need no login", "--release 2014", "research"):
        assert word in message


#: File -> rows, exact duplicates, users, items, rate of label and label2, rows with a vote, distinct styles with none as one.
PROFILES = {
    "AMAZON_FASHION": (3176, 68, 406, 31, 0.828, 0.679, 297, 286),
    "All_Beauty": (5269, 1027, 991, 85, 0.945, 0.882, 552, 409),
    "Gift_Cards": (2972, 0, 458, 148, 0.978, 0.926, 208, 18),
}


@pytest.mark.parametrize("category", SMALL)
def test_profile_of_the_real_files(real_data, tmp_path, category):
    rows, duplicates, users, items, four, five, votes, styles = PROFILES[category]
    raw = real_data("amazon-2018")
    manifest = make(raw, tmp_path / "parity", "--categories", category, "--parity")
    sizes = {table.name: table.num_rows for table in manifest.tables}  # row 0 is for missing values
    assert (sizes["reviewer_id"] - 1, sizes["asin_id"] - 1, sizes["style"]) == (users, items, styles)
    assert manifest.statistics["rows"] == rows
    rates = [round(manifest.statistics["label_rates"][task]["all"], 3) for task in ("label", "label2")]
    assert rates == [four, five]
    vote = pq.read_table(tmp_path / "parity" / "vocab" / "vote.parquet").to_pydict()
    assert sum(vote["count"]) - vote["count"][vote["value"].index(0)] == votes
    every = raw_rows(raw, [category])
    assert every["line"].duplicated().sum() == duplicates
    manifest = make(raw, tmp_path / "native", "--categories", category)
    assert manifest.statistics["rows"] == len(latest(every)) <= rows - duplicates
    kept = pd.concat([read(tmp_path / "native", split) for split in manifest.splits])
    assert not kept.duplicated(["key.reviewer_id", "key.asin_id"]).any()


@pytest.mark.parametrize("parity", [False, True])
def test_real_files_decode_to_what_pandas_makes_of_them(real_data, tmp_path, parity):
    raw = real_data("amazon-2018")
    make(raw, tmp_path / "out", "--categories", ",".join(SMALL), *(["--parity"] * parity))
    every = raw_rows(raw, SMALL)
    rows = expected(every if parity else latest(every), parity, SMALL)
    assert_decodes_to(tmp_path / "out", sides_in_order(rows, None), min_count=1 if parity else 2, parity=parity)
