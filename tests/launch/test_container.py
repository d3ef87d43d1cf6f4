"""The image: built on a base that debootstrap makes, then run without git, home, user name, network, or a writable system."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import Chroot, Podman, call, debian

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3000)]
DATA = "python -m preprocessing synthetic --rows 4000 --tasks 2 --scenarios 3 --out data/synthetic"
TRAIN = "torchrun --standalone --nproc-per-node 2 -m apps.train --config configs/scaling/synthetic.yaml --run-dir runs/a"


def pip_settings(folder: Path) -> list[str]:
    """What this machine's pip is configured with, for the build: one file, and the folders and files that it names."""
    listed = call(sys.executable, "-m", "pip", "config", "list").stdout
    settings: dict[str, str] = {}
    for name, value in sorted(re.findall(r"^(?::env:|global)\.(\S+)=(.+)$", listed, re.MULTILINE), reverse=True):
        settings[name] = ast.literal_eval(value)
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    volumes = [f"{folder}/pip.conf:/etc/pip.conf:ro"]
    for word in " ".join(settings.values()).split():
        # The pages of an index in a folder lead to files beside it.
        path = Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word)
        if path.is_absolute() and path.exists():
            volumes.append(f"{path}:{path}:ro")
    return volumes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("base")
    yield debian(folder / "debian")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", params=[Podman, Chroot], ids=["podman", "chroot"])
def image(request, base, tmp_path_factory) -> Iterator[Podman | Chroot]:
    engine = request.param(tmp_path_factory.mktemp("engine"))
    engine.build(base, pip_settings(tmp_path_factory.mktemp("pip")))
    yield engine
    engine.close()


def test_the_image_checks_itself_makes_data_trains_and_goes_on(image, tmp_path):
    mounts = {tmp_path / name: f"/mmlrec/{name}" for name in ("data", "runs")}
    for folder in mounts:
        folder.mkdir()
        folder.chmod(0o777)

    def run(*command: str) -> str:
        done: subprocess.CompletedProcess[str] = image.run(list(command), mounts)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "All is well." in run()
    facts = run("sh", "-c", "id -u; command -v git || echo no git; touch x 2> /dev/null || echo read only; ls; echo $HOME")
    assert facts.splitlines() == ["54321", "no git", "read only", "configs", "data", "runs", "torchx.yaml", "/tmp"]
    run(*DATA.split())
    run(*TRAIN.split(), "training.max_steps=20", "training.batch_size=64")
    assert json.loads((tmp_path / "runs/a/environment.json").read_text())["world_size"] == 2
    assert "resumed from" in run(*TRAIN.split(), "training.max_steps=30", "training.batch_size=64")
    assert json.loads((tmp_path / "runs/a/result.json").read_text())["test"]["tasks"]
