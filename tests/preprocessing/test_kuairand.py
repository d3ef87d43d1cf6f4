"""KuaiRand, fake: decoded and compared with plain pandas, in every version and for any tabs; bad files."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.writing.permutation import RowPermutation
from tests.preprocessing.kuairand_fake import VIDEO, write_kuairand
from tests.preprocessing.kuairec_fake import COUNTS, USER
from tests.preprocessing.test_kuairec import CODES, TEXTS, cell, number, repeat

VIDEO_TEXTS = ["video_type", "upload_dt", "upload_type"]
VIDEO_CODES = ["author_id", "visible_status", "server_width", "server_height", "music_id", "music_type"]
PERIODS = ("4_08_to_4_21", "4_22_to_5_08")


def plain(text):
    return int(float(text)) if text else None


SPARSE = dict.fromkeys(CODES, number) | dict.fromkeys(TEXTS, str) | dict.fromkeys(VIDEO_TEXTS, lambda text: text or None)
SPARSE |= dict.fromkeys((*VIDEO_CODES, "user_id", "video_id", "tab"), plain) | {"hour": lambda text: int(text) // 100}


@pytest.fixture
def fake(tmp_path):
    return write_kuairand(tmp_path / "raw", num_rows=1500)


def table(folder, name):
    return pd.read_csv(next(folder.rglob(name)), dtype=str, keep_default_na=False)


def logs(version):
    parts = ("_part1", "_part2") if version == "27k" else ("",)
    return [f"log_standard_{period}_{version}{part}.csv" for period in PERIODS for part in parts]


def expected_rows(folder, version, tabs, seed=2024):
    """Rows in their order on disk: the three periods of time one behind the other, each permuted."""
    rows = pd.concat([table(folder, name) for name in logs(version)])
    rows = rows[rows["tab"].isin(tabs)]
    rows = rows.merge(table(folder, f"user_features_{version}.csv"), on="user_id", how="left", validate="m:1")
    rows = rows.merge(table(folder, f"video_features_basic_{version}.csv"), on="video_id", how="left", validate="m:1")
    rows["hour"] = rows["hourmin"]
    month, day = rows["date"].str[4:6], rows["date"].str[6:].map(int)
    rows["split"] = np.select([(month == "04") & (day < 22), month == "04"], ["train", "valid"], "test")
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


def tags(text):
    return [int(tag) for tag in text.split(",")] if text else []


def assert_decodes_to(out, expected, tabs):
    train = expected[expected.split == "train"]
    for split in ("train", "valid", "test"):
        found, wanted = read(out, split), expected[expected.split == split].reset_index(drop=True)
        assert len(found) == len(wanted) > 0
        for name in ("is_click", "long_view"):
            assert np.array_equal(found[f"label.{name}"], wanted[name].map(float))
        for name in ("user_id", "video_id", "date", "time_ms"):
            assert np.array_equal(found[f"key.{name}"], wanted[name].map(int))
        if len(tabs) > 1:
            assert np.array_equal(found["sample.scenario"], wanted["tab"].map(tabs.index))
        else:
            assert "sample.scenario" not in found
        for name, raw_value in SPARSE.items():
            entries = pq.read_table(out / "vocab" / f"{name}.parquet").to_pandas()
            counts = pd.Series([value for text in train[name] if (value := raw_value(text)) is not None]).value_counts()
            assert dict(zip(entries["value"], entries["count"], strict=True)) == counts.to_dict(), name
            ids = dict(zip(entries["value"], entries["id"], strict=True))
            assert found[name].tolist() == [ids.get(raw_value(text), 0) for text in wanted[name]], name
        for name in (*COUNTS, "video_duration"):
            value_of = number if name in COUNTS else (lambda text: float(text) if text else None)
            logs = train[name].map(value_of).dropna().map(np.log1p)
            value = wanted[name].map(value_of).map(np.log1p, na_action="ignore").fillna(logs.min()).astype(float)
            scaled = ((value - logs.min()) / (logs.max() - logs.min())).clip(0, 1)
            assert np.allclose(found[name], scaled, rtol=0, atol=1e-6), name
        entries = pq.read_table(out / "vocab" / "tag.parquet").to_pandas()
        ids = dict(zip(entries["value"], entries["id"], strict=True))
        assert [list(bag) for bag in found["tag"]] == [[ids.get(tag, 0) for tag in tags(text)] for text in wanted["tag"]]


@pytest.mark.parametrize("version", ["pure", "1k", "27k"])
@pytest.mark.parametrize("piece_bytes", [1 << 12, 8 << 20])
def test_the_logs_decode_to_the_joined_rows(tmp_path, monkeypatch, version, piece_bytes):
    monkeypatch.setattr("preprocessing.reading.raw_files.PIECE_BYTES", piece_bytes)
    raw, out = write_kuairand(tmp_path / "raw", version, num_rows=1500), tmp_path / "out"
    assert main(["kuairand", "--raw", str(raw), "--out", str(out), "--version", version]) == 0
    five = ["1", "0", "4", "2", "6"]
    expected = expected_rows(raw, version, five)
    assert_decodes_to(out, expected, five)
    manifest = DatasetManifest.load(out)
    assert manifest.scenario.values == five
    assert {f.name: f.kind for f in manifest.features} == (
        dict.fromkeys(SPARSE, "sparse") | dict.fromkeys((*COUNTS, "video_duration"), "dense") | {"tag": "multi"}
    )
    assert [(task.name, task.implied_by_next) for task in manifest.tasks] == [("is_click", False), ("long_view", False)]
    left_out = manifest.statistics["passed_over"]
    assert sum(count["in other tabs"] for count in left_out.values()) == 1500 - len(expected) > 0
    assert list(left_out) == logs(version)


@pytest.mark.parametrize("tabs", [["0", "1"], ["1"], [str(tab) for tab in range(15)], ["14", "0"]])
def test_any_tabs_in_any_order(fake, tmp_path, tabs):
    out = tmp_path / "out"
    assert main(["kuairand", "--raw", str(fake), "--out", str(out), "--tabs", ",".join(tabs)]) == 0
    assert_decodes_to(out, expected_rows(fake, "pure", tabs), tabs)
    assert (DatasetManifest.load(out).scenario is None) == (len(tabs) == 1)


@pytest.mark.parametrize("tabs", ["1,1", "15", "", "0;1", "0,01", "-1"])
def test_tabs_that_are_none_are_told(fake, tmp_path, tabs, capsys):
    assert main(["kuairand", "--raw", str(fake), "--out", str(tmp_path / "out"), f"--tabs={tabs}"]) == 2
    assert "give some of 0..14, each once, divided by commas" in capsys.readouterr().err


def test_parity_form_keeps_whole_lists_and_counts_as_ids(fake, tmp_path):
    out = tmp_path / "out"
    assert main(["kuairand", "--raw", str(fake), "--out", str(out), "--parity"]) == 0
    manifest = DatasetManifest.load(out)
    assert [f.name for f in manifest.features if f.kind != "sparse"] == ["video_duration"]
    expected = expected_rows(fake, "pure", ["1", "0", "4", "2", "6"])
    found = pd.concat([read(out, split) for split in ("train", "valid", "test")], ignore_index=True)
    for name, kind in {"tag": str, "fans_user_num": int, "is_live_streamer": int, "user_active_degree": str}.items():
        values = sorted({kind(text) for text in expected[name] if text})
        assert found[name].tolist() == [values.index(kind(text)) + 1 if text else 0 for text in expected[name]], name


def test_columns_are_those_of_the_sample(real_data):
    """The joined sample of a peer holds the user columns, and some of the video columns, under the names that are read."""
    sample = pd.read_csv(real_data("samples/kuairand") / "kuairand_sample.csv", nrows=5)
    assert set(USER) <= set(sample.columns)
    assert {"video_type", "visible_status", "server_width", "server_height"} <= set(sample.columns) & set(VIDEO)


LOG, USERS, VIDEOS = "log_standard_4_08_to_4_21_pure.csv", "user_features_pure.csv", "video_features_basic_pure.csv"
BAD = {
    "click 2": (cell(LOG, 7, "is_click", "2"), f"{LOG}, line 7: is_click must be 0 or 1, found 2"),
    "no long view": (cell(LOG, 7, "long_view", ""), f"{LOG}, line 7: long_view must be 0 or 1, found None"),
    "tab 15": (cell(LOG, 8, "tab", "15"), f"{LOG}, line 8: tab must lie in 0..14, found 15"),
    "no tab": (cell(LOG, 8, "tab", ""), f"{LOG}, line 8: the tab is missing"),
    "hour": (cell(LOG, 8, "hourmin", "2400"), f"{LOG}, line 8: hourmin must lie in 0..2359, found 2400"),
    "no date": (cell(LOG, 8, "date", ""), f"{LOG}, line 8: the date is missing"),
    "id no number": (cell(LOG, 8, "video_id", "v"), f"{LOG}, line 8: video_id must be an integer, found 'v'"),
    "id beyond 64 bits": (cell(LOG, 8, "user_id", str(2**63)), f"{LOG}, line 8: user_id = {2**63} does not fit"),
    "user twice": (repeat(USERS, 4), f"{USERS}, line 122: user_id 2 appears a second time"),
    "video twice": (repeat(VIDEOS, 4), f"{VIDEOS}, line 92: video_id 6 appears a second time"),
    "activity": (cell(USERS, 4, "user_active_degree", "low"), f"{USERS}, line 4: user_active_degree must be one of"),
    "tags": (
        cell(VIDEOS, 4, "tag", "[12]"),
        f"{VIDEOS}, line 4: tag must be numbers divided by commas such as 12,65",
    ),
    "duration": (cell(VIDEOS, 4, "video_duration", "-7"), f"{VIDEOS}, line 4: video_duration must be 0 or more, found -7"),
    "half a code": (cell(VIDEOS, 4, "server_width", "7.5"), f"{VIDEOS}, line 4: server_width must be a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_raw_data_is_named_by_file_and_line(case, fake, tmp_path, capsys):
    change, words = BAD[case]
    change(fake / "KuaiRand-pure" / "data")
    assert main(["kuairand", "--raw", str(fake), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("column", ["user_id", "video_id"])
def test_views_of_unknown_users_and_videos_are_bad_rows(fake, tmp_path, capsys, column):
    data = fake / "KuaiRand-pure" / "data"
    cell(LOG, 9, column, "100000")(data)
    cell(LOG, 9, "tab", "1")(data)
    arguments = ["kuairand", "--raw", str(fake), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert f"{LOG}, line 9: {column} 100000 is not in" in capsys.readouterr().err
    assert main([*arguments, "--max-bad-rows", "1"]) == 0
    assert DatasetManifest.load(tmp_path / "out").statistics["bad_rows"] == {f"KuaiRand-pure/data/{LOG}": 1}


def test_missing_files_are_named_by_version(fake, tmp_path, capsys):
    arguments = ["kuairand", "--raw", str(fake), "--out", str(tmp_path / "out"), "--version", "27k"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "lacks: log_standard_4_08_to_4_21_27k_part1.csv, " in message
    assert "https://kuairand.com/" in message
