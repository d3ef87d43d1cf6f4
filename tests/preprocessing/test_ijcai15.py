"""IJCAI-15, fake and real: decoded and compared with plain pandas, in both packages; pairs on one side; bad files."""

import gzip

import pandas as pd
import pyarrow as pa
import pytest

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.datasets.ijcai15 import good_pairs
from preprocessing.reading.delimited import DelimitedText
from preprocessing.reading.raw_files import RawFile, RawFolder
from tests.preprocessing.decoded import SPLITS, assert_decodes_to, read, sides_by_key, sides_in_order
from tests.preprocessing.ijcai15_fake import write, write_ijcai15

FEATURES = ["age_range", "gender", "item_id", "cat_id", "brand_id", "user_id", "merchant_id"]
LOG, USERS, PAIRS, LISTS = "user_log_format1.csv", "user_info_format1.csv", "train_format1.csv", "train_format2.csv"


@pytest.fixture
def raw(tmp_path):
    return write_ijcai15(tmp_path / "raw")


def table(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def logged(raw):
    """Events of format 1, every cell as text, with age, gender and the label of the pair ('' where there is none)."""
    rows = table(raw / LOG).rename(columns={"seller_id": "merchant_id"})
    rows = rows.merge(table(raw / USERS), on="user_id", how="left")
    return rows.merge(table(raw / PAIRS), on=["user_id", "merchant_id"], how="left").fillna({"label": ""})


def listed(raw, names):
    """The same of format 2, line by line."""
    rows = []
    for name in names:
        for line in (raw / name).read_text().splitlines()[1:]:
            user, age, gender, merchant, label, log = line.split(",")
            for event in log.split("#") if log else []:
                item, category, brand, day, action = event.split(":")
                rows.append([user, age, gender, merchant, "" if label == "-1" else label, item, category, brand, day, action])
    names = ["user_id", "age_range", "gender", "merchant_id", "label"]
    names += ["item_id", "cat_id", "brand_id", "time_stamp", "action_type"]
    return pd.DataFrame(rows, columns=names)


def expected(rows, variant, parity=False):
    """Columns as they are written."""
    if variant == "repeat":
        rows = rows[rows["label"] != ""]
    found = pd.DataFrame(index=rows.index)
    for name in FEATURES:
        unknown = {} if parity else {"age_range": 0, "gender": 2}
        values = [int(float(text)) if text else None for text in rows[name]]
        found[name] = pd.Series([None if value == unknown.get(name) else value for value in values], rows.index, dtype=object)
    for name in ("user_id", "merchant_id", "item_id", "time_stamp"):
        found[f"key.{name}"] = rows[name].astype(int)
    action = rows["action_type"].astype(int)
    found["label.label2"] = (action == 2).astype(float)
    if variant == "repeat":
        found["label.label"] = rows["label"].astype(float)
        found["key.pair"] = [int(f"{user}{int(merchant):09d}") for user, merchant in rows[["user_id", "merchant_id"]].values]
    else:
        found["label.label"] = action.isin([1, 2, 3]).astype(float)
    return found.reset_index(drop=True)


def sides(rows, split):
    if split == "pair":
        return sides_by_key(rows["key.pair"])
    if split == "time":
        return ["train" if day <= 1031 else "valid" if day <= 1110 else "test" for day in rows["key.time_stamp"]]
    return None


CASES = [("repeat", "pair"), ("repeat", "random"), ("funnel", "random"), ("funnel", "time")]


@pytest.mark.parametrize("form", ["1", "2"])
@pytest.mark.parametrize(("variant", "split"), CASES)
def test_packages_decode_to_the_raw_rows(raw, tmp_path, monkeypatch, variant, split, form):
    monkeypatch.setattr("preprocessing.reading.raw_files.PIECE_BYTES", 1 << 14)
    out = tmp_path / "out"
    default = {"repeat": "pair", "funnel": "random"}[variant]
    options = ["--variant", variant, "--form", form, *(["--split", split] if split != default else [])]
    assert main(["ijcai15", "--raw", str(raw), "--out", str(out), *options]) == 0
    lists = [LISTS] if variant == "repeat" else [LISTS, "test_format2.csv"]
    rows = expected(logged(raw) if form == "1" else listed(raw, lists), variant)
    assert_decodes_to(out, sides_in_order(rows, sides(rows, split)), min_count=2)
    manifest = DatasetManifest.load(out)
    nested = variant == "funnel"
    assert [(task.name, task.implied_by_next) for task in manifest.tasks] == [("label", nested), ("label2", False)]
    assert [task.role for task in manifest.tasks] == (["ctr", "ctcvr"] if nested else [None, None])
    assert manifest.statistics["rows"] == len(rows)
    assert manifest.statistics["label_rates"]["label"]["all"] == pytest.approx(rows["label.label"].mean())
    assert list(manifest.raw_files) == (
        {"repeat": [LOG, USERS, PAIRS], "funnel": [LOG, USERS]}[variant] if form == "1" else lists
    )


def test_the_fake_has_what_the_real_files_have(raw):
    """And its two packages hold the same events."""
    log, users, pairs = table(raw / LOG), table(raw / USERS), table(raw / PAIRS)
    assert {"", "6", "6.0"} <= set(log["brand_id"])
    assert {"", "0", "3.0"} <= set(users["age_range"])
    assert {"", "2", "1.0"} <= set(users["gender"])
    assert set(log["seller_id"]) - set(pairs["merchant_id"])
    assert set(table(raw / "test_format1.csv")["prob"]) == {""}
    seen = set(zip(log["user_id"], log["seller_id"], strict=True))
    assert any(pair not in seen for pair in zip(pairs["user_id"], pairs["merchant_id"], strict=True))
    for variant, lists in (("repeat", [LISTS]), ("funnel", [LISTS, "test_format2.csv"])):
        one, two = expected(logged(raw), variant), expected(listed(raw, lists), variant)
        every = list(one.columns)
        assert sorted(map(str, one[every].values.tolist())) == sorted(map(str, two[every].values.tolist()))


def test_all_events_of_a_pair_are_on_one_side(raw, tmp_path):
    out = tmp_path / "out"
    assert main(["ijcai15", "--raw", str(raw), "--out", str(out)]) == 0
    pairs = [set(zip(rows["key.user_id"], rows["key.merchant_id"], strict=True)) for rows in (read(out, s) for s in SPLITS)]
    assert all(pairs)
    assert sum(map(len, pairs)) == len(set.union(*pairs))
    outside = (logged(raw)["label"] == "").sum()
    assert DatasetManifest.load(out).statistics["passed_over"] == {LOG: {"outside the train pairs": outside}}


def test_parity_form_keeps_unknown_codes_and_rare_values(raw, tmp_path):
    out = tmp_path / "out"
    assert main(["ijcai15", "--raw", str(raw), "--out", str(out), "--parity", "--split", "random"]) == 0
    rows = expected(logged(raw), "repeat", parity=True)
    assert {0, 8} <= set(rows["age_range"])
    assert 2 in set(rows["gender"])
    assert_decodes_to(out, sides_in_order(rows, None), parity=True)


@pytest.mark.parametrize(("variant", "split"), [("repeat", "time"), ("funnel", "pair")])
def test_splits_of_the_other_variant_are_refused(raw, tmp_path, variant, split, capsys):
    arguments = ["ijcai15", "--raw", str(raw), "--out", str(tmp_path / "out"), "--variant", variant, "--split", split]
    assert main(arguments) == 2
    assert f"--split {split} is not for --variant {variant}; choose from" in capsys.readouterr().err


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


def again(name, number):
    def apply(raw):
        lines = (raw / name).read_text().splitlines()
        (raw / name).write_text("\n".join([*lines, lines[number - 1]]) + "\n")

    return apply


BAD = {
    "log missing": (
        lambda raw: (raw / LOG).unlink(),
        [f"lacks: {LOG}", "tianchi.aliyun.com/dataset/42", "A login", "--form 2"],
    ),
    "header": (spoil(LOG, 1, lambda line: line.replace("seller_id", "shop")), [f"{LOG}, line 1", "the header lacks seller_id"]),
    "column": (spoil(LOG, 70, lambda line: line + ",1"), [f"{LOG}, line 70", "7 fields", "8 found"]),
    "action 4": (spoil(LOG, 70, field(6, "4")), [f"{LOG}, line 70", "action_type must be a whole number from 0 to 3, found 4"]),
    "no action": (spoil(LOG, 70, field(6, "")), [f"{LOG}, line 70", "action_type", "found None"]),
    "no day": (spoil(LOG, 70, field(5, "1311")), [f"{LOG}, line 70", "time_stamp must be month and day", "found 1311"]),
    "day missing": (spoil(LOG, 70, field(5, "")), [f"{LOG}, line 70", "time_stamp", "found None"]),
    "brand": (spoil(LOG, 70, field(4, "26.5")), [f"{LOG}, line 70", "brand_id must be a whole number or empty, found '26.5'"]),
    "user missing": (spoil(LOG, 70, field(0, "")), [f"{LOG}, line 70", "user_id", "found None"]),
    "seller of ten digits": (spoil(LOG, 70, field(3, "1000000000")), [f"{LOG}, line 70", "seller_id", "999999999"]),
    "beyond 64 bits": (spoil(LOG, 70, field(1, "9" * 20)), [f"{LOG}, line 70", "item_id", "64 bits"]),
    "user unknown": (
        lambda raw: (spoil(LOG, 70, field(0, "5"))(raw), spoil(LOG, 70, field(3, "2"))(raw), spoil(PAIRS, 2, pair_5_2)(raw)),
        [f"{LOG}, line 70", f"user_id 5 is not in {USERS}"],
    ),
    "label 2": (spoil(PAIRS, 9, field(2, "2")), [f"{PAIRS}, line 9", "label must be a whole number from 0 to 1, found 2"]),
    "label missing": (spoil(PAIRS, 9, field(2, "")), [f"{PAIRS}, line 9", "label", "found None"]),
    "pair twice": (again(PAIRS, 5), [PAIRS, "pair ", "appears a second time"]),
    "user twice": (again(USERS, 5), [USERS, "user_id ", "appears a second time"]),
    "age 9": (spoil(USERS, 3, field(1, "9")), [f"{USERS}, line 3", "age_range must be a whole number from 0 to 8, found 9"]),
    "gender": (spoil(USERS, 3, field(2, "F")), [f"{USERS}, line 3", "gender must be a whole number or empty, found 'F'"]),
}
BAD_LISTS = {
    "label 2": (spoil(LISTS, 9, field(4, "2")), [f"{LISTS}, line 9", "label must be a whole number from -1 to 1, found 2"]),
    "event": (
        spoil(LISTS, 2, lambda line: line + "#1:2:3:4"),
        [f"{LISTS}, line 2", "activity_log is no list of item_id:cat_id"],
    ),
    "action 4": (spoil(LISTS, 2, lambda line: line + "#1:2:3:829:4"), [f"{LISTS}, line 2", "activity_log"]),
    "no day": (spoil(LISTS, 2, lambda line: line + "#1:2:3:832:1"), [f"{LISTS}, line 2", "activity_log"]),
    "beyond 64 bits": (spoil(LISTS, 2, lambda line: f"{line}#{'9' * 20}:2:3:829:1"), [f"{LISTS}, line 2", "activity_log"]),
    "merchant": (spoil(LISTS, 4, field(3, "-2")), [f"{LISTS}, line 4", "merchant_id", "found -2"]),
    "one file": (lambda raw: (raw / "test_format2.csv").unlink(), ["lacks: test_format2.csv", "tianchi.aliyun.com"]),
}


def pair_5_2(line):
    return "5,2,1"


@pytest.mark.parametrize("case", BAD)
def test_bad_raw_data_is_named_by_file_and_line(case, raw, tmp_path, capsys):
    assert_refused(BAD[case], raw, tmp_path, capsys)


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_are_named_by_file_and_line(case, raw, tmp_path, capsys):
    assert_refused(
        BAD_LISTS[case], raw, tmp_path, capsys, "--form", "2", "--variant", "funnel" if case == "one file" else "repeat"
    )


def assert_refused(case, raw, tmp_path, capsys, *options):
    change, words = case
    change(raw)
    assert main(["ijcai15", "--raw", str(raw), "--out", str(tmp_path / "out"), *options]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


def test_bad_rows_may_be_passed_over(raw, tmp_path):
    arguments = ["ijcai15", "--raw", str(raw)]
    assert main([*arguments, "--out", str(tmp_path / "good")]) == 0
    for name, bad in ((LOG, "1,2,3,4,x,829,0\n1,2,3,4,5,829,7\n"), (USERS, "4,99,\n"), (PAIRS, table(raw / PAIRS).iloc[0])):
        line = bad if isinstance(bad, str) else ",".join(bad) + "\n"
        (raw / name).write_text((raw / name).read_text() + line)
    assert main([*arguments, "--out", str(tmp_path / "out"), "--max-bad-rows", "4"]) == 0
    good, out = (DatasetManifest.load(tmp_path / name) for name in ("good", "out"))
    assert out.statistics["bad_rows"] == {LOG: 2, USERS: 1, PAIRS: 1}
    assert out.splits == good.splits


def test_counts_of_the_real_pairs(real_data, tmp_path):
    """The published counts, through the reader of the pairs; and a log made up for some of them takes their labels."""
    folder = real_data("ijcai15")
    raw = RawFolder(folder, (RawFile(PAIRS), RawFile("test_format1.csv")), "")
    block = raw.table(
        DelimitedText(PAIRS, ",", dict.fromkeys(("user_id", "merchant_id", "label"), pa.int64()), header=True), good_pairs
    )
    assert len(block.lines) == 260_864
    assert block.table["label"].to_numpy().sum() == 15_952
    assert len(block.table["pair"].unique()) == 260_864
    assert [len(block.table[name].unique()) for name in ("user_id", "merchant_id")] == [212_062, 1_993]
    assert raw.bad_rows.counts == {}
    columns = {"user_id": pa.int64(), "merchant_id": pa.int64(), "prob": pa.string()}
    test = raw.table(DelimitedText("test_format1.csv", ",", columns, header=True))
    assert len(test.lines) == 261_477
    assert [len(test.table[name].unique()) for name in ("user_id", "merchant_id")] == [212_108, 1_993]
    assert not test.present("prob").any()

    pairs = pd.read_csv(folder / f"{PAIRS}.gz")
    some = pairs.sample(2000, random_state=0)
    made = tmp_path / "raw"
    made.mkdir()
    (made / f"{PAIRS}.gz").write_bytes(gzip.compress(pairs.to_csv(index=False).encode()))
    write(made / USERS, "user_id,age_range,gender", [(user, 3, 0) for user in some["user_id"].unique()])
    log = [(user, 1, 2, merchant, 3, 829, 0) for user, merchant, _ in some.values] + [(5, 1, 2, 3, 4, 829, 0)]
    write(made / LOG, "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type", log)
    assert main(["ijcai15", "--raw", str(made), "--out", str(tmp_path / "out")]) == 0
    found = pd.concat([read(tmp_path / "out", split) for split in SPLITS])
    assert found.groupby(["key.user_id", "key.merchant_id"])["label.label"].first().to_dict() == {
        (user, merchant): label for user, merchant, label in some.values
    }
