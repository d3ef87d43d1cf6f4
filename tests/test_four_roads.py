"""Raw rows have the same scores by four roads: apps.predict on rows that were encoded alike, Run.predict, an export, HTTP.

The rows come after training: other ids, other categories, missing cells. Of MovieLens-100K the real files are taken where
the variable MMLREC_ML_100K names their folder, else a fake of MovieLens-1M.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from fastapi.testclient import TestClient

import mmlrec
import mmlrec.serving
from apps.cli import run as run_entry_point
from mmlrec.encoding.encoder import Encoder
from mmlrec.models.base.chain import ChainModel
from mmlrec.models.base.model import MultiTaskModel
from mmlrec.registry import method, method_names
from mmlrec.schema import SCENARIO_COLUMN, DatasetManifest, Setting
from mmlrec.serving.service import Limits, Service
from preprocessing.command_line import make
from preprocessing.dataset import Dataset, dataset_class
from preprocessing.new_rows import asked_for
from preprocessing.reading.raw_files import RawFolder
from tests.preprocessing.census_fake import write_kdd
from tests.preprocessing.movielens_fake import write_movielens
from tests.preprocessing.table_fake import CONFIG, UNMANAGED, records
from tests.serving.served import served

TOLERANCE = 1e-6  # of probabilities in fp32, and of values of regression tasks as a share of them where they are above 1
PLACE = ["key.source_file", "key.source_line"]
REAL = os.environ.get("MMLREC_ML_100K")
SIZES = {
    **{"dnn_hidden_units": [16, 8], "bottom_hidden_units": [16, 8], "expert_hidden_units": [16, 8], "gate_hidden_units": [8]},
    **{"tower_hidden_units": [4], "num_experts": 3, "num_shared_experts": 2, "num_specific_experts": 2, "num_levels": 2},
}


@dataclass(frozen=True)
class Data:
    """A dataset, new rows that are encoded as it was, and the same rows raw.

    Attributes:
        folder, like: datasets.
        frame: raw rows. place: file and line of each of them.
        tasks: setting -> tasks.
        managed: some tables are.
    """

    folder: Path
    like: Path
    frame: pd.DataFrame
    place: pd.DataFrame
    tasks: dict[Setting, list[str]]
    managed: bool = False


def make_movielens(tmp: Path) -> Data:
    name = "movielens-100k" if REAL else "movielens-1m"
    if REAL:
        for folder, chosen in (("old", lambda line: line % 100 != 7), ("new", lambda line: line % 100 == 7)):
            shutil.copytree(REAL, tmp / folder, copy_function=shutil.copyfile)
            lines = (Path(REAL) / "u.data").read_bytes().splitlines(keepends=True)
            (tmp / folder / "u.data").write_bytes(b"".join(text for line, text in enumerate(lines) if chosen(line)))
    else:
        write_movielens(tmp / "old", 3000, num_users=30, num_movies=40)
        write_movielens(tmp / "new", 700, num_users=40, num_movies=60, seed=1)
    tasks = {Setting.MTL: ["label2", "label3"], Setting.MSL: ["label3"], Setting.MTMSL: ["label2", "label3"]}
    return made(name, tmp, tasks)


def make_census(tmp: Path) -> Data:
    write_kdd(tmp / "old", 2000, 500)
    write_kdd(tmp / "new", 100, 600, seed=1)
    return made("census-income", tmp, {Setting.MTL: ["income", "marital"]})


def made(name: str, tmp: Path, tasks: dict[Setting, list[str]]) -> Data:
    make([name, "--raw", str(tmp / "old"), "--out", str(tmp / "data")])
    make([name, "--raw", str(tmp / "new"), "--like", str(tmp / "data"), "--out", str(tmp / "like")])
    frame, place = raw_rows(dataset_class(name), tmp)
    return Data(tmp / "data", tmp / "like", frame, place, tasks)


def raw_rows(kind: type[Dataset], tmp: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What raw rows of a dataset with a file of its own are: its canonical columns, and the scenario by value."""
    new, _ = asked_for(["--like", str(tmp / "data")])
    parser = argparse.ArgumentParser()
    kind.add_options(parser)
    parser.set_defaults(parity=False, duplicates=None, out=tmp / "other")
    new.fill(parser)
    dataset = new.dataset(kind, parser.parse_args([]))
    raw = RawFolder(tmp / "new", dataset.raw_files, "", 0, 1)
    raw.scratch = tmp / "scratch"
    table = pa.Table.from_batches(list(dataset.batches(raw)))
    encoder = Encoder.load(tmp / "data")
    columns = {feature.name: table[feature.name] for feature in encoder.features}
    if encoder.scenario is not None:
        values = pa.array(encoder.scenario.values)
        columns[encoder.scenario.column] = values.take(table[SCENARIO_COLUMN].combine_chunks())
    return pa.table(columns).to_pandas(), table.select(PLACE).to_pandas()


def make_table(tmp: Path, config: dict = CONFIG) -> Data:
    """A table of one's own with ids, hashed and managed ids, lists in both forms, numbers on all scales and in buckets."""
    for seed, rows, name in ((0, 3000, "old"), (1, 700, "new")):
        frame = pd.DataFrame(records(rows, seed))
        for column, types in (("seller", "Int64"), ("clicked", "Int64"), ("age", "Int64"), ("sold", "float64")):
            frame[column] = frame[column].astype(types)
        frame["bought"] = ["|".join(ids) for ids in frame["bought"]]
        frame["visitor"] = pd.array([row["visitor"] for row in records(rows, seed)], "Int64")
        if seed:  # of which training knows none
            frame.loc[:20, "user"], frame.loc[10:40, "item"], frame.loc[5:15, "price"] = 7, "of today", 1e9
            frame = frame[frame["device"] != "watch"].reset_index(drop=True)  # which are dropped
        (tmp / name).mkdir(parents=True)
        frame.to_parquet(tmp / name / "rows.parquet", index=False)
    tasks = [*config["tasks"], {"name": "stars", "label": "rating", "kind": "regression"}]
    (tmp / "table.yaml").write_text(yaml.safe_dump(config | {"files": ["rows.parquet"], "tasks": tasks}, sort_keys=False))
    make(["table", "--config", str(tmp / "table.yaml"), "--raw", str(tmp / "old"), "--out", str(tmp / "data")])
    make(["table", "--raw", str(tmp / "new"), "--like", str(tmp / "data"), "--out", str(tmp / "like")])
    frame = frame.drop(columns=["clicked", "orders", "rating", "row", "time"])
    place = pd.DataFrame({PLACE[0]: "rows.parquet", PLACE[1]: range(1, len(frame) + 1)})
    tasks = {Setting.MTL: ["click", "buy", "stars"], Setting.MSL: ["liked"], Setting.MTMSL: ["click", "buy"]}
    return Data(tmp / "data", tmp / "like", frame, place, tasks, managed=config is CONFIG)


def make_unmanaged(tmp: Path) -> Data:
    return make_table(tmp, UNMANAGED)


MAKERS = {"movielens": make_movielens, "census": make_census, "table": make_table, "table without managed ids": make_unmanaged}
SETTINGS = {"movielens": tuple(Setting), "census": (Setting.MTL,), "table": tuple(Setting)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Name -> its data, made when it is asked for."""
    there: dict[str, Data] = {}

    def get(name: str) -> Data:
        if name not in there:
            there[name] = MAKERS[name](tmp_path_factory.mktemp(name))
        return there[name]

    return get


def class_of(name: str) -> type[MultiTaskModel]:
    return method("mmoe" if name == "pcg" else name)


def config_of(data: Data, name: str, setting: Setting) -> dict:
    tasks, options = data.tasks[setting], {}
    if name == "apg" and setting is Setting.MTL:
        options["condition"] = "self"
    if name in ("mlp", "hmoe", "star") or issubclass(class_of(name), ChainModel):
        tasks = tasks[:2]  # which are binary: these methods take no regression task beside binary ones
    if issubclass(class_of(name), ChainModel):
        options |= {"roles": tasks, "allow_non_chain": True}
    return {
        "dataset": {"path": str(data.folder), "setting": str(setting), "tasks": tasks},
        "model": {"name": name, **options},
        "model_defaults": SIZES,
        # Rows that are far apart, so that another row's score is another number; one table is wider than the others.
        "embeddings": {"dim": 4, "table_dim": {DatasetManifest.load(data.folder).tables[1].name: 8}, "init_std": 0.5}
        | ({"managed": {"update_every": 1}} if data.managed else {}),
        "training": {"max_steps": 3, "batch_size": 500, "eval_batch_size": 256, "patience": None},
    }


def app(name: str, *arguments: object) -> None:
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]):
        run_entry_point(importlib.import_module(f"apps.{name}").main)


def by_http(model: Path, tmp: Path, rows: list[dict], *, process: bool) -> pd.DataFrame:
    if process:
        with served(model, tmp / "serve.log") as service:
            asked = urllib.request.Request(f"{service.url}/score", json.dumps({"rows": rows}).encode())
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return pd.DataFrame(json.load(answer)["scores"], dtype=float)
    with TestClient(Service(mmlrec.serving.load(model), Limits())) as client:
        answer = client.post("/score", json={"rows": rows})
    assert answer.status_code == 200, answer.text
    return pd.DataFrame(answer.json()["scores"], dtype=float)


def largest_difference(data: Data, name: str, setting: Setting, tmp: Path, *, process: bool = False, **model: object) -> float:
    """Trains, goes the four roads, and compares each with the first."""
    config = config_of(data, name, setting)
    run = mmlrec.train(config, run_dir=tmp / "run", progress=False, model=model)
    app("predict", "--run-dir", run.path, "--input", data.like, "--output", tmp / "scores.parquet")
    app("export", "--run-dir", run.path, "--out", tmp / "model")
    first = data.place.merge(pd.read_parquet(tmp / "scores.parquet"), on=PLACE, how="left", validate="one_to_one")
    first = first[[column for column in first if column.startswith("score.")]]
    assert len(first) == len(data.frame) > 500
    rows = pa.Table.from_pandas(data.frame, preserve_index=False).to_pylist()
    if data.managed:
        visitors = (
            Encoder.load(tmp / "model/encoder").inputs(pa.Table.from_pandas(data.frame, preserve_index=False)).ids["visitor"][0]
        )
        assert {0, 1, 2} < set(visitors.tolist()) <= set(range(41))  # unseen ones, and such that hold slots
    others = {
        "frame": mmlrec.load_run(run.path).predict(data.frame),
        "export": mmlrec.serving.load(tmp / "model").score(data.frame),
        "HTTP": by_http(tmp / "model", tmp, rows, process=process),
    }
    largest = 0.0
    chain = {"score.ctr", "score.ctcvr"}  # of a chain an export names these, too
    for road, scores in others.items():
        assert list(first) == [name for name in scores if name not in chain or name in first], road
        for name, task in zip(("score.ctr", "score.ctcvr"), data.tasks[setting], strict=False):
            if name in scores:
                np.testing.assert_array_equal(scores[name], scores[f"score.{task}"], err_msg=road)
        scores = scores[list(first)]
        expected, found = first.to_numpy(np.float64), scores.to_numpy(np.float64)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected), err_msg=road)
        apart = np.abs(found - expected) / np.maximum(1.0, np.abs(expected))
        largest = max(largest, float(np.nanmax(apart)))
        assert largest <= TOLERANCE, road
    for column in first.columns.drop("score.cvr", errors="ignore"):  # no two rows are alike by accident
        assert first[column].round(6).nunique() > 100, column
    return largest


@pytest.mark.parametrize(
    ("dataset", "name", "setting"),
    [
        ("table", "ple", Setting.MTMSL),
        ("movielens", "star", Setting.MTMSL),
        ("movielens", "esmm", Setting.MTL),
        ("census", "mmoe", Setting.MTL),
    ],
)
def test_raw_rows_have_the_same_scores_by_all_roads(data, tmp_path, dataset, name, setting):
    largest_difference(data(dataset), name, setting, tmp_path, process=name == "ple")


def test_a_task_without_a_head_in_a_scenario_has_no_score_there_by_any_road(data, tmp_path):
    config = {"branches": [0, 2, 3]}  # click/mobile, buy/mobile, buy/desktop
    largest_difference(data("table without managed ids"), "single_task", Setting.MTMSL, tmp_path, **config)


@pytest.mark.long
@pytest.mark.parametrize("name", [*method_names(), "pcg"])
@pytest.mark.parametrize(
    ("dataset", "setting"), [(dataset, setting) for dataset, settings in SETTINGS.items() for setting in settings]
)
def test_all_methods_settings_and_datasets(data, tmp_path, dataset, setting, name, record_property):
    if setting not in class_of(name).settings:
        pytest.skip("not defined in this setting")
    if dataset == "table" and name == "single_task":  # whose branches have tables of their own
        dataset = "table without managed ids"
    found = largest_difference(data(dataset), name, setting, tmp_path)
    record_property("largest difference", found)
    print(f"{dataset} {setting} {name}: {found:.2e}")
