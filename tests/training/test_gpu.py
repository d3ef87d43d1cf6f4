"""What only a GPU can show: NCCL, CUDA kernels and streams, fused Adam. Run by `pytest -m gpu`.

Where there is no GPU, what can run on a CPU does so: that these tests themselves work is known before one is at hand.
"""

import json

import pytest
import torch

from tests.datasets import write_dataset
from tests.training.launch import launch, losses

pytestmark = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: mmoe, expert_hidden_units: [16, 8], use_bn: true}}
embeddings: {{dim: 8, init_std: 0.1}}
training: {{batch_size: 64, max_steps: 20, log_every_steps: 1}}
"""


@pytest.fixture
def train(tmp_path):
    write_dataset(tmp_path / "data", rows=640, table_rows=40)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=tmp_path / "data"))

    def call(name: str, *overrides: str, ranks: int = 1):
        run_dir = tmp_path / name
        config = str(tmp_path / "config.yaml")
        launch(
            ranks,
            [{"kind": "train", "name": "all", "config": config, "overrides": list(overrides), "run_dir": str(run_dir)}],
            tmp_path,
        )
        return losses(run_dir)

    return call


# Without normalisation the rows of the three scenarios are dispatched, on CUDA in blocks of rows.
@pytest.mark.parametrize("use_bn", ["true", "false"])
def test_trains_as_on_a_cpu(train, monkeypatch, use_bn):
    found = train("cuda", f"model.use_bn={use_bn}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    expected = train("cpu", f"model.use_bn={use_bn}")
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "auto"])
def test_plans_agree(train, sharding):
    assert train(sharding, f"embeddings.sharding={sharding}")[20] == pytest.approx(train("again")[20], rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "auto"])
def test_two_gpus_train_as_one(train, sharding):
    """Tables, gradients of the network and moments of normalised layers by NCCL."""
    found = train("two", f"embeddings.sharding={sharding}", ranks=2)
    for step, values in train("one").items():
        assert found[step] == pytest.approx(values, rel=1e-3, abs=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_replicas_with_sgd_and_an_average_each_step_are_one_process(train, sharding):
    """Each copy on one GPU, or on two of four; with Adagrad they are another algorithm, which trains."""
    sgd = ["embeddings.optimizer={name: sgd, lr: 0.05}", "dense.optimizer={name: sgd, lr: 0.05}", "model.use_bn=false"]
    ranks = 4 if torch.cuda.device_count() >= 4 else 2
    found = train("two", *sgd, "embeddings.replicas=2", f"embeddings.sharding={sharding}", ranks=ranks)
    for step, values in train("one", *sgd).items():
        assert found[step] == pytest.approx(values, rel=1e-4, abs=1e-4)
    steps = train("adagrad", "embeddings.replicas=2", "embeddings.average_every=4", ranks=ranks)
    assert sum(steps[20].values()) < sum(steps[1].values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("precision", "sharding"), [("fp16", "row_wise"), ("bf16", "row_wise"), ("fp8", "table_wise")])
def test_shorter_vectors_between_ranks_train_as_fp32(train, precision, sharding):
    keys = [f"embeddings.sharding={sharding}", "training.max_steps=10"]
    found = train("shorter", *keys, f"embeddings.communication={precision}", ranks=2)
    expected = train("fp32", *keys, ranks=2)
    assert found != expected
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=5e-2 if precision == "fp8" else 1e-2)


@on_gpu
def test_tables_in_the_memory_of_the_host_train_and_go_on_elsewhere(train, tmp_path):
    """A cache of a tenth of the rows is much too small for a batch: rows come and go. Their checkpoint goes on without it."""
    keys = ["embeddings.optimizer.name=rowwise_adagrad"]
    expected = train("fused", *keys)
    plan = json.loads((tmp_path / "fused" / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps([table | {"kernel": "fused_uvm_caching"} for table in plan]))
    cached = [*keys, "embeddings.host_cache=0.1", f"embeddings.plan={tmp_path / 'plan.json'}"]
    found = train("cached", *cached)
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-3, abs=1e-4)
    kernels = {table["kernel"] for table in json.loads((tmp_path / "cached" / "plan.json").read_text())}
    assert kernels == {"fused_uvm_caching"}
    train("moved", *cached, "training.max_steps=12")
    moved = train("moved", *cached[:1])
    for step, values in expected.items():
        assert moved[step] == pytest.approx(values, rel=1e-3, abs=1e-4)
    # The test at the end is of the best checkpoint, whose rows must not be those of the cache.
    tested = [json.loads((tmp_path / name / "result.json").read_text())["test"]["tasks"] for name in ("fused", "cached")]
    for task, values in tested[0].items():
        assert tested[1][task]["logloss"] == pytest.approx(values["logloss"], rel=1e-3)


@on_gpu
def test_fused_adam_trains_tables(train):
    steps = train("adam", "embeddings.optimizer={name: adam, lr: 0.01}")
    assert sum(steps[20].values()) < sum(steps[1].values())


def test_bf16_trains(train):
    """As fp32 does, within its precision, and not as a model that learns nothing does."""
    found, expected = train("bf16", "training.precision=bf16"), train("fp32")
    assert sum(found[20].values()) == pytest.approx(sum(expected[20].values()), rel=3e-2)
    assert sum(found[20].values()) < 0.97 * sum(found[1].values())
