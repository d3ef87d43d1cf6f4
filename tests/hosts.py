"""Pretend hosts: network namespaces joined by a switch, each with a host name and a hosts file of its own.

Nothing of them is seen outside: the switch is in a namespace of its own, the hosts file is mounted for a host's processes only.
Needs root and iproute2.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

# Of the host: its name, then the command in place of the shell.
ENTER = 'hostname "$0" && mount --bind "$HOSTS_FILE" /etc/hosts && exec "$@"'


class Hosts:
    """As a context: `names` are the hosts' full names; the first label is what `hostname` says.

    Skips the test where this machine cannot have such hosts.
    """

    def __init__(self, names: list[str], folder: Path) -> None:
        self.names, self.file = names, folder / "hosts"
        self.label = f"mmlrec{os.getpid()}"
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Hosts":
        missing = [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]
        if os.geteuid() != 0 or missing:
            pytest.skip(f"pretend hosts need root and {', '.join(missing) or 'iproute2'}")
        made = subprocess.run(["ip", "netns", "add", self.label], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self) -> None:
        switch, lines = self.label, ["127.0.0.1 localhost"]
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for number, name in enumerate(self.names, start=1):
            host = f"{self.label}-{number}"
            _ip("netns", "add", host)
            _ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", f"port{number}", "netns", switch)
            _ip("-n", switch, "link", "set", f"port{number}", "master", "switch", "up")
            _ip("-n", host, "addr", "add", f"10.79.0.{number}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", "eth0", "up")
            # The full name, and the same without its last parts, as a name server with search domains answers.
            parts = name.split(".")
            lines.append(" ".join([f"10.79.0.{number}", *(".".join(parts[:length]) for length in range(len(parts), 0, -1))]))
        self.file.write_text("\n".join(lines) + "\n")

    def start(self, number: int, command: list[str], *, env: dict[str, str], cwd: Path, log: Path) -> subprocess.Popen[bytes]:
        """Run a command on host `number`, the first is 0; its output goes to `log`."""
        enter = ["nsenter", f"--net=/run/netns/{self.label}-{number + 1}", "unshare", "--mount", "--uts"]
        enter += ["--propagation", "private", "sh", "-c", ENTER, self.names[number].split(".")[0]]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*enter, *command],
                env=env | {"HOSTS_FILE": str(self.file)},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def pids(self, number: int) -> list[int]:
        """Of the processes on a host."""
        return [int(pid) for pid in _ip("netns", "pids", f"{self.label}-{number + 1}").split()]

    def kill(self, number: int) -> None:
        """A host loses power."""
        for pid in self.pids(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, number: int) -> None:
        """Pull the network cable of a host: what others send is lost, and nobody is told."""
        self._link(number, "down")

    def heal(self, number: int) -> None:
        """Put it back."""
        self._link(number, "up")

    def _link(self, number: int, state: str) -> None:
        _ip("-n", self.label, "link", "set", f"port{number + 1}", state)

    def __exit__(self, *_: object) -> None:
        for number in range(len(self.names)):
            self.kill(number)
            _ip("netns", "del", f"{self.label}-{number + 1}")
        _ip("netns", "del", self.label)
        for process in self._running:
            process.wait(30)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check="add" in arguments).stdout
