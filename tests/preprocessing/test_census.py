"""Census-Income (KDD) and Adult, fake and real: decoded and compared with plain pandas; bad files; leaks."""

import gzip
import io
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmlrec.errors import DataError
from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.datasets.census_income import AdultIncome, CensusIncome
from preprocessing.downloading.download import _unpack
from preprocessing.writing.permutation import RowPermutation, split_ends
from tests.preprocessing.census_fake import write_adult, write_kdd
from tests.preprocessing.movielens_fake import folder_bytes


def words(text):
    return text.split()


KDD = words(
    """
    age class_worker det_ind_code det_occ_code education wage_per_hour hs_college marital_stat major_ind_code major_occ_code
    race hisp_origin sex union_member unemp_reason full_or_part_emp capital_gains capital_losses stock_dividends
    tax_filer_stat region_prev_res state_prev_res det_hh_fam_stat det_hh_summ instance_weight mig_chg_msa mig_chg_reg
    mig_move_reg mig_same mig_prev_sunbelt num_emp fam_under_18 country_father country_mother country_self citizenship
    own_or_self vet_question vet_benefits weeks_worked year income_50k
    """
)
KDD_DENSE = words(
    """
    age wage_per_hour capital_gains capital_losses stock_dividends num_emp own_or_self vet_benefits weeks_worked year
    """
)
ADULT = words(
    """
    age workclass fnlwgt education education_num marital_status occupation relationship race sex capital_gain capital_loss
    hours_per_week native_country income
    """
)
ADULT_DENSE = ["age", "education_num", "capital_gain", "capital_loss", "hours_per_week"]


def by_pandas(path, names):
    """Every cell as text; '?' is missing, NA is not."""
    rows = pd.read_csv(
        path, header=None, names=names, sep=",", skipinitialspace=True, comment="|", dtype=str, keep_default_na=False
    )
    rows = rows.apply(lambda column: column.str.strip())
    return rows.mask(rows == "?")


def in_order(blocks):
    """Rows in the order on disk with their split, from the permutation, which has its own tests."""
    ordered = []
    for rows in blocks:
        positions = RowPermutation(len(rows), 2024).positions(0, len(rows))
        ordered.append(rows.iloc[np.argsort(positions)])
    return pd.concat(ordered, ignore_index=True)


def official(train, test):
    rows = in_order([train, test])
    valid_end = len(train) + len(test) // 2
    rows["split"] = np.select([rows.index < len(train), rows.index < valid_end], ["train", "valid"], "test")
    return rows


def recut(test):
    rows = in_order([test])
    ends = split_ends(len(rows))
    rows["split"] = np.select([rows.index < ends[0], rows.index < ends[1]], ["train", "valid"], "test")
    return rows


def read(out, split):
    return pd.concat(
        [pq.read_table(out / part.path).to_pandas() for part in DatasetManifest.load(out).splits[split].parts],
        ignore_index=True,
    )


def assert_decodes_to(out, expected, sparse, dense, income, marital, codes=()):
    manifest = DatasetManifest.load(out)
    assert {f.name for f in manifest.sparse_features} == set(sparse)
    assert {f.name for f in manifest.dense_features} == set(dense)
    train = expected[expected.split == "train"]
    for split in ("train", "valid", "test"):
        found, wanted = read(out, split), expected[expected.split == split].reset_index(drop=True)
        assert len(found) == len(wanted)
        for name in sparse:
            entries = pq.read_table(out / "vocab" / f"{name}.parquet").to_pandas()
            values = train[name].astype(int) if name in codes else train[name].dropna()
            truth = sorted(values.value_counts().items(), key=lambda item: (-item[1], item[0]))
            assert list(zip(entries["value"], entries["count"], strict=True)) == truth, name
            ids = dict(zip(entries["value"].astype(str), entries["id"], strict=True))
            assert np.array_equal(found[name], wanted[name].map(ids).fillna(0)), (split, name)
        for name in dense:
            low, high = train[name].astype(float).min(), train[name].astype(float).max()
            scaled = ((wanted[name].astype(float) - low) / (high - low)).clip(0, 1)
            assert np.allclose(found[name], scaled, rtol=0, atol=1e-6), (split, name)
        assert np.array_equal(found["label.income"], wanted[income[0]].isin(income[1:]).astype(float))
        assert np.array_equal(found["label.marital"], (wanted[marital[0]] == marital[1]).astype(float))


def assert_kdd(out, expected, codes=("det_ind_code", "det_occ_code"), dense=tuple(KDD_DENSE)):
    sparse = [n for n in KDD if n not in (*dense, "instance_weight", "marital_stat", "income_50k")]
    assert_decodes_to(out, expected, sparse, dense, ("income_50k", "50000+."), ("marital_stat", "Never married"), codes)


@pytest.fixture
def kdd(tmp_path):
    return write_kdd(tmp_path / "raw")


@pytest.fixture
def adult(tmp_path):
    return write_adult(tmp_path / "raw")


def test_kdd_official_files_decode_to_the_raw_rows(kdd, tmp_path):
    out = tmp_path / "out"
    assert main(["census-income", "--raw", str(kdd), "--out", str(out)]) == 0
    expected = official(*(by_pandas(kdd / f"census-income.{part}", KDD) for part in ("data", "test")))
    assert expected["split"].value_counts().to_dict() == {"train": 300, "valid": 100, "test": 101}
    assert "NA" in set(expected["hisp_origin"])
    assert expected["country_self"].isna().any()
    assert_kdd(out, expected)
    manifest = DatasetManifest.load(out)
    assert [task.name for task in manifest.tasks] == ["income", "marital"]
    assert not manifest.tasks[0].implied_by_next
    assert len(manifest.sparse_features) == 29


def test_kdd_blocks_of_any_size_give_the_same_rows(kdd, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.reading.raw_files.RawFolder.blocks.__defaults__", ("utf-8", 1 << 10))
    assert main(["census-income", "--raw", str(kdd), "--out", str(tmp_path / "out")]) == 0
    assert_kdd(tmp_path / "out", official(*(by_pandas(kdd / f"census-income.{part}", KDD) for part in ("data", "test"))))


def test_kdd_recut_takes_the_test_file_alone(kdd, tmp_path, capsys):
    (kdd / "census-income.data").unlink()
    arguments = ["census-income", "--raw", str(kdd), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    for words in ("lacks: census-income.data", "https://archive.ics.uci.edu/dataset/117", "CC BY 4.0", "--variant recut"):
        assert words in message
    assert main([*arguments, "--variant", "recut"]) == 0
    assert_kdd(tmp_path / "out", recut(by_pandas(kdd / "census-income.test", KDD)))
    assert list(DatasetManifest.load(tmp_path / "out").raw_files) == ["census-income.test"]


def test_kdd_codes_as_sparse_and_weight_as_feature(kdd, tmp_path):
    out = tmp_path / "out"
    expected = official(*(by_pandas(kdd / f"census-income.{part}", KDD) for part in ("data", "test")))
    assert main(["census-income", "--raw", str(kdd), "--out", str(out), "--codes-as-sparse"]) == 0
    codes = ["own_or_self", "vet_benefits", "year"]
    dense = tuple(name for name in KDD_DENSE if name not in codes)
    assert len(dense) == 7
    assert_kdd(out, expected, ("det_ind_code", "det_occ_code", *codes), dense)
    assert main(["census-income", "--raw", str(kdd), "--out", str(out), "--keep-weight", "--overwrite"]) == 0
    assert_kdd(out, expected.assign(kept=expected.instance_weight), dense=(*KDD_DENSE, "instance_weight"))


def test_parity_form_has_the_references_29_and_11_features_encoded_on_all_rows(kdd, tmp_path):
    from sklearn.preprocessing import LabelEncoder, MinMaxScaler

    out = tmp_path / "out"
    assert main(["census-income", "--raw", str(kdd), "--out", str(out), "--parity"]) == 0
    manifest = DatasetManifest.load(out)
    assert (len(manifest.sparse_features), len(manifest.dense_features)) == (29, 11)
    expected = official(*(by_pandas(kdd / f"census-income.{part}", KDD).fillna("?") for part in ("data", "test")))
    found = pd.concat([read(out, split) for split in ("train", "valid", "test")], ignore_index=True)
    for feature in manifest.sparse_features:
        column = expected[feature.name]
        column = column.astype(int) if feature.name.endswith("_code") and feature.name.startswith("det") else column
        assert np.array_equal(found[feature.name], LabelEncoder().fit_transform(column) + 1), feature.name
    for feature in manifest.dense_features:
        column = expected[[feature.name]].astype(float).to_numpy()
        assert np.allclose(found[feature.name], MinMaxScaler().fit_transform(column)[:, 0], rtol=0, atol=1e-6)


def test_adult_as_a_table_of_ones_own_is_the_same_to_the_byte(adult, tmp_path):
    """By the configuration that the page shows: rows in their order, ids, labels, numbers, vocabularies."""
    page = (Path(__file__).parents[2] / "docs/datasets/table.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"```yaml\n(.*?)```", page.partition("\n## Adult")[2].partition("\n## ")[0], re.DOTALL)
    (tmp_path / "adult.yaml").write_text(config)
    table, own = tmp_path / "table", tmp_path / "own"
    assert main(["table", "--config", str(tmp_path / "adult.yaml"), "--raw", str(adult), "--out", str(table)]) == 0
    assert main(["adult-income", "--raw", str(adult), "--out", str(own)]) == 0
    found, expected = folder_bytes(table), folder_bytes(own)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == ["manifest.json"]
    found, expected = DatasetManifest.load(table), DatasetManifest.load(own)
    for part in ("features", "tables", "tasks", "splits"):
        assert getattr(found, part) == getattr(expected, part)
    assert "bad_rows" not in found.statistics
    for part in ("rows", "label_rates", "passed_over", "missing", "duplicates"):
        assert found.statistics[part] == expected.statistics[part]


def test_adult_decodes_to_the_raw_rows_of_both_forms(adult, tmp_path):
    out = tmp_path / "out"
    assert main(["adult-income", "--raw", str(adult), "--out", str(out)]) == 0
    expected = official(*(by_pandas(adult / f"adult.{part}", ADULT) for part in ("data", "test")))
    assert expected["split"].value_counts().to_dict() == {"train": 300, "valid": 100, "test": 101}
    sparse = ["workclass", "education", "occupation", "race", "sex", "native_country"]  # relationship tells the marital status
    assert_decodes_to(out, expected, sparse, ADULT_DENSE, ("income", ">50K", ">50K."), ("marital_status", "Never-married"))
    rate = DatasetManifest.load(out).statistics["label_rates"]["income"]["all"]
    assert rate == pytest.approx(expected["income"].str.startswith(">").mean())


def test_valid_and_test_rows_leak_nothing_into_train(kdd, tmp_path):
    """Any other test file, of any length, leaves every byte of train, vocabularies and scalers."""
    assert main(["census-income", "--raw", str(kdd), "--out", str(tmp_path / "before")]) == 0
    other = write_kdd(tmp_path / "other", num_test=77, seed=9)
    (kdd / "census-income.test").write_text(
        (other / "census-income.test").read_text().replace(", Private,", ", Unheard of,").replace(", 99999,", ", 9999999,")
    )
    assert main(["census-income", "--raw", str(kdd), "--out", str(tmp_path / "after")]) == 0
    before, after = folder_bytes(tmp_path / "before"), folder_bytes(tmp_path / "after")
    kept = [name for name in before if name.startswith(("train/", "vocab/"))]
    assert len(kept) == 1 + 29
    assert {name: before[name] == after[name] for name in kept} == dict.fromkeys(kept, True)
    ranges = [DatasetManifest.load(tmp_path / name).preprocessing["dense_ranges"] for name in ("before", "after")]
    assert ranges[0] == ranges[1]


def spoil_line(path, number, change):
    lines = path.read_text().split("\n")
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines))


def spoil_field(number, field, text):
    def change(line):
        fields = line.split(", ")
        fields[field] = text
        return ", ".join(fields)

    return lambda raw: spoil_line(raw / "census-income.test", number, change)


def write_bytes(name, change):
    return lambda raw: (raw / name).write_bytes(change((raw / name).read_bytes()))


TEST = "census-income.test"
BAD = {
    "missing": (lambda raw: (raw / TEST).unlink(), [f"lacks: {TEST}", "Terms:", "--download"]),
    "empty": (write_bytes(TEST, lambda old: b""), [TEST, "is empty"]),
    "HTML": (write_bytes(TEST, lambda old: b"<html>log in</html>"), [TEST, "HTML page"]),
    "wrong delimiter": (
        write_bytes("census-income.data", lambda old: old.replace(b", ", b";")),
        ["census-income.data, line 1", "42 fields", "1 found"],
    ),
    "one column less": (
        lambda raw: spoil_line(raw / TEST, 100, lambda line: line[4:]),
        [f"{TEST}, line 100", "41 found"],
    ),
    "undecodable": (
        write_bytes(TEST, lambda old: old.replace(b"Female", b"\xff\xfe", 1)),
        [f"{TEST}, line ", "not utf-8"],
    ),
    "no number": (spoil_field(7, 0, "old"), [f"{TEST}, line 7", "age must be a number, found 'old'"]),
    "nan": (spoil_field(7, 18, "nan"), [f"{TEST}, line 7", "stock_dividends is nan"]),
    "no code": (spoil_field(9, 2, "12.5"), [f"{TEST}, line 9", "det_ind_code must be an integer"]),
    "beyond 64 bits": (spoil_field(9, 3, "9" * 20), [f"{TEST}, line 9", "det_occ_code", "64 bits"]),
    "unknown income": (spoil_field(5, 41, "1"), [f"{TEST}, line 5", "income_50k holds no known value: '1'"]),
    "missing income": (spoil_field(5, 41, "?"), [f"{TEST}, line 5", "income_50k holds no known value: None"]),
    "unknown marital": (spoil_field(6, 7, "Engaged"), [f"{TEST}, line 6", "marital_stat holds no known value: 'Engaged'"]),
    "blank line": (lambda raw: spoil_line(raw / TEST, 11, lambda line: ""), [f"{TEST}, line 11", "42 fields", "1 found"]),
    "one row": (lambda raw: spoil_line(raw / TEST, 1, lambda line: line) or cut(raw), ["no row of 301 falls to valid"]),
}


def cut(raw):
    (raw / TEST).write_text((raw / TEST).read_text().split("\n")[0] + "\n")


@pytest.mark.parametrize("case", BAD)
def test_bad_raw_data_is_named_by_file_and_line(case, kdd, tmp_path, capsys):
    spoil, words = BAD[case]
    spoil(kdd)
    assert main(["census-income", "--raw", str(kdd), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


def test_truncated_gzip_is_told(kdd, tmp_path, capsys):
    packed = gzip.compress((kdd / TEST).read_bytes())
    (kdd / TEST).unlink()
    (kdd / f"{TEST}.gz").write_bytes(packed[:-40])
    assert main(["census-income", "--raw", str(kdd), "--out", str(tmp_path / "out")]) == 2
    assert f"{TEST}.gz: the gzip file is truncated or damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_rows_may_be_passed_over(kdd, tmp_path):
    lines = (kdd / TEST).read_text().splitlines()
    assert main(["census-income", "--raw", str(kdd), "--out", str(tmp_path / "good")]) == 0
    bad = [lines[3].replace("000", "x", 1)[:-3] + "maybe", "short, line", lines[4].replace(lines[4].split(", ")[7], "Engaged")]
    (kdd / TEST).write_text("\n".join([*lines[:50], *bad, *lines[50:]]) + "\n")
    assert main(["census-income", "--raw", str(kdd), "--out", str(tmp_path / "out"), "--max-bad-rows", "3"]) == 0
    assert DatasetManifest.load(tmp_path / "out").statistics["bad_rows"] == {TEST: 3}
    for name in ("train", "valid", "test"):
        of_good, of_out = (pq.read_table(tmp_path / folder / name) for folder in ("good", "out"))
        assert of_out.drop_columns("key.source_line").equals(of_good.drop_columns("key.source_line"))
        shift = [3 if file == TEST and line > 50 else 0 for file, line in zip(*_places(of_good), strict=True)]
        assert _places(of_out)[1] == [line + by for line, by in zip(_places(of_good)[1], shift, strict=True)]


def _places(rows):
    return rows["key.source_file"].to_pylist(), rows["key.source_line"].to_pylist()


def test_the_archive_of_the_home_is_unpacked_from_its_tar(kdd, adult_zip, tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in kdd.iterdir():
            tar.add(path, path.name)
    with zipfile.ZipFile(tmp_path / "kdd.zip", "w") as archive:
        archive.writestr("census.tar.gz", packed.getvalue())
    for name, dataset, raw in (("kdd", CensusIncome, kdd), ("adult", AdultIncome, adult_zip)):
        (tmp_path / name).mkdir()
        _unpack(tmp_path / f"{name}.zip", dataset.archive, dataset.raw_files, tmp_path / name)
        assert folder_bytes(tmp_path / name) == folder_bytes(raw)
    with zipfile.ZipFile(tmp_path / "kdd.zip", "w") as archive:
        archive.writestr("census.tar.gz", b"")
    with pytest.raises((tarfile.TarError, EOFError)):
        _unpack(tmp_path / "kdd.zip", CensusIncome.archive, CensusIncome.raw_files, tmp_path)


@pytest.fixture
def adult_zip(tmp_path):
    raw = write_adult(tmp_path / "adult-raw")
    with zipfile.ZipFile(tmp_path / "adult.zip", "w") as archive:
        for path in raw.iterdir():
            archive.write(path, path.name)
    return raw


def test_the_archive_itself_serves_as_raw_file(adult_zip, tmp_path):
    (tmp_path / "zipped").mkdir()
    (tmp_path / "adult.zip").rename(tmp_path / "zipped" / "adult.zip")
    assert main(["adult-income", "--raw", str(adult_zip), "--out", str(tmp_path / "a")]) == 0
    assert main(["adult-income", "--raw", str(tmp_path / "zipped"), "--out", str(tmp_path / "b")]) == 0
    assert DatasetManifest.load(tmp_path / "a").splits == DatasetManifest.load(tmp_path / "b").splits


def test_real_kdd_test_file_decodes_and_has_the_documents_counts(real_data, tmp_path):
    raw, out = real_data("census-income-kdd"), tmp_path / "out"
    assert main(["census-income", "--raw", str(raw), "--out", str(out), "--variant", "recut"]) == 0
    rows = by_pandas(next(raw.glob("census-income.test*")), KDD)
    assert_kdd(out, recut(rows))
    manifest = DatasetManifest.load(out)
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {"train": 79_809, "valid": 9_976, "test": 9_977}
    rates = manifest.statistics["label_rates"]
    assert (round(rates["income"]["all"], 6), round(rates["marital"]["all"], 6)) == (0.062008, 0.432459)
    assert len(rows) == 99_762
    assert rows.duplicated().sum() == 883
    missing = rows.isna().sum()
    assert missing[missing > 0].to_dict() == {
        "state_prev_res": 330,
        **dict.fromkeys(["mig_chg_msa", "mig_chg_reg", "mig_move_reg", "mig_prev_sunbelt"], 49_946),
        **{"country_father": 3_429, "country_mother": 3_072, "country_self": 1_764},
    }
    assert (rows["hisp_origin"] == "NA").sum() == 405
    distinct = [
        91,
        9,
        52,
        47,
        17,
        894,
        3,
        7,
        24,
        15,
        5,
        10,
        2,
        3,
        6,
        8,
        123,
        111,
        1140,
        6,
        6,
        51,
        37,
        8,
        64_741,
        10,
        9,
        10,
        3,
        4,
    ]
    distinct += [7, 5, 43, 43, 43, 5, 3, 3, 3, 53, 2, 2]
    assert rows.fillna("?").nunique().tolist() == distinct


def test_the_documents_official_file_is_known_by_its_fingerprint(real_data):
    import hashlib

    content = gzip.decompress((real_data("census-income-kdd") / "census-income.test.gz").read_bytes())
    file = CensusIncome.raw_files[1]
    assert (file.num_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_unreachable_home_is_told_with_names_and_home(tmp_path, monkeypatch):
    from preprocessing.downloading.download import download

    monkeypatch.setattr(AdultIncome, "archive", "http://127.0.0.1:1/adult.zip")
    with pytest.raises(DataError, match=r"(?s)cannot be reached.*Fetch adult\.data, adult\.test from https://archive"):
        download(AdultIncome, tmp_path / "raw")
