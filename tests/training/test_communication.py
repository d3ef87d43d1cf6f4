"""`embeddings.communication`: what goes over the wire is rounded, in training steps only, and training is hardly changed."""

import json

import pytest
import torch
from fbgemm_gpu.quantize_comm import QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec import EmbeddingBagConfig

from mmlrec.config import EmbeddingsConfig
from mmlrec.embeddings.communication import Communication
from mmlrec.embeddings.hardware import CPU, GPU, Hardware
from mmlrec.embeddings.placement import place_tables
from mmlrec.embeddings.sharding import apply_table_optimizer
from mmlrec.embeddings.tables import build_tables
from mmlrec.errors import ConfigError
from tests.datasets import write_dataset
from tests.training.launch import launch, losses

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [12, 8], tower_hidden_units: [4]}}
embeddings: {{dim: 4, init_std: 0.1}}
training: {{batch_size: 64, eval_batch_size: 16, max_steps: 20, patience: null, log_every_steps: 1}}
"""
#: On two pretend hosts of two ranks; each carries its vectors otherwise.
PLANS = ("table_wise", "table_row_wise", "row_wise")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("communication")
    write_dataset(root / "data", rows=640, table_rows=30, num_scenarios=0)
    (root / "config.yaml").write_text(CONFIG.format(dataset=root / "data"))

    def action(kind, name, *overrides):
        config = str(root / "config.yaml")
        return {"kind": kind, "name": "all", "config": config, "overrides": list(overrides), "run_dir": str(root / name)}

    actions = []
    for plan in PLANS:
        for precision in ("fp32", "fp16"):
            keys = [f"embeddings.sharding={plan}", f"embeddings.communication={precision}"]
            actions += [action("wire", f"wire-{plan}-{precision}", *keys), action("train", f"{plan}-{precision}", *keys)]
    evaluated = action("evaluate", "row_wise-fp16") | {"output": str(root / "evaluated-4.json")}
    launch(4, [*actions, evaluated], root / "four", hosts=2)
    launch(1, [evaluated | {"output": str(root / "evaluated-1.json")}], root / "one")
    return root


@pytest.mark.parametrize("plan", PLANS)
def test_half_the_bytes_in_training_and_none_less_in_evaluation(runs, plan):
    for rank in range(4):
        plain, rounded = (json.loads((runs / f"wire-{plan}-{p}" / f"{rank}.json").read_text()) for p in ("fp32", "fp16"))
        assert set(plain["train"]) == set(plain["valid"]) == {"float32"}
        assert rounded["train"] == {"float16": plain["train"]["float32"] / 2} != {"float16": 0}
        assert rounded["valid"] == plain["valid"]


def test_the_bytes_of_whole_and_of_split_tables_are_those_of_the_formula(runs):
    """Of 4 tables of width 4 and a global batch of 64, 16 rows on each of 4 ranks; each rank holds one table."""
    for plan, numbers in (
        # Forward the vectors of its table for all rows, backward gradients of its rows for all tables.
        ("table_wise", 64 * 4 + 16 * 4 * 4),
        # Forward partial sums of all tables for all rows, backward gradients of its rows.
        ("row_wise", 64 * 4 * 4 + 16 * 4 * 4),
    ):
        sent = json.loads((runs / f"wire-{plan}-fp32" / "0.json").read_text())["train"]["float32"]
        assert sent == 4 * numbers


@pytest.mark.parametrize("plan", PLANS)
def test_training_is_that_of_fp32_within_the_rounding(runs, plan):
    plain, rounded = losses(runs / f"{plan}-fp32"), losses(runs / f"{plan}-fp16")
    assert list(plain) == list(rounded) == list(range(1, 21))
    assert plain != rounded
    for step, values in plain.items():
        assert rounded[step] == pytest.approx(values, rel=2e-3), f"step {step}"


def test_what_is_measured_is_not_rounded(runs):
    """The run's own test on 4 ranks, and evaluations of it on 4 and on 1, agree as those of an fp32 run do."""
    own = json.loads((runs / "row_wise-fp16" / "result.json").read_text())["test"]["tasks"]
    for ranks in (4, 1):
        report = json.loads((runs / f"evaluated-{ranks}.json").read_text())
        for task, values in report["tasks"].items():
            assert values["logloss"] == pytest.approx(own[task]["logloss"], rel=1e-6)
            assert values["auc"] == own[task]["auc"]


def test_small_gradients_are_not_lost():
    """Of a batch of 65,536 they are below what fp16 can hold; the factor must be gone only in float32."""
    gradients = torch.randn(1000) / 65536 / 100
    codecs = Communication("fp16", 65536, [4]).codecs["POOLED_EMBEDDINGS_ALL_TO_ALL"]
    found = codecs.backward.decode(codecs.backward.encode(gradients))
    torch.testing.assert_close(found, gradients, rtol=2**-11, atol=2**-40)
    usual = QuantizedCommCodec(SparseType.FP16, loss_scale=65536.0)
    lost = usual.decode(usual.encode(gradients))
    assert ((lost - gradients).abs() > 0.05 * gradients.abs()).float().mean() > 0.3
    assert codecs.forward.encode(torch.tensor([float("nan")])).isnan().all()


def planned(precision, hardware, **options):
    names = [EmbeddingBagConfig(name=n, embedding_dim=64, num_embeddings=10**5, feature_names=[n]) for n in ("a", "b")]
    tables = build_tables(names)
    config = EmbeddingsConfig(communication=precision, **options)
    apply_table_optimizer(tables, config.optimizer, torch.device(hardware.device))
    return place_tables(tables, config, hardware, batch_size=1024)


@pytest.mark.parametrize("sharding", PLANS)
def test_the_plan_knows_it(sharding):
    hardware = Hardware(8, 4, "cuda", 2**34, GPU)
    plain, half = (planned(precision, hardware, sharding=sharding) for precision in ("fp32", "bf16"))
    for table, other in zip(plain, half, strict=True):
        for phase in ("vectors", "gradients"):
            assert other.shards[0].times[phase] == pytest.approx(table.shards[0].times[phase] / 2)
        assert other.shards[0].times["ids"] == table.shards[0].times["ids"]


def test_what_a_device_cannot_do_is_refused():
    for precision in ("bf16", "fp8"):
        with pytest.raises(ConfigError, match=rf"embeddings.communication: '{precision}' needs GPUs"):
            planned(precision, Hardware(2, 2, "cpu", 2**34, CPU))
        planned(precision, Hardware(1, 1, "cpu", 2**34, CPU))  # nothing is sent
    on_gpus = Hardware(4, 2, "cuda", 2**34, GPU)
    assert {table.sharding for table in planned("fp8", on_gpus)} == {"table_wise"}
    for sharding in ("row_wise", "table_row_wise"):
        with pytest.raises(ConfigError, match=rf"table_sharding.a: vectors of {sharding} .* nobody does in fp8"):
            planned("fp8", on_gpus, table_sharding={"a": sharding})
