"""Where a run may write: in its own folder, a new one, or beside things that have none of its files' names."""

import functools
import hashlib
import shutil
import signal
import sys
from pathlib import Path

import pytest

from mmlrec.config import load_config
from mmlrec.distributed.world import process_group
from mmlrec.errors import UserError
from mmlrec.storage.places import place
from mmlrec.training.run import train
from tests.datasets import write_dataset
from tests.processes import run

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
training: {{batch_size: 100, epochs: 1, max_steps: 2, patience: null}}
"""
#: Killed where it writes what a run folder is known by.
KILLED = """
import os, runpy, signal, sys
from mmlrec.run_folder.folder import RunFolder

RunFolder.write_description = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.argv[0] = "apps.train"
runpy.run_module("apps.train", run_name="__main__")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_dataset(folder / "data", rows=400, table_rows=20)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))
    return folder


@pytest.fixture
def app(root, run_app):
    """apps.train in this process."""
    return functools.partial(run_app, "train", "--config", root / "config.yaml", "--run-dir")


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def dataset(root: Path, folder: Path) -> None:
    shutil.copytree(root / "data", folder)


def file(name: str, root: Path, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("{}")


def own_config(root: Path, folder: Path) -> None:
    """The configuration itself, with its comments: a run would replace it by the resolved one."""
    folder.mkdir()
    shutil.copy(root / "config.yaml", folder)


OTHERS = {
    "a log that a run would add to": (functools.partial(file, "train.log"), "train.log"),
    "metrics that are being written": (functools.partial(file, "metrics.jsonl.mine.tmp"), "metrics.jsonl.mine.tmp"),
    "results": (functools.partial(file, "result.json"), "result.json"),
    "checkpoints of something else": (functools.partial(file, "checkpoints/step_000000001/model.pt"), "checkpoints"),
    "model": (functools.partial(file, "encoder/manifest.json"), "encoder"),
    "dataset": (dataset, "manifest.json"),
    "configuration": (own_config, "config.yaml"),
}


@pytest.mark.parametrize("which", OTHERS)
def test_a_folder_of_other_things_is_refused_and_stays_as_it_is(root, tmp_path, app, which):
    make, named = OTHERS[which]
    make(root, tmp_path / "folder")
    before = content(tmp_path / "folder")
    code, error = app(tmp_path / "folder")
    assert code == 2
    assert error.count("error: ") == 1
    assert f"error: {tmp_path / 'folder'} is not empty: it holds '{named}'" in error
    assert content(tmp_path / "folder") == before


#: What launchers and people put there before a run begins: logs of consoles, scripts, configurations, data.
BESIDE = [
    "slurm-12.out",
    "job.sh",
    "mine.yaml",
    "logs/12.out",
    "logs/none_x/attempt_0/0/stderr.log",
    "wandb/run.json",
    "data/manifest.json",
]
LEFT = [[], ["lost+found/x"], BESIDE, [".lock"], [".lock", "config.yaml.0123456789ab.tmp"]]


@pytest.mark.parametrize("left", LEFT)
def test_a_folder_that_is_empty_or_was_emptied_or_has_nothing_that_a_run_would_write_is_taken(tmp_path, app, left):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    before = {name: digest for name, digest in content(folder).items() if not name.startswith((".lock", "config.yaml."))}
    code, error = app(folder)
    assert code == 0, error
    assert before.items() <= content(folder).items()


def test_a_folder_that_cannot_be_read_is_told(tmp_path, app):
    (tmp_path / "a").symlink_to("a")
    code, error = app(tmp_path / "a")
    assert code == 2
    assert f"error: {tmp_path}/a: the run folder cannot be written: " in error


def test_a_start_that_was_killed_before_it_was_a_run_is_begun_again(root, tmp_path, app):
    (tmp_path / "killed.py").write_text(KILLED)
    given = [str(tmp_path / "killed.py"), "--config", str(root / "config.yaml"), "--run-dir", str(tmp_path / "run")]
    assert run([sys.executable, *given]).returncode == -signal.SIGKILL
    assert {"checkpoints", "encoder", "train.log"} <= {path.name for path in (tmp_path / "run").iterdir()}
    code, error = app(tmp_path / "run")
    assert code == 0, error


def test_a_run_goes_on_beside_other_files_and_where_the_lock_was_left_out_of_a_copy(tmp_path, app):
    assert app(tmp_path / "run")[0] == 0
    (tmp_path / "run/scores.parquet").write_text("mine")
    shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    for folder in (tmp_path / "run", tmp_path / "copy"):
        code, error = app(folder, "training.max_steps=3")
        assert code == 0, error
        assert f"resumed from {folder}/checkpoints/step_000000002" in error
        assert (folder / "scores.parquet").read_text() == "mine"


def test_seeds_are_refused_where_the_folder_of_one_holds_other_things(root, tmp_path, run_app):
    (tmp_path / "seeds/seed1").mkdir(parents=True)
    (tmp_path / "seeds/seed1/result.json").write_text("mine")
    given = ("--config", root / "config.yaml", "--run-dir", tmp_path / "seeds", "--seeds", "0,1")
    code, error = run_app("seeds", *given)
    assert code == 2
    assert f"{tmp_path / 'seeds/seed1'} is not empty: it holds 'result.json'" in error
    assert (tmp_path / "seeds/seed1/result.json").read_text() == "mine"
    assert not (tmp_path / "seeds/seed0").exists()


def test_on_object_storage_too(root, store):
    config = load_config(root / "config.yaml")
    notes, emptied = place(f"{store.address}/notes"), place(f"{store.address}/emptied")
    (notes / "result.json").write_bytes(b"mine")
    emptied.fs.pipe_file(f"{emptied.path}/", b"")  # as consoles make a folder
    with process_group() as world:
        with pytest.raises(UserError, match=f"{notes} is not empty: it holds 'result.json'"):
            train(config, notes, world)
        assert [path.name for path in notes.iterdir()] == ["result.json"]
        assert (notes / "result.json").read_bytes() == b"mine"
        train(config, emptied, world)
    assert (emptied / "checkpoints/step_000000002/COMPLETE.json").is_file()
