"""Every method, strategy and optimizer on a GPU, against a CPU. Run by `pytest -m gpu`; one launch for each device.

Where there is no GPU, what can run on a CPU does so: that these tests themselves work is known before one is at hand.
"""

import itertools
import json
import shutil
import warnings

import pytest
import torch

from mmlrec.balancing import gradients
from mmlrec.balancing.base import to_host
from mmlrec.distributed.world import process_group
from mmlrec.layers.normalisation import PartitionedNorm
from mmlrec.layers.scenario import Dispatch
from mmlrec.registry import method, method_names, strategy_names
from mmlrec.schema import Setting
from tests.balancing.hostile import HOSTILE
from tests.balancing.support import GRADIENT_LEVEL, WAITING_ONCE, make
from tests.datasets import write_dataset
from tests.models.support import TINY
from tests.training.head_steps import training_step
from tests.training.launch import launch, losses, tensors

# One worker of pytest-xdist for all, which share their runs.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400), pytest.mark.xdist_group("gpu_methods")]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: mmoe}}
model_defaults: {options}
embeddings: {{dim: 8, init_std: 0.1, optimizer: {{name: adagrad, lr: 0.05}}}}
training: {{batch_size: 64, max_steps: 20, log_every_steps: 1, checkpoint_every_steps: 10}}
"""
# Each method in its widest setting; settings come in the order of their width.
PAIRS = list({name: setting for setting in Setting for name in method_names() if setting in method(name).settings}.items())
STRATEGIES = ["uw", "dwa", "pcgrad", "mgda", "cagrad", "gradnorm", "metabalance"]
SYNCHRONISING = "synchronizing CUDA operation"
OPTIMIZERS = ["sgd", "adagrad", "rowwise_adagrad", *(["adam"] if DEVICE == "cuda" else [])]


def train(root, name, *overrides):
    return {
        "kind": "train",
        "name": "all",
        "config": str(root / "config.yaml"),
        "overrides": list(overrides),
        "run_dir": str(root / name),
        "go_on": True,  # a run that fails is one test that fails: on a machine that is lent for minutes, all others count
    }


def of(root, name):
    """The folder of a run; of one that failed, why."""
    failure = root / f"{name}.failed"
    assert not failure.exists(), failure.read_text()[-6000:]
    return root / name


def of_method(root, name, setting, device):
    tasks = "[click]" if setting is Setting.MSL else "[click, buy]"
    return train(
        root,
        f"{device}-{name}-{setting}",
        f"model.name={name}",
        f"dataset.setting={setting}",
        f"dataset.tasks={tasks}",
        "training.max_steps=5",
        "training.checkpoint_every_steps=null",
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All runs: on the GPU those of methods, strategies, optimizers and resumes; on the CPU those of methods."""
    folder = tmp_path_factory.mktemp("gpu")
    write_dataset(folder / "data", rows=1280, table_rows=40, funnel=True)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data", options=json.dumps(TINY)))
    actions = [of_method(folder, name, setting, "gpu") for name, setting in PAIRS]
    actions += [train(folder, f"balancing-{name}", f"balancing.name={name}") for name in STRATEGIES]
    for name, precision in itertools.product(OPTIMIZERS, ("fp32", "bf16")):
        options = [f"embeddings.optimizer={{name: {name}, lr: 0.05}}", f"training.precision={precision}"]
        whole, part = f"{name}-{precision}", f"{name}-{precision}-resumed"
        actions.append(train(folder, whole, *options, "training.validate_every_steps=7"))
        actions.append(
            {"kind": "copy", "name": "all", "run_dir": str(folder / whole), "output": str(folder / part), "go_on": True}
        )
    launch(1, actions, folder / "first")
    # A process of its own resumes each copy, cut back to step 10.
    actions = []
    for name, precision in itertools.product(OPTIMIZERS, ("fp32", "bf16")):
        part = folder / f"{name}-{precision}-resumed"
        for path in part.glob("checkpoints/step_*20*"):
            shutil.rmtree(path)
        (part / "result.json").unlink(missing_ok=True)
        options = [f"embeddings.optimizer={{name: {name}, lr: 0.05}}", f"training.precision={precision}"]
        actions.append(train(folder, part.name, *options, "training.validate_every_steps=7"))
    launch(1, actions, folder / "second")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        launch(1, [of_method(folder, name, setting, "cpu") for name, setting in PAIRS], folder / "third")
    return folder


@on_gpu
def test_runs_were_on_the_gpu(root):
    text = (of(root, "gpu-mmoe-mtmsl") / "environment.json").read_text()
    assert torch.cuda.get_device_name() in text


@pytest.mark.parametrize(("name", "setting"), PAIRS)
def test_every_method_trains_as_on_a_cpu(root, name, setting):
    found, expected = losses(of(root, f"gpu-{name}-{setting}")), losses(of(root, f"cpu-{name}-{setting}"))
    assert found.keys() == expected.keys()
    assert len(expected) == 5
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=2e-3, abs=2e-4), step


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_stay_finite(root, name):
    assert all(abs(value) < 10 for value in losses(of(root, f"balancing-{name}"))[20].values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_is_uninterrupted(root, name, precision):
    """With a validation before and after the cut: its forward passes must not count as steps of a table optimizer."""
    whole, part = of(root, f"{name}-{precision}"), of(root, f"{name}-{precision}-resumed")
    expected, found = (tensors(run / "checkpoints" / "step_000000020") for run in (whole, part))
    differ = {k: (found[k].double() - v.double()).abs().max().item() for k, v in expected.items() if not found[k].equal(v)}
    assert not differ
    assert losses(whole) == losses(part)


@on_gpu
@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
def test_fused_optimizers_equal_torch(name):
    """The kernel's update of rows that every batch touches, over three steps, against torch's on the whole table."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

    kind = {"sgd": EmbOptimType.EXACT_SGD, "adagrad": EmbOptimType.EXACT_ADAGRAD, "adam": EmbOptimType.ADAM}[name]
    rows, dim = 50, 16
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        optimizer=kind,
        learning_rate=0.1,
        eps=1e-8,
        device=torch.device("cuda"),
    )
    weight = torch.randn(rows, dim, device="cuda")
    tables.split_embedding_weights()[0].copy_(weight)
    weight = weight.clone().requires_grad_()
    make = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}[name]
    optimizer = make([weight], lr=0.1, **({} if name == "sgd" else {"eps": 1e-8}))
    for _ in range(3):
        ids = torch.cat([torch.arange(rows), torch.randint(rows, (200,))]).cuda()
        pull = torch.randn(len(ids), dim, device="cuda")
        tables(ids, torch.arange(len(ids) + 1, device="cuda")).backward(pull)
        optimizer.zero_grad()
        torch.nn.functional.embedding(ids, weight).backward(pull)
        optimizer.step()
    torch.testing.assert_close(tables.split_embedding_weights()[0], weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("width", [1, 7, 16, 64])
def test_dispatch_equals_a_loop(dtype, tolerance, width, grouped):
    """Both strategies where they run, forward and backward, one scenario without rows; poisoned memory first."""
    torch.full((1 << 22,), float("nan"), device=DEVICE)
    stack, scenarios, rows, fan_in = 3, 5, 257, 13
    g = torch.Generator().manual_seed(width)
    scenario = torch.randint(0, scenarios - 1, (rows,), generator=g)
    x, weight, bias = (
        torch.randn(*shape, generator=g).to(DEVICE, dtype).requires_grad_()
        for shape in ((stack, rows, fan_in), (stack * scenarios, fan_in, width), (stack * scenarios, width))
    )
    dispatch = Dispatch(scenario.to(DEVICE), scenarios, grouped=grouped)
    y = dispatch.restore(dispatch.linear(dispatch.arrange(x), weight, bias))
    xs, ws, bs = (t.detach().cpu().double().requires_grad_() for t in (x, weight, bias))
    index = torch.arange(stack).view(-1, 1) * scenarios + scenario
    expected = (xs.unsqueeze(2) @ ws[index]).squeeze(2) + bs[index]
    pull = torch.randn(stack, rows, width, generator=g)
    got = [y, *torch.autograd.grad(y, [x, weight, bias], pull.to(DEVICE, dtype))]
    reference = [expected, *torch.autograd.grad(expected, [xs, ws, bs], pull.to(dtype).double())]
    for ours, theirs in zip(got, reference, strict=True):
        torch.testing.assert_close(
            ours.cpu().double(), theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item())
        )
    for gradient in got[2:]:
        assert (gradient.unflatten(0, (stack, scenarios))[:, -1] == 0).all()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dispatch_waits_for_no_result_of_the_device(dtype):
    """In fp32 grouped_mm would ask for the sizes of the groups in each call."""
    stack, scenarios, rows, fan_in, width = 3, 5, 257, 13, 16
    scenario = torch.randint(scenarios, (rows,), device=DEVICE)
    x = torch.randn(stack, rows, fan_in, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(stack * scenarios, fan_in, width, device=DEVICE, dtype=dtype, requires_grad=True)
    bias = torch.randn(stack * scenarios, width, device=DEVICE, dtype=dtype, requires_grad=True)

    def step():
        dispatch = Dispatch(scenario, scenarios, grouped=True)
        y = dispatch.restore(dispatch.linear(dispatch.arrange(x), weight, bias))
        return torch.autograd.grad(y, [x, weight, bias], torch.ones_like(y))

    step()  # the first call may wait while it makes handles and workspaces
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(gradient.isfinite().all() for gradient in found)


@on_gpu
def test_partitioned_norm_is_the_same_to_the_bit_each_time():
    """CUDA's `index_add` adds the rows of a scenario as they come; two runs would differ."""
    scenario, pull = torch.randint(3, (65536,), device=DEVICE), torch.randn(65536, 64, device=DEVICE)
    rows = torch.randn(65536, 64, device=DEVICE)
    found = []
    for _ in range(3):
        layer, x = PartitionedNorm(3, 64).to(DEVICE), rows.clone().requires_grad_()
        y = layer(x, scenario)
        y.backward(pull)
        found.append([y, x.grad, layer.running_var, *(parameter.grad for parameter in layer.parameters())])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@on_gpu
@pytest.mark.parametrize("name", strategy_names())
def test_a_step_with_a_strategy_waits_once_for_a_solver_and_else_never(name, monkeypatch):
    """Behind the lookup. The one wait is for an event, which torch does not count; all that it counts is too much."""
    waited = []
    monkeypatch.setattr(gradients, "to_host", lambda values: waited.append(name) or to_host(values))
    with process_group():
        step = training_step("ple", "mtmsl", DEVICE, balancing=name, unit="head")
        for _ in range(3):  # the first ones may wait while they make handles, workspaces and pinned memory
            step()
        waited.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                for _ in range(4):
                    step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waited) == 4 * (name in WAITING_ONCE)
    assert [str(warning.message) for warning in seen if SYNCHRONISING in str(warning.message)] == []


@on_gpu
@pytest.mark.parametrize("name", [name for name in GRADIENT_LEVEL if name != "monitor"])
def test_coefficients_are_those_of_a_cpu(name):
    """Under Gram matrices as training hardly gives them, three steps with what the strategy remembers."""
    for case, gram in HOSTILE.items():
        here, there = make(name, len(gram)), make(name, len(gram)).to(DEVICE)
        matrix = torch.from_numpy(gram)
        for step, values in enumerate(torch.rand(3, len(gram), dtype=torch.float64), 1):
            expected = here.coefficients(matrix, values, step)
            found = there.coefficients(matrix.to(DEVICE), values.to(DEVICE), step)
            assert found.is_cuda
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-12 * expected.abs().max().item(), msg=case)
