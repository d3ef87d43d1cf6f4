"""The launcher with a real Slurm of two nodes."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.processes import ROOT
from tests.slurm import Slurm

pytestmark = pytest.mark.cluster
PRESETS = """
presets:
  two: {nodes: 2, nproc: 1, resource: {cpu: 1, memMB: 2000}, scheduler: {name: slurm, options: {partition: main, time: "10"}}}
  gpus: {nodes: 2, nproc: 8, resource: {cpu: 1, gpu: 8, memMB: 2000}, scheduler: {name: slurm}}
"""


def test_a_job_of_two_nodes_is_submitted_by_one_command_and_trains_to_the_end(tmp_path):
    (tmp_path / "torchx.yaml").write_text(PRESETS)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    synthetic = ["-m", "preprocessing", "synthetic", "--rows", "3000", "--tasks", "2", "--scenarios", "3"]
    done = processes.run([sys.executable, *synthetic, "--out", str(tmp_path / "data/synthetic")], timeout=120)
    assert done.returncode == 0, done.stderr
    job = [
        "--config",
        "configs/scaling/synthetic.yaml",
        "--run_dir",
        "runs/a",
        "training.max_steps=12",
        "training.batch_size=64",
    ]
    with Slurm() as slurm:
        path = os.pathsep.join([str(Path(sys.executable).parent), slurm.environment["PATH"]])
        environment = slurm.environment | processes.environment(PATH=path, SLURM_CONF=slurm.environment["SLURM_CONF"])

        def launch(preset: str):
            command = [sys.executable, "-m", "apps.launch", "train", "--preset", preset, *job]
            return processes.run(command, cwd=tmp_path, env=environment, timeout=120)

        refused = launch("gpus")
        assert refused.returncode == 2
        assert "the Slurm partition main has 0 of that size: of its 2 node(s) the largest has 4 CPUs, 4096 MB" in refused.stderr
        handles = []
        for run in ("a", "b"):  # The second beside the first, on the same nodes.
            job[job.index("--run_dir") + 1] = f"runs/{run}"
            done = launch("two")
            assert done.returncode == 0, done.stderr
            handles.append(done.stdout.splitlines()[-1])
        assert all(re.fullmatch(r"slurm://torchx/\d+", handle) for handle in handles)
        for handle in handles:
            slurm.wait(handle.rpartition("/")[2], 300)
        logs = "\n".join(log.read_text(errors="replace")[-3000:] for log in tmp_path.glob("slurm-*"))
    for run in ("a", "b"):
        assert (tmp_path / f"runs/{run}/result.json").is_file(), logs
        assert json.loads((tmp_path / f"runs/{run}/environment.json").read_text())["world_size"] == 2
