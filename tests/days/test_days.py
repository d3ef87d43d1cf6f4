"""Days from the command line, with real processes: measured on the next day, killed anywhere, refused where they must be."""

import re
import signal
import sys
import time
from pathlib import Path

import pytest

from mmlrec.embeddings.tables import initial_rows
from tests.days.support import NEW_ROWS, ids_in_train, lines, read_day, without_ids, write_days
from tests.processes import run
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


def test_the_next_day_is_measured_with_the_best_checkpoint_of_the_day_before_on_all_its_rows(root, tmp_path):
    """As apps.evaluate measures each split."""
    counts = 0
    for split in ("train", "valid", "test"):
        command = [sys.executable, "-m", "apps.evaluate", "--run-dir", str(root / "whole-1" / "day-01"), "--split", split]
        done = run([*command, f"dataset.path={root / 'day-02'}"])
        assert done.returncode == 0, done.stderr
        counts += int(re.search(r"^click +all +(\d+)", done.stdout, re.MULTILINE)[1])
    assert counts == lines(root / "whole-1")[1]["next_day"]["tasks"]["click"]["rows"]


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


def killed_and_started_again(root: Path, run_dir: Path, world_size: int, number: int, moment: float) -> None:
    """Start, end by a signal after a while unless it is done, and so on until it is."""
    for attempt in range(30):
        log = logs(run_dir.parent, f"{run_dir.name}-{attempt}", world_size)
        ranks = start_ranks(arguments(root, run_dir), log)
        try:
            deadline = time.monotonic() + (moment if attempt == 0 else 240)
            while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
                time.sleep(0.02)
            if all(rank.poll() == 0 for rank in ranks):
                return
            for rank in ranks:
                rank.send_signal(number)
            codes = [rank.wait(60) for rank in ranks]
            assert attempt == 0, (codes, log[0].read_text())
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait(60)


@pytest.mark.parametrize(("world_size", "number", "moment"), [(1, signal.SIGKILL, 0.4), (2, signal.SIGTERM, 0.7)])
def test_killed_and_started_again_it_gives_the_same_numbers(root, tmp_path, world_size, number, moment):
    """`moment` is a share of the time that all takes."""
    whole = root / f"whole-{world_size}"
    took = (whole / "days.png").stat().st_mtime - (whole / "days.yaml").stat().st_mtime
    killed_and_started_again(root, tmp_path / "run", world_size, number, 2 + moment * took)
    assert_same_end(tmp_path / "run", whole)
