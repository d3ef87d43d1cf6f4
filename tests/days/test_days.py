"""Days from the command line, with real processes: measured on the next day, killed anywhere, refused where they must be."""

import gc
import importlib
import json
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from sklearn.metrics import roc_auc_score

from mmlrec.days.folders import find_days
from mmlrec.days.run import measure
from mmlrec.distributed.world import process_group
from mmlrec.embeddings.tables import initial_rows
from mmlrec.storage.places import place
from mmlrec.training.trainer import Trainer
from tests.days.support import NEW_ROWS, ids_in_train, ids_of, lines, read_day, without_ids, write_day, write_days
from tests.processes import Command, run
from tests.storage import upload
from tests.training.launch import start_ranks, tensors

#: Rows of f0's table that the second and third day lack in train; the fourth has the last five again.
ABSENT = range(5, 15)
MODULE = [sys.executable, "-m", "apps.days"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with four days, and what one process and two ranks made of them, never interrupted."""
    folder = tmp_path_factory.mktemp("days")
    days = write_days(folder, 4)
    for day, absent in ((1, ABSENT), (2, ABSENT), (3, ABSENT[:5])):
        without_ids(days[day], "f0", absent)
    for world_size in (1, 2):
        ranks = start_ranks(arguments(folder, folder / f"whole-{world_size}"), logs(folder, f"whole-{world_size}", world_size))
        assert [rank.wait(240) for rank in ranks] == [0] * world_size, (folder / f"whole-{world_size}-0.log").read_text()
    return folder


def logs(folder: Path, name: str, world_size: int) -> list[Path]:
    return [folder / f"{name}-{rank}.log" for rank in range(world_size)]


def arguments(root: Path, run_dir: Path, *more: str) -> list[str]:
    given = ["--config", str(root / "config.yaml"), "--days", str(root / "day-*"), "--run-dir", str(run_dir)]
    return [*MODULE, *given, "--forget-after", "2", *more]


def assert_same_end(run_dir: Path, whole: Path) -> None:
    """The same record to the byte, the same weights, optimizer states and results of each day to the bit."""
    assert (run_dir / "days.jsonl").read_bytes() == (whole / "days.jsonl").read_bytes()
    for line in lines(whole):
        found, expected = run_dir / line["day"], whole / line["day"]
        assert (found / "result.json").read_text() == (expected / "result.json").read_text()
        newest = [max((folder / "checkpoints").glob("step_?????????")) for folder in (found, expected)]
        assert newest[0].name == newest[1].name
        for name in (newest[0].name, "best"):
            of_both = [tensors(folder / "checkpoints" / name) for folder in (found, expected)]
            assert of_both[0].keys() == of_both[1].keys()
            assert [key for key in of_both[0] if not of_both[0][key].equal(of_both[1][key])] == []


def test_the_table_counts_what_is_new_and_says_how_the_model_of_the_day_before_did(root):
    found = lines(root / "whole-1")
    assert [line["day"] for line in found] == ["day-01", "day-02", "day-03", "day-04"]
    assert found[0]["next_day"] is None
    for line in found[1:]:
        assert line["new_ids"] == dict.fromkeys(["t0", "tm0", "t1", "t2"], NEW_ROWS)
        assert line["next_day"]["tasks"]["click"]["rows"] > 380  # of 450 in all splits, a tenth without label
    printed = (root / "whole-1-0.log").read_text().partition("Each day by the model of the day before")[2].splitlines()
    assert re.split(r"  +", printed[1].strip())[:4] == ["day", "rows", "new ids", "forgotten"]
    last = re.split(r"  +", printed[-1].strip())
    click = found[-1]["next_day"]["tasks"]["click"]
    forgotten = sum(found[-1]["forgotten"].values())
    assert last[:5] == ["day-04", "450", str(4 * NEW_ROWS), str(forgotten), f"{click['auc']:.4f}"]
    assert (root / "whole-1" / "days.png").read_bytes().startswith(b"\x89PNG")


def test_the_next_day_is_measured_with_the_best_checkpoint_of_the_day_before_on_all_its_rows(root, tmp_path, run_app):
    """Against the scores of apps.predict, split by split."""
    scores = []
    for split in ("train", "valid", "test"):
        given = ["--run-dir", root / "whole-1" / "day-01", "--split", split, "--input", root / "day-02"]
        code, error = run_app("predict", *given, "--output", tmp_path / f"{split}.parquet")
        assert code == 0, error
        scores.append(pq.read_table(tmp_path / f"{split}.parquet").to_pandas())
    rows = pd.concat(scores)
    assert len(rows) == 300 + 75 + 75
    for task, found in lines(root / "whole-1")[1]["next_day"]["tasks"].items():
        known = rows[rows[f"label.{task}"].notna()]
        assert found["rows"] == len(known)
        pairs = found["positives"] * (len(known) - found["positives"])
        # Two logits may round to one probability, which is half a pair.
        assert abs(found["auc"] - roc_auc_score(known[f"label.{task}"], known[f"score.{task}"])) < 1.1 / pairs


def test_the_tables_of_a_measured_model_are_gone_before_those_of_the_next_one_are_made(root):
    day = find_days(str(root / "day-02"))[0]
    gc.collect()
    gc.disable()
    try:
        with process_group() as world:
            measure(root / "whole-1" / "day-01", day, world)
            assert not [found for found in gc.get_objects() if type(found) is SplitTableBatchedEmbeddingBagsCodegen]
    finally:
        gc.enable()


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_that_were_absent_for_two_days_start_afresh_and_all_others_go_on(root, world_size):
    """Seen where training does not touch them: rows that train of the fourth day lacks."""
    run_dir = root / f"whole-{world_size}"
    days = [read_day(root / f"day-{number:02d}") for number in (1, 2, 3, 4)]
    before, after = (run_dir / name / "checkpoints" for name in ("day-03", "day-04"))
    weights = [tensors(folder / "best") for folder in (before, after)]
    newest = [tensors(max(folder.glob("step_?????????"))) for folder in (before, after)]
    counts = {}
    for feature, table in (("f0", "t0"), ("m0", "tm0"), ("f1", "t1"), ("f2", "t2")):
        stood = [ids_in_train(day, feature) for day in days]
        forgotten = stood[0] - stood[1] - stood[2]
        counts[table] = len(forgotten - {0})
        key = f"tables.embedding_bags.{table}.weight"
        (state,) = [name for name in newest[0] if name.startswith(f"optimizer.tables.{key}.") and newest[0][name].dim()]
        rows = weights[1][f"model.{key}"]
        fresh = initial_rows(table, 0, len(rows), 4, 0.01, 0)
        for row in set(range(1, len(weights[0][f"model.{key}"]))) - stood[3]:
            if row in forgotten:
                assert rows[row].equal(fresh[row]), (table, row)
                assert not newest[1][state][row].any()
            else:
                assert rows[row].equal(weights[0][f"model.{key}"][row]), (table, row)
                assert newest[1][state][row].equal(newest[0][state][row])
                assert newest[1][state][row].any() == bool({row} & (stood[0] | stood[1] | stood[2]))
    assert lines(run_dir)[3]["forgotten"] == counts
    assert counts["t0"] == len(set(ABSENT) & ids_in_train(days[0], "f0"))
    assert [line["forgotten"] for line in lines(run_dir)[:3]] == [{}, {}, dict.fromkeys(counts, 0)]


@pytest.mark.long
def test_ranks_that_are_faster_than_rank_0_writes_go_on_to_the_next_day(root, tmp_path):
    """Without --forget-after nothing else makes them wait for what came of a day."""
    run_dir, first_day = tmp_path / "run", root / "day-01"
    command = [sys.executable, str(Path(__file__).parent / "slow_result.py"), "--config", str(root / "config.yaml")]
    ranks = start_ranks([*command, "--days", str(first_day), "--run-dir", str(run_dir)], logs(tmp_path, "run", 2))
    assert [rank.wait(240) for rank in ranks] == [0, 0], (tmp_path / "run-1.log").read_text()
    assert [line["step"] for line in lines(run_dir)] == [lines(root / "whole-2")[0]["step"]]


def test_the_day_that_diverged_is_named_and_the_days_before_are_kept(root, tmp_path, run_app, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(root / "whole-1", run_dir, ignore=shutil.ignore_patterns("day-03", "day-04"))
    (run_dir / "days.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines(root / "whole-1")[:2]))
    monkeypatch.setattr("mmlrec.training.guard._MOST_GROWTH", 0.0)
    code, error = run_app("days", *arguments(root, run_dir)[3:])
    assert code == 2
    assert re.search(
        r"error: day day-03: loss '\w+' has grown to .* another --run-dir\. .* keeps 2 day\(s\) that are trained", error
    )
    assert "--from-step" not in error


def test_days_that_were_moved_in_the_middle_of_one_go_on(root, tmp_path, run_app, monkeypatch):
    """That day began with the one before it where the folder was then."""
    run_dir, plain = tmp_path / "run", Trainer._train_segment
    shutil.copytree(root / "whole-1", run_dir, ignore=shutil.ignore_patterns("day-03", "day-04"))
    (run_dir / "days.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines(root / "whole-1")[:2]))

    def asked_to_stop(*given):
        signal.raise_signal(signal.SIGTERM)
        return plain(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_segment", asked_to_stop)
        assert run_app("days", *arguments(root, run_dir)[3:])[0] == 85
    assert (run_dir / "day-03/config.yaml").is_file()
    moved = run_dir.rename(tmp_path / "moved")
    code, error = run_app("days", *arguments(root, moved)[3:])
    assert code == 0, error
    assert_same_end(moved, root / "whole-1")


@pytest.mark.parametrize("name", ["days.png", "day-01"])
def test_days_are_refused_in_a_folder_of_other_things(root, tmp_path, run_app, name):
    (tmp_path / name).write_text("mine")
    code, error = run_app("days", *arguments(root, tmp_path)[3:])
    assert code == 2
    assert f"error: {tmp_path} is not empty: it holds '{name}'" in error
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.long
def test_the_first_day_begins_with_the_run_that_the_configuration_names(root, tmp_path):
    """Days 2 to 4 from the run of day 1 are what they were behind day 1."""
    later = tmp_path / "days"
    later.mkdir()
    for name in ("day-02", "day-03", "day-04"):
        (later / name).symlink_to(root / name)
    command = [*MODULE, "--config", str(root / "config.yaml"), "--days", str(later / "day-*"), "--forget-after", "2"]
    done = run([*command, "--run-dir", str(tmp_path / "run"), f"init_from={root / 'whole-1' / 'day-01'}"])
    assert done.returncode == 0, done.stderr
    found, expected = lines(tmp_path / "run"), lines(root / "whole-1")[1:]
    for key in ("day", "new_ids", "next_day", "unseen", "step"):
        assert [line[key] for line in found] == [line[key] for line in expected], key
    best = [tensors(folder / "day-04" / "checkpoints" / "best") for folder in (tmp_path / "run", root / "whole-1")]
    assert [key for key in best[0] if not best[0][key].equal(best[1][key])] == []


def test_ids_that_the_model_does_not_know_are_counted(root):
    days = [read_day(root / f"day-{number:02d}") for number in (1, 2)]
    limits = {feature: days[0].manifest.table(table).num_rows for feature, table in (("f0", "t0"), ("m0", "tm0"))}
    for feature, limit in limits.items():
        beyond = sum(id >= limit for split in ("train", "valid", "test") for id in ids_of(days[1], feature, split))
        assert lines(root / "whole-1")[1]["unseen"][feature] == beyond > 0


def test_the_same_command_again_trains_nothing_and_a_day_that_was_added_goes_on(root, tmp_path, run_app):
    run_dir, days = tmp_path / "run", tmp_path / "days"
    shutil.copytree(root / "whole-1", run_dir)
    days.mkdir()
    for name in ("day-01", "day-02", "day-03", "day-04"):
        (days / name).symlink_to(root / name)
    given = ["--config", root / "config.yaml", "--days", days / "day-*", "--run-dir", run_dir, "--forget-after", 2]
    (run_dir / "days.png.0123456789ab.tmp").touch()  # of a process that was killed while it wrote
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("step_*/*")}
    code, error = run_app("days", *given)
    assert code == 0, error
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("step_*/*")} == before
    assert_same_end(run_dir, root / "whole-1")
    assert not list(run_dir.glob("*.tmp"))
    write_day(days, 4)
    code, error = run_app("days", *given)
    assert code == 0, error
    assert [line["day"] for line in lines(run_dir)] == ["day-01", "day-02", "day-03", "day-04", "day-05"]
    assert lines(run_dir)[:4] == lines(root / "whole-1")
    assert lines(run_dir)[4]["step"]


def test_days_and_run_folders_may_lie_on_an_object_store(root, tmp_path, store, run_app):
    """Two days; the second start finds the first done, and the numbers are those of local folders."""
    days, run_dir = f"{store.address}/days", f"{store.address}/run"
    given = ["--config", root / "config.yaml", "--run-dir", run_dir, "--forget-after", 2]
    upload(root / "day-01", place(f"{days}/day-01"))
    code, error = run_app("days", *given, "--days", f"{days}/day-*")
    assert code == 0, error
    upload(root / "day-02", place(f"{days}/day-02"))
    code, error = run_app("days", *given, "--days", f"{days}/day-*")
    assert code == 0, error
    found = [json.loads(line) for line in (place(run_dir) / "days.jsonl").read_text().splitlines()]
    assert [line | {"dataset": None} for line in found] == [line | {"dataset": None} for line in lines(root / "whole-1")[:2]]


def test_what_is_no_such_command_is_refused_in_words(root, tmp_path, run_app):
    given = ["--config", root / "config.yaml", "--days", root / "day-*", "--run-dir", tmp_path / "run"]
    for more, words in (
        ([root / "day-03", root / "day-04"], "day-03: the shell has spelt out --days. Put the pattern into quotes"),
        (["dataset.path=x"], "dataset.path=x: is of each day; give --days and --run-dir"),
        (["--forget-after", "0"], "'0' is no number of days, such as 30"),
        (["training.epoch=1"], "Did you mean 'epochs'?"),
        (["dataset.tasks=[clik]"], "'clik' is not a task"),  # found when the first day begins; nothing keeps to it
    ):
        code, error = run_app("days", *given, *more)
        assert (code, words in error) == (2, True), error
    assert not (tmp_path / "run").exists()


def test_a_second_start_is_refused_while_the_first_is_alive(root, tmp_path, run_app):
    run_dir = tmp_path / "run"
    first = Command(arguments(root, run_dir))
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "day-01").is_dir():
            assert time.monotonic() < deadline
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)
        code, error = run_app("days", *arguments(root, run_dir)[3:], "training.keep_checkpoints=1")
        assert code == 2
        assert re.search(rf"{run_dir} is taken: a run that was started at .* is writing there", error)
    finally:
        first.kill()
        first.wait(60)


@pytest.mark.parametrize(
    ("name", "done", "steps"),
    [("training.run.evaluate_split", "day-01 was trained", 1), ("days.run.evaluate_splits", "day-02 was measured", 2)],
)
def test_a_signal_behind_the_last_step_of_a_day_ends_it_before_the_next_work(
    root, tmp_path, run_app, monkeypatch, name, done, steps
):
    """Nothing more is read between two batches then: the report is being made, and its day is kept."""
    module = importlib.import_module(f"mmlrec.{name.rpartition('.')[0]}")
    plain = getattr(module, name.rpartition(".")[2])

    def asked_to_stop(*given, **more):
        found = plain(*given, **more)
        signal.raise_signal(signal.SIGTERM)
        return found

    run_dir = tmp_path / "run"
    given = [*arguments(root, run_dir)[3:], "--days", str(root / "day-0[12]")]
    with monkeypatch.context() as patch:
        patch.setattr(module, name.rpartition(".")[2], asked_to_stop)
        code, said = run_app("days", *given)
    assert code == 85
    assert said.splitlines()[-1].startswith(f"stopped when day {done}")
    assert len(lines(run_dir)) == steps
    assert [line["step"] is not None for line in lines(run_dir)] == [True, False][:steps]
    assert run_app("days", *given)[0] == 0
    assert lines(run_dir) == lines(root / "whole-1")[:2]


def killed_and_started_again(root: Path, run_dir: Path, world_size: int, number: int, seconds: float) -> None:
    """Start, end it by a signal so many seconds after it has begun to write, and start it again."""
    first, again = (logs(run_dir.parent, f"{run_dir.name}-{name}", world_size) for name in ("first", "again"))
    ranks = start_ranks(arguments(root, run_dir), first)
    try:
        begun = None
        while any(rank.poll() is None for rank in ranks) and (begun is None or time.monotonic() < begun + seconds):
            if begun is None and (run_dir / ".lock").exists():
                begun = time.monotonic()
            time.sleep(0.005)
        for rank in ranks:
            rank.send_signal(number)
        assert all(rank.wait(120) is not None for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(60)
    ranks = start_ranks(arguments(root, run_dir), again)
    assert [rank.wait(240) for rank in ranks] == [0] * world_size, again[0].read_text()


def cases():
    """A quick one, and twenty, at one and two ranks, half of them by SIGTERM."""
    yield 1, signal.SIGKILL, 0.4
    draw = random.Random(20)
    for case in range(20):
        chosen = 1 + case % 2, (signal.SIGKILL, signal.SIGTERM)[case // 2 % 2], round(draw.random(), 3)
        yield pytest.param(*chosen, marks=pytest.mark.long)


@pytest.mark.parametrize(("world_size", "number", "moment"), list(cases()))
def test_killed_and_started_again_it_gives_the_same_numbers(root, tmp_path, world_size, number, moment):
    """`moment` is a share of the time that all takes from the first word in the folder on."""
    whole = root / f"whole-{world_size}"
    took = (whole / "days.png").stat().st_mtime - (whole / ".lock").stat().st_mtime
    killed_and_started_again(root, tmp_path / "run", world_size, number, moment * took)
    assert_same_end(tmp_path / "run", whole)
