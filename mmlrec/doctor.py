"""Checks the installation: whether torch, torchrec and fbgemm belong together and load, and whether a GPU is visible.

`python -m mmlrec.doctor` prints what is installed and, for everything that is wrong, the command that mends it; exit code 1
then. Metadata is read first and the libraries are imported in a child process, so a pairing that crashes on import is
diagnosed as well. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from mmlrec import __version__
from mmlrec.paths import shipped_folder

# torch major.minor -> torchrec and fbgemm that were built for it. fbgemm's operators load with no other torch.
PAIRS = {"2.13": ("1.8.0", "1.8.0"), "2.11": ("1.6.1", "1.6.0")}
PAIRED = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
# Imported by the library itself; then what torchrec imports, because the CPU lock is installed without dependencies.
REQUIRED = ("numpy", "pandas", "pyarrow", "pydantic", "PyYAML", "scikit-learn", "tabulate", "tensorboard", "tqdm")
TORCHREC_NEEDS = ("tensordict", "torchmetrics", "pyre-extensions")
TORCHX = ("torchx-nightly", "torchx")
#: What comes with NVIDIA's driver and with no package. fbgemm-gpu loads on no machine without it, not even for use on the CPU.
OF_THE_DRIVER = ("libnvidia-ml.so.1", "libcuda.so.1")

_IMPORTS = """
import warnings; warnings.simplefilter("ignore")
import torch, fbgemm_gpu, torchrec
torch.ops.fbgemm.asynchronous_complete_cumsum(torch.ones(2, dtype=torch.int64))
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print("GPU: " + (", ".join(torch.cuda.get_device_name(i) for i in range(count)) if count else "none visible"))
"""


@dataclass(frozen=True)
class Installed:
    """What package metadata says: versions by package name, and the CUDA version torch was built for (None: CPU)."""

    versions: Mapping[str, str]
    torch_cuda: str | None = None


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the command that mends it."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"PROBLEM {self.what}\n  Fix: {self.fix}"


def installed() -> Installed:
    """Read the metadata of this interpreter's packages, without importing any."""
    versions = {}
    for name in (*PAIRED, *REQUIRED, *TORCHREC_NEEDS, *TORCHX):
        try:
            versions[name] = distribution(name).version
        except PackageNotFoundError:
            continue
    cuda = None
    if "torch" in versions:
        source = Path(str(distribution("torch").locate_file("torch/version.py")))
        found = re.search(r"^cuda[^=\n]*= *['\"](.+)['\"]", source.read_text(encoding="utf-8"), re.MULTILINE)
        cuda = found[1] if found else None
    return Installed(versions, cuda)


def problems(found: Installed) -> list[Problem]:
    """Everything wrong with a set of installed packages, as far as their metadata tells."""
    versions = found.versions
    pip = f"{sys.executable} -m pip"
    result = []
    if "torch" not in versions:
        return [Problem("torch is not installed.", "make environment   (or: python3.11 requirements/install.py)")]
    torch = versions["torch"]
    pair = PAIRS.get(".".join(torch.split(".")[:2]))
    if pair is None:
        known = "; ".join(f"torch {t} with torchrec {r} and fbgemm {f}" for t, (r, f) in PAIRS.items())
        return [Problem(f"No tested torchrec and fbgemm belong to torch {torch}. Known: {known}.", _reinstall(found))]
    torchrec, fbgemm = pair
    wanted = "fbgemm-gpu" if found.torch_cuda else "fbgemm-gpu-cpu"
    other = "fbgemm-gpu-cpu" if found.torch_cuda else "fbgemm-gpu"
    build = f"the CUDA {found.torch_cuda} build" if found.torch_cuda else "the CPU build"
    replace = f"{pip} uninstall --yes fbgemm-gpu fbgemm-gpu-cpu && {pip} install --no-deps {wanted}=={fbgemm}"

    if wanted in versions and other in versions:
        result.append(Problem("fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other's files.", replace))
    elif other in versions:
        what, fix = f"torch {torch} is {build}, but {other} {versions[other]} is for the other one", replace
        if found.torch_cuda:  # such a pair loads, and one on a machine without a GPU may be meant for its CPU
            what += ": it trains on no GPU"
            fix += f"   (without a GPU: {_reinstall(found, gpu=False)})"
        result.append(Problem(f"{what}.", fix))
    elif wanted not in versions:
        result.append(Problem(f"{wanted} is not installed.", f"{pip} install --no-deps {wanted}=={fbgemm}"))
    elif _public(versions[wanted]) != fbgemm:
        result.append(Problem(f"{wanted} {versions[wanted]} does not load with torch {torch}, which needs {fbgemm}.", replace))
    if "torchrec" not in versions or _public(versions["torchrec"]) != torchrec:
        have = f"torchrec {versions['torchrec']}" if "torchrec" in versions else "no torchrec"
        fix = f"{pip} install --no-deps torchrec=={torchrec}"
        result.append(Problem(f"{have} is installed, torch {torch} needs {torchrec}.", fix))
    if missing := [name for name in (*REQUIRED, *TORCHREC_NEEDS) if name not in versions]:
        result.append(Problem(f"not installed: {', '.join(missing)}.", _reinstall(found)))
    if all(name in versions for name in TORCHX):
        fix = f"{pip} uninstall --yes torchx torchx-nightly && {pip} install --no-deps torchx-nightly==2026.10.26"
        result.append(Problem("torchx and torchx-nightly are both installed and overwrite each other's files.", fix))
    return result


def explain() -> str:
    """What to tell a user whose import failed: compares versions only, in milliseconds."""
    found = problems(installed())
    if not found:
        return "The versions of torch, torchrec and fbgemm fit. Find out more with: python -m mmlrec.doctor"
    return "\n".join(str(problem) for problem in found)


def import_problem(command: tuple[str, ...] = (sys.executable, "-c", _IMPORTS)) -> tuple[Problem | None, str]:
    """Import the libraries and run one fbgemm operator in a child process: a crash there is a finding, not our end.

    Returns:
        The problem, if any, and the child's line on GPUs.
    """
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return Problem("importing torch, fbgemm_gpu and torchrec did not end within 300 s.", _reinstall(installed())), ""
    if child.returncode == 0:
        return None, child.stdout.strip()
    absent = re.search(r"(\S+): cannot open shared object file", child.stderr)
    if absent and absent[1] in OF_THE_DRIVER:
        fix = f"install the driver of the GPU, or without a GPU the CPU build: {_reinstall(installed(), gpu=False)}"
        return Problem(f"fbgemm-gpu needs NVIDIA's driver, which is not on this machine: there is no {absent[1]}.", fix), ""
    lines = child.stderr.strip().splitlines()
    # Of a library that another one needs: the first error says which, the last one only who needs it.
    said = absent[0] if absent else lines[-1] if lines else "without a message"
    died = f"killed by signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    return Problem(f"torch, fbgemm_gpu and torchrec do not load ({died}): {said}", _reinstall(installed())), ""


def main() -> int:
    """Print the installation and its problems; 1 when there are any."""
    parser = argparse.ArgumentParser(prog="python -m mmlrec.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--versions-only", action="store_true", help="import nothing: for an image that is built without a GPU")
    arguments = parser.parse_args()
    found = installed()
    print(f"mmlrec {__version__}, Python {sys.version.split()[0]}; configs and torchx.yaml in {shipped_folder()}")
    build = f"CUDA {found.torch_cuda}" if found.torch_cuda else "CPU"
    for name in (*PAIRED, "torchx-nightly"):
        if name in found.versions:
            print(f"  {name} {found.versions[name]}" + (f" ({build} build)" if name == "torch" else ""))
    wrong = problems(found)
    if not wrong and not arguments.versions_only:
        broken, gpu = import_problem()
        wrong = [broken] if broken else []
        if gpu:
            print(f"  {gpu}")
    for problem in wrong:
        print(problem)
    if not wrong:
        print("The versions fit; nothing was imported." if arguments.versions_only else "All is well.")
    return 1 if wrong else 0


def _public(version: str) -> str:
    return version.partition("+")[0]


def _reinstall(found: Installed, *, gpu: bool = True) -> str:
    option = " --cuda" if found.torch_cuda and gpu else ""
    torch = ".".join(found.versions.get("torch", "").split(".")[:2])
    older = f" --torch {torch}" if torch in list(PAIRS)[1:] else ""
    return f"python3.11 requirements/install.py{option}{older}   (in a clone of the project)"


if __name__ == "__main__":
    sys.exit(main())
