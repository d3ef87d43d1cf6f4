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


NAMES = ["train", "days", "evaluate", "predict", "preprocess", "scaling"]


@pytest.mark.parametrize("name", NAMES)
def test_torchx_accepts_the_signature_and_docstring(name):
    assert validate(str(REPOSITORY / "apps" / "components.py"), name, None) == []


@pytest.mark.parametrize(
    ("name", "given", "command"),
    [
        (
            "evaluate",
            ["--split", "valid", "embeddings.sharding=row_wise"],
            "-m apps.evaluate --run-dir {run} --split valid embeddings.sharding=row_wise",
        ),
        (
            "days",
            ["--config", "mtl/movielens", "--days", "data/day-*", "--forget_after", "30", "training.epochs=1"],
            "-m apps.days --config mtl/movielens --days 'data/day-*' --run-dir {run} --forget-after 30 training.epochs=1",
        ),
        (
            "predict",
            ["--input", "data/x", "--output", "s.parquet", "--imports", "a.b,c"],
            "-m apps.predict --import a.b --import c --run-dir {run} --input data/x --output s.parquet --split test",
        ),
    ],
)
def test_a_runs_components_start_its_entry_points(name, given, command, tmp_path, monkeypatch):
    from apps import components

    monkeypatch.setattr("mmlrec.launch.spec.import_modules", lambda modules: None)

    (tmp_path / "config.yaml").touch()
    app = materialize_appdef(getattr(components, name), ["--run_dir", str(tmp_path), "--nproc", "3", *given])
    (role,) = app.roles
    assert "-m mmlrec.launch.agent" in role.args[1]
    assert "--nproc-per-node 3 " in role.args[1]
    assert role.args[1].endswith(command.format(run=tmp_path))


def test_preprocessing_runs_once_on_one_node():
    from apps.components import preprocess

    options = ["--preset", "slurm-2n", "--dataset", "synthetic", "--out", "data/x", "--", "--rows", "1e6"]
    (role,) = materialize_appdef(preprocess, options).roles
    assert (role.num_replicas, role.resource.cpu) == (1, 64)
    assert role.args[1].endswith("-m preprocessing synthetic --out data/x --rows 1e6")
    assert "mmlrec.launch.agent" not in role.args[1]


@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_a_folder_without_a_run_is_refused_before_submission(name, tmp_path, capsys):
    from apps import components

    more = {} if name == "evaluate" else {"input": "d", "output": "o.parquet"}
    with pytest.raises(SystemExit) as stop:
        getattr(components, name)(run_dir=str(tmp_path), **more)
    assert stop.value.code == 2
    assert f"error: {tmp_path}: no run folder" in capsys.readouterr().err


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
    from apps import components

    for name in NAMES:
        assert getattr(registered["mmlrec"].load(), name) is getattr(components, name)
    assert hasattr(registered["dist"].load(), "torchrun")
    assert hasattr(registered["utils"].load(), "echo")
