"""A dataset of numbers alone: nothing is looked up, so there is no table, no shard and no optimizer of tables."""

import csv
import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmlrec.config import load_config
from mmlrec.data.reader import Reader
from mmlrec.distributed.world import process_group
from mmlrec.errors import ConfigError, DataError
from mmlrec.evaluation.score_files import ENDINGS
from mmlrec.registry import method, method_names
from mmlrec.schema import DatasetManifest, Setting
from mmlrec.session.parts import build_parts
from mmlrec.session.session import build_session
from mmlrec.testing.networks import TINY
from tests.datasets import write_dataset
from tests.training.launch import launch, losses, tensors

CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: mmoe}}
model_defaults: {{expert_hidden_units: [8, 6], bottom_hidden_units: [8, 6], dnn_hidden_units: [8, 6], tower_hidden_units: [4]}}
embeddings: {{dim: 4, l2: 1.0e-3}}
dense: {{optimizer: {{name: sgd, lr: 0.1}}}}
training: {{batch_size: 50, epochs: 9, max_steps: 12, checkpoint_every_steps: 4, patience: null, log_every_steps: 1}}
"""
TASKS = ("score.click", "score.buy")
CASES = {
    "mmoe": [],
    "single_task": ["model.name=single_task"],
    "pcgrad": ["model.name=shared_bottom", "balancing.name=pcgrad"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbers")
    write_dataset(root / "data", rows=990, num_sparse=0, num_multi=0, num_dense=4, num_scenarios=2, funnel=True)
    (root / "config.yaml").write_text(CONFIG.format(dataset=root / "data"))
    return root


@pytest.fixture(scope="module")
def runs(root):
    def train(folder, case, *more):
        overrides = [*CASES[case], *more]
        return {
            "kind": "train",
            "name": "all",
            "config": str(root / "config.yaml"),
            "overrides": overrides,
            "run_dir": str(folder / case),
        }

    for world_size in (2, 1):
        folder = root / str(world_size)
        actions = [train(folder, case) for case in CASES]
        if world_size == 2:
            actions.append(train(root / "moved", "mmoe", "training.max_steps=8"))
        else:
            actions.append(train(root / "moved", "mmoe"))
        evaluated = {"kind": "evaluate", "run_dir": str(root / "2" / "mmoe"), "overrides": []}
        actions.append({**evaluated, "output": str(root / f"evaluated-{world_size}.json")})
        scored = {"kind": "predict", "run_dir": str(root / "2" / "mmoe")}
        endings = ENDINGS if world_size == 1 else (".parquet", ".csv", ".jsonl.gz")
        actions += [{**scored, "output": str(folder / f"scores{ending}")} for ending in endings]
        launch(world_size, actions, folder)
    return root


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(runs, case):
    expected, found = losses(runs / "1" / case), losses(runs / "2" / case)
    assert len(expected) == len(found) == 12
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4), step
    assert values != pytest.approx(expected[1], rel=1e-3), "nothing was learnt"


def test_a_resume_at_another_number_of_ranks_equals_the_uninterrupted_run(runs):
    expected, found = (tensors(runs / folder / "mmoe/checkpoints/step_000000012") for folder in ("1", "moved"))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if key.startswith("model."):
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_the_best_checkpoint_scores_the_same_on_one_rank(runs):
    one, two = (json.loads((runs / f"evaluated-{size}.json").read_text()) for size in (1, 2))
    assert one["tasks"]["click"]["auc"] == pytest.approx(two["tasks"]["click"]["auc"], abs=1e-6)
    assert json.loads((runs / "2/mmoe/result.json").read_text())["test"]["tasks"]["click"]["auc"] > 0.6


@pytest.mark.parametrize("ending", ENDINGS)
def test_scores_are_written_alike_in_all_forms_and_by_any_number_of_ranks(ending, runs):
    test = pq.read_table(runs / "data/test").to_pylist()
    values = DatasetManifest.load(runs / "data").scenario.values
    for world_size in (1, 2):
        if not (runs / str(world_size) / f"scores{ending}").exists():
            assert (world_size, ending) in {(2, ".csv.gz"), (2, ".jsonl")}
            continue
        rows = read_scores(runs / str(world_size) / f"scores{ending}")
        truth = pq.read_table(runs / str(world_size) / "scores.parquet").to_pylist()
        assert len(rows) == len(test)
        for row, expected, raw in zip(rows, truth, test, strict=True):
            assert [np.float32(row[name]) for name in TASKS] == [np.float32(expected[name]) for name in TASKS]
            assert {name: row[name] for name in row if not name.startswith("score.")} == {
                name: raw[name] for name in raw if name.startswith(("key.", "label.", "sample."))
            } | {"scenario.page": values[raw["sample.scenario"]]}
        assert any(row["label.click"] is None for row in rows)
        assert list((runs / str(world_size)).glob("*.tmp")) == []
    one, two = (pq.read_table(runs / str(size) / "scores.parquet").to_pylist() for size in (1, 2))
    assert [row["score.buy"] for row in one] == pytest.approx([row["score.buy"] for row in two], rel=1e-5)


def read_scores(path):
    """Rows as Python reads the file, without Arrow but for Parquet."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        if ".jsonl" in path.name:
            return [json.loads(line) for line in file]
        return [
            {
                name: cell if name in ("key.session", "scenario.page") else None if cell == "" else float(cell)
                for name, cell in row.items()
            }
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("name", method_names())
def test_every_method_trains_or_says_why_not(name, root):
    chosen = method(name)
    tiny = {key: value for key, value in TINY.items() if key in chosen.Config.model_fields and not key.endswith("_fields")}
    with process_group() as world:
        for setting in chosen.settings:
            options = tiny | ({"condition": "self"} if (name, setting) == ("apg", Setting.MTL) else {})
            tasks = ["dataset.tasks=[click]"] if setting is Setting.MSL else []
            model = json.dumps({"name": name, **options})
            config = load_config(root / "config.yaml", [f"model={model}", f"dataset.setting={setting}", *tasks])
            session = build_session(config, world, for_training=True)
            before = [parameter.detach().clone() for parameter in session.network.parameters()]
            session.model.train()
            feed = session.prepare(session.reader("train").epoch(0), training=True)
            for _ in range(2):
                assert session.pipeline.progress(feed).objectives.isfinite().all()
            moved = [not old.equal(new) for old, new in zip(before, session.network.parameters(), strict=True)]
            assert sum(moved) > len(moved) / 2, (setting, moved)


REFUSED = {
    "apg": (["model.name=apg", "dataset.setting=mtl"], "numbers. Set model.condition=self."),
    "apg's field": (
        ["model={name: apg, condition_fields: [user]}"],
        "no field 'user': all features of this dataset are numbers",
    ),
    "pepnet's field": (["model={name: pepnet, prior_fields: [user]}"], "model.prior_fields: no field 'user': all features"),
    "sharding": (["embeddings.table_sharding={t: row_wise}"], "the dataset has no tables, all its features are numbers"),
    "scope": (["balancing={name: mgda, scope: embedding}"], "Use balancing.scope=shared_dense"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_ids_is_refused_with_what_is_possible(case, root):
    overrides, message = REFUSED[case]
    with process_group() as world, pytest.raises(ConfigError) as refusal:
        build_session(load_config(root / "config.yaml", overrides), world, for_training=True)
    assert message in str(refusal.value)


def test_neither_ids_nor_numbers(tmp_path):
    data = write_dataset(tmp_path / "data", rows=100, num_sparse=0, num_multi=0, num_dense=0)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=data.folder))
    with pytest.raises(DataError) as refusal:
        build_parts(load_config(tmp_path / "config.yaml"))
    assert "has no feature, so a model has nothing to read: make it again with some" in str(refusal.value)


def test_the_reader_gives_numbers_with_padding(root):
    data = write_dataset(root / "odd", rows=52, num_sparse=0, num_multi=0, num_dense=3)
    batches = list(Reader(data.folder, data.manifest, "train", tasks=["click"], batch_size=20, seed=1).epoch(0))
    assert [int(batch.valid.sum()) for batch in batches] == [20, 20, 12]
    seen = torch.cat([batch.dense[batch.valid] for batch in batches])
    expected = torch.stack([torch.tensor(data.tables["train"][f"d{i}"].to_pylist()) for i in range(3)], dim=1)
    assert sorted(seen.tolist()) == sorted(expected.tolist())
    assert not batches[-1].dense[12:].any()
