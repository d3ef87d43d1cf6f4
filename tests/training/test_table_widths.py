"""`embeddings.table_dim`: tables of several widths train as torch's own do, and whoever reads the key knows the tables."""

import dataclasses
import itertools
import json

import pytest
import torch
import yaml
from torchrec import KeyedTensor

from mmlrec.config import load_config
from mmlrec.data.branches import expand_branches
from mmlrec.distributed.world import process_group
from mmlrec.embeddings.tables import initial_rows
from mmlrec.errors import ConfigError
from mmlrec.session.session import build_session
from mmlrec.training.run import train
from tests.datasets import write_dataset

STEPS, RATE = 6, 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Fields f0, m0, f1, f2 of tables t0, tm0, t1 and again t0."""
    data = write_dataset(tmp_path_factory.mktemp("widths") / "data", rows=200, table_rows=40)
    features = [f.model_copy(update={"table": "t0"}) if f.name == "f2" else f for f in data.manifest.features]
    tables = [t.model_copy(update={"num_rows": 44}) for t in data.manifest.tables if t.name != "t2"]
    manifest = data.manifest.model_copy(update={"features": features, "tables": tables})
    manifest.save(data.folder)
    return dataclasses.replace(data, manifest=manifest)


def config_of(data, *overrides):
    content = {
        "dataset": {"path": str(data.folder), "setting": "mtmsl"},
        "model": {"name": "mlp"},
        "model_defaults": {"dnn_hidden_units": [8], "bottom_hidden_units": [8], "tower_hidden_units": []},
        "embeddings": {"dim": 4, "table_dim": {"t0": 12, "tm0": 8}, "init_std": 0.3},
        "dense": {"optimizer": {"name": "sgd", "lr": RATE}},
        "training": {"batch_size": 25, "max_steps": STEPS, "patience": None},
    }
    return load_config(content, list(overrides))


def lookup(sparse, tables, manifest, prefix=""):
    """Sums of the rows of each bag, by torch alone."""
    found = {}
    for feature in manifest.sparse_features:
        bags = sparse[prefix + feature.name]
        mode = "mean" if feature.kind == "multi" and feature.pooling == "mean" else "sum"
        weight = tables[prefix + str(feature.table)]
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), bags.lengths().cumsum(0)])
        found[prefix + feature.name] = torch.nn.functional.embedding_bag(
            bags.values().long(), weight, offsets.long(), mode=mode, include_last_offset=True
        )
    return found


@pytest.mark.parametrize("name", ["mlp", "single_task"])
def test_they_train_as_tables_of_torch_do(data, name):
    """Two features share a table; `single_task` has tables of its own for each of its six heads."""
    with process_group() as world:
        session = build_session(config_of(data, f"model.name={name}"), world, for_training=True)
        assert session.spec.fields == {"f0": 12, "m0": 8, "f1": 4, "f2": 12}
        assert {row["table"].split("/")[-1]: row["dim"] for row in session.plan} == {"t0": 12, "tm0": 8, "t1": 4}
        assert all(row["weight_bytes"] == 4 * row["rows"] * row["dim"] for row in session.plan)
        tables = {
            row["table"]: initial_rows(row["table"], 0, row["rows"], row["dim"], 0.3, 0).requires_grad_()
            for row in session.plan
        }
        head = build_session(config_of(data, f"model.name={name}"), world, for_training=True).head.train()
        adagrad = torch.optim.Adagrad(tables.values(), lr=0.05, eps=1e-8)
        sgd = torch.optim.SGD(head.network.parameters(), lr=RATE)
        batches = list(itertools.islice(session.reader("train").epoch(0), STEPS))
        session.model.train()
        feed = session.prepare(iter(batches), training=True)
        names = [branch for branch, _, _ in session.branches()]
        for batch in batches:
            session.pipeline.progress(feed)
            if names:
                batch = expand_branches(batch, names, 3, training=True, branches=session.network.branches)
            pooled = {}
            for prefix in [f"{branch}/" for branch in names] or [""]:
                pooled |= lookup(batch.sparse, tables, data.manifest, prefix)
            keyed = KeyedTensor(list(pooled), [value.shape[1] for value in pooled.values()], torch.cat([*pooled.values()], 1))
            adagrad.zero_grad(), sgd.zero_grad()
            head(keyed, batch)[0].backward()
            adagrad.step(), sgd.step()
        trained = session.model.state_dict()
        for table, weight in tables.items():
            found = trained[f"tables.embedding_bags.{table}.weight"]
            torch.testing.assert_close(found.local_shards()[0].tensor, weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("embeddings.table_dim.t00=8", r"embeddings.table_dim.t00: no such table. Did you mean 't0'\? Tables: t0, tm0, t1."),
        ("embeddings.table_dim.t1=6", r"embeddings.table_dim.t1: .*multiple of 4"),
        ("embeddings.table_dim.t1=0", r"embeddings.table_dim.t1: .*greater than 0"),
    ],
)
def test_a_table_or_width_that_cannot_be_is_told_before_training(data, override, words):
    with process_group() as world, pytest.raises(ConfigError, match=words):
        build_session(config_of(data, override), world, for_training=True)


def test_numbers_alone_have_no_widths(tmp_path):
    numbers = write_dataset(tmp_path / "data", num_sparse=0, num_multi=0)
    told = r"embeddings\.table_dim\.t0: the dataset has no tables, all its features are numbers"
    with process_group() as world, pytest.raises(ConfigError, match=told):
        build_session(config_of(numbers), world, for_training=True)


def test_a_changed_width_is_no_resume(data, tmp_path):
    with process_group() as world:
        train(config_of(data, "training.max_steps=2"), tmp_path / "run", world)
        for override, told in (
            ("embeddings.table_dim.t0=8", "embeddings.table_dim.t0: 12 in the run folder, 8 now"),
            ("embeddings.table_dim.t1=8", "embeddings.table_dim.t1: None in the run folder, 8 now"),
            ("embeddings.dtype=fp16", "embeddings.dtype: 'fp32' in the run folder, 'fp16' now"),
        ):
            with pytest.raises(ConfigError, match=told):
                train(config_of(data, override), tmp_path / "run", world)


def test_plans_of_a_dataset_and_of_described_tables_are_one(tmp_path, run_app):
    data = write_dataset(tmp_path / "data", num_sparse=2, num_multi=0, num_dense=1, num_scenarios=0, table_rows=4000)
    tables = [{"name": table.name, "rows": table.num_rows} for table in data.manifest.tables]
    tables[1]["dim"] = 16
    described = {"name": "written", "tasks": 2, "dense": 1, "tables": tables}
    (tmp_path / "tables.yaml").write_text(yaml.safe_dump(described))
    config = {"dataset": {"path": str(data.folder)}, "model": {"name": "mmoe"}, "embeddings": {"dim": 4}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    hosts = ("--hosts", 1, "--processes-per-host", 2, "--ram", "4GiB")
    plans = []
    for more in (["embeddings.table_dim.t1=16"], ["--tables", tmp_path / "tables.yaml"]):
        code, error = run_app("plan", "--config", tmp_path / "config.yaml", *hosts, "--json", tmp_path / "plan.json", *more)
        assert code == 0, error
        plans.append(json.loads((tmp_path / "plan.json").read_text()))
        # Features of a description are named after their tables.
    assert [(table["table"], table["dim"]) for table in plans[0]["tables"]] == [("t0", 4), ("t1", 16)]
    assert plans[0] == plans[1]
    # What is given beside a description counts for the training, so it counts for its plan.
    more = ["--tables", tmp_path / "tables.yaml", "embeddings.table_dim.t1=8"]
    assert run_app("plan", "--config", tmp_path / "config.yaml", *hosts, "--json", tmp_path / "plan.json", *more)[0] == 0
    assert [table["dim"] for table in json.loads((tmp_path / "plan.json").read_text())["tables"]] == [4, 8]
