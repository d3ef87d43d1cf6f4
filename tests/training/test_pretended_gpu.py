"""What is written for GPUs, executed on one that is none (`tests/pretended_gpu.py`): on the right device, and as on a CPU."""

import contextlib
import json
import shutil
import subprocess
import sys

import pytest
import torch

from mmlrec.registry import method, method_names, strategy_names
from mmlrec.schema import Setting
from tests.datasets import write_dataset
from tests.models.support import TINY
from tests.processes import ROOT, environment
from tests.training.launch import free_port, launch, losses

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("pretended_gpu"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]
CONFIG = """
dataset: {{path: {dataset}, setting: mtmsl}}
model: {{name: mmoe}}
model_defaults: {options}
embeddings: {{dim: 8, init_std: 0.1, optimizer: {{name: adagrad, lr: 0.05}}}}
training: {{batch_size: 64, max_steps: 2, log_every_steps: 1}}
"""
#: Each method in its widest setting; settings come in the order of their width.
PAIRS = list({name: setting for setting in Setting for name in method_names() if setting in method(name).settings}.items())
RUNS = {
    **{name: [f"model.name={name}", f"dataset.setting={setting}"] for name, setting in PAIRS},
    **{f"balancing-{name}": [f"balancing.name={name}"] for name in strategy_names()},
    **{f"dense-{name}": [f"dense.optimizer.name={name}", "dense.clip_norm=0.1", "dense.l2=0.1"] for name in ("sgd", "adagrad")},
    **{f"tables-{name}": [f"embeddings.optimizer.name={name}"] for name in ("sgd", "rowwise_adagrad")},
    "normalised": ["model.use_bn=true", "embeddings.l2=0.1"],
    "row_wise": ["embeddings.sharding=row_wise"],
}
_SGD = ["embeddings.optimizer.name=sgd", "dense.optimizer.name=sgd"]
#: On two ranks, which see one GPU alone each.
RUNS_OF_TWO = {
    "table_wise": ["embeddings.sharding=table_wise", "model.use_bn=true"],
    "row_wise": ["embeddings.sharding=row_wise", "balancing.name=pcgrad"],
    "replicas": ["embeddings.replicas=2", *_SGD],  # whose mean after each step is the step of the mean gradient
}
#: Where the host waits for the GPU in steps after the first two, by the file of the code that asks, a line each.
WAITS = """
from tests.pretended_gpu import install
install()
import sys, traceback, warnings
import torch
from mmlrec.distributed.world import process_group
from mmlrec.registry import load
from mmlrec.session.session import build_session

def told(message):
    if "synchronizing" in str(message.message):
        files = [frame.filename for frame in reversed(traceback.extract_stack())]
        print(next(file for file in files if "/mmlrec/" in file or "/torchrec/" in file), message.message)

with process_group() as world:
    for name in sys.argv[2:]:
        session = build_session(load(sys.argv[1], [f"model.name={name}"]), world, for_training=True)
        session.model.train()
        feed = session.prepare(session.reader("train").epoch(0), training=True)
        for _ in range(2):
            session.pipeline.progress(feed)
        warnings.simplefilter("always")
        warnings._showwarnmsg = told
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(3):
            session.pipeline.progress(feed)
        torch.cuda.set_sync_debug_mode("default")
"""


WORKER = ("-m", "tests.pretended_gpu", "tests.training.worker")


def actions(root, device, runs, **options):
    """Of `worker.py`: to train these runs."""
    return [
        {
            "kind": "train",
            "name": "all",
            "config": str(root / "config.yaml"),
            "overrides": overrides,
            "run_dir": str(root / f"{device}-{name}"),
            **options,
        }
        for name, overrides in runs.items()
    ]


def pretended(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a configuration."""
    folder = tmp_path_factory.mktemp("pretended")
    write_dataset(folder / "data", rows=640, table_rows=40, funnel=True)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data", options=json.dumps(TINY)))
    return folder


@pytest.fixture(scope="module")
def runs(root):
    """All runs, on the GPU and on the CPU."""

    (root / "actions.json").write_text(json.dumps(actions(root, "cuda", RUNS, go_on=True)))
    pretended(*WORKER, str(root / "actions.json"))
    launch(1, actions(root, "cpu", RUNS), root)
    return root


@pytest.mark.parametrize("name", RUNS)
def test_trains_validates_saves_and_tests_as_on_a_cpu(runs, name):
    failure = runs / f"cuda-{name}.failed"
    assert not failure.exists(), failure.read_text()[-6000:]
    found, expected = losses(runs / f"cuda-{name}"), losses(runs / f"cpu-{name}")
    assert found.keys() == expected.keys() == {1, 2}
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4, abs=1e-5)


def test_two_gpus_train_as_one_process(root):
    """By gloo in place of NCCL."""
    file = root / "of-two.json"
    file.write_text(json.dumps(actions(root, "two", RUNS_OF_TWO)))
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [root / f"of-two-{rank}.log" for rank in range(2)]
    with contextlib.ExitStack() as opened:
        ranks = [
            subprocess.Popen(
                [sys.executable, *WORKER, str(file)],
                env=environment(**where, RANK=str(rank), LOCAL_RANK=str(rank)),
                cwd=ROOT,
                stdout=opened.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        for rank in ranks:
            opened.callback(rank.kill)
        codes = [rank.wait(300) for rank in ranks]
    assert codes == [0, 0], "".join(log.read_text()[-4000:] for log in logs)
    alone = {name: [o for o in of if not o.startswith("embeddings.replicas")] for name, of in RUNS_OF_TWO.items()}
    launch(1, actions(root, "one", alone), root)
    for name in RUNS_OF_TWO:
        for step, values in losses(root / f"one-{name}").items():
            assert losses(root / f"two-{name}")[step] == pytest.approx(values, rel=1e-4, abs=1e-5), (name, step)


def test_in_a_step_only_torchrec_waits_and_batches_come_from_page_locked_memory(root):
    (root / "waits.py").write_text(WAITS)
    lines = pretended(str(root / "waits.py"), str(root / "config.yaml"), "mmoe", "single_task").splitlines()
    assert [line for line in lines if "/torchrec/" not in line.partition(" ")[0] or "page-locked" in line] == []
    assert lines  # it is seen where torchrec does


def test_it_refuses_what_cuda_would(root):
    """Else all that runs on it would say nothing."""
    script = root / "refused.py"
    script.write_text(
        """
from tests.pretended_gpu import install
install()
import copy, torch
there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)

def refused(call, words):
    try:
        call()
    except (RuntimeError, TypeError) as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)

for call in (lambda: there + here, lambda: there @ here, lambda: torch.nn.functional.linear(there, here)):
    refused(call, "Expected all tensors to be on the same device")
refused(lambda: torch.ops.mkldnn._linear_pointwise(there, there, None, "none", [], ""), "Could not run")
refused(there.numpy, "can't convert cuda:0 device type tensor to numpy")
torch.cuda.set_sync_debug_mode("error")
for call in (there.tolist, there.nonzero, there.cpu, lambda: there[there > 0], lambda: torch.tensor([1.0], device="cuda")):
    refused(call, "synchronizing CUDA operation")
refused(lambda: here.to("cuda", non_blocking=True), "not page-locked")
late = there.to("cpu", non_blocking=True)
assert late.isnan().all()  # until it is waited for
torch.cuda.current_stream().record_event().synchronize()
assert late.eq(1).all()
torch.cuda.set_sync_debug_mode("default")
twin = copy.deepcopy(there)
assert twin.is_cuda and twin.data_ptr() != there.data_ptr() and twin.cpu().eq(1).all()
assert (there * torch.tensor(2.0)).requires_grad is False  # one number of the host is let pass
with torch.autocast("cuda", torch.bfloat16):
    assert (there @ there).dtype == torch.bfloat16
"""
    )
    pretended(str(script))
