"""A table of one's own from its files to scores, by the commands: text ids as groups, weights, one task, numbers alone."""

import csv
import json
import random
import shlex
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from mmlrec.data.reader import Reader
from mmlrec.hashing import hash_ids
from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main

CONFIG = {
    "files": ["log"],
    "features": {name: {"kind": "number"} for name in ("a", "b")},
    "tasks": [{"name": "click", "label": "clicked"}],
    "keys": {"user": {"type": "string"}},
    "group_key": "user",
    "weight": "importance",
}
USERS = [f"Zoë {number}" for number in range(12)]


def write_log(folder, **changes):
    """Two files below `folder`; returns (file, line) -> row."""
    draw = random.Random(3)
    rows = {}
    (folder / "log").mkdir(parents=True)
    for name, count in (("one.csv", 500), ("two, part.csv", 300)):
        with (folder / "log" / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["user", "a", "b", "importance", "clicked"], lineterminator="\n")
            writer.writeheader()
            for line in range(2, count + 2):
                a, b = draw.gauss(0, 1), draw.gauss(0, 1)
                row = {
                    "user": draw.choice(USERS),
                    "a": a,
                    "b": b,
                    "importance": draw.choice([0, 0.5, 2]),
                    "clicked": int(a - b + draw.gauss(0, 1) > 0),
                }
                writer.writerow(row)
                rows[f"log/{name}", line] = row
    (folder / "table.yaml").write_text(yaml.safe_dump(CONFIG | changes, allow_unicode=True))
    return rows


def make(folder, *options):
    return main(["table", "--config", str(folder / "table.yaml"), "--out", str(folder / "data"), *options])


def read(folder):
    return [row for split in ("train", "valid", "test") for row in pq.read_table(folder / "data" / split).to_pylist()]


def place(row):
    return row["key.source_file"], row["key.source_line"]


def test_one_task_of_numbers_with_groups_of_text_from_files_to_scores(tmp_path, capfd, run_app):
    rows = write_log(tmp_path, weight=None)  # weights have a say in the report
    assert make(tmp_path) == 0
    told = capfd.readouterr().out
    assert "rows of the tables" not in told
    command = shlex.split(told[told.index("python -m apps.train") :])[3:]
    schedule = ["training.batch_size=64", "training.max_steps=60", "dense.optimizer.lr=0.02"]
    code, error = run_app("train", *command, "--run-dir", tmp_path / "run", *schedule)
    assert code == 0, error
    output = tmp_path / "scores.jsonl"
    code, error = run_app("predict", "--run-dir", tmp_path / "run", "--input", tmp_path / "data", "--output", output)
    assert code == 0, error
    scores = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len({place(row) for row in scores}) == len(scores) == 80
    groups = defaultdict(list)
    for row in scores:
        raw = rows[place(row)]
        assert (row["key.user"], row["label.click"]) == (raw["user"], raw["clicked"])
        groups[row["key.user"]].append((row["label.click"], row["score.click"]))
    mixed = [np.array(pairs) for pairs in groups.values() if len({label for label, _ in pairs}) == 2]
    gauc = np.average([roc_auc_score(*pairs.T) for pairs in mixed], weights=[len(pairs) for pairs in mixed])
    result = json.loads((tmp_path / "run/result.json").read_text())["test"]["tasks"]["click"]
    assert result["auc"] == pytest.approx(roc_auc_score([r["label.click"] for r in scores], [r["score.click"] for r in scores]))
    assert result["gauc"] == pytest.approx(gauc, abs=1e-6)
    assert result["auc"] > 0.75


@pytest.mark.parametrize("options", [[], ["--memory", "0.5", "--workers", "1"]])
def test_each_row_keeps_its_place_its_weight_and_its_group(options, tmp_path):
    rows = write_log(tmp_path)
    assert make(tmp_path, *options) == 0
    manifest, found = DatasetManifest.load(tmp_path / "data"), read(tmp_path)
    assert manifest.group_key == "user_hash"
    assert manifest.keys == ["user", "source_file", "source_line", "user_hash"]
    assert {place(row) for row in found} == set(rows)
    for row in found:
        raw = rows[place(row)]
        assert (row["sample.weight"], row["key.user"], row["label.click"]) == (raw["importance"], raw["user"], raw["clicked"])
        # The word of mmlrec.hashing, which has tests of its own.
        assert row["key.user_hash"] == int(hash_ids(pa.array([raw["user"]]), 0).view(np.int64)[0])
    assert len({row["key.user_hash"] for row in found}) == len(USERS)
    train = [row["sample.weight"] for row in pq.read_table(tmp_path / "data/train").to_pylist()]
    (batch,) = Reader(tmp_path / "data", manifest, "train", tasks=["click"], batch_size=len(train)).sequential()
    assert batch.weight.tolist() == train
    told = manifest.statistics["weights"]["train"]
    assert told == pytest.approx({"mean": np.mean(train), "deviation": np.std(train), "least": 0, "greatest": 2})


def test_describe_tells_of_weights_and_of_the_text_that_groups(tmp_path, capsys):
    write_log(tmp_path)
    assert make(tmp_path) == 0
    capsys.readouterr()
    assert main(["describe", str(tmp_path / "data")]) == 0
    told = capsys.readouterr().out
    assert "Weights of rows" in told
    assert "A group is a value of key 'user', by its hash in key 'user_hash'." in told
    assert "Look at this" not in told


@pytest.mark.parametrize("cell", ["", "-0.5", "nan", "inf", "1e39", "much"])
def test_a_weight_that_is_none_is_a_bad_row(cell, tmp_path, capsys):
    rows = write_log(tmp_path)
    path = tmp_path / "log/one.csv"
    lines = path.read_text(encoding="utf-8").split("\n")
    fields = lines[6].split(",")
    lines[6] = ",".join([*fields[:3], cell, fields[4]])
    path.write_text("\n".join(lines), encoding="utf-8")
    assert make(tmp_path) == 2
    assert f"{path}, line 7: importance" in capsys.readouterr().err
    assert make(tmp_path, "--max-bad-rows", "1") == 0
    assert {place(row) for row in read(tmp_path)} == set(rows) - {("log/one.csv", 7)}


def test_weights_that_are_all_0_are_looked_at(tmp_path, capsys):
    write_log(tmp_path, weight="zero")
    for path in (tmp_path / "log").iterdir():
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join([f"{header},zero", *(f"{line},0" for line in lines)]) + "\n", encoding="utf-8")
    assert make(tmp_path) == 0
    assert "All rows of train and valid and test have weight 0" in capsys.readouterr().out


def test_a_missing_group_is_a_bad_row(tmp_path, capsys):
    rows = write_log(tmp_path, missing=["Zoë 3"])
    assert make(tmp_path) == 2
    assert "user, by which rows are divided or grouped, is missing" in capsys.readouterr().err
    without = [at for at, row in rows.items() if row["user"] == "Zoë 3"]
    assert make(tmp_path, "--max-bad-rows", str(len(without))) == 0
    assert {place(row) for row in read(tmp_path)} == set(rows) - {*without}


def test_rows_that_differ_in_weight_alone_are_not_equal(tmp_path):
    (tmp_path / "log").mkdir()
    lines = [f"u{i % 5},1,2,{i % 2},{i % 3 % 2}" for i in range(60)]
    (tmp_path / "log/a.csv").write_text("\n".join(["user,a,b,importance,clicked", *lines]) + "\n")
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(CONFIG))
    assert make(tmp_path, "--duplicates", "drop") == 0
    dropped = DatasetManifest.load(tmp_path / "data").statistics["duplicates"]["dropped"]
    assert len(read(tmp_path)) == len(set(lines)) == 60 - dropped


def test_ten_thousand_columns_do_not_take_their_square(tmp_path, monkeypatch, capsys):
    """Calls of Python, not seconds: four times the columns take at most four times as many."""
    import sys

    counts = {}
    for columns in (300, 1200):
        folder = tmp_path / str(columns)
        folder.mkdir()
        names = [f"c{i}" for i in range(columns)]
        rows = [",".join([*(str((i * r) % 7) for i in range(columns)), str(r % 2)]) for r in range(20)]
        (folder / "a.csv").write_text("\n".join([",".join([*names, "y"]), *rows]) + "\n")
        features = {name: {"kind": "id" if i % 2 else "number"} for i, name in enumerate(names)}
        config = {"files": ["a.csv"], "features": features, "tasks": [{"name": "y", "label": "y"}]}
        (folder / "table.yaml").write_text(yaml.safe_dump(config))
        counted = [0]

        def count(frame, event, argument, counted=counted):
            counted[0] += 1

        sys.setprofile(count)
        try:
            assert make(folder, "--workers", "1") == 0
        finally:
            sys.setprofile(None)
        counts[columns] = counted[0]
    assert counts[1200] <= 4 * counts[300], counts
    assert "table: vocabularies: 600 tables" in capsys.readouterr().err
