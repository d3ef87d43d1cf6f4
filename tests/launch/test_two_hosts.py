"""The commands of a Volcano job, run as they are on two hosts."""

import json
import os
import sys
from pathlib import Path

import pytest

from mmlrec.launch.presets import MountConfig, Preset, ResourceConfig
from mmlrec.launch.spec import train_app
from tests import processes
from tests.hosts import Hosts
from tests.processes import ROOT

pytest.importorskip("kubernetes", reason="TorchX needs the package kubernetes to write a Volcano job")
from tests.launch import volcano

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore:\\s*Role .* configured with restarts:UserWarning"),
]
CONFIG = "configs/scaling/synthetic.yaml"
OVERRIDES = ["training.max_steps=12", "training.batch_size=64", "training.checkpoint_every_steps=4", "training.timeout=60"]


def test_two_hosts_run_the_pods_commands_and_train_to_the_end(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # the working folder of the image
    made = ["-m", "preprocessing", "synthetic", "--rows", "3000", "--tasks", "2", "--scenarios", "3"]
    done = processes.run([sys.executable, *made, "--out", str(tmp_path / "data/synthetic")], timeout=120)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    shape = Preset(
        nodes=2,
        nproc=1,
        image="mmlrec",
        resource=ResourceConfig(cpu=1, memMB=4096),
        mounts=[MountConfig(type="volume", src="all", dst="/mmlrec")],
        env={"OMP_NUM_THREADS": "1"},
        max_retries=1,
    )
    job = volcano.dry_run(train_app(shape, config=CONFIG, overrides=OVERRIDES, run_dir="runs/a"))
    tasks, name = job["spec"]["tasks"], job["metadata"]["name"]
    hosts = [f"{volcano.pod(job, task)['metadata']['name']}.{name}.default.svc.cluster.local" for task in tasks]
    # What the image would bring: its interpreter as `python`, the packages, a home.
    image = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHONPATH": str(ROOT)}
    with Hosts(hosts, tmp_path) as pretend:
        logs = [tmp_path / f"{number}.log" for number in range(2)]
        pods = [
            pretend.start(
                number,
                volcano.command(job, task),
                env=image | volcano.environment(job, task),
                cwd=tmp_path,
                log=logs[number],
            )
            for number, task in enumerate(tasks)
        ]
        codes = [pod.wait(240) for pod in pods]
    said = "\n".join(log.read_text(errors="replace") for log in logs)
    assert codes == [0, 0], said
    assert json.loads(Path("runs/a/environment.json").read_text())["world_size"] == 2
    assert set(json.loads(Path("runs/a/result.json").read_text())["test"]["tasks"]) == {"task_0", "task_1"}
