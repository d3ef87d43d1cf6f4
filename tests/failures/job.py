"""A training on pretend hosts by the command of a preset, and a scheduler that starts it again."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchx.specs import macros

from mmlrec.launch.presets import Preset
from mmlrec.launch.spec import train_app
from tests.hosts import Hosts
from tests.processes import ROOT

RECORDED = "tests.failures.recorded"
#: With this code a command says that nothing would be gained by starting it again.
MISTAKE = 2
#: Within this many seconds all commands of a job have to end, once one has.
_ALL_END_WITHIN_S = 120.0
#: What torchrun puts before the lines of a rank.
_PREFIX = re.compile(r"^\[[^\]]*\d\]:")


class Fault(Exception):
    """What must not happen, and did."""


@dataclass
class End:
    """A command on a host that ended."""

    host: int
    code: int
    time: float


class Job:
    """A training, and the scheduler of its job.

    A job of fixed size is started again on all hosts, as Slurm and Volcano do, once all its commands have ended. The command
    of an elastic one is started again on its host alone. At most `retries` times, and not where a command ended with MISTAKE.

    Args:
        folder: gets `run`, the rows of each step, and the logs.
        options: keys of the training configuration.
        step_seconds: see `pace`.
        ends_rest: where one command has ended and the others do not, they get SIGTERM, as from Slurm; otherwise, and where
            that does not help, it is a fault.
    """

    def __init__(
        self,
        hosts: Hosts,
        folder: Path,
        preset: Preset,
        config: Path,
        options: list[str],
        *,
        retries: int,
        step_seconds: float,
        ends_rest: bool = False,
    ) -> None:
        self.hosts, self.folder, self.preset, self.retries = hosts, folder, preset, retries
        self.run, self.rows, self.logs = folder / "run", folder / "rows", folder / "logs"
        for path in (self.rows, self.logs):
            path.mkdir(parents=True)
        self._config, self._options, self._ends_rest = config, options, ends_rest
        self._pace = folder / "step_seconds"
        self._variables = {"MMLREC_TEST_ROWS": str(self.rows), "MMLREC_TEST_STEP_SECONDS": str(self._pace)}
        self.pace(step_seconds)
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.ends: list[End] = []
        self.starts, self.started_at, self._rest_is_told = 0, 0.0, False
        #: Host -> time before which nothing is started there.
        self.away: dict[int, float] = {}
        self.finished = False
        #: True while the scheduler starts nothing.
        self.held = False

    @property
    def elastic(self) -> bool:
        """Whether a host's command is started again by itself."""
        return self.preset.least_nodes < self.preset.most_nodes

    def pace(self, step_seconds: float) -> None:
        """What a step takes more than it would, from the next one on."""
        new = self._pace.with_name("step_seconds.new")
        new.write_text(str(step_seconds))
        new.replace(self._pace)

    def start(self, number: int) -> None:
        """Start the command on a host, whatever the scheduler would."""
        preset = self.preset.model_copy(update={"env": self.preset.env | self._variables})
        app = train_app(preset, config=str(self._config), overrides=self._options, run_dir=str(self.run), imports=[RECORDED])
        (role,) = app.roles
        values = macros.Values(img_root="", app_id="failures", replica_id=str(number), rank0_env="TORCHX_RANK0_HOST")
        role = values.apply(role)
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "TORCHX_RANK0_HOST": self.hosts.names[0]}
        log = self.logs / f"{len(list(self.logs.iterdir())):02d}-{self.hosts.names[number]}.log"
        self.running[number] = self.hosts.start(
            number, [role.entrypoint, *role.args], env=environment | role.env, cwd=ROOT, log=log
        )
        self.started_at = time.time()

    def start_all(self) -> None:
        """Start the job on the hosts that are there."""
        self.starts, self._rest_is_told = self.starts + 1, False
        for number in range(self.preset.most_nodes):
            if time.time() >= self.away.get(number, 0.0):
                self.start(number)

    def tend(self) -> None:
        """What a scheduler does all the time: see what ended, and start again what asks for it.

        Raises:
            Fault: a command ended with MISTAKE, one ended and the others did not, or no retry is left.
        """
        for number, process in list(self.running.items()):
            if (code := process.poll()) is not None:
                self.ends.append(End(number, code, time.time()))
                del self.running[number]
                if code == MISTAKE:
                    raise Fault(f"{self.hosts.names[number]} asks for no other start: exit code {code}")
        if self.finished or self.held or not self.starts:
            return
        if self.elastic:
            self._tend_each()
        elif not self.running:
            last = self.ends[-self.preset.most_nodes :]
            if all(end.code == 0 for end in last):
                self.finished = True
            elif time.time() >= max(self.away.values(), default=0.0):
                self._again()
                for number in range(self.preset.most_nodes):
                    self.hosts.heal(number)
                self.start_all()
        elif len(self.running) < self.preset.most_nodes:
            self._wait_for_rest()

    def _wait_for_rest(self) -> None:
        if time.time() - self.ends[-1].time < _ALL_END_WITHIN_S * (1 + self._rest_is_told):
            return
        if self._rest_is_told or not self._ends_rest:
            left = ", ".join(self.hosts.names[number] for number in self.running)
            raise Fault(f"{left} did not end within {_ALL_END_WITHIN_S:g} s of the other")
        self._rest_is_told = True
        for number in self.running:
            self.kill(self.agent(number), signal.SIGTERM)

    def _tend_each(self) -> None:
        if any(end.code == 0 for end in self.ends):
            self.finished = not self.running
            return
        for number in range(self.preset.most_nodes):
            if number not in self.running and time.time() >= self.away.get(number, 0.0):
                if any(end.host == number for end in self.ends):
                    self._again()
                self.starts += 1
                self.start(number)

    def _again(self) -> None:
        if self.starts > self.retries:
            raise Fault(f"not done after {self.retries} retries")

    def wait(self, condition: Callable[[], bool], seconds: float, *, interval: float = 0.02) -> bool:
        """Tend the job until something is so; False where it is not in time, or the job is finished before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            self.tend()
            if self.finished:
                return condition()
            time.sleep(interval)
        return False

    def agent(self, number: int) -> int:
        """Process id of what runs the ranks of a host: the command has become it."""
        return self.running[number].pid

    def worker(self, number: int) -> int | None:
        """Process id of a host's rank; None where there is none."""
        for pid in self.hosts.pids(number):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if pid != self.agent(number) and b"apps.train" in words and b"RANK" in _variables(pid):
                    return pid
        return None

    def rank(self, number: int) -> int | None:
        """Rank of the process on a host."""
        pid = self.worker(number)
        with contextlib.suppress(OSError):
            return None if pid is None else int(_variables(pid)[b"RANK"])
        return None

    def kill(self, pid: int | None, how: int = signal.SIGKILL) -> None:
        """Send a signal to a process, if it is still one."""
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, how)

    def steps(self) -> list[dict]:
        """What all ranks of all starts have noted, in order of time."""
        found = []
        for path in self.rows.iterdir():
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError):  # a line that was cut short by a kill
                    found.append(json.loads(line))
        return sorted(found, key=lambda record: record["time"])

    def newest_step(self) -> int:
        """The last step that the newest start has taken; 0 before the first."""
        newest = max(self.rows.iterdir(), key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            return 0
        lines = newest.read_bytes().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def said(self, pattern: str, since: dict[Path, int] | None = None) -> list[str]:
        """Lines of all logs that begin so, without what torchrun puts before them.

        Args:
            since: see `mark`.
        """
        found = []
        for log in sorted(self.logs.iterdir()):
            text = log.read_bytes()[(since or {}).get(log, 0) :].decode(errors="replace")
            found += [line for line in (_PREFIX.sub("", line) for line in text.splitlines()) if re.match(pattern, line)]
        return found

    def mark(self) -> dict[Path, int]:
        """How long each log is now."""
        return {log: log.stat().st_size for log in self.logs.iterdir()}

    def stop(self) -> None:
        """Power off."""
        for number in range(len(self.hosts.names)):
            self.hosts.kill(number)
        for process in self.running.values():
            process.wait(30)


def _variables(pid: int) -> dict[bytes, bytes]:
    pairs = (pair.partition(b"=") for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return {name: value for name, _, value in pairs}
