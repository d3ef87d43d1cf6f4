import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from torchx.specs.builders import materialize_appdef
from torchx.specs.file_linter import validate

REPOSITORY = Path(__file__).parents[2]
CONFIG = "configs/mtl/movielens.yaml"


def torchx_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # `python -m torchx.cli.main` is what the `torchx` script runs, without relying on PATH.
    command = [
        sys.executable,
        "-c",
        "from torchx.cli.main import main; main()",
        "run",
        "-s",
        "local_cwd",
        "--dryrun",
        *arguments,
    ]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)


def test_torchx_accepts_the_signature_and_docstring():
    assert validate(str(REPOSITORY / "apps" / "components.py"), "train", None) == []


def test_command_line_values_reach_the_job(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    from apps.components import train

    app = materialize_appdef(train, ["--config", CONFIG, "--nproc", "3", "training.max_steps=5", "model.name=ple"])
    (role,) = app.roles
    assert "--nproc-per-node 3 " in role.args[1]
    assert role.args[1].endswith(f"-m apps.train --config {CONFIG} training.max_steps=5 model.name=ple")


def test_dry_run_from_the_file():
    result = torchx_run("apps/components.py:train", "--preset", "local", "--config", CONFIG)
    assert result.returncode == 0, result.stderr
    assert "mtl-movielens" in result.stdout


def test_user_errors_are_one_message_without_traceback():
    result = torchx_run("apps/components.py:train", "--preset", "locale", "--config", CONFIG)
    assert result.returncode == 2
    assert "error: torchx.yaml: no preset 'locale'. Did you mean 'local'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_registered_component_is_the_same_function_and_torchx_keeps_its_own():
    registered = {entry.name: entry for entry in entry_points(group="torchx.components")}
    if "mmlrec" not in registered:
        pytest.skip("mmlrec is not installed in this environment")
    from apps.components import train

    assert registered["mmlrec"].load().train is train
    assert hasattr(registered["dist"].load(), "torchrun")
    assert hasattr(registered["utils"].load(), "echo")
