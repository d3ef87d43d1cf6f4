"""`embeddings.dtype`: what the kernels do with fp16, and what loads into what."""

import itertools
import json

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torchrec import EmbeddingBagConfig
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_configs import DataType

from mmlrec.config import EmbeddingsConfig, TableOptimizerConfig, load_config
from mmlrec.distributed.world import process_group
from mmlrec.embeddings.hardware import GPU, Hardware
from mmlrec.embeddings.placement import TablesDoNotFit, place_tables
from mmlrec.embeddings.sharding import apply_table_optimizer
from mmlrec.embeddings.tables import build_tables, initial_rows
from mmlrec.errors import CheckpointError, ConfigError
from mmlrec.evaluation.evaluation import evaluate_split
from mmlrec.export.model import Exported, export_model
from mmlrec.run_folder import checkpoint
from mmlrec.run_folder.folder import RunFolder
from mmlrec.run_folder.table_rows import TableRows
from mmlrec.serving import load
from mmlrec.session.session import build_session, load_session
from mmlrec.training.run import train
from mmlrec.warm_start.source import open_source
from mmlrec.warm_start.take import take
from tests.datasets import with_vocabularies, write_dataset
from tests.training.launch import tensors

STEPS = 6
GIB = 2**30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return with_vocabularies(write_dataset(tmp_path_factory.mktemp("dtypes") / "data", rows=200, num_multi=0, table_rows=40))


@pytest.fixture
def world():
    with process_group() as world:
        yield world


def config_of(data, *overrides, dtype="fp16", optimizer="adagrad"):
    content = {
        "dataset": {"path": str(data.folder)},
        "model": {"name": "mlp", "dnn_hidden_units": [8]},
        "embeddings": {"dim": 4, "init_std": 0.3, "dtype": dtype, "optimizer": {"name": optimizer}},
        "training": {"batch_size": 25, "max_steps": STEPS, "patience": None, "checkpoint_every_steps": 3},
    }
    return load_config(content, list(overrides))


def weights(session):
    """Table -> its weights, of a model on one rank."""
    found = session.model.state_dict()
    return {
        row["table"]: found[f"tables.embedding_bags.{row['table']}.weight"].local_shards()[0].tensor for row in session.plan
    }


def kernel_of(session):
    """The one that looks up all tables, as they are alike: ids and offsets of the tables one after the other."""
    tables = get_unwrapped_module(session.model).tables
    lookups = [lookup for module in tables.modules() for lookup in getattr(module, "_lookups", ())]
    (kernel,) = [m for lookup in lookups for m in lookup.modules() if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)]
    return kernel


def half(numbers):
    return numbers.half().float()


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_cpu_rounds_rows_in_fp16_to_nearest_after_each_update(data, world, optimizer):
    """SGD and Adagrad round the update first, then what it gives; row-wise Adagrad what it gives. State is fp32.

    Gradients are given here, so that all else is arithmetic: each row is looked up once.
    """
    session = build_session(config_of(data, optimizer=optimizer), world, for_training=True)
    start = {row["table"]: half(initial_rows(row["table"], 0, row["rows"], row["dim"], 0.3, 0)) for row in session.plan}
    for name, found in weights(session).items():
        assert found.dtype == torch.float16
        assert torch.equal(found.float(), start[name])
    assert all(row["weight_bytes"] == 2 * row["rows"] * row["dim"] for row in session.plan)
    kernel = kernel_of(session)
    rows = [row["rows"] for row in session.plan]
    ids = torch.cat([torch.arange(least := min(rows))] * len(rows))
    offsets = torch.arange(len(ids) + 1)
    expected = torch.stack([start[row["table"]][:least] for row in session.plan], 1)  # [N, tables, D], as it is looked up
    state = torch.zeros_like(expected)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        looked_up = kernel(ids, offsets)
        assert looked_up.dtype == torch.float32
        assert torch.equal(looked_up.view_as(expected).detach(), expected)
        gradient = torch.randn(expected.shape, generator=generator)
        looked_up.backward(gradient.view_as(looked_up))
        if optimizer == "sgd":
            expected = half(expected - half(0.05 * gradient))
        elif optimizer == "adagrad":
            state += gradient * gradient
            expected = half(expected - half(0.05 * gradient / (state.sqrt() + 1e-8)))
        else:
            state += (gradient * gradient).mean(-1, keepdim=True)
            expected = half(expected - 0.05 / (state.sqrt() + 1e-8) * gradient)
        found = kernel(ids, offsets).detach().view_as(expected)
        # The kernels may round a product of fp32 otherwise than torch does: that moves few numbers, by one digit of fp16.
        assert (found != expected).float().mean() < 0.005
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=2**-14)
        expected = found


def test_a_cpu_loses_updates_below_half_a_digit(data, world):
    """1,000 updates of 1e-5: fp32 moves by .01 from .5, whose digits in fp16 are 2^-11 apart; fp16 does not move."""
    moved = {}
    for dtype in ("fp32", "fp16"):
        session = build_session(config_of(data, dtype=dtype, optimizer="sgd"), world, for_training=True)
        kernel = kernel_of(session)
        for table in weights(session).values():
            table.fill_(0.5)
        ids, offsets = torch.zeros(len(session.plan), dtype=torch.long), torch.arange(len(session.plan) + 1)
        for _ in range(1000):
            looked_up = kernel(ids, offsets)
            looked_up.backward(torch.full_like(looked_up, 2e-4))
        moved[dtype] = 0.5 - float(kernel(ids, offsets)[0, 0])
    assert moved["fp32"] == pytest.approx(0.01, rel=1e-2)
    assert moved["fp16"] == 0


def test_bf16_is_refused_with_what_there_is(data):
    """On every device: fbgemm has no kernels for such tables, neither on CPUs nor on GPUs."""
    with pytest.raises(ConfigError, match=r"embeddings\.dtype: .*found 'bf16'\. .*fbgemm has fp32 and fp16"):
        config_of(data, dtype="bf16")


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(data, tmp_path, world):
    config = config_of(data)
    train(config, tmp_path / "one", world)
    train(config_of(data, "training.max_steps=3"), tmp_path / "two", world)
    train(config, tmp_path / "two", world)
    one, two = (tensors(tmp_path / name / "checkpoints" / f"step_{STEPS:09d}") for name in ("one", "two"))
    tables = [key for key in one if key.startswith("model.tables")]
    assert {one[key].dtype for key in tables} == {torch.float16}
    assert {value.dtype for key, value in one.items() if key.startswith("optimizer.tables")} == {torch.float32}
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("stored", "held", "loads"),
    [
        (torch.float16, torch.float32, True),
        (torch.float32, torch.float16, False),
    ],
)
def test_a_checkpoint_loads_where_no_number_is_rounded(tmp_path, world, stored, held, loads):
    numbers = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(stored)
    checkpoint.save(tmp_path / "step_000000001", {"model.t": numbers}, {"step": 1}, world)
    into = {"model.t": torch.zeros(5, 4, dtype=held)}
    if loads:
        checkpoint.load(tmp_path / "step_000000001", into, world)
        assert torch.equal(into["model.t"], numbers.to(held))
        return
    with pytest.raises(
        CheckpointError, match=rf"'model.t' is {str(stored)[6:]}, this model holds {str(held)[6:]}, which would"
    ):
        checkpoint.load(tmp_path / "step_000000001", into, world)
    assert not into["model.t"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_a_table_are_read_in_fp32_whatever_is_stored(tmp_path, world, dtype):
    numbers = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    checkpoint.save(tmp_path / "best", {"model.t": numbers}, {"step": 1}, world)
    found = list(TableRows(tmp_path / "best", ["model.t"]).read("model.t", 7))
    assert {piece.dtype for piece in found} == {torch.float32}
    assert torch.equal(torch.cat(found), numbers.float())


def test_a_run_is_evaluated_and_exported_as_what_it_stores(data, tmp_path, world):
    """Nothing is rounded but by an export in int8."""
    train(config_of(data), tmp_path / "run", world)
    folder = RunFolder(tmp_path / "run")
    kept = {key: value for key, value in tensors(folder.best).items() if key.startswith("model.tables")}
    session = load_session(folder, world, []).session
    for name, found in weights(session).items():
        assert found.dtype == torch.float16
        assert torch.equal(found, kept[f"model.tables.embedding_bags.{name}.weight"])
    report = evaluate_split(session, "test")
    assert 0 < report["tasks"]["click"]["auc"] < 1
    for tables in ("fp32", "fp16", "int8"):
        export_model(Exported(folder, tmp_path / tables, tables=tables), world)
        model = load(tmp_path / tables)
        for name, table in model._tables.items():
            stored = kept[f"model.tables.embedding_bags.{name}.weight"]
            ids = np.arange(len(stored))
            if tables != "int8":
                assert np.array_equal(table.rows(ids), stored.float().numpy())
            assert json.loads((tmp_path / tables / "model.json").read_text())["parity"]
    del session


def test_rows_of_another_run_are_rounded_and_that_is_told(data, tmp_path, world):
    """fp32 into fp16 to the nearest number, and back without loss; of a table that is wider here nothing."""
    train(config_of(data, "embeddings.table_dim.t2=8", dtype="fp32"), tmp_path / "wide", world)
    train(config_of(data), tmp_path / "half", world)
    for source, here, note in (("wide", "fp16", "rounded to float16, float32 there"), ("half", "fp32", "")):
        config = config_of(data, f"init_from={tmp_path / source}", dtype=here)
        session = build_session(config, world, for_training=True)
        fresh = {name: table.clone() for name, table in weights(session).items()}
        into = RunFolder(tmp_path / f"from-{source}")
        into.create()
        take(session, open_source(config, into.path, world), into)
        told = {table["table"]: table for table in json.loads(into.init_from.read_text())["tables"]}
        theirs = tensors(tmp_path / source / "checkpoints" / "best")
        for name, found in weights(session).items():
            if (source, name) == ("wide", "t2"):
                assert torch.equal(found, fresh[name])
                assert told[name]["note"] == "its rows are 4 wide here, 8 there"
                assert told[name]["taken"] == 0
                continue
            assert torch.equal(found, theirs[f"model.tables.embedding_bags.{name}.weight"].to(found.dtype))
            assert told[name]["note"] == note
    parameters = {p["name"]: p["is"] for p in json.loads((tmp_path / "from-wide/init_from.json").read_text())["parameters"]}
    assert "in part" in parameters.values()  # columns of f2 begin anew


def test_numbers_beyond_fp16_are_not_taken(data, tmp_path, world):
    train(config_of(data, dtype="fp32"), tmp_path / "run", world)
    best = tmp_path / "run" / "checkpoints" / "best"
    state, kept = checkpoint.read_state(best), tensors(best)
    kept["model.tables.embedding_bags.t1.weight"][3, 1] = 7e4
    checkpoint.save(best, kept, state, world)
    config = config_of(data, f"init_from={tmp_path / 'run'}")
    with pytest.raises(CheckpointError, match="init_from: table 't1' has 70000, which is beyond float16: choose another"):
        train(config, tmp_path / "new", world)


def placed(gib, dtype, optimizer="adagrad", sharding="auto"):
    """A table of 2^27 x 8 on two GPUs, of each of which so many GiB can be planned with."""
    kind = {"fp32": DataType.FP32, "fp16": DataType.FP16}[dtype]
    table = EmbeddingBagConfig(name="a", embedding_dim=8, num_embeddings=2**27, feature_names=["a"], data_type=kind)
    config = EmbeddingsConfig(dtype=dtype, optimizer=TableOptimizerConfig(name=optimizer), sharding=sharding)
    tables = build_tables([table])
    apply_table_optimizer(tables, config.optimizer, torch.device("cuda"))
    (found,) = place_tables(tables, config, Hardware(2, 2, "cuda", int(gib * GIB / 0.85), GPU), batch_size=64)
    return found


def test_plans_count_state_and_vectors_of_half_tables_in_fp32():
    """Weights take 2 GiB, Adagrad's state 4. The planner of torchrec takes the state to be 2, and vectors half as long."""
    assert placed(3.1, "fp16").weight_bytes == 2 * GIB  # (2 + 4) / 2 on each
    with pytest.raises(TablesDoNotFit):
        placed(2.9, "fp16")
    placed(1.4, "fp16", "rowwise_adagrad")  # (2 + .5) / 2
    with pytest.raises(TablesDoNotFit):
        placed(1.2, "fp16", "rowwise_adagrad")
    half_table, single = (placed(8, dtype, sharding="row_wise").shards for dtype in ("fp16", "fp32"))
    assert [shard.buffers for shard in half_table] == [shard.buffers for shard in single]
    assert half_table[0].times["vectors"] == single[0].times["vectors"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_rounds_at_random_so_that_small_updates_count_on_average(data, world):
    """Of 1,000 updates of 1e-5 on 40 x 4 numbers: each is rounded up or down, and their mean moves as in fp32."""
    session = build_session(config_of(data, optimizer="sgd"), world, for_training=True)
    assert {table.dtype for table in weights(session).values()} == {torch.float16}
    kernel = kernel_of(session)
    assert kernel.stochastic_rounding
    for table in weights(session).values():
        table.fill_(0.5)
    least = min(row["rows"] for row in session.plan)
    ids = torch.cat([torch.arange(least)] * len(session.plan)).cuda()
    offsets = torch.arange(len(ids) + 1).cuda()
    for _ in range(1000):
        looked_up = kernel(ids, offsets)
        looked_up.backward(torch.full_like(looked_up, 2e-4))
    found = kernel(ids, offsets).detach()
    assert float(found.mean()) == pytest.approx(0.49, abs=0.002)
    assert len(found.unique()) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_fp16_trains_on_a_gpu_as_fp32_does_within_its_digits(data, world, optimizer):
    ends = {}
    for dtype in ("fp32", "fp16"):
        session = build_session(config_of(data, dtype=dtype, optimizer=optimizer), world, for_training=True)
        session.model.train()
        feed = session.prepare(itertools.chain.from_iterable(session.reader("train").epoch(n) for n in range(3)), training=True)
        while True:
            try:
                ends[dtype] = float(session.pipeline.progress(feed).objectives.sum())
            except StopIteration:
                break
    assert ends["fp16"] == pytest.approx(ends["fp32"], rel=0.05)
