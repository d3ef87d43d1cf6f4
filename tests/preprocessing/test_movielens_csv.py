"""MovieLens-20M and -25M, fake: decoded back through the vocabularies and compared with plain pandas; bad files."""

import hashlib
import http.server
import threading
import zipfile

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from preprocessing.datasets.movielens import MovieLens20M
from preprocessing.writing.permutation import RowPermutation, split_ends
from tests.preprocessing.movielens_fake import folder_bytes, write_movielens_csv

SPLITS = ("train", "valid", "test")


@pytest.fixture
def csv(tmp_path):
    return write_movielens_csv(tmp_path / "raw")


def run(csv, out, *options, name="movielens-20m"):
    return main([name, "--raw", str(csv), "--out", str(out), *options])


def read(out, split):
    manifest = DatasetManifest.load(out)
    return pd.concat([pq.read_table(out / part.path).to_pandas() for part in manifest.splits[split].parts], ignore_index=True)


def by_pandas(csv, seed=2024):
    """The expected rows, raw values, in their order on disk, by split."""
    rows = pd.read_csv(csv / "ratings.csv").merge(pd.read_csv(csv / "movies.csv"), on="movieId", how="left")
    rows = rows.iloc[np.argsort(RowPermutation(len(rows), seed).positions(0, len(rows)))]
    train_end, valid_end = split_ends(len(rows))
    return {"train": rows.iloc[:train_end], "valid": rows.iloc[train_end:valid_end], "test": rows.iloc[valid_end:]}


def decoder(out, table, values):
    """id -> raw value; `values` are the train values that it must hold, by descending count, ties by value."""
    entries = pq.read_table(out / "vocab" / f"{table}.parquet").to_pandas()
    truth = sorted(pd.Series(values).value_counts().items(), key=lambda item: (-item[1], item[0]))
    assert list(zip(entries["value"], entries["count"], strict=True)) == truth
    assert entries["id"].tolist() == list(range(1, len(truth) + 1))
    return dict(zip(entries["id"], entries["value"], strict=True))


@pytest.mark.parametrize("name", ["movielens-20m", "movielens-25m"])
@pytest.mark.parametrize("piece_bytes", [1 << 10, 8 << 20])
def test_output_decodes_to_the_raw_files(csv, tmp_path, name, piece_bytes, monkeypatch):
    monkeypatch.setattr("preprocessing.reading.raw_files.PIECE_BYTES", piece_bytes)
    out = tmp_path / "out"
    assert run(csv, out, name=name) == 0
    expected = by_pandas(csv)
    lists = {s: rows["genres"].map(lambda g: [] if g == "(no genres listed)" else g.split("|")) for s, rows in expected.items()}
    users, movies = (decoder(out, t, expected["train"][f"{t}Id"]) for t in ("user", "movie"))
    genres = decoder(out, "genres", [genre for one in lists["train"] for genre in one])
    for split in SPLITS:
        found, wanted = read(out, split), expected[split]
        assert len(found) == len(wanted) > 0
        for names, column in ((users, "user"), (movies, "movie")):
            raw = wanted[f"{column}Id"]
            assert found[column].map(names).fillna(-1).tolist() == raw.where(raw.isin(names.values()), -1).tolist()
            assert found[f"key.{column}"].tolist() == raw.tolist()
        assert [[genres[i] for i in ids] for ids in found["genres"]] == lists[split].tolist()
        assert sum(len(ids) == 0 for ids in found["genres"]) > 0
        assert found["key.timestamp"].tolist() == wanted["timestamp"].tolist()
        assert found["label.label2"].tolist() == (wanted["rating"] > 2).astype(float).tolist()
        assert found["label.label3"].tolist() == (wanted["rating"] > 3).astype(float).tolist()
        assert "sample.scenario" not in found
    manifest = DatasetManifest.load(out)
    assert manifest.name == name
    assert manifest.group_key == "user"
    assert [(t.name, t.role, t.implied_by_next) for t in manifest.tasks] == [
        ("label2", "ctr", True),
        ("label3", "ctcvr", False),
    ]


def test_parity_form_takes_the_genres_as_one_id(csv, tmp_path):
    out = tmp_path / "out"
    assert run(csv, out, "--parity") == 0
    wanted = pd.concat(by_pandas(csv).values())["genres"]
    codes = wanted.astype("category").cat.codes + 1  # categories in sorted order
    assert pd.concat([read(out, split) for split in SPLITS])["genres"].tolist() == codes.tolist()


def spoil(name, number, old, new):
    def apply(csv):
        lines = (csv / name).read_text(encoding="utf-8").split("\n")
        assert old in lines[number - 1]
        lines[number - 1] = lines[number - 1].replace(old, new, 1)
        (csv / name).write_text("\n".join(lines), encoding="utf-8")

    return apply


def replace_rating(text):
    def apply(csv):
        lines = (csv / "ratings.csv").read_text().split("\n")
        fields = lines[20].split(",")
        lines[20] = ",".join([*fields[:2], text, fields[3]])
        (csv / "ratings.csv").write_text("\n".join(lines))

    return apply


BAD = {
    "missing": (lambda csv: (csv / "movies.csv").unlink(), ["lacks: movies.csv", "ml-20m.zip", "--download"]),
    "no header": (spoil("ratings.csv", 1, "userId", "1"), ["ratings.csv, line 1: the header lacks userId"]),
    "0 stars": (replace_rating("0.0"), ["ratings.csv, line 21: a rating must be", "from 0.5 to 5, found 0."]),
    "third of a star": (replace_rating("3.3"), ["ratings.csv, line 21: a rating must be", "found 3.3"]),
    "too many stars": (replace_rating("5.5"), ["ratings.csv, line 21: a rating must be", "found 5.5"]),
    "no rating": (replace_rating(""), ["ratings.csv, line 21: the rating is missing"]),
    "nan": (replace_rating("nan"), ["ratings.csv, line 21: rating is nan or infinite"]),
    "id beyond 2^63": (spoil("ratings.csv", 7, ",9783", ",99999999999999999783"), ["line 7: timestamp = 9999", "64 bits"]),
    "unknown movie": (
        lambda csv: (csv / "ratings.csv").write_text((csv / "ratings.csv").read_text() + "1,1,4.0,978300000\n"),
        ["ratings.csv, line 2002: movie 1 is not in movies.csv"],
    ),
    "movie twice": (spoil("movies.csv", 4, "9,", "6,"), ["movies.csv, line 4: movie 6 appears a second time"]),
    "quote not closed": (spoil("movies.csv", 6, ')"', ")"), ["movies.csv, line 6: a quote is not closed on the line"]),
    "title not quoted": (
        spoil("movies.csv", 2, '"American President, The 1 (1995)"', "President, The"),
        ["movies.csv, line 2: 3 fields (movieId,title,genres) expected, 4 found"],
    ),
    "no genres": (spoil("movies.csv", 3, "(no genres listed)", ""), ["movies.csv, line 3: the genres are missing"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_raw_data_is_named_by_file_and_line(case, csv, tmp_path, capsys):
    change, words = BAD[case]
    change(csv)
    assert run(csv, tmp_path / "out") == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_bad_rows_may_be_passed_over(csv, tmp_path):
    assert run(csv, tmp_path / "good") == 0
    path = csv / "ratings.csv"
    lines = path.read_text().splitlines()
    bad = ["1,3,6.0,978300000", "1,1,4.0,978300000", "1,3,,978300000", "1,3,4.0"]
    path.write_text("\n".join([*lines[:9], *bad, *lines[9:]]) + "\n")
    assert run(csv, tmp_path / "out", "--max-bad-rows", "4") == 0
    good, out = (DatasetManifest.load(tmp_path / name) for name in ("good", "out"))
    assert out.statistics["bad_rows"] == {"ratings.csv": 4}
    assert out.splits == good.splits


def test_download_takes_the_files_out_of_the_folder_in_the_archive(csv, tmp_path, monkeypatch):
    archive = tmp_path / "ml-20m.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in ("README.txt", "tags.csv"):
            packed.writestr(f"ml-20m/{name}", "not needed")
        for path in csv.iterdir():
            packed.write(path, f"ml-20m/{path.name}")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path)

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(MovieLens20M, "archive", f"http://127.0.0.1:{server.server_port}/ml-20m.zip")
        assert run(tmp_path / "fetched", tmp_path / "out", "--download") == 2  # not the archive of GroupLens
        monkeypatch.setattr(MovieLens20M, "archive_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        assert run(tmp_path / "fetched", tmp_path / "out", "--download") == 0
        server.shutdown()
    assert folder_bytes(tmp_path / "fetched") == folder_bytes(csv)
