import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from apps.cli import run
from mmlrec import doctor
from mmlrec.doctor import Installed, Problem, explain, import_problem, installed, problems

OTHERS = dict.fromkeys((*doctor.REQUIRED, *doctor.TORCHREC_NEEDS, "torchx-nightly"), "1.0")
CPU = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", **OTHERS}
GPU = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", **OTHERS}


def changed(versions: dict[str, str], **changes: str | None) -> dict[str, str]:
    renamed = {name.replace("_", "-"): version for name, version in changes.items()}
    return {name: version for name, version in (versions | renamed).items() if version is not None}


def only(found: Installed) -> Problem:
    (problem,) = problems(found)
    return problem


@pytest.mark.parametrize(
    "found",
    [
        Installed(CPU),
        Installed(GPU, "13.0"),
        Installed(changed(GPU, torch="2.11.0", torchrec="1.6.1", fbgemm_gpu="1.6.0"), "13.0"),
        Installed(changed(CPU, torch="2.11.0+cpu", torchrec="1.6.1+cpu", fbgemm_gpu_cpu="1.6.0")),
    ],
)
def test_known_pairs_are_well(found):
    assert problems(found) == []


@pytest.mark.parametrize(
    ("found", "what", "fix"),
    [
        (
            Installed(changed(CPU, fbgemm_gpu="1.8.0")),
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed",
            "uninstall --yes fbgemm-gpu fbgemm-gpu-cpu && PIP install --no-deps fbgemm-gpu-cpu==1.8.0",
        ),
        (
            Installed(changed(GPU, fbgemm_gpu_cpu="1.8.0"), "13.0"),
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed",
            "uninstall --yes fbgemm-gpu fbgemm-gpu-cpu && PIP install --no-deps fbgemm-gpu==1.8.0",
        ),
        (
            Installed(changed(CPU, fbgemm_gpu_cpu=None, fbgemm_gpu="1.8.0")),
            "torch 2.13.0+cpu is the CPU build, but fbgemm-gpu 1.8.0 is for the other one",
            "install --no-deps fbgemm-gpu-cpu==1.8.0",
        ),
        (
            Installed(changed(CPU, torch="2.13.0"), "13.0"),
            "torch 2.13.0 is the CUDA 13.0 build, but fbgemm-gpu-cpu 1.8.0 is for the other one",
            "install --no-deps fbgemm-gpu==1.8.0",
        ),
        (
            Installed(changed(CPU, fbgemm_gpu_cpu="1.9.0")),
            "fbgemm-gpu-cpu 1.9.0 does not load with torch 2.13.0+cpu, which needs 1.8.0",
            "install --no-deps fbgemm-gpu-cpu==1.8.0",
        ),
        (
            Installed(changed(CPU, fbgemm_gpu_cpu=None)),
            "fbgemm-gpu-cpu is not installed",
            "PIP install --no-deps fbgemm-gpu-cpu==1.8.0",
        ),
        (
            Installed(changed(CPU, torchrec="1.9.0")),
            "torchrec 1.9.0 is installed, torch 2.13.0+cpu needs 1.8.0",
            "PIP install --no-deps torchrec==1.8.0",
        ),
        (
            Installed(changed(CPU, torchrec=None)),
            "no torchrec is installed, torch 2.13.0+cpu needs 1.8.0",
            "PIP install --no-deps torchrec==1.8.0",
        ),
        (
            Installed(changed(GPU, torch="2.12.1"), "13.0"),
            "No tested torchrec and fbgemm belong to torch 2.12.1. Known: torch 2.13 with torchrec 1.8.0 and fbgemm 1.8.0;",
            "requirements/install.py --cuda",
        ),
        (
            Installed(changed(CPU, pyarrow=None, tensordict=None)),
            "not installed: pyarrow, tensordict.",
            "requirements/install.py",
        ),
        (
            Installed(changed(CPU, torchx="0.7.0")),
            "torchx and torchx-nightly are both installed",
            "install --no-deps torchx-nightly==",
        ),
        (Installed({}), "torch is not installed", "make environment"),
    ],
)
def test_each_fault_is_named_with_its_fix(found, what, fix):
    problem = only(found)
    assert what in problem.what
    assert fix.replace("PIP", f"{sys.executable} -m pip") in problem.fix


def test_metadata_alone_is_enough(monkeypatch, tmp_path):
    """A CUDA torch that could not be imported at all is still recognised."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip = None\n")

    class Fake:
        def __init__(self, version):
            self.version = version

        def locate_file(self, path):
            return tmp_path / path

    def fake(name):
        if name not in CPU:
            raise PackageNotFoundError(name)
        return Fake(changed(CPU, torch="2.13.0")[name])

    monkeypatch.setattr(doctor, "distribution", fake)
    assert installed() == Installed(changed(CPU, torch="2.13.0"), "13.0")
    assert "is the CUDA 13.0 build, but fbgemm-gpu-cpu" in explain()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise OSError('libfbgemm.so: undefined symbol: x')", "(exit code 1): OSError: libfbgemm.so: undefined symbol: x"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "(killed by signal 11): without a message"),
        (
            "import ctypes\ntry:\n ctypes.CDLL('libabsent.so.7')\nexcept OSError as error:\n raise OSError('x.so') from error",
            "(exit code 1): libabsent.so.7: cannot open shared object file",
        ),
    ],
)
def test_a_library_that_crashes_on_import_is_a_finding(code, said):
    problem, gpu = import_problem((sys.executable, "-c", code))
    assert problem is not None
    assert said in problem.what
    assert gpu == ""


def test_this_environment_is_well():
    result = subprocess.run([sys.executable, "-m", "mmlrec.doctor"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("All is well.\n")
    assert "  GPU: " in result.stdout


def test_runs_where_nothing_is_installed(tmp_path):
    """Under -S no site-packages exist: the doctor must still start, say what is missing and exit 1."""
    root = str(doctor.Path(doctor.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-S", "-m", "mmlrec.doctor"], cwd=root, capture_output=True, text=True, env={"PATH": ""}, check=False
    )
    assert result.returncode == 1
    assert "PROBLEM torch is not installed." in result.stdout
    assert result.stderr == ""


def test_an_older_pair_is_mended_by_its_own_lock():
    older = changed(GPU, torch="2.11.0", torchrec="1.6.1", fbgemm_gpu="1.6.0", tensordict=None)
    assert only(Installed(older, "13.0")).fix.startswith("python3.11 requirements/install.py --cuda --torch 2.11 ")


def test_a_machine_without_a_driver_is_told_so(monkeypatch):
    """fbgemm-gpu needs what comes with the driver. Installing the packages again, as was said once, does not bring it."""
    older = changed(GPU, torch="2.11.0", torchrec="1.6.1", fbgemm_gpu="1.6.0")
    monkeypatch.setattr(doctor, "installed", lambda: Installed(older, "13.0"))
    cause = "OSError('libnvidia-ml.so.1: cannot open shared object file: No such file or directory')"
    code = f"try:\n raise {cause}\nexcept OSError as e:\n raise OSError('Could not load this library: fbgemm_gpu_py.so') from e"
    problem, _ = import_problem((sys.executable, "-c", code))
    assert "needs NVIDIA's driver, which is not on this machine: there is no libnvidia-ml.so.1" in problem.what
    assert "or without a GPU the CPU build: python3.11 requirements/install.py --torch 2.11 " in problem.fix


def test_a_mixed_pair_says_what_it_can_and_both_ways_out():
    problem = only(Installed(changed(CPU, torch="2.13.0"), "13.0"))
    assert "it trains on no GPU" in problem.what
    assert "without a GPU: python3.11 requirements/install.py " in problem.fix
    assert "trains on no GPU" not in only(Installed(changed(CPU, fbgemm_gpu_cpu=None, fbgemm_gpu="1.8.0"))).what


def test_versions_alone_can_be_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "import_problem", lambda: pytest.fail("an image is built where nothing can be imported"))
    monkeypatch.setattr("sys.argv", ["doctor", "--versions-only"])
    monkeypatch.setattr(doctor, "installed", lambda: Installed(GPU, "13.0"))
    assert doctor.main() == 0
    assert capsys.readouterr().out.endswith("The versions fit; nothing was imported.\n")
    monkeypatch.setattr(doctor, "installed", lambda: Installed(changed(GPU, torchrec="1.6.1"), "13.0"))
    assert doctor.main() == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError("Could not load this library: /x/fbgemm_gpu_py.so"), 3, ["/x/fbgemm_gpu_py.so", "python -m mmlrec.doctor"]),
        (OSError("libx.so.1: cannot open shared object file: No such file"), 3, ["libx.so.1", "python -m mmlrec.doctor"]),
        (
            OSError("Couldn't deserialize thrift"),
            2,
            ["a file: Couldn't deserialize thrift. Free space, or choose another folder."],
        ),
    ],
)
def test_a_library_that_does_not_load_is_no_full_disk(error, code, words, capsys):
    """Torch and ctypes tell it as an OSError without a number, which was once told as "a file: None. Free space ..."."""

    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == code
    told = capsys.readouterr().err
    assert all(word in told for word in words)
    assert "None" not in told
