"""The datasets' configurations train on what the preprocessing makes of fake raw files."""

import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

from mmlrec.config import ConfigError, load_config
from mmlrec.registry import method, method_names, model_config
from mmlrec.schema import DatasetManifest
from mmlrec.session.session import build_spec
from preprocessing.command_line import main
from tests.preprocessing.fakes import FAKES

ROOT = Path(__file__).parents[2]
CASES = [(name, config) for name, fake in FAKES.items() for config in fake.configs or {}]


#: The benchmark's twelve configurations, each with the dataset it is written for.
BENCHMARK = {config: name for name, config in reversed(CASES) if not config.startswith("scaling/")}
#: Those whose labels are no chain: methods for chains say so.
NO_CHAIN = ("mtl/census", "mtl/ijcai15")


def test_the_benchmark_has_five_mtl_five_msl_and_two_mtmsl_configurations():
    assert Counter(config.split("/")[0] for config in BENCHMARK) == {"mtl": 5, "msl": 5, "mtmsl": 2}


@pytest.mark.parametrize(("config", "name"), BENCHMARK.items())
def test_every_method_of_the_setting_takes_the_fields_that_a_configuration_names(config, name, tmp_path):
    fake = FAKES[name]
    raw, source = fake.write(tmp_path / "raw"), f"configs/{config}.yaml"
    assert main([name.split()[0], "--out", str(tmp_path / "data"), *fake.arguments(raw)]) == 0
    run = load_config(ROOT / source, [f"dataset.path={tmp_path / 'data'}"])
    spec = build_spec(run, DatasetManifest.load(tmp_path / "data"))
    refused = set()
    for candidate in method_names():
        chosen = method(candidate)
        options = model_config({"name": candidate}, run.model_defaults, source)
        try:
            chosen.check_setting(spec)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Advice, such as on scores of different labels that are mixed.
                chosen(spec, options)
        except ConfigError:
            refused.add(candidate)
    chains = {"aitm", "escm2", "esmm"}
    assert refused == (chains if run.dataset.setting == "msl" or config in NO_CHAIN else set())


@pytest.mark.long
@pytest.mark.parametrize("model", ["shared_bottom", "mmoe"])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_one_epoch_on_fake_files(name, config, model, tmp_path):
    fake = FAKES[name]
    raw = fake.write(tmp_path / "raw")
    assert main([name.split()[0], "--out", str(tmp_path / "data"), *fake.arguments(raw)]) == 0
    options = [f"model.name={model}", f"dataset.path={tmp_path / 'data'}", "training.epochs=1", "training.batch_size=128"]
    command = [sys.executable, "-m", "apps.train", "--config", f"configs/{config}.yaml", "--run-dir", str(tmp_path / "run")]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert list(report["tasks"]) == (fake.configs or {})[config]
    assert all(0 < report["tasks"][task]["auc"] < 1 for task in report["tasks"])
