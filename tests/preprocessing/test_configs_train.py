"""The datasets' configurations train on what the preprocessing makes of fake raw files."""

import json
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

from mmlrec.config import ConfigError, load_config
from mmlrec.registry import load, method, method_names, model_config
from mmlrec.schema import DatasetManifest
from mmlrec.session.parts import build_parts, build_spec
from preprocessing.command_line import main
from tests.preprocessing.fakes import FAKES

ROOT = Path(__file__).parents[2]
CASES = [(name, config) for name, fake in FAKES.items() for config in fake.configs or {}]


#: Configurations with the sizes of the benchmark, each with the dataset it is written for.
BENCHMARK = {config: name for name, config in reversed(CASES) if not config.startswith("scaling/")}
#: Those of further releases of a dataset; the other twelve are the benchmark's own.
RELEASES = ("mtl/adult", "mtl/movielens-20m")
#: Those whose labels are no chain: methods for chains say so.
NO_CHAIN = ("mtl/census", "mtl/adult", "mtl/ijcai15")


def test_the_benchmark_has_five_mtl_five_msl_and_two_mtmsl_configurations():
    assert Counter(config.split("/")[0] for config in BENCHMARK.keys() - RELEASES) == {"mtl": 5, "msl": 5, "mtmsl": 2}


@pytest.mark.parametrize(("config", "name"), BENCHMARK.items())
def test_every_method_of_the_setting_takes_the_fields_that_a_configuration_names(config, name, tmp_path, capsys):
    fake = FAKES[name]
    raw, source = fake.write(tmp_path / "raw"), f"configs/{config}.yaml"
    assert main([name.split()[0], "--out", str(tmp_path / "data"), *fake.arguments(raw)]) == 0
    if config in RELEASES:
        assert f"--config {source} " in capsys.readouterr().out
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


@pytest.mark.parametrize(("tasks", "scenarios"), [(1, 3), (2, 1), (2, 3)])
def test_what_is_named_to_run_next_is_not_refused(tasks, scenarios, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # no clone: the configuration is found by its name
    sizes = ("--rows", "300", "--tasks", tasks, "--scenarios", scenarios, "--out", "of my own")
    assert main(["synthetic", *map(str, sizes)]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:3] == ["python", "-m", "apps.train"]
    _, config, *overrides = command[3:]
    parts = build_parts(load(config, overrides))
    assert (len(parts.network.spec.tasks), parts.network.spec.num_scenarios) == (tasks, 1 if tasks == 2 else scenarios)


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
