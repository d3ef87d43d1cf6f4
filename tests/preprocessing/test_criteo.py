"""Criteo, fake: text and arrays decoded row by row against plain pandas and numpy; days, scenarios, bad files, leaks."""

import gzip
import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.datasets.criteo import TABLE_ROWS as MLPERF_ROWS
from preprocessing.writing.permutation import RowPermutation, split_ends
from tests.preprocessing.criteo_fake import CATEGORIES, NUMBERS, TABLE_ROWS, write_arrays, write_days, write_kaggle
from tests.preprocessing.movielens_fake import folder_bytes

SPLITS = ("train", "valid", "test")
ROWS = ("--table-rows", ",".join(map(str, TABLE_ROWS)))


@pytest.fixture
def days(tmp_path):
    return write_days(tmp_path / "raw")


def run(raw, out, *options):
    return main(["criteo", "--raw", str(raw), "--out", str(out), *options])


def read(out, split):
    manifest = DatasetManifest.load(out)
    return pd.concat([pq.read_table(out / part.path).to_pandas() for part in manifest.splits[split].parts], ignore_index=True)


def raw_lines(path, day):
    columns = ["label", *NUMBERS, *CATEGORIES]
    rows = pd.read_csv(path, sep="\t", header=None, names=columns, dtype=str, keep_default_na=False)
    return rows.assign(day=day, line=range(1, len(rows) + 1))


def of_rows(raw, found):
    """The raw rows that these rows say that they are."""
    days = np.broadcast_to(found.get("key.day", 0), len(found))
    rows = pd.MultiIndex.from_arrays([days, found["key.line"]])
    return raw.set_index(["day", "line"], drop=False).loc[rows].reset_index(drop=True)


def assert_decodes_to(out, raw):
    """Every raw row once, its ids by the vocabulary of the train rows, its numbers by the formula."""
    rows = {split: read(out, split) for split in SPLITS}
    assert sum(map(len, rows.values())) == len(raw)
    train = of_rows(raw, rows["train"])
    seen = pd.concat(rows.values())
    assert len(of_rows(raw, seen).drop_duplicates(["day", "line"])) == len(raw)
    for name in CATEGORIES:
        entries = pq.read_table(out / "vocab" / f"{name}.parquet").to_pandas()
        counts = train.loc[train[name] != "", name].value_counts()
        truth = sorted(((text, n) for text, n in counts.items() if n >= 3), key=lambda each: (-each[1], int(each[0], 16)))
        assert [(f"{value:08x}", n) for value, n in zip(entries["value"], entries["count"], strict=True)] == truth
        ids = {text: i for i, (text, _) in enumerate(truth, start=1)}
        assert 0 < len(ids) < raw[name].nunique()
        for found in rows.values():
            assert found[name].tolist() == [ids.get(text, 0) for text in of_rows(raw, found)[name]]
    for found in rows.values():
        wanted = of_rows(raw, found)
        assert found["label.click"].tolist() == wanted["label"].astype(float).tolist()
        for name in NUMBERS:
            numbers = [np.float32(math.log(max(int(text or 0), -1) + 3)) for text in wanted[name]]
            assert np.array_equal(found[name], numbers)
    return rows


@pytest.mark.parametrize("piece_bytes", [1 << 14, 8 << 20])
def test_days_decode_to_the_raw_lines_and_the_last_is_halved(days, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr("preprocessing.reading.raw_files.PIECE_BYTES", piece_bytes)
    out = tmp_path / "out"
    assert run(days, out, "--days", "0-2") == 0
    raw = pd.concat([raw_lines(days / f"day_{day}", day) for day in range(3)])
    rows = assert_decodes_to(out, raw)
    assert [len(found) for found in rows.values()] == [1000 + 1100, 600, 600]
    assert [set(found["key.day"]) for found in rows.values()] == [{0, 1}, {2}, {2}]
    for found in rows.values():  # shuffled
        assert not found["key.line"].is_monotonic_increasing
    manifest = DatasetManifest.load(out)
    assert [(task.name, task.role) for task in manifest.tasks] == [("click", "ctr")]
    assert manifest.scenario is None
    assert (manifest.keys, manifest.group_key) == (["day", "line"], None)
    assert (len(manifest.sparse_features), len(manifest.dense_features)) == (26, 13)


@pytest.mark.parametrize(("text", "chosen"), [("0,2", [0, 2]), ("1-2", [1, 2]), ("1", [1])])
def test_any_days_and_one_alone_is_divided_at_random(days, tmp_path, text, chosen):
    out = tmp_path / "out"
    assert run(days, out, "--days", text) == 0
    rows = assert_decodes_to(out, pd.concat([raw_lines(days / f"day_{day}", day) for day in chosen]))
    if len(chosen) > 1:
        assert [set(found["key.day"]) for found in rows.values()] == [{chosen[0]}, {chosen[1]}, {chosen[1]}]
    else:
        lines = np.argsort(RowPermutation(1100, 2024).positions(0, 1100)) + 1
        assert np.array_equal(pd.concat(rows.values())["key.line"], lines)
        assert np.cumsum([len(found) for found in rows.values()])[:2].tolist() == list(split_ends(1100))


def test_days_as_scenarios_are_divided_at_random(days, tmp_path):
    out = tmp_path / "out"
    assert run(days, out, "--days", "0,2", "--scenario", "day") == 0
    rows = assert_decodes_to(out, pd.concat([raw_lines(days / f"day_{day}", day) for day in (0, 2)]))
    assert [len(found) for found in rows.values()] == [1760, 220, 220]
    for found in rows.values():
        assert found["sample.scenario"].tolist() == (found["key.day"] == 2).astype(int).tolist()
        assert set(found["key.day"]) == {0, 2}
    assert DatasetManifest.load(out).scenario.values == ["0", "2"]


def test_kaggle_file_decodes_to_the_raw_lines(tmp_path):
    raw, out = write_kaggle(tmp_path / "raw"), tmp_path / "out"
    assert run(raw, out, "--form", "kaggle") == 0
    rows = assert_decodes_to(out, raw_lines(raw / "train.txt", 0))
    assert [len(found) for found in rows.values()] == [1600, 200, 200]
    assert DatasetManifest.load(out).keys == ["line"]


def test_numbers_scaled_by_the_train_rows(days, tmp_path):
    out = tmp_path / "out"
    assert run(days, out, "--days", "0-2", "--dense", "min-max") == 0
    raw = pd.concat([raw_lines(days / f"day_{day}", day) for day in range(3)])
    raw[NUMBERS] = raw[NUMBERS].replace("", np.nan).astype(float).astype(np.float32)
    train = of_rows(raw, read(out, "train"))
    for split in SPLITS:
        found = read(out, split)
        for name in NUMBERS:
            low, high = train[name].min(), train[name].max()
            scaled = ((of_rows(raw, found)[name] - low) / (high - low)).fillna(0).clip(0, 1)
            assert np.allclose(found[name], scaled, rtol=0, atol=1e-6)


def test_gzipped_days_short_and_upper_case_ids_give_the_same_parts(days, tmp_path):
    assert run(days, tmp_path / "plain", "--days", "0-2") == 0
    for day in range(3):
        path = days / f"day_{day}"
        lines = [line.split("\t") for line in path.read_text().split("\n")[:-1]]
        other = [[*fields[:14], *(f.lstrip("0").upper() or f for f in fields[14:])] for fields in lines]
        text = "".join("\t".join(fields) + "\n" for fields in other)
        (days / f"day_{day}.gz").write_bytes(gzip.compress(text.encode()))
        path.unlink()
    assert run(days, tmp_path / "gzipped", "--days", "0-2") == 0
    a, b = folder_bytes(tmp_path / "plain"), folder_bytes(tmp_path / "gzipped")
    assert [name for name in a if a[name] != b[name]] == ["manifest.json"]


def test_rows_of_the_last_day_leak_nothing_into_train(days, tmp_path):
    assert run(days, tmp_path / "before", "--days", "0-2") == 0
    other = write_days(tmp_path / "other", days=(2,), num_rows=300, seed=9)
    (days / "day_2").write_bytes((other / "day_2").read_bytes())
    assert run(days, tmp_path / "after", "--days", "0-2") == 0
    before, after = folder_bytes(tmp_path / "before"), folder_bytes(tmp_path / "after")
    kept = [name for name in before if name.startswith(("train/", "vocab/"))]
    assert len(kept) == 1 + 26
    assert {name: before[name] == after[name] for name in kept} == dict.fromkeys(kept, True)
    assert before["valid/part-00000.parquet"] != after["valid/part-00000.parquet"]


def assert_holds_arrays(out, raw, multi_hot, fold=lambda ids, num_rows: ids):
    num_rows = 0
    for split in SPLITS:
        found = read(out, split)
        num_rows += len(found)
        for day, rows in found.groupby("key.day"):
            at = rows["key.line"].to_numpy() - 1
            assert np.array_equal(rows["label.click"], np.load(raw / f"day_{day}_labels.npy")[at, 0])
            assert np.array_equal(rows[NUMBERS], np.load(raw / f"day_{day}_dense.npy")[at])
            ids = np.load(raw / f"day_{day}_sparse{'_multi_hot.npz' if multi_hot else '.npy'}")
            for k, (name, n) in enumerate(zip(CATEGORIES, TABLE_ROWS, strict=True)):
                wanted = fold((ids[str(k)] if multi_hot else ids[:, k])[at], n)
                assert np.array_equal(np.stack(rows[name]) if multi_hot else rows[name], wanted), name
    tables = DatasetManifest.load(out).tables
    assert [(table.name, table.num_rows, table.vocabulary) for table in tables] == [
        (name, n, None) for name, n in zip(CATEGORIES, TABLE_ROWS, strict=True)
    ]
    return num_rows


@pytest.mark.parametrize("piece_bytes", [1 << 14, 8 << 20])
@pytest.mark.parametrize("form", ["npy", "multi-hot"])
def test_arrays_come_through_as_they_are(tmp_path, monkeypatch, form, piece_bytes):
    monkeypatch.setattr("preprocessing.reading.raw_files.PIECE_BYTES", piece_bytes)
    raw, out = write_arrays(tmp_path / "raw", form == "multi-hot"), tmp_path / "out"
    assert run(raw, out, "--form", form, "--days", "0-2", *ROWS) == 0
    assert assert_holds_arrays(out, raw, form == "multi-hot") == 1000 + 1100 + 1200
    assert [DatasetManifest.load(out).splits[split].num_rows for split in SPLITS] == [2100, 600, 600]


@pytest.mark.parametrize("form", ["npy", "multi-hot"])
def test_ids_modulo_the_rows_of_their_tables(tmp_path, form):
    raw, out = write_arrays(tmp_path / "raw", form == "multi-hot", days=(4,)), tmp_path / "out"
    path = raw / f"day_4_sparse{'_multi_hot.npz' if form == 'multi-hot' else '.npy'}"
    ids = np.load(path)
    if form == "multi-hot":
        np.savez(path, **{name: values + np.int32(10**9) for name, values in ids.items()})
    else:
        np.save(path, ids.astype(np.int64) + 10**12)
    options = ("--form", form, "--days", "4", *ROWS)
    assert run(raw, out, *options) == 2
    assert run(raw, out, *options, "--modulo") == 0
    assert assert_holds_arrays(out, raw, form == "multi-hot", lambda values, n: values % n) == 1400


def test_packed_arrays_give_the_same_parts(tmp_path):
    raw, options = write_arrays(tmp_path / "raw", True), ("--form", "multi-hot", "--days", "0-2", *ROWS)
    assert run(raw, tmp_path / "a", *options) == 0
    for day in range(3):
        path = raw / f"day_{day}_sparse_multi_hot.npz"
        np.savez_compressed(path, **np.load(path))
        labels = raw / f"day_{day}_labels.npy"
        (raw / f"{labels.name}.gz").write_bytes(gzip.compress(labels.read_bytes()))
        labels.unlink()
    assert run(raw, tmp_path / "b", *options) == 0
    a, b = folder_bytes(tmp_path / "a"), folder_bytes(tmp_path / "b")
    assert [name for name in a if a[name] != b[name]] == ["manifest.json"]


def test_known_table_sizes():
    """The total of MLPerf DLRM-v2."""
    assert (len(MLPERF_ROWS), sum(MLPERF_ROWS)) == (26, 204_184_588)


def field(index, text, number=30, name="day_1"):
    def apply(raw):
        lines = (raw / name).read_text().split("\n")
        fields = lines[number - 1].split("\t")
        lines[number - 1] = "\t".join([*fields[:index], text, *fields[index + 1 :]])
        (raw / name).write_text("\n".join(lines))

    return apply


BAD = {
    "missing": (
        lambda raw: (raw / "day_1").unlink(),
        ["lacks: day_1", "ailab.criteo.com", "No login is needed", "CC BY-NC-SA"],
    ),
    "empty": (lambda raw: (raw / "day_1").write_text(""), ["day_1", "is empty"]),
    "HTML": (lambda raw: (raw / "day_1").write_text("<!doctype html>\n<p>"), ["day_1", "HTML page"]),
    "commas": (
        lambda raw: (raw / "day_0").write_text((raw / "day_0").read_text().replace("\t", ",")),
        ["day_0, line 1", "40 fields (label<tab>int_0", "1 found"],
    ),
    "no labels": (
        lambda raw: (raw / "day_0").write_text("\n".join(line[2:] for line in (raw / "day_0").read_text().split("\n"))),
        ["day_0, line 1", "40 fields", "39 found"],
    ),
    "label 2": (field(0, "2"), ["day_1, line 30: the label must be 0 or 1, found 2"]),
    "label missing": (field(0, ""), ["day_1, line 30: the label must be 0 or 1, found None"]),
    "no integer": (field(3, "1.5"), ["day_1, line 30: int_2 must be an integer, found '1.5'"]),
    "beyond 64 bits": (field(3, "9" * 20), ["day_1, line 30: int_2 = 9", "64 bits"]),
    "no digit": (field(15, "0123456g"), ["day_1, line 30: cat_1 must be up to 8 hexadecimal digits, found '0123456g'"]),
    "too many digits": (field(39, "123456789"), ["day_1, line 30: cat_25", "found '123456789'"]),
    "blank": (field(14, " 1234567"), ["day_1, line 30: cat_0", "found ' 1234567'"]),
    "no ASCII": (field(14, "é"), ["day_1, line 30: cat_0", "found 'é'"]),
    "undecodable": (
        lambda raw: (raw / "day_1").write_bytes((raw / "day_1").read_bytes().replace(b"\t", b"\xff", 1)),
        ["day_1, line 1", "not utf-8"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_text_is_named_by_file_and_line(case, days, tmp_path, capsys):
    change, words = BAD[case]
    change(days)
    assert run(days, tmp_path / "out", "--days", "0-2") == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_bad_lines_may_be_passed_over(days, tmp_path):
    lines = (days / "day_1").read_text().splitlines()
    fields = lines[7].split("\t")
    bad = ["\t".join(fields[:-1]), "\t".join(["3", *fields[1:]]), "\t".join([*fields[:-2], "x", "y"])]
    (days / "day_1").write_text("\n".join([*lines, *bad]) + "\n")
    assert run(days, tmp_path / "out", "--days", "0-2", "--max-bad-rows", "3") == 0
    assert DatasetManifest.load(tmp_path / "out").statistics["bad_rows"] == {"day_1": 3}
    assert_decodes_to(
        tmp_path / "out", pd.concat([raw_lines(days / f"day_{day}", day)[: 1000 + 100 * day] for day in range(3)])
    )


def array(name, change):
    def apply(raw):
        values = np.load(raw / name)
        np.save(raw / name, change(values))

    return apply


def put(row, column, value):
    def change(values):
        values[row, column] = value
        return values

    return change


def cut(name, num_bytes):
    return lambda raw: (raw / name).write_bytes((raw / name).read_bytes()[:-num_bytes])


def without_member(raw):
    path = raw / "day_1_sparse_multi_hot.npz"
    np.savez(path, **{name: values for name, values in np.load(path).items() if name != "7"})


LABELS, DENSE, SPARSE = "day_1_labels.npy", "day_1_dense.npy", "day_1_sparse.npy"
HOT = "day_1_sparse_multi_hot.npz"
BAD_ARRAYS = {
    "label 2": ("npy", array(LABELS, put(16, 0, 2)), [f"{LABELS}, line 17: the label must be 0 or 1, found 2"]),
    "nan": ("npy", array(DENSE, put(4, 3, np.nan)), [f"{DENSE}, line 5: int_3 is nan or infinite"]),
    "id too large": (
        "npy",
        array(SPARSE, put(9, 0, 500)),
        [f"{SPARSE}, line 10: cat_0 must lie in 0..499, found 500", "--modulo"],
    ),
    "negative id": ("npy", array(SPARSE, put(9, 1, -1)), [f"{SPARSE}, line 10: cat_1 must lie in 0..39, found -1"]),
    "rows": ("npy", array(DENSE, lambda values: values[:-1]), [DENSE, "1,099 rows, but", f"{LABELS} has 1,100"]),
    "columns": (
        "npy",
        array(SPARSE, lambda values: values[:, :25]),
        [SPARSE, "cat_0 ... cat_25 must be of shape [rows, 26], row by row, found [1100, 25]"],
    ),
    "floats as ids": ("npy", array(SPARSE, lambda values: values * 1.0), [SPARSE, "must be of int64, found float64"]),
    "unsigned": ("npy", array(SPARSE, lambda values: values.astype(np.uint64)), [SPARSE, "must be of int64, found uint64"]),
    "by columns": ("npy", array(DENSE, np.asfortranarray), [DENSE, "stored column by column"]),
    "cut": ("npy", cut(SPARSE, 1), [SPARSE, "truncated: fewer than the 1,100 rows"]),
    "cut in the header": ("npy", cut(LABELS, 4 * 1100 + 60), [LABELS, "no numpy array"]),
    "HTML": ("npy", lambda raw: (raw / DENSE).write_text("<!doctype html>\n<p>"), [DENSE, "no numpy array"]),
    "empty": ("npy", lambda raw: (raw / DENSE).write_bytes(b""), [DENSE, "no numpy array"]),
    "objects": (
        "npy",
        lambda raw: np.save(raw / LABELS, np.array([[None]] * 1100), allow_pickle=True),
        [LABELS, "label must be of int64, found object"],
    ),
    "missing": ("multi-hot", lambda raw: (raw / HOT).unlink(), [f"lacks: {HOT}"]),
    "no member": ("multi-hot", without_member, [HOT, "the archive holds no 7.npy, for cat_7"]),
    "no archive": ("multi-hot", lambda raw: (raw / HOT).write_bytes(b"PK"), [HOT, "truncated or damaged"]),
    "archive cut": ("multi-hot", cut(HOT, 5000), [HOT, "truncated or damaged"]),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_named_by_file_and_row(case, tmp_path, capsys):
    form, change, words = BAD_ARRAYS[case]
    raw = write_arrays(tmp_path / "raw", form == "multi-hot")
    change(raw)
    assert run(raw, tmp_path / "out", "--form", form, "--days", "0-2", *ROWS) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_a_damaged_byte_in_an_archive_and_an_id_out_of_a_list_are_told(tmp_path, capsys):
    raw, options = write_arrays(tmp_path / "raw", True), ("--form", "multi-hot", "--days", "0-2", *ROWS)
    content = bytearray((raw / HOT).read_bytes())
    content[len(content) // 2] ^= 1
    (raw / HOT).write_bytes(content)
    assert run(raw, tmp_path / "out", *options) == 2
    assert "truncated or damaged (Bad CRC-32" in capsys.readouterr().err
    ids = dict(np.load(raw / "day_0_sparse_multi_hot.npz"))
    ids["4"][20, 5] = 17
    np.savez(raw / "day_0_sparse_multi_hot.npz", **ids)
    assert run(raw, tmp_path / "out", *options) == 2
    assert (
        f"day_0_sparse_multi_hot.npz, line 21: cat_4 must lie in 0..16, found {ids['4'][20].tolist()}"
        in capsys.readouterr().err
    )
    write_arrays(tmp_path / "whole", True)
    (raw / HOT).write_bytes((tmp_path / "whole" / HOT).read_bytes())
    assert run(raw, tmp_path / "out", *options, "--max-bad-rows", "1") == 0
    assert DatasetManifest.load(tmp_path / "out").statistics["rows"] == 3299


OPTIONS = {
    "days backwards": (["--days", "2-0"], "--days 2-0: give days of 0..23 in ascending order"),
    "a day twice": (["--days", "0,0"], "in ascending order"),
    "no such day": (["--days", "23,24"], "give days of 0..23"),
    "no days": (["--days", "monday"], "give days of 0..23"),
    "days of Kaggle": (["--form", "kaggle", "--days", "0"], "the Kaggle file has no days"),
    "scenarios of Kaggle": (["--form", "kaggle", "--scenario", "day"], "the Kaggle file has no days"),
    "one day as scenario": (["--days", "3", "--scenario", "day"], "needs --days with two or more days"),
    "tables of text": (["--table-rows", "1"], "--table-rows and --modulo are for --form npy and multi-hot"),
    "few tables": (["--form", "npy", "--table-rows", "1,2"], "give 26 numbers from 1 to 10^18 - 1"),
    "table of 0": (["--form", "npy", "--table-rows", ",".join(["0"] * 26)], "give 26 numbers from 1 to 10^18 - 1"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit_are_told(case, tmp_path, capsys):
    options, words = OPTIONS[case]
    assert run(tmp_path, tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
