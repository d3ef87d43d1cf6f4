import importlib.util
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "requirements" / "install.py"


@pytest.fixture
def install():
    spec = importlib.util.spec_from_file_location("install_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("probe", "options"), [("pass", 2), ("raise OSError('unreachable')", 0), ("import time; time.sleep(60)", 0)]
)
def test_torch_index_is_used_only_when_it_answers(install, monkeypatch, probe, options):
    monkeypatch.setattr(install, "PROBE", probe)
    monkeypatch.setattr(install, "PROBE_SECONDS", 1.0)
    started = time.monotonic()
    assert install.cpu_index() == ["--extra-index-url", install.TORCH_CPU_INDEX][:options]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(("line", "refused"), [("cuda: Optional[str] = None", False), ("cuda: Optional[str] = '13.0'", True)])
def test_a_cuda_build_in_the_cpu_environment_is_refused(install, tmp_path, line, refused):
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "torch"
    folder.mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = '7'\n")
    if not refused:
        install.refuse_cuda_build(tmp_path)
        return
    with pytest.raises(SystemExit, match=r"only the CUDA build of torch.*whl/cpu"):
        install.refuse_cuda_build(tmp_path)


def fake_python(folder: Path, script: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_progress_is_one_line_a_package(install, tmp_path, capsys):
    script = """
echo 'Looking in links: x'
echo 'Collecting a-b-c==1.0 (from -r requirements/cpu.txt (line 3))'
echo '  Downloading a.whl (3 kB)'
echo 'Processing /x/y/torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl'
echo 'Installing collected packages: a, torch'"""
    install.pip(fake_python(tmp_path, script), "things", "a-b-c==1.0")
    assert capsys.readouterr().out == "Installing things\n  a-b-c==1.0\n  torch-2.13.0+cpu\n  unpacking\n"


def test_a_failure_shows_what_pip_said_and_the_command(install, tmp_path):
    python = fake_python(tmp_path, "echo 'ERROR: No matching distribution found for x' >&2; exit 1")
    with pytest.raises(SystemExit, match=r"could not install things:\nERROR: No matching distribution found for x\n") as caught:
        install.pip(python, "things", "x==1")
    assert str(caught.value).endswith("x==1")
