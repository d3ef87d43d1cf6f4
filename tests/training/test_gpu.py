"""What only a GPU can show: NCCL, CUDA kernels and streams, fused Adam. Run by `pytest -m gpu`, skipped without one."""

import pytest
import torch

from tests.datasets import write_dataset
from tests.training.launch import launch, losses

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

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

    def call(name: str, *overrides: str):
        run_dir = tmp_path / name
        config = str(tmp_path / "config.yaml")
        launch(
            1,
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


def test_fused_adam_trains_tables(train):
    steps = train("adam", "embeddings.optimizer={name: adam, lr: 0.01}")
    assert sum(steps[20].values()) < sum(steps[1].values())


def test_bf16_trains(train):
    """As fp32 does, within its precision, and not as a model that learns nothing does."""
    found, expected = train("bf16", "training.precision=bf16"), train("fp32")
    assert sum(found[20].values()) == pytest.approx(sum(expected[20].values()), rel=3e-2)
    assert sum(found[20].values()) < 0.97 * sum(found[1].values())
