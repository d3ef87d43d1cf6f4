"""Spark makes the same bytes as the local engine, whose output other tests compare with the raw files row by row."""

import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from mmlrec.schema import DatasetManifest
from mmlrec.storage.places import place
from preprocessing.command_line import main
from preprocessing.dataset import dataset_class
from preprocessing.engines import spark_pieces
from preprocessing.writing import parts, shuffle
from tests.preprocessing.fakes import FAKES
from tests.preprocessing.movielens_fake import folder_bytes, write_movielens
from tests.preprocessing.table_fake import records, write_csv, write_table
from tests.preprocessing.table_fake import small as small_table

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "valid", "test")
IN_ONE_GO = {"aliexpress", "synthetic"}


@pytest.fixture(scope="module")
def spark():
    """A SparkContext that all runs of this file share."""
    pyspark = pytest.importorskip("pyspark")
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        pytest.skip("there is no Java")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    settings = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false", "spark.log.level": "OFF"}
    conf = pyspark.SparkConf().setAppName("tests").setMaster("local[2]").setAll(settings.items())
    context = pyspark.SparkContext(conf=conf)
    yield context
    context.stop()


@pytest.fixture
def small(monkeypatch):
    """Many pieces, buckets and parts in little data."""
    monkeypatch.setattr(spark_pieces, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(parts, "PART_ROWS", 1024)
    monkeypatch.setattr(shuffle, "BUCKET_ROWS", 300)


def make(name, arguments, out, engine):
    return main([name, *arguments, "--out", str(out), "--engine", engine])


def both(name, arguments, folder):
    """The bytes of the two folders, by file."""
    made = []
    for engine in ("local", "spark"):
        assert make(name, arguments, folder / engine, engine) == 0
        made.append(folder_bytes(folder / engine))
    return made


def rows_of(folder, split):
    return pa.concat_tables([pq.read_table(path) for path in sorted((folder / split).glob("*.parquet"))])


FORMS = ["movielens-1m", "census-income", "amazon-2018 time", "criteo npy", "kuairec"]
FORMS = [form for form in FORMS if form in FAKES] + [
    pytest.param(form, marks=pytest.mark.long) for form in FAKES if form not in FORMS and form.split()[0] not in IN_ONE_GO
]


@pytest.mark.parametrize("form", FORMS)
def test_same_bytes_as_the_local_engine(form, spark, small, tmp_path, monkeypatch):
    fake = FAKES[form]
    raw = fake.write(tmp_path / "raw")
    largest = max(path.stat().st_size for path in raw.rglob("*") if path.is_file())
    monkeypatch.setattr(spark_pieces, "PIECE_BYTES", largest // 7)
    local, on_spark = both(form.split()[0], fake.arguments(raw), tmp_path)
    assert local.keys() == on_spark.keys()
    assert [name for name in local if local[name] != on_spark[name]] == []


@pytest.mark.parametrize(
    "options",
    [
        ("--like", "--split", "later"),
        ("--extend",),
        pytest.param(("--extend", "--refit-ranges"), marks=pytest.mark.long),
        pytest.param(("--like", "--split", "train,valid,test"), marks=pytest.mark.long),
        pytest.param(("--extend", "--split", "train"), marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_later_rows_with_fitted_parts_given(options, spark, small, tmp_path):
    """Frozen, growing and refitted: the same bytes, and the same counts of what train did not know."""
    write_table(tmp_path / "raw", num_rows=600)
    rows = records(900, seed=5)
    for k, row in enumerate(rows):
        row["item"] = row["item"] if k % 4 else f"new {k % 30}"
        row["price"] = row["price"] if k % 7 else 1e5 * (-1) ** k
    write_csv(tmp_path / "new" / "a-rows.csv", rows[:500])
    write_csv(tmp_path / "new" / "b-rows.csv", rows[500:])
    assert make("table", ["--config", str(tmp_path / "raw/my_table.yaml")], tmp_path / "one", "local") == 0
    new = [options[0], str(tmp_path / "one"), "--raw", str(tmp_path / "new"), *options[1:]]
    local, on_spark = both("table", new, tmp_path)
    assert local.keys() == on_spark.keys()
    assert [name for name in local if local[name] != on_spark[name]] == []
    one, manifest = DatasetManifest.load(tmp_path / "one"), DatasetManifest.load(tmp_path / "spark")
    assert (manifest.encoding == one.encoding) == (options[0] == "--like")
    against = manifest.statistics["against_train"]
    assert (
        min(sum(split["unseen"] for split in against["item"].values()), sum(s["outside"] for s in against["price"].values()))
        > 50
    )


@pytest.mark.parametrize("option", ["--like", pytest.param("--extend", marks=pytest.mark.long)])
def test_fitted_parts_that_lie_on_an_object_store(option, spark, small, tmp_path, store):
    """Rows and result lie in folders, as Spark wants; the dataset that they are encoded like need not."""
    write_table(tmp_path / "raw", num_rows=600)
    for name in ("a", "b"):
        write_csv(tmp_path / "new" / f"{name}-rows.csv", records(250, seed=ord(name)))
    assert make("table", ["--config", str(tmp_path / "raw/my_table.yaml")], tmp_path / "one", "local") == 0
    there = place(store.address) / "one"
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            there.joinpath(*path.relative_to(tmp_path / "one").parts).write_bytes(path.read_bytes())
    new = [option, str(there), "--raw", str(tmp_path / "new"), "--split", "later"]
    local, on_spark = both("table", new if option == "--like" else new[:-2], tmp_path)
    assert local.keys() == on_spark.keys()
    assert [name for name in local if local[name] != on_spark[name]] == []


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.long) for form in FAKES if form.split()[0] not in IN_ONE_GO]
)
def test_every_dataset_with_the_fitted_parts_of_another_seed(form, spark, small, tmp_path):
    """Split otherwise, train knows other values."""
    fake = FAKES[form]
    raw = fake.write(tmp_path / "raw")
    name = form.split()[0]
    assert make(name, [*fake.arguments(raw), "--seed", "7"], tmp_path / "one", "local") == 0
    for word in ("--like", "--extend"):
        local, on_spark = both(name, [word, str(tmp_path / "one"), "--raw", str(raw)], tmp_path / word[2:])
        assert [name for name in local if local[name] != on_spark[name]] == []


@pytest.mark.parametrize("policy", ["keep", "keep_together"])
def test_equal_rows_and_missing_values_are_counted_as_locally(policy, spark, small, tmp_path):
    (tmp_path / "raw").mkdir()
    cells = [("" if i % 7 == 0 else i % 90, "" if i % 5 == 0 else i % 3) for i in range(3000)]
    rows = [f"u{i % 40},{x},{tag}|{i % 2},{(i % 4) / 8},{(i % 4) / 2}" for i, (x, tag) in enumerate(cells)]
    (tmp_path / "raw" / "a.csv").write_text("\n".join(["user,x,tags,amount,weight", *rows]) + "\n")
    (tmp_path / "raw" / "t.yaml").write_text(
        "files: [a.csv]\n"
        "features: {user: {kind: id}, x: {kind: number}, tags: {kind: ids, separator: '|'}}\n"
        "tasks: [{name: amount, label: amount, kind: regression}]\n"
        "weight: weight\nkeys: {user: {type: string}}\ngroup_key: user\n"
    )
    arguments = ["--config", str(tmp_path / "raw" / "t.yaml"), "--duplicates", policy]
    local, on_spark = both("table", arguments, tmp_path)
    assert [name for name in local if local[name] != on_spark[name]] == []
    statistics = DatasetManifest.load(tmp_path / "spark").statistics
    assert statistics["duplicates"]["rows"] == 3000 - len(set(rows)) > 400
    assert sum(statistics["missing"]["x"].values()) == 429
    assert statistics["label_values"]["amount"]["all"]["all"]["greatest"] == 0.375
    assert statistics["weights"]["train"]["greatest"] == 1.5
    lines = {row for split in SPLITS for row in rows_of(tmp_path / "spark", split)["key.source_line"].to_pylist()}
    assert lines == set(range(2, 3002))


@pytest.mark.parametrize("options", [["--parity"], ["--seed", "5", "--scenario", "none"]])
def test_options_are_obeyed(options, spark, small, raw, tmp_path):
    local, on_spark = both("movielens-1m", ["--raw", str(raw), *options], tmp_path)
    assert local == on_spark


def test_packed_files_are_the_same_data(spark, small, raw, tmp_path):
    assert make("movielens-1m", ["--raw", str(raw)], tmp_path / "plain", "spark") == 0
    for path in list(raw.iterdir()):
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert make("movielens-1m", ["--raw", str(raw)], tmp_path / "packed", "spark") == 0
    plain, packed = folder_bytes(tmp_path / "plain"), folder_bytes(tmp_path / "packed")
    assert [name for name in plain if plain[name] != packed[name]] == ["manifest.json"]  # which has the raw files' digests


@pytest.mark.parametrize("packed", [False, True])
def test_blank_lines_comments_marks_and_means_of_a_table(packed, spark, tmp_path, monkeypatch):
    """The header stands behind the first piece; the mean of the train rows is that of the local engine to the last bit."""
    monkeypatch.setattr(spark_pieces, "PIECE_BYTES", 700)
    rows = [f"u{k % 7}.0, {'NA' if k % 3 == 0 else k / 7},{k % 2}\n" + ("\n" if k % 5 == 0 else "") for k in range(600)]
    text = "# a comment\n" * 100 + "\nuser,x,y\n" + "".join(rows)
    features = {"user": {"kind": "id"}, "x": {"kind": "number", "indicator": True}}
    options = {"missing": ["NA"], "strip": True, "csv": {"comment": "#"}, "features": features}
    name = "rows.csv.gz" if packed else "rows.csv"
    config = small_table(tmp_path, gzip.compress(text.encode()) if packed else text, name, **options)
    local, on_spark = both("table", ["--config", str(config)], tmp_path)
    assert local == on_spark
    bad = small_table(tmp_path, text + "u1,one,0\n", "bad.csv", **options)
    for engine in ("local", "spark"):
        assert make("table", ["--config", str(bad)], tmp_path / "bad", engine) == 2


@pytest.mark.parametrize("rule", ["time", *(pytest.param(rule, marks=pytest.mark.long) for rule in ("random", "group"))])
def test_tables_of_other_shares_with_booleans_and_times_since_1970(rule, spark, small, tmp_path):
    text = "user\tmy flag\tts\ty\n" + "".join(
        f"u{k % 9}\t{k % 3 == 0}\t{1_704_164_645_000 + 7000 * k}\t{k % 2}\n" for k in range(2000)
    )
    config = small_table(
        tmp_path,
        text,
        "rows.tsv",
        features={"user": {"kind": "id"}, "flag": {"kind": "number", "column": "my flag", "allow_label_feature": True}},
        tasks=[{"name": "y", "label": "y"}, {"name": "z", "label": "`my flag` == true"}],
        keys={"ts": {"type": "datetime", "format": "milliseconds"}},
        split={"rule": rule, "fractions": [0.6, 0.3, 0.1]} | ({} if rule == "random" else {"key": "ts"}),
    )
    local, on_spark = both("table", ["--config", str(config)], tmp_path)
    assert local == on_spark


@pytest.mark.parametrize("ending", [b"", b"\r\n"])
def test_last_line_without_line_end_and_windows_line_ends(ending, spark, small, raw, tmp_path):
    text = (raw / "ratings.dat").read_bytes().rstrip(b"\n")
    (raw / "ratings.dat").write_bytes(text.replace(b"\n", ending) if ending else text)
    local, on_spark = both("movielens-1m", ["--raw", str(raw)], tmp_path)
    assert local == on_spark


def test_reader_reads_every_row_of_several_parts_once(spark, small, tmp_path):
    from mmlrec.data.reader import Reader
    from mmlrec.schema import DatasetManifest

    raw, out = write_movielens(tmp_path / "raw", 6000), tmp_path / "out"
    assert make("movielens-1m", ["--raw", str(raw)], out, "spark") == 0
    manifest = DatasetManifest.load(out)
    assert len(manifest.splits["train"].parts) == 5
    found = Counter()
    reader = Reader(out, manifest, "train", tasks=["label2", "label3"], batch_size=512)
    for batch in reader.epoch(0):
        features = {key: jagged.to_dense() for key, jagged in batch.sparse.to_dict().items()}
        for i in np.flatnonzero(batch.valid.numpy()):
            ids = [tuple(features[f.name][i].tolist()) for f in manifest.sparse_features]
            found[(*ids, *batch.labels[i].tolist(), int(batch.scenario[i]), int(batch.group[i]))] += 1
    wanted = Counter()
    for row in rows_of(out, "train").to_pylist():
        ids = [tuple(row[f.name]) if f.kind == "multi" else (row[f.name],) for f in manifest.sparse_features]
        wanted[(*ids, row["label.label2"], row["label.label3"], row["sample.scenario"], row["key.user"])] += 1
    assert found == wanted
    assert found.total() == 4800


def spoil_lines(path, lines):
    text = path.read_text(encoding="iso-8859-1").split("\n")
    for number, line in lines.items():
        text[number - 1] = line
    path.write_text("\n".join(text), encoding="iso-8859-1")


BAD = {
    "two bad rows, far apart": lambda raw: spoil_lines(raw / "ratings.dat", {1900: "1::3::9::1", 700: "5::6::3"}),
    "bytes that do not decode": lambda raw: spoil_lines(raw / "ratings.dat", {1000: "1::3::\xff::1"}),
    "unknown movie": lambda raw: spoil_lines(raw / "ratings.dat", {1234: "5::7::3::1"}),
    "side file": lambda raw: spoil_lines(raw / "users.dat", {6: "6::X::1::2::03"}),
    "empty": lambda raw: (raw / "ratings.dat").write_text(""),
    "no good row": lambda raw: (raw / "ratings.dat").write_text("x\n" * 30),
    "page": lambda raw: (raw / "ratings.dat").write_text("<!DOCTYPE html>\n<html>"),
    "too few rows": lambda raw: (raw / "ratings.dat").write_text("1::3::5::1\n" * 9),
    "truncated": lambda raw: (raw / "ratings.dat").write_bytes(gzip.compress(os.urandom(9000))[:-2000]),
}


@pytest.mark.parametrize("case", BAD)
def test_complaint_is_that_of_the_local_engine_and_nothing_is_left(case, spark, small, raw, tmp_path, capfd):
    BAD[case](raw)
    messages = []
    for engine in ("local", "spark"):
        assert make("movielens-1m", ["--raw", str(raw)], tmp_path / "out", engine) == 2
        (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        messages.append(error)
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    assert messages[0] == messages[1]


@pytest.mark.parametrize(("limit", "code"), [(2, 2), (3, 0)])
def test_bad_rows_are_told_counted_and_limited_as_locally(limit, code, spark, small, raw, tmp_path, capfd):
    spoil_lines(raw / "ratings.dat", {2: "1::3::9::1", 900: "", 1800: "5::7::3::1"})
    told = []
    for engine in ("local", "spark"):
        arguments = ["--raw", str(raw), "--max-bad-rows", str(limit)]
        assert make("movielens-1m", arguments, tmp_path / engine, engine) == code
        told.append([line for line in capfd.readouterr().err.splitlines() if line.startswith(("skipped: ", "error: "))])
    assert told[0] == told[1]
    assert len(told[0]) == 3
    if code == 0:
        assert folder_bytes(tmp_path / "local") == folder_bytes(tmp_path / "spark")


def test_first_file_with_something_wrong_is_told(spark, small, tmp_path, capfd):
    """Line 40 of the first of two files comes before all that is wrong with the second."""
    raw = FAKES["adult-income"].write(tmp_path / "raw")
    spoil_lines(raw / "adult.data", {40: "39, Private"})
    (raw / "adult.test").write_text("")
    assert make("adult-income", ["--raw", str(raw)], tmp_path / "out", "spark") == 2
    assert "adult.data, line 40: 15 fields" in capfd.readouterr().err


def test_datasets_that_are_read_in_one_go_are_refused(tmp_path, capsys):
    assert make("synthetic", ["--rows", "1000"], tmp_path / "out", "spark") == 2
    message = capsys.readouterr().err
    assert "synthetic is read in one go" in message
    for name in {form.split()[0] for form in FAKES} - IN_ONE_GO:
        assert name in message.partition("works for:")[2]
    assert list(tmp_path.iterdir()) == []


def test_missing_pyspark_is_told(raw, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    assert make("movielens-1m", ["--raw", str(raw)], tmp_path / "out", "spark") == 2
    assert "pip install 'mmlrec[spark]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_failure_on_an_executor_is_told_in_one_line(spark, raw, tmp_path, capfd, monkeypatch):
    def rows(self, block):
        raise RuntimeError("out of luck")

    def reduce(self):  # sent by value: executors have not been patched
        return dataset_class, ("movielens-1m",)

    kind = dataset_class("movielens-1m")
    monkeypatch.setattr(kind, "__reduce__", reduce, raising=False)  # executors then find a class in the dataset's place
    assert make("movielens-1m", ["--raw", str(raw)], tmp_path / "out", "spark") == 2
    message = capfd.readouterr().err
    assert "error: --engine spark: a job failed: TypeError: " in message
    assert "\tat " not in message
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def spark_command(raw, out):
    return [sys.executable, "-m", "preprocessing", "movielens-1m", "--raw", str(raw), "--out", str(out), "--engine", "spark"]


def test_terminal_shows_no_log_of_spark(spark, raw, tmp_path):
    result = subprocess.run(spark_command(raw, tmp_path / "out"), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("WARNING: Using incubator modules")]
    assert [line.partition(":")[0] for line in lines] == ["movielens-1m"] * 3
    assert "Run next" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_leaves_nothing_that_passes_for_a_dataset(number, spark, tmp_path):
    raw = write_movielens(tmp_path / "raw", 200_000)
    process = subprocess.Popen(spark_command(raw, tmp_path / "out"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "count values" in line:
            break
    time.sleep(0.5)
    process.send_signal(number)
    message = process.stderr.read()
    assert process.wait(timeout=60) == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    assert {path.name for path in tmp_path.iterdir()} <= {"raw", ".out.tmp"}
    if number == signal.SIGTERM:
        assert message.splitlines()[-1] == "interrupted; nothing was left behind."
        assert "Traceback" not in message
        assert not (tmp_path / ".out.tmp").exists()
    assert make("movielens-1m", ["--raw", str(raw)], tmp_path / "out", "local") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "out"}


def same_rows_after_sorting(one, other):
    for split in SPLITS:
        tables = [rows_of(folder, split) for folder in (one, other)]
        columns = [name for name in tables[0].column_names if not pa.types.is_list(tables[0][name].type)]
        first, second = (table.sort_by([(name, "ascending") for name in columns]) for table in tables)
        assert first.equals(second)


@pytest.mark.long
def test_movielens_1m(spark, real_data, tmp_path):
    folder = real_data("ml-1m")
    both("movielens-1m", ["--raw", str(folder)], tmp_path)
    same_rows_after_sorting(tmp_path / "local", tmp_path / "spark")
    assert folder_bytes(tmp_path / "local") == folder_bytes(tmp_path / "spark")


@pytest.mark.long
def test_million_rows_like_criteo(spark, tmp_path):
    raw = write_like_criteo(tmp_path / "raw", 1_000_000)
    both("criteo", ["--raw", str(raw), "--form", "kaggle"], tmp_path)
    same_rows_after_sorting(tmp_path / "local", tmp_path / "spark")
    assert folder_bytes(tmp_path / "local") == folder_bytes(tmp_path / "spark")


def write_like_criteo(folder, num_rows):
    """train.txt: a label, 13 integers and 26 hexadecimal ids of 3 to 300,000 values with a long tail; a tenth is missing."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with (folder / "train.txt").open("wb") as file:
        for _ in range(0, num_rows, 100_000):
            n = min(100_000, num_rows)
            columns = {"label": random.integers(0, 2, n)}
            for k in range(13):
                columns[f"i{k}"] = pa.array(random.geometric(0.01 * (k + 1), n) - 2, mask=random.random(n) < 0.1)
            for k, size in enumerate(np.geomspace(3, 3e5, 26).astype(int)):
                ids = (size * random.random(n) ** 4).astype(np.uint64) * np.uint64(2654435761) % np.uint64(1 << 32)
                text = np.char.mod("%08x", ids)
                columns[f"c{k}"] = pa.array(text, mask=random.random(n) < 0.1)
            options = pa.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
            pa.csv.write_csv(pa.table(columns), file, options)
    return folder
