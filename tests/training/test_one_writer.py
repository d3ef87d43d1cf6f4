"""One run at a time writes a run folder: a second start is told who does, and no death of any process leaves it taken."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apps import cli
from mmlrec.distributed.world import process_group
from mmlrec.evaluation.prediction import write_predictions
from mmlrec.run_folder import checkpoint, lock
from mmlrec.run_folder.folder import RunFolder
from mmlrec.run_folder.saver import Saver
from mmlrec.session.session import load_session
from mmlrec.training import run as run_module
from mmlrec.training.trainer import Trainer
from tests.datasets import write_dataset
from tests.processes import ROOT, Command, alive, environment, run
from tests.training.launch import free_port, launch, losses, tensors

CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: mmoe, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
training: {{batch_size: 50, epochs: 1000, patience: null, log_every_steps: 1, checkpoint_every_steps: 2, keep_checkpoints: 3}}
"""
STEPS_PER_EPOCH = 14
AGENT = Path(__file__).parent / "agent.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writers")
    write_dataset(folder / "data", rows=690, table_rows=30)
    (folder / "config.yaml").write_text(CONFIG.format(dataset=folder / "data"))
    return folder


def train(root: Path, run_dir: Path | str, *overrides: str) -> list[str]:
    return ["--config", str(root / "config.yaml"), "--run-dir", str(run_dir), *overrides]


def until(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


def holder(run_dir: Path) -> dict:
    """What the lock file says of who writes."""
    try:
        return json.loads((run_dir / ".lock").read_text())
    except (OSError, ValueError):
        return {}


def has_checkpoint(run_dir: Path) -> bool:
    return any(not path.suffix for path in (run_dir / "checkpoints").glob("step_*"))


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def started(root: Path, run_dir: Path, *overrides: str) -> Command:
    """A run of one process that has saved a checkpoint."""
    process = Command([sys.executable, "-m", "apps.train", *train(root, run_dir, *overrides)])
    until(lambda: has_checkpoint(run_dir) or process.poll() is not None, 60, "a checkpoint")
    assert process.poll() is None, process.communicate()
    return process


@pytest.fixture
def app(run_app):
    """apps.train in this process; its exit code and standard error."""
    return functools.partial(run_app, "train")


def test_a_second_start_is_refused_and_changes_nothing_and_a_dead_holder_is_succeeded(root, tmp_path, app):
    run_dir = tmp_path / "run"
    first = started(root, run_dir)
    try:
        first.send_signal(signal.SIGSTOP)
        before = content(run_dir)
        (host, process), since = holder(run_dir)["ranks"][0], holder(run_dir)["since"]
        assert host == socket.gethostname()
        # The same command, and another configuration that may follow it.
        for overrides in ((), ("training.max_steps=2",)):
            begin = time.monotonic()
            code, error = app(*train(root, run_dir, *overrides))
            assert code == 2
            assert time.monotonic() - begin < 5
            words = f"{run_dir} is taken: a run that was started at {since} on {host}, process {process} is writing there"
            assert error.count("error: ") == 1
            assert words in error
            assert content(run_dir) == before
    finally:
        first.kill()
        first.wait(10)
    assert holder(run_dir)["ranks"][0] == [host, process]  # stale
    code, error = app(*train(root, run_dir, "training.max_steps=20"))
    assert code == 0, error
    assert "resumed from" in error


def saved(run_dir: Path) -> dict[str, str]:
    return {name: digest for name, digest in content(run_dir).items() if not name.startswith("tensorboard/")}


@pytest.mark.parametrize("after", ["train", "save", "test"])
def test_a_run_whose_folder_is_moved_saves_nothing_into_the_one_in_its_place(root, tmp_path, app, monkeypatch, after):
    """Moved, and replaced by that of another run, after some steps, a save, or the evaluation of test."""
    run_dir, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    code, error = app(*train(root, other, "training.max_steps=4", "dense.optimizer.lr=0.5"))
    assert code == 0, error
    place, name, number = {
        "train": (Trainer, "_train_segment", 3),
        "save": (Saver, "save", 3),
        "test": (run_module, "evaluate_split", 1),
    }[after]
    plain, calls = getattr(place, name), []

    def call(*arguments, **options):
        result = plain(*arguments, **options)
        calls.append(name)
        if len(calls) == number:
            run_dir.rename(moved)
            shutil.copytree(other, run_dir)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(place, name, call)
        code, error = app(*train(root, run_dir, "training.max_steps=14"))
    assert code == 2
    assert error.count("error: ") == 1
    assert f"error: {run_dir} was moved, deleted or replaced while this run was writing there." in error
    assert saved(run_dir) == saved(other)
    code, error = app(*train(root, moved, "training.max_steps=14"))
    assert code == 0, error
    assert f"resumed from {moved}/checkpoints/step_" in error


def test_a_run_whose_folder_is_deleted_makes_no_other_one_and_frees_no_lock_of_another(root, tmp_path, app, monkeypatch):
    run_dir, plain = tmp_path / "run", Trainer._train_segment

    def segment(*arguments):
        run_dir.rename(tmp_path / "deleted")
        shutil.rmtree(tmp_path / "deleted", ignore_errors=True)  # TensorBoard's thread may be writing there
        run_dir.mkdir()
        (run_dir / ".lock").touch()  # of a run that is about to begin
        return plain(*arguments)

    monkeypatch.setattr(Trainer, "_train_segment", segment)
    code, error = app(*train(root, run_dir))
    assert code == 2, error
    assert [path.name for path in run_dir.iterdir()] == [".lock"]


def silent_holder(folder: Path, seconds: float) -> tuple[Path, Command]:
    """A run folder between the lock of a start and what that writes into the file: what stands there is of one before."""
    run_dir = folder / "run"
    run_dir.mkdir()
    before = {"start": "a", "since": "yesterday", "job": None, "ranks": [[socket.gethostname(), 1]]}
    (run_dir / ".lock").write_text(json.dumps(before))
    script = folder / "holder.py"
    script.write_text(
        "import fcntl, os, sys, time\n"
        f"lock = os.open({str(run_dir / '.lock')!r}, os.O_RDWR)\n"
        f"fcntl.lockf(lock, fcntl.LOCK_EX)\nprint('locked', flush=True)\ntime.sleep({seconds})\n"
    )
    other = Command([sys.executable, str(script)], log=folder / "log")
    until(lambda: "locked" in (folder / "log").read_text(), 30, "a lock")
    return run_dir, other


def test_a_holder_that_has_ended_before_it_wrote_leaves_the_folder_free(tmp_path):
    run_dir, other = silent_holder(tmp_path, 0.5)
    own = lock.Lock(run_dir)
    try:
        assert own.take({"start": "b", "since": "now", "job": None, "ranks": [[socket.gethostname(), os.getpid()]]})
    finally:
        own.leave()
        other.kill()


def test_a_holder_that_has_not_written_yet_is_not_taken_for_the_one_before(root, tmp_path, app):
    run_dir, other = silent_holder(tmp_path, 600)
    try:
        code, error = app(*train(root, run_dir))
        assert code == 2
        assert f"error: {run_dir} is taken: another run is writing there." in error
    finally:
        other.kill()


def test_reading_needs_no_lock(root, tmp_path):
    run_dir = tmp_path / "run"
    first = started(root, run_dir)
    try:
        until(lambda: (run_dir / "checkpoints/best/COMPLETE.json").exists(), 60, "a best checkpoint")
        first.send_signal(signal.SIGSTOP)
        done = run([sys.executable, "-m", "apps.evaluate", "--run-dir", str(run_dir)])
        assert done.returncode == 0, done.stderr
    finally:
        first.kill()


def test_two_that_write_the_same_scores_do_not_write_one_file(root, tmp_path, app, monkeypatch):
    run_dir, output = tmp_path / "run", tmp_path / "scores.parquet"
    assert app(*train(root, run_dir, "training.max_steps=4"))[0] == 0
    plain = os.fsync

    def during(descriptor):
        monkeypatch.setattr(os, "fsync", plain)
        session.world = dataclasses.replace(world, start="another")
        write_predictions(session, root / "data", "test", output)
        output.rename(tmp_path / "first.parquet")
        plain(descriptor)

    with process_group() as world:
        session, *_ = load_session(RunFolder(run_dir), world, [])
        monkeypatch.setattr(os, "fsync", during)
        write_predictions(session, root / "data", "test", output)
    assert output.read_bytes() == (tmp_path / "first.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*scores*")) == ["scores.parquet"]


def test_a_full_disk_can_be_freed_and_another_fault_cannot():
    full, forbidden = OSError(errno.ENOSPC, "full"), OSError(errno.EACCES, "forbidden")
    assert str(lock.unwritable(Path("runs/a"), full)).endswith("Free space, or choose another with --run-dir.")
    assert str(lock.unwritable(Path("runs/a"), forbidden)).endswith("forbidden. Choose another with --run-dir.")


def test_the_lock_file_alone_makes_no_run_folder(root, tmp_path, app):
    code, error = app(*train(root, tmp_path / "new/run", "dataset.tasks=[clik, buy]"))
    assert code == 2, error
    assert not (tmp_path / "new").exists()


def ranks_of(root: Path, run_dir: str, folders: list[Path], script: Path) -> list[Command]:
    """Ranks without an agent, each in a folder of its own."""
    port, count = str(free_port()), len(folders)
    variables = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Command(
            [sys.executable, str(script), *train(root, run_dir)],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **variables),
            cwd=folder,
        )
        for rank, folder in enumerate(folders)
    ]


PLAIN = "from apps.cli import run\nfrom apps.train import main\nrun(main)\n"


def test_a_folder_is_taken_until_its_last_rank_has_ended(root, tmp_path, app, monkeypatch):
    run_dir, script = tmp_path / "run", tmp_path / "train.py"
    script.write_text(PLAIN)
    first, second = ranks_of(root, str(run_dir), [ROOT, ROOT], script)
    try:
        until(lambda: has_checkpoint(run_dir), 60, "a checkpoint")
        second.send_signal(signal.SIGSTOP)  # it will notice the death of the first when it goes on
        first.kill()
        first.wait(10)
        monkeypatch.setattr(lock, "_ORPHANS_END_WITHIN_S", 0.5)
        before = content(run_dir)
        code, error = app(*train(root, run_dir))
        assert code == 2
        host, process = holder(run_dir)["ranks"][1]
        assert f"is taken: rank 1 of a run that was started at {holder(run_dir)['since']} on {host}, process {process}" in error
        assert content(run_dir) == before
        second.send_signal(signal.SIGCONT)
        assert second.wait(20) != 0
        code, error = app(*train(root, run_dir, "training.max_steps=20"))
        assert code == 0, error
    finally:
        first.kill()
        second.kill()


def test_a_folder_that_the_ranks_do_not_share_is_refused(root, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"from mmlrec.run_folder import lock\nlock._SEEN_WITHIN_S = 0.5\n{PLAIN}")
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    ranks = ranks_of(root, "runs/a", folders, script)
    errors = "".join(rank.communicate(120)[1] for rank in ranks)
    assert [rank.poll() for rank in ranks] == [2, 2], errors
    assert errors.count("error: ") == 1
    host = socket.gethostname()
    assert f"what rank 0 on {host} ({folders[0]}/runs/a) has written there is not seen by rank 1 on {host}" in errors
    assert f"({folders[1]}/runs/a)" in errors
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_file_system_without_locks_is_told_and_trained_on(root, tmp_path, app, monkeypatch):
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_lock)
    code, error = app(*train(root, tmp_path / "run", "training.max_steps=4"))
    assert code == 0, error
    told = [line for line in error.splitlines() if "its file system has no locks" in line]
    assert len(told) == 1
    assert str(tmp_path / "run") in told[0]
    assert os.strerror(errno.ENOLCK) in told[0]


MOUNTS = """\
/dev/sda1 / ext4 rw,relatime 0 0
server:/home /shared nfs4 rw,vers=4.2,local_lock=none,addr=10.0.0.1 0 0
server:/old /shared/old nfs rw,vers=3,nolock,local_lock=all,addr=10.0.0.1 0 0
server:/odd /shared/with\\040space nfs rw,vers=3,local_lock=posix 0 0
server:/flock /shared/flock nfs rw,vers=3,local_lock=flock 0 0
lustre@tcp:/fs /lustre lustre rw,localflock 0 0
"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/runs/a", None),
        ("/shared/runs/a", None),
        ("/shared/older/a", None),
        ("/shared/old/a", "nfs, local_lock=all nolock"),
        ("/shared/with space/a", "nfs, local_lock=posix"),
        ("/shared/flock/a", None),
        ("/lustre/a", "lustre, localflock"),
    ],
)
def test_mounts_that_keep_locks_to_their_host_are_known(folder, expected, tmp_path):
    (tmp_path / "mounts").write_text(MOUNTS)
    assert lock._keeps_locks_to_itself(Path(folder), tmp_path / "mounts") == expected


@pytest.mark.long
def test_ranks_end_with_a_torchrun_that_is_killed(root, tmp_path):
    run_dir = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "apps.train", *train(root, run_dir)]
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        until(lambda: has_checkpoint(run_dir) or agent.poll() is not None, 120, "a checkpoint")
        ranks = [process for _, process in holder(run_dir)["ranks"]]
        assert [alive(process) for process in ranks] == [True, True]
        os.kill(ranks[1], signal.SIGSTOP)  # not even one that is stopped stays
        agent.kill()
        agent.wait()
        until(lambda: not any(map(alive, ranks)), 5, "the end of all ranks")
    finally:
        agent.kill()


def test_a_rank_whose_torchrun_ended_before_it_began_ends(root, tmp_path):
    """Its parent is process 1, which did not start it."""
    script = tmp_path / "late.py"
    script.write_text(f"import os, sys, time\nif os.fork(): sys.exit()\nwhile os.getppid() != 1: time.sleep(0.01)\n{PLAIN}")
    process = Command(
        [sys.executable, str(script), *train(root, tmp_path / "run")],
        env=environment(TORCHELASTIC_RUN_ID="test"),
        log=tmp_path / "log",
    )
    assert process.wait(30) == 0
    error = until(lambda: re.search("error: .*", (tmp_path / "log").read_text()), 30, "its end")[0]
    if "another reaper" in error:
        pytest.skip("orphans of this machine are adopted by another process than 1, which is not told from an agent")
    assert error == "error: the torchrun that started this rank has ended already."
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python\0-m\0torch.distributed.run\0-m\0apps.train\0--config\0a b.yaml\0", True),
        ("/sbin/init\0", False),
        ("bash\0-c\0torchrun -m apps.train --config a b.yaml\0", False),
    ],
)
def test_the_command_line_of_a_torchrun_is_known(tmp_path, monkeypatch, command, expected):
    (tmp_path / "cmdline").write_text(command)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "a b.yaml"])
    assert cli._is_agent(tmp_path / "cmdline") == expected


MARKED = """
import os
import torch
from mmlrec.run_folder import checkpoint
start = int(os.environ["START"])
plain_tensors, plain_write = checkpoint.training_tensors, checkpoint.write
def training_tensors(model, optimizer, rank):
    return plain_tensors(model, optimizer, rank) | {f"random.{rank}.writer": torch.tensor([start])}
def write(folder, parts, state, world, **options):
    plain_write(folder, parts, state | {"writer": start}, world, **options)
checkpoint.training_tensors, checkpoint.write = training_tensors, write
"""
KILLS = ("agent", "rank 0", "rank 1", "agent of a stopped rank 1", "both agents")


class Start:
    """One start of a run of two ranks under an agent; every tensor of a rank's random state comes with its number."""

    numbers = iter(range(1, 1 << 30))

    def __init__(self, root: Path, run_dir: Path, folder: Path, *overrides: str) -> None:
        self.number = next(self.numbers)
        self.log, self._ranks_file = folder / f"start-{self.number}.log", folder / f"start-{self.number}.json"
        arguments = ["2", str(free_port()), str(self._ranks_file), str(folder / "train.py"), *train(root, run_dir, *overrides)]
        variables = environment(START=str(self.number))
        self.agent = Command([sys.executable, str(AGENT), *arguments], env=variables, log=self.log)
        self.killed = False

    @property
    def ranks(self) -> list[int]:
        return until(lambda: self._ranks_file.exists() and json.loads(self._ranks_file.read_text()), 30, "ranks")

    def kill(self, how: str) -> None:
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            if how.startswith("rank"):
                os.kill(self.ranks[int(how[-1])], signal.SIGKILL)
                return
            if how == "agent of a stopped rank 1":
                os.kill(self.ranks[1], signal.SIGSTOP)
        self.ranks  # noqa: B018 (it has started them)
        self.agent.kill()


def writers(folder: Path) -> set[int]:
    """The starts whose hand a checkpoint of two ranks shows."""
    flat = {key: value for key, value in raw_tensors(folder).items() if key.endswith(".writer")}
    assert flat.keys() == {"random.0.writer", "random.1.writer"}
    return {int(value) for value in flat.values()} | {checkpoint.read_state(folder)["writer"]}


def raw_tensors(folder: Path) -> dict:
    import torch
    import torch.distributed.checkpoint as dcp

    from mmlrec.run_folder.index import Reader

    keys = [key for key in Reader(folder).read_metadata().state_dict_metadata if key.endswith(".writer")]
    found = {key: torch.zeros(1, dtype=torch.int64) for key in keys}
    dcp.load(found, storage_reader=Reader(folder), no_dist=True)
    return found


def one_round(draw: random.Random, pace: float, root: Path, run_dir: Path, folder: Path) -> dict[str, int]:
    """Two starts on one folder, one kill, and what must be true whatever came first."""
    first = Start(root, run_dir, folder)
    time.sleep(pace * draw.choice([0, 0, draw.uniform(0, 3)]))
    second = Start(root, run_dir, folder)
    starts = [first, second]
    how = draw.choice(KILLS)
    time.sleep(pace * draw.uniform(0, 4))
    for victim in starts if how == "both agents" else [draw.choice(starts)]:
        victim.kill(how)
    time.sleep(pace * draw.uniform(0, 2))
    third = Start(root, run_dir, folder)  # finds the folder free, taken, or its lock stale
    starts.append(third)
    time.sleep(pace * draw.uniform(1, 4))
    refused = 0
    processes = [process for start in starts for process in start.ranks]
    ends = [start.agent.poll() for start in starts]
    for start in starts:
        start.agent.kill()
    for process in processes:  # one that was stopped before its first line cannot know of its agent yet
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)
    until(lambda: not any(map(alive, processes)), 60, "the end of all ranks")
    rank_0 = {start.number: start.ranks[0] for start in starts}
    for start, end in zip(starts, ends, strict=True):
        text = start.log.read_text()
        if end is None or start.killed:
            continue
        # It ended by itself: because another one has the folder, which it names.
        assert end == 1, text
        assert text.count("error: ") == 1, text
        told = re.search(r"is taken: (?:rank \d of )?a run that was started at .* on (\S+), process (\d+)", text)
        assert told, text
        assert told[1] == socket.gethostname()
        others = [process for other in starts if other is not start for process in other.ranks]
        assert int(told[2]) in others, (told[0], rank_0)
        refused += 1
    saved = sorted(path for path in run_dir.glob("checkpoints/step_*") if not path.suffix)
    for path in saved:
        if path != saved[-1] and not (path / checkpoint.MARKER).exists():
            continue  # an old one, whose deletion was cut short
        assert checkpoint.damage(path) is None
        assert len(writers(path)) == 1, f"{path} is of two runs"
    return {"refused": refused, "reached": max((int(p.name[5:14]) for p in run_dir.glob("checkpoints/step_*")), default=0)}


def kills_and_starts(root: Path, folder: Path, rounds: int, seed: int, pace: float) -> None:
    run_dir = folder / "run"
    (folder / "train.py").write_text(MARKED + PLAIN)
    draw = random.Random(seed)
    seen = [one_round(draw, pace, root, run_dir, folder) for _ in range(rounds)]
    print(f"{rounds} rounds: {sum(one['refused'] for one in seen)} starts refused, step {seen[-1]['reached']} reached")
    assert sum(one["refused"] for one in seen) >= rounds // 3, seen
    # What came of it all is what an undisturbed run gives, to the bit.
    epochs = -(-max(seen[-1]["reached"], 1) // STEPS_PER_EPOCH) + 1
    last = Start(root, run_dir, folder, f"training.epochs={epochs}")
    assert last.agent.wait(300) == 0, last.log.read_text()
    action = {"kind": "train", "name": "whole", "config": str(root / "config.yaml"), "run_dir": str(folder / "whole")}
    launch(2, [action | {"overrides": [f"training.epochs={epochs}"]}], folder)
    name = f"checkpoints/step_{epochs * STEPS_PER_EPOCH:09d}"
    expected, found = tensors(folder / "whole" / name), tensors(run_dir / name)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not expected[key].equal(found[key])] == []
    assert losses(run_dir) == losses(folder / "whole")
    assert sorted(path.name for path in run_dir.iterdir() if path.suffix == ".tmp") == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_kills_and_starts_in_pairs_never_mix_two_runs(root, tmp_path):
    kills_and_starts(root, tmp_path, rounds=100, seed=1, pace=0.5)
