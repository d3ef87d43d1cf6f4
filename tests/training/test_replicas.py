"""Several copies of the tables: planned anywhere, trained on GPUs only; here torchrec's own on four CPU ranks all the same."""

import json
from pathlib import Path

import pytest
import torch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import train_pipelines

from mmlrec.config import EmbeddingsConfig, load_config
from mmlrec.distributed.world import process_group
from mmlrec.embeddings.hardware import GPU, Hardware
from mmlrec.embeddings.replicas import check_replicas
from mmlrec.errors import ConfigError
from mmlrec.session.session import build_session
from tests.datasets import write_dataset
from tests.training import launch as ranks
from tests.training.launch import launch, losses, tensors

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [12, 8], tower_hidden_units: [4]}}
embeddings: {{dim: 4, init_std: 0.1, optimizer: {{name: sgd, lr: 0.05}}}}
training: {{batch_size: 64, eval_batch_size: 16, max_steps: 7, patience: null, log_every_steps: 1}}
"""
PLANS = ("table_wise", "table_row_wise", "row_wise")
TWO = "embeddings.replicas=2"
ADAGRAD = "embeddings.optimizer.name=adagrad"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("replicas")
    write_dataset(root / "data", rows=640, table_rows=30, num_scenarios=0)
    (root / "config.yaml").write_text(CONFIG.format(dataset=root / "data"))

    def action(kind, name, *overrides, **more):
        config = str(root / "config.yaml")
        return {
            "kind": kind,
            "name": "all",
            "config": config,
            "overrides": list(overrides),
            "run_dir": str(root / name),
            **more,
        }

    # Two hosts of two ranks are two replicas; or four ranks of a host.
    four = [action("train", plan, TWO, f"embeddings.sharding={plan}") for plan in PLANS]
    four += [action("train", "rarely", TWO, ADAGRAD, "embeddings.average_every=3", "embeddings.sharding=row_wise")]
    four += [action("train", "often", TWO, ADAGRAD, "embeddings.sharding=row_wise")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "WORKER", Path(__file__).with_name("replicas_on_cpu.py"))
        launch(4, four, root / "four", hosts=2)
    one = [action("train", "one"), action("train", "one-adagrad", ADAGRAD)]
    one += [action("reshard", "rarely", ADAGRAD, output=str(root / "rarely-in-one"))]
    launch(1, one, root / "single")
    back = action("reshard", "one-adagrad", TWO, ADAGRAD, "embeddings.sharding=row_wise", output=str(root / "one-in-two"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "WORKER", Path(__file__).with_name("replicas_on_cpu.py"))
        launch(4, [back], root / "four-again")
    return root


@pytest.mark.long
@pytest.mark.parametrize("plan", PLANS)
def test_with_sgd_and_an_average_each_step_they_are_one_process(runs, plan):
    """The mean of two steps of w - lr g is the step of the mean gradient."""
    expected, found = losses(runs / "one"), losses(runs / plan)
    assert list(found) == list(expected) == list(range(1, 8))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-5), f"step {step}"
    report = json.loads((runs / plan / "plan.json").read_text())
    assert {table["sharding"] for table in report} == {plan}
    assert {rank for table in report for rank in table["ranks"]} <= {0, 1}


@pytest.mark.long
def test_otherwise_they_are_another_algorithm_whose_checkpoints_are_those_of_one(runs):
    rarely, often, single = (losses(runs / name) for name in ("rarely", "often", "one-adagrad"))
    assert rarely[1] == pytest.approx(single[1], rel=1e-6)
    assert rarely[1] == often[1]
    assert rarely[2] != often[2]  # of replicas that have met after the first step, and of some that have not
    assert abs(rarely[7]["click"] - single[7]["click"]) > 1e-6
    for source, moved in (("rarely", "rarely-in-one"), ("one-adagrad", "one-in-two")):
        before, after = tensors(runs / source / "checkpoints/step_000000007"), tensors(runs / moved)
        assert before.keys() == after.keys()
        assert len([key for key in before if key.endswith("momentum1")]) == 4
        for key, value in before.items():
            assert after[key].equal(value), key


def test_the_pipeline_averages_nothing_itself(tmp_path, monkeypatch):
    """When it is time for that is the trainer's to know; torchrec's pipeline would do it after each step."""
    write_dataset(tmp_path / "data", rows=200, num_scenarios=0)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=tmp_path / "data"))
    averages = []
    monkeypatch.setattr(train_pipelines, "DMPCollection", DistributedModelParallel)
    monkeypatch.setattr(DistributedModelParallel, "sync", lambda _: averages.append(1), raising=False)
    with process_group() as world:
        session = build_session(load_config(tmp_path / "config.yaml"), world, for_training=True)
        session.model.train()
        feed = session.prepare(session.reader("train").epoch(0), training=True)
        for _ in range(2):
            session.pipeline.progress(feed)
    assert averages == []


def test_refused_where_nothing_averages_them():
    check_replicas(EmbeddingsConfig(), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"embeddings.replicas: 2 copies of the tables need GPUs"):
        check_replicas(EmbeddingsConfig(replicas=2), torch.device("cpu"))
    content = {"dataset": {"path": "x"}, "embeddings": {"replicas": 2, "optimizer": {"name": "adam"}}}
    with pytest.raises(ConfigError, match=r"embeddings: the state of 'adam' is not averaged over replicas"):
        load_config(content)  # for a plan, too


@pytest.mark.parametrize(
    ("world_size", "each", "replicas", "expected"),
    [(64, 8, 1, (64, 8)), (64, 8, 2, (32, 8)), (64, 8, 8, (8, 8)), (64, 8, 16, (4, 4)), (64, 8, 64, (1, 1))],
)
def test_a_replica_is_whole_hosts_or_an_equal_part_of_one(world_size, each, replicas, expected):
    part = Hardware(world_size, each, "cuda", 2**30, GPU).of_replica(replicas)
    assert (part.world_size, part.ranks_per_host) == expected


@pytest.mark.parametrize(("world_size", "each", "replicas"), [(64, 8, 3), (24, 8, 2), (24, 8, 4), (6, 4, 2)])
def test_other_divisions_are_refused(world_size, each, replicas):
    hardware = Hardware(world_size, each, "cuda", 2**30, GPU)
    with pytest.raises(ConfigError, match=rf"embeddings.replicas: {world_size} ranks on hosts of {each} cannot be divided"):
        hardware.of_replica(replicas)
