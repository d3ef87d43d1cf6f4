"""From a run to scores and metrics of rows that came later: also without labels, without the dataset, on several ranks."""

import csv
import json
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main
from tests import processes
from tests.preprocessing.test_new_rows import CONFIG, LABELS, log, write
from tests.training.launch import start_ranks

RUN = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: mmoe, num_experts: 2, expert_hidden_units: [8], gate_hidden_units: [], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 64, max_steps: 12}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `day1` and a run on it; `day2`, `outlier`, which has one more row, `bare` without labels, `grown`."""
    folder = tmp_path_factory.mktemp("trained")
    days = {"day1": log(1, 900), "day2": log(2, 300)}
    days["outlier"] = [*days["day2"], log(3, 1)[0] | {"price": 100_000}]
    days["grown"] = log(4, 300, new_ids=0.3)
    for name, rows in days.items():
        write(folder / f"{name}.csv", rows)
    write(folder / "bare.csv", days["day2"], without=LABELS)
    (folder / "day.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["table", "--config", str(folder / "day.yaml"), "--out", str(folder / "day1")]) == 0
    (folder / "run.yaml").write_text(RUN.format(dataset=folder / "day1"))
    train = ["-m", "apps.train", "--config", str(folder / "run.yaml"), "--run-dir", str(folder / "run")]
    done = processes.run([sys.executable, *train])
    assert done.returncode == 0, done.stderr
    for name in ("day2", "outlier", "bare"):
        make(folder, name, "--like", folder / "run")
    make(folder, "grown", "--extend", folder / "run", "--split", "train")
    return folder


def make(folder, name, option, other, *more, raw=None):
    arguments = [option, str(other), "--raw", str(raw or folder), "--files", f"{name}.csv", "--out", str(folder / name)]
    assert main(["table", *arguments, *map(str, more)]) == 0


@pytest.fixture
def app(run_app, trained):
    """An entry point on the run, in this process."""

    def call(name, *arguments):
        code, error = run_app(name, "--run-dir", trained / "run", *arguments)
        assert "Traceback" not in error
        return code, error

    return call


def scores(path):
    """Line of the raw file -> probabilities."""
    rows = pq.read_table(path).to_pylist()
    return {row["key.source_line"]: tuple(value for name, value in row.items() if name.startswith("score.")) for row in rows}


def test_one_odd_row_changes_no_other_score_and_labels_are_not_needed(trained, app, tmp_path):
    found = {}
    for name in ("day2", "outlier", "bare"):
        code, error = app("predict", "--input", trained / name, "--output", tmp_path / f"{name}.parquet")
        assert code == 0, error
        found[name] = scores(tmp_path / f"{name}.parquet")
    assert len(found["day2"]) == 300
    assert found["outlier"].keys() - found["day2"].keys() == {302}
    assert {line: found["outlier"][line] for line in found["day2"]} == found["day2"]
    assert found["bare"] == found["day2"]
    assert np.std([of_row[0] for of_row in found["day2"].values()]) > 0.001
    names = {name: pq.read_schema(tmp_path / f"{name}.parquet").names for name in ("day2", "bare")}
    place = ["key.source_file", "key.source_line"]
    keys = ["key.session", "key.time", *place, "key.session_hash"]
    further = ["scenario.device", "sample.weight"]
    assert names["day2"] == [*keys, "sample.scenario", "label.click", "label.buy", "score.click", "score.buy", *further]
    assert [name for name in names["day2"] if name not in names["bare"]] == ["label.click", "label.buy"]


def test_scores_as_csv_and_json_lines_are_the_same(trained, app, tmp_path):
    for ending in ("csv", "jsonl", "parquet"):
        assert app("predict", "--input", trained / "bare", "--output", tmp_path / f"scores.{ending}")[0] == 0
    expected = scores(tmp_path / "scores.parquet")
    with (tmp_path / "scores.csv").open() as file:
        from_csv = list(csv.DictReader(file))
    from_json = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    for rows in (from_csv, from_json):
        assert len(rows) == 300
        for row in rows:
            assert row["key.source_file"] == "bare.csv"
            given = [float(row["score.click"]), float(row["score.buy"])]
            assert given == pytest.approx(expected[int(row["key.source_line"])], rel=1e-6)


def test_metrics_of_later_rows_are_those_of_their_scores(trained, app, tmp_path, capfd):
    """--input and dataset.path are one; the run's own result stays."""
    before = (trained / "run" / "result.json").read_bytes()
    told = []
    for rows in (["--input", trained / "day2"], [f"dataset.path={trained / 'day2'}"]):
        code, error = app("evaluate", *rows)
        assert code == 0, error
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate", "--run-dir", str(trained / "run"), "--input", str(trained / "day2")])
        from apps.evaluate import main as evaluate

        evaluate()
    told = capfd.readouterr().out
    assert app("predict", "--input", trained / "day2", "--output", tmp_path / "scores.parquet")[0] == 0
    rows = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    weights = {line: row["importance"] for line, row in enumerate(log(2, 300), start=2)}
    auc = roc_auc_score(rows["label.click"], rows["score.click"], sample_weight=rows["key.source_line"].map(weights))
    (line,) = (line.split() for line in told.splitlines() if line.startswith("click ") and " all " in line)
    assert line[2] == "300"
    assert f"{auc:.4f}" in line
    assert f"Measured with dataset.path={trained / 'day2'}" in told
    assert (trained / "run" / "result.json").read_bytes() == before


def test_without_labels_there_is_nothing_to_measure(trained, app):
    code, error = app("evaluate", "--input", trained / "bare")
    assert code == 2
    assert f"{trained / 'bare'}: no row of test has a label of click, buy, so there is nothing to measure" in error
    assert "python -m apps.predict --run-dir RUN --input" in error


def test_other_rows_are_named_once(trained, app):
    code, error = app("evaluate", "--input", trained / "day2", f"dataset.path={trained / 'day1-moved'}")
    assert code == 2
    assert f"--input {trained / 'day2'} and dataset.path={trained / 'day1-moved'} name other rows each" in error


def test_new_rows_are_not_trained_on(trained, run_app, tmp_path):
    """They have one split: a message in place of a key that is not there."""
    for data, split in (("bare", "test"), ("grown", "train")):
        more = ("--run-dir", tmp_path / "run", f"dataset.path={trained / data}")
        code, error = run_app("train", "--config", trained / "run.yaml", *more)
        assert code == 2
        assert f"a run needs rows of train, valid, test, and here are those of {split}, as new rows have them" in error
        assert not (tmp_path / "run").exists()


def test_splits_are_chosen_by_name(trained, app, tmp_path):
    """The only one; `test`; else one has to be named."""
    output = ("--output", tmp_path / "scores.parquet")
    code, error = app("predict", "--input", trained / "grown", *output)
    assert code == 0, error
    assert len(scores(output[1])) == 300
    for name in ("predict", "evaluate"):
        more = output if name == "predict" else ()
        code, error = app(name, "--input", trained / "grown", "--split", "trian", *more)
        assert code == 2
        assert "there is no split 'trian'. Did you mean 'train'? Splits: train." in error
    several = shutil.copytree(trained / "day1", tmp_path / "several")
    content = json.loads((several / "manifest.json").read_text())
    content["splits"] = {name: content["splits"][name] for name in ("train", "valid")}
    (several / "manifest.json").write_text(json.dumps(content))
    code, error = app("predict", "--input", several, *output)
    assert code == 2
    assert "which of its splits? Name one with --split: train, valid." in error
    assert app("predict", "--input", several, "--split", "valid", *output)[0] == 0


def test_ids_behind_the_vocabularies_are_told_on_any_number_of_ranks(trained, tmp_path):
    """Against the raw file; the scores are those of the same rows encoded like the run."""
    make(trained, "grown", "--like", trained / "run", "--out", tmp_path / "like")
    tables = DatasetManifest.load(trained / "grown").by_name
    known = DatasetManifest.load(trained / "day1").by_name
    assert tables["item"].num_rows > known["item"].num_rows
    rows = pq.read_table(trained / "grown" / "train")
    expected = {name: sum(id >= known[name].num_rows for id in rows[name].to_pylist()) for name in ("user", "item")}
    found = {}
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.parquet"
        predict = ["-m", "apps.predict", "--run-dir", str(trained / "run"), "--input", str(trained / "grown"), "--output"]
        logs = [tmp_path / f"{ranks}-{rank}.log" for rank in range(ranks)]
        started = start_ranks([sys.executable, *predict, str(output)], logs)
        assert [rank.wait(120) for rank in started] == [0] * ranks, logs[0].read_text()
        told = f"ids that the run has no rows for, read as 0 (unseen): item {expected['item']}, user {expected['user']}"
        assert told in logs[0].read_text()
        found[ranks] = scores(output)
    assert found[1].keys() == found[2].keys()
    np.testing.assert_allclose([found[1][line] for line in found[2]], [*found[2].values()], rtol=1e-6)
    predict = ["-m", "apps.predict", "--run-dir", str(trained / "run"), "--input", str(tmp_path / "like"), "--output"]
    assert processes.run([sys.executable, *predict, str(tmp_path / "like.parquet")]).returncode == 0
    assert scores(tmp_path / "like.parquet") == found[1]


def test_the_run_alone_is_enough(trained, app, tmp_path):
    """Its dataset is gone: rows are encoded like the run, scored, and measured."""
    (trained / "day1").rename(trained / "gone")
    try:
        arguments = ["--raw", str(trained), "--files", "day2.csv", "--out", str(tmp_path / "day2")]
        assert main(["table", "--like", str(trained / "run"), *arguments]) == 0
        for name, more in (("predict", ("--output", tmp_path / "scores.parquet")), ("evaluate", ())):
            code, error = app(name, "--input", tmp_path / "day2", *more)
            assert code == 0, error
            assert f"the dataset {trained / 'day1'} is gone" in error
        assert app("predict", "--input", trained / "grown", "--output", tmp_path / "grown.parquet")[0] == 0
        encoder = (trained / "run" / "encoder").rename(tmp_path / "encoder")
        code, error = app("predict", "--input", trained / "grown", "--output", tmp_path / "grown.parquet")
        assert code == 2
        assert "is a run of a release before: it keeps no encoder" in error
        encoder.rename(trained / "run" / "encoder")
    finally:
        (trained / "gone").rename(trained / "day1")
    assert app("predict", "--input", trained / "grown", "--output", tmp_path / "again.parquet")[0] == 0
    assert scores(tmp_path / "again.parquet") == scores(tmp_path / "grown.parquet")


def test_rows_without_a_group_are_in_no_group(trained, tmp_path):
    """GAUC of rows of which some have no session, against sklearn."""
    rows = log(5, 400)
    for number, row in enumerate(rows):
        row["session"] = "" if number % 4 == 0 else row["session"][:2]
    write(tmp_path / "some.csv", rows)
    make(tmp_path, "some", "--like", trained / "run", raw=tmp_path)
    output, report = tmp_path / "scores.parquet", tmp_path / "report.json"
    code = (
        "import json, sys; from mmlrec.distributed.world import process_group\n"
        "from mmlrec.evaluation.evaluation import evaluate_split; from mmlrec.evaluation.prediction import write_predictions\n"
        "from mmlrec.run_folder.folder import RunFolder; from mmlrec.session.session import load_session\n"
        "from mmlrec.storage.places import place\n"
        "with process_group() as world:\n"
        "    session, _, _, rows = load_session(RunFolder(place(sys.argv[1])), world, [], place(sys.argv[2]))\n"
        "    open(sys.argv[3], 'w').write(json.dumps(evaluate_split(session, 'test', dataset=rows)))\n"
        "    write_predictions(session, rows, 'test', place(sys.argv[4]))\n"
    )
    (tmp_path / "both.py").write_text(code)
    done = processes.run(
        [sys.executable, *map(str, (tmp_path / "both.py", trained / "run", tmp_path / "some", report, output))]
    )
    assert done.returncode == 0, done.stderr
    scored = pq.read_table(output).to_pandas()
    weights = {line: row["importance"] for line, row in enumerate(rows, start=2)}
    scored["weight"] = scored["key.source_line"].map(weights)
    assert scored["key.session"].isna().sum() == 100
    total = value = 0.0
    for _, group in scored[scored["key.session"].notna()].groupby("key.session"):
        if group["label.click"].nunique() == 2:
            auc = roc_auc_score(group["label.click"], group["score.click"], sample_weight=group["weight"])
            total, value = total + group["weight"].sum(), value + auc * group["weight"].sum()
    assert json.loads(report.read_text())["tasks"]["click"]["gauc"] == pytest.approx(value / total, abs=1e-6)
