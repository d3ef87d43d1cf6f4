"""Commands and ranks as processes of their own that need not import torch, torchrec and fbgemm again.

Those imports take six seconds of a core, more than most of what tests do in a process. So a server (the standard library's
fork server), which has imported them (preload.py) and done nothing else, forks each process. Such a process has arguments,
environment, folder, output, signals and exit code of its own; imports and hash seed are the server's, and it ends without
the destructors of native libraries. Tests that are about any of these start Python with `subprocess`.

Where there is a GPU each process begins anew: importing fbgemm asks for the driver, and CUDA works in no process that is forked
from one that has done so; ranks would find no GPU, and train on the CPU.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.multiprocessing

ROOT = Path(__file__).parents[1]
START = "spawn" if torch.cuda.is_available() else "forkserver"
FORKS = multiprocessing.get_context(START)
FORKS.set_forkserver_preload(["tests.preload"])
PR_SET_PDEATHSIG = 1


def environment(**extra: str) -> dict[str, str]:
    """That of this process, with one thread and the packages of this checkout."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def alive(process: int) -> bool:
    """False for what has ended, whether or not its parent has asked for its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Command:
    """A running `[sys.executable, "-m", MODULE, ...]` or `[sys.executable, FILE, ...]`, to use like a `subprocess.Popen`.

    Args:
        log: where standard output and standard error go; otherwise `communicate` returns them.
        prepare: called in the new process, before the command.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
        log: Path | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        assert arguments[0] == sys.executable
        self.arguments = arguments
        if log:
            log.touch()
        else:
            self._outputs = [tempfile.NamedTemporaryFile("r+") for _ in range(2)]  # noqa: SIM115 (deleted with this object)
        paths = [log, log] if log else [Path(file.name) for file in self._outputs]
        target = (arguments[1:], env or environment(), cwd, paths, prepare)
        self._process = FORKS.Process(target=_run, args=target, daemon=True)
        # The first one starts the server, which inherits it; one that begins anew looks for a GPU before it can be told not to.
        with mock.patch.dict(os.environ, target[1] if START == "spawn" else environment()):
            self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote to standard output and standard error."""
        self.wait(timeout)
        stdout, stderr = (file.read() for file in self._outputs)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """To a process that has not ended; as with `subprocess.Popen`, to none where it ends at this moment."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # the server has seen its end, and we have not heard of it yet
                os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(arguments: list[str], timeout: float | None = None, **options) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` with its output captured; options as of `Command`."""
    command = Command(arguments, **options)
    try:
        stdout, stderr = command.communicate(timeout)
    finally:
        command.kill()
    return subprocess.CompletedProcess(arguments, command.wait(), stdout, stderr)


def spawn(function: Callable, arguments: tuple, nprocs: int) -> None:
    """Like `torch.multiprocessing.spawn`: `function(rank, *arguments)` in processes of their own."""
    with mock.patch.dict(os.environ, environment()):
        torch.multiprocessing.start_processes(function, arguments, nprocs, start_method=START)


def _run(arguments: list[str], env: dict[str, str], cwd: Path, outputs: list[Path], prepare: Callable | None) -> None:
    """In the new process: become what Python started with these arguments would be."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a script has it ignored
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    tempfile.tempdir = None  # which TMPDIR may say otherwise than to the process that this one was forked from
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # the platform's own again
    np.random.seed()  # noqa: NPY002 (the state that others draw from)
    if prepare:
        prepare()
    path = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if arguments[0] == "-m":
        sys.path[:0] = [str(cwd), *path]
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:0] = [str(Path(arguments[0]).parent), *path]
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
