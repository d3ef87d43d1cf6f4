"""torchrun with an honest end: what the agents end with, the same on all nodes, and when."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmlrec.launch import agent
from mmlrec.launch.agent import outcome
from tests.datasets import write_dataset
from tests.processes import Command, environment
from tests.training.launch import free_port, losses, rank_process

# A rank that needs no torch: ends with its code, kills itself with it, or trains until it is told to stop.
RANK = """
import os, signal, sys, time
words, parent = sys.argv[1].split(","), os.getppid()
word, *stopped = words[int(os.environ["RANK"])].split("-")
def save(*_):
    time.sleep(float(stopped[1]) if stopped[1:] else 0)
    open("saved" + os.environ["RANK"], "w").close()
    os._exit(int(stopped[0]))
if word != "trains":
    with open("starts", "a") as file:
        file.write(f"{word} {os.environ['TORCHELASTIC_USE_AGENT_STORE']} {os.environ['MASTER_PORT']}\\n")
if stopped:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN if stopped[0] == "never" else save)
if word == "trains":
    open("trains" + os.environ["RANK"], "w").close()
while word == "trains" and os.getppid() == parent:
    time.sleep(0.1)
while not all(os.path.exists(f"trains{rank}") for rank, other in enumerate(words) if other.startswith("trains")):
    time.sleep(0.1)
if word == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(word))
"""
SCONTROL = "#!/bin/sh\necho $@ >> scontrol\n"


@dataclass
class Case:
    """What the ranks of a job do, and what its agents have to end with.

    Attributes:
        send: to the first agent, when the ranks that train do so.
        starts: of the rank that makes them end.
        slurm: what the agent tells Slurm.
        says: the lines beginning with `error:`.
    """

    ranks: str
    code: int | None
    nodes: int = 1
    options: tuple[str, ...] = ()
    send: int | None = None
    starts: int = 1
    slurm: bool = False
    says: list[str] = field(default_factory=list)


AGAIN = r"Run the same command again to continue from the newest checkpoint\."
GONE = rf"error: the first node \(localhost:\d+\) has ended, or cannot be reached\. {AGAIN}"
KILLED = rf"error: no rank of this run ended with a message: killed, or out of memory\. {AGAIN}"
CASES = {
    "done": Case("0,0", 0),
    "mistake": Case("2,trains", 2, slurm=True),
    "mistake, told after its victim has ended": Case("1,trains-2", 2, slurm=True),
    "preempted": Case("85,85", 85),
    "a rank is killed": Case("killed,trains-85", 1, says=[KILLED]),
    "SIGTERM": Case("trains-85,trains-85", 85, send=signal.SIGTERM),
    "SIGUSR1": Case("trains-85,trains-85", 85, send=signal.SIGUSR1, options=("--signals-to-handle", "SIGTERM,SIGUSR1")),
    "SIGTERM, one rank takes its time": Case(
        "trains-85,trains-85-14", 85, send=signal.SIGTERM, options=("--shutdown-timeout", "40")
    ),
    "SIGTERM, not in time": Case("trains-85,trains-never", 1, send=signal.SIGTERM, options=("--shutdown-timeout", "1")),
    "a mistake is not started again in place": Case("2,trains", 2, options=("--max-restarts", "3"), slurm=True),
    "a killed rank is": Case("killed,trains-85", 1, options=("--max-restarts", "2"), starts=3, says=[KILLED]),
    "all nodes know of a mistake": Case("2,1", 2, nodes=2, options=("--max-restarts", "3"), slurm=True),
    "a node that is done knows, too": Case("0,2", 2, nodes=2, slurm=True),
    "the first node is killed": Case("trains-1,trains-1", None, nodes=2, send=signal.SIGKILL, says=[GONE]),
}


@dataclass
class End:
    codes: list[int]
    output: str
    folder: Path


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """All cases, some at a time: they mostly wait."""
    waiting, sent, ended = list(CASES), set(), {}
    running: dict[str, tuple[list[Command], Path]] = {}
    limit = time.monotonic() + 400
    try:
        while waiting or running:
            assert time.monotonic() < limit, [(folder / "log0").read_text() for _, folder in running.values()]
            while waiting and len(running) < 6:
                name = waiting.pop(0)
                folder = tmp_path_factory.mktemp("case")
                running[name] = (start(CASES[name], folder), folder)
            for name, (agents, folder) in list(running.items()):
                case = CASES[name]
                if case.send and name not in sent and len(list(folder.glob("trains*"))) == 2:
                    agents[0].send_signal(case.send)
                    sent.add(name)
                if all(agent.poll() is not None for agent in agents):
                    del running[name]
                    output = "".join((folder / f"log{number}").read_text() for number in range(case.nodes))
                    ended[name] = End([agent.wait() for agent in agents], output, folder)
            time.sleep(0.05)
    finally:
        for agents, _ in running.values():
            for agent in agents:
                agent.kill()
    return ended


def start(case: Case, folder: Path) -> list[Command]:
    (folder / "rank.py").write_text(RANK)
    (folder / "bin").mkdir()
    (folder / "bin/scontrol").write_text(SCONTROL)
    (folder / "bin/scontrol").chmod(0o755)
    variables = environment(SLURM_JOB_ID="7", TORCHX_MAX_RETRIES="3")
    variables["PATH"] = f"{folder / 'bin'}:{variables['PATH']}"
    command = [sys.executable, "-m", "mmlrec.launch.agent", "--tee", "3", *case.options]
    port, agents = free_port(), []
    for number in range(case.nodes):
        meet = ["--standalone", "--nproc-per-node", "2"]
        if case.nodes > 1:
            meet = ["--nnodes", str(case.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
            meet += ["--rdzv-conf", f"is_host={int(number == 0)}", "--rdzv-id", "test"]
        log = folder / f"log{number}"
        agents.append(Command([*command, *meet, "rank.py", case.ranks], env=variables, cwd=folder, log=log))
    return agents


@pytest.mark.parametrize("name", CASES)
def test_what_the_agents_end_with(ends, name):
    case, end = CASES[name], ends[name]
    if case.code is not None:
        assert end.codes == [case.code] * case.nodes, end.output
    else:
        assert end.codes == [-signal.SIGKILL, 1], end.output
    ending = [word for word in case.ranks.split(",") if "trains" not in word]
    if len(ending) == 1:
        starts = [line.split() for line in (end.folder / "starts").read_text().splitlines()]
        assert [(word, shared) for word, shared, _ in starts] == [(ending[0], "False")] * case.starts
        # Each time in a store of its own: in a former one are the addresses of ranks that are dead.
        assert len({port for *_, port in starts}) == case.starts
    if case.send and case.code == 85:
        assert len(list(end.folder.glob("saved*"))) == 2, end.output
    told = end.folder / "scontrol"
    assert told.exists() == case.slurm
    if case.slurm:
        assert set(told.read_text().splitlines()) == {"update JobId=7 Requeue=0"}
    said = [line for line in end.output.splitlines() if line.startswith("error:")]
    assert len(said) == len(case.says), end.output
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(case.says, said, strict=True)), said
    assert "Traceback" not in end.output
    if case.code in (0, 85):  # what was asked for reads like no failure
        assert not re.search("fail|error", end.output, re.IGNORECASE), end.output


@pytest.mark.parametrize(
    ("codes", "stopped_by", "expected"),
    [
        ([], 0, 0),
        ([0, 0], 0, 0),
        ([1, 2, -15], 0, 2),
        ([1, 3], 0, 3),
        ([85, 0, 85], 0, 85),
        ([85, 1], 0, 1),
        ([85, -9], 0, 1),
        ([85, -15], 0, 85),
        ([-15, 0], 0, 1),
        ([-15, -15], 0, 1),
        ([-15, 85], signal.SIGTERM, 85),
        ([-10, 0], signal.SIGUSR1, 85),
        ([-15, 2], signal.SIGTERM, 2),
        ([-2, 130], signal.SIGINT, 130),
        ([-15, 1], signal.SIGTERM, 85),
        ([130, 1], signal.SIGINT, 130),
        ([-15, 1, -9], signal.SIGTERM, 1),
        ([130], signal.SIGTERM, 130),
        ([85, 1], signal.SIGTERM, 1),
        ([-11], 0, 1),
        ([120], 0, 1),
    ],
)
def test_one_code_of_many(codes, stopped_by, expected):
    assert outcome(codes, stopped_by) == expected


def test_a_first_node_that_does_not_come_is_one_line_at_a_static_meeting_point_too(tmp_path):
    meet = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "localhost", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "mmlrec.launch.agent", *meet, "--rdzv-conf", "timeout=2", "none.py"]
    agent = Command(command, cwd=tmp_path, log=tmp_path / "log")
    assert agent.wait(120) == 1
    output = (tmp_path / "log").read_text()
    assert re.search(rf"^error: the nodes do not meet at localhost:\d+: .*timed out.* {AGAIN}$", output, re.MULTILINE), output
    assert "Traceback" not in output


class GaveUp(Exception):
    """The watch would end this process."""


@pytest.mark.parametrize(
    ("backend", "answers", "gives_up_after"),
    [
        ("c10d", "", 61),  # reached before the agent began
        ("c10d", "+" * 100, 161),
        ("c10d", "-" * 50 + "+", 112),  # away for less than a minute
        ("static", "", None),  # the first node still comes up
        ("static", "-" * 200 + "+", 262),
    ],
)
def test_when_an_agent_gives_up_that_waits_for_the_first_node(monkeypatch, backend, answers, gives_up_after):
    """Answers of the first node, one a second: + when it is reached, - or nothing when it is not. Afterwards it is not."""
    seconds, waiting = [0.0], agent.Agent.__new__(agent.Agent)
    waiting._meets, waiting._pcontext, waiting._due = True, None, 0.0
    waiting._rdzv_handler = SimpleNamespace(get_backend=lambda: backend)
    waiting._worker_group = SimpleNamespace(spec=SimpleNamespace(local_world_size=1))

    def sleep(given):
        seconds[0] += given
        if seconds[0] > 1000:
            raise TimeoutError

    def give_up(codes):
        raise GaveUp

    monkeypatch.setattr(agent, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: 1.0 + seconds[0]))
    monkeypatch.setattr(agent, "reachable", lambda _: answers[int(seconds[0]) - 1 :][:1] == "+")
    monkeypatch.setattr(waiting, "_give_up", give_up)
    with pytest.raises(GaveUp if gives_up_after else TimeoutError):
        waiting._watch()
    assert not gives_up_after or seconds[0] == gives_up_after


def test_slurm_that_does_not_answer_changes_no_exit_code(monkeypatch, capsys):
    def run(command, timeout, check):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(agent, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(agent, "shutil", SimpleNamespace(which=lambda name: name))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("TORCHX_MAX_RETRIES", "3")
    ended = []
    monkeypatch.setattr(agent, "os", SimpleNamespace(environ=os.environ, _exit=ended.append))
    agent._end(2)
    assert ended == [2]
    assert "Slurm may start this job again in vain" in capsys.readouterr().err


CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: shared_bottom, bottom_hidden_units: [8], tower_hidden_units: []}}
embeddings: {{dim: 4}}
training: {{batch_size: 32, epochs: 100000, patience: null, log_every_steps: 1, checkpoint_every_steps: 10}}
"""


def wait_for_step(run: Path, step: int, agent: Command, log: Path) -> None:
    limit = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < step:
        assert time.monotonic() < limit, log.read_text()
        assert agent.poll() is None, log.read_text()
        time.sleep(0.05)


@pytest.mark.long
def test_a_killed_rank_is_started_again_in_place_and_sigterm_saves(tmp_path):
    """Training itself, which meets anew each time, and goes on from its newest checkpoint."""
    data = write_dataset(tmp_path / "data", rows=200)
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=data.folder))
    run, log = tmp_path / "run", tmp_path / "log"
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--tee", "3"]
    train = ["-m", "apps.train", "--config", str(tmp_path / "config.yaml"), "--run-dir", str(run)]
    agent = Command([sys.executable, "-m", "mmlrec.launch.agent", *options, *train], log=log)
    try:
        wait_for_step(run, 25, agent, log)
        killed_at = max(losses(run))
        os.kill(rank_process(run, 1), signal.SIGKILL)
        wait_for_step(run, killed_at + 25, agent, log)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(120) == 85, log.read_text()
    finally:
        agent.kill()
    starts = re.findall(r"(new run|resumed) .*at step (\d+) of", (run / "train.log").read_text())
    assert [how for how, _ in starts] == ["new run", "resumed"]
    assert killed_at - 10 <= int(starts[1][1]) <= killed_at + 10
    assert (run / f"checkpoints/step_{max(losses(run)):09d}/COMPLETE.json").is_file()


@pytest.mark.parametrize(("given", "set_before", "seconds"), [([], None, 30), ([], "7", 7), (["0"], "7", 0), (["9"], "7", 9)])
def test_ranks_have_the_time_that_is_given_or_set_for_their_end(monkeypatch, given, set_before, seconds):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    if set_before:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", set_before)
    options = ["--shutdown-timeout", *given] if given else []
    assert agent._grace(agent._options().parse_args([*options, "train.py"])) == seconds
