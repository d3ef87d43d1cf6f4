"""KuaiRec, fake and sample rows: decoded and compared with plain pandas, in every variant; bad files."""

import ast
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.writing.permutation import RowPermutation, split_ends
from tests.preprocessing.kuairec_fake import COUNTS, USER, write_csv, write_kuairec

RANGES = [f"{name}_range" for name in COUNTS]
TEXTS = ["user_active_degree", *RANGES]
CODES = [name for name in USER[1:] if name not in (*COUNTS, *TEXTS)]
BIG, SMALL = "big_matrix.csv", "small_matrix.csv"
INNER = "KuaiRec 2.0/data"
SCENARIOS = ["UNKNOWN", "full_active", "high_active", "middle_active"]


@pytest.fixture
def fake(tmp_path):
    return write_kuairec(tmp_path / "raw", 1500, 300)


def joined(folder, name):
    """A matrix with users and tags; every cell as text."""
    read = {"dtype": str, "keep_default_na": False}
    rows = pd.read_csv(folder / name, **read)
    rows = rows.merge(pd.read_csv(folder / "user_features.csv", **read), on="user_id", how="left", validate="m:1")
    return rows.merge(pd.read_csv(folder / "item_categories.csv", **read), on="video_id", how="left", validate="m:1")


def in_order(rows, seed=2024):
    return rows.iloc[np.argsort(RowPermutation(len(rows), seed).positions(0, len(rows)))]


def big_rows(folder):
    """Rows in their order on disk, with their split."""
    rows = in_order(joined(folder, BIG)).reset_index(drop=True)
    ends = split_ends(len(rows))
    return rows.assign(split=np.select([rows.index < ends[0], rows.index < ends[1]], ["train", "valid"], "test"))


def both_rows(folder):
    train, small = in_order(joined(folder, BIG)), in_order(joined(folder, SMALL))
    half = len(small) // 2
    parts = [train.assign(split="train"), small[:half].assign(split="valid"), small[half:].assign(split="test")]
    return pd.concat(parts, ignore_index=True)


def read(out, split):
    return pd.concat(
        [pq.read_table(out / part.path).to_pandas() for part in DatasetManifest.load(out).splits[split].parts],
        ignore_index=True,
    )


def number(text):
    """A code: missing where empty or -124."""
    return None if text in ("", "-124") else int(float(text))


def assert_labels(found, wanted):
    ratio = wanted["watch_ratio"].map(float)
    assert np.array_equal(found["label.label"], ratio.map(lambda value: float(value >= 1)))
    assert np.array_equal(found["label.label2"], ratio.map(lambda value: float(value > 2)))
    assert np.array_equal(found["sample.scenario"], wanted["user_active_degree"].map(SCENARIOS.index))
    for key in ("user_id", "video_id"):
        assert np.array_equal(found[f"key.{key}"], wanted[key].map(int))


def assert_decodes_to(out, expected, sparse):
    """`sparse`: name -> function from the text of a cell to its raw value."""
    manifest = DatasetManifest.load(out)
    assert {f.name for f in manifest.features if f.kind == "sparse"} == set(sparse)
    train = expected[expected.split == "train"]
    for split in ("train", "valid", "test"):
        found, wanted = read(out, split), expected[expected.split == split].reset_index(drop=True)
        assert len(found) == len(wanted) > 0
        assert_labels(found, wanted)
        for name, raw_value in sparse.items():
            entries = pq.read_table(out / "vocab" / f"{name}.parquet").to_pandas()
            counts = pd.Series([value for text in train[name] if (value := raw_value(text)) is not None]).value_counts()
            assert list(zip(entries["value"], entries["count"], strict=True)) == sorted(
                counts.items(), key=lambda item: (-item[1], item[0])
            )
            ids = dict(zip(entries["value"], entries["id"], strict=True))
            assert found[name].tolist() == [ids.get(raw_value(text), 0) for text in wanted[name]], name
        for name in COUNTS:
            logs = train[name].map(number).dropna().map(np.log1p)
            value = wanted[name].map(number).map(np.log1p, na_action="ignore").fillna(logs.min())
            scaled = ((value - logs.min()) / (logs.max() - logs.min())).clip(0, 1)
            assert np.allclose(found[name], scaled, rtol=0, atol=1e-6), name
        tags = pq.read_table(out / "vocab" / "feat.parquet").to_pandas()
        counts = pd.Series([tag for text in train["feat"] for tag in ast.literal_eval(text)]).value_counts()
        assert dict(zip(tags["value"], tags["count"], strict=True)) == counts.to_dict()
        value_of = dict(zip(tags["id"], tags["value"], strict=True))
        assert [[value_of[tag] for tag in bag] for bag in found["feat"]] == [ast.literal_eval(t) for t in wanted["feat"]]


NATIVE = dict.fromkeys(CODES, number) | dict.fromkeys(TEXTS, str)


@pytest.mark.parametrize("piece_bytes", [1 << 12, 8 << 20])
def test_the_big_matrix_decodes_to_the_joined_rows(fake, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr("preprocessing.reading.raw_files.PIECE_BYTES", piece_bytes)
    out = tmp_path / "out"
    assert main(["kuairec", "--raw", str(fake), "--out", str(out), "--duplicates", "keep"]) == 0
    expected = big_rows(fake / INNER)
    assert_decodes_to(out, expected, NATIVE | {"date": int})
    manifest = DatasetManifest.load(out)
    assert len(manifest.features) == 32
    assert [(task.name, task.role, task.implied_by_next) for task in manifest.tasks] == [
        ("label", "ctr", True),
        ("label2", "ctcvr", False),
    ]
    assert (manifest.scenario.values, manifest.group_key) == (SCENARIOS, "user_id")
    assert list(manifest.raw_files) == [f"{INNER}/{name}" for name in (BIG, "user_features.csv", "item_categories.csv")]
    assert manifest.statistics["label_rates"]["label"]["all"] == pytest.approx((expected.watch_ratio.map(float) >= 1).mean())
    odd = expected.watch_ratio.map(float)
    assert odd.max() > 5
    assert {0.0, 1.0, 2.0} <= set(odd)  # the borders of the labels


def test_the_tables_may_lie_in_the_folder_itself(fake, tmp_path):
    assert main(["kuairec", "--raw", str(fake), "--out", str(tmp_path / "a")]) == 0
    assert main(["kuairec", "--raw", str(fake / INNER), "--out", str(tmp_path / "b")]) == 0
    assert DatasetManifest.load(tmp_path / "a").splits == DatasetManifest.load(tmp_path / "b").splits


def test_ids_are_features_on_demand(fake, tmp_path):
    assert main(["kuairec", "--raw", str(fake), "--out", str(tmp_path / "out"), "--ids", "--duplicates", "keep"]) == 0
    assert_decodes_to(tmp_path / "out", big_rows(fake / INNER), NATIVE | dict.fromkeys(("date", "user_id", "video_id"), int))


def test_copies_of_a_view_are_on_one_side_unless_told_and_none_is_lost(fake, tmp_path):
    lines = (fake / INNER / BIG).read_text().splitlines()
    copied = lines[1:401]  # 400 views again, and one of them 300 times more
    (fake / INNER / BIG).write_text("\n".join([*lines, *copied, *[copied[7]] * 300]) + "\n")
    common = ["kuairec", "--raw", str(fake)]
    assert main([*common, "--out", str(tmp_path / "together")]) == 0
    assert main([*common, "--out", str(tmp_path / "apart"), "--duplicates", "keep"]) == 0
    assert main([*common, "--out", str(tmp_path / "parity"), "--parity"]) == 0
    rows = joined(fake / INNER, BIG)
    sides = {}
    for name in ("together", "apart"):
        found = pd.concat([read(tmp_path / name, split).assign(split=split) for split in ("train", "valid", "test")])
        assert len(found) == len(rows) == 2200
        assert Counter(found["key.user_id"]) == Counter(rows["user_id"].map(int))
        seen = found.drop(columns="feat").groupby([c for c in found if c not in ("feat", "split")])["split"]
        sides[name] = seen.nunique().max()
        counts = DatasetManifest.load(tmp_path / name).statistics["duplicates"]
        assert counts["policy"] == {"together": "keep_together", "apart": "keep"}[name]
        assert counts["rows"] >= 700
        assert counts["most"] >= 302
        assert (counts["test_in_train"] > 0) == (name == "apart")
    assert sides == {"together": 1, "apart": 3}
    assert DatasetManifest.load(tmp_path / "parity").statistics["duplicates"]["policy"] == "keep"


def test_train_on_big_and_evaluate_on_small(fake, tmp_path):
    out = tmp_path / "out"
    assert main(["kuairec", "--raw", str(fake), "--out", str(out), "--variant", "train-big-eval-small"]) == 0
    expected = both_rows(fake / INNER)
    assert (expected[expected.split != "train"]["date"] == "").any()  # hence no feature
    assert expected["split"].value_counts().to_dict() == {"train": 1500, "valid": 150, "test": 150}
    assert_decodes_to(out, expected, NATIVE)


def test_parity_form_has_the_references_32_sparse_features_encoded_on_all_rows(fake, tmp_path):
    from sklearn.preprocessing import LabelEncoder

    out = tmp_path / "out"
    assert main(["kuairec", "--raw", str(fake), "--out", str(out), "--parity"]) == 0
    manifest = DatasetManifest.load(out)
    assert [feature.kind for feature in manifest.features] == ["sparse"] * 32
    assert {feature.name for feature in manifest.features} == {"date", *USER[1:], "feat"}
    expected = big_rows(fake / INNER)
    found = pd.concat([read(out, split) for split in ("train", "valid", "test")], ignore_index=True)
    assert_labels(found, expected)
    for feature in manifest.features:
        column = expected[feature.name]
        if feature.name not in (*TEXTS, "feat"):
            column = column.map(lambda text: int(float(text)) if text else None)
        there = column.notna()  # a gap is a missing value in either form
        kind = str if feature.name in (*TEXTS, "feat") else int
        assert np.array_equal(found[feature.name][there], LabelEncoder().fit_transform(column[there].astype(kind)) + 1)
        assert not found[feature.name][~there].any()


def cell(name, number, column, text):
    """Replace one cell of a table; line 1 is the header."""

    def apply(folder):
        rows = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
        rows.loc[number - 2, column] = text
        rows.to_csv(folder / name, index=False)

    return apply


def repeat(name, number):
    def apply(folder):
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join([*lines, lines[number - 1]]) + "\n")

    return apply


USERS, VIDEOS = "user_features.csv", "item_categories.csv"
BAD = {
    "no watch ratio": (cell(BIG, 7, "watch_ratio", ""), f"{BIG}, line 7: the watch_ratio is missing"),
    "watch ratio nan": (cell(BIG, 7, "watch_ratio", "nan"), f"{BIG}, line 7: watch_ratio is nan or infinite"),
    "watch ratio inf": (cell(BIG, 7, "watch_ratio", "inf"), f"{BIG}, line 7: watch_ratio is nan or infinite"),
    "negative": (cell(BIG, 8, "watch_ratio", "-0.5"), f"{BIG}, line 8: the watch_ratio must be 0 or more, found -0.5"),
    "no date": (cell(BIG, 9, "date", ""), f"{BIG}, line 9: the date is missing"),
    "user unknown": (cell(BIG, 9, "user_id", "999"), f"{BIG}, line 9: user_id 999 is not in {USERS}"),
    "video unknown": (cell(BIG, 9, "video_id", "999"), f"{BIG}, line 9: video_id 999 is not in {VIDEOS}"),
    "id beyond 64 bits": (cell(BIG, 9, "video_id", str(2**63)), f"{BIG}, line 9: video_id = {2**63} does not fit into 64 bits"),
    "activity unknown": (
        cell(USERS, 5, "user_active_degree", "0"),
        f"{USERS}, line 5: user_active_degree must be one of UNKNOWN, full_active, high_active, middle_active, found 0",
    ),
    "user twice": (repeat(USERS, 4), f"{USERS}, line 152: user_id 2 appears a second time"),
    "video twice": (repeat(VIDEOS, 4), f"{VIDEOS}, line 82: video_id 2 appears a second time"),
    "user without id": (cell(USERS, 5, "user_id", ""), f"{USERS}, line 5: the user_id is missing"),
    "flag no whole number": (cell(USERS, 6, "onehot_feat13", "0.5"), f"{USERS}, line 6: onehot_feat13 must be a whole number"),
    "count below 0": (cell(USERS, 6, "fans_user_num", "-3"), f"{USERS}, line 6: fans_user_num must be 0 or more, or -124"),
    "tags no list": (cell(VIDEOS, 6, "feat", "27; 9"), f"{VIDEOS}, line 6: feat must be a list of tags such as [27, 9]"),
    "no tags": (cell(VIDEOS, 6, "feat", ""), f"{VIDEOS}, line 6: feat must be a list of tags"),
    "range not quoted": (
        lambda folder: (folder / USERS).write_text((folder / USERS).read_text().replace('"(0,10]"', "(0,10]", 1)),
        "31 fields",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_raw_data_is_named_by_file_and_line(case, fake, tmp_path, capsys):
    change, words = BAD[case]
    change(fake / INNER)
    assert main(["kuairec", "--raw", str(fake), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_a_bad_ratio_may_be_passed_over(fake, tmp_path):
    cell(BIG, 7, "watch_ratio", "")(fake / INNER)
    assert main(["kuairec", "--raw", str(fake), "--out", str(tmp_path / "out"), "--max-bad-rows", "1"]) == 0
    statistics = DatasetManifest.load(tmp_path / "out").statistics
    assert (statistics["rows"], statistics["bad_rows"]) == (1499, {f"KuaiRec 2.0/data/{BIG}": 1})


def test_missing_files_say_where_they_are_had(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    assert main(["kuairec", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for words in ("lacks: big_matrix.csv, user_features.csv, item_categories.csv", "kuairec.com", "CC BY-SA", "--download"):
        assert words in message


def test_sample_rows_of_the_real_tables(real_data, tmp_path):
    """Head and tail of each table; what the sample of the user table leaves out is filled in."""
    sample, raw = real_data("samples/kuairec"), tmp_path / "raw"
    raw.mkdir()
    for name in ("big_matrix", "small_matrix"):
        shutil.copy(sample / f"{name}.head_tail.csv", raw / f"{name}.csv")
    users = pd.read_csv(sample / "user_features.partial_columns.csv", dtype=str).drop(columns="...")
    big, small = (pd.read_csv(raw / name) for name in (BIG, SMALL))
    seen = sorted({*big["user_id"], *small["user_id"]} - {*users["user_id"].map(int)})
    users = pd.concat([users, *(users[:1].assign(user_id=str(user)) for user in seen)])
    users = users.assign(**{name: users["user_id"] for name in USER if name not in users})[USER]
    users.to_csv(raw / USERS, index=False)
    tags = pd.read_csv(sample / "item_categories.head_tail.csv", dtype=str)
    known = set(tags["video_id"].map(int))
    others = [[video, "[2, 5]"] for video in sorted({*big["video_id"], *small["video_id"]} - known)]
    write_csv(raw / VIDEOS, ["video_id", "feat"], [*tags.to_numpy().tolist(), *others])
    out = tmp_path / "out"
    assert main(["kuairec", "--raw", str(raw), "--out", str(out), "--variant", "train-big-eval-small"]) == 0
    assert_decodes_to(out, both_rows(raw), NATIVE)
    found = pd.concat([read(out, split) for split in ("train", "valid", "test")])
    assert (found["label.label"].sum(), found["label.label2"].sum()) == (6, 2)  # counted by eye
