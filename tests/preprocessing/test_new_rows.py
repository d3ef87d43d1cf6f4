"""`--like` and `--extend` on the command line: days of a log of one's own, what they tell, and what is refused."""

import csv
import json
import random
import re
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmlrec.encoding.encoder import Encoder
from mmlrec.schema import DatasetManifest
from mmlrec.storage.places import place, put_file
from preprocessing.command_line import main
from preprocessing.datasets.ijcai15 import Ijcai15
from tests.preprocessing.aliexpress_fake import write_aliexpress
from tests.preprocessing.fakes import FAKES
from tests.preprocessing.ijcai15_fake import write_ijcai15

CONFIG = {
    "files": ["day1.csv"],
    "features": {
        "user": {"kind": "id", "type": "int"},
        "item": {"kind": "id"},
        "page": {"kind": "id", "hash": {"num_buckets": 20}},
        "price": {"kind": "number"},
    },
    "tasks": [
        {"name": "click", "label": "clicked", "implied_by_next": True},
        {"name": "buy", "label": "clicked == 1 and paid > 0"},
    ],
    "scenario": {"column": "device", "values": {1: "phone", 2: "desktop"}},
    "keys": {"session": {"type": "string"}, "time": {"type": "datetime"}},
    "group_key": "session",
    "weight": "importance",
}
LABELS = ("clicked", "paid", "session", "time", "importance")


def log(seed, num_rows, new_ids=0.0):
    """Rows of a day; a share of them has ids of their own."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        new = draw.random() < new_ids
        clicked = int(draw.random() < 0.4)
        rows.append(
            {
                "user": draw.randrange(1000, 1010) if new else draw.randrange(30),
                "item": f"new{draw.randrange(5)}" if new else f"i{draw.randrange(12)}",
                "page": f"/p{draw.randrange(40)}",
                "price": round(draw.uniform(1, 99), 2),
                "device": draw.choice([1, 1, 2]),
                "clicked": clicked,
                "paid": clicked * draw.choice([0, 5]),
                "session": f"s{draw.randrange(50)}",
                "time": f"2024-05-0{draw.randrange(1, 9)}T10:00:00",
                "importance": draw.choice([0.5, 2]),
            }
        )
    return rows


def write(path, rows, without=()):
    columns = [name for name in rows[0] if name not in without]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def day1(tmp_path_factory):
    """A folder with day1.csv, its configuration, and the dataset `day1`."""
    folder = tmp_path_factory.mktemp("days")
    write(folder / "day1.csv", log(1, 900))
    (folder / "day.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["table", "--config", str(folder / "day.yaml"), "--out", str(folder / "day1")]) == 0
    return folder


def like(day1, out, *options, raw=None):
    return main(["table", "--like", str(day1 / "day1"), "--raw", str(raw or day1), "--out", str(out), *map(str, options)])


def rows_of(out, split):
    return pa.concat_tables([pq.read_table(out / part.path) for part in DatasetManifest.load(out).splits[split].parts])


def vocabulary(out, name):
    return {row["value"]: row["id"] for row in pq.read_table(out / f"vocab/{name}.parquet").to_pylist()}


def test_the_next_day_is_encoded_as_the_first_was(day1, tmp_path, capsys):
    """Against dictionaries and a formula: new ids, a price of 100,000, no labels."""
    rows = [*log(2, 300, new_ids=0.2), *log(3, 1)]
    rows[-1]["price"] = 100_000
    write(tmp_path / "day2.csv", rows, without=LABELS)
    capsys.readouterr()
    assert like(day1, tmp_path / "day2", "--files", "day2.csv", raw=tmp_path) == 0
    told = capsys.readouterr().out
    before, manifest = DatasetManifest.load(day1 / "day1"), DatasetManifest.load(tmp_path / "day2")
    assert manifest.encoding == before.encoding
    assert manifest.tables == before.tables
    assert list(manifest.splits) == ["test"]
    users, items = vocabulary(day1 / "day1", "user"), vocabulary(day1 / "day1", "item")
    low, high = before.preprocessing["dense_ranges"]["price"]
    found = {row["key.source_line"]: row for row in rows_of(tmp_path / "day2", "test").to_pylist()}
    assert found.keys() == set(range(2, len(rows) + 2))
    for line, row in enumerate(rows, start=2):
        here = found[line]
        assert here["key.source_file"] == "day2.csv"
        assert (here["user"], here["item"]) == (users.get(row["user"], 0), items.get(row["item"], 0))
        assert here["price"] == pytest.approx(min(max((row["price"] - low) / (high - low), 0), 1), abs=1e-6)
        assert here["sample.scenario"] == row["device"] - 1
        assert [here[f"label.{task}"] for task in ("click", "buy")] == [None, None]
        assert here["sample.weight"] == 1
        assert (here["key.session"], here["key.session_hash"], here["key.time"]) == (None, None, None)

    unseen = np.mean([row["item"] not in items for row in rows])
    outside = np.mean([not low <= row["price"] <= high for row in rows])
    assert 0.1 < unseen < 0.3
    lines = re.findall(r"^  (\w+) +test +(\S+(?: %)?) +(\S+(?: %)?) +0\.00 % +0\.00 %$", told, re.MULTILINE)
    assert {name: shares for name, *shares in lines} == {
        "user": [f"{100 * np.mean([row['user'] not in users for row in rows]):.2f} %", "-"],
        "item": [f"{100 * unseen:.2f} %", "-"],
        "price": ["-", f"{100 * outside:.2f} %"],
    }
    assert lines[-1][0] == "price"  # the worst first
    phones = [np.mean([row["device"] == 1 for row in some]) for some in (rows, log(1, 900))]
    (shares,) = re.findall(r"^  rows in phone +test +(\S+) % +(\S+) %$", told, re.MULTILINE)
    assert float(shares[0]) == pytest.approx(100 * phones[0], abs=0.01)
    assert float(shares[1]) == pytest.approx(100 * phones[1], abs=3)  # of train only
    assert "python -m apps.predict --run-dir RUN --input" in told
    assert "apps.evaluate" not in told


def test_known_ids_keep_their_rows_when_a_dataset_is_extended(day1, tmp_path):
    rows = log(2, 600, new_ids=0.3)
    write(tmp_path / "day2.csv", rows)
    arguments = ["table", "--extend", str(day1 / "day1"), "--raw", str(tmp_path), "--files", "day2.csv"]
    assert main([*arguments, "--out", str(tmp_path / "day2")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "refit"), "--refit-ranges"]) == 0
    before, manifest = DatasetManifest.load(day1 / "day1"), DatasetManifest.load(tmp_path / "day2")
    assert list(manifest.splits) == ["train", "valid", "test"]
    old, new = vocabulary(day1 / "day1", "item"), vocabulary(tmp_path / "day2", "item")
    assert {value: new[value] for value in old} == old
    assert {value for value in new if value not in old} == {f"new{k}" for k in range(5)}
    assert manifest.preprocessing["dense_ranges"] == before.preprocessing["dense_ranges"]
    assert DatasetManifest.load(tmp_path / "refit").preprocessing["dense_ranges"] != before.preprocessing["dense_ranges"]
    assert {"source_file", "source_line"} <= {*manifest.keys}  # of a table, in any case


def test_names_of_splits(day1, tmp_path):
    write(tmp_path / "day2.csv", log(2, 100))
    where = ("--files", "day2.csv", "--split")
    assert like(day1, tmp_path / "one", *where, "2024-05-02", raw=tmp_path) == 0
    assert list(DatasetManifest.load(tmp_path / "one").splits) == ["2024-05-02"]
    assert like(day1, tmp_path / "three", *where, "train,valid,test", raw=tmp_path) == 0
    assert [split.num_rows for split in DatasetManifest.load(tmp_path / "three").splits.values()] == [80, 10, 10]
    # The same again is nothing to do; other names are another dataset, and may take its place.
    assert like(day1, tmp_path / "one", *where, "2024-05-02", raw=tmp_path) == 0
    assert like(day1, tmp_path / "one", *where, "later", raw=tmp_path) == 2
    assert like(day1, tmp_path / "one", *where, "later", "--overwrite", raw=tmp_path) == 0
    # And it is a dataset to be like itself.
    arguments = ["table", "--like", str(tmp_path / "one"), "--raw", str(tmp_path), "--out", str(tmp_path / "again")]
    assert main(arguments) == 0
    assert DatasetManifest.load(tmp_path / "again").encoding == DatasetManifest.load(day1 / "day1").encoding
    shares = [DatasetManifest.load(tmp_path / name).preprocessing["new_rows"]["train"] for name in ("one", "again")]
    assert shares[0] == shares[1] is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--like", "{day1}", "--split", "a/b"], "'a/b' is no name of a split"),
        (["--like", "{day1}", "--split", ".."], "'..' is no name of a split"),
        (["--like", "{day1}", "--split", "vocab"], "'vocab' is no name of a split"),
        (["--like", "{day1}", "--split", "a,b"], "--split a,b: give one name for all rows, or train,valid,test"),
        (["--like", "{day1}", "--split", "test,valid,train"], "give one name for all rows, or train,valid,test"),
        (["--like", "{day1}", "--extend", "{day1}"], "--like and --extend exclude each other"),
        (["--like", "{day1}", "--refit-ranges"], "--refit-ranges goes with --extend: with --like everything stays"),
        (["--refit-ranges"], "--refit-ranges goes with --extend"),
        (["--config", "{folder}/day.yaml", "--split", "test"], "--split is for new rows: it goes with --like or --extend"),
        (["--config", "{folder}/day.yaml", "--files", "x.csv"], "--files is for new rows: it goes with --like or --extend"),
        (["--like", "{folder}"], "is neither a dataset nor a run: it has neither manifest.json nor encoder/manifest.json"),
        (["--like", "{folder}/nowhere"], "there is no such folder"),
        (["--like", "{folder}/old-run"], "a run without encoder/manifest.json: a release that did not keep the encoder"),
        (["--like", "{folder}/movies"], "holds 'movielens-1m', not 'table'"),
        (["--like", "{folder}/unrecorded"], "does not record its encoding"),
        (["--like", "{day1}", "--files", "gone.csv"], "no file 'gone.csv'"),
        (["--like", "{day1}", "--raw", "{day1}"], "or name the files of the new rows, --files PATTERN."),
        (["--like", "{day1}", "--files", "empty.csv"], "empty.csv: the file is empty"),
        (["--like", "{day1}", "--files", "no-item.csv"], "the header lacks item"),
        (
            ["--like", "{day1}", "--files", "tablet.csv"],
            "found 3. Known are: 1, 2. Leave the line out, or pass over it by --max",
        ),
        (["--extend", "{day1}", "--files", "tablet.csv"], "Known are: 1, 2. Leave the line out, or pass over it by --max-bad"),
        (
            ["--like", "{timed}", "--files", "bare.csv", "--split", "train,valid,test"],
            "can all go into one split, by --split NAME",
        ),
        (["--like", "{day1}", "--config", "{folder}/log.yaml"], "log.yaml encodes otherwise than"),
        (["--extend", "{day1}", "--files", "bare.csv"], "the header lacks clicked, paid"),
        (["--like", "{day1}", "--out", "{day1}", "--overwrite"], "is what --like names, which would be replaced"),
        (["--like", "{folder}/parity"], "parity is encoded as the reference benchmark does"),
    ],
)
def test_what_is_refused(day1, tmp_path, capsys, options, words):
    movies = DatasetManifest.load(day1 / "day1")
    for name, change in {
        "movies": {"name": "movielens-1m"},
        "unrecorded": {"encoding": None},
        "parity": {"parity": True},
    }.items():
        (tmp_path / name).mkdir()
        movies.model_copy(update=change).save(tmp_path / name)
    (tmp_path / "old-run").mkdir()
    (tmp_path / "old-run" / "config.yaml").write_text("")
    (tmp_path / "day.yaml").write_text(yaml.safe_dump(CONFIG))
    features = CONFIG["features"] | {"price": {"kind": "number", "scale": "log"}}
    (tmp_path / "log.yaml").write_text(yaml.safe_dump(CONFIG | {"features": features}))
    for name in ("day1.csv", "day2.csv"):
        write(tmp_path / name, log(2, 50))
    write(tmp_path / "no-item.csv", log(2, 50), without=("item",))
    write(tmp_path / "bare.csv", log(2, 50), without=LABELS)
    (tmp_path / "empty.csv").write_text("")
    write(tmp_path / "tablet.csv", [*log(2, 50), log(2, 1)[0] | {"device": 3}])
    (tmp_path / "timed.yaml").write_text(yaml.safe_dump(CONFIG | {"split": {"rule": "time", "key": "time"}}))
    if "{timed}" in options:
        assert main(["table", "--config", str(tmp_path / "timed.yaml"), "--out", str(tmp_path / "timed")]) == 0
    given = [option.format(day1=day1 / "day1", timed=tmp_path / "timed", folder=tmp_path) for option in options]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    before = (day1 / "day1" / "manifest.json").read_bytes()
    assert main(["table", "--raw", str(tmp_path), *given, *out]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert (day1 / "day1" / "manifest.json").read_bytes() == before
    if "log.yaml" in words:
        assert ": feature price. Leave it away" in error


def test_without_raw_it_is_asked_for(day1, tmp_path, capsys):
    assert main(["table", "--like", str(day1 / "day1"), "--out", str(tmp_path / "out")]) == 2
    assert "--raw is missing: the folder of the new files" in capsys.readouterr().err


def test_generated_data_are_refused(tmp_path, capsys):
    assert main(["synthetic", "--rows", "100", "--out", str(tmp_path / "data")]) == 0
    assert main(["synthetic", "--like", str(tmp_path / "data"), "--out", str(tmp_path / "more")]) == 2
    assert "synthetic is generated and comes encoded: there are no new rows" in capsys.readouterr().err


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    """MovieLens-1M, its raw files and the dataset `made`."""
    folder = tmp_path_factory.mktemp("movies")
    raw = FAKES["movielens-1m"].write(folder / "raw")
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(folder / "made"), "--scenario", "age3"]) == 0
    return folder


def test_options_come_from_the_manifest_and_those_that_change_the_encoding_are_refused(movies, tmp_path, capsys):
    arguments = ["movielens-1m", "--like", str(movies / "made"), "--raw", str(movies / "raw"), "--out"]
    assert main([*arguments, str(tmp_path / "new")]) == 0
    manifest = DatasetManifest.load(tmp_path / "new")
    assert manifest.scenario == DatasetManifest.load(movies / "made").scenario
    assert manifest.preprocessing["scenario"] == "age3"
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "other"), "--scenario", "gender"]) == 2
    assert "--like: --scenario gender encodes otherwise than" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "same"), "--scenario", "age3", "--seed", "7"]) == 0
    assert main([*arguments, str(tmp_path / "parity"), "--parity"]) == 2
    assert "--parity asks to be encoded as the reference benchmark does" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_lines_without_a_header_have_a_field_less_or_an_empty_one(movies, tmp_path):
    """A file of ratings that nobody has given yet, in both forms: the same rows."""
    lines = [line.split("::") for line in (movies / "raw" / "ratings.dat").read_text().splitlines()[:500]]
    found = []
    for name, kept in (("left-out", lambda line: [*line[:2], line[3]]), ("empty", lambda line: [*line[:2], "", line[3]])):
        raw = tmp_path / name
        raw.mkdir()
        for file in ("users.dat", "movies.dat"):
            (raw / file).symlink_to(movies / "raw" / file)
        (raw / "ratings.dat").write_text("".join("::".join(kept(line)) + "\n" for line in lines))
        out = tmp_path / f"{name}-out"
        assert main(["movielens-1m", "--like", str(movies / "made"), "--raw", str(raw), "--out", str(out)]) == 0
        found.append(rows_of(out, "test"))
    assert found[0].equals(found[1])
    assert found[0]["label.label2"].null_count == len(found[0]) == 500
    keys = zip(*(found[0][f"key.{name}"].to_pylist() for name in ("source_line", "user", "movie", "timestamp")), strict=True)
    assert sorted(keys) == [(n, int(user), int(movie), int(time)) for n, (user, movie, _, time) in enumerate(lines, start=1)]


def test_some_of_the_files_with_rows_are_enough(tmp_path, capsys):
    """Of AliExpress the test pair of one country; both files of it; and not none."""
    raw = write_aliexpress(tmp_path / "raw", num_searches=200)
    assert main(["aliexpress", "--raw", str(raw), "--out", str(tmp_path / "made")]) == 0
    some = tmp_path / "some"
    some.mkdir()
    pair = sorted(path for path in raw.rglob("*") if path.name.startswith("NL_") and "test" in path.name)
    assert len(pair) == 2
    arguments = ["aliexpress", "--like", str(tmp_path / "made"), "--raw", str(some), "--out", str(tmp_path / "new")]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "lacks: NL_user_train.csv, NL_item_train.csv" in capsys.readouterr().err
    (some / pair[0].name).symlink_to(pair[0])
    assert main(arguments) == 2
    assert re.search(r"lacks: NL_(user|item)_test.csv \(", capsys.readouterr().err)
    (some / pair[1].name).symlink_to(pair[1])
    assert main(arguments) == 0
    manifest = DatasetManifest.load(tmp_path / "new")
    assert manifest.splits["test"].scenario_rows["ES"] == 0
    assert manifest.splits["test"].scenario_rows["NL"] == manifest.splits["test"].num_rows > 0


def test_lists_of_events_without_days_and_actions(tmp_path):
    """IJCAI-15, format 2: entries item:cat:brand:: of lines without a label."""
    raw = write_ijcai15(tmp_path / "raw", 300)
    out, name = tmp_path / "made", Ijcai15.name
    assert main([name, "--form", "2", "--raw", str(raw), "--out", str(out)]) == 0
    assert main([name, "--like", str(out), "--raw", str(raw), "--out", str(tmp_path / "with")]) == 0
    text = (raw / "train_format2.csv").read_text()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "train_format2.csv").write_text(re.sub(r":\d+:[0-3](?=[#\n])", "::", text))
    assert main([name, "--like", str(out), "--raw", str(bare), "--out", str(tmp_path / "without")]) == 0
    features = [feature.name for feature in DatasetManifest.load(out).features]
    old, new = (rows_of(tmp_path / which, "test") for which in ("with", "without"))
    assert new["label.label2"].null_count == new["key.time_stamp"].null_count == len(new) > 0
    assert old["label.label2"].null_count == 0
    assert old.select([*features, "key.source_line"]).equals(new.select([*features, "key.source_line"]))


@pytest.mark.parametrize("option", ["--like", "--extend"])
def test_all_of_it_in_an_object_store(day1, tmp_path, store, capsys, option):
    """The other dataset, the raw files and the new dataset: as on disk, and no dataset is replaced by what is like it."""
    write(tmp_path / "day2.csv", log(2, 200, new_ids=0.2))
    there = {name: f"{store.address}/{name}" for name in ("one", "raw", "two")}
    for path in [path for path in (day1 / "day1").rglob("*") if path.is_file()]:
        put_file(path, place(f"{there['one']}/{path.relative_to(day1 / 'day1').as_posix()}"))
    put_file(tmp_path / "day2.csv", place(f"{there['raw']}/day2.csv"))
    stored = ["table", option, there["one"], "--raw", there["raw"], "--files", "day2.csv", "--out"]
    assert main([*stored, there["two"]]) == 0
    local = ["table", option, str(day1 / "day1"), "--raw", str(tmp_path), "--files", "day2.csv", "--out", str(tmp_path / "two")]
    assert main(local) == 0
    found, right = DatasetManifest.load(place(there["two"])), DatasetManifest.load(tmp_path / "two")
    assert found.encoding == right.encoding
    assert found.splits == right.splits  # with the checksum of each part
    assert Encoder.load(there["two"]).facts == Encoder.load(tmp_path / "two").facts
    capsys.readouterr()
    assert main([*stored, f"{there['one']}/", "--overwrite"]) == 2
    assert f"is what {option} names, which would be replaced" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["lines", "columns"])
def test_another_configuration_says_how_the_new_files_are_written(day1, tmp_path, form):
    """JSON lines in place of CSV; a CSV without header whose columns have other names."""
    rows = log(4, 60)
    write(tmp_path / "plain.csv", rows, without=LABELS)
    assert like(day1, tmp_path / "plain", "--files", "plain.csv", raw=tmp_path) == 0
    config = CONFIG | {"files": ["new.dat"]}
    if form == "lines":
        config |= {"format": "json"}
        kept = [{name: value for name, value in row.items() if name not in LABELS} for row in rows]
        (tmp_path / "new.dat").write_text("".join(json.dumps(row) + "\n" for row in kept))
    else:
        names = ["device", "price", "page", "item", "uid"]
        features = CONFIG["features"] | {"user": {"kind": "id", "type": "int", "column": "uid"}}
        config |= {"features": features, "csv": {"header": False, "columns": names, "separator": ";"}}
        lines = [";".join(str(row["user" if name == "uid" else name]) for name in names) for row in rows]
        (tmp_path / "new.dat").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(config))
    options = ("--config", tmp_path / "new.yaml", "--raw", tmp_path)
    assert like(day1, tmp_path / "other", *options) == 0
    tables = [rows_of(tmp_path / name, "test") for name in ("plain", "other")]
    features = [*CONFIG["features"], "sample.scenario"]
    assert tables[0].select(features).equals(tables[1].select(features))


def test_a_table_that_files_divide_takes_new_files_into_one_split(tmp_path, capsys):
    for number, name in enumerate(("train.csv", "valid.csv", "test.csv", "new.csv")):
        write(tmp_path / name, log(number, 80))
    rule = {"rule": "file", "train": ["train.csv"], "valid": ["valid.csv"], "test": ["test.csv"]}
    config = {key: value for key, value in CONFIG.items() if key != "files"} | {"split": rule}
    (tmp_path / "files.yaml").write_text(yaml.safe_dump(config))
    assert main(["table", "--config", str(tmp_path / "files.yaml"), "--out", str(tmp_path / "made")]) == 0
    arguments = ["table", "--like", str(tmp_path / "made"), "--raw", str(tmp_path), "--files", "new.csv", "--out"]
    assert main([*arguments, str(tmp_path / "new")]) == 0
    assert DatasetManifest.load(tmp_path / "new").splits["test"].num_rows == 80
    assert main([*arguments, str(tmp_path / "three"), "--split", "train,valid,test"]) == 2
    assert "--files: the files of this table say the split" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "random", "fractions": [0.5, 0.25, 0.25]},
        {"rule": "group", "key": "session", "fractions": [0.6, 0.2, 0.2]},
        {"rule": "time", "key": "time", "cuts": [date(2024, 5, 4), date(2024, 5, 7)]},
        {"rule": "time", "key": "time", "cuts": [datetime(2024, 5, 4, 12), datetime(2024, 5, 7, tzinfo=UTC)]},
    ],
    ids=lambda rule: " ".join(map(str, rule.values())),
)
def test_the_rule_of_the_split_comes_from_the_manifest(tmp_path, rule):
    """The rows of the dataset once more are divided as they were."""
    write(tmp_path / "day1.csv", log(1, 200))
    (tmp_path / "day.yaml").write_text(yaml.safe_dump(CONFIG | {"split": rule}))
    assert main(["table", "--config", str(tmp_path / "day.yaml"), "--out", str(tmp_path / "made")]) == 0
    assert main(["table", "--extend", str(tmp_path / "made"), "--raw", str(tmp_path), "--out", str(tmp_path / "again")]) == 0
    assert DatasetManifest.load(tmp_path / "again").tables == DatasetManifest.load(tmp_path / "made").tables
    for split in ("train", "valid", "test"):
        assert rows_of(tmp_path / "again", split).equals(rows_of(tmp_path / "made", split))


def test_describe_shows_the_drift_and_draws_it(day1, tmp_path, capsys):
    write(tmp_path / "day2.csv", log(2, 200, new_ids=0.25))
    assert like(day1, tmp_path / "day2", "--files", "day2.csv", "--split", "later", raw=tmp_path) == 0
    capsys.readouterr()
    assert main(["describe", str(tmp_path / "day2"), "--page", str(tmp_path / "page.html")]) == 0
    text, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    counts = DatasetManifest.load(tmp_path / "day2").statistics["against_train"]["item"]["later"]
    share = f"{100 * counts['unseen'] / counts['values']:.2f} %"
    assert re.search(rf"^item +later +{re.escape(share)} +- ", text, re.MULTILINE)
    assert "Shares against train" in text
    assert "<h2>Against train</h2>" in page
    assert page.count(share) >= 1
    assert "item, later" in page  # a bar of the plot


def test_help_shows_the_options(capsys):
    for name, text in (("movielens-1m", "--split NAME"), ("amazon-2018", "With one of them, --split NAME is of new rows")):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert "--like DATASET_OR_RUN" in told
        assert text in told
