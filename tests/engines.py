"""What builds the Dockerfile and runs its image: podman, or a bare chroot that replays the same instructions.

Both need root, and debootstrap for the base. The chroot needs no more than that.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT

#: A user that no image knows.
USER = "54321:54321"
#: Where a machine allows no raising of limits, podman's own are too high for it.
LIMITS = ["--ulimit", "nofile=1024:4096", "--ulimit", "nproc=4096:4096"]


def call(*command: str, seconds: int = 1800) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


def debian(folder: Path) -> Path:
    """A small Debian with Python, the base of images; skips the test where there can be none."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("the base of an image needs root and debootstrap")
    packages = "--include=python3,python3-venv,ca-certificates"
    made = call("debootstrap", "--variant=minbase", packages, "bookworm", str(folder))
    if made.returncode:
        pytest.skip(f"debootstrap could not make a base: {made.stdout.strip().splitlines()[-1:]}")
    return folder


class Podman:
    """Podman with a storage of its own."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("podman") is None:
            pytest.skip("no podman on this machine")
        self.folder = folder
        self.command = ["podman", "--root", f"{folder}/root", "--runroot", f"{folder}/run", "--storage-driver", "overlay"]
        self.command += ["--cgroup-manager", "cgroupfs", *(["--runtime", "runc"] if shutil.which("runc") else [])]

    def build(self, base: Path, volumes: list[str]) -> None:
        """Build the image; `volumes` (source:target:ro) are there during the build only. Skips where no container starts."""
        packed = subprocess.Popen(["tar", "-C", str(base), "-c", "."], stdout=subprocess.PIPE)
        loaded = subprocess.run(
            [*self.command, "import", "-", "localhost/base"], stdin=packed.stdout, capture_output=True, text=True, check=False
        )
        assert packed.wait() == loaded.returncode == 0, loaded.stderr
        started = call(*self.command, "run", "--rm", *LIMITS, "--network", "none", "localhost/base", "true")
        if started.returncode:
            pytest.skip(f"podman starts no container here: {started.stderr.strip()}")
        options = ["--isolation", "chroot", "--network", "host", "--layers=false", "--format", "docker", *LIMITS]
        options += [word for volume in volumes for word in ("-v", volume)]
        built = call(*self.command, "build", *options, "--build-arg", "BASE=localhost/base", "-t", "localhost/mmlrec", ".")
        assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
        (image,) = json.loads(call(*self.command, "image", "inspect", "localhost/mmlrec").stdout)
        assert str(ROOT) not in json.dumps(image)
        assert image["Config"]["User"] == "10001:10001"
        assert image["Config"]["Cmd"] == ["python", "-m", "mmlrec.doctor"]
        assert image["Healthcheck"]["Test"] == ["CMD", *image["Config"]["Cmd"]]

    def run(self, command: list[str], mounts: dict[Path, str]) -> subprocess.CompletedProcess[str]:
        """Run as USER without a network, in a file system that is only read but for `mounts` and /tmp."""
        alone = ["--read-only", "--network", "none", "--user", USER, "--shm-size", "256m"]
        alone += [*LIMITS, "--no-healthcheck"]  # which podman leaves to systemd
        options = [word for source, target in mounts.items() for word in ("-v", f"{source}:{target}")]
        return call(*self.command, "run", "--rm", *alone, *options, "localhost/mmlrec", *command)

    def close(self) -> None:
        """Give the disk back."""
        call(*self.command, "rmi", "--all", "--force")
        shutil.rmtree(self.folder, ignore_errors=True)


class Chroot:
    """The Dockerfile's instructions, one after the other, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder
        self.work = "/"
        self.environment: dict[str, str] = {}
        self.default: list[str] = []

    def build(self, base: Path, volumes: list[str]) -> None:
        """As of Podman."""
        text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
        stages: dict[str, Path] = {}
        arguments: dict[str, str] = {}
        for line in text.splitlines():
            name, _, rest = line.partition(" ")
            if name == "FROM":
                label = rest.partition(" AS ")[2] or "image"
                self.root, self.work, self.environment = self.folder / label, "/", {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
                stages[label] = self.root
                subprocess.run(["cp", "-a", str(base), str(self.root)], check=True)
            elif name == "ARG":
                key, _, arguments[key] = rest.partition("=")
            elif name == "ENV":
                for word in shlex.split(rest):
                    key, _, value = word.partition("=")
                    self.environment[key] = value.replace("$PATH", self.environment["PATH"])
            elif name == "WORKDIR":
                self.work = rest
                (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif name == "COPY":
                self._copy(rest.split(), stages)
            elif name == "RUN":
                done = self._enter(["sh", "-c", rest], [f"{volume}" for volume in volumes], arguments, user="0:0")
                assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            elif name == "CMD":
                self.default = json.loads(rest)
            elif name not in ("", "#", "USER", "HEALTHCHECK"):
                raise AssertionError(f"no idea how to replay: {line}")
        # An engine gives this to each container.
        (self.root / "etc/hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")

    def _copy(self, words: list[str], stages: dict[str, Path]) -> None:
        start = ROOT
        if words[0].startswith("--from="):
            start = stages[words.pop(0).partition("=")[2]]
        *sources, target = words
        if sources == ["."]:  # What .dockerignore lets through.
            listed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
            sources = [line.removeprefix("!") for line in listed if line.startswith("!")]
        for source in sources:
            place = self.root / os.path.join(self.work, target).lstrip("/")
            if target == ".":
                place = place / source
            if (start / source.lstrip("/")).is_dir():
                ignore = shutil.ignore_patterns("__pycache__") if start == ROOT else None
                shutil.copytree(start / source.lstrip("/"), place, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            else:
                shutil.copy(start / source.lstrip("/"), place)

    def run(self, command: list[str], mounts: dict[Path, str]) -> subprocess.CompletedProcess[str]:
        """As of Podman."""
        volumes = [f"{source}:{target}" for source, target in mounts.items()]
        return self._enter(command or self.default, volumes, {}, user=USER, alone=True)

    def _enter(
        self, command: list[str], volumes: list[str], variables: dict[str, str], *, user: str, alone: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run in the folder; `alone`: it is only read, and there is no network."""
        root = shlex.quote(str(self.root))
        script = [f"mount --bind {root} {root}"]
        for volume in volumes:
            source, target, *_ = volume.split(":")
            inside = self.root / target.lstrip("/")
            if Path(source).is_dir():
                inside.mkdir(parents=True, exist_ok=True)
            elif not inside.exists():
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.touch()
        if alone:
            script += [f"mount -o remount,ro,bind {root}", f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp", "ip link set lo up"]
        else:
            script += [f"cp -L /etc/resolv.conf {root}/etc/resolv.conf"]
        for volume in volumes:
            source, target, *_ = volume.split(":")
            script.append(f"mount --bind {shlex.quote(source)} {root}{target}")
        script += [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        inner = shlex.join(["sh", "-c", 'cd "$0" && exec "$@"', self.work, *command])
        given = shlex.join(f"{key}={value}" for key, value in {**variables, **self.environment}.items())
        script.append(f"exec chroot --userspec={user} --groups= {root} env -i {given} {inner}")
        spaces = ["--mount", "--propagation", "private", "--pid", "--fork", *(["--net"] if alone else [])]
        return call("unshare", *spaces, "sh", "-ec", "; ".join(script))

    def close(self) -> None:
        """Give the disk back."""
        shutil.rmtree(self.folder, ignore_errors=True)
