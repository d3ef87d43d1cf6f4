"""IJCAI-18: decoded and compared with plain pandas, native and parity; days, repeated instances, odd lists; bad files."""

import gzip

import pandas as pd
import pytest

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from tests.preprocessing.decoded import assert_decodes_to, sides_in_order
from tests.preprocessing.ijcai18_fake import HEADER, ROUND1, ROUND2, write_ijcai18

NAMES = HEADER.split(" ")
DENSE = ["shop_review_positive_rate", "shop_score_service", "shop_score_delivery", "shop_score_description"]
LISTS = ["item_category_list", "item_property_list", "predict_category_property"]
KEYS = ["instance_id", "user_id", "item_id", "context_timestamp"]
NOT_PARITY = {"instance_id", "item_id", "user_id", "is_trade"}


@pytest.fixture
def raw(tmp_path):
    return write_ijcai18(tmp_path / "raw", 1500)


def table(path):
    """Impressions, each the first of its instance, every cell as text."""
    return pd.read_csv(path, sep=" ", dtype=str).drop_duplicates("instance_id").reset_index(drop=True)


def common(rows):
    found = pd.DataFrame({f"key.{name}": rows[name].astype(int) for name in KEYS})
    found["label.is_trade"] = rows["is_trade"].astype(float)
    found["sample.scenario"] = rows["user_gender_id"].map({"-1": 0, "0": 1, "1": 2, "2": 3})
    return found


def parity(rows):
    found = common(rows)
    for name in NAMES:
        if name not in NOT_PARITY:
            found[name] = rows[name].astype(float) if name in DENSE else rows[name] if name in LISTS else rows[name].astype(int)
    return found


def native(rows, ids=False):
    found = common(rows)
    dropped = {"context_id", "context_timestamp", *LISTS, *(() if ids else ("item_id", "user_id")), "instance_id", "is_trade"}
    for name in NAMES:
        if name in DENSE:
            found[name] = rows[name].astype(float).where(rows[name] != "-1")
            found[f"{name}_missing"] = (rows[name] == "-1").astype(float)
        elif name not in dropped:
            found[name] = pd.Series([None if cell == "-1" else int(cell) for cell in rows[name]], dtype=object)
    paths = [cell.split(";") for cell in rows["item_category_list"]]
    found["item_category_2"] = [path[1] if len(path) > 1 else None for path in paths]
    found["item_category_leaf"] = [None if path == ["-1"] else path[-1] for path in paths]
    found["item_property_list"] = [[p for p in cell.split(";") if p != "-1"] for cell in rows["item_property_list"]]
    found["predicted_categories"] = [
        [entry.split(":")[0] for entry in cell.split(";") if entry != "-1"] for cell in rows["predict_category_property"]
    ]
    known = rows["context_timestamp"] != "-1"
    time = pd.to_datetime(rows["context_timestamp"].astype(int), unit="s") + pd.Timedelta(hours=8)
    found["hour"] = time.dt.hour.astype(object).where(known, None)
    found["day"] = time.dt.strftime("%Y-%m-%d").where(known, None)
    return found


def run(raw, out, *options):
    assert main(["ijcai18", "--raw", str(raw), "--out", str(out), *options]) == 0
    return DatasetManifest.load(out)


@pytest.mark.parametrize("piece_bytes", [1 << 14, 8 << 20])
def test_native_form_decodes_to_the_raw_rows(raw, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr("preprocessing.reading.raw_files.PIECE_BYTES", piece_bytes)
    manifest = run(raw, tmp_path / "out")
    rows = table(raw / ROUND1)
    assert_decodes_to(tmp_path / "out", sides_in_order(native(rows), None))
    assert manifest.scenario.values == ["missing", "female", "male", "household"]
    assert manifest.statistics["scenario_rows"] == {
        name: (rows["user_gender_id"] == code).sum()
        for name, code in (("missing", "-1"), ("female", "0"), ("male", "1"), ("household", "2"))
    }
    assert manifest.statistics["label_rates"]["is_trade"]["all"] == pytest.approx((rows["is_trade"] == "1").mean())
    repeated = 1500 - len(rows)
    assert repeated > 10
    assert manifest.statistics["passed_over"] == {ROUND1: {"an earlier line has the instance_id": repeated}}


def test_ids_may_be_features_and_the_last_day_may_be_the_test(raw, tmp_path):
    manifest = run(raw, tmp_path / "out", "--split", "last_day", "--ids")
    assert {"item_id", "user_id"} <= {feature.name for feature in manifest.features}
    rows = native(table(raw / ROUND1), ids=True)
    sides = {f"2018-09-{day}": "train" for day in range(18, 23)} | {"2018-09-23": "valid", "2018-09-24": "test"}
    assert set(rows["day"]) == set(sides)
    assert_decodes_to(tmp_path / "out", sides_in_order(rows, rows["day"].map(sides)))


def test_parity_form_has_the_references_18_columns_the_gender_and_4_numbers(raw, tmp_path):
    manifest = run(raw, tmp_path / "out", "--parity")
    assert (len(manifest.sparse_features), len(manifest.dense_features)) == (18 + 1, 4)
    rows = parity(table(raw / ROUND1))
    assert {"-1"} < set(rows["predict_category_property"])
    assert {-1} < set(rows["item_brand_id"])
    assert rows["shop_score_service"].min() == -1
    assert_decodes_to(tmp_path / "out", sides_in_order(rows, None), parity=True)


def test_second_round_is_cut_at_its_own_days(tmp_path):
    raw = write_ijcai18(tmp_path / "raw", 1500, ROUND2)
    moved = table(raw / ROUND2)
    moved["context_timestamp"] = (moved["context_timestamp"].astype(int) - 15 * 86_400).astype(str)
    moved.to_csv(raw / ROUND2, sep=" ", index=False)
    run(raw, tmp_path / "out", "--round", "2", "--split", "last_day")
    rows = native(table(raw / ROUND2))
    assert rows["day"].max() == "2018-09-09"
    sides = rows["day"].map({"2018-09-08": "valid", "2018-09-09": "test"}).fillna("train")
    assert_decodes_to(tmp_path / "out", sides_in_order(rows, sides))


def set_cell(raw, line, **cells):
    """Put other texts into a line (from 1, the header included)."""
    lines = (raw / ROUND1).read_text().split("\n")
    fields = lines[line - 1].split(" ")
    for name, text in cells.items():
        fields[NAMES.index(name)] = text
    lines[line - 1] = " ".join(fields)
    (raw / ROUND1).write_text("\n".join(lines))


def test_odd_and_missing_cells(raw, tmp_path):
    missing = {name: "-1" for name in NAMES if name not in ("instance_id", "is_trade")}
    set_cell(raw, 5, **missing)
    set_cell(raw, 6, **dict.fromkeys(missing, ""))  # an empty cell is missing too
    set_cell(raw, 7, item_category_list="77", predict_category_property="5:-1;-1;6;7:8,9,-1", item_property_list="3;-1;4")
    set_cell(raw, 8, item_category_list="1;2;3", shop_score_service="-1.0")
    run(raw, tmp_path / "out")
    set_cell(raw, 6, **missing)
    set_cell(raw, 8, shop_score_service="-1")
    rows = native(table(raw / ROUND1))
    assert pd.isna(rows.loc[5, "item_category_2"])
    assert rows.loc[5, "item_category_leaf"] == "77"
    assert rows.loc[5, ["predicted_categories", "item_property_list"]].tolist() == [["5", "6", "7"], ["3", "4"]]
    assert rows.loc[6, ["item_category_2", "item_category_leaf"]].tolist() == ["2", "3"]
    assert_decodes_to(tmp_path / "out", sides_in_order(rows, None))


def test_the_first_good_line_of_an_instance_is_kept(raw, tmp_path):
    """A bad line is not the first of its instance; bad lines count once, though the file is read twice."""
    lines = (raw / ROUND1).read_text().splitlines()
    bad = lines[1].rpartition(" ")[0] + " 2"
    (raw / ROUND1).write_text("\n".join([lines[0], bad, "one two", *lines[1:]]) + "\n")
    manifest = run(raw, tmp_path / "out", "--max-bad-rows", "2")
    assert manifest.statistics["bad_rows"] == {ROUND1: 2}
    (raw / ROUND1).write_text("\n".join(lines) + "\n")
    assert_decodes_to(tmp_path / "out", sides_in_order(native(table(raw / ROUND1)), None))


def cells(line, **texts):
    return lambda raw: set_cell(raw, line, **texts)


BAD = {
    "missing": (lambda raw: (raw / ROUND1).unlink(), [f"lacks: {ROUND1}", "tianchi.aliyun.com/dataset/147588", "login"]),
    "tabs": (
        lambda raw: (raw / ROUND1).write_text((raw / ROUND1).read_text().replace(" ", "\t")),
        [f"{ROUND1}, line 1", "the header lacks instance_id"],
    ),
    "test file": (
        lambda raw: (raw / ROUND1).write_text((raw / ROUND1).read_text().replace(" is_trade\n", "\n")),
        [f"{ROUND1}, line 1", "the header lacks is_trade"],
    ),
    "label 2": (cells(40, is_trade="2"), ["line 40", "is_trade must be a whole number from 0 to 1, found 2"]),
    "no label": (cells(40, is_trade=""), ["line 40", "is_trade", "found -1"]),
    "gender 3": (cells(40, user_gender_id="3"), ["line 40", "user_gender_id must be a whole number from -1 to 2, found 3"]),
    "no instance": (cells(40, instance_id="-1"), ["line 40", "the instance_id is missing"]),
    "beyond 64 bits": (cells(40, shop_id="9" * 20), ["line 40", "shop_id", "64 bits"]),
    "no id": (cells(40, item_brand_id="1.5e18"), ["line 40", "item_brand_id must be an integer"]),
    "nan": (cells(40, shop_score_service="nan"), ["line 40", "shop_score_service is nan"]),
    "milliseconds": (cells(40, context_timestamp="1537200000000"), ["line 40", "context_timestamp must be", "1537200000000"]),
    "category": (cells(40, item_category_list="7|8"), ["line 40", "item_category_list must be -1 or like", "'7|8'"]),
    "property": (cells(40, item_property_list="7;"), ["line 40", "item_property_list must be -1 or like", "'7;'"]),
    "predicted": (cells(40, predict_category_property="7:8:9"), ["line 40", "predict_category_property must be -1 or like"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_raw_data_is_named_by_file_and_line(case, raw, tmp_path, capsys):
    change, words = BAD[case]
    change(raw)
    assert main(["ijcai18", "--raw", str(raw), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for word in [ROUND1, *words]:
        assert word in message
    assert "Traceback" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


def test_last_day_needs_the_time_of_every_row(raw, tmp_path, capsys):
    set_cell(raw, 40, context_timestamp="-1")
    arguments = ["ijcai18", "--raw", str(raw), "--out", str(tmp_path / "out"), "--split", "last_day"]
    assert main(arguments) == 2
    assert f"{ROUND1}, line 40: context_timestamp is missing, but --split last_day needs it" in capsys.readouterr().err
    assert main([*arguments, "--max-bad-rows", "1"]) == 0


def test_gzip_is_read(raw, tmp_path):
    plain = run(raw, tmp_path / "a")
    (raw / f"{ROUND1}.gz").write_bytes(gzip.compress((raw / ROUND1).read_bytes()))
    (raw / ROUND1).unlink()
    assert run(raw, tmp_path / "b").splits == plain.splits
