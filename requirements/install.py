"""Make the environment: `python3.11 requirements/install.py` creates .venv from the lock, installs this project and checks it.

Needs Python 3.11 or newer and a pip that reaches a package index, nothing else. Running it again is quick.
`--cuda` takes the GPU lock, `--torch 2.11` those of the older pair of torch and torchrec, `--venv DIR` another folder.
`--lock-only` leaves the test tools and the project out, for images.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
import venv
from collections import deque
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent
PROJECT = REQUIREMENTS.parent
# Linux wheels of torch on the public index are the CUDA build; its CPU build has an index of its own.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: What the locks of a torch are called behind `cpu` and `cuda`.
LOCKS = {"2.13": "", "2.11": "-2.11"}
PROBE_SECONDS = 8.0
PROBE = f"import urllib.request; urllib.request.urlopen('{TORCH_CPU_INDEX}/torch/', timeout=4)"


def main() -> int:
    """Create the environment; the exit code is that of the final check, where there is one."""
    parser = argparse.ArgumentParser(description="Create the environment, install mmlrec into it, and check it.")
    parser.add_argument("--venv", type=Path, default=PROJECT / ".venv", help="folder of the environment (default: .venv)")
    parser.add_argument("--cuda", action="store_true", help="the GPU build of torch and fbgemm (default: CPU)")
    parser.add_argument("--torch", choices=list(LOCKS), default="2.13", help="release of torch, with the torchrec of its time")
    parser.add_argument("--lock-only", action="store_true", help="neither test tools nor the project itself, and no check")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  users may start it with any Python
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: run this file with python3.11.")

    started = time.monotonic()
    python = arguments.venv / "bin" / "python"
    if not (arguments.venv / "bin" / "pip").exists():
        create(arguments.venv)
    lock = REQUIREMENTS / f"{'cuda' if arguments.cuda else 'cpu'}{LOCKS[arguments.torch]}.txt"
    if cuda_build(arguments.venv) not in (None, arguments.cuda):
        remove_builds(python)
    if arguments.cuda:
        pip(python, "torch, torchrec, fbgemm (CUDA)", "-r", str(lock))
    else:
        torch = re.search(r"^torch==\S+", lock.read_text(encoding="utf-8"), re.MULTILINE)
        assert torch is not None
        # On its own, so that no other package is looked for on that index.
        pip(python, f"{torch[0]} (CPU)", "--no-deps", *cpu_index(), torch[0])
        refuse_cuda_build(arguments.venv, arguments.torch)
        pip(python, "the rest of the lock", "--no-deps", "-r", str(lock))
    if arguments.lock_only:
        return 0
    pip(python, "test tools", "--no-deps", "-r", str(REQUIREMENTS / "dev.txt"))
    pip(python, "mmlrec", "--no-deps", "--no-build-isolation", "--editable", str(PROJECT))
    print(f"Installed into {arguments.venv} in {time.monotonic() - started:.0f} s. Checking it:", flush=True)
    return subprocess.run([python, "-m", "mmlrec.doctor"], cwd=PROJECT, check=False).returncode


def create(folder: Path) -> None:
    """Create the virtual environment, also where the system's Python comes without ensurepip."""
    print(f"Creating {folder} with Python {sys.version.split()[0]}", flush=True)
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    venv.create(folder, with_pip=has_ensurepip, symlinks=True)
    if not has_ensurepip:
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "pip"], check=True
        )


def cpu_index() -> list[str]:
    """The option that adds torch's CPU index, or nothing when it does not answer within seconds."""
    try:
        # A process of its own: no timeout inside Python bounds the look-up of a host name.
        reachable = (
            subprocess.run(
                [sys.executable, "-c", PROBE], stderr=subprocess.DEVNULL, timeout=PROBE_SECONDS, check=False
            ).returncode
            == 0
        )
    except subprocess.TimeoutExpired:
        reachable = False
    if not reachable:
        print(f"  {TORCH_CPU_INDEX} does not answer: taking torch from pip's own sources", flush=True)
    return ["--extra-index-url", TORCH_CPU_INDEX] if reachable else []


def cuda_build(folder: Path) -> bool | None:
    """Whether the torch of an environment is the CUDA build; None: it has no torch."""
    for version in folder.glob("lib/python3*/site-packages/torch/version.py"):
        return re.search(r"^cuda[^=]*= *['\"]", version.read_text(encoding="utf-8"), re.MULTILINE) is not None
    return None


def remove_builds(python: Path) -> None:
    """Uninstall torch and fbgemm of the build that is not wanted, which pip would keep: both builds have the same version."""
    print("Removing the other build of torch and fbgemm", flush=True)
    packages = ["torch", "fbgemm-gpu", "fbgemm-gpu-cpu"]
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *packages], check=True)


def refuse_cuda_build(folder: Path, torch: str) -> None:
    """Stop when pip has found the CUDA build only: without its CUDA libraries it does not even import.

    Args:
        folder: of the environment.
        torch: the release that was asked for, a key of LOCKS.
    """
    if cuda_build(folder):
        older = f" --torch {torch}" if LOCKS[torch] else ""
        sys.exit(
            "pip found only the CUDA build of torch. For the CPU build it needs "
            f"{TORCH_CPU_INDEX}, or a mirror or folder with torch's +cpu wheel (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).\n"
            f"For a GPU environment: {sys.executable} requirements/install.py --cuda{older}"
        )


def pip(python: Path, what: str, *options: str) -> None:
    """Run `pip install`, showing one line per package that is fetched, and pip's last words when it fails."""
    print(f"Installing {what}", flush=True)
    # Without compiling: Python compiles a module when it is first imported, most never are.
    command = [str(python), "-m", "pip", "install", "--no-compile", "--no-input", "--progress-bar", "off", *options]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=30)
    for line in process.stdout:
        last.append(line)
        if fetched := re.match(r"(?:Collecting|Processing) (?:\S*/)?(\S+)", line):
            print("  " + re.sub(r"-(cp|py)[23]\S*$", "", fetched[1]), flush=True)
        elif line.startswith("Installing collected packages"):
            print("  unpacking", flush=True)
    if process.wait() != 0:
        sys.exit(f"pip could not install {what}:\n{''.join(last)}\nThe command was: {' '.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
