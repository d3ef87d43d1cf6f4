"""Bad raw data and kills, what test_every_dataset.py does not try: a clear message, nothing that passes for a dataset."""

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preprocessing.command_line import main
from tests.preprocessing.movielens_fake import folder_bytes

ROOT = Path(__file__).parents[2]


def edit_line(path, number, text, encoding="iso-8859-1"):
    lines = path.read_text(encoding=encoding).split("\n")
    lines[number - 1] = text
    path.write_text("\n".join(lines), encoding=encoding)


BAD = {
    "missing file": (
        lambda raw: (raw / "movies.dat").unlink(),
        ["movies.dat", "https://grouplens.org", "Terms:", "--download"],
    ),
    "missing folder": (lambda raw: raw.rename(raw.with_name("gone")), ["does not exist", "ratings.dat, users.dat, movies.dat"]),
    "empty file": (lambda raw: (raw / "ratings.dat").write_text(""), ["ratings.dat", "is empty", "Fetch"]),
    "HTML page": (lambda raw: (raw / "ratings.dat").write_text("<!DOCTYPE html>\n<html>"), ["ratings.dat", "HTML page"]),
    "wrong delimiter": (
        lambda raw: (raw / "users.dat").write_text((raw / "users.dat").read_text().replace("::", ",")),
        ["users.dat, line 1", "5 fields (user::gender::age::occupation::zip) expected, 1 found"],
    ),
    "too few columns in the middle": (
        lambda raw: edit_line(raw / "ratings.dat", 700, "5::6::3"),
        ["ratings.dat, line 700", "4 fields", "3 found"],
    ),
    "too many columns": (lambda raw: edit_line(raw / "ratings.dat", 2, "5::6::3::7::9"), ["ratings.dat, line 2", "5 found"]),
    "empty line": (lambda raw: edit_line(raw / "ratings.dat", 9, ""), ["ratings.dat, line 9", "4 fields", "1 found"]),
    "undecodable bytes": (
        lambda raw: (raw / "users.dat").write_bytes((raw / "users.dat").read_bytes().replace(b"::01003", b"::\xff\xfe", 1)),
        ["users.dat, line 3", "not utf-8"],
    ),
    "binary file": (lambda raw: (raw / "ratings.dat").write_bytes(bytes(range(256)) * 50), ["ratings.dat, line 1"]),
    "not an integer": (
        lambda raw: edit_line(raw / "ratings.dat", 33, "5::6::3.5::1"),
        ["ratings.dat, line 33", "rating must be an integer, found '3.5'"],
    ),
    "nan": (lambda raw: edit_line(raw / "ratings.dat", 33, "5::6::nan::1"), ["ratings.dat, line 33", "found 'nan'"]),
    "beyond 64 bits": (
        lambda raw: edit_line(raw / "ratings.dat", 33, "5::99999999999999999999::3::1"),
        ["ratings.dat, line 33", "64 bits"],
    ),
    "missing number": (
        lambda raw: edit_line(raw / "ratings.dat", 34, "5::::3::1"),
        ["ratings.dat, line 34", "movie is missing"],
    ),
    "rating of 6": (
        lambda raw: edit_line(raw / "ratings.dat", 1500, "5::6::6::1"),
        ["ratings.dat, line 1500", "must be 1, 2, 3, 4 or 5, found 6"],
    ),
    "unknown user": (
        lambda raw: edit_line(raw / "ratings.dat", 12, "999::6::3::1"),
        ["ratings.dat, line 12", "user 999 is not in users.dat"],
    ),
    "unknown movie": (
        lambda raw: edit_line(raw / "ratings.dat", 12, "5::7::3::1"),
        ["ratings.dat, line 12", "movie 7 is not in movies.dat"],
    ),
    "user twice": (
        lambda raw: edit_line(raw / "users.dat", 20, "4::F::1::2::03"),
        ["users.dat, line 20", "user 4 appears a second time"],
    ),
    "movie twice": (
        lambda raw: edit_line(raw / "movies.dat", 20, "3::A::Drama"),
        ["movies.dat, line 20", "movie 3 appears a second time"],
    ),
    "gender X": (lambda raw: edit_line(raw / "users.dat", 6, "6::X::1::2::03"), ["users.dat, line 6", "found 'X'"]),
    "no genre": (lambda raw: edit_line(raw / "movies.dat", 6, "18::A::"), ["movies.dat, line 6", "genres are missing"]),
    "9 ratings": (
        lambda raw: (raw / "ratings.dat").write_text("1::3::5::1\n" * 9),
        ["9 rows are too few"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_raw_data_is_named_by_file_and_line(case, raw, tmp_path, capsys):
    spoil, words = BAD[case]
    spoil(raw)
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) in (["raw"], ["gone"])  # neither the dataset nor a temporary folder


def test_gzip_that_lacks_its_last_bytes_is_told(raw, tmp_path, capsys):
    packed = gzip.compress((raw / "ratings.dat").read_bytes())
    (raw / "ratings.dat").unlink()
    (raw / "ratings.dat.gz").write_bytes(packed[:-8])
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert "ratings.dat.gz: the gzip file is truncated or damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_line_of_a_later_block_is_numbered_from_the_start_of_the_file(raw, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("preprocessing.reading.raw_files.PIECE_BYTES", 1 << 10)
    edit_line(raw / "ratings.dat", 1777, "1::3::9::1")
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert "ratings.dat, line 1777: a rating must be" in capsys.readouterr().err


def test_windows_line_ends_are_the_same_data(raw, tmp_path):
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "a")]) == 0
    for path in raw.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "b")]) == 0
    a, b = folder_bytes(tmp_path / "a"), folder_bytes(tmp_path / "b")
    assert [name for name in a if a[name] != b[name]] == ["manifest.json"]


def test_full_disk_while_parts_are_written_is_told_and_leaves_nothing(tmp_path, command):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    result = command("synthetic", "--rows", 20_000, "--out", tmp_path / "out", prelude=limit)
    assert result.returncode == 2
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_place_that_is_no_folder_is_told(raw, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(out)]) == 2
    assert f"{out}: the dataset cannot be written" in capsys.readouterr().err


def start_and_stop(tmp_path, number):
    """Start a long run, send the signal as soon as parts are being written."""
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "preprocessing", "synthetic", "--rows", "2e7", "--out", str(out)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if list(tmp_path.glob(".out.tmp/train/*.parquet")):
            break
        time.sleep(0.05)
    else:
        pytest.fail("no part was begun")
    os.kill(process.pid, number)
    return process.wait(timeout=60), process.stderr.read(), out


def test_kill_leaves_nothing_that_passes_for_a_dataset_and_the_next_start_cleans_up(tmp_path):
    from mmlrec.errors import DataError
    from mmlrec.schema import DatasetManifest

    code, _, out = start_and_stop(tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not out.exists()
    left = list(tmp_path.iterdir())
    assert [p.name for p in left] == [".out.tmp"]
    with pytest.raises(DataError, match=r"no manifest\.json"):
        DatasetManifest.load(left[0])
    assert main(["synthetic", "--rows", "1000", "--out", str(out)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (out / "train/part-00001.parquet").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_removes_what_was_written(tmp_path, number):
    code, message, _ = start_and_stop(tmp_path, number)
    assert code == 130
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []
