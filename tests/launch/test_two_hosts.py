"""The commands of a Volcano job and of a TrainJob, run as they are on two hosts."""

import json
import os
import sys
from pathlib import Path

import pytest

from mmlrec.launch.presets import MountConfig, Preset, ResourceConfig
from mmlrec.launch.spec import train_app
from tests import processes
from tests.hosts import Hosts
from tests.launch import test_train_job as train_job
from tests.processes import ROOT

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore:\\s*Role .* configured with restarts:UserWarning"),
]
CONFIG = "configs/scaling/synthetic.yaml"
OVERRIDES = ["training.max_steps=12", "training.batch_size=64", "training.checkpoint_every_steps=4", "training.timeout=60"]
# The commands of all pods with the variables that the cluster adds, and the full names of the hosts that they are on.
Pods = tuple[list[tuple[list[str], dict[str, str]]], list[str]]


def volcano_pods() -> Pods:
    pytest.importorskip("kubernetes", reason="TorchX needs the package kubernetes to write a Volcano job")
    from tests.launch import volcano

    shape = Preset(
        nodes=2,
        nproc=1,
        image="mmlrec",
        resource=ResourceConfig(cpu=1, memMB=4096),
        mounts=[MountConfig(type="volume", src="all", dst="/mmlrec")],
        max_retries=1,
    )
    job = volcano.dry_run(train_app(shape, config=CONFIG, overrides=OVERRIDES, run_dir="runs/a"))
    tasks, name = job["spec"]["tasks"], job["metadata"]["name"]
    hosts = [f"{volcano.pod(job, task)['metadata']['name']}.{name}.default.svc.cluster.local" for task in tasks]
    return [(volcano.command(job, task), volcano.environment(job, task)) for task in tasks], hosts


def train_job_pods() -> Pods:
    """The template as it is, but for the data, the steps and the eight GPUs."""
    (container,) = train_job.pod()["spec"]["containers"]
    words = [*container["command"], *container["args"], *OVERRIDES]
    words[words.index("--config") + 1], words[words.index("--run-dir") + 1] = CONFIG, "runs/a"
    # What Kubeflow Trainer adds for its torch policy; a pod is <job>-node-0-<index> below the service <job>.
    given = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "mmlrec-x-node-0-0.mmlrec-x"}
    given |= {"PET_MASTER_PORT": "29400"} | {variable["name"]: variable["value"] for variable in container["env"]}
    pods = [(words, given | {"PET_NODE_RANK": str(rank)}) for rank in range(2)]
    return pods, [f"mmlrec-x-node-0-{rank}.mmlrec-x.default.svc.cluster.local" for rank in range(2)]


@pytest.mark.parametrize("made", [volcano_pods, train_job_pods])
def test_two_hosts_run_the_pods_commands_and_train_to_the_end(made, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # the working folder of the image
    synthetic = ["-m", "preprocessing", "synthetic", "--rows", "3000", "--tasks", "2", "--scenarios", "3"]
    done = processes.run([sys.executable, *synthetic, "--out", str(tmp_path / "data/synthetic")], timeout=120)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    pods, names = made()
    # What the image would bring: its interpreter as `python`, and the packages.
    image = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHONPATH": str(ROOT)}
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    with Hosts(names, tmp_path) as hosts:
        running = [
            hosts.start(number, command, env=image | variables | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, log=logs[number])
            for number, (command, variables) in enumerate(pods)
        ]
        codes = [process.wait(300) for process in running]
    said = "\n".join(log.read_text(errors="replace") for log in logs)
    assert codes == [0, 0], said
    assert json.loads(Path("runs/a/environment.json").read_text())["world_size"] == 2
    assert set(json.loads(Path("runs/a/result.json").read_text())["test"]["tasks"]) == {"task_0", "task_1"}
