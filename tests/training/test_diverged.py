"""A run that diverges: nothing that is not finite is saved, chosen or scored, and there is a way back with other rates."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from mmlrec.config import load_config
from mmlrec.distributed.stopping import StopSignal
from mmlrec.distributed.world import process_group
from mmlrec.embeddings.tables import local_shards
from mmlrec.errors import DataError, UserError
from mmlrec.evaluation.evaluation import evaluate_split
from mmlrec.evaluation.prediction import write_predictions
from mmlrec.registry import resolve
from mmlrec.run_folder import checkpoint, whole
from mmlrec.run_folder.folder import RunFolder
from mmlrec.session.session import build_session, load_session
from mmlrec.training import guard, run
from mmlrec.training.guard import check_losses, remedy
from mmlrec.training.run import train
from mmlrec.training.trainer import Trainer
from tests.datasets import write_dataset
from tests.training.launch import losses, tensors, validations

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
training: {{batch_size: 50, epochs: 3, patience: null, log_every_steps: 1, keep_checkpoints: 20}}
"""
#: Of 4 steps an epoch: the checkpoints of steps 4, 8 and 12.
LOWER = ["dense.optimizer.lr=1e-4", "embeddings.optimizer.lr=0.01", "dense.clip_norm=1"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diverged")
    written = write_dataset(folder / "data", rows={"train": 200, "valid": 60, "test": 60}, table_rows=20)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))
    return written


@pytest.fixture
def config(data):
    def load(*overrides):
        return load_config(data.folder.parent / "config.yaml", list(overrides))

    return load


def poison(value, row):
    (piece, _), *_ = local_shards(value)
    with torch.no_grad():
        piece[row] = torch.nan


@pytest.mark.parametrize(("prefix", "table", "row"), [("model.", "t0", 7), ("optimizer.", "t1", 3)], ids=["weights", "state"])
def test_a_table_row_that_is_not_finite_is_neither_saved_nor_chosen(config, tmp_path, monkeypatch, prefix, table, row):
    """Made by the last step of the second epoch: the losses say nothing of it."""
    with process_group() as world:
        session = build_session(config(), world, for_training=True)
        folder = RunFolder(tmp_path / "run")
        folder.create()
        trainer = Trainer(session, folder)
        state = checkpoint.training_tensors(session.model, session.optimizer, 0)
        (key,) = [k for k in state if k.startswith(prefix) and f".{table}." in k]
        plain = trainer._train_segment

        def segment(*arguments):
            stopped = plain(*arguments)
            if trainer.progress.step == 8:
                poison(checkpoint.training_tensors(session.model, session.optimizer, 0)[key], row)
            return stopped

        monkeypatch.setattr(trainer, "_train_segment", segment)
        expected = (
            rf"'{re.escape(key)}' is not finite in 1 row \(the first: {row}\) at step 8; not saved\. Lower .*--from-step 4,"
        )
        with StopSignal(world) as stop, pytest.raises(UserError, match=expected):
            trainer.fit(stop)
    assert [path.name for path in sorted(folder.checkpoints.iterdir())] == ["best", "step_000000004"]
    assert checkpoint.read_state(folder.best)["step"] == 4
    for path in folder.checkpoints.iterdir():
        assert all(value.isfinite().all() for value in tensors(path).values())


def test_losses_beyond_sense_end_a_run():
    first = {"click": 0.7, "price": 250.0}
    new, saved = (remedy(Path("runs/a"), step) for step in (None, 40))
    check_losses({"click": 6000.0, "price": 2e6}, first, 50, new)
    with pytest.raises(UserError, match=r"loss 'click' has grown to 1\.3e\+29 near step 50, from 0\.7 .*another --run-dir"):
        check_losses({"click": 1.3e29, "price": 1.0}, first, 50, new)
    with pytest.raises(UserError, match=r"loss 'price' has grown to 3e\+06 near step 50, from 250 .*--from-step 40"):
        check_losses({"click": 0.6, "price": 3e6}, first, 50, saved)
    with pytest.raises(UserError, match=r"loss 'price' is not finite \(inf\) near step 50"):
        check_losses({"click": 0.6, "price": float("inf")}, first, 50, saved)


def test_absurd_rates_of_tables_end_a_run(config, tmp_path):
    expected = r"^loss '\w+' .* near step \d+.* Lower dense\.optimizer\.lr or embeddings\.optimizer\.lr"
    with process_group() as world, pytest.raises(UserError, match=expected):
        train(config("embeddings.optimizer.lr=1e30", "training.log_every_steps=50"), tmp_path / "run", world)
    assert not (tmp_path / "run/result.json").exists()
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_of_several_seeds_the_one_that_diverged_is_named_and_the_others_are_kept(data, tmp_path, monkeypatch, run_app):
    """No seed goes on with other rates than the others have, so that is not advised."""
    plain = run.train

    def absurd(config, *arguments, **options):
        if config.training.seed == 7:
            optimizer = config.embeddings.optimizer.model_copy(update={"lr": 1e30})
            config = config.model_copy(update={"embeddings": config.embeddings.model_copy(update={"optimizer": optimizer})})
        return plain(config, *arguments, **options)

    given = ("seeds", "--config", data.folder.parent / "config.yaml", "--run-dir", tmp_path, "training.epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", absurd)
        code, error = run_app(*given, "--seeds", "3,7,5")
    assert code == 2
    told = r"error: seed 7: loss '\w+' .* near step \d+.* Lower .*, and start all again with another --run-dir\."
    assert re.search(told + r" 1 of 3 seeds are trained, and kept\. Without this seed: --seeds 3,5\.", error)
    assert "--from-step" not in error
    assert (tmp_path / "seed3/result.json").is_file()
    code, error = run_app(*given, "--seeds", "3,5")
    assert code == 0, error
    assert f"{tmp_path / 'seed3'} is complete" in error


def test_scores_that_are_not_finite_are_an_error_that_counts_their_rows(data, config, tmp_path):
    run_dir = tmp_path / "run"
    with process_group() as world:
        train(config("training.epochs=1"), run_dir, world)
        session, *_ = load_session(RunFolder(run_dir), world, [])
        ids = data.tables["test"]["f0"].to_numpy()
        row = int(ids[0])
        weights = checkpoint.model_tensors(session.model)
        poison(weights["model.tables.embedding_bags.t0.weight"], row)
        state = checkpoint.read_state(run_dir / "checkpoints/best")
        checkpoint.save(run_dir / "checkpoints/best", weights, state, world)
        bad = int((ids == row).sum())
        assert 0 < bad < 60
        before = (run_dir / "result.json").read_text()
        session, *_ = load_session(RunFolder(run_dir), world, [])
        expected = rf"the model gives no finite score to {bad} of 60 rows \(the first: row 0\)"
        with pytest.raises(DataError, match=expected):
            evaluate_split(session, "test")
        with pytest.raises(DataError, match=expected):
            write_predictions(session, data.folder, "test", tmp_path / "scores.parquet")
    assert (run_dir / "result.json").read_text() == before
    assert not list(tmp_path.glob("scores*"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A whole run, and one that ended after the first of its three epochs and went on with other rates."""
    root = tmp_path_factory.mktemp("back")
    file = data.folder.parent / "config.yaml"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        with process_group() as world:
            train(load_config(file), root / "whole", world)
            # So that its choice has to begin anew.
            assert checkpoint.read_state(root / "whole/checkpoints/best")["step"] > 4
            train(load_config(file, ["training.max_steps=4"]), root / "expected", world)
            # By hand what --from-step does: the run as it was, under another configuration.
            lower = resolve(load_config(file, LOWER), str(file))
            (root / "expected/config.yaml").write_text(lower.to_yaml())
            train(lower, root / "expected", world)
    return root


def assert_same_end(expected, found):
    for name in ("step_000000012", "best"):
        known, seen = (tensors(path / "checkpoints" / name) for path in (expected, found))
        assert known.keys() == seen.keys()
        assert [key for key in known if not known[key].equal(seen[key])] == []
    assert losses(found) == losses(expected)
    assert validations(found) == validations(expected)
    assert (found / "result.json").read_text() == (expected / "result.json").read_text()
    assert (found / "config.yaml").read_text() == (expected / "config.yaml").read_text()


@pytest.mark.parametrize("deaths", [0, 1, 2], ids=["no-death", "before-the-later-ones-are-deleted", "in-between"])
def test_a_run_goes_back_and_trains_on_with_other_rates(runs, config, tmp_path, monkeypatch, deaths):
    """As one that never went further; also when it dies on the way back, and the command is given again."""
    run_dir = tmp_path / "run"
    shutil.copytree(runs / "whole", run_dir)
    deleted = []

    class Death(BaseException):
        pass

    plain = whole.retire

    def retire(path, delete):
        deleted.append(path.name)
        if len(deleted) == deaths:
            raise Death
        plain(path, delete)

    with process_group() as world:
        if deaths:
            with monkeypatch.context() as patch:
                patch.setattr(whole, "retire", retire)
                with pytest.raises(Death):
                    train(config(*LOWER), run_dir, world, from_step=4)
            assert deleted == ["step_000000012", "step_000000008"][:deaths]
        train(config(*LOWER), run_dir, world, from_step=4)
    assert_same_end(runs / "expected", run_dir)


def test_a_death_on_the_way_back_leaves_the_run_as_it_was(runs, config, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(runs / "whole", run_dir)
    monkeypatch.setattr(whole, "retire", lambda path, delete: sys.exit(9))
    with process_group() as world:
        with pytest.raises(SystemExit):
            train(config(*LOWER), run_dir, world, from_step=4)
        train(config(), run_dir, world)
    assert_same_end(runs / "whole", run_dir)


def test_the_same_command_again_continues(runs, config, tmp_path):
    """A scheduler that starts a stopped job again gives it the same command."""
    run_dir = tmp_path / "run"
    shutil.copytree(runs / "whole", run_dir)
    with process_group() as world:
        train(config(*LOWER, "training.max_steps=8"), run_dir, world, from_step=4)
        train(config(*LOWER), run_dir, world, from_step=4)
    log = (run_dir / "train.log").read_text()
    assert "step_000000004 at step 4 of at most 8" in log
    assert "step_000000008 at step 8 of at most 12" in log
    assert_same_end(runs / "expected", run_dir)


def test_what_cannot_be_gone_back_to(runs, config, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(runs / "whole", run_dir)
    with process_group() as world:
        with pytest.raises(UserError, match=r"--from-step 5: .*step_000000005 has no COMPLETE.*of steps 4, 8, 12\."):
            train(config(*LOWER), run_dir, world, from_step=5)
        with pytest.raises(UserError, match=r"embeddings.dim: 4 in the run folder, 8 now"):
            train(config("embeddings.dim=8"), run_dir, world, from_step=4)
        with pytest.raises(UserError, match="no whole checkpoint to go back to"):
            train(config(), tmp_path / "nothing", world, from_step=4)
        assert json.loads((run_dir / "result.json").read_text())["step"]
        assert sorted(p.name for p in (run_dir / "checkpoints").glob("step_*")) == [f"step_{s:09d}" for s in (4, 8, 12)]


def test_what_the_message_advises_works_under_the_default_name(data, tmp_path, monkeypatch, run_app):
    """Other rates give the folder another default name."""
    monkeypatch.chdir(tmp_path)
    command = ["train", "--config", data.folder.parent / "config.yaml"]
    assert run_app(*command, "training.max_steps=4")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(guard, "_MOST_GROWTH", 0.0)
        code, error = run_app(*command)
    assert code == 2
    (advised,) = re.findall(r"give apps.train the same configuration with (--run-dir \S+ --from-step 4),", error)
    code, error = run_app(*command, *LOWER, "--from-step", "4")
    assert code == 2
    assert "Give the folder of the run with --run-dir" in error
    code, error = run_app(*command, *LOWER, *advised.split())
    assert code == 0, error
    assert "step_000000004 at step 4 of at most 12" in error
