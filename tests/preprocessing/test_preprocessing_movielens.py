"""Real and fake MovieLens, decoded back through the vocabularies and compared with plain pandas."""

import gzip

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmlrec.identity import file_sha256
from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.writing import parts, shuffle
from preprocessing.writing.permutation import RowPermutation, split_ends
from tests.preprocessing.movielens_fake import folder_bytes, write_movielens

FEATURES = ["user", "movie", "gender", "age", "occupation", "zip", "genres"]


def read(out, split):
    manifest = DatasetManifest.load(out)
    return pd.concat([pq.read_table(out / part.path).to_pandas() for part in manifest.splits[split].parts], ignore_index=True)


def vocabulary(out, table):
    return pq.read_table(out / "vocab" / f"{table}.parquet").to_pandas()


def by_pandas(folder, seed=2024):
    """The expected rows, raw values, in their order on disk, with their split.

    Written without the code under test, but for the permutation, which has its own tests.
    """
    ratings_file = next(folder.glob("ratings.dat*"))
    options = {"sep": "::", "engine": "python", "header": None}
    ratings = pd.read_csv(ratings_file, sep=":", header=None, usecols=[0, 2, 4, 6])  # '::' is ':', nothing, ':'
    ratings.columns = ["user", "movie", "rating", "timestamp"]
    users = pd.read_csv(
        folder / "users.dat", names=["user", "gender", "age", "occupation", "zip"], dtype={"zip": str}, **options
    )
    movies = pd.read_csv(folder / "movies.dat", names=["movie", "title", "genres"], encoding="latin-1", **options)
    rows = ratings.merge(users, on="user", how="left").merge(movies, on="movie", how="left")
    rows["position"] = RowPermutation(len(rows), seed).positions(0, len(rows))
    rows = rows.sort_values("position", ignore_index=True)
    train_end, valid_end = split_ends(len(rows))
    rows["split"] = np.select([rows.index < train_end, rows.index < valid_end], ["train", "valid"], "test")
    return rows


def assert_decodes_to(out, expected):
    train = expected[expected.split == "train"]
    decoders = {}
    for name in FEATURES:
        table = vocabulary(out, name)
        counts = train[name].value_counts()
        if name == "genres":
            counts = counts.rename_axis("whole").reset_index(name="n")
            counts = counts.assign(one=counts["whole"].str.split("|")).explode("one").groupby("one")["n"].sum()
        truth = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        assert list(zip(table["value"], table["count"], strict=True)) == truth, name
        assert table["id"].tolist() == list(range(1, len(truth) + 1))
        decoders[name] = dict(zip(table["value"], table["id"], strict=True))
    for split in ("train", "valid", "test"):
        found, wanted = read(out, split), expected[expected.split == split].reset_index(drop=True)
        assert len(found) == len(wanted)
        for name in FEATURES[:-1]:
            ids = wanted[name].map(decoders[name]).fillna(0).astype(np.int64)  # unseen in train -> 0
            assert np.array_equal(found[name], ids), (split, name)
            assert found[name].dtype == np.int64
        lists = pa.concat_arrays(
            [
                c
                for part in DatasetManifest.load(out).splits[split].parts
                for c in pq.read_table(out / part.path)["genres"].chunks
            ]
        )
        names = pa.array([None, *decoders["genres"]])  # the dictionary is in the order of ids
        decoded = pa.ListArray.from_arrays(lists.offsets, names.take(lists.values))
        assert pc.binary_join(decoded, "|").to_pylist() == wanted["genres"].tolist()
        for key in ("user", "movie", "timestamp"):
            assert np.array_equal(found[f"key.{key}"], wanted[key])
        assert np.array_equal(found["label.label2"], (wanted.rating > 2).astype(np.float32))
        assert np.array_equal(found["label.label3"], (wanted.rating > 3).astype(np.float32))
        assert np.array_equal(found["sample.scenario"], (wanted.gender == "M").astype(np.int64))


def test_movielens_1m_decodes_to_the_raw_files_and_the_published_counts(real_data, tmp_path):
    raw, out = real_data("ml-1m"), tmp_path / "out"
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(out)]) == 0
    assert_decodes_to(out, by_pandas(raw))
    manifest = DatasetManifest.load(out)
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {
        "train": 800_167,
        "valid": 100_021,
        "test": 100_021,
    }
    found = manifest.statistics
    assert found["rows"] == 1_000_209
    assert found["scenario_rows"] == {"F": 246_440, "M": 753_769}
    assert found["scenario_users"] == {"F": 1_709, "M": 4_331}
    rounded = {task: {name: round(rate, 6) for name, rate in rates.items()} for task, rates in found["label_rates"].items()}
    assert rounded == {
        "label2": {"all": 0.836303, "F": 0.846230, "M": 0.833058},
        "label3": {"all": 0.575161, "F": 0.590728, "M": 0.570071},
    }


def test_movielens_1m_age_scenarios_have_the_published_counts(real_data, tmp_path):
    out = tmp_path / "out"
    assert main(["movielens-1m", "--raw", str(real_data("ml-1m")), "--out", str(out), "--scenario", "age3"]) == 0
    found = DatasetManifest.load(out).statistics
    assert list(found["scenario_rows"].values()) == [210_747, 395_556, 393_906]
    assert list(found["scenario_users"].values()) == [1_325, 2_096, 2_619]


def test_movielens_100k_has_the_published_counts(real_data, tmp_path):
    raw, out = real_data("ml-100k"), tmp_path / "out"
    assert main(["movielens-100k", "--raw", str(raw), "--out", str(out)]) == 0
    found = DatasetManifest.load(out).statistics
    assert found["scenario_rows"] == {"F": 25_740, "M": 74_260}
    assert found["scenario_users"] == {"F": 273, "M": 670}
    rounded = {task: {name: round(rate, 6) for name, rate in rates.items()} for task, rates in found["label_rates"].items()}
    assert rounded == {
        "label2": {"all": 0.825200, "F": 0.818260, "M": 0.827606},
        "label3": {"all": 0.553750, "F": 0.554701, "M": 0.553420},
    }
    # genres of a movie, by way of the raw flags: Toy Story is Animation, Children's, Comedy
    names = vocabulary(out, "genres").set_index("id")["value"]
    rows = read(out, "train")
    toy_story = rows[rows["key.movie"] == 1].iloc[0]
    assert sorted(names[list(toy_story["genres"])]) == ["Animation", "Children's", "Comedy"]


def test_the_same_holds_when_buckets_blocks_and_parts_are_many(raw, tmp_path, monkeypatch):
    """2,000 rows through 8 buckets, raw blocks of 1 KiB, parts of one row group."""
    monkeypatch.setattr(shuffle, "BUCKET_ROWS", 256)
    monkeypatch.setattr(parts, "PART_ROWS", 1024)
    monkeypatch.setattr("preprocessing.reading.raw_files.RawFolder.blocks.__defaults__", ("utf-8", 1 << 10))
    out = tmp_path / "out"
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(out)]) == 0
    assert_decodes_to(out, by_pandas(raw))
    manifest = DatasetManifest.load(out)
    assert [part.num_rows for part in manifest.splits["train"].parts] == [1024, 576]


def test_manifest_counts_agree_with_the_parts(raw, tmp_path):
    out = tmp_path / "out"
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(out)]) == 0
    manifest = DatasetManifest.load(out)
    assert manifest.raw_files == {path.name: file_sha256(path) for path in raw.iterdir()}
    assert manifest.group_key == "user"
    assert manifest.keys == ["user", "movie", "timestamp"]
    assert [(t.name, t.role, t.implied_by_next) for t in manifest.tasks] == [
        ("label2", "ctr", True),
        ("label3", "ctcvr", False),
    ]
    assert "redistribution" in manifest.terms
    for name, split in manifest.splits.items():
        rows = read(out, name)
        assert split.num_rows == len(rows)
        assert split.scenario_rows == {
            "F": int((rows["sample.scenario"] == 0).sum()),
            "M": int((rows["sample.scenario"] == 1).sum()),
        }
        for task in ("label2", "label3"):
            for index, scenario in [(None, "all"), (0, "F"), (1, "M")]:
                label = rows[f"label.{task}"] if index is None else rows[f"label.{task}"][rows["sample.scenario"] == index]
                assert split.label_counts[task][scenario] == (len(label), int(label.sum()))
        for part in split.parts:
            path = out / part.path
            assert (part.num_bytes, part.sha256) == (path.stat().st_size, file_sha256(path))
    for table in manifest.tables:
        assert table.num_rows == 1 + len(pq.read_table(out / table.vocabulary))


def test_row_groups_are_whole_but_for_the_last_of_a_split(tmp_path, monkeypatch):
    raw, out = write_movielens(tmp_path / "many", num_ratings=9000), tmp_path / "out"
    monkeypatch.setattr(parts, "PART_ROWS", 3000)
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(out)]) == 0
    manifest = DatasetManifest.load(out)
    assert manifest.row_group_size == 1024
    files = [pq.ParquetFile(out / part.path).metadata for part in manifest.splits["train"].parts]
    groups = [[m.row_group(g).num_rows for g in range(m.num_row_groups)] for m in files]
    assert groups == [[1024, 1024], [1024, 1024], [1024, 1024], [1024, 32]]
    assert parts.row_group_size(800_167, 8) == 25_005
    assert parts.row_group_size(10**9, 8) == 65_536


def test_parity_form_encodes_like_a_label_encoder_on_all_rows(raw, tmp_path):
    from sklearn.preprocessing import LabelEncoder

    out = tmp_path / "out"
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(out), "--parity"]) == 0
    assert DatasetManifest.load(out).parity
    expected = by_pandas(raw)
    for name in FEATURES:
        ids = np.concatenate([read(out, split)[name] for split in ("train", "valid", "test")])
        assert np.array_equal(ids, LabelEncoder().fit_transform(expected[name]) + 1), name  # row 0 stays reserved


def test_equal_input_and_seed_give_equal_bytes_and_another_seed_does_not(raw, tmp_path):
    for name, seed in (("a", "2024"), ("b", "2024"), ("c", "7")):
        assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / name), "--seed", seed]) == 0
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert folder_bytes(tmp_path / "a")["train/part-00000.parquet"] != folder_bytes(tmp_path / "c")["train/part-00000.parquet"]


def test_valid_and_test_rows_leak_nothing_into_train(raw, tmp_path):
    """Other ratings and movies in every valid and test row change no byte of the train parts and the vocabularies."""
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "before")]) == 0
    lines = (raw / "ratings.dat").read_text().splitlines()
    positions = RowPermutation(len(lines), 2024).positions(0, len(lines))
    changed = [line if p < 1600 else f"40::180::{1 + p % 5}::5" for line, p in zip(lines, positions, strict=True)]
    (raw / "ratings.dat").write_text("\n".join(changed) + "\n")
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "after")]) == 0
    before, after = folder_bytes(tmp_path / "before"), folder_bytes(tmp_path / "after")
    kept = [name for name in before if name.startswith(("train/", "vocab/"))]
    assert len(kept) == 1 + len(FEATURES)
    assert {name: before[name] == after[name] for name in kept} == dict.fromkeys(kept, True)
    assert before["valid/part-00000.parquet"] != after["valid/part-00000.parquet"]


def test_without_scenario_there_is_no_scenario_column(raw, tmp_path):
    out = tmp_path / "out"
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(out), "--scenario", "none"]) == 0
    assert DatasetManifest.load(out).scenario is None
    assert "sample.scenario" not in read(out, "train")


def test_gzipped_raw_files_give_the_same_parts(raw, tmp_path):
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "plain")]) == 0
    plain = raw / "ratings.dat"
    (raw / "ratings.dat.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "gzipped")]) == 0
    before, after = folder_bytes(tmp_path / "plain"), folder_bytes(tmp_path / "gzipped")
    assert [name for name in before if before[name] != after[name]] == ["manifest.json"]
    assert "ratings.dat.gz" in DatasetManifest.load(tmp_path / "gzipped").raw_files
