"""An address such as s3://bucket/data is no path: it is refused by name wherever a path can be given."""

import importlib
import sys
from pathlib import Path

import pytest

from apps.cli import run
from mmlrec.config import load_config
from mmlrec.errors import ConfigError, UserError
from mmlrec.launch.presets import Preset, ResourceConfig
from mmlrec.launch.spec import train_app
from mmlrec.paths import local_path, refusal
from preprocessing.command_line import main as preprocess

CONFIG = "dataset: {path: data, setting: mtl}\nmodel: {name: mmoe}\n"
ADDRESS = "s3://bucket/some/data"

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
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]  # no folder `s3:`


def check(code: int, error: str) -> None:
    assert code == 2
    assert error.count("error: ") == 1
    assert "s3:" in error
    assert "bucket/some/data" in error
    assert "addresses with s3:// are neither read nor written" in error


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


def test_a_config_names_the_key(folder):
    with pytest.raises(ConfigError, match=r"command line: run_dir: hdfs://a/b: addresses with hdfs:// are neither"):
        load_config("config.yaml", ["run_dir=hdfs://a/b"])
    (folder / "config.yaml").write_text(CONFIG.replace("data,", "gs://a/b,"))
    with pytest.raises(ConfigError, match=r"config\.yaml: dataset\.path: gs://a/b: addresses with gs://"):
        load_config("config.yaml")


def test_a_job_is_not_submitted_with_an_address(folder):
    preset = Preset(nproc=1, resource=ResourceConfig(cpu=1, memMB=100))
    for more in ({"run_dir": ADDRESS, "config": "config.yaml"}, {"config": ADDRESS}):
        with pytest.raises(UserError, match="addresses with s3:// are neither read nor written"):
            train_app(preset, overrides=[], **more)


@pytest.mark.parametrize("text", ["s3://a", "file:///data", "abfss://a@b/c", Path("gs://a/b"), "http://h/x"])
def test_what_is_an_address(text):
    assert refusal(text) is not None


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
