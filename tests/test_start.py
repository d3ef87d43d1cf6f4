"""What a training imports before its first step: most of the time of a short run."""

import json
import os
import subprocess
import sys

import torch

from tests.datasets import write_dataset
from tests.processes import ROOT, environment

#: Modules that take long to import, and that no training needs. What torch and torchrec import themselves cannot be left out.
NEEDLESS = {
    "torch.distributed.optim",  # compiles seven optimizers
    *("torch._inductor.compile_fx", "torch._inductor.graph", "triton"),
    *("torchrec.inference", "torchrec.models", "torchrec.metrics", "torchx", "torch.distributed.run"),
    *("sklearn", "scipy", "matplotlib", "IPython", "onnx", "onnxruntime", "safetensors.torch"),
    "pandas",
    *("s3fs", "aiobotocore", "aiohttp", "pyspark", "kubernetes", "fastapi", "uvicorn"),
    *("mmlrec.balancing.strategies.pcgrad", "mmlrec.balancing.strategies.famo"),  # strategies of which none is asked for
    *("preprocessing", "mmlrec.api", "mmlrec.export", "mmlrec.serving", "mmlrec.launch", "mmlrec.testing"),
}

CODE = """
import atexit, json, os, runpy, sys

class First:  # is asked first where a module is
    def find_spec(self, name, *_):
        if name == "torch":
            spins.append(os.environ.get("GOMP_SPINCOUNT"))

spins = []
sys.meta_path.insert(0, First())
atexit.register(lambda: print(json.dumps([spins[0], sorted(sys.modules)])))
sys.argv = ["apps.train", *sys.argv[1:]]
runpy.run_module("apps.train", run_name="__main__", alter_sys=True)
"""


def trained(tmp_path):
    write_dataset(tmp_path / "data", rows=64, table_rows=40)
    config = f"""
dataset: {{path: {tmp_path / "data"}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [4], gate_hidden_units: [], tower_hidden_units: []}}
embeddings: {{dim: 8}}
training: {{batch_size: 16, max_steps: 2}}
"""
    (tmp_path / "config.yaml").write_text(config)
    command = [sys.executable, "-c", CODE, "--config", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run")]
    variables = environment()
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):  # an entry point may have run in this process
        variables.pop(name, None)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    spin, modules = json.loads(done.stdout.splitlines()[-1])
    return spin, modules


def test_a_training_imports_nothing_that_it_does_not_need(tmp_path):
    spin, modules = trained(tmp_path)
    assert "torchrec" in modules
    by_torchrec = {"triton"} if torch.version.cuda else set()  # in builds for GPUs torchrec takes it along
    assert sorted(NEEDLESS & set(modules) - by_torchrec) == []
    assert spin == "10000", "threads must let go of a core soon, which OpenMP reads when torch is imported"


def test_what_a_user_says_of_waiting_threads_stays(monkeypatch):
    from apps.cli import run

    for name, value in {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "active"}.items():
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setenv(name, value)
        seen = []
        run(lambda seen=seen: seen.append(os.environ.get("GOMP_SPINCOUNT")))
        assert seen == [value if name == "GOMP_SPINCOUNT" else None]
