"""What a user may get wrong, end to end: exit code, one message that names the culprit and the remedy, nothing half-written."""

import functools
import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmlrec.config import load_config
from mmlrec.run_folder import checkpoint, saver
from mmlrec.schema import DatasetManifest
from tests import processes
from tests.datasets import rewrite_part, write_dataset

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, num_experts: 2, expert_hidden_units: [8], gate_hidden_units: [], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 32, max_steps: 4}}
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("bad") / "data", rows=100)


@pytest.fixture
def data(written, tmp_path):
    """A copy of the dataset, to be spoilt."""
    shutil.copytree(written.folder, tmp_path / "data")
    written_copy = type(written)(tmp_path / "data", written.manifest, written.tables)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=tmp_path / "data"))
    return written_copy


@pytest.fixture
def app(run_app):
    """Runs an entry point in this process; returns exit code and standard error."""

    def call(name: str, *arguments: object) -> tuple[int, str]:
        code, error = run_app(name, *arguments)
        assert "Traceback" not in error
        return code, error

    return call


@pytest.fixture
def train(app, tmp_path):
    def call(*overrides: str, config: str = "config.yaml", run_dir: str = "run") -> tuple[int, str]:
        code, error = app("train", "--config", tmp_path / config, "--run-dir", tmp_path / run_dir, *overrides)
        if code != 0:
            assert not (tmp_path / run_dir / "result.json").exists()
            assert error.count("error: ") == 1
        return code, error

    return call


def test_the_good_case_passes(data, train, tmp_path):
    assert train()[0] == 0
    told = json.loads((tmp_path / "run" / "environment.json").read_text())["cpu_capability"]
    assert told == torch.backends.cpu.get_cpu_capability()


def test_a_machine_without_git_trains(data, train, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") is None
    assert train()[0] == 0
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["git_commit"] is None


CONFIGS = {
    "typo": (["training.batchsize=3"], ["command line: training.batchsize: unknown key", "Did you mean 'batch_size'?"]),
    "typo in model": (["model.num_expert=3"], ["model.num_expert: unknown key", "Did you mean 'num_experts'?"]),
    "wrong type": (["training.seed=1.5"], ["training.seed", "valid integer", "1.5"]),
    "beyond any batch": (
        ["training.batch_size=99999999999999999999"],
        ["training.batch_size", "less than or equal to 2147483647"],
    ),
    "text for a number": (["embeddings.optimizer.lr=fast"], ["embeddings.optimizer.lr", "'fast'"]),
    "no value": (["training.seed"], ["'training.seed' is not of the form key.path=value"]),
    "unknown method": (["model={name: mmo}"], ["unknown method 'mmo'", "Did you mean 'mmoe'?"]),
    "capitals": (["model.name=MMoE"], ["unknown method 'MMoE'", "Did you mean 'mmoe'?"]),
    "no tasks": (["dataset.tasks=[]"], ["dataset.tasks", "at least 1 item"]),
    "field twice": (["model.gate_extra_fields=[f0, f0]"], ["model.gate_extra_fields", "'f0' is named twice"]),
    "name for a section": (["balancing=uw"], ["balancing: must be a section", "such as balancing.name=uw"]),
    "weights in the wrong place": (
        ["loss.loss_weights={click: 2}"],
        ["loss.loss_weights: unknown key", "balancing.loss_weights"],
    ),
    "Huber for a probability": (["loss.huber_delta=1"], ["loss.huber_delta", "all tasks are binary"]),
    "metric that no report has": (["training.monitor=bye.gauc"], ["training.monitor: 'bye.gauc'", "Did you mean 'buy.gauc'?"]),
    "metric of another kind": (["training.monitor=buy.rmse"], ["training.monitor: 'buy.rmse'", "buy: auc, gauc, logloss"]),
    "metrics as a list": (
        ["training.monitor=[buy.auc]"],
        ["command line: training.monitor: must be one metric", "['buy.auc']"],
    ),
    "metric by its parts": (["training.monitor.buy.auc=1"], ["training.monitor: must be one metric", "{bought.gauc: 1"]),
    "metric without weight": (["training.monitor={buy.auc: 0}"], ["training.monitor.buy.auc", "greater than 0"]),
    "no weight": (["balancing.loss_weights={click: 0, buy: 0}"], ["all objectives have weight 0"]),
    "weight of a task by head": (
        ["dataset.setting=mtmsl", "balancing={unit: head, loss_weights: {buy: 2}}"],
        ["'buy' is not an objective", "Did you mean 'buy/"],
    ),
    "unknown default": (["model_defaults.depth=3"], ["model_defaults.depth", "no method has this option"]),
    "width": (["embeddings.dim=6"], ["embeddings.dim", "multiple of 4"]),
    "weight decay": (["embeddings.optimizer.weight_decay=0.1"], ["weight_decay: unknown key", "embeddings.l2"]),
    "Adam on CPU": (["embeddings.optimizer.name=adam"], ["embeddings.optimizer.name", "needs a GPU", "adagrad"]),
    "unknown task": (["dataset.tasks=[click, bye]"], ["'bye' is not a task", "Did you mean 'buy'?"]),
    "weight of no objective": (["balancing.loss_weights={bye: 2.0}"], ["'bye' is not an objective", "Did you mean 'buy'?"]),
    "strategy": (["balancing.name=pcgard"], ["unknown strategy 'pcgard'", "Did you mean 'pcgrad'?"]),
    "option of another strategy": (
        ["balancing.name=pcgrad", "balancing.c_a=0.3"],
        ["error: command line: balancing.c_a: strategy 'pcgrad' has no option 'c_a'", "It belongs to cagrad", "refresh_every"],
    ),
    "value of a strategy": (
        ["balancing.name=cagrad", "balancing.c_a=2"],
        ["command line: balancing.c_a: Input should be less"],
    ),
    "main objective": (["balancing.name=metabalance", "balancing.main=clik"], ["balancing.main", "Did you mean 'click'?"]),
    "unit without scenarios": (["balancing.unit=head"], ["balancing.unit=head", "'mtl' has no scenarios"]),
    "one objective": (
        ["balancing.name=mgda", "balancing.unit=task", "dataset.setting=msl", "dataset.tasks=[click]"],
        ["balancing.name=mgda", "this run has one, 'click'", "another unit"],
    ),
    "alias with another strategy": (
        ["model.name=pcg", "balancing.name=mgda"],
        ["pcg", "balancing.name=pcgrad", "model.name=mmoe"],
    ),
    "task twice": (["dataset.tasks=[click, click]"], ["named twice"]),
    "two tasks in msl": (["dataset.setting=msl"], ["MMoE in setting 'msl' needs exactly 1 task", "dataset.tasks"]),
    "unknown setting": (["dataset.setting=mtt"], ["dataset.setting", "'mtl', 'msl' or 'mtmsl'"]),
    "unknown table": (["embeddings.table_sharding={t9: row_wise}"], ["table_sharding.t9", "no such table"]),
    "decay without end": (["schedule.name=cosine"], ["schedule", "total_steps"]),
    "diverging": (
        ["dense.optimizer={name: sgd, lr: 1e30}", "embeddings.optimizer={name: sgd, lr: 1e30}", "training.log_every_steps=1"],
        ["not finite", "nan", "lr"],
    ),
}


CONFIGS |= {
    f"diverging under {strategy}": ([f"balancing.name={strategy}", *CONFIGS["diverging"][0][:2]], CONFIGS["diverging"][1])
    for strategy in ("pcgrad", "mgda", "cagrad", "imtl_g", "nash", "aligned", "gradnorm", "metabalance", "monitor")
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(data, train, case):
    overrides, expected = CONFIGS[case]
    code, error = train(*overrides)
    assert code == 2
    for fragment in expected:
        assert fragment in error


IN_VAIN = {
    "not defined for the setting": (
        ["model={name: esmm}", "dataset={path: nowhere, setting: msl}"],
        ["ESMM is not defined for setting 'msl'. One label is no chain: use setting 'mtl' or 'mtmsl'"],
    ),
    "nothing shared": (
        ["model={name: single_task}", "dataset.path=nowhere", "balancing.name=pcgrad"],
        ["balancing.name=pcgrad: the branches of single_task share nothing"],
    ),
    "no scenario to normalise by": (["model={name: star, use_pn: true}"], ["use_pn", "'mtl'"]),
    "no condition": (["model={name: apg}"], ["condition_fields"]),
    "unknown field": (["model.gate_extra_fields=[f9]"], ["model.gate_extra_fields: no field 'f9'"]),
    "unknown task": (["dataset.tasks=[click, bye]"], ["'bye' is not a task"]),
    "two tasks in msl": (["dataset.setting=msl"], ["needs exactly 1 task"]),
    "unknown objective": (["balancing.loss_weights={bye: 2.0}"], ["'bye' is not an objective"]),
    "unit without scenarios": (["balancing.unit=head"], ["'mtl' has no scenarios"]),
}


@pytest.mark.parametrize("case", IN_VAIN)
def test_what_training_would_refuse_is_not_shown(data, app, tmp_path, case):
    (tmp_path / "config.yaml").write_text(f"dataset: {{path: {data.folder}, setting: mtl}}\nmodel: {{name: mmoe}}\n")
    overrides, expected = IN_VAIN[case]
    for show in ("--show",), ():
        code, error = app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run", *show, *overrides)
        assert code == 2
        for fragment in expected:
            assert fragment in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("present", [False, True])
def test_show_prints_a_config_that_loads_to_itself(data, tmp_path, monkeypatch, capsys, present):
    path = data.folder if present else tmp_path / "nowhere"
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(tmp_path / "config.yaml"), "--show", f"dataset.path={path}"])
    importlib.import_module("apps.train").main()
    shown, told = capsys.readouterr()
    assert (f"no dataset folder {path}" in told) is not present
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config(tmp_path / "shown.yaml").to_yaml() == shown
    assert load_config(tmp_path / "shown.yaml").model["num_experts"] == 2
    assert list(tmp_path.glob("run*")) == []


def test_option_of_the_file_under_a_strategy_of_the_command_line(data, train, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text() + "balancing: {name: cagrad, c_a: 0.3}\n")
    code, error = train("balancing.name=uw")
    assert code == 2
    assert f"{path}: balancing.c_a: strategy 'uw' has no option 'c_a'" in error


def test_options_that_exclude_each_other(data, train, tmp_path):
    (tmp_path / "config.yaml").write_text(f"dataset: {{path: {tmp_path / 'data'}}}\n")
    code, error = train("model={name: ple, num_shared_experts: 0, num_specific_experts: 0}")
    assert code == 2
    assert "config.yaml with the command line: model: num_shared_experts and num_specific_experts must not both be 0." in error


def test_chain_method_with_one_task_is_not_sent_to_a_setting_it_lacks(data, train, tmp_path):
    (tmp_path / "config.yaml").write_text(f"dataset: {{path: {tmp_path / 'data'}}}\n")
    code, error = train("model.name=esmm", "dataset.tasks=[click]")
    assert code == 2
    assert "ESMM in setting 'mtl' needs at least 2 tasks" in error
    assert "'msl'" not in error


def test_config_file_missing(data, train):
    code, error = train(config="confg.yaml")
    assert code == 2
    assert "confg.yaml: no such config file" in error
    assert "config.yaml'?" in error


def test_msl_without_scenarios(tmp_path, train):
    write_dataset(tmp_path / "data", rows=50, num_scenarios=0)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=tmp_path / "data"))
    for setting in ("msl", "mtmsl"):
        code, error = train(f"dataset.setting={setting}")
        assert code == 2
        assert "this dataset has none: use setting 'mtl'" in error
    one_task = ["dataset.setting=msl", "dataset.tasks=[click]"]
    code, error = train(*one_task)
    assert code == 2
    assert "this dataset has none: use setting 'mtl'" in error
    (tmp_path / "config.yaml").write_text(f"dataset: {{path: {tmp_path / 'data'}}}\n")
    code, error = train(*one_task, "model.name=star")
    assert code == 2
    assert "make it again with scenarios, or choose 2 or more tasks in setting 'mtl'." in error
    assert "model.name=mlp" in error
    code, error = train("model.name=star", "dataset.tasks=[click]")
    assert code == 2
    assert "STAR in setting 'mtl' needs at least 2 tasks, got ['click']: choose more with dataset.tasks" in error
    assert "One task alone trains in setting 'mtl' with model.name=mlp" in error


def replace_column(table: pa.Table, name: str, values: list) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))


def spoil(data, change) -> Path:
    """Apply `change` to the second train part's table; returns its path."""
    part = data.manifest.splits["train"].parts[1]
    table = data.tables["train"].slice(data.manifest.splits["train"].parts[0].num_rows, part.num_rows)
    rewrite_part(data, change(table), part=1)
    return data.folder / part.path


def test_missing_column(data, train):
    path = spoil(data, lambda table: table.drop_columns(["f1"]))
    code, error = train()
    assert code == 2
    assert str(path) in error
    assert "f1" in error


def test_extra_column(data, train):
    path = spoil(data, lambda table: table.append_column("f7", pa.array(np.zeros(table.num_rows, np.int64))))
    code, error = train()
    assert code == 2
    assert str(path) in error
    assert "f7" in error


def test_id_out_of_range(data, train):
    rows = data.manifest.table("t1").num_rows
    path = spoil(data, lambda table: replace_column(table, "f1", [5, rows, *[0] * (table.num_rows - 2)]))
    code, error = train()
    assert code == 2
    for fragment in (str(path), "row 1", "f1", str(rows), "t1"):
        assert fragment in error


def test_nan_in_dense(data, train):
    path = spoil(data, lambda table: replace_column(table, "d0", [0.0, float("nan"), *[0.0] * (table.num_rows - 2)]))
    code, error = train()
    assert code == 2
    for fragment in (str(path), "row 1", "d0"):
        assert fragment in error


def test_truncated_part(data, train):
    path = data.folder / data.manifest.splits["train"].parts[0].path
    os.truncate(path, path.stat().st_size // 2)
    code, error = train()
    assert code == 2
    assert str(path) in error


def test_part_missing(data, train):
    path = data.folder / data.manifest.splits["valid"].parts[0].path
    path.unlink()
    code, error = train()
    assert code == 2
    assert str(path) in error


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_empty_split(tmp_path, train, split):
    write_dataset(tmp_path / "data", rows={"train": 64, "valid": 10, "test": 10} | {split: 0})
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=tmp_path / "data"))
    code, error = train()
    assert code == 2
    assert f"split '{split}' has no rows" in error
    assert not (tmp_path / "run").exists()  # Told before anything is trained.


def test_dataset_without_manifest(data, train):
    (data.folder / "manifest.json").unlink()
    code, error = train()
    assert code == 2
    assert f"{data.folder} is not a dataset: it has no manifest.json" in error
    assert "python -m preprocessing" in error
    (data.folder / "rows.parquet").write_bytes(b"PAR1")
    code, error = train(f"dataset.path={data.folder / 'rows.parquet'}")
    assert code == 2
    assert "rows.parquet is not a dataset: it is a file. Raw rows are encoded first" in error


def test_damaged_manifest(data, train):
    path = data.folder / "manifest.json"
    path.write_text(path.read_text()[:-40])
    code, error = train()
    assert code == 2
    assert f"{path} is damaged" in error


def test_run_folder_cannot_be_written(data, train, tmp_path):
    (tmp_path / "file").write_text("")
    code, error = train(run_dir="file/run")
    assert code == 2
    assert "the run folder cannot be written" in error
    assert "--run-dir" in error


def test_another_configuration_in_the_same_folder(data, train, app, tmp_path):
    assert train()[0] == 0
    before = (tmp_path / "run/result.json").read_text()
    code, error = app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run", "model.num_experts=3")
    assert code == 2
    assert "model.num_experts: 2 in the run folder, 3 now" in error
    assert (tmp_path / "run/result.json").read_text() == before


def test_checkpoint_of_another_model(data, train, app, tmp_path):
    assert train()[0] == 0
    for change, fragment in (("num_experts: 3", "has shape"), ("tower_hidden_units: [4]", "it lacks")):
        (tmp_path / "other.yaml").write_text((tmp_path / "run/config.yaml").read_text())
        spoilt = tmp_path / "spoilt"
        shutil.copytree(tmp_path / "run", spoilt, dirs_exist_ok=True)
        config = (spoilt / "config.yaml").read_text()
        key = change.split(":")[0]
        lines = [f"  {change}" if line.strip().startswith(key) else line for line in config.splitlines()]
        (spoilt / "config.yaml").write_text("\n".join(lines))
        code, error = app("evaluate", "--run", spoilt)
        assert code == 2
        assert fragment in error
        assert "another model" in error
        assert str(spoilt) in error


def test_damaged_best_checkpoint(data, train, app, tmp_path):
    assert train()[0] == 0
    file = next((tmp_path / "run/checkpoints/best").glob("*.distcp"))
    os.truncate(file, 100)
    code, error = app("evaluate", "--run", tmp_path / "run")
    assert code == 2
    assert f"{file} has 100 bytes" in error


def test_resume_without_a_checkpoint(data, app, tmp_path):
    code, error = app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run", "--resume")
    assert code == 2
    assert "no whole checkpoint to resume from" in error


def test_evaluate_as_another_model_or_on_other_data(data, train, app, tmp_path):
    assert train()[0] == 0
    result = (tmp_path / "run/result.json").read_text()
    for override, words in (
        ("model.activation=tanh", "model.activation: 'relu' in the run folder, 'tanh' now"),
        ("dataset.tasks=[buy, click]", "dataset.tasks"),
        (f"dataset.path={write_dataset(tmp_path / 'other', rows=50, seed=5).folder}", "on other data"),
    ):
        code, error = app("evaluate", "--run-dir", tmp_path / "run", override)
        assert code == 2
        assert words in error
    assert (tmp_path / "run/result.json").read_text() == result
    assert app("evaluate", "--run-dir", tmp_path / "run", "training.eval_batch_size=7")[0] == 0


def test_damaged_result(data, train, app, tmp_path):
    assert train()[0] == 0
    path = tmp_path / "run/result.json"
    path.write_text(path.read_text()[:-9])
    for name, more in (("evaluate", ()), ("train", ("--config", tmp_path / "config.yaml"))):
        code, error = app(name, "--run-dir", tmp_path / "run", *more)
        assert code == 2
        assert f"{path} is damaged" in error


@pytest.mark.parametrize(
    ("given", "told"), [(["0,0"], "named twice"), (["0,2", "training.seed=5"], "training.seed: the seeds are those of --seeds")]
)
def test_a_seed_twice_or_beside_the_seeds(data, app, tmp_path, given, told):
    code, error = app("seeds", "--config", tmp_path / "config.yaml", "--seeds", *given)
    assert code == 2
    assert told in error


def test_evaluate_something_else(app, tmp_path):
    code, error = app("evaluate", "--run", tmp_path)
    assert code == 2
    assert "is not a run folder" in error


def test_predict_on_a_dataset_with_other_tables(data, train, app, tmp_path):
    assert train()[0] == 0
    write_dataset(tmp_path / "other", rows=50, table_rows=20)
    output = tmp_path / "scores.parquet"
    code, error = app("predict", "--run", tmp_path / "run", "--input", tmp_path / "other", "--output", output)
    assert code == 2
    assert "table 't0' has 20 rows, the run was trained with 50" in error
    assert not output.exists()


def test_predict_on_a_dataset_with_other_hashes(data, train, app, tmp_path):
    def hashed(folder: Path, **update: int) -> None:
        manifest = DatasetManifest.load(folder)
        table = manifest.tables[0].model_copy(update=update)
        manifest.model_copy(update={"tables": [table, *manifest.tables[1:]]}).save(folder)

    hashed(data.folder, hash_seed=3)
    assert train()[0] == 0
    output = tmp_path / "scores.parquet"
    for name, update, words in (
        ("seed", {"hash_seed": 4}, "are 1 hash(es) with seed 4"),
        ("number", {"hash_seed": 3, "num_hashes": 2}, "are 2 hash(es) with seed 3"),
        ("none", {}, "are not hashed"),
    ):
        hashed(write_dataset(tmp_path / name, rows=50).folder, **update)
        code, error = app("predict", "--run", tmp_path / "run", "--input", tmp_path / name, "--output", output)
        assert code == 2
        assert f"ids of table 't0' {words}, the run was trained with 1 hash(es) with seed 3" in error
    hashed(write_dataset(tmp_path / "same", rows=50).folder, hash_seed=3)
    code, error = app("predict", "--run", tmp_path / "run", "--input", tmp_path / "same", "--output", output)
    assert code == 0, error


def test_predict_on_a_dataset_with_another_vocabulary(data, train, app, tmp_path):
    def with_vocabulary(folder: Path, values: list[str]) -> None:
        manifest = DatasetManifest.load(folder)
        rows = manifest.tables[0].num_rows
        assert len(values) == rows - 1
        (folder / "vocab").mkdir()
        pq.write_table(
            pa.table({"value": values, "id": range(1, rows), "count": [3] * len(values)}), folder / "vocab/t0.parquet"
        )
        table = manifest.tables[0].model_copy(update={"vocabulary": "vocab/t0.parquet"})
        manifest.model_copy(update={"tables": [table, *manifest.tables[1:]]}).save(folder)

    values = [f"v{i}" for i in range(49)]
    with_vocabulary(data.folder, values)
    assert train()[0] == 0
    for name, own in (("same", values), ("other", values[::-1])):
        with_vocabulary(write_dataset(tmp_path / name, rows=50).folder, own)
    output = tmp_path / "scores.parquet"
    code, error = app("predict", "--run", tmp_path / "run", "--input", tmp_path / "other", "--output", output)
    assert code == 2
    assert f"{tmp_path}/other/vocab/t0.parquet: not the vocabulary the run was trained with" in error
    assert not output.exists()
    code, error = app("predict", "--run", tmp_path / "run", "--input", tmp_path / "same", "--output", output)
    assert code == 0, error
    (data.folder / "vocab/t0.parquet").unlink()
    again = ("predict", "--run", tmp_path / "run", "--input", tmp_path / "same", "--output", tmp_path / "again.parquet")
    assert app(*again)[0] == 0  # the run has kept it
    (tmp_path / "run" / "encoder" / "vocab/t0.parquet").unlink()
    code, error = app(*again)
    assert code == 2
    assert "vocabulary of table 't0'" in error


def test_tables_beyond_memory(data, app, tmp_path):
    manifest = DatasetManifest.load(data.folder)
    tables = [manifest.tables[0].model_copy(update={"num_rows": 10**12}), *manifest.tables[1:]]
    manifest.model_copy(update={"tables": tables}).save(data.folder)
    code, error = app("train", "--config", tmp_path / "config.yaml", "--run-dir", tmp_path / "run")
    assert code == 2
    assert "the tables with the state of 'adagrad' need 29802.3" in error  # 1e12 rows of 4 floats, twice
    assert "rowwise_adagrad" in error
    assert not (tmp_path / "run").exists()


def limit_files(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    saver.RETRY_AFTER_S = (0.01, 0.01)


def limited(arguments: list[str], limit: int, folder: Path) -> subprocess.CompletedProcess:
    """A process that cannot write files beyond `limit` bytes, as on a full disk, and soon tries again."""
    return processes.run([sys.executable, "-m", *arguments], prepare=functools.partial(limit_files, limit))


@pytest.mark.parametrize(
    ("overrides", "failed"),
    [
        (
            ["training.max_failed_checkpoints=1"],
            "It is number 1 in a row that could not be written (training.max_failed_checkpoints)",
        ),
        (["training.max_failed_checkpoints=9"], "The run goes on, its newest checkpoint is none"),
        (["training.max_failed_checkpoints=9", "training.checkpoint_async=true"], "this is number 2"),
    ],
    ids=["the-first-ends-it", "the-last-ends-it", "in-the-background"],
)
def test_disk_full_while_saving(data, tmp_path, overrides, failed):
    (tmp_path / "big.yaml").write_text(CONFIG.format(dataset=data.folder).replace("dim: 4", "dim: 256"))
    run_dir = tmp_path / "run"
    arguments = ["apps.train", "--config", str(tmp_path / "big.yaml"), "--run-dir", str(run_dir), *overrides]
    done = limited([*arguments, "training.checkpoint_every_steps=1"], 100_000, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"note: attempt 1 of 3: \S+/step_\d+: cannot write a checkpoint: .*File too large", done.stderr)
    assert failed in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "cannot write a checkpoint" in errors[0]
    assert "Free space" in errors[0]
    left = list((run_dir / "checkpoints").iterdir())
    assert all(checkpoint.damage(path) is None for path in left)
    assert not (run_dir / "result.json").exists()


def test_disk_full_while_predicting(data, train, tmp_path):
    write_dataset(tmp_path / "data", rows={"train": 100, "valid": 40, "test": 9000})
    assert train()[0] == 0
    output = tmp_path / "scores.parquet"
    arguments = ["apps.predict", "--run", str(tmp_path / "run"), "--input", str(tmp_path / "data"), "--output", str(output)]
    done = limited(arguments, 20_000, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{output}: cannot be written" in done.stderr
    assert not list(tmp_path.glob("scores*"))


@pytest.mark.parametrize("name", ["scores.txt", "scores"])
def test_scores_are_not_written_under_the_name_of_another_format(data, train, app, tmp_path, name):
    train()
    code, error = app("predict", "--run-dir", tmp_path / "run", "--input", data.folder, "--output", tmp_path / name)
    assert code == 2
    assert f"error: {tmp_path / name}: how scores are written is told by the name" in error
    assert "ends in .parquet, .csv, .csv.gz, .jsonl or .jsonl.gz." in error
    assert not (tmp_path / name).exists()
