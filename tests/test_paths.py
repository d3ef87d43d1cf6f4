"""An address that is not supported is refused by name wherever a path can be given, and s3:// where a file must be."""

import importlib
import sys
from pathlib import Path

import pytest

from apps.cli import run
from mmlrec.config import load_config
from mmlrec.errors import ConfigError, UserError
from mmlrec.launch.presets import Preset, ResourceConfig
from mmlrec.launch.spec import predict_app, preprocess_app, train_app
from mmlrec.paths import local_path, scheme_of
from preprocessing.command_line import main as preprocess

CONFIG = "dataset: {path: data, setting: mtl}\nmodel: {name: mmoe}\n"
ADDRESS = "gs://bucket/some/data"

APPS = {
    "train --config": ["train", "--config", ADDRESS],
    "train --run-dir": ["train", "--config", "config.yaml", "--run-dir", ADDRESS],
    "train run_dir": ["train", "--config", "config.yaml", f"run_dir={ADDRESS}"],
    "train dataset.path": ["train", "--config", "config.yaml", f"dataset.path={ADDRESS}"],
    "train --show": ["train", "--config", "config.yaml", "--show", f"dataset.path={ADDRESS}"],
    "seeds --config": ["seeds", "--config", ADDRESS],
    "seeds --run-dir": ["seeds", "--config", "config.yaml", "--run-dir", ADDRESS],
    "evaluate --run-dir": ["evaluate", "--run-dir", ADDRESS],
    "predict --run-dir": ["predict", "--run-dir", ADDRESS, "--input", "data", "--output", "scores.parquet"],
    "predict --input": ["predict", "--run-dir", "run", "--input", ADDRESS, "--output", "scores.parquet"],
    "predict --output": ["predict", "--run-dir", "run", "--input", "data", "--output", f"{ADDRESS}.parquet"],
    "strategies --pages": ["strategies", "--pages", ADDRESS],
}
PREPROCESSING = {
    "--raw": ["movielens-100k", "--raw", ADDRESS, "--out", "out"],
    "--raw --download": ["movielens-100k", "--raw", ADDRESS, "--out", "out", "--download"],
    "--out": ["synthetic", "--rows", "100", "--out", ADDRESS],
    "table --config": ["table", "--config", ADDRESS, "--out", "out"],
    "table --raw": ["table", "--config", "config.yaml", "--raw", ADDRESS, "--out", "out"],
    "describe": ["describe", ADDRESS],
    "describe --page": ["describe", "data", "--page", f"{ADDRESS}.html"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]  # no folder `gs:`


def check(code: int, error: str, scheme: str = "gs") -> None:
    assert code == 2
    assert error.count("error: ") == 1
    assert f"{scheme}://bucket/some/data" in error
    assert f"addresses with {scheme}:// are neither read nor written" in error


@pytest.mark.parametrize("case", APPS)
def test_apps_refuse_addresses(folder, monkeypatch, capfd, case):
    name, *arguments = APPS[case]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as end:
        run(importlib.import_module(f"apps.{name}").main)
    check(end.value.code, capfd.readouterr().err)


@pytest.mark.parametrize("case", PREPROCESSING)
def test_preprocessing_refuses_addresses(folder, capfd, case):
    check(preprocess(PREPROCESSING[case]), capfd.readouterr().err)


@pytest.mark.parametrize("case", ["strategies --pages"])
def test_a_file_of_this_machine_is_at_no_address(folder, monkeypatch, capfd, case):
    name, *arguments = APPS[case]
    monkeypatch.setattr(sys, "argv", [name, *(text.replace("gs://", "s3://") for text in arguments)])
    with pytest.raises(SystemExit) as end:
        run(importlib.import_module(f"apps.{name}").main)
    check(end.value.code, capfd.readouterr().err, "s3")


@pytest.mark.parametrize("case", ["table --config", "describe --page"])
def test_nor_is_one_of_preprocessing(folder, capfd, case):
    code = preprocess([text.replace("gs://", "s3://") for text in PREPROCESSING[case]])
    check(code, capfd.readouterr().err, "s3")


def test_a_config_names_the_key(folder):
    with pytest.raises(ConfigError, match=r"command line: run_dir: hdfs://a/b: addresses with hdfs:// are neither"):
        load_config("config.yaml", ["run_dir=hdfs://a/b"])
    (folder / "config.yaml").write_text(CONFIG.replace("data,", "gs://a/b,"))
    with pytest.raises(ConfigError, match=r"config\.yaml: dataset\.path: gs://a/b: addresses with gs://"):
        load_config("config.yaml")


def test_a_job_is_not_submitted_with_an_address(folder):
    preset = Preset(nproc=1, resource=ResourceConfig(cpu=1, memMB=100))
    for more in ({"run_dir": ADDRESS, "config": "config.yaml"}, {"config": ADDRESS}):
        with pytest.raises(UserError, match="addresses with gs:// are neither read nor written"):
            train_app(preset, overrides=[], **more)


def test_a_job_takes_addresses_that_all_its_nodes_see(folder):
    preset = Preset(nproc=1, image="mmlrec:1", resource=ResourceConfig(cpu=1, memMB=100))
    app = preprocess_app(preset, dataset="movielens-1m", raw="s3://a/raw", out="s3://a/data", options=[])
    assert "--raw s3://a/raw --out s3://a/data" in app.roles[0].args[-1]
    app = predict_app(preset, run_dir="s3://a/run", data="s3://a/data", output="s3://a/scores.csv", split="test")
    assert "--input s3://a/data" in app.roles[0].args[-1]


@pytest.mark.parametrize("text", ["s3://a", "file:///data", "abfss://a@b/c", Path("gs://a/b"), "http://h/x"])
def test_what_is_an_address(text):
    assert scheme_of(text) is not None
    with pytest.raises(UserError, match="are neither read nor written here"):
        local_path(text)


@pytest.mark.parametrize(
    "text", ["data/a", "/data/a", "a:b/c", "x/s3:/y", "~", "", "c:/d", "runs/mtl-x-seed0-dense.optimizer.lr=0.1"]
)
def test_what_is_a_path(text):
    assert local_path(text) == Path(text)


def test_every_option_that_takes_a_path_is_checked():
    """`type=Path` in a parser would let an address through."""
    root = Path(__file__).parents[1]
    files = [path for package in ("apps", "preprocessing", "benchmarks", "mmlrec") for path in (root / package).rglob("*.py")]
    assert [str(path) for path in files if "type=Path" in path.read_text(encoding="utf-8")] == []
