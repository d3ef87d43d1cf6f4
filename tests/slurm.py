"""A real Slurm on this machine: a controller and two node daemons, without systemd, accounting or anything below /etc.

Needs root and Debian's packages slurm-wlm and munge, whose slurmd is built for several on one host.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

CONF = """
ClusterName=test
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4096
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4096
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""
NODES = ("n1", "n2")


class Slurm:
    """As a context: `environment` is what its commands need. Skips the test where this machine cannot have it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: it holds a socket
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "Slurm":
        missing = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(tool) is None]
        if os.geteuid() != 0 or missing:
            pytest.skip(f"a Slurm needs root and {', '.join(missing) or 'slurm-wlm and munge'}")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        for name in ("state", "spool.n1", "spool.n2"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munged.pid"}
        files |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
        self.call("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
        # Jobs meet at a port that goes by their number: those of another Slurm on this machine have others.
        first = random.SystemRandom().randint(1, 50_000)
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, ports=_free_ports(3), first=first))
        self.call("slurmctld", "-c")
        # The nodes' names have to lead somewhere: the first one's is where ranks meet.
        (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def start_node(self, node: str) -> None:
        """Start its daemon, in a mount namespace of its own."""
        start = f"mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -N {node}"
        self.call("unshare", "--mount", "--propagation", "private", "sh", "-c", start)

    def kill_node(self, node: str) -> None:
        """Kill the daemon and all that it has started, at once: what is in its mount namespace."""
        daemon = (self.folder / f"{node}.pid").read_text().strip()
        place = os.readlink(f"/proc/{daemon}/ns/mnt")
        assert place != os.readlink("/proc/self/ns/mnt")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns/mnt") == place:
                    os.kill(int(process.name), signal.SIGKILL)

    def wait_for_nodes(self) -> None:
        """Until both are there, and end nothing any more."""
        limit = time.monotonic() + 60
        while not set(self.call("sinfo", "-h", "-N", "-o", "%T").split()) <= {"idle", "mixed", "allocated"}:
            assert time.monotonic() < limit, self.logs()
            time.sleep(0.3)

    def logs(self) -> str:
        """What its daemons have to say."""
        return "\n".join(f"--- {log.name}:\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))

    def call(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True, timeout=60).stdout

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of the first component of a job, which runs the batch script: JobState, Restarts, BatchHost, ..."""
        return self._components(job)[0]

    def _components(self, job: str) -> list[dict[str, str]]:
        lines = self.call("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if line]

    def ends(self, job: str, state: str, seconds: float) -> bool:
        """Whether a job ends on all its nodes in this JobState. One that is started again passes through several."""
        limit = time.monotonic() + seconds
        while {component["JobState"] for component in self._components(job)} != {state}:
            if time.monotonic() > limit:
                return False
            time.sleep(0.5)
        return True

    def wait_for_requeue(self, job: str) -> None:
        """Until a job that is started again is in the queue."""
        limit = time.monotonic() + 90
        while (state := self.job(job))["JobState"] != "PENDING":
            assert time.monotonic() < limit, state
            time.sleep(0.3)

    def start_requeued(self, job: str) -> None:
        """Take away the two minutes for which Slurm holds a job that is started again, each time that it does."""
        self.wait_for_requeue(job)
        self.wait_for_nodes()
        time.sleep(2)  # In the second in which it has ended, what is left of it would be taken for the new start.
        limit = time.monotonic() + 90
        while self.job(job)["JobState"] == "PENDING":
            assert time.monotonic() < limit, self.logs()
            # Refused where it has just begun.
            with contextlib.suppress(subprocess.CalledProcessError):
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(1)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.call("scancel", "--user", "root")
        for name in (*NODES, "slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        time.sleep(1)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
