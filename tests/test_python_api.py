"""`mmlrec.prepare`, `train` and `load_run`: what they give equals what the commands give, in a process of somebody else's."""

import decimal
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from sklearn.metrics import roc_auc_score

import mmlrec
from mmlrec.errors import ConfigError, DataError, UserError
from mmlrec.schema import DatasetManifest
from preprocessing.command_line import main

REPOSITORY = Path(__file__).parents[1]
SMALL = {"model": {"name": "mmoe", "num_experts": 2, "expert_hidden_units": [8], "tower_hidden_units": [4]}}
SHORT = {"training": {"epochs": 1, "batch_size": 200, "patience": None}}


def frame_of(rows=1500, seed=0):
    draw = np.random.default_rng(seed)
    user, item = draw.integers(0, 60, rows), draw.integers(0, 20, rows)
    frame = pd.DataFrame(
        {
            "user": user,
            "item": pd.Categorical([f"i{i}" for i in item]),
            "tags": [list(draw.choice(["a", "b", "c"], draw.integers(0, 3), replace=False)) for _ in range(rows)],
            "price": draw.lognormal(3, 1, rows),
            "device": draw.choice(["phone", "desktop"], rows),
            "time": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(rows), unit="h"),
        },
        index=[f"row {i}" for i in range(rows)],
    )
    likes = np.sin(user) + np.cos(item) + draw.normal(0, 0.5, rows)
    frame["click"] = (likes > 0).astype(int)
    frame["buy"] = ((likes > 0) & (frame.price < 25)).astype(int)
    return frame


COLUMNS = {
    "features": ["user", "item", "tags", "price"],
    "tasks": ["click", "buy"],
    "scenario": "device",
    "keys": ["user", "time"],
    "group_key": "user",
}


@pytest.fixture(scope="module")
def frame():
    return frame_of()


@pytest.fixture(scope="module")
def data(frame):
    return mmlrec.prepare(frame, **COLUMNS, split={"rule": "time", "key": "time"})


@pytest.fixture(scope="module")
def run(data):
    return mmlrec.train(SMALL, dataset=data, progress=False, **SHORT)


def parts(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}


def test_import_alone_is_light_and_names_what_there_is():
    code = (
        "import sys, mmlrec; print(sorted({'torch', 'pandas', 'preprocessing'} & set(sys.modules)), set(mmlrec.__all__) <= "
        "set(dir(mmlrec)), hasattr(mmlrec, 'predict'))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout == "[] True False\n"
    assert all(getattr(mmlrec, name).__doc__ for name in mmlrec.__all__)


def test_a_prepared_frame_is_what_the_command_makes_of_the_same_rows(frame, data, tmp_path):
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), tmp_path / "frame.parquet")
    config = {
        "files": ["frame.parquet"],
        "features": {
            "user": {"kind": "id", "type": "int"},
            "item": {"kind": "id"},
            "tags": {"kind": "ids"},
            "price": {"kind": "number"},
        },
        "tasks": [{"name": "click", "label": "click"}, {"name": "buy", "label": "buy"}],
        "scenario": {"column": "device", "values": ["desktop", "phone"]},
        "keys": {"user": {"type": "int"}, "time": {"type": "datetime"}},
        "group_key": "user",
        "split": {"rule": "time", "key": "time"},
    }
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["table", "--config", str(tmp_path / "table.yaml"), "--out", str(tmp_path / "data")]) == 0
    assert parts(data.path) == parts(tmp_path / "data")
    assert DatasetManifest.load(tmp_path / "data").encoding.features == data.manifest.encoding.features
    told = repr(data)
    for what in ("(temporary)", "train 1,200, valid 150, test 150", "user (id), item (id), tags (ids), price (number)"):
        assert what in told
    assert "tasks: click, buy" in told
    assert "scenario device: desktop, phone" in told


def test_an_arrow_table_and_whole_sections_give_the_same(frame, data, capfd):
    table = pa.Table.from_pandas(frame, preserve_index=False)
    features = {"user": {"kind": "id", "type": "int"}, "item": "id", "tags": {"kind": "ids"}, "price": "number"}
    again = mmlrec.prepare(
        table, **COLUMNS | {"features": features, "tasks": {"click": "click > 0", "buy": {"label": "buy"}}}, split=data_split()
    )
    assert parts(again.path) == parts(data.path)
    told = capfd.readouterr().err
    assert "features.item: {kind: id, type: string} (column of type large_string)" in told or "features.item: {kind: id" in told
    assert "scenario.values: desktop, phone (all values of column 'device')" in told
    assert "features.user" not in told  # said in full, so nothing was concluded


def data_split():
    return {"rule": "time", "key": "time"}


def test_types_tell_what_a_column_is(capfd):
    rows = 60
    frame = pd.DataFrame(
        {
            "whole": range(rows),
            "text": ["a", "b"] * 30,
            "flag": [True, False, False] * 20,
            "share": np.linspace(0, 1, rows),
            "many": [[1, 2], []] * 30,
            "gaps": pd.array([1, None] * 30, dtype="Int64"),
            "y": [0, 1] * 30,
        }
    )
    data = mmlrec.prepare(frame, features=["whole", "text", "flag", "share", "many", "gaps"], tasks=["y"])
    kinds = {feature.name: feature.kind for feature in data.manifest.features}
    assert kinds == {"whole": "sparse", "text": "sparse", "flag": "sparse", "share": "dense", "many": "multi", "gaps": "sparse"}
    told = capfd.readouterr().err
    for name, found in (("whole", "int"), ("text", "string"), ("flag", "string"), ("gaps", "int")):
        assert f"features.{name}: {{kind: id, type: {found}}}" in told
    assert "features.many: {kind: ids, type: int}" in told
    assert "features.share: {kind: number}" in told


CANNOT_BE_HELD = {
    "large": [1, 2**64],
    "large_lists": [[1], [2, 2**64]],
    "large_unsigned": [np.uint64(2**63), -1],
    "half": ["x", "\ud800"],
}

WRONG = [
    ({"features": ["usr"]}, "features.usr: the frame has no column 'usr'. Did you mean 'user'?"),
    ({"features": ["user", "user"]}, "features: a name is given twice"),
    ({"features": "user"}, "features: give a list of columns"),
    ({"features": ["time"]}, "features.time: what column 'time' of type timestamp"),
    ({"features": {"user": "ID"}}, "features.user: 'ID' is no kind"),
    ({"features": {"user": {"kind": "id", "mincount": 2}}}, "features.user.mincount: unknown key. Did you mean"),
    ({"features": ["holes"]}, "features.holes: column 'holes' is of type double, but holds whole numbers only"),
    ({"features": ["binned"]}, "features.binned: what column 'binned' of type extension<pandas.interval"),
    ({"features": ["mixed"]}, "features.mixed: column 'mixed' holds cells of several types (int, str)"),
    ({"features": ["large"]}, "features.large: column 'large', row 1 (counted from 0): an integer does not fit into 64 bits."),
    (
        {"features": ["large_lists"]},
        "'large_lists', row 1 (counted from 0): an integer does not fit into 64 bits. Integers have a sign; as text, type:"
        " string, it can be an id. Convert it: frame['large_lists'].map(lambda cell: [str(each) for each in cell]).",
    ),
    (
        {"features": ["large_unsigned"]},
        "features.large_unsigned: column 'large_unsigned': an integer does not fit into 64 bits.",
    ),
    ({"features": ["half"]}, "features.half: column 'half', row 1 (counted from 0): half of a surrogate pair is no text."),
    ({"features": ["click"]}, "features.click is made of column 'click', and so is the label"),
    ({"tasks": ["klick"]}, "tasks.klick: the frame has no column 'klick'. Did you mean 'click'?"),
    ({"tasks": "click"}, "tasks: give a list"),
    ({"tasks": []}, "tasks:"),
    ({"scenario": "price"}, "scenario: column 'price' holds cells of type double"),
    ({"scenario": "user", "features": ["item"]}, None),
    ({"keys": ["price"]}, "keys.price: a key is int, string or datetime"),
    ({"keys": {"user": "integer"}}, "keys.user: 'integer' is no type"),
    ({"group_key": "item"}, "group_key: 'item' is not among the keys"),
    ({"weight": "wait"}, "weight: the frame has no column 'wait'"),
    ({"split": "file"}, "split: rule 'file' is for several files"),
    ({"split": "tim"}, "split"),
    ({"seed": -1}, "seed: a whole number"),
    ({"duplicates": "remove"}, "duplicates: 'remove' is none of keep, drop, keep_together"),
    ({"features": None}, "features: needed, unless"),
    ({"like": "data"}, "features, tasks, scenario, keys, group_key: with `like` these are as in the other dataset"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_a_wrong_argument_is_named(frame, change, message):
    frame = frame.assign(holes=np.where(np.arange(len(frame)) % 2, 3.0, np.nan), mixed=["x", 1] * (len(frame) // 2))
    frame["binned"] = pd.cut(frame.price, 3)
    for name, cells in CANNOT_BE_HELD.items():
        frame[name] = pd.Series(cells * (len(frame) // 2), frame.index, object)
    if message is None:
        assert mmlrec.prepare(frame, **COLUMNS | change).manifest.scenario.values[:3] == ["0", "1", "2"]
        return
    with pytest.raises(ConfigError if not any(name in message for name in ("mixed", "large", "half")) else DataError) as error:
        mmlrec.prepare(frame, **COLUMNS | change)
    assert message in str(error.value)


def test_what_is_no_frame_and_a_bad_cell_are_named(frame):
    with pytest.raises(ConfigError, match="frame: a pandas DataFrame or an Arrow table is needed, found list"):
        mmlrec.prepare([{"user": 1}], **COLUMNS)
    with pytest.raises(DataError, match="frame: it has no rows"):
        mmlrec.prepare(frame.iloc[:0], **COLUMNS)
    binned = {"features": {"binned": "id"}}
    with pytest.raises(
        DataError, match=r"frame: cells of column 'binned', .*cannot be read. Convert it, for example frame\['binn"
    ):
        mmlrec.prepare(frame.assign(binned=pd.cut(frame.price, 3)), **COLUMNS | binned)
    with pytest.raises(DataError, match="frame: the column 7 has no text as its name"):
        mmlrec.prepare(frame.rename(columns={"price": 7}), **COLUMNS)
    bad = frame.assign(click=np.where(np.arange(len(frame)) == 41, 7, frame.click))
    with pytest.raises(DataError, match=r"frame, line 42: .*click"):
        mmlrec.prepare(bad, **COLUMNS)


def test_a_folder_is_made_once_and_a_temporary_one_goes_with_its_last_user(frame, tmp_path):
    data = mmlrec.prepare(frame, **COLUMNS, out=tmp_path / "data")
    assert "temporary" not in repr(data)
    assert mmlrec.Dataset(tmp_path / "data").manifest == data.manifest
    written = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    assert mmlrec.prepare(frame, **COLUMNS, out=tmp_path / "data").manifest == data.manifest  # the cell is run again
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(DataError, match=r"data was made from other raw files. Choose another out, or overwrite it"):
        mmlrec.prepare(frame.iloc[:900], **COLUMNS, out=tmp_path / "data")
    with pytest.raises(DataError, match=r"made with other options: config=.* or overwrite it"):
        mmlrec.prepare(frame, **COLUMNS | {"features": ["user"]}, out=tmp_path / "data")
    fewer = mmlrec.prepare(frame.iloc[:900], **COLUMNS, out=tmp_path / "data", overwrite=True)
    assert sum(split.num_rows for split in fewer.manifest.splits.values()) == 900
    with pytest.raises(DataError, match="is not a dataset"):
        mmlrec.Dataset(tmp_path)
    held = mmlrec.prepare(frame, **COLUMNS)
    folder = held.path
    child = os.fork()
    if not child:  # what ends with a copy of the object deletes nothing
        held = None
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    run = mmlrec.train(SMALL, dataset=held, progress=False, **SHORT)
    del held
    gc.collect()
    assert folder.is_dir()
    assert run.path.is_dir()
    folders = [folder, run.path]
    del run
    gc.collect()
    assert not any(path.exists() for path in folders)


def test_training_leaves_the_process_as_it_was_and_may_be_repeated(data, run):
    logger = logging.getLogger("mmlrec")

    def state():
        signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        of_logger = list(logger.handlers), logger.propagate, logger.level
        return (
            signals,
            warnings.showwarning,
            list(warnings.filters),
            of_logger,
            torch.initial_seed(),
            torch.get_rng_state().tolist(),
        )

    before, seen = state(), []
    taken = threading.Thread(target=lambda: seen.append(mmlrec.train(SMALL, dataset=data, progress=False, **SHORT)))
    taken.start()
    taken.join()
    again = mmlrec.train(SMALL, dataset=data, progress=False, **SHORT)
    assert not dist.is_initialized()
    assert state() == before
    for other in (*seen, again):  # from another thread, and a third time: the same run
        pd.testing.assert_frame_equal(other.evaluate(), run.evaluate())
    assert repr(run).endswith("mmoe, setting mtmsl, tasks click, buy")


def test_tables_of_finished_calls_are_gone(data):
    """None are left of a training, and those of the other calls do not pile up, though Python has no reason yet to look."""

    def tables():
        return sum(type(found) is SplitTableBatchedEmbeddingBagsCodegen for found in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        trained = mmlrec.train(SMALL, dataset=data, progress=False, **SHORT)
        assert tables() == 0
        trained.evaluate()
        of_one_model = tables()
        trained.evaluate()
        assert tables() == of_one_model
    finally:
        gc.enable()


def test_where_a_process_group_is_open_it_is_refused(data, monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=r"process group is open in this process.*destroy_process_group"):
            mmlrec.train(SMALL, dataset=data, **SHORT)
    finally:
        dist.destroy_process_group()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one of several ranks"):
        mmlrec.train(SMALL, dataset=data, **SHORT)


def test_configuration_errors_name_key_and_place(data):
    for config, overrides, message in [
        ({"model": {"name": "mmo"}}, {}, "mmoe"),
        (SMALL, {"training": {"epoch": 1}}, "overrides: training.epoch: unknown key. Did you mean"),
        ({"training": {"epochs": 0}}, {}, "config: training.epochs:"),
        ("mtl/movielen", {}, "no such config"),
    ]:
        with pytest.raises(ConfigError, match=message):
            mmlrec.train(config, dataset=data, **overrides)
    with pytest.raises(UserError, match="is not a run folder"):
        mmlrec.load_run(data.path)


def test_metrics_are_those_of_the_scores(data, run):
    scores = run.predict(data)
    assert len(scores) == 150
    metrics = run.evaluate()
    assert metrics.loc[("click", "all"), "rows"] == 150
    for task in ("click", "buy"):
        expected = roc_auc_score(scores[f"label.{task}"], scores[f"score.{task}"])
        assert metrics.loc[(task, "all"), "auc"] == pytest.approx(expected, abs=1e-6)
        phone = scores[scores["sample.scenario"] == 1]
        expected = roc_auc_score(phone[f"label.{task}"], phone[f"score.{task}"])
        assert metrics.loc[(task, "phone"), "auc"] == pytest.approx(expected, abs=1e-6)
    pd.testing.assert_frame_equal(run.evaluate(data.path), metrics)
    result = json.loads((run.path / "result.json").read_text())
    assert metrics.loc[("mean", "all"), "auc"] == result["test"]["mean"]["auc"]
    assert run.evaluate(split="valid").loc[("click", "all"), "rows"] == 150


def test_history_and_network(run):
    train, valid = run.history()
    assert list(train["step"]) == [6]
    assert {"epoch", "loss.click", "loss.buy", "samples_per_second"} <= set(train)
    last = valid[(valid.task == "click") & (valid.scenario == "all")].iloc[-1]
    assert last.step == 6
    assert last.auc == pytest.approx(run.evaluate(split="valid").loc[("click", "all"), "auc"])
    assert not run.network.training
    loaded = mmlrec.load_run(run.path)
    assert loaded.config == run.config
    assert loaded.path == run.path


def test_raw_rows_get_the_scores_of_the_same_rows_in_the_dataset(frame, data, run):
    encoded = run.predict(data)
    at = encoded["key.source_line"].to_numpy() - 1
    rows = frame.drop(columns=["click", "buy", "time"]).iloc[at]
    scores = run.predict(rows)
    assert list(scores.index) == list(rows.index)
    assert list(scores) == ["score.click", "score.buy"]
    for name in scores:
        np.testing.assert_allclose(scores[name], encoded[name], rtol=0, atol=1e-6)
    assert scores["score.click"].nunique() > 100
    table = run.predict(pa.Table.from_pandas(rows, preserve_index=False))
    np.testing.assert_array_equal(table.to_numpy(), scores.to_numpy())
    assert list(run.predict(rows.iloc[:0])) == list(scores)
    many = run.predict(pd.concat([rows] * 80))  # more than one batch
    np.testing.assert_allclose(many.to_numpy(), np.tile(scores.to_numpy(), (80, 1)), rtol=0, atol=1e-6)


def test_of_raw_rows_a_missing_column_and_an_unknown_scenario_are_named(frame, run):
    rows = frame.head(5)
    with pytest.raises(ConfigError, match="feature price: the frame has no column 'price'"):
        run.predict(rows.drop(columns="price"))
    with pytest.raises(DataError, match=r"row 2 .*device.*watch"):
        run.predict(rows.assign(device=["phone", "phone", "watch", "phone", "phone"]))
    with pytest.raises(ConfigError, match="list is neither a dataset, nor the folder of one"):
        run.predict([{"user": 1}])
    changed = rows.assign(user=10**9, item="never seen", price=[None] * 5)
    assert run.predict(changed)["score.click"].nunique() > 1  # by tags and device


def test_without_scenarios_in_the_model_none_is_needed(frame, data):
    section = data.section | {"setting": "mtl"}
    run = mmlrec.train(SMALL | {"dataset": section}, progress=False, **SHORT)
    encoded = run.predict(data)
    rows = frame.iloc[encoded["key.source_line"].to_numpy() - 1].drop(columns=["device", "click", "buy"])
    np.testing.assert_allclose(run.predict(rows)["score.buy"], encoded["score.buy"], rtol=0, atol=1e-6)


def test_scenarios_and_keys_may_be_numbers_and_rows_keep_the_rule_of_others(frame):
    frame = frame.assign(market=np.arange(len(frame)) % 5)
    scenario = {"column": "market", "values": {0: "home", 1: "home", 2: "away"}, "others": "away"}
    data = mmlrec.prepare(frame, features=["user", "price"], tasks=["click"], scenario=scenario)
    assert data.setting == "msl"
    run = mmlrec.train(SMALL, dataset=data, progress=False, **SHORT)
    encoded = run.predict(data)
    rows = frame.iloc[encoded["key.source_line"].to_numpy() - 1]
    np.testing.assert_allclose(run.predict(rows)["score.click"], encoded["score.click"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(run.predict(rows.assign(market=77)), run.predict(rows.assign(market=2)), rtol=0, atol=1e-6)


def test_new_rows_are_encoded_as_others_were_by_folder_dataset_or_run(frame, data, run, tmp_path):
    new = frame_of(200, seed=7).assign(item="never seen").drop(columns=["click", "buy", "time"])
    for other in (data, data.path, run, str(run.path)):
        like = mmlrec.prepare(new, like=other)
        assert {name: split.num_rows for name, split in like.manifest.splits.items()} == {"test": 200}
        assert like.manifest.encoding.digest == data.manifest.encoding.digest
    assert like.manifest.statistics["against_train"]["item"]["test"]["unseen"] == 200
    encoded = run.predict(like)
    at = encoded["key.source_line"].to_numpy() - 1
    np.testing.assert_allclose(run.predict(new.iloc[at])["score.buy"], encoded["score.buy"], rtol=0, atol=1e-6)
    named = mmlrec.prepare(new, like=run, split="sunday", out=tmp_path / "sunday")
    assert len(run.predict(tmp_path / "sunday", split="sunday")) == 200
    assert "rows: sunday 200" in repr(named)


def test_metrics_of_raw_rows_are_those_of_their_scores(run):
    new = frame_of(300, seed=7)
    metrics, scores = run.evaluate(new), run.predict(new)
    assert metrics.loc[("buy", "all"), "rows"] == 300
    assert metrics.loc[("buy", "all"), "auc"] == pytest.approx(roc_auc_score(new["buy"], scores["score.buy"]), abs=1e-6)
    pd.testing.assert_frame_equal(run.evaluate(mmlrec.prepare(new, like=run, split="sunday")), metrics)
    with pytest.raises(DataError, match="no row of test has a label of click, buy"):
        run.evaluate(new.drop(columns=["click", "buy"]))


def test_a_run_scores_without_its_dataset_and_is_exported_as_it_is(data, tmp_path):
    import mmlrec.serving

    copy = mmlrec.Dataset(shutil.copytree(data.path, tmp_path / "data"))
    run = mmlrec.train(SMALL, dataset=copy, run_dir=tmp_path / "run", progress=False, **SHORT)
    new = frame_of(300, seed=7)
    scores = run.predict(new)
    model = mmlrec.serving.load(run.export(tmp_path / "model"))
    np.testing.assert_allclose(model.score(new)[list(scores)], scores, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="model exists"):
        run.export(tmp_path / "model")
    kept = shutil.move(tmp_path / "run" / "encoder", tmp_path / "kept")  # as in runs of releases before
    pd.testing.assert_frame_equal(run.predict(new), scores)
    shutil.move(kept, tmp_path / "run" / "encoder")
    shutil.rmtree(tmp_path / "data")
    pd.testing.assert_frame_equal(mmlrec.load_run(tmp_path / "run").predict(new), scores)
    with pytest.raises(DataError, match=r"data is gone"):
        run.evaluate()
    with pytest.raises(DataError, match=r"data, is gone.*in Python, data="):
        run.export(tmp_path / "later")
    later = run.export(tmp_path / "later", new.drop(columns=["click", "buy"]))
    np.testing.assert_array_equal(mmlrec.serving.load(later).score(new), model.score(new))


def test_notes_name_arguments_not_options_of_the_command(frame, capfd):
    mmlrec.prepare(pd.concat([frame.head(200)] * 2), features=["user", "price"], tasks=["click"])
    told = capfd.readouterr().err
    assert "Copies on both sides" in told
    assert "duplicates keep_together or drop" in told
    assert "--" not in told


def test_vocabularies_grow(frame, data):
    more = frame_of(600, seed=8)
    more["user"] += 30
    grown = mmlrec.prepare(more, extend=data)
    users = [pq.read_table(d.path / "vocab" / "user.parquet")["value"].to_pylist() for d in (data, grown)]
    assert users[1][: len(users[0])] == users[0]
    assert len(users[1]) > len(users[0])
    assert list(grown.manifest.splits) == ["train", "valid", "test"]
    assert list(mmlrec.prepare(more, extend=data, split="train").manifest.splits) == ["train"]


def test_what_cannot_be_like_another_is_named(frame, data, tmp_path):
    for arguments, message in [
        ({"like": data, "extend": data}, "like and extend exclude each other"),
        ({"like": data, "weight": "price"}, "weight: with `like` these are as in the other dataset"),
        ({"like": data, "split": {"rule": "random"}}, "split: with `like` give the name of one split"),
        ({"like": data, "split": "a/b"}, "'a/b' is no name of a split"),
        ({"like": tmp_path}, "is neither a dataset nor a run"),
    ]:
        with pytest.raises(UserError, match=message):
            mmlrec.prepare(frame, **arguments)
    with pytest.raises(ConfigError, match=r"features.price: the frame has no column 'price'"):
        mmlrec.prepare(frame.drop(columns="price"), like=data)
    with pytest.raises(DataError, match="frame: there is no column 'buy'"):
        mmlrec.prepare(frame.drop(columns="buy"), extend=data)


def test_columns_of_all_types_are_encoded_alike_in_training_and_in_scoring():
    rows = 600
    draw = np.random.default_rng(3)
    number = draw.integers(0, 9, rows)
    frame = pd.DataFrame(
        {
            "whole": number.astype("uint8"),
            "gaps": pd.array(np.where(number < 7, number, -1), dtype="Int64").astype("Int64"),
            "flag": number > 4,
            "maybe": pd.array([None if n == 3 else n > 5 for n in number], dtype="boolean"),
            "text": pd.array([None if n == 1 else f"t{n}" for n in number], dtype="string"),
            "kind": pd.Categorical([f"k{n % 4}" for n in number]),
            "digits": number,  # ids of text
            "float32": (number + draw.random(rows)).astype("float32"),
            "share": np.where(number == 2, np.nan, draw.random(rows)),
            "sparse": pd.arrays.SparseArray(np.where(number < 6, 0, number / 7)),
            "price": [decimal.Decimal(int(n)) / 4 for n in number],
            "many": [[int(n), 7] if n else None for n in number],
            "words": [[f"w{n}"] * (n % 3) for n in number],
        }
    )
    frame.loc[frame["gaps"] < 0, "gaps"] = pd.NA
    frame["y"] = (number + draw.normal(0, 2, rows) > 4).astype(int)
    names = [name for name in frame if name not in ("y", "digits")]
    features = dict.fromkeys(names) | {"digits": {"kind": "id"}}
    data = mmlrec.prepare(frame, features={name: of or short_kind(name) for name, of in features.items()}, tasks=["y"])
    assert data.manifest.encoding.features["digits"]["type"] == "string"
    config = {"model": {"name": "mlp", "dnn_hidden_units": [8]}, "embeddings": {"init_std": 0.5}}
    run = mmlrec.train(config, dataset=data, progress=False, training={"max_steps": 2, "batch_size": 200})
    encoded = run.predict(data)
    raw = frame.iloc[encoded["key.source_line"].to_numpy() - 1].drop(columns="y")
    np.testing.assert_allclose(run.predict(raw)["score.y"], encoded["score.y"], rtol=0, atol=1e-6)
    assert encoded["score.y"].nunique() > 50


def short_kind(name):
    return {"float32": "number", "share": "number", "sparse": "number", "price": "number", "many": "ids", "words": "ids"}.get(
        name, "id"
    )
