"""`python -m apps.launch`: the preset's scheduler and its options, and what is said where a job cannot be sent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmlrec.launch.cluster import Node, slurm_nodes
from tests import processes

REPOSITORY = Path(__file__).parents[2]
CONFIG = "dataset: {path: data, setting: mtl}\nmodel: {name: shared_bottom}\n"
SINFO = """\
main*|64|515000+|gpu:a100:8(S:0-1)
main*|64|515000|gpu:a100:8(S:0-1),shard:16
main*|16|64000|(null)
debug|4|1|gpu:2
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The answers of a Slurm to `sinfo` and `sbatch`; the script that sbatch got lies in `script`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "sinfo").write_text(SINFO)
    (folder / "sinfo").write_text(
        f'#!/bin/bash\ncase "$*" in *--version*) echo slurm 24.05.8;; *%P,%m*) exit 1;; *) cat {tmp_path}/sinfo;; esac\n'
    )
    (folder / "sbatch").write_text(
        f'#!/bin/bash\n[ ! -e {tmp_path}/closed ] || {{ echo "sbatch: error: closed" >&2; exit 1; }}\n'
        f'echo "$@" > {tmp_path}/given\ncp "${{@: -1}}" {tmp_path}/script\necho 41\n'
    )
    for tool in folder.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "c.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "apps.launch", *arguments]
    return processes.run(command, cwd=folder, env=processes.environment(), timeout=120)


def preset(folder: Path, text: str) -> None:
    (folder / "torchx.yaml").write_text(f"presets:\n  a: {{nproc: 8, {text}}}\n")


BIG = "resource: {cpu: 64, memMB: 400000, gpu: 8}"
SMALL = "resource: {cpu: 1, memMB: 1000}"


def test_a_slurm_job_is_submitted_with_the_presets_options_and_its_handle_is_the_last_line(slurm):
    preset(slurm, f"nodes: 2, {BIG}, scheduler: {{name: slurm, options: {{partition: main, time: '1:00:00', comment: 'a b'}}}}")
    done = launch(slurm, "train", "--preset", "a", "--config", "c.yaml", "training.seed=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "slurm://torchx/41"
    assert "--comment=a b" in (slurm / "given").read_text()
    script = (slurm / "script").read_text()
    assert script.count("--partition=main --time=1:00:00") == 2
    assert "training.seed=3" in script


def test_a_dry_run_submits_nothing(slurm):
    preset(slurm, f"{BIG}, scheduler: {{name: slurm}}")
    done = launch(slurm, "--dryrun", "train", "--preset=a", "--config", "c.yaml")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --job-name=c-0" in done.stdout
    assert not (slurm / "given").exists()


def test_a_training_that_may_be_started_again_is_asked_to_stop_before_slurms_time_limit(slurm):
    """Which ends a job for good. Half a minute is for asking Slurm to start it again."""
    for retries, asked in ((2, 2), (0, 0)):
        preset(slurm, f"nodes: 2, {BIG}, scheduler: {{name: slurm}}, shutdown_timeout: 40, max_retries: {retries}")
        for dry in (["--dryrun"], []):
            done = launch(slurm, *dry, "train", "--preset", "a", "--config", "c.yaml")
            assert done.returncode == 0, done.stderr
            said = done.stdout if dry else (slurm / "script").read_text()
            assert said.count("--signal=USR1@70") == asked
            assert said.count("--signal=USR1") == asked


def refusals() -> list:
    slurm = "scheduler: {name: slurm%s}"
    return [
        (f"nodes: 3, {BIG}, {slurm % ''}", "c: asks for 3 node(s) with 64 CPUs, 400000 MB and 8 GPUs each, and the Slurm"
         " partition main has 2 of that size: of its 3 node(s) the largest has 64 CPUs, 515000 MB and 8 GPUs."),
        (f"{BIG}, {slurm % ', options: {partition: debug}'}", "the Slurm partition debug has 0 of that size"),
        (f"{SMALL}, {slurm % ', options: {partitoin: x}'}", "scheduler.options.partitoin: no option of slurm."
         " Did you mean 'partition'?"),
        (f"{SMALL}, scheduler: {{name: slrum}}", "presets.a.scheduler.name:"),
        (SMALL, "preset 'a' names no scheduler. Add one, such as `scheduler: {name: slurm}`"),
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), refusals())
def test_what_cannot_be_sent_is_one_line(slurm, text, message):
    preset(slurm, text)
    done = launch(slurm, "train", "--preset", "a", "--config", "c.yaml")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert not (slurm / "given").exists()


def test_sbatchs_own_refusal_is_shown(slurm):
    preset(slurm, f"{BIG}, scheduler: {{name: slurm}}")
    (slurm / "closed").touch()
    done = launch(slurm, "train", "--preset", "a", "--config", "c.yaml")
    assert done.returncode == 2
    assert "sbatch: error: closed\n" in done.stderr
    assert done.stderr.endswith("error: sbatch refused the job (exit code 1); why stands above.\n")


def test_more_gpus_than_this_machine_has_are_refused(slurm):
    preset(slurm, "resource: {cpu: 1, memMB: 100, gpu: 999}, scheduler: {name: local_cwd}")
    done = launch(slurm, "train", "--preset", "a", "--config", "c.yaml")
    assert done.returncode == 2
    assert "asks for 1 node(s) with 1 CPUs, 100 MB and 999 GPUs each, and this machine has" in done.stderr


def test_an_unreachable_cluster_is_one_line(slurm, monkeypatch):
    pytest.importorskip("kubernetes")
    monkeypatch.setenv("KUBECONFIG", str(slurm / "none"))
    preset(slurm, f"{SMALL}, image: i, mounts: [{{type: volume, src: r, dst: /mmlrec/runs}}],"
           " scheduler: {name: kubernetes, options: {queue: q}}")  # fmt: skip
    done = launch(slurm, "train", "--preset", "a", "--config", "c.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: kubernetes does not take the job: ")
    assert "Traceback" not in done.stderr


def test_a_local_job_runs_to_its_end_and_gives_its_exit_code(tmp_path):
    (tmp_path / "torchx.yaml").write_text(
        "presets: {a: {nproc: 1, resource: {cpu: 1, memMB: 1000}, scheduler: {name: local_cwd, options: {log_dir: logs}}}}"
    )
    made = ["preprocess", "--preset", "a", "--dataset", "synthetic", "--out", "data", "--", "--rows", "200", "--tasks", "2"]
    done = launch(tmp_path, *made)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/manifest.json").is_file()
    assert list((tmp_path / "logs").rglob("stdout.log"))
    done = launch(tmp_path, *made[:-1], "3")
    assert done.returncode == 1
    assert "error: data holds dataset" in done.stderr + done.stdout


def test_sinfo_is_read_as_slurm_writes_it(slurm):
    large = Node(64, 515000, 8)
    assert slurm_nodes(None) == ("main", [large, large, Node(16, 64000, 0)])
    assert slurm_nodes("debug") == ("debug", [Node(4, 1, 2)])
    assert slurm_nodes("none") == ("none", [])


def test_without_slurm_nothing_is_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert slurm_nodes(None) == ("", [])
