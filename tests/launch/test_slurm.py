"""The launcher with a real Slurm of two nodes: a job trains like one process, and goes on after whatever ends it."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.datasets import write_dataset
from tests.launch.slow_mmoe import FAST_STEPS
from tests.processes import ROOT
from tests.slurm import NODES, Slurm
from tests.training.launch import losses, rank_process, tensors, validations

pytestmark = pytest.mark.cluster
PRESETS = """
presets:
  two: &two {{nodes: 2, nproc: 1, resource: {{cpu: 1, memMB: 1500}}, env: {{SLOW_WHILE: "{slow}"}}, max_retries: 2,
    scheduler: {{name: slurm, options: {{partition: main, time: "10"}}}}}}
  once: {{<<: *two, max_retries: 0}}
  gpus: {{nodes: 2, nproc: 8, resource: {{cpu: 1, gpu: 8, memMB: 2000}}, scheduler: {{name: slurm}}}}
"""
CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: slow_mmoe, use_bn: true, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4, init_std: 0.1, optimizer: {{name: sgd, lr: 0.05}}}}
dense: {{optimizer: {{name: sgd, lr: 0.05}}}}
training: {{batch_size: 50, eval_batch_size: 60, epochs: 3, log_every_steps: 1, checkpoint_every_steps: 40, patience: null}}
"""
STEPS, SAVED = 300, (40, 80, 100)  # in all; checkpoints of the first epoch


class Cluster:
    """A Slurm, and a folder that all its nodes see: dataset, configuration, presets, runs."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder, self.slow = slurm, folder, folder / "slow"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        variables = {"PATH": path, "SLURM_CONF": slurm.environment["SLURM_CONF"]}
        variables["PYTHONPATH"] = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
        self.environment = processes.environment() | variables | {"SLOW_WHILE": str(self.slow)}

    def launch(self, run: str, preset: str, *options: str):
        job = ["--preset", preset, "--config", "config.yaml", "--run_dir", f"runs/{run}", "--imports", "slow_mmoe", *options]
        command = [sys.executable, "-m", "apps.launch", "train", *job]
        return processes.run(command, cwd=self.folder, env=self.environment, timeout=120)

    def submit(self, run: str, preset: str = "two", *options: str) -> str:
        """Give a job to Slurm; its number."""
        done = self.launch(run, preset, *options)
        assert done.returncode == 0, done.stderr
        handle = done.stdout.splitlines()[-1]
        assert re.fullmatch(r"slurm://torchx/\d+", handle)
        return handle.rpartition("/")[2]

    def wait_for_step(self, run: str, step: int, seconds: float = 120) -> None:
        limit, path = time.monotonic() + seconds, self.folder / f"runs/{run}"
        while not (path / "metrics.jsonl").exists() or max(losses(path), default=0) < step:
            assert time.monotonic() < limit, self.logs()
            time.sleep(0.1)

    def logs(self, job: str = "") -> str:
        """Of one job or all, and of Slurm."""
        files = sorted(self.folder.glob(f"slurm-{job}*"))
        own = [f"--- {file.name}:\n{file.read_text(errors='replace')[-4000:]}" for file in files]
        return "\n".join(
            [*own, self.slurm.call("scontrol", "--oneliner", "show", "job", *([job] if job else [])), self.slurm.logs()]
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    write_dataset(folder / "data", rows={"train": 4987, "valid": 260, "test": 260}, table_rows=30)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))
    (folder / "torchx.yaml").write_text(PRESETS.format(slow=folder / "slow"))
    with Slurm() as slurm:
        yield Cluster(slurm, folder)


@pytest.fixture(scope="module")
def whole(cluster) -> Path:
    """The run folder of a job that nothing happened to."""
    job = cluster.submit("whole")
    assert cluster.slurm.ends(job, "COMPLETED", 300), cluster.logs(job)
    return cluster.folder / "runs/whole"


def test_a_job_that_no_node_can_hold_is_refused(cluster):
    refused = cluster.launch("never", "gpus")
    assert refused.returncode == 2
    assert "the Slurm partition main has 0 of that size: of its 2 node(s) the largest has 4 CPUs, 4096 MB" in refused.stderr


def test_a_job_of_two_nodes_trains_like_one_process(cluster, whole, tmp_path):
    assert json.loads((whole / "environment.json").read_text())["world_size"] == 2
    job = ["-m", "apps.train", "--import", "slow_mmoe", "--config", str(cluster.folder / "config.yaml")]
    arguments = [*job, "--run-dir", str(tmp_path / "one")]
    done = processes.run([sys.executable, *arguments], env=cluster.environment, timeout=240)
    assert done.returncode == 0, done.stderr
    expected, found = losses(tmp_path / "one"), losses(whole)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-6), f"step {step}"
    one, two = (json.loads((run / "result.json").read_text()) for run in (tmp_path / "one", whole))
    assert two["step"] == one["step"]
    for task, metrics in one["test"]["tasks"].items():
        for name in ("auc", "logloss", "gauc", "calibration"):
            assert two["test"]["tasks"][task][name] == pytest.approx(metrics[name], rel=1e-5), f"{task} {name}"


def requeue(cluster: Cluster, job: str) -> str:
    cluster.slurm.call("scontrol", "requeue", job)
    cluster.slow.unlink()
    cluster.slurm.start_requeued(job)
    return job


def lose_second_node(cluster: Cluster, job: str) -> str:
    """Without a signal to its processes."""
    (node,) = set(NODES) - {cluster.slurm.job(job)["BatchHost"]}
    return lose_node(cluster, job, node)


def lose_first_node(cluster: Cluster, job: str) -> str:
    """Where the batch script runs, and all ranks meet. Slurm starts this part of the job again, beside the other one."""
    return lose_node(cluster, job, cluster.slurm.job(job)["BatchHost"])


def lose_node(cluster: Cluster, job: str, node: str) -> str:
    cluster.slurm.kill_node(node)
    cluster.slurm.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    cluster.slow.unlink()
    cluster.slurm.start_node(node)  # which brings it back: ReturnToService
    cluster.slurm.start_requeued(job)
    return job


def kill_rank(cluster: Cluster, job: str) -> str:
    """As the kernel does where memory is short."""
    os.kill(rank_process("runs/kill_rank", 1), signal.SIGKILL)
    cluster.slow.unlink()
    cluster.slurm.start_requeued(job)
    return job


def cancel(cluster: Cluster, job: str) -> str:
    cluster.slurm.call("scancel", job)
    assert cluster.slurm.ends(job, "CANCELLED", 60), cluster.logs(job)
    cluster.slow.unlink()
    return cluster.submit("cancel")


def components(job: str) -> tuple[str, str]:
    """Numbers of the parts of a job, one for each node, which have a time limit each."""
    return job, str(int(job) + 1)


def limit_time(cluster: Cluster, job: str) -> None:
    """Whole minutes: one or two from now. Slurm looks each half minute."""
    hours, minutes, seconds = map(int, cluster.slurm.job(job)["RunTime"].split(":"))
    limit = -(-(3600 * hours + 60 * minutes + seconds + 65) // 60)
    for each in components(job):
        cluster.slurm.call("scontrol", "update", f"JobId={each}", f"TimeLimit={limit}")


def come_near_time_limit(cluster: Cluster, job: str) -> str:
    """A job that may be started again is asked to stop before it gets there, and asks for the start."""
    limit_time(cluster, job)
    cluster.slurm.wait_for_requeue(job)
    for each in components(job):
        cluster.slurm.call("scontrol", "update", f"JobId={each}", "TimeLimit=10")
    cluster.slow.unlink()
    cluster.slurm.start_requeued(job)
    return job


def reach_time_limit(cluster: Cluster, job: str) -> str:
    """Slurm does not start such a job again."""
    limit_time(cluster, job)
    assert cluster.slurm.ends(job, "TIMEOUT", 240), cluster.logs(job)
    cluster.slow.unlink()
    return cluster.submit("reach_time_limit", "once")


#: What ends a job -> how it is submitted, whether it saves before it ends, and whether Slurm starts it again.
ENDS: dict[Callable[[Cluster, str], str], tuple[str, bool, bool]] = {
    requeue: ("two", True, True),
    lose_second_node: ("two", False, True),
    lose_first_node: ("two", False, True),
    kill_rank: ("two", False, True),
    cancel: ("two", True, False),
    come_near_time_limit: ("two", True, True),
    reach_time_limit: ("once", True, False),
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_a_job_goes_on_to_the_bit(cluster, whole, end):
    preset, saves, started_again = ENDS[end]
    cluster.slow.touch()
    run_dir = cluster.folder / "runs" / end.__name__
    job = cluster.submit(end.__name__, preset)
    cluster.wait_for_step(end.__name__, FAST_STEPS)
    job = end(cluster, job)
    assert cluster.slurm.ends(job, "COMPLETED", 300), cluster.logs(job)
    assert (int(cluster.slurm.job(job)["Restarts"]) > 0) == started_again
    starts = re.findall(r"(new run|resumed) .*at step (\d+) of", (run_dir / "train.log").read_text())
    assert [how for how, _ in starts] == ["new run", "resumed"]
    step = int(starts[1][1])
    assert step > FAST_STEPS if saves else step in SAVED
    expected, found = (tensors(path / f"checkpoints/step_{STEPS:09d}") for path in (whole, run_dir))
    assert expected.keys() == found.keys()
    assert [key for key in expected if not expected[key].equal(found[key])] == []
    assert losses(run_dir) == losses(whole)
    assert validations(run_dir) == validations(whole)
    assert (run_dir / "result.json").read_text() == (whole / "result.json").read_text()


def test_a_mistake_of_the_user_costs_one_start(cluster):
    job = cluster.submit("mistake", "two", "dataset.path=dataa")
    assert cluster.slurm.ends(job, "FAILED", 240), cluster.logs(job)
    assert cluster.slurm.job(job)["Restarts"] == "0"
    said = [line for line in cluster.logs(job).splitlines() if "error: " in line and "dataa" in line]
    assert len(said) == 1, cluster.logs(job)
