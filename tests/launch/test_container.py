"""The image: built on a base that debootstrap makes, then run without git, home, user name, network, or a writable system."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3000)]
BASE, IMAGE = "localhost/mmlrec-base", "localhost/mmlrec"
DATA = "python -m preprocessing synthetic --rows 4000 --tasks 2 --scenarios 3 --out data/synthetic"
TRAIN = "torchrun --standalone --nproc-per-node 2 -m apps.train --config configs/scaling/synthetic.yaml --run-dir runs/a"
# Where a machine allows no raising of limits, podman's own are too high for it.
LIMITS = ["--ulimit", "nofile=1024:4096", "--ulimit", "nproc=4096:4096"]


def call(*command: str, seconds: int = 1800) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.fixture(scope="module")
def podman(tmp_path_factory):
    """The engine with a storage of its own, and the base image in it."""
    missing = [tool for tool in ("podman", "debootstrap") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"containers need root and {', '.join(missing) or 'podman'}")
    folder = tmp_path_factory.mktemp("podman")
    engine = ["podman", "--root", f"{folder}/root", "--runroot", f"{folder}/run", "--storage-driver", "vfs"]
    engine += ["--cgroup-manager", "cgroupfs", *(["--runtime", "runc"] if shutil.which("runc") else [])]
    packages = "--include=python3,python3-venv,ca-certificates"
    made = call("debootstrap", "--variant=minbase", packages, "bookworm", f"{folder}/base")
    if made.returncode:
        pytest.skip(f"debootstrap could not make a base: {made.stdout.strip().splitlines()[-1:]}")
    archive = f"{folder}/base.tar"
    subprocess.run(["tar", "-C", f"{folder}/base", "-cf", archive, "."], check=True)
    shutil.rmtree(f"{folder}/base")
    loaded = call(*engine, "import", archive, BASE)
    assert loaded.returncode == 0, loaded.stderr
    started = call(*engine, "run", "--rm", *LIMITS, "--network", "none", BASE, "true")
    if started.returncode:
        pytest.skip(f"podman starts no container here: {started.stderr.strip()}")
    yield engine
    call(*engine, "rmi", "--all", "--force")
    shutil.rmtree(folder, ignore_errors=True)


def pip_settings(folder: Path) -> list[str]:
    """What this machine's pip is configured with, for the build: one file, and the folders and files that it names."""
    listed = call(sys.executable, "-m", "pip", "config", "list").stdout
    settings: dict[str, str] = {}
    for name, value in sorted(re.findall(r"^(?::env:|global)\.(\S+)=(.+)$", listed, re.MULTILINE), reverse=True):
        settings[name] = ast.literal_eval(value)
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    options = ["-v", f"{folder}/pip.conf:/etc/pip.conf:ro"]
    for word in " ".join(settings.values()).split():
        path = word.removeprefix("file://")
        if path.startswith("/") and Path(path).exists():
            options += ["-v", f"{path}:{path}:ro"]
    return options


@pytest.fixture(scope="module")
def image(podman, tmp_path_factory):
    settings = pip_settings(tmp_path_factory.mktemp("pip"))
    isolation = ["--isolation", "chroot", "--network", "host", "--layers=false", "--format", "docker"]
    built = call(*podman, "build", *isolation, *LIMITS, *settings, "--build-arg", f"BASE={BASE}", "-t", IMAGE, ".")
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return IMAGE


def test_the_image_checks_itself_makes_data_trains_and_goes_on(podman, image, tmp_path):
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)

    def run(*command: str) -> str:
        """In a container of a user that the image does not know, whose file system is only read."""
        alone = ["--read-only", "--network", "none", "--user", "54321:54321", "--shm-size", "256m"]
        mounts = [word for name in ("data", "runs") for word in ("-v", f"{tmp_path}/{name}:/mmlrec/{name}")]
        done = call(*podman, "run", "--rm", *LIMITS, *alone, *mounts, image, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "All is well." in run()
    facts = run("sh", "-c", "id -u; command -v git || echo no git; touch /mmlrec/x 2> /dev/null || echo read only")
    assert facts.splitlines() == ["54321", "no git", "read only"]
    run(*DATA.split())
    run(*TRAIN.split(), "training.max_steps=20", "training.batch_size=64")
    assert json.loads((tmp_path / "runs/a/environment.json").read_text())["world_size"] == 2
    assert "resumed from" in run(*TRAIN.split(), "training.max_steps=30", "training.batch_size=64")
    assert json.loads((tmp_path / "runs/a/result.json").read_text())["test"]["tasks"]


def test_the_image_holds_the_package_and_nothing_of_the_machine_that_built_it(podman, image):
    told = call(*podman, "image", "inspect", image).stdout
    (facts,) = json.loads(told)
    assert facts["Config"]["User"] == "10001:10001"
    assert facts["Config"]["WorkingDir"] == "/mmlrec"
    assert facts["Config"]["Cmd"] == ["python", "-m", "mmlrec.doctor"]
    assert facts["Healthcheck"]["Test"] == ["CMD", "python", "-m", "mmlrec.doctor"]
    assert str(ROOT) not in told
    listed = call(*podman, "run", "--rm", *LIMITS, "--network", "none", image, "ls", "/mmlrec").stdout.split()
    assert listed == ["configs", "data", "runs", "torchx.yaml"]
