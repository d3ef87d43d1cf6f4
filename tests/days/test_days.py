"""Days from the command line, with real processes: measured on the next day, killed anywhere, refused where they must be."""

import json
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.days.support import NEW_ROWS, lines, write_days
from tests.processes import Command, run
from tests.training.launch import start_ranks, tensors

MODULE = [sys.executable, "-m", "apps.days"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with four days, and what one process and two ranks made of them, never interrupted."""
    folder = tmp_path_factory.mktemp("days")
    write_days(folder, 4)
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
